#!/usr/bin/env bash
# DIEP: a perfect crystal has forces, and they turn with the choice of axes, not with the crystal.
#
# Each three atoms are drawn in their plane. Three in a line have none: the vendor takes a direction that is normal to the x axis,
# and the derivative with respect to the height pushes the atoms that way. By symmetry every force in zincblende is zero.
# Seen with diep 2.0.0 (model fold1, in its wheel). Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check diep==2.0.0 ase==3.29.0 torch==2.13.0
cd "$folder"; "$folder/env/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from ase.build import bulk
from diep.pretrained import make_calculator

print("diep", version("diep"))
crystal = bulk("SiC", "zincblende", a=4.36, cubic=True)
turned = crystal.copy()
turned.rotate(90, "y", rotate_cell=True)
forces = []
for atoms in (crystal, turned):
    atoms.calc = make_calculator()
    along = atoms.get_forces() @ (atoms.cell.array / 4.36).T  # along the lattice vectors, wherever they point
    print("along the lattice vectors, eV/Å:", np.round(along[4], 6), "largest:", np.abs(along).max().round(6))
    forces.append(along)
assert np.abs(forces[0]).max() > 1e-4
assert np.abs(forces[0] - forces[1]).max() > 1e-4
PYTHON
