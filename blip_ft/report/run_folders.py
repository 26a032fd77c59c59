"""What the folders of runs say: which model, how many frames, whether the run has finished, how good it is.

A folder is read as it is found, by the files that ``fit`` leaves (README, "What you get"). A run that was
killed has only some of them, and one that was copied or edited may have any content: both are states of a run here,
no errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from blip_ft.errors import BlipError, first_line
from blip_ft.files import check_unused

State = Literal["finished", "running", "unfinished", "broken"]

#: what only a finished run has
FINISHED = ("metrics.json", "receipt.json", "recipe.yaml")
#: what makes a folder a run, finished or not
_MARKS = (*FINISHED, "metrics.csv", "hparams.yaml", "model", "plain", "tensorboard", ".writing")
#: figures of the table, with their names in ``metrics.json``
FIGURES = (
    "energy_mae_mev_per_atom",
    "force_mae_mev_per_ang",
    "force_crps_mev_per_ang",
    "coverage90",
)
#: models, the most telling first
_MODELS = ("blip", "plain", "pretrained")


@dataclass
class Run:
    """One folder.

    Attributes:
        name: of the folder.
        folder: its path.
        state: ``finished``; ``running``: another program on this machine writes there; ``unfinished``: it has
            not come to its end; ``broken``: a file of a finished run is missing or cannot be read.
        problem: what is missing or broken, else empty.
        recipe: as it was run; empty where it is not known.
        metrics: ``{model: {set: {metric: value}}}``.
        receipt: see ``training.receipt``.
        changed: when something in it was last written, UTC.
    """

    name: str
    folder: Path
    state: State
    problem: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    receipt: dict[str, Any] = field(default_factory=dict)
    changed: datetime | None = None

    @property
    def model(self) -> str:
        """``adapter:checkpoint``, or empty."""
        model = _mapping(self.recipe.get("model"))
        base = _mapping(self.receipt.get("base"))
        adapter = model.get("adapter", base.get("adapter"))
        checkpoint = model.get("checkpoint", base.get("checkpoint"))
        return f"{adapter}:{checkpoint}" if adapter and checkpoint else ""

    @property
    def frames(self) -> dict[str, int]:
        """{set: number of frames}."""
        sets = _mapping(_mapping(self.receipt.get("data")).get("sets"))
        return {
            str(n): s["n_frames"] for n, s in sets.items() if isinstance(_mapping(s).get("n_frames"), int)
        }

    @property
    def seconds(self) -> float | None:
        """How long the run took."""
        return _number(self.receipt.get("seconds"))

    @property
    def figures(self) -> dict[str, float | None]:
        """:data:`FIGURES` of the trained model on all test frames; ``None`` where a figure has no meaning there."""
        for model in _MODELS:
            sets = _mapping(self.metrics.get(model))
            if sets:
                chosen = _mapping(sets.get("all", next(iter(sets.values()))))
                return {key: _number(chosen.get(key)) for key in FIGURES}
        return dict.fromkeys(FIGURES)

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "state": self.state,
            "problem": self.problem,
            "model": self.model,
            "frames": self.frames,
            "figures": self.figures,
            "seconds": self.seconds,
            "changed": None if self.changed is None else self.changed.isoformat(timespec="seconds"),
        }


def read_runs(folder: str | Path) -> list[Run]:
    """The runs in a folder, by name; one if the folder is itself a run. Whatever is no run is left out.

    Raises:
        BlipError: there is no such folder.
    """
    folder = Path(folder)
    try:
        inside = sorted(p for p in folder.iterdir() if p.is_dir())
    except OSError as error:
        raise BlipError(
            f"cannot be listed: {error.strerror or error}",
            file=folder,
            remedy="give the folder that holds runs (a recipe's 'output', by default runs)",
        ) from error
    if (folder / "metrics.json").is_file():
        return [read_run(folder)]
    return [read_run(path) for path in inside if _is_run(path)]


def read_run(folder: str | Path) -> Run:
    """One run, whatever state it is in.

    Args:
        folder: exists.
    """
    folder = Path(folder)
    run = Run(folder.resolve().name, folder, "finished", changed=_changed(folder))
    problems: list[str] = []
    for name in FINISHED:
        try:
            text = (folder / name).read_text(encoding="utf-8")
            value = yaml.safe_load(text) if name.endswith(".yaml") else json.loads(text)
            if not isinstance(value, dict):
                raise TypeError(f"it holds a {type(value).__name__}")
            if name == "metrics.json":
                _check_metrics(value)
            setattr(run, name.partition(".")[0], value)
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
            problems.append(f"{name} cannot be read ({first_line(error)})")
    if not (folder / "model" / "model.json").is_file():
        problems.append("model/model.json is missing")
    try:
        check_unused(folder)
    except BlipError:
        run.state = "running"
        return run
    if problems:
        # metrics.json is written after model and receipt: without it the run did not come so far
        run.state = "broken" if (folder / "metrics.json").exists() else "unfinished"
        run.problem = "; ".join(problems) if run.state == "broken" else ""
    return run


def finished_run(folder: str | Path) -> Run:
    """A run that has finished.

    Raises:
        BlipError: the folder is none.
    """
    path = Path(folder)
    if not path.is_dir():
        raise BlipError(
            "there is no such run", file=path, remedy="give a run's folder; blip-finetune runs lists them"
        )
    run = read_run(path)
    if not run.metrics or not run.recipe:
        raise BlipError(
            f"this run is {run.state}" + (f": {run.problem}" if run.problem else ""),
            file=path,
            remedy="give the folder of a run that has finished; blip-finetune runs lists them",
        )
    return run


def _is_run(path: Path) -> bool:
    """By what it holds; an empty folder is a run that was killed at its beginning."""
    try:
        names = {p.name for p in path.iterdir()}
    except OSError:
        return True  # to be listed as broken
    return not names or not names.isdisjoint(_MARKS)


def _check_metrics(value: Mapping[str, Any]) -> None:
    """Raise a ``TypeError`` unless it is ``{model: {set: {metric: number or None}}}``."""
    for model, sets in value.items():
        if not isinstance(sets, Mapping) or not all(isinstance(s, Mapping) for s in sets.values()):
            raise TypeError(f"'{model}' holds no sets with metrics")
        for name, metrics in sets.items():
            for key, number in metrics.items():
                if number is not None and not isinstance(number, int | float):
                    raise TypeError(f"{key} of '{name}' is no number")


def _changed(folder: Path) -> datetime | None:
    try:
        times = [p.stat().st_mtime for p in (folder, *folder.iterdir())]
    except OSError:
        return None
    return datetime.fromtimestamp(max(times), UTC)


def _mapping(value: Any) -> Mapping[str, Any]:
    """What is none, in an edited file, is empty."""
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
