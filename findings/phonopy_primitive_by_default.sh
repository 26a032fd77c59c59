#!/usr/bin/env bash
# phonopy: without primitive_matrix the cell that was given is reduced, so that bands and free energies are those of another cell.
#
# Phonopy(cell, supercell) of the four-atom cubic cell of copper has a primitive cell of one atom: 3 bands in place of 12, and
# thermal properties per primitive cell, a fourth of those of the cell that was given. A warning says it, results do not.
# Seen with phonopy 4.8.0. Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check phonopy==4.8.0
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import phonopy
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms

places = [(0, 0, 0), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)]
copper = PhonopyAtoms(symbols=["Cu"] * 4, cell=3.6 * np.eye(3), scaled_positions=places)
default = Phonopy(copper, np.diag([2, 2, 2]))
whole = Phonopy(copper, np.diag([2, 2, 2]), primitive_matrix="P")
print("phonopy", phonopy.__version__, "atoms given: 4, primitive by default:", len(default.primitive), "with 'P':", len(whole.primitive))
assert len(default.primitive) == 1 and len(whole.primitive) == 4
PYTHON
