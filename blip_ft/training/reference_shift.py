"""The recipe's choice of energy references (``data.references``), put into the model and verified there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols, ground_state_magnetic_moments
from rich.console import Console

from blip_ft.backbones import electrons
from blip_ft.config import DataConfig
from blip_ft.data.batch.dataset import FrameDataset
from blip_ft.data.batch.ledger import Ledger
from blip_ft.data.findings import Finding, place
from blip_ft.data.references import References, fit_references, given_references, refit_references
from blip_ft.errors import DataError, nearest
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.training import sanity_checks
from blip_ft.uncertainty.predict import predict_atoms

#: a residual this many times that of a fit says that given energies do not belong to this model
WORSE = 5.0
#: eV/atom; a larger residual of kept references is an offset and no error of the model
OFFSET = 0.5


def set_references(
    config: DataConfig,
    potential: BayesianPotential,
    train: FrameDataset,
    isolated: Mapping[int, float],
    console: Console,
    ledger: Ledger | None = None,
) -> tuple[References | None, dict[str, float], list[Finding]]:
    """Choose the energy per element, put it into the model, verify it in the assembled model.

    Args:
        config: the recipe's ``data``.
        potential: pretrained; its ``references`` are set.
        train: training frames.
        isolated: labels of isolated atoms that the training source holds, eV.
        console: where the fit is described.
        ledger: of the pretrained model, where its predictions are.

    Returns:
        The references (``None`` for ``keep`` and without energy labels), the residual in the
        assembled model, and what a user should know.

    Raises:
        DataError: an energy that is missing or of an unknown element.
        SanityCheckError: the model's residual is not the one that was promised.
    """
    items = [train[i] for i in range(len(train))]
    chosen = [i for i, item in enumerate(items) if not bool(item.labels["energy"].isnan())]
    items = [items[i] for i in chosen]
    if not items:
        if config.references != "keep":
            console.print("no energies to fit references on: kept as they are", style="yellow")
        return None, {}, []
    atoms = [item.atoms for item in items]
    labels = np.array([float(item.labels["energy"]) for item in items])
    ledger = Ledger(potential.backbone) if ledger is None else ledger
    model = np.array([known.energy for known in ledger.ask(items)])
    numbers, residual = [a.numbers for a in atoms], labels - model
    fitted = fit_references(numbers, residual)
    far = _far([train.frames[chosen[i]] for i in fitted.left_out])
    if config.references == "keep":
        return None, {}, [*far, *_offset(fitted)]
    references, findings = choose(config, potential, numbers, residual, isolated, fitted)
    potential.references = dict(references.shift)
    kept = [i for i in range(len(atoms)) if i not in references.left_out]
    check = sanity_checks.check_references(
        potential, [atoms[i] for i in kept], labels[kept], model[kept], references
    )
    console.print(references.describe())
    return references, check, [*far, *findings]


def _far(rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """A warning about energies that took no part in the fit."""
    if not rows:
        return []
    message = f"the energies of {len(rows)} training frames are wrong beyond doubt and take no part in the references"
    remedy = "mend or remove them: they are still trained on"
    return [Finding("label", "warning", [place(row) for row in rows], message, remedy)]


def warn_outside(references: References, sets: Mapping[str, FrameDataset]) -> list[Finding]:
    """A warning for every set with compositions whose reference energy the training frames leave open."""
    findings = []
    for name, dataset in sets.items():
        compositions = {tuple(sorted(z)) for z in dataset.frames["numbers"]}
        notes = {n for z in compositions if (n := references.warn_outside_span(z)) is not None}
        findings += [Finding("coverage", "warning", [name], f"{name}: {n}") for n in sorted(notes)]
    return findings


def choose(
    config: DataConfig,
    potential: BayesianPotential,
    numbers: list[np.ndarray],
    residual: np.ndarray,
    isolated: Mapping[int, float],
    fitted: References,
) -> tuple[References, list[Finding]]:
    """The references that ``data.references`` asks for (other than ``keep``), and what a user should know.

    Args:
        config: the recipe's ``data``.
        potential: pretrained.
        numbers: atomic numbers of each frame.
        residual: label - model of each frame, eV.
        isolated: labels of isolated atoms, eV.
        fitted: the shift of least norm on the same frames.

    Raises:
        DataError: an energy that is missing or of an unknown element.
    """
    mode = config.references
    if mode == "shift":
        return fitted, []
    energies = dict(isolated) if mode == "isolated_atoms" else given_energies(config)
    alone = lone_atoms(potential, {*fitted.elements, *energies})
    if mode == "refit":
        return refit_references(numbers, residual, alone), []
    references = given_references(numbers, residual, alone, energies, mode)
    if references.rms_after <= WORSE * fitted.rms_after + 1e-3:
        return references, []
    message = (
        f"the energies of isolated atoms leave {1e3 * references.rms_after:.0f} meV/atom on the training "
        f"frames, a fit would leave {1e3 * fitted.rms_after:.0f}"
    )
    remedy = "use data.references: shift, unless the pretrained model describes lone atoms"
    return references, [Finding("label", "warning", [], message, remedy)]


def given_energies(config: DataConfig) -> dict[int, float]:
    """``data.reference_energies`` by atomic number, eV.

    Raises:
        DataError: one of them is of no element.
    """
    for symbol in config.reference_energies:
        if symbol not in atomic_numbers:
            raise DataError(
                f"'{symbol}' is not a chemical element",
                field="data.reference_energies",
                remedy=nearest(symbol, chemical_symbols[1:]),
            )
    return {atomic_numbers[symbol]: energy for symbol, energy in config.reference_energies.items()}


def lone_atoms(potential: BayesianPotential, elements: Iterable[int]) -> dict[int, float]:
    """Energy that the model's mean gives to a lone atom of each element it knows, eV."""
    known = sorted(set(elements) & potential.backbone.elements)
    structures = [Atoms(numbers=[z], positions=[(0.0, 0.0, 0.0)]) for z in known]
    for z, structure in zip(known, structures, strict=True):
        # a model that has no default is asked about the neutral atom in its ground state
        ground = {"charge": 0.0, "spin": 1.0 + ground_state_magnetic_moments[z]}
        structure.info = {
            k: electrons.plain(ground[k])
            for k, value in potential.backbone.conditions.items()
            if value is None
        }
    predictions = predict_atoms(potential, structures, n_draws=0)
    return {z: float(p["energy"]) for z, p in zip(known, predictions, strict=True)}


def _offset(fitted: References) -> list[Finding]:
    if fitted.rms_before < OFFSET or fitted.rms_after > 0.2 * fitted.rms_before:
        return []
    message = (
        f"the energies differ from the pretrained model by {fitted.rms_before:.3g} eV/atom, of which a constant "
        f"per element explains all but {1e3 * fitted.rms_after:.0f} meV/atom"
    )
    remedy = "use data.references: shift; with keep the weights must learn the constant"
    return [Finding("label", "warning", [], message, remedy)]
