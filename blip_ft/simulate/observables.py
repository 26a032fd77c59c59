"""What trajectories say about a material, and how sure: statistical error and model error told apart.

Every draw of the posterior is a model of its own and has a trajectory of its own. Of an observable, trajectory k has
the mean m_k; its error s_k, from the scatter of the means of B blocks (Flyvbjerg and Petersen 1989), is that of a
finite time. With V the variance of the m_k and W the mean of s_k^2, the one-way analysis of variance has

    value = mean of m_k,    statistical std = sqrt(W / K),    model std = c / A sqrt(max(0, V - W)),    (1)

A the width that the draws were taken at and c the calibrated scale of forces. The model std is resolved where V / W
is beyond the 95 % quantile of Fisher's F(K - 1, K (B - 1)): else a longer time would be needed to tell it from 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.data import chemical_symbols
from ase.io import iread
from ase.neighborlist import neighbor_list
from numpy.typing import NDArray
from scipy.stats import f as fisher

from blip_ft.errors import BlipError

Floats = NDArray[np.float64]

#: blocks of a trajectory
BLOCKS = 5
#: frames of a block, at least
LEAST = 4
#: reach and width of the bins of distribution functions, Å
REACH, BIN = 6.0, 0.05
#: frames of a trajectory that distribution functions are taken of, at most
FRAMES = 500
#: relative differences that are rounding
ROUNDING = 1e-12
#: atoms diffuse where their squared displacement, Å^2, is beyond what vibrations reach, and grows at this power of time
LEFT, POWER = 1.0, 0.8
#: level of the test of the model std
LEVEL = 0.95
#: share of a block that mean-square displacements reach, and where their straight line begins in it
LAGS, LINE = 0.5, 0.2


@dataclass(frozen=True)
class Estimate:
    """An observable of K trajectories; arrays of its shape, its unit.

    Attributes:
        value: mean over the trajectories.
        statistical_std: of that mean, from the finite time.
        model_std: over the posterior.
        resolved: whether the model std can be told from 0.
        each: (K, ...) of each trajectory.
        each_std: (K, ...) statistical std of each.
    """

    value: Floats
    statistical_std: Floats
    model_std: Floats
    resolved: NDArray[np.bool_]
    each: Floats
    each_std: Floats

    @property
    def total_std(self) -> Floats:
        """Both."""
        return np.hypot(self.statistical_std, self.model_std)

    def to_dict(self, unit: str, *, each: bool = True) -> dict[str, Any]:
        """JSON-serialisable form."""
        names = (
            "value",
            "statistical_std",
            "model_std",
            "total_std",
            "resolved",
            *(("each", "each_std") if each else ()),
        )
        return {"unit": unit} | {name: np.asarray(getattr(self, name)).tolist() for name in names}


def estimate(blocks: Floats, factor: float = 1.0) -> Estimate:
    """Equation (1).

    Args:
        blocks: (K, B, ...) means of an observable over the blocks of each trajectory; K and B at least 2.
        factor: c / A.
    """
    K, B = blocks.shape[:2]
    each = blocks.mean(axis=1)
    within = blocks.var(axis=1, ddof=1) / B
    # what is held fixed differs by rounding
    least = (ROUNDING * np.abs(each).max(axis=0)) ** 2
    within = np.where(within > least, within, 0.0)
    between, mean_within = each.var(axis=0, ddof=1), within.mean(axis=0)
    between = np.where(between > least, between, 0.0)
    limit = float(fisher.ppf(LEVEL, K - 1, K * (B - 1)))
    return Estimate(
        value=each.mean(axis=0),
        statistical_std=np.sqrt(mean_within / K),
        model_std=factor * np.sqrt(np.maximum(0.0, between - mean_within)),
        resolved=between > limit * mean_within,
        each=each,
        each_std=np.sqrt(within),
    )


@dataclass(frozen=True)
class Track:
    """A trajectory of T frames of n atoms.

    Attributes:
        frames: the structures.
        time: (T,) fs.
    """

    frames: list[Atoms]
    time: Floats

    @classmethod
    def read(cls, path: Path, discard: float) -> Track:
        """A trajectory of :func:`blip_ft.simulate.run.simulate`, without its beginning.

        Args:
            path: the file.
            discard: share of the frames that is left out at the beginning.

        Raises:
            BlipError: too few frames for blocks.
        """
        frames = [a for a in iread(path, index=":", format="extxyz") if isinstance(a, Atoms)]
        kept = frames[int(np.ceil(discard * len(frames))) :]
        if len(kept) < BLOCKS * LEAST:
            raise BlipError(
                f"{len(kept)} frames are too few for {BLOCKS} blocks of {LEAST}",
                file=path,
                remedy="more --steps (an earlier call goes on with --resume), or a smaller --every",
            )
        return cls(kept, np.array([a.info["time_fs"] for a in kept]))

    def blocks(self, series: Floats) -> Floats:
        """(B, ...) means over the blocks of a series (T, ...)."""
        size = len(series) // BLOCKS
        parts = series[len(series) - BLOCKS * size :].reshape(BLOCKS, size, *series.shape[1:])
        return np.asarray(parts.mean(axis=1))


def observables(tracks: Sequence[Track], factor: float = 1.0) -> dict[str, Any]:
    """Observables of K trajectories of one structure.

    Args:
        tracks: one for each draw.
        factor: c / A of equation (1).

    Returns:
        JSON-serialisable: ``density`` and ``cell`` of structures whose cell changes, ``rdf`` by pairs of elements of
        periodic ones, ``msd`` and ``diffusion`` by element.
    """
    first = tracks[0].frames[0]
    out: dict[str, Any] = {}
    if first.pbc.all() and any(np.ptp([a.cell.array for a in t.frames], axis=0).any() for t in tracks):
        out["density"] = _estimated(tracks, densities, factor).to_dict("g/cm^3")
        cell = _estimated(tracks, cells, factor)
        out["cell"] = cell.to_dict("Å, degrees") | {"names": ["a", "b", "c", "alpha", "beta", "gamma"]}
    if first.pbc.all():
        pairs = list(combinations_with_replacement(sorted(set(first.numbers.tolist())), 2))
        found = _estimated(tracks, lambda t: distributions(t, pairs), factor)
        radii = ((np.arange(round(REACH / BIN)) + 0.5) * BIN).tolist()
        out["rdf"] = {
            f"{chemical_symbols[a]}-{chemical_symbols[b]}": {"r": radii}
            | _part(found, i).to_dict("1", each=False)
            for i, (a, b) in enumerate(pairs)
        }
    elements = sorted(set(first.numbers.tolist()))
    moved = [[displacements(t, block, elements) for block in _block_slices(t)] for t in tracks]
    lags = moved[0][0][0]
    curves = estimate(np.array([[m for _, m in blocks] for blocks in moved]), factor)
    slopes = estimate(np.array([[_slopes(lags, m) for _, m in blocks] for blocks in moved]), factor)
    for i, z in enumerate(elements):
        symbol = chemical_symbols[z]
        out.setdefault("msd", {})[symbol] = {"lag_fs": lags.tolist()} | _part(curves, i).to_dict(
            "Å^2", each=False
        )
        tree = _part(slopes, i).to_dict("Å^2/ps")
        out.setdefault("diffusion", {})[symbol] = tree | {"diffusive": diffusive(lags, curves.value[i])}
    return out


def _estimated(tracks: Sequence[Track], series: Any, factor: float) -> Estimate:
    return estimate(np.array([t.blocks(series(t)) for t in tracks]), factor)


def _part(whole: Estimate, i: int) -> Estimate:
    """Number i of an estimate of several."""
    return Estimate(
        *(x[i] for x in (whole.value, whole.statistical_std, whole.model_std, whole.resolved)),
        *(x[:, i] for x in (whole.each, whole.each_std)),
    )


def densities(track: Track) -> Floats:
    """(T,) mass density, g/cm^3."""
    mass = track.frames[0].get_masses().sum() * units._amu * 1e3
    return np.array([mass / (a.get_volume() * 1e-24) for a in track.frames])


def cells(track: Track) -> Floats:
    """(T, 6) lengths, Å, and angles, degrees."""
    return np.array([a.cell.cellpar() for a in track.frames])


def distributions(track: Track, pairs: Sequence[tuple[int, int]]) -> Floats:
    """(T', pairs, bins) radial distribution function of pairs of elements, images included.

    Args:
        track: of :data:`FRAMES` frames at most, else evenly thinned; T' is their number.
        pairs: atomic numbers.
    """
    edges = np.arange(round(REACH / BIN) + 1) * BIN
    shells = 4 / 3 * np.pi * np.diff(edges**3)
    numbers = track.frames[0].numbers
    chosen = track.frames[:: max(1, -(-len(track.frames) // FRAMES))]
    out = np.zeros((len(chosen), len(pairs), len(shells)))
    for frame, atoms in enumerate(chosen):
        i, j, d = neighbor_list("ijd", atoms, REACH)
        for p, (a, b) in enumerate(pairs):
            counts, _ = np.histogram(d[(numbers[i] == a) & (numbers[j] == b)], edges)
            expected = (numbers == a).sum() * (numbers == b).sum() / atoms.get_volume() * shells
            out[frame, p] = counts / expected
    return out


def displacements(track: Track, block: slice, elements: Sequence[int]) -> tuple[Floats, Floats]:
    """Mean-square displacement against time, over all beginnings in a block, without motion of the whole.

    Args:
        track: atoms are not put back into the cell; where it changes, displacements are those in the mean cell.
        block: of frames.
        elements: atomic numbers.

    Returns:
        (L,) times, fs, from 0; (elements, L) Å^2.
    """
    frames = track.frames[block]
    numbers, masses = frames[0].numbers, frames[0].get_masses()
    if frames[0].cell.rank == 3:
        cell = np.mean([a.cell.array for a in frames], axis=0)
        places = np.array([a.cell.scaled_positions(a.positions) for a in frames]) @ cell
    else:
        places = np.array([a.positions for a in frames])
    places -= np.average(places, axis=1, weights=masses)[:, None]
    n_lags = max(2, int(LAGS * len(frames))) + 1
    out = np.zeros((len(elements), n_lags))
    for lag in range(1, n_lags):
        square = np.square(places[lag:] - places[:-lag]).sum(axis=2).mean(axis=0)
        out[:, lag] = [square[numbers == z].mean() for z in elements]
    time = track.time[block]
    return time[:n_lags] - time[0], out


def _block_slices(track: Track) -> list[slice]:
    size = len(track.frames) // BLOCKS
    first = len(track.frames) - BLOCKS * size
    return [slice(first + k * size, first + (k + 1) * size) for k in range(BLOCKS)]


def _slopes(lags: Floats, curves: Floats) -> Floats:
    """(elements,) diffusion constants, Å^2/ps: slope over six of a straight line (Einstein)."""
    late = lags >= LINE * lags[-1]
    return (
        np.polyfit(lags[late] / 1000, curves[:, late].T, 1)[0] / 6
        if late.sum() > 1
        else np.zeros(len(curves))
    )


def diffusive(lags: Floats, curve: Floats) -> bool:
    """Whether a mean-square displacement (L,), Å^2, is that of atoms that leave their places, not of vibrations."""
    late = (lags >= LINE * lags[-1]) & (curve > 0)
    if late.sum() < 2 or curve[-1] < LEFT:
        return False
    return bool(np.polyfit(np.log(lags[late]), np.log(curve[late]), 1)[0] > POWER)


def summary(found: Mapping[str, Any]) -> list[str]:
    """Lines for people: value, statistical and model error of the observables that are single numbers."""
    lines: list[str] = []

    def add(name: str, tree: Mapping[str, Any], unit: str, index: int | None = None) -> None:
        value, statistical, model, resolved = (tree[k] if index is None else tree[k][index] for k in _COLUMNS)
        if not tree.get("diffusive", True):
            lines.append(f"{name}: none yet, atoms move about their places")
        elif statistical > 0:  # else it is held fixed
            note = "" if resolved else " (not told from 0: run longer)"
            lines.append(
                f"{name} {value:.4g} {unit}, statistical ± {statistical:.2g}, model ± {model:.2g}{note}"
            )

    if "density" in found:
        add("density", found["density"], "g/cm³")
        for i, name in enumerate(found["cell"]["names"]):
            add(name, found["cell"], "Å" if i < 3 else "°", i)
    for symbol, tree in found["diffusion"].items():
        add(f"diffusion of {symbol}", tree, "Å²/ps")
    return lines


_COLUMNS = ("value", "statistical_std", "model_std", "resolved")
