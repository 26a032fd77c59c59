"""Streams: bounded memory, the same batches for any number of workers and ranks, and an honest N."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from torch.utils.data import DataLoader

from blip_ft.config import DataConfig, StreamConfig, load_recipe
from blip_ft.data import load_splits
from blip_ft.data.dataset import FrameDataset, GraphCache, bytes_of, content_key
from blip_ft.data.stream import FrameStream, rows_of, sample_of
from blip_ft.errors import DataError, RecipeError
from blip_ft.fake import FakeBackbone

Frames = Callable[..., list[Atoms]]


@pytest.fixture
def config(frames: Frames, tmp_path: Path) -> DataConfig:
    """A stream of 40 frames in two files."""
    some = frames(40)
    write(tmp_path / "a.xyz", some[:25])
    write(tmp_path / "b.xyz", some[25:])
    return DataConfig(train=str(tmp_path / "?.xyz"), stream=StreamConfig(frames=40, buffer=10, sample=8))


def stream(config: DataConfig, backbone: FakeBackbone, **options: Any) -> FrameStream:
    defaults = {"frames": 40, "batch_size": 3, "buffer": 10}
    return FrameStream(rows_of(config), backbone, **(defaults | options))


def keys(batches: Iterator[Any]) -> list[list[int]]:
    return [batch.keys for batch in batches]


def test_every_frame_once_in_another_order_each_epoch(config: DataConfig, backbone: FakeBackbone) -> None:
    every = sorted(content_key(r["numbers"], r["positions"], r["cell"]) for r in rows_of(config)())
    source = stream(config, backbone)
    first = keys(source)
    assert len(first) == len(source) == 14
    assert sorted(k for batch in first for k in batch) == every
    assert keys(source) == first
    source.set_epoch(1)
    second = keys(source)
    assert sorted(k for batch in second for k in batch) == every
    assert second != first


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int, config: DataConfig, backbone: FakeBackbone) -> None:
    source = stream(config, backbone)
    assert keys(DataLoader(source, batch_size=None, num_workers=workers)) == keys(source)


def test_ranks_share_the_batch_of_one_process(config: DataConfig, backbone: FakeBackbone) -> None:
    one = keys(stream(config, backbone, batch_size=4))
    two = [keys(stream(config, backbone, batch_size=2, world=2, rank=r)) for r in (0, 1)]
    assert [a + b for a, b in zip(*two, strict=True)] == one


@pytest.mark.parametrize(("said", "words"), [(39, "more than 39"), (41, "only 40"), (45, "only 40")])
def test_another_number_of_frames_is_an_error(
    said: int, words: str, config: DataConfig, backbone: FakeBackbone
) -> None:
    with pytest.raises(DataError, match=f"has {words} .*says {said}"):
        list(stream(config, backbone, frames=said))


def test_another_sum_of_weights_is_an_error(config: DataConfig, backbone: FakeBackbone) -> None:
    with pytest.raises(DataError, match="a weight of 40 in all"):
        list(stream(config, backbone, weight=50.0))


def test_held_out_frames_are_found_in_the_stream(config: DataConfig, backbone: FakeBackbone) -> None:
    row = list(rows_of(config)())[30]
    held = frozenset({content_key(row["numbers"], row["positions"], row["cell"])})
    with pytest.raises(DataError, match=r"b\.xyz, frame 5: the frame stands in a held-out set too"):
        list(stream(config, backbone, held_out=held))


def test_the_sample_stands_for_the_whole(config: DataConfig) -> None:
    sample = sample_of(config)
    assert len(sample) == 8
    assert sum(sample["weight"]) == pytest.approx(40)


def test_a_stream_is_not_divided(config: DataConfig, frames: Frames, tmp_path: Path) -> None:
    write(tmp_path / "held.traj", frames(6, seed=3))
    held = {
        "validation": f"{tmp_path}/held.traj@0:2",
        "calibration": f"{tmp_path}/held.traj@2:4",
        "test": f"{tmp_path}/held.traj@4:",
    }
    splits = load_splits(DataConfig(**(config.model_dump() | held)))
    assert {name: len(part) for name, part in splits.roles().items()} == {
        "train": 8,
        "validation": 2,
        "calibration": 2,
        "test/seen": 2,
    }
    assert "stream of 40 frames" in splits.rule
    with pytest.raises(RecipeError, match="no frames for validation"):
        load_recipe("sio2_sevennet", ["data.stream.frames=100"])


# ---- graphs that are kept ----------------------------------------------------------------------


def test_graphs_are_kept_up_to_a_bound(frames: Frames, tmp_path: Path, backbone: FakeBackbone) -> None:
    from blip_ft.data import load_source

    write(tmp_path / "a.traj", frames(6))
    rows = load_source(str(tmp_path / "a.traj"))
    size = bytes_of(FrameDataset(rows, backbone)[0].graph)
    assert size > 1000
    cache = GraphCache(limit=2.5 * size)
    dataset = FrameDataset(rows, backbone, cache)
    again = FrameDataset(rows, backbone, cache)
    built = [dataset[i] for i in range(6)]
    kept = [dataset[i] is item for i, item in enumerate(built)]
    assert 1 <= sum(kept) <= 3
    assert not any(again[i] is again[i] for i in range(6)) or sum(kept) < 3, "one bound for all sets"
    np.testing.assert_array_equal(dataset[5].graph["edge_vec"], built[5].graph["edge_vec"])


def test_sizes_of_structures(frames: Frames, tmp_path: Path, backbone: FakeBackbone) -> None:
    from blip_ft.data import load_source

    write(tmp_path / "a.traj", [*frames(2), Atoms("O", info={"energy": -1.0})])
    dataset = FrameDataset(load_source(str(tmp_path / "a.traj")), backbone)
    assert dataset.sizes("atoms") == [6, 6, 1]
    edges = dataset.sizes("edges")
    assert edges[0] == len(dataset[0].graph["edge_vec"])
    assert edges[2] == 1, "a lone atom takes room too"
