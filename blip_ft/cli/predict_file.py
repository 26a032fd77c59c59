"""Predict every structure of a source into a file, in constant memory.

Input is whatever ``fit`` and ``evaluate`` read (:mod:`blip_ft.data.read.sources`), with or without labels. Output
is extended XYZ with

==========================  ==============================================================
ASE results                 ``energy`` eV, ``energies`` (n,) eV, ``forces`` (n, 3) eV/Å, ``stress``
                            (6,) eV/Å^3 (ASE sign and Voigt order; only for periodic structures)
``info``                    ``energy_std`` eV, ``stress_std`` (6,) eV/Å^3; ``std_sampling_error``
                            of the stds of forces and stress, relative; ``ood_score_max``
``arrays``                  ``energies_std`` (n,) eV; ``forces_std`` (n, 3) eV/Å, in the lab frame;
                            ``forces_std_norm`` (n,) eV/Å, invariant under rotation;
                            ``ood_score`` (n,), see ``uncertainty.ood``
==========================  ==============================================================

The stds are epistemic; the same names with ``_aleatoric`` are the scatter of the labels, in ``info`` as it is one number
for all components, with ``_total`` both; neither is written for what no calibration frame had a label of. Other info,
arrays and results of the input are kept; its own energies, forces and stress are replaced. Numbers have all their digits, and
what ASE cannot write so that it reads it again is written in another way (:mod:`blip_ft.data.write.extxyz`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from blip_ft.data.read.raw import RawFrame
from blip_ft.data.read.sources import iterate_frames
from blip_ft.data.write.extxyz import write_frame
from blip_ft.errors import DataError
from blip_ft.files import check_target, whole_file
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.uncertainty.predict import Method, predict_atoms

RESULTS = ("energy", "energies", "forces", "stress")
#: results of the input that belong to its own energy
_REPLACED = (*RESULTS, "free_energy", "stresses", "virial")
PER_STRUCTURE = (
    "energy_std",
    "energy_std_aleatoric",
    "energy_std_total",
    "forces_std_aleatoric",
    "stress_std",
    "stress_std_aleatoric",
    "stress_std_total",
    "std_sampling_error",
    "ood_score_max",
)
PER_ATOM = ("energies_std", "forces_std", "forces_std_norm", "forces_std_total", "ood_score")


def predict_file(
    potential: BayesianPotential,
    source: str | Path,
    target: str | Path,
    *,
    batch_size: int = 16,
    n_draws: int | None = None,
    method: Method = "draws",
    overwrite: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> int:
    """Predict the structures of ``source`` into ``target`` and return their number.

    Args:
        potential: the trained model.
        source: file, folder, pattern, set, each with a selector if wanted: see
            :mod:`blip_ft.data.read.sources`.
        target: the extended XYZ file to write (``.xyz`` or ``.extxyz``, optionally ``.gz``). It
            appears under this name only when it is complete.
        batch_size: structures per call of the model.
        n_draws: draws, or with ``method='linear'`` random directions; see ``uncertainty.predict.predict_batch``.
        method: how error bars are made, likewise.
        overwrite: replace an existing ``target``.
        progress: called with the number of structures done after each batch.

    Raises:
        DataError: the source is missing, empty or damaged, or holds a structure that the model
            cannot describe.
        BlipError: the target exists or cannot be written.

        Nothing is left behind then.
    """
    path = check_target(target, overwrite=overwrite)
    if not path.name.removesuffix(".gz").endswith((".xyz", ".extxyz")):
        raise DataError(
            "predictions are written as extended XYZ",
            file=path,
            remedy="call the output .extxyz or .extxyz.gz",
        )
    structures = iterate_frames(str(source))
    done = 0
    with whole_file(path, overwrite=overwrite) as file:
        while chunk := list(islice(structures, batch_size)):
            given = [structure(raw) for raw in chunk]
            for raw, atoms in zip(chunk, given, strict=True):
                potential.backbone.check(atoms, file=raw.source, frame=raw.frame)
            predictions = predict_atoms(
                potential, given, batch_size=batch_size, n_draws=n_draws, method=method
            )
            for atoms, prediction in zip(given, predictions, strict=True):
                write_frame(file, annotate(atoms, prediction))
            done += len(given)
            if progress is not None:
                progress(done)
    return done


def structure(raw: RawFrame) -> Atoms:
    """The structure of a frame with whatever else it has: columns of a table become info and arrays."""
    if raw.atoms is not None:
        return raw.atoms
    atoms = Atoms(numbers=raw.numbers, positions=raw.positions, cell=raw.cell, pbc=raw.pbc)
    for name, value in raw.values.items():
        array = np.asarray(value) if isinstance(value, list | np.ndarray) and _is_even(value) else None
        if array is not None and _per_atom(array, len(atoms)) and name not in atoms.arrays:
            atoms.new_array(name, array)
        elif value is not None:
            atoms.info[name] = value
    return atoms


def _per_atom(array: np.ndarray, n: int) -> bool:
    return array.ndim in (1, 2) and len(array) == n and array.dtype.kind in "biufU"


def annotate(atoms: Atoms, prediction: Mapping[str, Any]) -> Atoms:
    """A copy of ``atoms`` that carries a prediction of :func:`predict_atoms`; see the module's table."""
    out = atoms.copy()
    _forget(out.info, RESULTS + PER_STRUCTURE)
    _forget(out.arrays, RESULTS + PER_ATOM)
    results = {key: prediction[key] for key in RESULTS if prediction.get(key) is not None}
    own = {} if atoms.calc is None else dict(atoms.calc.results)
    _forget(own, _REPLACED + PER_STRUCTURE + PER_ATOM)
    out.calc = SinglePointCalculator(out, **results)
    out.calc.results |= own
    out.info.update({k: prediction[k] for k in PER_STRUCTURE if prediction.get(k) is not None})
    for key in PER_ATOM:
        if prediction.get(key) is not None:
            out.new_array(key, prediction[key])
    return cast("Atoms", out)


def _is_even(value: Any) -> bool:
    try:
        np.asarray(value)
    except ValueError:  # rows of different lengths
        return False
    return True


def _forget(mapping: dict[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        mapping.pop(key, None)
