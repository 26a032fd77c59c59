#!/usr/bin/env bash
# SevenNet: a slab whose third lattice vector is zero gets a stress of a thousand eV/Å^3.
#
# ASE's builders leave the vector of an open direction zero (fcc111 without vacuum), and an energy per volume has no meaning there.
# One expects no stress, NaN, or an error; the numbers look like any others, and a cell filter would follow them.
# Seen with sevenn 0.13.0 (7net-0, in its wheel). Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check sevenn==0.13.0 ase==3.29.0 torch==2.13.0
cd "$folder"; "$folder/env/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from ase.build import fcc111
from sevenn.calculator import SevenNetCalculator

slab = fcc111("Al", (1, 1, 3), vacuum=None)
slab.calc = SevenNetCalculator("7net-0", device="cpu")
stress = slab.get_stress()
print("sevenn", version("sevenn"), "cell:", slab.cell.lengths(), "pbc:", slab.pbc)
print("energy, eV:", slab.get_potential_energy(), "stress, eV/A^3:", stress)
assert slab.cell.rank == 2 and np.isfinite(stress).all() and np.abs(stress[:3]).min() > 100
PYTHON
