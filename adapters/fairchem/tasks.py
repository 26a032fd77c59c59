"""fairchem's tasks: which levels of theory a checkpoint knows, their scales, references and heads."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from torch import Tensor

from blip_ft.adapters.fairchem.vendor import class_names, importing
from blip_ft.adapters.shared.vendor import default_dtype
from blip_ft.backbones import electrons
from blip_ft.errors import CheckpointError, DataError, RecipeError, nearest


@dataclass(frozen=True)
class Scale:
    """How a task's output becomes a property: ``output * rmsd + mean``, eV, eV/Å or eV/Å^3."""

    rmsd: float
    mean: float

    def rounded(self, dtype: torch.dtype) -> Scale:
        """With the numbers as the vendor holds them in this precision."""
        rmsd, mean = torch.tensor([self.rmsd, self.mean], dtype=dtype).tolist()
        return Scale(rmsd, mean)


@dataclass(frozen=True)
class Task:
    """What a data set's tasks say.

    Attributes:
        energy, forces, stress: scales; ``None`` where the checkpoint has no such task.
        references: (elements,) eV, float64; added to the energy of each atom.
        outputs: {property: name of the model's output}.
    """

    energy: Scale
    forces: Scale | None
    stress: Scale | None
    references: Tensor
    outputs: dict[str, str]


def task_names(tasks: Sequence[Any]) -> list[str]:
    """Data sets for which there is an energy."""
    return sorted({d for t in tasks if t.get("property") == "energy" for d in t.get("datasets", ())})


def choose_task(task: str | None, tasks: Sequence[Any]) -> str:
    """The task to use.

    Raises:
        RecipeError: unknown, or missing where there are several; lists the valid ones.
    """
    names = task_names(tasks)
    if task in names:
        return str(task)
    valid = f"valid names: {', '.join(names)}"
    if task is None:
        if len(names) == 1:
            return names[0]
        raise RecipeError("this model needs a task", remedy=valid, field="model.options.task")
    near = nearest(str(task), names)
    raise RecipeError(
        f"unknown task '{task}'",
        remedy=valid if near.startswith("valid") else f"{near} ({valid})",
        field="model.options.task",
    )


def read_task(name: str, tasks: Sequence[Any], *, file: Path | str | None = None) -> Task:
    """Scales and references of a data set's tasks.

    Raises:
        CheckpointError: a normaliser or references of another kind.
    """
    mine = {t["property"]: t for t in tasks if name in t.get("datasets", ())}
    try:
        scales = {p: _scale(t["normalizer"]) for p, t in mine.items() if p in ("energy", "forces", "stress")}
        references = _references(mine["energy"].get("element_references"))
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"the normaliser or references of task '{name}' are of a kind that the adapter does not know",
            remedy="use a published UMA or eSEN checkpoint",
            file=file,
        ) from error
    return Task(
        energy=scales["energy"],
        forces=scales.get("forces"),
        stress=scales.get("stress"),
        references=references,
        outputs={p: mine[p]["name"] for p in scales},
    )


def _instantiate(config: Any) -> Any:
    import hydra

    with importing(), default_dtype(torch.float64):
        return hydra.utils.instantiate(config)


def _scale(config: Any) -> Scale:
    normalizer = _instantiate(config)
    return Scale(float(normalizer.rmsd), float(normalizer.mean))


def _references(config: Any) -> Tensor:
    if config is None:
        return torch.zeros(0, dtype=torch.float64)
    table: Tensor = _instantiate(config).element_references
    return table.detach().double().reshape(-1)


@dataclass(frozen=True)
class Head:
    """A part of the model that predicts one property.

    Attributes:
        path: its name inside the model.
        wrapper: the vendor's module that gives each data set its own expert or output, or ``None``.
        module: the head itself.
    """

    path: str
    wrapper: Any
    module: Any


#: classes of heads by what they predict
_HEADS = {
    "MLP_EFS_Head": "energy",
    "MLP_Energy_Head": "energy",
    "Linear_Energy_Head": "energy",
    "Linear_Force_Head": "forces",
    "MLP_Stress_Head": "stress",
}


def choose_heads(model: Any, task: Task, *, direct: bool, file: Path | str | None = None) -> dict[str, Head]:
    """The heads behind a task's outputs, by property.

    ``forces`` and ``stress`` are there only if they have a head of their own ("direct"); else they are
    derivatives of the energy.

    Raises:
        CheckpointError: no energy head, or one that cannot be used.
    """
    found: dict[str, Head] = {}
    for name, module in model.output_heads.items():
        wrapped = hasattr(module, "dataset_names")
        inner = module.head if wrapped else module
        kind = _HEADS.get(type(inner).__name__)
        if kind is None:
            continue
        path = f"output_heads.{name}" + (".head" if wrapped else "")
        prefix = f"{inner.prefix}_" if getattr(inner, "prefix", None) else ""
        outputs = {f"{d}_{kind}" for d in module.dataset_names} if wrapped else {f"{prefix}{kind}"}
        if not model.pass_through_head_outputs:
            outputs = {name}
        if task.outputs.get(kind) in outputs:
            found[kind] = Head(path, module if wrapped else None, inner)
    energy = found.get("energy")
    if energy is None:
        problem = "has no energy head that the adapter knows"
    elif getattr(energy.module, "reduce", "sum") != "sum":
        problem = "predicts the mean of the atoms' energies, not their sum"
    elif direct and ("forces" not in found or task.forces is None):
        problem = "has a head for forces, but none for this task"
    elif direct:
        return found
    elif task.forces is not None and task.forces != Scale(task.energy.rmsd, 0.0):
        problem = "scales forces otherwise than energies, so that they are no derivatives"
    else:
        return {"energy": energy}
    raise CheckpointError(problem, remedy="use a published UMA or eSEN checkpoint", file=file)


def is_direct(config: dict[str, Any]) -> bool:
    """Whether forces come from a head of their own."""
    names = [name for _, name in class_names(config.get("heads", {}))]
    return bool(config["backbone"].get("direct_forces", True)) and any(
        name.endswith("Linear_Force_Head") for name in names
    )


#: what the vendor has embeddings for
_RANGES = {"charge": (-100, 100), "spin": (0, 100)}
_REMEDY = "charge counts e, spin is the multiplicity 2S + 1 (0: not given)"


def check_system(charge: Any, spin: Any, task: str) -> tuple[int, int]:
    """Total charge and spin multiplicity, the latter with the vendor's default.

    Raises:
        RecipeError: not whole numbers that the vendor has an embedding for.
    """
    if spin is None:
        spin = 1 if task == "omol" else 0
    for name, value in (("charge", charge), ("spin", spin)):
        if not _fits(name, value):
            raise RecipeError(_misfit(name, value), remedy=_REMEDY, field=f"model.options.{name}")
    return int(charge), int(spin)


def system_of(
    atoms: Atoms, charge: int, spin: int, *, file: str | None = None, frame: int | None = None
) -> tuple[int, int]:
    """Charge and spin of a structure: its own (``atoms.info``), as the vendor reads them, or the given ones.

    Raises:
        DataError: not whole numbers that the vendor has an embedding for.
    """
    own = {"charge": charge, "spin": spin} | electrons.own(atoms.info)
    for name, value in own.items():
        if not _fits(name, value):
            raise DataError(_misfit(name, value), remedy=_REMEDY, file=file, frame=frame, field=name)
    return int(own["charge"]), int(own["spin"])


def _fits(name: str, value: Any) -> bool:
    low, high = _RANGES[name]
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and float(value).is_integer() and low <= value <= high


def _misfit(name: str, value: Any) -> str:
    low, high = _RANGES[name]
    return f"{name} {value!r} is not a whole number between {low} and {high}"
