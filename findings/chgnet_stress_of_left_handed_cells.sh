#!/usr/bin/env bash
# CHGNet: the stress of a crystal changes its sign when two lattice vectors change places.
#
# The same atoms in the same crystal, described with a left-handed cell, have the same energy, the same forces and the stress
# of opposite sign: it is divided by the determinant of the cell, which is negative there, not by the volume. Relaxations of such
# cells grow where they should shrink. VASP and ASE write and read left-handed cells without a word.
# Seen with chgnet 0.4.2 (model 0.3.0, in its wheel). Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check chgnet==0.4.2 ase==3.29.0 torch==2.13.0
cd "$folder"; "$folder/env/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from ase.build import bulk
from chgnet.model.dynamics import CHGNetCalculator

right = bulk("NaCl", "rocksalt", 5.0, cubic=True)
right.rattle(0.05, seed=1)
left = right.copy()
left.set_cell(right.cell.array[[1, 0, 2]])  # positions stay: the same crystal
print("chgnet", version("chgnet"))
found = {}
for name, atoms in (("right", right), ("left", left)):
    atoms.calc = CHGNetCalculator(use_device="cpu")
    stress = np.asarray(atoms.calc.get_property("stress", atoms))
    diagonal = stress[:3] if stress.ndim == 1 else stress.diagonal()
    found[name] = atoms.get_potential_energy(), atoms.get_forces(), diagonal
    print(f"{name}-handed: det {np.linalg.det(atoms.cell.array):.1f}, energy {found[name][0]:.4f} eV, xx yy zz {np.round(diagonal, 3)}")
(e1, f1, s1), (e2, f2, s2) = found["right"], found["left"]
assert abs(e1 - e2) < 1e-3 and np.abs(f1 - f2).max() < 1e-3
assert np.abs(s1).min() > 0.01 and np.allclose(s1, -s2, atol=2e-3)
PYTHON
