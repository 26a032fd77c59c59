"""The predictions of a model on one set of frames, as plain arrays.

Everything downstream of the model (calibration, metrics, report) works on
:class:`SetPrediction`, whatever made it: the pretrained model, plain fine-tuning, or the mean
and spread of posterior draws.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import ArrayLike, NDArray

from blip_ft.errors import CheckpointError
from blip_ft.uncertainty.outputs import BY_NAME, Output

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

#: what reading a file of another kind raises (no such array, wrong type, wrong shape)
_FOREIGN = (ValueError, KeyError, TypeError, AttributeError)
#: fields that are no outputs of a model
_OWN = ("name", "n_atoms", "numbers", "frames")
_OPTIONAL = ("energy_std", "forces_std", "stress_std", "forces_std_norm", "ood_score")


@dataclass
class SetPrediction:
    """Predictions, epistemic stds and labels of F frames with n atoms in all of them.

    ====================  ===========  ======================================================
    field                 shape        unit, meaning
    ====================  ===========  ======================================================
    ``n_atoms``           (F,)         atoms per frame; sums to n
    ``numbers``           (n,)         atomic numbers, frame after frame
    ``frames``            F            where each frame came from, ``file#frame``
    ``energy``            (F,)         eV, total energy, mean prediction
    ``forces``            (n, 3)       eV/Å, mean prediction
    ``stress``            (F, 6)       eV/Å^3, Voigt, mean prediction; NaN where not periodic
    ``energy_label``      (F,)         eV; NaN where missing
    ``forces_label``      (n, 3)       eV/Å; NaN where missing
    ``stress_label``      (F, 6)       eV/Å^3; NaN where missing
    ``energy_std``        (F,)         eV, **epistemic** std of the total energy
    ``forces_std``        (n, 3)       eV/Å, epistemic std of each component (lab frame)
    ``stress_std``        (F, 6)       eV/Å^3, epistemic std of each component
    ``forces_std_norm``   (n,)         eV/Å, sqrt(trace) of the force covariance of an atom,
                                       invariant under rotation; filled in from ``forces_std``
    ``ood_score``         (n,)         out-of-distribution score of every atom (``uncertainty.ood``)
    ====================  ===========  ======================================================

    The stds are those of the posterior as it is, before calibration, and ``None`` for a model
    without a posterior; so is the score of a model without one.

    Raises:
        ValueError: shapes do not fit together.
    """

    name: str
    n_atoms: IntArray
    numbers: IntArray
    frames: list[str]
    energy: FloatArray
    forces: FloatArray
    stress: FloatArray
    energy_label: FloatArray
    forces_label: FloatArray
    stress_label: FloatArray
    energy_std: FloatArray | None = None
    forces_std: FloatArray | None = None
    stress_std: FloatArray | None = None
    forces_std_norm: FloatArray | None = None
    ood_score: FloatArray | None = None

    def __post_init__(self) -> None:
        self.n_atoms = np.asarray(self.n_atoms, dtype=np.int64)
        self.numbers = np.asarray(self.numbers, dtype=np.int64)
        self.frames = [str(f) for f in self.frames]
        F, n = self.n_atoms.size, int(self.n_atoms.sum())
        shapes: dict[str, tuple[int, ...]] = {"n_atoms": (F,), "numbers": (n,)}
        shapes |= {key: _output(key).size(F, n) for key in self.__dataclass_fields__ if key not in _OWN}
        if self.forces_std_norm is None and self.forces_std is not None:
            self.forces_std_norm = np.sqrt((np.asarray(self.forces_std, dtype=np.float64) ** 2).sum(axis=1))
        for key, shape in shapes.items():
            value = getattr(self, key)
            if value is None and key in _OPTIONAL:
                continue
            array = value if key in ("n_atoms", "numbers") else np.asarray(value, dtype=np.float64)
            if array.shape != shape:
                raise ValueError(f"set '{self.name}': {key} has shape {array.shape}, expected {shape}")
            setattr(self, key, array)
        if len(self.frames) != F:
            raise ValueError(f"set '{self.name}': {len(self.frames)} frame names for {F} frames")

    # ---- sizes and derived quantities ----------------------------------------------------
    @property
    def n_structures(self) -> int:
        """Number of frames F."""
        return int(self.n_atoms.size)

    @property
    def structure(self) -> IntArray:
        """(n,) frame that each atom belongs to."""
        return np.repeat(np.arange(self.n_structures), self.n_atoms)

    @property
    def energy_error(self) -> FloatArray:
        """(F,) label minus prediction per atom, eV/atom; NaN without a label."""
        return (self.energy_label - self.energy) / self.n_atoms

    @property
    def forces_error(self) -> FloatArray:
        """(n, 3) label minus prediction, eV/Å; NaN without a label."""
        return self.forces_label - self.forces

    @property
    def stress_error(self) -> FloatArray:
        """(F, 6) label minus prediction, eV/Å^3; NaN without a label or a prediction."""
        return self.stress_label - self.stress

    def mean_over_atoms(self, values: ArrayLike) -> FloatArray:
        """(F,) mean of per-atom ``values`` (n,) in each frame.

        Atoms with NaN are left out; NaN for a frame where none is left.
        """
        v = np.asarray(values, dtype=np.float64)
        known = np.isfinite(v)
        owner = self.structure
        total = np.bincount(owner[known], weights=v[known], minlength=self.n_structures)
        count = np.bincount(owner[known], minlength=self.n_structures)
        mean = np.full(self.n_structures, np.nan)
        np.divide(total, count, out=mean, where=count > 0)
        return mean

    def max_over_atoms(self, values: ArrayLike) -> FloatArray:
        """(F,) largest of per-atom ``values`` (n,) in each frame; -inf for a frame without atoms."""
        out = np.full(self.n_structures, -np.inf)
        np.maximum.at(out, self.structure, np.asarray(values, dtype=np.float64))
        return out

    # ---- parts and unions ----------------------------------------------------------------
    def select(self, frames: ArrayLike) -> SetPrediction:
        """The frames with these indices, in this order; indices may repeat (bootstrap)."""
        index = np.asarray(frames, dtype=np.int64).reshape(-1)
        starts = np.concatenate([[0], np.cumsum(self.n_atoms)[:-1]]).astype(np.int64)
        blocks = [np.arange(starts[i], starts[i] + self.n_atoms[i]) for i in index]
        atoms = np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.int64)
        parts: dict[str, object] = {"name": self.name, "frames": [self.frames[i] for i in index]}
        for f in fields(self):
            if f.name not in parts:
                value = getattr(self, f.name)
                per_atom = f.name == "numbers" or (f.name not in _OWN and _output(f.name).per == "atom")
                rows = atoms if per_atom else index
                parts[f.name] = None if value is None else value[rows]
        return SetPrediction(**parts)  # type: ignore[arg-type]

    @classmethod
    def concatenate(cls, parts: Sequence[SetPrediction], name: str) -> SetPrediction:
        """One set out of several.

        Raises:
            ValueError: no parts, or a std that some parts have and others lack.
        """
        if not parts:
            raise ValueError(f"set '{name}': nothing to concatenate")
        joined: dict[str, object] = {"name": name, "frames": [f for p in parts for f in p.frames]}
        for f in fields(cls):
            if f.name in joined:
                continue
            values = [getattr(p, f.name) for p in parts]
            missing = [v is None for v in values]
            if any(missing) and not all(missing):
                raise ValueError(f"set '{name}': {f.name} is missing in some parts only")
            joined[f.name] = None if all(missing) else np.concatenate(values)
        return cls(**joined)  # type: ignore[arg-type]

    # ---- files ---------------------------------------------------------------------------
    def save(self, path: str | Path) -> None:
        """Write an ``.npz`` file without pickles; the name appears only once it is complete."""
        path = Path(path)
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        arrays["name"], arrays["frames"] = np.array(self.name), np.array(self.frames, dtype=np.str_)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.savez_compressed(file, **{k: v for k, v in arrays.items() if v is not None})
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> SetPrediction:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: missing, damaged or foreign file.
        """
        remedy = "make the predictions again with 'blip-finetune evaluate'"
        try:
            with np.load(path, allow_pickle=False) as file:
                data: dict[str, object] = {key: file[key] for key in file.files}
            data["name"] = str(data["name"])
            data["frames"] = [str(f) for f in np.asarray(data["frames"])]
            return cls(**data)  # type: ignore[arg-type]
        except FileNotFoundError as error:
            raise CheckpointError("no such file", file=path, remedy=remedy) from error
        except (OSError, BadZipFile, zlib.error, EOFError, *_FOREIGN) as error:
            raise CheckpointError(
                f"not a file of predictions, or damaged ({error})", file=path, remedy=remedy
            ) from error


def _output(field: str) -> Output:
    """What a field holds; a label is shaped like its property."""
    return BY_NAME[field.removesuffix("_label")]
