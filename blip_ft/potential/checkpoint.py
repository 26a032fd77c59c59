"""Our own model format: a folder with ``model.safetensors`` and ``model.json``.

The JSON holds everything needed to rebuild the architecture (adapter, its configuration, what was
converted, the posterior family), the SHA-256 of the tensors and its own, where the base model came from, a format
version, and what the model gives for a made-up structure (:mod:`blip_ft.potential.checks`). The tensors hold
pretrained weights, mean, posterior, and the means and directions of the out-of-distribution score where there is
one. Nothing is ever unpickled, and the base model's file is not needed again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from blip_ft.backbones.registry import get_adapter
from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.data.split.reference_sets import ReferenceSets
from blip_ft.errors import CheckpointError
from blip_ft.families.registry import FAMILIES, todays_keys, without_foreign_keys
from blip_ft.files import is_full, remedy_of
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.calibration import Calibration
from blip_ft.potential.checks import (
    AGAIN,
    check_finite,
    check_probe,
    check_seal,
    check_values,
    make_probe,
    sealed,
)
from blip_ft.potential.distance import FeatureDistance
from blip_ft.potential.levels import Levels
from blip_ft.system.allocator import keep_memory
from blip_ft.version import __version__

#: 2: may hold the tensors of the out-of-distribution score; 3: of the posterior's options only those of its family, a
#: checksum of the JSON, and a probe
P = TypeVar("P", bound=BayesianPotential)

FORMAT_VERSION = 3
#: prefix of these tensors
OOD = "ood."
TENSORS, META = "model.safetensors", "model.json"


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def save_model(potential: BayesianPotential, folder: str | Path) -> None:
    """Write a model folder; the name appears only once both files are complete.

    An earlier model of this name is replaced; anything else there is left alone.

    Raises:
        CheckpointError: no space or no permission, or something else has this name; nothing is
            left behind.
    """
    folder = Path(folder)
    try:
        if folder.exists() and not (folder / META).is_file():
            raise CheckpointError("this exists and is not a model", file=folder, remedy="choose another name")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            new = Path(temporary) / "model"
            new.mkdir()
            # clone: tied weights share memory, which safetensors refuses
            tensors = {k: v.detach().cpu().contiguous().clone() for k, v in potential.state_dict().items()}
            if potential.ood is not None:
                stored = potential.ood.tensors()
                tensors |= {f"{OOD}{k}": v.contiguous().clone() for k, v in stored.items()}
            save_file(tensors, new / TENSORS)
            meta = sealed(_meta(potential) | {"tensors_sha256": sha256(new / TENSORS)})
            (new / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
            old = Path(temporary) / "old"
            if folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write the model: {error}",
            file=folder,
            remedy=remedy_of(error) if isinstance(error, OSError) else _full_or_other(folder.parent),
        ) from error


def _full_or_other(folder: Path) -> str:
    """The remedy for an error of a library that does not say why it could not write."""
    return "free disk space, or choose another 'output'" if is_full(folder) else "choose another 'output'"


def _meta(potential: BayesianPotential) -> dict[str, Any]:
    backbone = potential.backbone
    return {
        "format": "blip_ft model",
        "format_version": FORMAT_VERSION,
        "blip_ft": __version__,
        "adapter": backbone.name,
        "backbone": backbone.config(),
        "base": backbone.origin,
        "versions": backbone.versions() | {"torch": torch.__version__},
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "model": potential.model_config.model_dump(),
        "posterior": potential.posterior_config.model_dump(),
        "prior_scale": potential.prior.prior_scale,  # what "auto" came to
        "seed": potential.seed,
        "n_draws": potential.n_draws,
        "amplitude": potential.amplitude,
        "references": {str(z): e for z, e in potential.references.items()},
        "reference_sets": None if potential.reference_sets is None else potential.reference_sets.to_dict(),
        "calibration": None if potential.calibration is None else potential.calibration.to_dict(),
        "levels": None if potential.levels is None else potential.levels.to_dict(),
        "probe": make_probe(potential),
    }


def find_model(path: str | Path) -> Path:
    """The model folder of a run, or the folder itself.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / META).is_file():
            return folder
    raise CheckpointError(
        "no trained model here",
        file=path,
        remedy="give the folder of a finished run (runs/<name>) or its model/ folder",
    )


@overload
def load_model(
    path: str | Path, *, dtype: str | None = ..., device: str = ..., reference_set: str | None = ...
) -> BayesianPotential: ...


@overload
def load_model(
    path: str | Path,
    *,
    dtype: str | None = ...,
    device: str = ...,
    reference_set: str | None = ...,
    kind: type[P],
) -> P: ...


def load_model(
    path: str | Path,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    reference_set: str | None = None,
    kind: Any = BayesianPotential,
) -> Any:
    """Rebuild a trained potential.

    Args:
        path: a run's folder or a model folder.
        dtype: ``float32`` or ``float64``; by default what it was trained in.
        device: where to put it.
        reference_set: the set on whose zero energies are, of a model trained with ``data.reference_sets``; by default
            the recipe's default.
        kind: class of what is returned.

    Raises:
        BlipError: there is no such set.
        CheckpointError: missing, damaged or newer file, or a model that gives other numbers than when it was saved.
        ImportError: the adapter's backend is not installed.
    """
    keep_memory()
    folder = find_model(path)
    meta = read_meta(folder)
    tensors_file = folder / TENSORS
    if _sha256(tensors_file) != meta.get("tensors_sha256"):
        raise CheckpointError(
            "the tensors are missing or not the ones that were saved (cut short or changed)",
            file=tensors_file,
            remedy=AGAIN,
        )
    check_values(meta, folder / META)
    try:
        potential = _rebuild(meta, kind)
    except CheckpointError as error:
        if error.file is not None:
            raise
        raise CheckpointError(
            error.problem, remedy=error.remedy, file=folder / META, field=error.field
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"damaged or edited: {type(error).__name__}: {error}", file=folder / META, remedy=AGAIN
        ) from error
    try:
        tensors = load_file(tensors_file)
        check_finite(tensors, tensors_file)
        ood = {k.removeprefix(OOD): tensors.pop(k) for k in list(tensors) if k.startswith(OOD)}
        potential.load_state_dict(tensors)
        potential.ood = FeatureDistance.from_tensors(ood) if ood else None
    except (RuntimeError, OSError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"the tensors do not fit the model: {error}", file=tensors_file, remedy="train again"
        ) from error
    potential.prior.refresh(potential.converted.pretrained)
    check_probe(potential.eval(), meta, folder / META)
    if reference_set is not None:
        potential.use_reference_set(reference_set)
    if dtype is not None and dtype != meta["dtype"]:
        potential.to_dtype("float64" if dtype == "float64" else "float32")
    return potential.to(device).eval()


def _sha256(path: Path) -> str | None:
    """SHA-256 of a file, None if it cannot be read."""
    try:
        return sha256(path)
    except OSError:
        return None


def _rebuild(meta: dict[str, Any], kind: type[P]) -> P:
    """The potential that the JSON describes, with tensors yet to be loaded."""
    backbone = get_adapter(meta["adapter"]).from_config(meta["backbone"])
    backbone.origin = meta["base"]
    potential = kind(
        backbone,
        ModelConfig(**meta["model"]),
        PosteriorConfig(**meta["posterior"]),
        seed=int(meta["seed"]),
        n_draws=int(meta["n_draws"]),
    )
    potential.prior.prior_scale = float(meta["prior_scale"])
    potential.amplitude = float(meta["amplitude"])
    potential.references = {int(z): float(e) for z, e in meta["references"].items()}
    if meta.get("reference_sets") is not None:
        potential.reference_sets = ReferenceSets.from_dict(meta["reference_sets"])
    if meta["calibration"] is not None:
        potential.calibration = Calibration.from_dict(meta["calibration"])
    if meta.get("levels") is not None:
        potential.levels = Levels.from_dict(meta["levels"])
    potential.to_dtype(meta["dtype"])
    return potential


def read_meta(folder: Path) -> dict[str, Any]:
    """The JSON part of a model folder, upgraded to the present format version."""
    file = folder / META
    try:
        meta: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = int(meta["format_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"not readable: {error}", file=file, remedy="train again") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"format version {version} is newer than this program knows ({FORMAT_VERSION})",
            file=file,
            remedy="pip install --upgrade blip-ft",
        )
    if version >= 3:
        check_seal(meta, file)
    options = meta.get("posterior")
    if isinstance(options, dict):
        if (family := options.get("family")) not in FAMILIES:
            raise CheckpointError(
                f"there is no posterior family '{family}' here",
                file=file,
                remedy="install the package that it comes from, or copy the whole folder again",
            )
        meta["posterior"] = without_foreign_keys(options) if version < 3 else todays_keys(options)
    return meta


def require_space(folder: Path, needed: int) -> None:
    """Raise unless ``needed`` bytes can be written below ``folder``.

    Raises:
        CheckpointError: no permission, or not enough space.
    """
    parent = folder
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.NamedTemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise CheckpointError(
            f"cannot write here: {error}",
            file=parent,
            remedy=remedy_of(error),
        ) from error
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"{free / 1e6:.0f} MB free, about {needed / 1e6:.0f} MB needed",
            file=parent,
            remedy="free disk space or choose another 'output'",
        )
