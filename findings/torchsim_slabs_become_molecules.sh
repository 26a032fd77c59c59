#!/usr/bin/env bash
# TorchSim: atoms_to_state takes a slab, periodic in two directions, for a molecule, without a word.
#
# A state has one bool for all directions, all(atoms.pbc), and the check that all structures are alike compares that bool: a slab passes beside a molecule too.
# Forces across the cell's faces are gone. One expects an error.
# Seen with torch-sim-atomistic 0.3.0. Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check torch-sim-atomistic==0.3.0 vesin==0.6.2 vesin-torch==0.6.2 ase==3.29.0 torch==2.13.0
cd "$folder"; env/bin/python -W ignore - <<'PYTHON'
import warnings
from importlib.metadata import version

import torch
import torch_sim as ts
from ase.build import fcc111, molecule

slab = fcc111("Al", (1, 1, 3), vacuum=6.0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    state = ts.io.atoms_to_state([slab, molecule("H2O")], torch.device("cpu"), torch.float64)
back = ts.io.state_to_atoms(state)[0]
print("torch-sim-atomistic", version("torch-sim-atomistic"))
print("pbc before:", slab.pbc, "after:", back.pbc, "warnings:", len(caught))
assert slab.pbc.tolist() == [True, True, False] and not back.pbc.any() and not caught
PYTHON
