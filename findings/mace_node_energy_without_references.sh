#!/usr/bin/env bash
# MACE: results["node_energy"] leaves the energies of isolated atoms out, results["energies"] has them.
#
# Both are eV per atom of the same calculator. The sum of "energies" is the total energy, that of "node_energy" is not: it is
# the interaction part. Who sums the array whose name is the model's own gets a cohesive energy of the wrong zero.
# Seen with mace-torch 0.3.16 and a model with random weights. Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check mace-torch==0.3.16 ase==3.29.0 torch==2.13.0
cd "$folder"; TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 "$folder/env/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
from importlib.metadata import version

import numpy as np
import torch
from ase.build import molecule
from e3nn import o3
from mace import modules
from mace.calculators import MACECalculator

torch.manual_seed(0)
blocks = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
model = modules.ScaleShiftMACE(
    r_max=4.0, num_bessel=4, num_polynomial_cutoff=5, max_ell=1, interaction_cls=blocks, interaction_cls_first=blocks,
    num_interactions=2, num_elements=2, hidden_irreps=o3.Irreps("4x0e"), MLP_irreps=o3.Irreps("4x0e"),
    atomic_energies=np.array([-13.0, -400.0]), avg_num_neighbors=2.0, atomic_numbers=[1, 8], correlation=2,
    gate=torch.nn.functional.silu, atomic_inter_scale=1.0, atomic_inter_shift=0.0,
)
water = molecule("H2O")
water.calc = MACECalculator(models=[model.double()], device="cpu", default_dtype="float64")
energy, results = water.get_potential_energy(), water.calc.results
print("mace-torch", version("mace-torch"), "energy, eV:", energy)
print("sum of energies:", results["energies"].sum(), "sum of node_energy:", results["node_energy"].sum())
assert abs(results["energies"].sum() - energy) < 1e-9
assert abs(results["node_energy"].sum() - (energy + 2 * 13.0 + 400.0)) < 1e-9
PYTHON
