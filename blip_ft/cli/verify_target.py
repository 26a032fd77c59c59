"""What ``blip-finetune verify`` is given, as a model and structures."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ase import Atoms
from ase.calculators.calculator import Calculator

from blip_ft.backbones.protocol import Backbone
from blip_ft.backbones.registry import get_adapter
from blip_ft.config import load_recipe
from blip_ft.data.split.splits import load_splits
from blip_ft.errors import BlipError, CheckpointError, first_line
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.checkpoint import find_model, load_model, sha256
from blip_ft.potential.export import META as EXPORT
from blip_ft.potential.probes import probes_of
from blip_ft.training.run_folder import read_record
from blip_ft.verify.frames import frames_of, kept_frames, training_frames
from blip_ft.verify.models import Verified, of_backbone, of_potential, pretrained_of, relaxed
from blip_ft.verify.verdict import VERDICT, Check, checks_of

#: makes a calculator: ``calculator:MODULE:FUNCTION``
CALCULATOR = "calculator"
GIVE_FRAMES = "name structures with --frames, such as those that it was trained on"


@dataclass
class Target:
    """A model and what to verify it on.

    Attributes:
        model: to be verified.
        frames: structures.
        about: where they come from, in words.
        pretrained: the model that it was made of, where that is known.
        run: folder of the finished run that it is the model of.
        beside: checks of other models that the run has kept.
    """

    model: Verified
    frames: list[Atoms]
    about: str
    pretrained: Verified | None = None
    run: Path | None = None
    beside: Mapping[str, Sequence[Check]] = field(default_factory=dict)


def open_target(spec: str, source: str | None, *, trust: bool = False) -> Target:
    """A run, a model folder, an exported file, ``ADAPTER:CHECKPOINT`` or ``calculator:MODULE:FUNCTION``.

    Args:
        spec: as the user wrote it.
        source: structures; by default those of the run.
        trust: open a pickled file.

    Raises:
        BlipError: it is none of these, or there are no structures that it can describe.
    """
    path = Path(spec)
    if path.is_dir():
        target = _trained(path, source)
    elif path.is_file():
        target = _exported(path, source)
    elif spec.startswith(f"{CALCULATOR}:"):
        model = Verified(spec, {"given": partial(_calculator, spec)})
        model.calculator()  # a wrong name is told before structures are read
        target = _with_frames(model, source)
    elif ":" in spec:
        adapter, _, checkpoint = spec.partition(":")
        backbone = get_adapter(adapter).load(checkpoint, trust=trust)
        target = _with_frames(_known(of_backbone(spec, backbone), backbone), source)
    else:
        raise CheckpointError(
            "no model here",
            file=path,
            remedy="give a run's folder, a model folder, an exported file, or a model such as sevennet:7net-0",
        )
    return target


def _trained(path: Path, source: str | None) -> Target:
    """A run or a model folder."""
    folder = find_model(path)
    potential = load_model(folder)
    run = _run_of(folder)
    model = _known(of_potential(str(path), potential), potential.backbone)
    frames, about = _frames(source, run, potential)
    for atoms in frames:
        potential.backbone.check(atoms, file=source)
    kept = {} if run is None or not (run / VERDICT).is_file() else json.loads((run / VERDICT).read_text())
    beside = {k: checks_of(v) for k, v in kept.get("beside", {}).items() if k == "plain"}
    return Target(model, frames, about, pretrained_of(potential), run, beside)


def _run_of(folder: Path) -> Path | None:
    """The finished run that a model folder or an export lies in."""
    run = folder.resolve().parent
    return run if (run / "metrics.json").is_file() and (run / "recipe.yaml").is_file() else None


def _frames(
    source: str | None, run: Path | None, potential: BayesianPotential | None
) -> tuple[list[Atoms], str]:
    """Structures, and where they come from."""
    if source is not None:
        return frames_of(source), f"structures: {source}"
    if run is not None:
        if (kept := kept_frames(run)) is not None:
            return kept, f"structures: training frames kept in {run}"
        try:
            return _training_frames(run), f"structures: training frames of {run / 'recipe.yaml'}"
        except BlipError as error:
            raise BlipError(
                f"the training frames cannot be read any more: {error.problem}", file=run, remedy=GIVE_FRAMES
            ) from error
    if potential is None:
        raise BlipError("no structures to verify it on", field="--frames", remedy=GIVE_FRAMES)
    crystal = relaxed(of_potential("", potential), probes_of(potential)[0])
    return [crystal], "structures: a made-up crystal, relaxed by the model (--frames names better ones)"


def _training_frames(run: Path) -> list[Atoms]:
    """Those of the run's recipe, whose paths start where it was begun."""
    recipe = load_recipe(str(run / "recipe.yaml"), finished=True)
    begun = Path((read_record(run) or {}).get("directory", "."))
    with chdir(begun if begun.is_dir() else "."):
        return training_frames(load_splits(recipe.data).train)


def _exported(path: Path, source: str | None) -> Target:
    """A file of the vendor that ``export`` has written, through the vendor's loader and calculator."""
    meta_file = path.parent / EXPORT
    try:
        meta = json.loads(meta_file.read_text(encoding="utf-8"))
        known = {file["file"]: file["sha256"] for file in meta["files"]}
        adapter, chosen = meta["format"].removesuffix(" native"), meta["for"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{EXPORT} beside it does not say which adapter opens it ({first_line(error)})",
            file=path,
            remedy=f"give ADAPTER:{path}, or a file in the folder that export has written",
        ) from error
    ours = known.get(path.name) == sha256(path)  # what was written here needs no trust
    options = {k: v for k, v in chosen.items() if v is not None}
    backbone = get_adapter(adapter).load(str(path), trust=ours, **options)
    model = Verified(
        str(path),
        {
            "float64": partial(backbone.open_native, path),
            "float32": partial(backbone.open_native, path, as_used=True),
        },
    )
    run = _run_of(path.parent)
    target = _with_frames(_known(model, backbone), source, run)
    if run is not None:
        target.pretrained = pretrained_of(load_model(run))
    return target


def _with_frames(model: Verified, source: str | None, run: Path | None = None) -> Target:
    frames, about = _frames(source, run, None)
    for atoms in frames:
        model.check(atoms)
    return Target(model, frames, about)


def _known(model: Verified, backbone: Backbone) -> Verified:
    """The model, which refuses structures that its backbone cannot describe."""
    model.check = backbone.check
    return model


def _calculator(spec: str) -> Calculator:
    """What ``calculator:MODULE:FUNCTION`` makes."""
    module, _, name = spec.removeprefix(f"{CALCULATOR}:").partition(":")
    try:
        made: Calculator = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise BlipError(
            f"cannot be made: {first_line(error)}",
            field=spec,
            remedy=f"give {CALCULATOR}:MODULE:FUNCTION; Python has to find the module, the function makes a calculator",
        ) from error
    if not hasattr(made, "get_property"):
        raise BlipError(f"makes a {type(made).__name__}, which is no calculator of ASE", field=spec)
    return made
