"""Energies that fall into sets: frames of several levels of theory, heads or programs in one source.

What the pretrained model leaves over of the energies is explained by energies per element, fitted to the largest
set alone. Frames of another set whose composition these energies determine must then lie where those of the largest
set do. If they are off together, by more than the frames of either set scatter, the set has a zero of its own: one
model cannot have two, so half of the frames would teach it the wrong energies.

A column that names the level of theory (:data:`blip_ft.data.read.schema.THEORIES`) is believed at a small offset. The
energies of a phase or of a file may also be off because the pretrained model is, so there the offset must be larger
than such errors are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from blip_ft.data.check.label_faults import Compared, energy_residual, state_columns
from blip_ft.data.findings import Finding
from blip_ft.data.frame import FrameRow
from blip_ft.data.robust import Floats, spread

#: frames that make a set
MIN_SET = 3
#: an offset counts beyond so many eV/atom and so many times the scatter within the sets; second, for groups and files
OFFSET, TIMES = (0.02, 0.15), (5.0, 8.0)
#: names that may tell a level of theory, or kinds of structures
LOOSE = frozenset({"config_type", "dataset", "dataset_name", "code", "settings", "level"})
#: scatter that is as good as none, eV/atom
_NOISE = 2e-3
#: a composition is outside the span if this share of its direction is
_OUTSIDE = 1e-6
#: names of groups that tell a level of theory or a program
_LEVEL = re.compile(
    r"(?i)(?<![a-z])(rev|r|w)?(r2?\+?\+?scan|pbe|pbesol|pbe0|hse\d*|lda|gga|b3lyp|blyp|bp86|tpss|m06|b97\w*|pw91"
    r"|mp2|ccsd|rpa|dft|xtb|d3|d4|vdw|optb\w+|vasp|qe|cp2k|orca|aims|psi4|castep)(?![a-z])"
)


@dataclass
class EnergySets:
    """What was found.

    Attributes:
        findings: at most one.
        offset: (m,) eV, to be taken off the energy of each frame to bring all onto the zero of the largest set.
    """

    findings: list[Finding] = field(default_factory=list)
    offset: Floats = field(default_factory=lambda: np.zeros(0))

    def aligned(self, frames: Sequence[Compared]) -> list[Compared]:
        """The frames with their energies on one zero."""
        return [
            f if f.energy is None or not shift else replace(f, energy=f.energy - float(shift))
            for f, shift in zip(frames, self.offset, strict=True)
        ]


def energy_sets(rows: Sequence[FrameRow], frames: Sequence[Compared]) -> EnergySets:
    """Look for sets of energies, by level of theory first, then by group, then by file.

    Args:
        rows: of the schema.
        frames: the same with the pretrained model's energies.
    """
    found = EnergySets(offset=np.zeros(len(rows)))
    members = np.array(
        [i for i, f in enumerate(frames) if f.energy is not None and (len(f.atoms) > 1 or f.atoms.pbc.any())],
        dtype=int,
    )
    if len(members) < 2 * MIN_SET:
        return found
    elements = sorted({int(z) for i in members for z in np.unique(frames[i].atoms.numbers)})
    shares = np.array([[np.mean(frames[i].atoms.numbers == z) for z in elements] for i in members])
    states = state_columns([frames[i].atoms for i in members])  # constants of charge states are no sets
    shares = np.concatenate([shares, states], axis=1)
    residual = np.array([energy_residual(frames[i]) for i in members])
    for column in ("theory", "group", "source"):
        names = np.array([str(rows[i].get(column) or "") for i in members])
        sets = [name for name in dict.fromkeys(names.tolist()) if (names == name).sum() >= MIN_SET]
        if len(sets) < 2:
            continue
        main = max(sets, key=lambda name: int((names == name).sum()))
        notes = []
        for name in (n for n in sets if n != main):
            named = column == "theory" and _key(column, rows[members[0]]) not in LOOSE
            strict = named or (_LEVEL.search(name) and _LEVEL.search(main))
            off = _offset(shares, residual, names == main, names == name, strict=bool(strict))
            if off is not None:
                here, shift, usual = off
                n_atoms = np.array([len(frames[i].atoms) for i in members[here]])
                found.offset[members[here]] = shift * n_atoms
                notes.append((name, float(np.median(shift)), usual))
        if notes:
            found.findings.append(_finding(column, main, notes, rows, members, names))
            break
    return found


def known_sets(rows: Sequence[FrameRow], frames: Sequence[Compared], by: str) -> EnergySets:
    """The sets that the recipe names (``data.reference_sets``), each with the constants of its own frames.

    Args:
        rows: of the schema.
        frames: the same with the pretrained model's energies.
        by: column that names the set of a frame.
    """
    found = EnergySets(offset=np.zeros(len(rows)))
    labelled = [i for i, f in enumerate(frames) if f.energy is not None]
    names = np.array([str(rows[i].get(by) or "") for i in labelled])
    elements = sorted({int(z) for i in labelled for z in np.unique(frames[i].atoms.numbers)})
    for name in dict.fromkeys(names.tolist()):
        members = [labelled[int(k)] for k in np.flatnonzero(names == name)]
        shares = np.array([[np.mean(frames[i].atoms.numbers == z) for z in elements] for i in members])
        energies, _ = _fit(shares, np.array([energy_residual(frames[i]) for i in members]))
        found.offset[members] = (shares @ energies) * [len(frames[i].atoms) for i in members]
    return found


def _offset(
    shares: Floats, residual: Floats, main: Any, other: Any, *, strict: bool
) -> tuple[Any, Floats, float] | None:
    """Places of the frames of ``other`` that are off, by how much, and the scatter within both, eV/atom.

    Args:
        shares: (m, elements) composition.
        residual: (m,) label minus model, eV/atom.
        main: (m,) frames of the largest set.
        other: (m,) frames of another one.
        strict: the smaller of the two limits counts.
    """
    energies, scatter = _fit(shares[main], residual[main])
    inverse = np.linalg.pinv(shares[main].T @ shares[main], rcond=1e-9, hermitian=True)
    values, vectors = np.linalg.eigh(shares[main].T @ shares[main])
    undetermined = vectors[:, values <= 1e-9 * values[-1]]
    outside = np.linalg.norm(shares @ undetermined, axis=1) > _OUTSIDE * np.linalg.norm(shares, axis=1)
    leverage = np.einsum("ij,jk,ik->i", shares, inverse, shares)
    here = np.flatnonzero(
        other & ~outside & (leverage <= 1.0)
    )  # beyond, the fit says less than one frame does
    if len(here) < MIN_SET:
        return None
    off = residual[here] - shares[here] @ energies
    own, own_scatter = _fit(shares[here], off)
    usual = max(scatter, own_scatter, _NOISE)
    limit, times = OFFSET[not strict], TIMES[not strict]
    size = float(np.median(np.abs(off)))
    return (here, shares[here] @ own, usual) if size > max(limit, times * usual) else None


def _fit(shares: Floats, residual: Floats) -> tuple[Floats, float]:
    """Energies per element of least norm, eV, and the robust scatter of what they leave over, eV/atom."""
    kept = np.ones(len(residual), dtype=bool)
    for _ in range(3):
        energies: Floats = np.linalg.lstsq(shares[kept], residual[kept], rcond=1e-6)[0].astype(np.float64)
        left = residual - shares @ energies
        kept = np.abs(left - np.median(left)) <= max(5.0 * spread(left), _NOISE)
    return energies, float(spread(left))


def _finding(
    column: str,
    main: str,
    notes: Sequence[tuple[str, float, float]],
    rows: Sequence[FrameRow],
    members: Any,
    names: Any,
) -> Finding:
    first = rows[members[int(np.flatnonzero(names == main)[0])]]
    named = next((n for n, _, _ in notes if n), main)
    key = _key(column, rows[members[int(np.flatnonzero(names == named)[0])]])
    shown = ", ".join(f"{name or 'without one'} {1e3 * off:+.0f}" for name, off, _ in notes[:5])
    usual = 1e3 * max(usual for _, _, usual in notes)
    message = (
        f"the energies fall into sets by {key}: {shown}{', ...' if len(notes) > 5 else ''} meV/atom from "
        f"{main or 'those without one'} (usual {usual:.0f})"
    )
    cause = "they are of several levels of theory or settings, which one set of references cannot bring together: "
    if column == "source":
        remedy = (
            f"{cause}train on one file; another one can take part with references of its own, "
            f"data.replay: {{source: FILE, labels: own}}"
        )
    else:
        other = next((n for n, _, _ in notes if n and n != main), "NAME")
        file = re.sub(r" \(.*\)$", "", str(first["source"]))
        by = "" if column == "theory" else f", by: {column}"
        remedy = (
            f"{cause}give each its own, data.reference_sets: {{default: {main or 'NAME'}{by}}}, where "
            f"default is the set that "
            f"predictions are to be of; or train on one of them, data: {{train: {file}@{main or 'NAME'}, "
            f"fields: {{split: "
            f"{key}}}}}, with another one as data.replay: {{source: {file}@{other}, labels: own}}"
        )
    return Finding("label", "warning", [], message, remedy)


def _key(column: str, row: FrameRow) -> str:
    """The name under which the column was found in the source."""
    if column == "source":
        return "file"
    match = re.search(rf"(?:^|[ ,]){column} <- ([^\s,]+)", str(row.get("mapping") or ""))
    return match[1] if match else column
