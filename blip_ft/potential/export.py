"""Trained potentials as files that the vendors' own programs open.

One file is the posterior mean, further ones are posterior draws: each an ordinary potential of the
vendor's architecture, with the energy references in it. Before anything is reported, every file is
opened again by the vendor's loader and compared with the trained potential, in float64 (nothing was lost
but digits) and in the precision that the vendor's program takes by itself (how many).

References of thousands of eV per atom leave few digits to a program that adds energies up in float32. That is
said, and the references can be left out of the files: they stand in ``export.json``.

Draws are taken at the width at which the model predicts (``BayesianPotential.amplitude``, a
fraction of the posterior's, where outputs are still linear in the weights), so the spread of the
files times ``1 / amplitude``, and times the calibrated scale, is the error bar that ``predict``
gives. ``export.json`` beside the files holds these factors.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms

from blip_ft.backbones.protocol import Backbone
from blip_ft.errors import BlipError, SanityCheckError, readable
from blip_ft.files import is_full, remedy_of
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.checkpoint import require_space, sha256
from blip_ft.potential.probes import probes_of
from blip_ft.variational.convert import unload
from blip_ft.variational.noise import OFF, Noise
from blip_ft.version import __version__

META = "export.json"
#: largest differences allowed, eV/atom and eV/Å, by precision of the stored weights: rounding a
#: weight to float32 moves energies by some 1e-6 eV/atom
TOLERANCE = {"float32": (1e-5, 1e-4), "float64": (1e-9, 1e-8)}

#: steps of energies in float32 that are worth a note, eV/atom
STEP = 1e-4


@dataclass(frozen=True)
class Exported:
    """One file and its largest differences from the potential, over all compared structures.

    The first three are those in float64, ``as_used`` those in the precision of the vendor's program.
    """

    file: str
    sha256: str
    energy_ev_per_atom: float
    forces_ev_per_ang: float
    stress_ev_per_ang3: float
    energy_as_used_ev_per_atom: float
    forces_as_used_ev_per_ang: float


@dataclass
class _Energies:
    """What has been seen of the energies of files, for :func:`_notes`."""

    #: largest size, eV/atom, of the vendor's own and with the references
    plain: float = 0.0
    whole: float = 0.0
    #: whether the vendor's program gives them in float32
    single: bool = True


def export_native(
    potential: BayesianPotential,
    folder: str | Path,
    *,
    draws: int = 0,
    amplitude: float | None = None,
    references: bool = True,
    overwrite: bool = False,
    progress: Callable[[str], Any] | None = None,
) -> list[Exported]:
    """Write the mean and draws of a potential as files of the vendor.

    Args:
        potential: in the precision that the files shall have; it is not changed.
        folder: new folder for ``mean``, ``draw-00``, ... and ``export.json``; it appears when every
            file has been read back and agrees.
        draws: number of draws K, 0 or at least 2.
        amplitude: width of the draws in units of the posterior's; by default the potential's own.
        references: whether the energy references go into the files; else the files have energies on the vendor's
            reference, and those of ``export.json`` are to be added.
        overwrite: replace an earlier export.
        progress: called with each file's name when it is done.

    Raises:
        BlipError: the adapter has no such format, the folder exists, or cannot be written.
        SanityCheckError: the vendor's program gets other numbers from a file.
    """
    folder = Path(folder)
    _check_folder(folder, overwrite=overwrite)
    if draws and not potential.posterior.ready:
        raise BlipError("this model has no posterior to draw from", remedy="export it without --draws")
    if draws and not potential.posterior.draws_are_weights:
        raise BlipError(
            f"draws of the '{potential.posterior.family}' posterior depend on each layer's input, which no "
            "file of the vendor can express",
            remedy="export the mean without --draws; predict with draws through blip_ft",
        )
    width = potential.amplitude if amplitude is None else amplitude
    reference = _double(potential, width, draws)
    shift = potential.references if references else {}
    reference.references = dict(shift)
    seen = _Energies()
    frames = probes_of(potential)
    suffix = potential.backbone.native_suffix
    members: list[int | None] = [None, *range(draws)]
    require_space(folder, len(members) * sum(t.nbytes for t in potential.backbone.state_dict().values()))
    done: list[Exported] = []
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            new = Path(temporary) / "export"
            new.mkdir()
            for draw in members:
                name = f"mean{suffix}" if draw is None else f"draw-{draw:02d}{suffix}"
                plain = member(potential, draw, n_draws=draws, amplitude=width)
                _write(plain, new / name, shift)
                done.append(_compare(plain, new / name, reference, draw, frames, seen))
                if progress is not None:
                    progress(name)
            meta = _meta(potential, width, done)
            meta |= {"references_in_files": references, "notes": _notes(potential, width, done, seen)}
            (new / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
            _check_folder(folder, overwrite=overwrite)  # another program may have written it in the meantime
            if folder.exists():
                folder.rename(Path(temporary) / "old")
            new.rename(folder)
    except OSError as error:
        raise BlipError(
            f"cannot write: {error.strerror or error}", file=folder, remedy=remedy_of(error)
        ) from error
    return done


def _write(plain: Backbone, path: Path, references: Mapping[int, float]) -> None:
    """Have the adapter write a file of the vendor.

    Raises:
        OSError: it cannot be written; libraries that raise other errors on a full disk are translated.
    """
    try:
        plain.write_native(path, dict(references))
    except (RuntimeError, ValueError) as error:  # torch's and zip's own words for a write that failed
        full, writing = is_full(path.parent), "writ" in str(error)
        if full or (writing and isinstance(error, RuntimeError)):  # PytorchStreamWriter failed writing file
            code = errno.ENOSPC if full else errno.EIO
            raise OSError(code, os.strerror(code), str(path)) from error
        raise


def member(
    potential: BayesianPotential, draw: int | None, *, n_draws: int = 0, amplitude: float = 1.0
) -> Backbone:
    """A stock backbone with the weights of the mean (``None``) or of a draw; a copy.

    Args:
        potential: not changed.
        draw: 0 to ``n_draws - 1``; the draws are centred, so they depend on their number.
        n_draws: number of draws K.
        amplitude: width in units of the posterior's.
    """
    perturbation = None
    if draw is not None:
        backbone = potential.backbone
        latent = amplitude * potential.draw_latents(n_draws)[[draw]].to(backbone.device, backbone.dtype)
        with torch.no_grad():
            perturbation = {name: w[0] for name, w in potential.posterior.sample(latent).items()}
    plain = copy.deepcopy(potential.backbone)
    unload(plain, merge=True, perturbation=perturbation)
    return plain.requires_grad_(False).eval()


def _double(potential: BayesianPotential, amplitude: float, draws: int) -> BayesianPotential:
    """A copy in float64 that draws as the files do."""
    twin = copy.deepcopy(potential).to_dtype("float64")
    twin.amplitude, twin.n_draws = amplitude, draws
    return twin


def _compare(
    plain: Backbone,
    path: Path,
    reference: BayesianPotential,
    draw: int | None,
    frames: Sequence[Atoms],
    seen: _Energies,
) -> Exported:
    """Open a file as a user of the vendor's program would, and compare.

    Raises:
        SanityCheckError: energies or forces differ in float64 by more than ``TOLERANCE``, plus 1e-6 of their size where
            float32 is stored, which holds no more digits.
    """
    dtype = plain.native_dtype or str(plain.dtype).removeprefix("torch.")
    e_limit, f_limit = TOLERANCE[dtype]
    digits = 1e-6 if dtype == "float32" else 1e-11
    exact, used = plain.open_native(path), plain.open_native(path, as_used=True)
    worst, worst_used = np.zeros(3), np.zeros(2)
    for atoms in frames:
        batch = reference.backbone.batch([atoms]).to(reference.backbone.device)
        noise = OFF if draw is None else Noise.of_draw(draw)
        with torch.no_grad():
            ours = reference(batch, noise, forces=True, stress=True)
        assert ours.forces is not None
        energy, forces = ours.energy.item(), ours.forces.cpu().numpy()
        theirs = atoms.copy()
        theirs.calc = exact
        off = [
            abs(theirs.get_potential_energy() - energy) / len(atoms),
            float(np.abs(theirs.get_forces() - forces).max()),
        ]
        with_stress = ours.stress is not None and bool(atoms.pbc.all())
        stress = ours.stress[0].cpu().numpy() if with_stress else 0.0
        off.append(float(np.abs(theirs.get_stress() - stress).max()) if with_stress else 0.0)
        allowed = (
            e_limit + digits * abs(energy) / len(atoms),
            f_limit + 10 * digits * float(np.abs(forces).max()),
        )
        if not (off[0] <= allowed[0] and off[1] <= allowed[1]):  # NaN is beyond
            raise SanityCheckError(
                f"the vendor's program gets other numbers from this file: off by {readable(off[0], '.1e')} eV/atom and "
                f"{readable(off[1], '.1e')} eV/Å (allowed: {allowed[0]:.1e}, {allowed[1]:.1e}); nothing was exported",
                file=path.name,
                remedy="this is a defect of the adapter or an untested version of its backend: see "
                "'blip-finetune doctor'",
            )
        theirs = atoms.copy()
        theirs.calc = used
        rounded, shift = float(theirs.get_potential_energy()), reference.reference_energy(batch).item()
        off_used = abs(rounded - energy) / len(atoms), float(np.abs(theirs.get_forces() - forces).max())
        worst, worst_used = np.maximum(worst, off), np.maximum(worst_used, off_used)
        seen.plain = max(seen.plain, abs(energy - shift) / len(atoms))
        seen.whole = max(seen.whole, abs(energy) / len(atoms), *map(abs, reference.references.values()))
        seen.single &= _is_single(rounded) or _is_single(rounded / len(atoms))
    return Exported(path.name, sha256(path), *worst.tolist(), *worst_used.tolist())


def _is_single(value: float) -> bool:
    """Whether a number has no more digits than float32."""
    return abs(float(np.float32(value)) - value) <= 1e-13 * abs(value)


def _notes(
    potential: BayesianPotential, amplitude: float, done: Sequence[Exported], seen: _Energies
) -> list[str]:
    """What a user of the files has to know, in sentences."""
    backbone, notes = potential.backbone, []
    if chosen := backbone.choices():
        what = ", ".join(f"{k}={'each its own' if v is None else v}" for k, v in chosen.items())
        own = {k: "the structure's own" if v is None else v for k, v in chosen.items()}
        call = backbone.native_call.format(file=done[0].file, **own)
        notes.append(f"The files are for {what}" + (f": {call}." if call else "."))
    if potential.reference_sets is not None:
        text = potential.reference_sets.describe()
        notes.append(f"{text[0].upper()}{text[1:]}: --reference-set chooses.")
    if not seen.single:
        return notes
    step = seen.whole * 2.0**-23
    lost = []
    if step > STEP:
        lost.append(
            f"energies of up to {seen.whole:.0f} eV per atom have steps of {1e3 * step:.2g} meV per atom "
            f"in float32, in "
            "which the vendor's program gives them"
        )
    floor = step / np.sqrt(12) / amplitude
    if len(done) > 1 and floor > STEP:
        lost.append(
            f"the std of energies over the draws, times {1 / amplitude:.3g}, has a floor of rounding of about "
            f"{1e3 * floor:.2g} meV per atom"
        )
    if lost:
        text = "; ".join(lost)
        helps = 2 * seen.plain < seen.whole
        notes.append(
            f"{text[0].upper()}{text[1:]}: "
            + (
                "leave the energy references out of the files (--references beside) and add those of export.json to "
                "the vendor's energies."
                if helps
                else "compute in float64 where the vendor's program can."
            )
        )
    return notes


def _meta(potential: BayesianPotential, amplitude: float, done: Sequence[Exported]) -> dict[str, Any]:
    """What a reader of the files has to know."""
    backbone, calibration = potential.backbone, potential.calibration
    return {
        "format": f"{backbone.name} native",
        "blip_ft": __version__,
        "versions": backbone.versions(),
        "base": backbone.origin,
        "for": backbone.choices(),
        "dtype": backbone.native_dtype or str(backbone.dtype).removeprefix("torch."),
        "amplitude": amplitude,
        "multiply_spread_by": 1 / amplitude,
        "calibration": None if calibration is None else calibration.to_dict(),
        "references_ev": {str(z): e for z, e in potential.references.items()},
        "reference_set": None if potential.reference_sets is None else potential.reference_sets.default,
        "files": [asdict(e) for e in done],
    }


def _check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise if an export may not be written there."""
    if not folder.parent.is_dir():
        raise BlipError("its folder does not exist", file=folder, remedy=f"mkdir -p '{folder.parent}'")
    if not folder.exists():
        return
    if not (folder / META).is_file():
        raise BlipError("this exists and is not an export", file=folder, remedy="choose another folder")
    if not overwrite:
        raise BlipError("this export exists", file=folder, remedy="choose another folder or add --overwrite")
