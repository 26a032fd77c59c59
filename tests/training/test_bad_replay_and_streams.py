"""Wrong labels of replayed and of streamed frames are treated as those of every other role."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from rich.console import Console

from blip_ft.cli.check_data import check_data
from blip_ft.config import Recipe, parse_recipe
from blip_ft.data.frame import atoms_key
from blip_ft.errors import DataError
from blip_ft.training.fit import fit
from blip_ft.training.prepare import Prepared, prepare

from .labelled import frames, small_run

#: the frame with a wrong label
BAD = 5


def recipe_of(folder: Path, **data: Any) -> Recipe:
    return parse_recipe(small_run(folder, "train.extxyz", **data))


def spoilt(n: int, *, seed: int, what: str = "forces") -> list[Atoms]:
    out = frames(n, seed=seed)
    for atoms in out:
        atoms.positions = atoms.positions.round(8)  # as files have them
    if what == "forces":
        out[BAD].arrays["REF_forces"][0, 0] += 60.0
    else:
        out[BAD].info["REF_energy"] += 60.0
    return out


def test_one_wrong_label_does_not_make_all_seem_uncorrelated(tmp_path: Path) -> None:
    write(tmp_path / "train.extxyz", spoilt(24, seed=0))
    messages = [f.message for f in check_data(recipe_of(tmp_path)).findings if f.severity != "info"]
    assert [m for m in messages if "wrong beyond doubt" in m]
    assert not [m for m in messages if "pretrained model: slope" in m]


class TestReplay:
    def prepared(self, folder: Path, replayed: list[Atoms], **data: Any) -> Prepared:
        write(folder / "train.extxyz", frames(24))
        write(folder / "old.extxyz", replayed)
        replay = {"source": str(folder / "old.extxyz"), "labels": "own"}
        return prepare(recipe_of(folder, replay=replay, **data), Console(quiet=True))

    @pytest.mark.parametrize("what", ["forces", "energy"])
    def test_what_is_beyond_doubt_is_left_out_and_named(self, tmp_path: Path, what: str) -> None:
        done = self.prepared(tmp_path, spoilt(20, seed=1, what=what))
        assert len(done.frames["rehearsal"]) == 19
        (found,) = [f for f in done.findings if f.message.startswith("replay: ") and f.severity == "warning"]
        assert "wrong beyond doubt" in found.message
        assert f"old.extxyz, frame {BAD}" in found.frames[0]
        worst = max(float(item.labels["forces"].abs().max()) for item in done.frames["rehearsal"])
        assert worst < 30.0

    def test_the_recipe_may_use_it_or_stop(self, tmp_path: Path) -> None:
        done = self.prepared(tmp_path, spoilt(20, seed=1), bad_labels="warn")
        assert len(done.frames["rehearsal"]) == 20
        assert [f for f in done.findings if f.message.startswith("replay: ") and f.severity == "warning"]
        with pytest.raises(DataError, match=rf"old\.extxyz, frame {BAD}.*1 replayed frames have labels"):
            self.prepared(tmp_path, spoilt(20, seed=1), bad_labels="stop")

    def test_clean_frames_say_nothing(self, tmp_path: Path) -> None:
        done = self.prepared(tmp_path, frames(20, seed=1))
        assert len(done.frames["rehearsal"]) == 20
        assert not [f for f in done.findings if f.message.startswith("replay: ")]

    def test_a_wrong_unit_stops(self, tmp_path: Path) -> None:
        kcal = frames(20, seed=1)
        for atoms in kcal:
            atoms.arrays["REF_forces"] *= 23.06
        with pytest.raises(DataError, match=r"old\.extxyz, field 'forces': replay: .*kcal/mol/Ang"):
            self.prepared(tmp_path, kcal)

    def test_check_says_it_too(self, tmp_path: Path) -> None:
        write(tmp_path / "train.extxyz", frames(24))
        failed = spoilt(20, seed=1)
        failed[7].info["converged"] = False
        write(tmp_path / "old.extxyz", failed)
        replay = {"source": str(tmp_path / "old.extxyz"), "labels": "own"}
        report = check_data(recipe_of(tmp_path, replay=replay))
        found = [f for f in report.findings if f.message.startswith("replay: ")]
        assert [f.severity for f in found] == ["warning", "info"]
        assert f"frame {BAD}" in found[0].frames[0]
        assert "frame 7" in found[1].frames[0]
        replay["source"] = str(tmp_path / "gone.extxyz")
        errors = [f for f in check_data(recipe_of(tmp_path, replay=replay)).findings if f.severity == "error"]
        assert "gone.extxyz" in str(errors[0])


class TestStream:
    N, SAMPLE = 60, 20

    def recipe(self, folder: Path, streamed: list[Atoms], *, parquet: bool = False, **data: Any) -> Recipe:
        held = frames(18, seed=7)
        for name, part in (("v", held[:6]), ("c", held[6:12]), ("t", held[12:])):
            write(folder / f"{name}.extxyz", part)
        if parquet:
            from blip_ft.data.read.sources import load_source
            from blip_ft.data.write.convert import convert

            for k in range(4):
                write(folder / "part.extxyz", streamed[k * 15 : (k + 1) * 15])
                convert(load_source(str(folder / "part.extxyz")), folder / f"s{k}.parquet")
            data["train"] = str(folder / "s*.parquet")
        else:
            write(folder / "train.extxyz", streamed)
        stream = {"frames": self.N, "sample": self.SAMPLE, "buffer": 8} | data.pop("stream", {})
        held_out = {role: str(folder / f"{role[0]}.extxyz") for role in ("validation", "calibration", "test")}
        return recipe_of(folder, stream=stream, **held_out, **data)

    def keys(self, done: Prepared, world: int = 1) -> list[int]:
        assert done.stream is not None
        ranks = [list(done.stream(world, rank)) for rank in range(world)]
        return [key for batches in ranks for batch in batches for key in batch.keys]

    @pytest.mark.parametrize("parquet", [False, True])
    @pytest.mark.parametrize("world", [1, 2])
    def test_what_is_dropped_is_not_streamed(self, tmp_path: Path, *, parquet: bool, world: int) -> None:
        streamed = spoilt(self.N, seed=0)
        done = prepare(self.recipe(tmp_path, streamed, parquet=parquet), Console(quiet=True))
        keys = self.keys(done, world)
        assert sorted(keys) == sorted(atoms_key(a) for i, a in enumerate(streamed) if i != BAD)
        assert len(done.sets["train"]) == self.SAMPLE - 1
        assert done.sets["train"].total_weight == pytest.approx(self.N - 1)
        items = [done.sets["train"][i] for i in range(self.SAMPLE - 1)]
        assert sum(float(i.labels["weight"]) for i in items) == pytest.approx(self.N - 1)
        assert [f for f in done.findings if "beyond doubt" in f.message]
        assert [f for f in done.findings if "wrong ones beyond it are trained on" in f.message]

    def test_its_own_weight_leaves_with_it(self, tmp_path: Path) -> None:
        streamed = spoilt(self.N, seed=0)
        for atoms in streamed:
            atoms.info["config_weight"] = 1.0
        streamed[BAD].info["config_weight"] = 3.0
        done = prepare(self.recipe(tmp_path, streamed, stream={"weight": self.N + 2.0}), Console(quiet=True))
        assert len(self.keys(done)) == self.N - 1  # the sum of the weights is checked at the end of an epoch
        assert done.sets["train"].total_weight == pytest.approx(self.N - 1)

    def test_another_number_of_frames_is_still_an_error(self, tmp_path: Path) -> None:
        recipe = self.recipe(tmp_path, spoilt(self.N, seed=0), stream={"frames": self.N + 1})
        with pytest.raises(DataError, match=r"only 59 .*says 61 frames, 1 of them left out .* leaves 60"):
            self.keys(prepare(recipe, Console(quiet=True)))

    def test_nothing_is_left_out_where_the_recipe_uses_all(self, tmp_path: Path) -> None:
        recipe = self.recipe(tmp_path, spoilt(self.N, seed=0), bad_labels="warn")
        assert len(self.keys(prepare(recipe, Console(quiet=True)))) == self.N

    @pytest.mark.default
    def test_a_whole_fit(self, tmp_path: Path) -> None:
        fit(self.recipe(tmp_path, spoilt(self.N, seed=0)), Console(quiet=True))
        metrics = json.loads((tmp_path / "runs/run/metrics.json").read_text())
        assert np.isfinite(metrics["blip"]["seen"]["force_mae_mev_per_ang"])
        assert metrics["blip"]["seen"]["force_mae_mev_per_ang"] < 50
