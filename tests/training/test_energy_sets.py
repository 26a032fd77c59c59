"""Two levels of theory in one file: found before training, and what the finding says to write works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ase.io import write
from rich.console import Console

from blip_ft.config import Recipe
from blip_ft.training.prepare import prepare

from .labelled import frames


def recipe_of(folder: Path, **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "run",
            "output": str(folder / "runs"),
            "data": data,
            "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
            "posterior": {"rank": 4},
            "trainer": {"accelerator": "cpu"},
        }
    )


def test_heads_are_found_and_one_can_be_taken_with_the_other_as_replay(tmp_path: Path) -> None:
    labelled = frames(60)
    for i, atoms in enumerate(labelled):
        atoms.info["head"] = "r2scan" if i % 2 else "pbe"
        atoms.info["REF_energy"] += (i % 2) * 0.35 * len(atoms)
    path = tmp_path / "two.extxyz"
    write(path, labelled)
    both = prepare(recipe_of(tmp_path, train=str(path)), Console(quiet=True))
    (found,) = [f for f in both.findings if "fall into sets" in f.message]
    assert "by head: " in found.message
    assert "350 meV/atom" in found.message
    main, other = ("pbe", "r2scan") if f"train: {path}@pbe" in found.remedy else ("r2scan", "pbe")
    for words in (
        f"data: {{train: {path}@{main}, fields: {{split: head}}}}",
        f"data.replay: {{source: {path}@{other}, labels: own}}",
    ):
        assert words in found.remedy
    one = prepare(
        recipe_of(
            tmp_path,
            train=f"{path}@{main}",
            fields={"split": "head"},
            replay={"source": f"{path}@{other}", "labels": "own"},
        ),
        Console(quiet=True),
    )
    assert not [f for f in one.findings if "fall into sets" in f.message]
    replayed = list(one.frames["rehearsal"])
    assert sum(len(d) for d in one.sets.values()) == len(replayed) == 30
    # references of its own: nothing of the offset is left in the replayed labels
    assert one.references is not None
    assert one.ledger is not None
    shift = one.references.shift
    residual = [
        float(i.labels["energy"]) - known.energy - sum(shift[z] for z in i.atoms.numbers)
        for i, known in zip(replayed, one.ledger.ask(replayed), strict=True)
    ]
    assert np.abs(residual).max() < 0.01
