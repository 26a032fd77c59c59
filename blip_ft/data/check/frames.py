"""What single frames look like beside the others: outliers, net forces, lone atoms, near copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from ase import Atoms
from numpy.typing import NDArray
from scipy.spatial import KDTree

from blip_ft.backbones import electrons
from blip_ft.data.findings import Finding, place
from blip_ft.data.frame import FrameRow, to_atoms
from blip_ft.data.neighbours import pairs_within
from blip_ft.data.robust import robust_z
from blip_ft.data.split.duplicates import first_same

#: robust z-scores beyond which an energy and the logarithm of the largest force are remarkable;
#: far beyond what melts, surfaces and strained cells of one set reach (docs/data.md)
ENERGY_Z, FORCE_Z = 10.0, 7.0
#: spread of the energy that is as good as none, eV/atom, and of log10 of the largest force
_ENERGY_FLOOR, _FORCE_FLOOR = 2e-3, 0.05
#: fewer frames have no usual values
_MIN_FRAMES = 10
#: net force over the norm of all forces, and per atom (eV/Å), beyond which it is remarkable
NET_SHARE, NET_FORCE = 0.1, 0.02
#: share of the frames beyond which a net force is a property of the set
_SYSTEMATIC = 0.2
#: labels of one structure that differ by more are of two calculations: eV/atom, eV/Å
_SAME_ENERGY, _SAME_FORCES = 2e-3, 2e-2
#: two structures are nearly the same if distances and cell agree within this, Å
NEAR = 0.01
#: neighbours per atom that are compared, and how far they are looked for, Å
_SHELL, _REACH = 12, 5.0
#: frames that near copies are looked for in; more are sampled evenly
MAX_NEAR = 5000


def outliers(rows: Sequence[FrameRow]) -> list[Finding]:
    """Frames whose energy per atom or largest force is far from that of the others.

    Energies are compared among frames of one composition, charge and spin, forces among all.
    """
    findings = []
    kinds: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row["energy"] is not None:
            counts = np.bincount(row["numbers"])
            state = electrons.state(row.get("charge"), row.get("spin"))
            kinds[(*(counts / np.gcd.reduce(counts)).astype(int), state)].append(i)
    far: dict[int, str] = {}
    for members in kinds.values():
        if len(members) >= _MIN_FRAMES:
            energies = np.array([rows[i]["energy"] / len(rows[i]["numbers"]) for i in members])
            scores = robust_z(energies, _ENERGY_FLOOR)
            for i, e, z in zip(members, energies, scores, strict=True):
                if abs(z) > ENERGY_Z:
                    far[i] = f"{e:.3f} eV/atom, z {z:+.0f}"
    findings += _far("energy per atom", rows, far)
    forces = [i for i, row in enumerate(rows) if row["forces"] is not None]
    if len(forces) >= _MIN_FRAMES:
        largest = np.array([np.linalg.norm(rows[i]["forces"], axis=1).max() for i in forces])
        scores = robust_z(np.log10(np.maximum(largest, 1e-2)), _FORCE_FLOOR)
        found = [(i, f, z) for i, f, z in zip(forces, largest, scores, strict=True) if z > FORCE_Z]
        findings += _far("largest force", rows, {i: f"{f:.1f} eV/Å, z {z:+.0f}" for i, f, z in found})
    return findings


_OUTLIER = (
    "another kind of structure than the others, other settings, or a calculation that did not converge: look "
    "which; remove the frames that are wrong"
)


def _far(what: str, rows: Sequence[FrameRow], far: Mapping[int, str]) -> list[Finding]:
    if not far:
        return []
    message = f"the {what} of {len(far)} frames is far from that of the others"
    notes = [place(rows[i], text) for i, text in sorted(far.items())]
    return [Finding("outlier", "warning", notes, message, _OUTLIER)]


def net_forces(role: str, rows: Sequence[FrameRow]) -> list[Finding]:
    """Frames whose forces do not sum to zero, as those of an isolated or periodic system must."""
    found = []
    labelled = 0
    for row in rows:
        if row["forces"] is None or len(row["numbers"]) < 2:
            continue
        labelled += 1
        forces = np.asarray(row["forces"])
        net, norm = float(np.linalg.norm(forces.sum(axis=0))), float(np.linalg.norm(forces))
        if net > NET_SHARE * norm and net > NET_FORCE * len(forces):
            found.append(place(row, f"{net:.2f} eV/Å"))
    if not found:
        return []
    remedy = "forces of an external field or of fixed atoms, or truncated tables? the model cannot learn them"
    if len(found) > _SYSTEMATIC * labelled and labelled >= _MIN_FRAMES:
        message = f"{role}: the forces of {len(found)} of {labelled} frames do not sum to zero"
        return [Finding("label", "warning", [], message, remedy)]
    message = f"{role}: the forces of {len(found)} frames do not sum to zero"
    return [Finding("label", "warning", found, message, remedy)]


def lone_atoms(
    role: str, rows: Sequence[FrameRow], structures: Sequence[Atoms], cutoff: float
) -> list[Finding]:
    """Frames with an atom that no other is near, where the model sees nothing."""
    found = []
    for row, atoms in zip(rows, structures, strict=True):
        if len(atoms) > 1:
            n = np.bincount(pairs_within(atoms, cutoff)[0], minlength=len(atoms))
            if (n == 0).any():
                k = int(np.flatnonzero(n == 0)[0])
                found.append(place(row, f"{atoms.symbols[k]}{k}"))
    if not found:
        return []
    message = f"{role}: in {len(found)} frames an atom has no neighbour within {cutoff:g} Å"
    return [
        Finding(
            "geometry",
            "info",
            found,
            message,
            "the model gives it no force; an atom that has left, a dummy atom, or a wrong unit of length?",
        )
    ]


def contradict(row: FrameRow, other: FrameRow) -> bool:
    """True if two frames of one structure have different labels."""
    n = len(row["numbers"])
    energies = [r["energy"] for r in (row, other) if r["energy"] is not None]
    if np.ptp(energies or [0.0]) > _SAME_ENERGY * n:
        return True
    if row["forces"] is None or other["forces"] is None:
        return False
    if not np.allclose(row["positions"], other["positions"], rtol=0.0, atol=1e-5):
        return False  # another order of the atoms or other images: forces cannot be compared as they are
    return float(np.abs(np.subtract(row["forces"], other["forces"])).max()) > _SAME_FORCES


# ---- near copies -------------------------------------------------------------------------------


def near_duplicates(roles: Mapping[str, datasets.Dataset]) -> list[Finding]:
    """Frames of one composition whose cells and sorted distances agree within :data:`NEAR`.

    Exact copies are somebody else's finding. Mirror images count as copies: their labels are the
    same up to that reflection.
    """
    rows = [(role, row) for role, frames in roles.items() for row in _sample(frames, MAX_NEAR // len(roles))]
    structures = [to_atoms(row, labels=False) for _, row in rows]
    first = first_same(structures)
    kinds: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, atoms in enumerate(structures):
        if first[i] == i and (len(atoms) > 1 or atoms.pbc.any()):
            kinds[(tuple(np.sort(atoms.numbers)), tuple(atoms.pbc), electrons.state_of(atoms.info))].append(i)
    pairs: list[tuple[int, int]] = []
    for members in kinds.values():
        if len(members) > 1:
            shapes = np.array([_shape(structures[i]) for i in members])
            close = KDTree(shapes).query_pairs(NEAR, p=np.inf, output_type="ndarray")
            pairs += [(members[int(a)], members[int(b)]) for a, b in close]
    inside: dict[str, dict[int, str]] = defaultdict(dict)
    across: dict[str, dict[int, str]] = defaultdict(dict)
    for i, j in sorted(tuple(sorted(p)) for p in pairs):
        (role, row), (other, twin) = rows[i], rows[j]
        same = role.partition("/")[0] == other.partition("/")[0]
        (inside if same else across)[other].setdefault(j, place(twin, f"{role}, frame {row['frame']}"))
    findings = []
    for role, near in across.items():
        message = f"{role}: {len(near)} frames are nearly those of another role (distances within {NEAR} Å)"
        remedy = "errors there look better than they are: divide by group, or by blocks of time"
        findings.append(Finding("leak", "warning", list(near.values()), message, remedy))
    for role, near in inside.items():
        message = f"{role}: {len(near)} frames are nearly copies of another one (distances within {NEAR} Å)"
        remedy = "they add cost and little else; remove them if not meant"
        findings.append(Finding("duplicate", "info", list(near.values()), message, remedy))
    return findings


def _sample(frames: datasets.Dataset, most: int) -> datasets.Dataset:
    if len(frames) <= most:
        return frames
    return frames.select(np.linspace(0, len(frames) - 1, most).round().astype(int))


def _shape(atoms: Atoms) -> NDArray[np.float64]:
    """Invariants of a structure, Å: cell, and the distances of every atom's nearest neighbours.

    Neighbours are sorted by distance, atoms of one element by each of these distances, so that
    the order of the atoms does not matter. Continuous: what leaves the reach is replaced by it.
    """
    i, _, distance, _ = pairs_within(atoms, _REACH)
    shells = np.full((len(atoms), _SHELL), _REACH)
    order = np.lexsort((distance, i))
    i, distance = i[order], distance[order]
    rank = np.arange(len(i)) - np.searchsorted(i, i)
    keep = rank < _SHELL
    shells[i[keep], rank[keep]] = distance[keep]
    parts = [np.sort(shells[atoms.numbers == z], axis=0).ravel() for z in np.unique(atoms.numbers)]
    lattice = atoms.cell.array[atoms.pbc]
    metric = lattice @ lattice.T
    lengths = np.sqrt(np.diag(metric)) if len(lattice) else np.zeros(0)
    diagonals = [np.linalg.norm(lattice[a] + lattice[b]) for a in range(len(lattice)) for b in range(a)]
    return np.concatenate([np.sort(lengths), np.sort(np.array(diagonals, dtype=float)), *parts])
