"""Reference energies: the constant per element by which labels and a pretrained model differ.

A DFT total energy contains arbitrary constants per atom (pseudopotentials, isolated-atom
energies) that a model trained elsewhere cannot know. Before training they are fitted to the
residual r = label - model of the training frames,

    min_c  sum_frames [ (r - sum_z n_z c_z) / n ]^2,        n_z atoms of element z, n in all,

per atom, as energies enter the likelihood. Where the training compositions do not determine c
(pure SiO2 has one composition and two elements: rank 1) the solution of least norm is taken:
it is the projection on the span of the compositions, computed by the singular value
decomposition inside ``numpy.linalg.lstsq``. Energies of compositions outside that span are then
undetermined, which :meth:`References.warn_outside_span` says.

One energy that is off by a hundred eV would move all references. Energies that are wrong beyond doubt, far outside
what composition explains in all the others, take no part in the fits (:func:`far_energies`); where there are none,
nothing changes.

Two other choices need the energies e_z that the pretrained model gives to isolated atoms.
:func:`refit_references` fits the atomic energies of the labels themselves,

    min_c  sum_frames [ (r + sum_z n_z e_z - sum_z n_z c_z) / n ]^2,        shift c_z - e_z,

which differs from the shift only where the compositions leave c open: there nothing of the
pretrained e_z stays. :func:`given_references` takes c_z from isolated-atom calculations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import ArrayLike, NDArray

from blip_ft.data.robust import robust_fit, spread
from blip_ft.errors import DataError

#: an energy is far if it is so many spreads and so many eV/atom from what composition explains ...
FAR_TIMES, FAR = 50.0, 2.0
#: ... of so many frames at least, and only if no larger share is
FAR_FRAMES, FAR_MOST = 5, 0.1
#: a composition is outside the span if this share of its direction is (of its norm)
_OUTSIDE = 1e-6


@dataclass(frozen=True)
class References:
    """A shift per element and how well it is determined.

    Attributes:
        shift: energy per atom of each element that was seen, eV, to be *added* to the model.
        rank: number of independent compositions.
        elements: atomic numbers that were seen, ascending.
        null_space: orthonormal combinations of elements that the frames do not determine, each
            as ``{element: coefficient}``; ``len(elements) - rank`` of them.
        rms_before: rms of the residual per atom, eV/atom.
        rms_after: the same after the shift.
        n_frames: frames with an energy that went into the fit.
        mode: ``shift``, ``refit``, ``given`` or ``isolated_atoms``.
        left_out: frames, of all that were given, whose energy is wrong beyond doubt: they took no part.
    """

    shift: dict[int, float]
    rank: int
    elements: tuple[int, ...]
    null_space: list[dict[int, float]]
    rms_before: float
    rms_after: float
    n_frames: int
    mode: str = "shift"
    left_out: tuple[int, ...] = ()

    def energy(self, numbers: ArrayLike) -> float:
        """Shift of a structure, eV; elements that were not seen add nothing."""
        return float(sum(self.shift.get(int(z), 0.0) for z in np.asarray(numbers).ravel()))

    def warn_outside_span(self, numbers: ArrayLike) -> str | None:
        """A warning if the shift of this composition is undetermined, else ``None``."""
        counts = _counts([np.asarray(numbers)], self.elements)[0]
        unseen = sorted({int(z) for z in np.asarray(numbers).ravel()} - set(self.elements))
        if unseen:
            names = ", ".join(chemical_symbols[z] for z in unseen)
            return f"the training energies have no {names}: its reference energy stays the pretrained one"
        null = np.array([[v[z] for z in self.elements] for v in self.null_space])
        if len(null) and np.linalg.norm(null @ counts) > _OUTSIDE * np.linalg.norm(counts):
            return (
                f"the composition {_formula(numbers)} is not a combination of the training "
                "compositions: its total energy may be off by a constant per atom"
            )
        return None

    def describe(self) -> str:
        """The fit in a few lines: shift, rank, null space, residual."""
        lines = [
            f"{_HEADS[self.mode].format(self.n_frames)}, rank {self.rank} of {len(self.elements)}: "
            + ", ".join(f"{chemical_symbols[z]} {e:+.4f} eV" for z, e in self.shift.items()),
            f"residual energy rms {1e3 * self.rms_before:.1f} -> {1e3 * self.rms_after:.1f} meV/atom",
        ]
        if self.left_out:
            lines.append(f"{len(self.left_out)} energies that are wrong beyond doubt took no part")
        lines += [
            "not determined by the training compositions: "
            + " ".join(f"{c:+.3f} {chemical_symbols[z]}" for z, c in v.items())
            for v in self.null_space
        ]
        return "\n".join(lines)


_HEADS = {
    "shift": "reference shift from {} frames",
    "refit": "atomic energies refitted on {} frames; shift",
    "given": "given energies of isolated atoms, compared on {} frames; shift",
    "isolated_atoms": "energies of isolated atoms in the data, compared on {} frames; shift",
}


def fit_references(numbers: Sequence[ArrayLike], residual: ArrayLike) -> References:
    """Fit the shift of least norm.

    Args:
        numbers: atomic numbers of each frame.
        residual: label - model of each frame, eV (total); NaN where there is no energy label.

    Raises:
        DataError: no frame has an energy, or a residual is infinite.
    """
    return _fit(*_labelled(numbers, residual), {}, "shift")


def far_energies(numbers: Sequence[ArrayLike], residual: ArrayLike, floor: float = FAR) -> NDArray[np.bool_]:
    """(F,) frames whose energy is wrong beyond doubt: nothing that composition explains comes near it.

    A robust regression on composition finds what is far (:data:`FAR_TIMES` spreads and ``floor``); the frame's
    composition has to be determined by the others, as the only frame with an element is never far.

    Args:
        numbers: atomic numbers of each frame.
        residual: label - model of each frame, eV (total), finite.
        floor: least distance, eV/atom.
    """
    zs = [np.asarray(z).ravel() for z in numbers]
    r = np.asarray(residual, dtype=np.float64).ravel()
    none = np.zeros(len(r), dtype=bool)
    if len(r) < FAR_FRAMES:
        return none
    elements = tuple(sorted({int(z) for z in np.concatenate(zs)}))
    counts = _counts(zs, elements)
    composition, per_atom = counts / counts.sum(axis=1)[:, None], r / counts.sum(axis=1)
    if np.ptp(per_atom) < floor:
        return none
    centred = composition - composition.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    design = u[:, s > 1e-8 * max(float(s.max(initial=0.0)), 1e-8)] * np.sqrt(len(r))
    fit = robust_fit(design, per_atom, ridge=1e-10)
    far = np.abs(fit.residual) > max(floor, FAR_TIMES * fit.scale)
    if not far.any() or far.sum() > max(1, FAR_MOST * len(r)):
        return none
    kept, within = composition[~far], np.linalg.pinv(composition[~far])
    own = np.linalg.norm(composition @ within @ kept - composition, axis=1) < 1e-6
    leverage = np.linalg.norm(composition @ within, axis=1)
    off = np.abs(per_atom - composition @ (within @ per_atom[~far]))
    usual = max(spread(per_atom[~far] - kept @ (within @ per_atom[~far])), 1e-3)
    found: NDArray[np.bool_] = far & own & (leverage < 1.0) & (off > max(floor, FAR_TIMES * usual))
    return found


def refit_references(
    numbers: Sequence[ArrayLike], residual: ArrayLike, isolated: Mapping[int, float]
) -> References:
    """Fit the atomic energies of the labels, of least norm, in place of the pretrained ones.

    Args:
        numbers: atomic numbers of each frame.
        residual: label - model of each frame, eV (total); NaN where there is no energy label.
        isolated: energy that the pretrained model gives to a lone atom of each element, eV.

    Raises:
        DataError: as for :func:`fit_references`.
    """
    return _fit(*_labelled(numbers, residual), isolated, "refit")


def given_references(
    numbers: Sequence[ArrayLike],
    residual: ArrayLike,
    isolated: Mapping[int, float],
    energies: Mapping[int, float],
    mode: str = "given",
) -> References:
    """The shift that gives lone atoms the energies ``energies``.

    Args:
        numbers: atomic numbers of each frame.
        residual: label - model of each frame, eV (total); NaN where there is no energy label.
        isolated: energy that the pretrained model gives to a lone atom of each element, eV.
        energies: energy of the isolated atom of each element at the level of the labels, eV.
        mode: where they come from, ``given`` or ``isolated_atoms``.

    Raises:
        DataError: as for :func:`fit_references`, or an element of the frames has no energy.
    """
    labelled, r, left_out = _labelled(numbers, residual)
    elements = tuple(sorted({int(z) for zs in labelled for z in zs}))
    missing = [chemical_symbols[z] for z in elements if z not in energies]
    if missing:
        raise DataError(
            f"no energy of the isolated atom of {', '.join(missing)}",
            field="data.reference_energies" if mode == "given" else "data.references",
            remedy="give it, or use data.references: shift",
        )
    shift = {z: energies[z] - isolated[z] for z in sorted(energies) if z in isolated}
    counts = _counts(labelled, elements)
    composition = counts / counts.sum(axis=1)[:, None]
    per_atom = r / counts.sum(axis=1)
    after = per_atom - composition @ np.array([shift[z] for z in elements])
    # nothing is fitted, so every composition of these elements is determined
    rms = _rms(per_atom), _rms(after)
    return References(shift, len(shift), tuple(shift), [], *rms, len(r), mode, left_out)


def _labelled(
    numbers: Sequence[ArrayLike], residual: ArrayLike
) -> tuple[list[NDArray[np.int64]], NDArray[np.float64], tuple[int, ...]]:
    """Numbers and residuals of the frames that have an energy, and those whose energy is left out."""
    r = np.asarray(residual, dtype=np.float64).ravel()
    if len(r) != len(numbers):
        raise ValueError(f"{len(numbers)} structures but {len(r)} residuals")
    if np.isinf(r).any():
        raise DataError(
            "a residual energy is infinite",
            frame=int(np.flatnonzero(np.isinf(r))[0]),
            field="energy",
            remedy="the pretrained model fails on this frame: remove it",
        )
    known: list[int] = np.flatnonzero(np.isfinite(r)).tolist()
    if not known:
        raise DataError(
            "no training frame has an energy, so reference energies cannot be fitted",
            field="energy",
            remedy="add energies, or set data.references to keep",
        )
    labelled = [np.asarray(numbers[i]).ravel() for i in known]
    far = far_energies(labelled, r[known])
    left_out = tuple(i for i, wrong in zip(known, far, strict=True) if wrong)
    return [z for z, wrong in zip(labelled, far, strict=True) if not wrong], r[known][~far], left_out


def _fit(
    labelled: list[NDArray[np.int64]],
    r: NDArray[np.float64],
    left_out: tuple[int, ...],
    base: Mapping[int, float],
    mode: str,
) -> References:
    """Least squares for shift + base, of least norm; the shift is what is returned."""
    elements = tuple(sorted({int(z) for zs in labelled for z in zs}))
    counts = _counts(labelled, elements)
    atoms = counts.sum(axis=1)
    composition = counts / atoms[:, None]
    own = np.array([base.get(z, 0.0) for z in elements])
    total, _, rank, _ = np.linalg.lstsq(composition, r / atoms + composition @ own, rcond=None)
    shift = total - own
    # The triangular factor has the same right singular vectors, and few rows for many frames.
    null = np.linalg.svd(np.linalg.qr(composition, mode="r"))[2][rank:]
    return References(
        shift={z: float(e) for z, e in zip(elements, shift, strict=True)},
        rank=int(rank),
        elements=elements,
        null_space=[{z: float(c) for z, c in zip(elements, v, strict=True)} for v in null],
        rms_before=_rms(r / atoms),
        rms_after=_rms(r / atoms - composition @ shift),
        n_frames=len(r),
        mode=mode,
        left_out=left_out,
    )


def _counts(numbers: Sequence[NDArray[np.int64]], elements: Sequence[int]) -> NDArray[np.float64]:
    """(frames, elements) atoms of each element."""
    return np.array([[np.count_nonzero(zs == z) for z in elements] for zs in numbers], dtype=np.float64)


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _formula(numbers: ArrayLike) -> str:
    zs, counts = np.unique(np.asarray(numbers), return_counts=True)
    return "".join(f"{chemical_symbols[z]}{n}" for z, n in zip(zs, counts, strict=True))
