"""Rows of a stream, and the sample of it that stands for the whole where all frames at once are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import datasets

from blip_ft.config import DataConfig
from blip_ft.data.findings import Finding
from blip_ft.data.frame import FrameRow
from blip_ft.data.read.plan import label_options
from blip_ft.data.read.schema import FEATURES
from blip_ft.data.read.set_aside import is_example
from blip_ft.data.read.sources import iterate_source, plain_row
from blip_ft.errors import DataError


@dataclass(frozen=True)
class Dropped:
    """Frames of a stream that are not trained on, as their label is wrong.

    Attributes:
        places: (file, frame) of each.
        weight: sum of their weights in the file.
    """

    places: frozenset[tuple[str, int]] = frozenset()
    weight: float = 0.0


def rows_of(config: DataConfig, dropped: Dropped | None = None) -> Callable[[], Iterator[FrameRow]]:
    """What opens the stream of ``data.train``: its examples (:mod:`blip_ft.data.read.set_aside`) but for what
    is dropped.
    """
    places = frozenset() if dropped is None else dropped.places

    def rows() -> Iterator[FrameRow]:
        for row in filter(is_example, all_rows(config)):
            if (row["source"], row["frame"]) not in places:
                yield row

    return rows


def all_rows(config: DataConfig) -> Iterator[FrameRow]:
    """All rows of ``data.train``, as they are read."""
    yield from map(plain_row, iterate_source(config.train, **label_options(config)))


def sample_of(config: DataConfig) -> datasets.Dataset:
    """Frames from the start of the stream, each with the weight of those it stands for.

    Isolated atoms and frames that did not converge are among them, and count nothing.

    The sum of their weights is that of the whole stream, so that sums over them (the Gauss-Newton
    matrix, N) have the size of the whole.

    Raises:
        DataError: the stream cannot be read or is empty.
    """
    options = config.stream
    assert options is not None
    rows, examples = [], []
    for row in all_rows(config):
        rows.append(row)
        if is_example(row):
            examples.append(row)
        if len(examples) == min(options.sample, options.frames):
            break
    total = sum(row["weight"] for row in examples)
    if not examples:
        raise DataError(
            "the stream has no frame to learn from",
            field="data.train",
            remedy="it holds isolated atoms or frames that did not converge alone: give others",
        )
    scale = (options.frames if options.weight is None else options.weight) / total
    for row in examples:
        row["weight"] *= scale
    return datasets.Dataset.from_list(rows, features=FEATURES)


def dropped_of(config: DataConfig, rows: Iterable[FrameRow]) -> Dropped:
    """Frames of the sample that are not trained on, with the weights that they have in the stream itself.

    Args:
        config: the recipe's ``data``.
        rows: these frames.
    """
    places = frozenset((row["source"], row["frame"]) for row in rows)
    found = (row["weight"] for row in rows_of(config)() if (row["source"], row["frame"]) in places)
    weights = list(islice(found, len(places)))
    return Dropped(places, math.fsum(1.0 if w is None else w for w in weights))


def without_dropped(config: DataConfig, sample: datasets.Dataset, dropped: Dropped) -> datasets.Dataset:
    """What is left of the sample, with weights that sum to that of what is left of the stream."""
    options = config.stream
    assert options is not None
    whole = options.frames if options.weight is None else options.weight
    left = [row for row in sample if (row["source"], row["frame"]) not in dropped.places]
    scale = (whole - dropped.weight) / math.fsum(row["weight"] for row in left)
    for row in left:
        row["weight"] *= scale
    return datasets.Dataset.from_list(left, features=FEATURES)


def unchecked(config: DataConfig) -> list[Finding]:
    """That labels beyond the sample are not compared with the model; nothing where there are none."""
    options = config.stream
    if options is None or options.frames <= options.sample:
        return []
    message = (
        f"the labels of {options.sample} of {options.frames} frames of the stream, its sample, are "
        f"compared with the model: "
        "wrong ones beyond it are trained on"
    )
    return [Finding("coverage", "info", [], message, "data.stream.sample sets their number")]
