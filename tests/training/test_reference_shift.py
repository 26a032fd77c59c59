"""Energy references as a recipe chooses them, in an assembled model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from rich.console import Console

from blip_ft.config import DataConfig, ModelConfig, PosteriorConfig, load_recipe
from blip_ft.data.batch.dataset import FrameDataset
from blip_ft.data.split.splits import load_splits
from blip_ft.errors import DataError, RecipeError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.testing.fake import FakeBackbone
from blip_ft.training.reference_shift import lone_atoms, set_references, warn_outside
from blip_ft.uncertainty.predict import predict_atoms

#: what the labels have and the model does not, eV per atom
EXTRA = {8: -430.0, 14: -100.0}


@pytest.fixture
def potential() -> BayesianPotential:
    model = ModelConfig(adapter="fake", checkpoint="tiny", dtype="float64")
    return BayesianPotential(FakeBackbone(), model, PosteriorConfig(rank=2))


@pytest.fixture
def source(potential: BayesianPotential, tmp_path: Path) -> Path:
    """SiO2 and lone atoms, labelled by the model itself and EXTRA."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(12):
        a = Atoms("SiO2", positions=[(0, 0, 0), (1.6, 0, 0), (0, 1.6, 0)], cell=[5, 5, 5], pbc=True)
        a.positions += rng.normal(0, 0.1, (3, 3))
        frames.append(a)
    frames += [Atoms("O"), Atoms("Si", info={"config_type": "IsolatedAtom"}, cell=[9, 9, 9], pbc=True)]
    for a, p in zip(frames, predict_atoms(potential, frames, n_draws=0), strict=True):
        a.info["REF_energy"] = p["energy"] + sum(EXTRA[z] for z in a.numbers)
        a.arrays["REF_forces"] = p["forces"]
    path = tmp_path / "a.xyz"
    write(path, frames)
    return path


def choose(potential: BayesianPotential, config: DataConfig, isolated: dict[int, float] | None = None):
    splits = load_splits(config)
    train = FrameDataset(splits.train, potential.backbone)
    known = splits.isolated if isolated is None else isolated
    return (*set_references(config, potential, train, known, Console(quiet=True)), splits, train)


def test_lone_atoms_are_references_and_not_frames(source: Path) -> None:
    splits = load_splits(DataConfig(train=str(source)))
    assert sorted(splits.isolated) == [8, 14]
    assert sum(len(part) for part in splits.roles().values()) == 12
    assert [d for d in splits.dropped if "an isolated atom" in d] == splits.dropped
    assert len(splits.dropped) == 2


@pytest.mark.parametrize("mode", ["isolated_atoms", "given"])
def test_energies_of_isolated_atoms_are_exact(mode: str, source: Path, potential: BayesianPotential) -> None:
    labels = load_splits(DataConfig(train=str(source))).isolated
    given = {"Si": labels[14], "O": labels[8]} if mode == "given" else {}
    config = DataConfig(train=str(source), references=mode, reference_energies=given)  # type: ignore[arg-type]
    references, check, findings, _, train = choose(potential, config)
    assert references.shift == pytest.approx(EXTRA, abs=1e-6)
    assert check["rms_after"] < 1e-5
    assert findings == []
    assert lone_atoms(potential, [8, 14]) == pytest.approx(labels, abs=1e-6)
    assert warn_outside(references, {"train": train}) == []


@pytest.mark.parametrize("mode", ["shift", "refit"])
def test_fitted_references_leave_no_residual(mode: str, source: Path, potential: BayesianPotential) -> None:
    references, check, findings, *_ = choose(potential, DataConfig(train=str(source), references=mode))  # type: ignore[arg-type]
    assert references.mode == mode
    assert references.rank == 1
    assert check["rms_before"] == pytest.approx(320, abs=0.1)
    assert check["rms_after"] < 1e-5
    assert findings == []


def test_kept_references_with_an_offset_are_a_warning(source: Path, potential: BayesianPotential) -> None:
    references, _, (finding,), *_ = choose(potential, DataConfig(train=str(source), references="keep"))
    assert references is None
    assert "differ from the pretrained model by 320 eV/atom" in finding.message
    assert potential.references == {}


def test_energies_that_do_not_belong_to_the_model_are_a_warning(
    source: Path, potential: BayesianPotential
) -> None:
    config = DataConfig(train=str(source), references="isolated_atoms")
    _, _, (finding,), *_ = choose(potential, config, {8: -430.0, 14: -150.0})
    assert "a fit would leave 0" in finding.message


def test_what_is_missing_is_named(source: Path, potential: BayesianPotential, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no energy of the isolated atom of Si"):
        choose(potential, DataConfig(train=str(source), references="isolated_atoms"), {8: -430.0})
    config = DataConfig(train=str(source), references="given", reference_energies={"Sj": 1.0})
    with pytest.raises(DataError, match="'Sj' is not a chemical element"):
        choose(potential, config)
    with pytest.raises(RecipeError, match="need each other"):
        load_recipe("sio2_sevennet", ["data.references=given"])
    with pytest.raises(RecipeError, match="need each other"):
        load_recipe("sio2_sevennet", ["data.split.by=file"])


def test_two_energies_of_one_isolated_atom_are_refused(source: Path, tmp_path: Path) -> None:
    atom = Atoms("O", info={"REF_energy": -1.0})
    write(tmp_path / "b.xyz", atom)
    train = [str(source), str(tmp_path / "b.xyz")]
    with pytest.raises(DataError, match="an isolated atom of element 8 has"):
        load_splits(DataConfig(train=train, references="isolated_atoms"))
    splits = load_splits(DataConfig(train=train))  # where nothing needs them
    assert sum("its energy is not that of the one before" in d for d in splits.dropped) == 1
