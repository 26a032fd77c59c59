"""Streams: bounded memory, the same batches for any number of workers and ranks, and an honest N."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import write
from torch.utils.data import DataLoader

from blip_ft.config import DataConfig, StreamConfig, load_recipe
from blip_ft.data.batch.dataset import FrameDataset, GraphCache, bytes_of
from blip_ft.data.batch.stream import FrameStream, grid_of
from blip_ft.data.frame import content_key
from blip_ft.data.split.sample import rows_of, sample_of
from blip_ft.data.split.splits import load_splits
from blip_ft.errors import DataError, RecipeError
from blip_ft.testing.fake import FakeBackbone

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
    with pytest.raises(DataError, match="weights other than 1, 40 for 40"):
        list(stream(config, backbone, weight=50.0))


@pytest.fixture
def files(frames: Frames, tmp_path: Path) -> DataConfig:
    """150 frames in 12 parquet files."""
    from blip_ft.data.read.sources import load_source
    from blip_ft.data.write.convert import convert

    some = frames(150)
    for i, part in enumerate(np.array_split(np.arange(150), 12)):
        write(tmp_path / "part.traj", [some[k] for k in part])
        convert(load_source(str(tmp_path / "part.traj")), str(tmp_path / f"{i:02d}.parquet"))
    return DataConfig(train=str(tmp_path / "*.parquet"), stream=StreamConfig(frames=150, buffer=50, sample=8))


def sharded(config: DataConfig, backbone: FakeBackbone, **options: Any) -> FrameStream:
    size = options.get("batch_size", 4) * options.get("world", 1)
    grid = grid_of(config, size)
    assert grid is not None
    assert (len(grid), len(grid[0])) == (6, 2)
    defaults = {"frames": 150, "batch_size": 4, "buffer": 50, "grid": grid}
    return FrameStream(rows_of(config), backbone, **(defaults | options))


def test_lanes_hold_every_frame_once(files: DataConfig, backbone: FakeBackbone) -> None:
    every = sorted(content_key(r["numbers"], r["positions"], r["cell"]) for r in rows_of(files)())
    source = sharded(files, backbone)
    first = keys(source)
    assert len(first) == len(source)
    assert sorted(k for batch in first for k in batch) == every
    assert {len(batch) for batch in first} <= {2, 3, 4}
    source.set_epoch(1)
    assert sorted(k for batch in keys(source) for k in batch) == every
    assert keys(source) != first


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_workers_read_their_own_lanes_and_change_nothing(
    workers: int, files: DataConfig, backbone: FakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = keys(sharded(files, backbone))
    found: dict[int, list[int]] = {}
    for worker in range(workers):
        source = sharded(files, backbone)
        opened: set[int] = set()
        inner = source._shuffled
        monkeypatch.setattr(source, "_shuffled", lambda g, p, o=opened, f=inner: (o.add(g), f(g, p))[1])
        info = SimpleNamespace(id=worker, num_workers=workers)
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda i=info: i)
        found |= dict(zip(range(worker, len(whole), workers), keys(source), strict=True))
        assert len(opened) == 6 // math.gcd(6, workers)
    assert [found[step] for step in range(len(whole))] == whole


def test_a_single_table_is_whole_in_every_worker(files: DataConfig, backbone: FakeBackbone) -> None:
    """``datasets`` would give all rows of one file to the first worker."""
    few = files.model_copy(update={"train": files.train.replace("*", "03")})
    source = FrameStream(rows_of(few), backbone, frames=13, batch_size=4, buffer=5)
    assert keys(DataLoader(source, batch_size=None, num_workers=2)) == keys(source)


def test_an_empty_shard_has_no_frames(files: DataConfig, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from blip_ft.data.read.sources import load_source

    pq.write_table(pq.read_table(tmp_path / "00.parquet").slice(0, 0), tmp_path / "99.parquet")
    assert len(list(rows_of(files)())) == 150
    assert grid_of(files, 4) is not None
    with pytest.raises(DataError, match=r"99\.parquet: there are no frames in it"):
        load_source(str(tmp_path / "99.parquet"))


def test_workers_in_processes_change_nothing(files: DataConfig, backbone: FakeBackbone) -> None:
    source = sharded(files, backbone)
    assert keys(DataLoader(source, batch_size=None, num_workers=2)) == keys(source)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_lanes(world: int, files: DataConfig, backbone: FakeBackbone) -> None:
    one = keys(sharded(files, backbone, batch_size=6))
    sources = [sharded(files, backbone, batch_size=6 // world, world=world, rank=r) for r in range(world)]
    parts = [keys(source) for source in sources]
    assert [list(chain.from_iterable(shares)) for shares in zip(*parts, strict=True)] == one
    assert all(shares for part in parts for shares in part)
    assert [len(s._own_parts()) for s in sources] == [1 if world == 2 else 2] * world


def test_lanes_need_files_of_known_and_similar_length(
    config: DataConfig, files: DataConfig, frames: Frames, tmp_path: Path
) -> None:
    assert grid_of(config, 4) is None  # extended XYZ: only reading tells
    assert grid_of(files, 4) is not None
    assert grid_of(files.model_copy(update={"train": f"{files.train}@::2"}), 4) is None
    weighted = files.model_copy(update={"stream": StreamConfig(frames=150, weight=10.0)})
    assert grid_of(weighted, 4) is None
    other = files.model_copy(update={"stream": StreamConfig(frames=149)})
    assert grid_of(other, 4) is None
    (tmp_path / "00.parquet").write_bytes((tmp_path / "01.parquet").read_bytes()[:100])
    with pytest.raises(DataError, match=r"00\.parquet"):
        grid_of(files, 4)


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
    from blip_ft.data.read.sources import load_source

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
    from blip_ft.data.read.sources import load_source

    write(tmp_path / "a.traj", [*frames(2), Atoms("O", info={"energy": -1.0})])
    dataset = FrameDataset(load_source(str(tmp_path / "a.traj")), backbone)
    assert dataset.sizes("atoms") == [6, 6, 1]
    edges = dataset.sizes("edges")
    assert edges[0] == len(dataset[0].graph["edge_vec"])
    assert edges[2] == 1, "a lone atom takes room too"
