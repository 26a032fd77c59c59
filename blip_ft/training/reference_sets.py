"""References of their own for each set of energies (``data.reference_sets``), chosen on its training frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console

from blip_ft.config import DataConfig
from blip_ft.data.batch.dataset import FrameDataset
from blip_ft.data.batch.ledger import Ledger
from blip_ft.data.findings import Finding
from blip_ft.data.references import References, fit_references
from blip_ft.data.split.reference_sets import ReferenceSets, sets_of
from blip_ft.errors import DataError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.training.reference_shift import choose


def fit_reference_sets(
    config: DataConfig,
    potential: BayesianPotential,
    train: FrameDataset,
    isolated: Mapping[str, Mapping[int, float]],
    console: Console,
    ledger: Ledger,
) -> tuple[ReferenceSets, dict[str, References]]:
    """References of every set of the training frames, as ``data.references`` says, relative to those of the default.

    With ``keep`` the default has the pretrained model's zero, and the others are fitted to it.

    Args:
        config: the recipe's ``data``, with ``reference_sets``.
        potential: pretrained.
        train: training frames, energies as they were read.
        isolated: energies of isolated atoms in the sources, eV, by set and atomic number.
        console: where the fits are described.
        ledger: of the pretrained model.

    Returns:
        The sets, and the references of each whose compositions leave something open (none where energies are given).

    Raises:
        DataError: an element without a given energy.
    """
    options = config.reference_sets
    assert options is not None
    members = sets_of(train.frames, options.by)
    shifts: dict[str, dict[int, float]] = {}
    fits: dict[str, References] = {}
    for name, index in members.items():
        items = [train[i] for i in index]
        known = ledger.ask(items)
        residual = np.array([float(i.labels["energy"]) - k.energy for i, k in zip(items, known, strict=True)])
        references = _of_set(config, potential, name, [i.atoms.numbers for i in items], residual, isolated)
        shifts[name] = {} if references is None else dict(references.shift)
        if references is not None:
            console.print(f"{name}: {references.describe()}", markup=False)
            fits[name] = references
    base = shifts[options.default]
    relative = {
        name: {} if name == options.default else {z: e - base.get(z, 0.0) for z, e in shift.items()}
        for name, shift in shifts.items()
    }
    return ReferenceSets(options.default, relative, options.by), fits


def warn_outside_sets(
    own: ReferenceSets, fits: Mapping[str, References], sets: Mapping[str, FrameDataset]
) -> list[Finding]:
    """A warning for compositions whose reference energy the training frames of a set leave open.

    For a frame of another set than the default that is open if either set leaves it open: its label is brought
    onto a zero that nothing determines.

    Args:
        own: the sets.
        fits: references of each.
        sets: the roles, for the names and compositions of their frames.
    """
    seen: dict[tuple[str, str], None] = {}
    for role, dataset in sets.items():
        for row in dataset.frames.select_columns(["numbers", "energy", own.by]):
            name = row[own.by] or ""
            if row["energy"] is None:
                continue
            for side in dict.fromkeys((name, own.default)):
                note = fits[side].warn_outside_span(row["numbers"]) if side in fits else None
                if note is not None and (side != own.default or name != own.default):
                    seen[role, f"{role}, energies of '{name}': for the set '{side}' {note}"] = None
    return [Finding("coverage", "warning", [role], message) for role, message in seen]


def _of_set(
    config: DataConfig,
    potential: BayesianPotential,
    name: str,
    numbers: list[np.ndarray],
    residual: np.ndarray,
    isolated: Mapping[str, Mapping[int, float]],
) -> References | None:
    """The references of one set; ``None`` for those of the pretrained model."""
    options: Any = config.reference_sets
    fitted = fit_references(numbers, residual)
    if config.references == "keep":
        return None if name == options.default else fitted
    try:
        return choose(of_set(config, name), potential, numbers, residual, isolated.get(name, {}), fitted)[0]
    except DataError as error:
        raise DataError(
            f"{name}: {error.problem}", field=error.field, remedy=error.remedy, file=error.file
        ) from error


def of_set(config: DataConfig, name: str) -> DataConfig:
    """The recipe's ``data`` with the given energies of one set as the only ones."""
    options: Any = config.reference_sets
    return config.model_copy(update={"reference_energies": options.energies.get(name, {})})
