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
from blip_ft.data.read.raw import RawFrame
from blip_ft.errors import DataError

NOT_CONVERGED = " | not converged"
_UNUSED = " | unused "
_LIKELY = {
    "energy": re.compile(r"ener|toten|etot|e_tot|^e_?0?$|^u_?0?$|dft", re.IGNORECASE),
    "forces": re.compile(r"forc|grad|^f$", re.IGNORECASE),
    "stress": re.compile(r"stress|virial|sigma|pressure|^s$", re.IGNORECASE),
}
_EATEN = re.compile(r"(^|\s)\w*energy\s*=", re.IGNORECASE)
#: numbers of a frame that are no energies, whatever else is missing
_OTHER = re.compile(
    r"charge|spin|multiplicity|^(md_)?step$|frame|index|^id$|time|temperature|^nelect", re.IGNORECASE
)
#: names that are told
_MOST = 5


def marks(raw: RawFrame, lacking: Collection[str], used: Collection[str]) -> str:
    """What the ``mapping`` column says behind the labels: unused numbers, and that nothing converged.

    Args:
        raw: the frame.
        lacking: labels that it does not have.
        used: names that something was taken from.
    """
    found = {label: names for label in lacking if (names := candidates(raw, label, used))}
    if "energy" in lacking:
        texts = [k for k, v in raw.values.items() if isinstance(v, str) and _EATEN.search(v)]
        found |= {"text": texts[:1]} if texts else {}
    text = f"{_UNUSED}{json.dumps(found)}" if found else ""
    return text + ("" if raw.converged else NOT_CONVERGED)


def without_marks(mapping: str) -> str:
    """The labels alone."""
    return mapping.partition(" | ")[0]


def candidates(raw: RawFrame, label: str, used: Collection[str]) -> list[str]:
    """Names of the numbers that could be a label: those that sound like it; for energies, else all."""
    names = [
        name
        for name, value in raw.values.items()
        if name not in used
        and not _OTHER.search(name)
        and not isinstance(value, bool | str | bytes | Mapping | None)
        and _fits(label, value, len(raw.numbers))
    ]
    likely = [name for name in names if sounds_like(label, name)]
    return (likely or (names if label == "energy" else []))[:_MOST]


def sounds_like(label: str, name: str) -> bool:
    """Whether a name is one that people give to this label."""
    return _LIKELY[label].search(name) is not None


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
    """A finding for each label that frames lack though numbers are left that could be it.

    Where some frames of a role have the label, only numbers of a name like it count.

    Args:
        roles: frames of every role.
        use_stress: stress will be trained on: then a training set without any is an error.
    """
    findings: list[Finding] = []
    told: set[tuple[str, tuple[str, ...]]] = set()
    for role, frames in roles.items():
        for label in _LIKELY if use_stress else ("energy", "forces"):
            lacking = _lacking(frames, label)
            if not lacking:
                continue
            alone = len(lacking) == len(frames)
            names, places = _names(frames, lacking, label, all_names=alone)
            asked = label == "stress" and role == "train" and alone
            if not asked and (not (names or "text" in places) or (label, tuple(names)) in told):
                continue
            told.add((label, tuple(names)))
            findings.append(_finding(role, label, names, places, len(frames), asked=asked, alone=alone))
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


def line_for(label: str, name: str) -> str:
    """What to write into the recipe to take a label from a name."""
    lower = name.lower()
    if label == "stress" and "vir" in lower:
        return f"data.fields: {{virial: {name}}} (with data.units: {{virial: -1 * eV}} if it has the stress's sign)"
    if label == "energy" and "atom" in lower:
        return f"data.fields: {{energy_per_atom: {name}}}"
    if label == "forces" and "grad" in lower:
        return f"data.fields: {{forces: {name}}} and data.units: {{forces: -1 * eV/Ang}}"
    return f"data.fields: {{{label}: {name}}}"


def _lacking(frames: datasets.Dataset, label: str) -> list[int]:
    """Rows without a label."""
    if not len(frames):
        return []
    column = frames.select_columns([label]).with_format("arrow")[:][label]
    return [i for i, null in enumerate(column.is_null().to_pylist()) if null]


def _names(
    frames: datasets.Dataset, rows: list[int], label: str, *, all_names: bool
) -> tuple[list[str], dict[str, list[str]]]:
    """Unused numbers of the rows, the most frequent first, and where they (or a ``text``) are."""
    places: dict[str, list[str]] = {}
    count: Counter[str] = Counter()
    for i, text in zip(rows, frames.select(rows)["mapping"], strict=True):
        _, mark, rest = text.partition(_UNUSED)
        if not mark:
            continue
        found = json.JSONDecoder().raw_decode(rest)[0]
        names = [name for name in found.get(label, []) if all_names or sounds_like(label, name)]
        count.update(names)
        where = f"{frames[i]['source']}, frame {frames[i]['frame']}"
        for name in names:
            places.setdefault(name, []).append(where)
        if label == "energy" and "text" in found:
            places.setdefault("text", []).append(f"{where} ('{found['text'][0]}')")
    return [name for name, _ in count.most_common(_MOST)], places


def _finding(
    role: str,
    label: str,
    names: list[str],
    places: Mapping[str, list[str]],
    total: int,
    *,
    asked: bool,
    alone: bool,
) -> Finding:
    article = {"energy": "an ", "forces": "", "stress": "a "}[label]
    where = places[names[0]] if names else places.get("text", [])
    message = f"{role}: no frame has {article}{label}"
    if not alone:
        message = f"{role}: {len(where)} of {total} frames have no {label}"
    remedies = []
    if names:
        message += f"; nothing uses {', '.join(map(repr, names))}"
        remedies.append(f"if it is '{names[0]}', write {line_for(label, names[0])}")
    elif where:
        message += "; a text holds 'energy='"
        remedies.append("a quotation mark or a bracket before it is not closed: mend the comment line")
    if asked:
        message += " (objective.use_stress)"
        remedies.append("give frames with a stress, or set objective.use_stress=false")
    else:
        remedies.append("else nothing is to do: the label is left out of the loss")
    return Finding(
        "coverage", "error" if asked else "warning", [] if alone else where, message, "; ".join(remedies)
    )
