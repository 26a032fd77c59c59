"""Numbers of a frame that could be the label it lacks, carried in the ``mapping`` column.

Where a frame has no energy, forces or stress, the numbers of the right shape that nothing uses are
remembered. If in the end no frame of a role has that label, a finding names them and the line to write:
nobody should train without energies because they are called ``TotEnergy``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import datasets
import numpy as np

from blip_ft.data.findings import Finding
from blip_ft.data.frames import RawFrame
from blip_ft.errors import DataError

NOT_CONVERGED = " | not converged"
_UNUSED = " | unused "
_LIKELY = {
    "energy": re.compile(r"ener|toten|etot|e_tot|^e_?0?$|^u_?0?$|dft", re.IGNORECASE),
    "forces": re.compile(r"forc|grad|^f$", re.IGNORECASE),
    "stress": re.compile(r"stress|virial|sigma|pressure|^s$", re.IGNORECASE),
}
#: names that are told
_MOST = 5


def marks(raw: RawFrame, lacking: Collection[str], used: Collection[str]) -> str:
    """What the ``mapping`` column says behind the labels: unused numbers, and that nothing converged.

    Args:
        raw: the frame.
        lacking: labels that it does not have.
        used: names that something was taken from.
    """
    found = {label: names for label in lacking if (names := _candidates(raw, label, used))}
    text = f"{_UNUSED}{json.dumps(found)}" if found else ""
    return text + ("" if raw.converged else NOT_CONVERGED)


def without_marks(mapping: str) -> str:
    """The labels alone."""
    return mapping.partition(" | ")[0]


def _candidates(raw: RawFrame, label: str, used: Collection[str]) -> list[str]:
    """Names of the numbers that could be a label, those that sound like it or else all."""
    names = []
    for name, value in raw.values.items():
        if name in used or isinstance(value, bool | str | bytes | Mapping) or value is None:
            if label == "energy" and isinstance(value, str) and re.search(r"energy\s*=", value):
                names.append(name)  # a text that holds the label: a quotation mark is missing
            continue
        if _fits(label, value, len(raw.numbers)):
            names.append(name)
    likely = [name for name in names if _LIKELY[label].search(name)]
    if not likely and label != "energy":
        return []
    return (likely or names)[:_MOST]


def _fits(label: str, value: Any, n: int) -> bool:
    try:
        array = np.asarray(value)
    except ValueError:  # a ragged list
        return False
    if array.dtype.kind not in "fiu":
        return False
    if label == "energy":
        return array.size == 1
    if label == "forces":
        return array.shape == (n, 3)
    return array.shape in ((6,), (9,), (3, 3), (1, 6), (1, 9))


def unmatched_labels(roles: Mapping[str, datasets.Dataset], *, use_stress: bool = False) -> list[Finding]:
    """A finding for each label that no frame of a role has though numbers are left that could be it.

    Args:
        roles: frames of every role.
        use_stress: stress will be trained on: then a training set without any is an error.
    """
    findings: list[Finding] = []
    told: set[tuple[str, tuple[str, ...]]] = set()
    for role, frames in roles.items():
        for label in _LIKELY:
            if not len(frames) or any(value is not None for value in frames[label]):
                continue
            wanted = label != "stress" or use_stress
            names = _names(frames, label)
            if not wanted or (label, tuple(names)) in told:
                continue
            told.add((label, tuple(names)))
            asked = label == "stress" and role == "train"
            if names or asked:
                findings.append(_finding(role, label, names, asked=asked))
    return findings


def labels_found(roles: Mapping[str, datasets.Dataset], *, use_stress: bool) -> list[Finding]:
    """The same before a training.

    Raises:
        DataError: stress is to be trained on and no training frame has one.
    """
    findings = unmatched_labels(roles, use_stress=use_stress)
    for finding in findings:
        if finding.severity == "error":
            source = roles["train"][0]["source"]
            raise DataError(finding.message, file=source, field="stress", remedy=finding.remedy)
    return findings


def _names(frames: datasets.Dataset, label: str) -> list[str]:
    count: Counter[str] = Counter()
    for text in frames["mapping"]:
        _, mark, rest = text.partition(_UNUSED)
        if mark:
            count.update(json.JSONDecoder().raw_decode(rest)[0].get(label, []))
    return [name for name, _ in count.most_common(_MOST)]


def _finding(role: str, label: str, names: list[str], *, asked: bool) -> Finding:
    what = {"energy": "energy", "forces": "forces", "stress": "stress"}[label]
    message = (
        f"{role}: no frame has {'an ' if label == 'energy' else 'a ' if label == 'stress' else ''}{what}"
    )
    remedy = "give frames with a stress, or set objective.use_stress=false"
    if names:
        listed = ", ".join(f"'{name}'" for name in names)
        message += f"; nothing uses {listed}"
        remedy = f"if it is '{names[0]}', write {_line(label, names[0])}"
    if asked:
        message += " (objective.use_stress)"
        remedy += "" if not names else "; or set objective.use_stress=false"
    elif names:
        remedy += "; else nothing is to do: the label is left out"
    return Finding("coverage", "error" if asked else "warning", [], message, remedy)


def _line(label: str, name: str) -> str:
    """What to write into the recipe to take a label from a name."""
    lower = name.lower()
    if label == "stress" and "vir" in lower:
        return f"data.fields: {{virial: {name}}} (virial = -stress * volume; else data.units: {{virial: -1 * eV}})"
    if label == "energy" and "atom" in lower:
        return f"data.fields: {{energy_per_atom: {name}}}"
    if label == "forces" and "grad" in lower:
        return f"data.fields: {{forces: {name}}} and data.units: {{forces: -1 * eV/Ang}}"
    return f"data.fields: {{{label}: {name}}}"
