"""What a posterior can be updated with, in the folder of its run: sums over its gradient rows, of bounded size.

The model file does not have them: predictions need none, and they are several times as large. They belong to one mean
and to one way of making rows, both of which the file names.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from blip_ft.errors import CheckpointError
from blip_ft.families.base.posterior import ClosedFormPosterior
from blip_ft.files import remedy_of
from blip_ft.potential.bayesian import BayesianPotential

#: inside the folder of a run
NAME = "posterior.safetensors"
VERSION = 1


def write_statistics(potential: BayesianPotential, folder: Path) -> None:
    """Write them; nothing for families without updates.

    Raises:
        CheckpointError: it cannot be written; nothing is left behind.
    """
    posterior = potential.posterior
    tensors = posterior.statistics() if isinstance(posterior, ClosedFormPosterior) else {}
    if not tensors:
        return
    made = next(r["rows_of"] for r in reversed(potential.fit_reports) if "rows_of" in r)
    about = {"version": VERSION, "mean": mean_mark(potential), "rows": made}
    path, temporary = folder / NAME, folder / f".{NAME}.{os.getpid()}.part"
    try:
        save_file(tensors, temporary, {"about": json.dumps(about)})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot be written: {error}",
            file=path,
            remedy=remedy_of(error) if isinstance(error, OSError) else "free disk space",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_statistics(potential: BayesianPotential, folder: Path) -> dict[str, Any]:
    """Give a loaded model's posterior what it can be updated with.

    Args:
        potential: the model of the run, in the precision that it was trained in.
        folder: of the run.

    Returns:
        How its rows were made: ``projections``, of each frame's forces (``None``: every component), and ``number``, as
        ``GradientRows.features`` takes them.

    Raises:
        CheckpointError: there are none, they cannot be read, or they belong to another model.
    """
    path, posterior = folder / NAME, potential.posterior
    again = "train again, or copy the whole folder of the run again"
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 no mapping
        version, mean = int(about["version"]), about["mean"]
        made = {"projections": about["rows"]["projections"], "number": int(about["rows"]["number"])}
    except FileNotFoundError as error:
        raise CheckpointError(
            "this run has no sums that frames could be added to or removed from",
            file=path,
            remedy="train with posterior.family=sketch",
        ) from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot be read: {error}", file=path, remedy=again) from error
    if version > VERSION:
        raise CheckpointError(
            f"version {version} is newer than this program knows ({VERSION})",
            file=path,
            remedy="pip install --upgrade blip-ft",
        )
    if mean != mean_mark(potential):
        raise CheckpointError(
            "these sums belong to other weights than the model's: gradients are taken at the mean",
            file=path,
            remedy="give the folder of the run that made the model, and load it in the precision it was trained in",
        )
    try:
        assert isinstance(posterior, ClosedFormPosterior)
        posterior.set_statistics(tensors)
    except (ValueError, KeyError, IndexError, AssertionError) as error:
        raise CheckpointError(f"does not fit the model: {error}", file=path, remedy=again) from error
    return made


def mean_mark(potential: BayesianPotential) -> str:
    """SHA-256 of the mean, in hexadecimal."""
    digest = hashlib.sha256()
    for parameter in potential.mean_parameters:
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
