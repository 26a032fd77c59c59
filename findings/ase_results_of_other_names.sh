#!/usr/bin/env bash
# ASE: results that are not ASE's own properties reach no file, and .traj and .db drop per-atom arrays too.
#
# A calculator with results["energy_std"] or results["forces_std"] works in memory; after write() and read() only ASE's own
# properties are left, in every format, without a word. Custom arrays survive extended XYZ only; .db loses info too.
# Seen with ase 3.29.0. Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check ase==3.29.0
cd "$folder"; "$folder/env/bin/python" - <<'PYTHON'
import ase
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

atoms = Atoms("H2", [(0, 0, 0), (0, 0, 1)])
atoms.calc = SinglePointCalculator(atoms, energy=1.0)
atoms.calc.results["energy_std"] = 0.1
atoms.calc.results["forces_std"] = np.ones((2, 3))
atoms.arrays["site"] = np.array([1.0, 2.0])
atoms.info["tag"] = "x"
print("ase", ase.__version__)
kept = {}
for name in ("a.extxyz", "a.traj", "a.db"):
    write(name, atoms)
    back = read(name)
    kept[name] = sorted(back.calc.results), "site" in back.arrays, back.info.get("tag")
    print(f"{name:9} results: {kept[name][0]}, array site: {kept[name][1]}, info tag: {kept[name][2]}")
assert kept == {
    "a.extxyz": (["energy"], True, "x"),
    "a.traj": (["energy"], False, "x"),
    "a.db": (["energy"], False, None),
}
PYTHON
