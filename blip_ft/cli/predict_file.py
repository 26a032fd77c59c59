"""Predict every structure of a source into a file, in constant memory.

Input is whatever ``fit`` and ``evaluate`` read (:mod:`blip_ft.data.read.sources`), with or without labels. Output
is extended XYZ: energy, forces and stress as ASE's results, everything else of the table in
:mod:`blip_ft.uncertainty.outputs` in ``info`` (per structure) and ``arrays`` (per atom).

Aleatoric and total stds are not written for what no calibration frame had a label of. Other info,
arrays and results of the input are kept; its own energies, forces and stress are replaced. Numbers have all
their digits, and what ASE cannot write so that it reads it again is written in another way
(:mod:`blip_ft.data.write.extxyz`).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from blip_ft.cli.kept_batches import keep_batches
from blip_ft.data.batch.frame_count import count_frames
from blip_ft.data.read.plan import plan
from blip_ft.data.read.raw import RawFrame, check_geometry
from blip_ft.data.read.sources import unchecked_frames
from blip_ft.data.read.structure import structure
from blip_ft.data.write.extxyz import write_frame
from blip_ft.errors import DataError
from blip_ft.files import check_target
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.fingerprint import fingerprint
from blip_ft.uncertainty import batch_limits
from blip_ft.uncertainty.outputs import IN_ARRAYS, IN_INFO, STANDARD
from blip_ft.uncertainty.predict import Method, predict_atoms

#: results of the input that belong to its own energy
_REPLACED = (*STANDARD, "free_energy", "stresses", "virial")


@dataclass(frozen=True)
class Outcome:
    """What :func:`predict_file` has done.

    Attributes:
        written: structures in the output.
        left_out: place and reason of each that could not be predicted.
        kept: structures that an earlier call had done, of those that were read.
    """

    written: int
    left_out: tuple[tuple[str, str], ...] = ()
    kept: int = 0


class Say(Protocol):
    """Told after each batch how far a prediction is."""

    def __call__(self, done: int, total: int | None, kept: int) -> object:
        """Frames that are dealt with, of how many (``None`` if that is not known), and those of an earlier call."""


def predict_file(
    potential: BayesianPotential,
    source: str | Path,
    target: str | Path,
    *,
    batch_size: int = batch_limits.STRUCTURES,
    batch_atoms: int | None = None,
    n_draws: int | None = None,
    method: Method = "draws",
    overwrite: bool = False,
    resume: bool = False,
    skip_bad: bool = False,
    progress: Say | None = None,
) -> Outcome:
    """Predict the structures of ``source`` into ``target``.

    Args:
        potential: the trained model.
        source: file, folder, pattern, set, each with a selector if wanted: see
            :mod:`blip_ft.data.read.sources`.
        target: the extended XYZ file to write (``.xyz`` or ``.extxyz``, optionally ``.gz``). It
            appears under this name only when it is complete.
        batch_size: structures per call of the model.
        batch_atoms: atoms per call of more than one structure; by default what the device is good for
            (``uncertainty.batch_limits``).
        n_draws: draws, or with ``method='linear'`` random directions; see ``uncertainty.predict.predict_batch``.
        method: how error bars are made, likewise.
        overwrite: replace an existing ``target``, and what an earlier call has left.
        resume: go on from the finished batches of an earlier call. The file is then byte for byte that of a call
            that was never interrupted.
        skip_bad: leave out frames that cannot be predicted, instead of stopping at the first one.
        progress: called after each batch.

    Raises:
        DataError: the source is missing, empty or damaged, or holds a structure that the model
            cannot describe.
        BlipError: the target exists or cannot be written; an earlier call has left batches (``kept_batches``).

        Finished batches are kept then (:mod:`blip_ft.cli.kept_batches`); where there are none, nothing is left behind.
    """
    path = check_target(target, overwrite=overwrite)
    if not path.name.removesuffix(".gz").endswith((".xyz", ".extxyz")):
        raise DataError(
            "predictions are written as extended XYZ",
            file=path,
            remedy="call the output .extxyz or .extxyz.gz",
        )
    readings = plan(str(source), labels=False)
    limit = batch_limits.default_atoms(potential.backbone.device) if batch_atoms is None else batch_atoms
    header = {
        "model": fingerprint(potential),
        "input": hashlib.sha256(repr([(r.digest, r.selector) for r in readings]).encode()).hexdigest(),
        "method": method,
        "number of draws": n_draws,
        "device": potential.backbone.device.type,
        "batch_size": batch_size,
        "batch_atoms": batch_atoms,
    }
    with keep_batches(path, header, resume=resume, overwrite=overwrite) as kept:
        limit = kept.header["batch_atoms"] = kept.header["batch_atoms"] or limit
        frames = chain.from_iterable(unchecked_frames(r, broken=skip_bad) for r in readings)
        total = count_frames(readings) if progress is not None else None
        done = before = kept.progress.read
        if progress is not None and before:
            progress(before, total, before)
        seen = (_Frame.of(raw, potential) for raw in islice(frames, before, None))
        for batch in batch_limits.bounded(seen, _Frame.size, structures=batch_size, atoms=limit):
            if not skip_bad:
                for frame in batch:
                    if frame.error is not None:
                        raise frame.error
            text, bad = _predicted(potential, batch, n_draws, method, skip_bad=skip_bad)
            kept.append(text, len(batch), bad)
            done += len(batch)
            if progress is not None:
                progress(done, total, before)
        if not kept.progress.written:
            place, reason = kept.progress.left_out[0]
            kept.discard()
            raise DataError(f"no frame can be predicted, the first because {reason}", file=place)
        kept.finish(overwrite=overwrite)
        return Outcome(kept.progress.written, tuple(kept.progress.left_out), before)


@dataclass(frozen=True)
class _Frame:
    """A frame of the input with its graph, or the reason why it cannot be predicted."""

    place: str
    atoms: Atoms | None = None
    graph: Any = None
    error: DataError | None = None

    @classmethod
    def of(cls, raw: RawFrame, potential: BayesianPotential) -> _Frame:
        """The frame that a reader has found."""
        place = f"{raw.source}, frame {raw.frame}"
        try:
            check_geometry(raw)
            atoms = structure(raw)
            potential.backbone.check(atoms, file=raw.source, frame=raw.frame)
            return cls(place, atoms, potential.backbone.graph(atoms))
        except DataError as error:
            return cls(place, error=_placed(error, raw.source, raw.frame))

    def size(self) -> int:
        """Atoms that the model is to be called with."""
        return 0 if self.atoms is None else len(self.atoms)


def _placed(error: DataError, file: str, frame: int) -> DataError:
    """The same error with file and frame, where the model has said neither."""
    if error.file is not None:
        return error
    return DataError(error.problem, remedy=error.remedy, file=file, frame=frame, field=error.field)


def _predicted(
    potential: BayesianPotential,
    batch: Sequence[_Frame],
    n_draws: int | None,
    method: Method,
    *,
    skip_bad: bool,
) -> tuple[str, list[tuple[str, str]]]:
    """The text of a batch, and place and reason of its frames that could not be predicted."""
    bad = {f.place: f.error.problem for f in batch if f.error is not None}
    known = [f for f in batch if f.atoms is not None]
    text = io.StringIO()
    for frame, prediction in zip(known, _predictions(potential, known, n_draws, method), strict=True):
        assert frame.atoms is not None
        reason = prediction if isinstance(prediction, DataError) else _not_a_number(prediction)
        if reason is None:
            assert not isinstance(prediction, DataError)
            write_frame(text, annotate(frame.atoms, prediction))
            continue
        file, _, number = frame.place.rpartition(", frame ")
        problem = _placed(reason, file, int(number))
        if not skip_bad:
            raise problem
        bad[frame.place] = problem.problem
    return text.getvalue(), [(f.place, bad[f.place]) for f in batch if f.place in bad]


def _predictions(
    potential: BayesianPotential, frames: Sequence[_Frame], n_draws: int | None, method: Method
) -> list[dict[str, Any] | DataError]:
    """Predictions of a batch; one by one where the model refuses it because of a structure in it."""
    atoms = [f.atoms for f in frames if f.atoms is not None]
    graphs = [f.graph for f in frames]
    try:
        return [
            *predict_atoms(
                potential,
                atoms,
                batch_size=max(1, len(atoms)),
                batch_atoms=sum(len(a) for a in atoms),
                n_draws=n_draws,
                method=method,
                graphs=graphs,
            )
        ]
    except DataError as error:
        if len(frames) == 1:
            return [error]
    return [p for frame in frames for p in _predictions(potential, [frame], n_draws, method)]


def _not_a_number(prediction: Mapping[str, Any]) -> DataError | None:
    """The error for a structure of which the model says nothing."""
    for name in ("energy", "forces", "energy_std", "forces_std"):
        value = prediction.get(name)
        if value is not None and not np.isfinite(value).all():
            return DataError(
                "the model's prediction is not finite",
                field=name,
                remedy="the structure is far from all that the model knows (atoms on top of each other?): "
                "remove it, or "
                "leave it out by --skip-bad",
            )
    return None


def annotate(atoms: Atoms, prediction: Mapping[str, Any]) -> Atoms:
    """A copy of ``atoms`` that carries a prediction of :func:`predict_atoms`; see the module's table."""
    out = atoms.copy()
    _forget(out.info, STANDARD + IN_INFO)
    _forget(out.arrays, STANDARD + IN_ARRAYS)
    results = {key: prediction[key] for key in STANDARD if prediction.get(key) is not None}
    own = {} if atoms.calc is None else dict(atoms.calc.results)
    _forget(own, _REPLACED + IN_INFO + IN_ARRAYS)
    out.calc = SinglePointCalculator(out, **results)
    out.calc.results |= own
    out.info.update({k: prediction[k] for k in IN_INFO if prediction.get(k) is not None})
    for key in IN_ARRAYS:
        if prediction.get(key) is not None:
            out.new_array(key, prediction[key])
    return cast("Atoms", out)


def _forget(mapping: dict[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        mapping.pop(key, None)
