"""The one place that imports Hugging Face ``datasets``, and keeps it quiet.

Progress bars, log lines and telemetry are the caller's business, not a library's: they are off
while this package reads, and the caller's own settings come back afterwards.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read once, when huggingface_hub is imported

import datasets
import huggingface_hub
from datasets.exceptions import DatasetGenerationError

from blip_ft.errors import BlipError, DataError, first_line
from blip_ft.files import remedy_of


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no log lines from Hugging Face inside this context."""
    bars = datasets.are_progress_bars_disabled()
    levels = (datasets.logging.get_verbosity(), huggingface_hub.logging.get_verbosity())
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs as errors is raised as well
    huggingface_hub.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        if not bars:
            datasets.enable_progress_bars()
        datasets.logging.set_verbosity(levels[0])
        huggingface_hub.logging.set_verbosity(levels[1])


def cached_dataset(
    rows: Callable[..., Iterator[dict[str, Any]]], features: datasets.Features, **key: Any
) -> datasets.Dataset:
    """A memory-mapped data set of what ``rows(**key)`` yields, cached by the hash of ``key``.

    ``key`` must hold whatever the rows depend on (hash of the file, options, schema version).
    Nothing is left in the cache when ``rows`` raises.

    Raises:
        BlipError: as raised by ``rows``.
        DataError: the cache folder cannot be written.
    """
    try:
        with quiet():
            return datasets.Dataset.from_generator(rows, features=features, gen_kwargs=key)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, BlipError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, OSError):
            raise _unwritable(error.__cause__) from error
        raise
    except OSError as error:
        raise _unwritable(error) from error


def load_hub(
    name: str, *, config: str | None = None, revision: str | None = None, stream: bool = False
) -> Any:
    """The hub's data set as it is.

    Args:
        name: ``organisation/name``.
        config: configuration (subset).
        revision: branch, tag or commit.
        stream: an ``IterableDataset`` that reads over the network.

    Raises:
        DataError: no network, no such set, configuration or revision, or no access.
    """
    options: dict[str, Any] = {"name": config, "revision": revision, "streaming": stream or None}
    try:
        with quiet():
            return datasets.load_dataset(name, **{k: v for k, v in options.items() if v is not None})
    except Exception as error:
        raise DataError(
            f"neither a file or folder here nor a data set that the hub gives: {first_line(error)}",
            file=name,
            remedy="check the name, config and revision; for a hub id connect to the network once (later "
            "runs use the cache), or download the set and give its folder",
        ) from error


def _unwritable(error: OSError) -> DataError:
    return DataError(
        f"the cache of read data cannot be written: {error}",
        file=str(datasets.config.HF_DATASETS_CACHE),
        remedy=f"{remedy_of(error)}; HF_DATASETS_CACHE says where the cache is",
    )
