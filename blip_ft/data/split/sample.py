"""Rows of a stream, and the sample of it that stands for the whole where all frames at once are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import datasets

from blip_ft.config import DataConfig
from blip_ft.data.read.plan import label_options
from blip_ft.data.read.schema import FEATURES
from blip_ft.data.read.set_aside import is_example
from blip_ft.data.read.sources import iterate_source, plain_row
from blip_ft.errors import DataError

Row = dict[str, Any]


def rows_of(config: DataConfig) -> Callable[[], Iterator[Row]]:
    """What opens the stream of ``data.train``: its examples (:mod:`blip_ft.data.read.set_aside`)."""

    def rows() -> Iterator[Row]:
        yield from filter(is_example, all_rows(config))

    return rows


def all_rows(config: DataConfig) -> Iterator[Row]:
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
