"""What is looked at before training starts: frames, labels, geometry, and units.

A thing that makes training wrong is a :class:`~blip_ft.errors.DataError`; anything else that a
user should know is a :class:`Finding`. Readers have already refused NaN and wrong shapes
(:mod:`blip_ft.data.read.schema`), and splits that share a structure (:mod:`blip_ft.data.split.splits`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from numpy.typing import NDArray

from blip_ft.backbones import electrons
from blip_ft.backbones.protocol import Backbone
from blip_ft.data.check.charge_spin import electron_findings
from blip_ft.data.check.frames import contradict, lone_atoms, near_duplicates, net_forces, outliers
from blip_ft.data.check.likely_units import Comparison, likely_unit
from blip_ft.data.check.overlaps import worst_overlap
from blip_ft.data.findings import Finding, place
from blip_ft.data.frame import FrameRow, to_atoms
from blip_ft.data.split.duplicates import first_same
from blip_ft.data.split.splits import Splits
from blip_ft.errors import DataError

#: one row of the schema
#: ``predict(atoms)`` gives one dict per structure with ``energy`` (), ``forces`` (n, 3) and
#: ``stress`` (6,) or (None or NaN where the model has none), eV and Å
Predict = Callable[[list[Atoms]], Sequence[dict[str, Any]]]

#: frames on which units are tested
UNIT_FRAMES = 16
#: below this correlation a slope says nothing about units
CORRELATED = 0.8
#: predictions and labels of a smaller rms are zero by symmetry and have no slope: eV/Å, eV/Å^3, eV
_ZERO = {"forces": 1e-3, "stress": 1e-5, "energy": 1e-6}
#: rms differences from a model that are usual, eV/Å and eV/Å^3 (1 GPa): labels so near to it are not
#: remarkable whatever their slope, as those of relaxed structures, which are zero and hardly correlate with
#: anything
_NEAR = {"forces": 0.1, "stress": 0.00624, "energy": 0.0}
#: slopes from fewer values say so
_FEW = 5
#: slopes outside this range are remarkable even if no unit explains them
PLAUSIBLE = (0.5, 2.0)
_SLOPE = (
    "check the units; or the model is that far off for this material, or the labels are a part of the energy"
)
_OVERLAP = (
    "check the unit of length, the cell and pbc, and atoms that are written twice (partly occupied sites)"
)


# ---- frames ------------------------------------------------------------------------------------


def check_frames(splits: Splits, backbone: Backbone) -> list[Finding]:
    """Check every frame of every role.

    Raises:
        DataError: an empty role, a frame without labels, or an element the model does not know.
    """
    findings: list[Finding] = []
    for role, frames in splits.roles().items():
        if not len(frames):
            raise DataError(f"the {role} set is empty", field=f"data.{role}", remedy="give it frames")
        rows = list(frames)
        structures = []
        for row in rows:
            atoms = to_atoms(row, labels=False)
            backbone.check(atoms, file=row["source"], frame=row["frame"])
            if row["energy"] is None and row["forces"] is None:
                raise DataError(
                    "the frame has neither energy nor forces",
                    file=row["source"],
                    frame=row["frame"],
                    field="energy, forces",
                    remedy="label the frame or remove it",
                )
            structures.append(atoms)
        findings += _coverage(role, rows)
        findings += _overlaps(role, rows, structures)
        findings += _copies(role, rows, structures)
        findings += lone_atoms(role, rows, structures, backbone.cutoff)
        findings += net_forces(role, rows)
    findings += outliers([row for frames in splits.roles().values() for row in frames])
    findings += near_duplicates(splits.roles())
    columns = [*electrons.KEYS, "source", "frame"]
    states = (row for frames in splits.roles().values() for row in frames.select_columns(columns))
    findings += electron_findings(states, backbone)
    if splits.dropped:
        findings.append(
            Finding(
                "coverage", "info", splits.dropped, f"{len(splits.dropped)} frames are left out of all roles"
            )
        )
    return findings


def _coverage(role: str, rows: list[FrameRow]) -> list[Finding]:
    findings = []
    for label in ("energy", "forces"):
        without = [place(row) for row in rows if row[label] is None]
        if without:
            message = f"{role}: {len(without)} of {len(rows)} frames have no {label}"
            findings.append(
                Finding("coverage", "info", without, message, "the label is left out of the loss there")
            )
    senseless = [place(row) for row in rows if row["stress"] is not None and not all(row["pbc"])]
    if senseless:
        message = f"{role}: {len(senseless)} frames have a stress but are not periodic in all directions"
        findings.append(
            Finding("coverage", "info", senseless, message, "their stress is not used; check pbc")
        )
    return findings


def _overlaps(role: str, rows: list[FrameRow], structures: list[Atoms]) -> list[Finding]:
    close = []
    for row, atoms in zip(rows, structures, strict=True):
        found = worst_overlap(atoms)
        if found is not None:
            distance, i, j = found
            pair = "-".join(f"{chemical_symbols[atoms.numbers[k]]}{k}" for k in (i, j))
            close.append(f"{place(row)} ({pair} {distance:.2f} Å)")
    if not close:
        return []
    message = f"{role}: atoms overlap in {len(close)} of {len(rows)} frames"
    return [Finding("geometry", "warning", close, message, _OVERLAP)]


def _copies(role: str, rows: list[FrameRow], structures: list[Atoms]) -> list[Finding]:
    heads = first_same(structures)
    copies = [i for i, head in enumerate(heads) if i != head]
    findings = []
    if copies:
        message = f"{role}: {len(copies)} frames are copies of another one in the set"
        notes = [place(rows[i], f"as frame {rows[heads[i]]['frame']}") for i in copies]
        remedy = "they count twice; remove them if not meant"
        findings.append(Finding("duplicate", "info", notes, message, remedy))
    differ = [i for i in copies if contradict(rows[i], rows[heads[i]])]
    if differ:
        message = f"{role}: {len(differ)} frames have other labels than a frame of the same structure"
        notes = [place(rows[i], _other(rows[i], rows[heads[i]])) for i in differ]
        remedy = "one of each two is wrong, or they are of two levels of theory: remove one"
        findings.append(Finding("label", "warning", notes, message, remedy))
    return findings


def _other(row: FrameRow, twin: FrameRow) -> str:
    """The frame of the same structure, and both levels of theory where they differ."""
    theories = [r.get("theory") or "" for r in (row, twin)]
    told = f", {' and '.join(t or 'none' for t in theories)}" if theories[0] != theories[1] else ""
    return f"and frame {twin['frame']}{told}"


# ---- units -------------------------------------------------------------------------------------


def check_units(
    train: datasets.Dataset, predict: Predict, *, use_stress: bool = True, by_state: bool = False
) -> list[Finding]:
    """Compare labels with the pretrained model on up to :data:`UNIT_FRAMES` frames.

    A pretrained model is right to some ten per cent wherever it has any business, so the slope of
    labels against its predictions tells kcal/mol from eV. Forces and stresses are compared as they
    are, energies after the mean of each composition is taken off both.

    Args:
        train: frames of the schema.
        predict: the pretrained model.
        use_stress: stress labels are trained on: then a wrong unit there stops, else it warns.
        by_state: the model does not take charge and spin, so that energies are compared within each state only.

    Raises:
        DataError: the labels are in another unit or of the other sign (slope within 20 % of that
            unit's factor at a correlation above 0.8); names the likely unit.
    """
    chosen = np.unique(np.linspace(0, len(train) - 1, min(len(train), UNIT_FRAMES)).round().astype(int))
    rows = [train[int(i)] for i in chosen]
    predictions = predict([to_atoms(row, labels=False) for row in rows])
    findings = unit_findings(rows, predictions, use_stress=use_stress, by_state=by_state)
    for quantity, finding in findings.items():
        if finding.severity == "error":
            raise DataError(finding.message, file=rows[0]["source"], field=quantity, remedy=finding.remedy)
    return list(findings.values())


def unit_findings(
    rows: list[FrameRow],
    predictions: Sequence[dict[str, Any]],
    *,
    use_stress: bool = True,
    by_state: bool = False,
) -> dict[str, Finding]:
    """What :func:`check_units` finds in given frames, by quantity; nothing is raised.

    Args:
        rows: of the schema.
        predictions: of the pretrained model, one per row, see :data:`Predict`.
        use_stress: a wrong unit of stress is an error rather than a warning.
        by_state: as for :func:`check_units`.
    """
    findings: dict[str, Finding] = {}
    for quantity, compared in _comparisons(rows, predictions, by_state).items():
        finding = _judge(quantity, compared)
        if finding is not None:
            mild = finding.severity == "error" and quantity == "stress" and not use_stress
            findings[quantity] = replace(finding, severity="warning") if mild else finding
    return findings


def _comparisons(
    rows: list[FrameRow], predictions: Sequence[dict[str, Any]], by_state: bool
) -> dict[str, Comparison]:
    """Labels and predictions of each quantity that both have, flattened."""
    pairs: dict[str, list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = {"forces": [], "stress": []}
    virials: list[NDArray[np.float64]] = []
    for row, predicted in zip(rows, predictions, strict=True):
        for quantity, members in pairs.items():
            if row[quantity] is None or predicted.get(quantity) is None:
                continue
            if quantity == "stress" and not all(row["pbc"]):
                continue
            label, value = np.ravel(row[quantity]), np.ravel(predicted[quantity])
            if np.isfinite(value).all():
                members.append((label, value))
                if quantity == "stress":
                    virials.append(value * abs(np.linalg.det(row["cell"])))
    result = {
        quantity: Comparison(np.concatenate([a for a, _ in m]), np.concatenate([b for _, b in m]))
        for quantity, m in pairs.items()
        if m
    }
    if virials:
        result["stress"] = Comparison(result["stress"].label, result["stress"].model, np.concatenate(virials))
    energies = _energies(rows, predictions, by_state)
    return result | ({"energy": energies} if energies else {})


def _energies(
    rows: list[FrameRow], predictions: Sequence[dict[str, Any]], by_state: bool
) -> Comparison | None:
    """Energies relative to the mean of their composition, charge, spin and level of theory; ``None`` without
    two alike.
    """
    kinds: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for row, predicted in zip(rows, predictions, strict=True):
        if row["energy"] is not None and np.isfinite(predicted["energy"]):
            state = electrons.state(row.get("charge"), row.get("spin")) if by_state else ()
            kind = (*sorted(row["numbers"]), state, row.get("theory") or "")
            kinds.setdefault(kind, []).append((row["energy"], float(predicted["energy"])))
    centred = [np.array(k) - np.mean(k, axis=0) for k in kinds.values() if len(k) > 2]
    if not centred:
        return None
    both = np.concatenate(centred)
    return Comparison(both[:, 0], both[:, 1])


def _judge(quantity: str, compared: Comparison) -> Finding | None:
    label, model = (float(np.sqrt(np.mean(v**2))) for v in (compared.label, compared.model))
    if model <= _ZERO[quantity]:  # one-atom cells, ideal crystals: nothing to compare with
        if label <= 10 * _ZERO[quantity] or quantity == "energy":
            return None
        return Finding(
            "label",
            "warning",
            [],
            f"the {quantity} labels have an rms of {label:.3g} where the pretrained model predicts none",
            "check that labels belong to these structures, and that the model knows such structures",
        )
    slope, correlation = compared.slope, compared.correlation
    few = f", from {len(compared.label)} values only" if len(compared.label) < _FEW else ""
    seen = f"against the pretrained model: slope {slope:.4g}, correlation {correlation:.2f}{few}"
    found = likely_unit(quantity, compared)
    if found is not None and abs(found.correlation) > CORRELATED:
        kind = "sign" if found.sign_only else "unit"
        return Finding(
            kind, "error", [], f"the {quantity} labels look like {found.text} ({seen})", found.remedy
        )
    if float(np.sqrt(np.mean((compared.label - compared.model) ** 2))) <= _NEAR[quantity]:
        return None
    if abs(correlation) <= CORRELATED:
        if quantity == "energy":  # a few meV between similar frames: no news
            return None
        return Finding(
            "label",
            "warning",
            [],
            f"the {quantity} hardly correlate with the pretrained model ({seen})",
            "check that labels belong to these structures, and the order of atoms and axes; labels near zero "
            "(relaxed structures) and materials that the model does not know look like that too",
        )
    if not PLAUSIBLE[0] <= slope <= PLAUSIBLE[1]:
        return Finding(
            "unit", "warning", [], f"the {quantity} are far from the pretrained model ({seen})", _SLOPE
        )
    return None
