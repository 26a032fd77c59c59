"""Predict every structure of one file into another, in constant memory.

Input is anything that ASE reads, with or without labels. Output is extended XYZ with

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
for all components, with ``_total`` both; neither is written for what no calibration frame had a label of. Other info and
arrays of the input are kept; its own energies, forces and stress are replaced. ASE writes values per
atom with eight decimals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import iread, write

from blip_ft.errors import DataError
from blip_ft.files import check_target, whole_file
from blip_ft.potential import BayesianPotential
from blip_ft.uncertainty.predict import Method, predict_atoms

RESULTS = ("energy", "energies", "forces", "stress")
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
        source: a file that ASE reads, gzip included.
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
    structures = read_structures(source)
    done = 0
    with whole_file(path, overwrite=overwrite) as file:
        while chunk := list(islice(structures, batch_size)):
            for frame, atoms in enumerate(chunk, start=done):
                _check_geometry(atoms, source, frame)
                potential.backbone.check(atoms, file=str(source), frame=frame)
            predictions = predict_atoms(
                potential, chunk, batch_size=batch_size, n_draws=n_draws, method=method
            )
            for atoms, prediction in zip(chunk, predictions, strict=True):
                write(file, annotate(atoms, prediction), format="extxyz")
            done += len(chunk)
            if progress is not None:
                progress(done)
        if done == 0:
            raise DataError("no structures in this file", file=source, remedy="check the path")
    return done


def read_structures(source: str | Path) -> Iterator[Atoms]:
    """Structures of a file, one after the other; labels are not needed.

    Raises:
        DataError: missing or damaged file, with the frame that could not be read.
    """
    path = Path(source)
    if not path.is_file():
        raise DataError("there is no such file", file=source, remedy="check the path")
    frames: Iterator[Atoms] = iread(str(path), index=":", do_not_split_by_at_sign=True)
    frame = 0
    while True:
        try:
            atoms = next(frames)
        except StopIteration:
            return
        except Exception as error:  # readers of ASE raise anything on a damaged file
            raise DataError(
                f"ASE cannot read this structure: {type(error).__name__}: {error}",
                file=source,
                frame=frame,
                remedy="mend or remove the frame, or convert the file to extended XYZ",
            ) from error
        yield atoms
        frame += 1


def annotate(atoms: Atoms, prediction: Mapping[str, Any]) -> Atoms:
    """A copy of ``atoms`` that carries a prediction of :func:`predict_atoms`; see the module's table."""
    out = atoms.copy()
    _forget(out.info, RESULTS + PER_STRUCTURE)
    _forget(out.arrays, RESULTS + PER_ATOM)
    results = {key: prediction[key] for key in RESULTS if prediction.get(key) is not None}
    out.calc = SinglePointCalculator(out, **results)
    out.info.update({k: prediction[k] for k in PER_STRUCTURE if prediction.get(k) is not None})
    for key in PER_ATOM:
        if prediction.get(key) is not None:
            out.new_array(key, prediction[key])
    return cast("Atoms", out)


def _check_geometry(atoms: Atoms, source: str | Path, frame: int) -> None:
    problem = ""
    if len(atoms) == 0:
        problem = "a structure without atoms"
    elif not np.isfinite(atoms.positions).all() or not np.isfinite(atoms.cell.array).all():
        problem = "a position or a box vector is not a number"
    elif atoms.pbc.all() and atoms.cell.rank < 3:
        problem = "periodic in all directions, but its cell has no volume"
    if problem:
        raise DataError(problem, file=source, frame=frame, remedy="mend or remove the frame")


def _forget(mapping: dict[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        mapping.pop(key, None)
