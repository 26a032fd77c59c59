#!/usr/bin/env bash
# ASE, extended XYZ: of nine numbers of stress that are not symmetric one triangle is taken, not the mean of both.
#
# Codes write small asymmetries (unconverged integrals, ML models without symmetry); the usual reading is (s + s^T) / 2.
# `1 2 3 4 5 6 7 8 9` gives yz = 8, xz = 7, xy = 4.
# Seen with ase 3.29.0. Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check ase==3.29.0
"$folder/env/bin/python" - <<'PYTHON'
import io

import ase
import numpy as np
from ase.io import read

text = (
    '1\nLattice="5 0 0 0 5 0 0 0 5" stress="1 2 3 4 5 6 7 8 9" energy=0.0 pbc="T T T" '
    "Properties=species:S:1:pos:R:3\nH 0 0 0\n"
)
stress = read(io.StringIO(text), format="extxyz").get_stress()
print("ase", ase.__version__, "stress xx yy zz yz xz xy:", stress)
print("mean of both triangles would be yz 7, xz 5, xy 3")
assert np.array_equal(stress, [1, 5, 9, 8, 7, 4])
PYTHON
