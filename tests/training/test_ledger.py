"""The pretrained model is asked about each frame once, and what it said is what it would say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import write
from rich.console import Console

from blip_ft.backbones.protocol import Batch
from blip_ft.config import Recipe
from blip_ft.data.batch import ledger
from blip_ft.data.batch.dataset import FrameDataset
from blip_ft.data.batch.ledger import Ledger, exact_key
from blip_ft.data.check.sets import UNIT_FRAMES
from blip_ft.data.read.sources import load_source
from blip_ft.errors import SanityCheckError
from blip_ft.testing.fake import FakeBackbone
from blip_ft.training import sanity_checks
from blip_ft.training.evaluate import evaluate, remembered
from blip_ft.training.prepare import prepare
from blip_ft.uncertainty.predict import predict_set

from .labelled import frames


def recipe_of(folder: Path, labelled: list[Atoms], **data: Any) -> Recipe:
    write(folder / "train.extxyz", labelled)
    return Recipe.model_validate(
        {
            "name": "run",
            "output": str(folder / "runs"),
            "data": {"train": str(folder / "train.extxyz"), "references": "shift"} | data,
            "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
            "posterior": {"rank": 4},
            "trainer": {"accelerator": "cpu"},
        }
    )


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Structures that the backbone evaluates and graphs that it makes."""
    counts: Counter[str] = Counter()
    forward, graph = FakeBackbone.forward, FakeBackbone.graph

    def counted(self: FakeBackbone, batch: Batch, **kwargs: Any) -> Any:
        counts["structures"] += batch.n_structures
        return forward(self, batch, **kwargs)

    def made(self: FakeBackbone, atoms: Atoms) -> Any:
        counts["graphs"] += 1
        return graph(self, atoms)

    monkeypatch.setattr(FakeBackbone, "forward", counted)
    monkeypatch.setattr(FakeBackbone, "graph", made)
    return counts


def test_each_frame_is_evaluated_once(tmp_path: Path, evaluated: Counter[str]) -> None:
    recipe = recipe_of(tmp_path, frames(60, other=True))
    evaluated.clear()
    prepared = prepare(recipe, Console(quiet=True))
    total = sum(len(d) for d in prepared.sets.values())
    assert total == 60
    gate = prepared.step_zero.n_frames
    assert gate <= 20
    # beside that units and step 0 by the vendor's calculator, which is a copy of the backbone here
    units = min(UNIT_FRAMES, len(prepared.sets["train"]))
    assert evaluated["structures"] == total + units + 2 * gate + sanity_checks.REFERENCE_FRAMES
    before = dict(evaluated)
    assert prepared.ledger is not None
    evaluate(
        recipe,
        prepared.potential,
        prepared.sets,
        draws=0,
        console=Console(quiet=True),
        what="pretrained",
        ledger=prepared.ledger,
    )
    assert dict(evaluated) == before  # neither predictions nor graphs


def test_graphs_of_frames_outlive_bad_ones(tmp_path: Path, evaluated: Counter[str]) -> None:
    labelled = frames(60)
    labelled[7].info["REF_energy"] += 50.0
    prepared = prepare(recipe_of(tmp_path, labelled, bad_labels="drop"), Console(quiet=True))
    assert sum(len(d) for d in prepared.sets.values()) == 59
    for name, dataset in prepared.sets.items():
        rows = prepared.splits.roles()[name if name in prepared.splits.roles() else f"test/{name}"]
        assert rows["positions"] == dataset.frames["positions"]
        before = evaluated["graphs"]
        for i, row in enumerate(rows):
            np.testing.assert_array_equal(dataset[i].atoms.positions, row["positions"])
        assert evaluated["graphs"] == before


def test_the_ledgers_row_is_that_of_the_model(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, frames(40, other=True), check_frames=10)  # the rest is asked for
    prepared = prepare(recipe, Console(quiet=True))
    assert prepared.ledger is not None
    assert prepared.potential.references
    for name, dataset in prepared.sets.items():
        want = predict_set(prepared.potential, dataset, name, n_draws=0, batch_size=3)
        got = remembered(prepared.potential, dataset, name, prepared.ledger)
        for key, value in vars(want).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_allclose(getattr(got, key), value, rtol=1e-10, atol=1e-10, err_msg=key)
            else:
                assert getattr(got, key) == value, key


def dataset_of(folder: Path, structures: list[Atoms]) -> FrameDataset:
    write(folder / "a.extxyz", structures)
    return FrameDataset(load_source(str(folder / "a.extxyz"), labels=False), FakeBackbone())


class TestLedger:
    def test_copies_and_changes_of_the_last_digit(self, tmp_path: Path, evaluated: Counter[str]) -> None:
        (one,) = frames(1)
        moved, isolated = one.copy(), one.copy()
        moved.positions[0, 0] += 1e-7  # the same to `content_key`
        isolated.pbc = False
        assert len({exact_key(a) for a in (one, one.copy(), moved, isolated)}) == 3
        dataset = dataset_of(tmp_path, [one, one.copy(), isolated])
        evaluated.clear()
        book = Ledger(dataset.backbone)
        known = book.ask(dataset[i] for i in range(3))
        assert len(book) == evaluated["structures"] == 2
        assert known[0] is known[1]
        assert known[0].energy != known[2].energy
        assert known[2].stress is None

    def test_after_it_is_closed_it_knows_what_it_knew(self, tmp_path: Path) -> None:
        dataset = dataset_of(tmp_path, frames(3))
        book = Ledger(dataset.backbone)
        (first,) = book.ask([dataset[0]])
        book.close()
        assert book.ask([dataset[0]]) == [first]
        with pytest.raises(RuntimeError, match="trained since"):
            book.ask([dataset[1]])

    def test_batches_are_bounded_by_atoms(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ledger, "BATCH_ATOMS", 10)
        structures = frames(8)
        structures[3] = structures[3].repeat((2, 2, 2))  # more atoms than a batch
        dataset = dataset_of(tmp_path, structures)
        done: list[int] = []
        whole = Ledger(dataset.backbone).ask([dataset[i] for i in range(8)], done.append)
        assert done == [3, 1, 3, 1]
        monkeypatch.setattr(ledger, "BATCH_ATOMS", 1000)
        for a, b in zip(whole, Ledger(dataset.backbone).ask([dataset[i] for i in range(8)]), strict=True):
            assert a.energy == pytest.approx(b.energy, rel=1e-12)
            np.testing.assert_allclose(a.forces, b.forces, atol=1e-12)


def test_references_that_do_not_act_are_told(tmp_path: Path) -> None:
    prepared = prepare(recipe_of(tmp_path, frames(40, other=True)), Console(quiet=True))
    assert prepared.references is not None
    train = prepared.sets["train"]
    items = [train[i] for i in range(len(train))]
    atoms = [item.atoms for item in items]
    labels = np.array([float(item.labels["energy"]) for item in items])
    assert prepared.ledger is not None
    model = np.array([k.energy for k in prepared.ledger.ask(items)])
    check = sanity_checks.check_references(prepared.potential, atoms, labels, model, prepared.references)
    residual = torch.from_numpy(labels - model - sum(prepared.references.shift[z] for z in atoms[0].numbers))
    assert check["rms_after"] == pytest.approx(float((residual / 3).square().mean().sqrt()))
    prepared.potential.references = {z: 1.01 * e + 0.1 for z, e in prepared.references.shift.items()}
    with pytest.raises(SanityCheckError, match="do not act in the assembled model"):
        sanity_checks.check_references(prepared.potential, atoms, labels, model, prepared.references)
