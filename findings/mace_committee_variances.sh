#!/usr/bin/env bash
# MACE: variances of a committee have divisor n, and scale with the cube of energy_units_to_eV.
#
# MACECalculator with several models gives energy_var. Of two models it is half the usual sample variance: a std too small by
# sqrt(2). With energy_units_to_eV = 2 energies double and the variance becomes eight times as large, where four is right: in kcal/mol
# (0.0434) the std is too small by a factor of five.
# Seen with mace-torch 0.3.16 and models with random weights. Exits 0 while it is so.
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

blocks = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]


def model(seed):
    torch.manual_seed(seed)
    return modules.ScaleShiftMACE(
        r_max=4.0, num_bessel=4, num_polynomial_cutoff=5, max_ell=1, interaction_cls=blocks, interaction_cls_first=blocks,
        num_interactions=2, num_elements=2, hidden_irreps=o3.Irreps("4x0e"), MLP_irreps=o3.Irreps("4x0e"),
        atomic_energies=np.array([-13.0, -400.0]), avg_num_neighbors=2.0, atomic_numbers=[1, 8], correlation=2,
        gate=torch.nn.functional.silu, atomic_inter_scale=1.0, atomic_inter_shift=0.0,
    ).double()


def results(models, **options):
    water = molecule("H2O")
    water.calc = MACECalculator(models=models, device="cpu", default_dtype="float64", **options)
    water.get_potential_energy()
    return water.calc.results


single = [results([model(seed)])["energy"] for seed in (0, 1)]
committee = results([model(0), model(1)])
doubled = results([model(0), model(1)], energy_units_to_eV=2.0)
print("mace-torch", version("mace-torch"))
print("sample variance of two energies:", np.var(single, ddof=1), "energy_var:", committee["energy_var"])
print("units of 2 eV: energy", doubled["energy"] / committee["energy"], "times, energy_var", doubled["energy_var"] / committee["energy_var"], "times")
assert np.isclose(committee["energy_var"], np.var(single))
assert np.isclose(doubled["energy"] / committee["energy"], 2)
assert np.isclose(doubled["energy_var"] / committee["energy_var"], 8)
PYTHON
