"""SevenNet-0 in TorchSim."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import bulk
from ase.stress import voigt_6_to_full_3x3_stress

from blip_ft import bayesian, load_backbone
from blip_ft.torchsim import TorchSimModel
from blip_ft.uncertainty.calculator import BlipCalculator

pytestmark = [pytest.mark.backend("torchsim"), pytest.mark.backend("sevennet")]


def test_silicon_and_quartz():
    """TorchSim's own check, and two structures together as our calculator has each alone."""
    from torch_sim.models.interface import validate_model_outputs

    potential = bayesian(
        load_backbone("sevennet", "7net-0"), family="weight", noise="scalar", prior_scale=0.05, n_draws=2
    )
    model = TorchSimModel(potential)
    validate_model_outputs(model, model.device, model.dtype)
    structures = [bulk("Si"), bulk("MgO", "rocksalt", a=4.2)]
    for atoms in structures:
        atoms.rattle(0.05, seed=0)
    out = model(model.state(structures))
    for number, atoms in enumerate(structures):
        atoms.calc = BlipCalculator(potential)
        these = slice(2 * number, 2 * number + 2)
        assert float(out["energy"][number]) == pytest.approx(atoms.get_potential_energy(), abs=1e-4)
        results = atoms.calc.results
        np.testing.assert_allclose(out["forces"][these], results["forces"], atol=1e-4)
        np.testing.assert_allclose(
            out["stress"][number], voigt_6_to_full_3x3_stress(results["stress"]), atol=1e-5
        )
        np.testing.assert_allclose(out["energy_std"][number], results["energy_std"], rtol=0.02)
        np.testing.assert_allclose(
            out["forces_std_norm"][these], results["forces_std_norm"], rtol=0.02, atol=1e-5
        )
