"""Trained potentials as files that the vendors' own programs open.

One file is the posterior mean, further ones are posterior draws: each an ordinary potential of the
vendor's architecture, with the energy references in it. Before anything is reported, every file is
opened again by the vendor's loader and compared with the trained potential.

Draws are taken at the width at which the model predicts (``BayesianPotential.amplitude``, a
fraction of the posterior's, where outputs are still linear in the weights), so the spread of the
files times ``1 / amplitude``, and times the calibrated scale, is the error bar that ``predict``
gives. ``export.json`` beside the files holds these factors.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import covalent_radii

import blip_ft
from blip_ft.backbone import Backbone
from blip_ft.checkpoint import sha256
from blip_ft.errors import BlipError, GateError
from blip_ft.potential import BayesianPotential
from blip_ft.variational.convert import unload

META = "export.json"
#: largest differences allowed, eV/atom and eV/Å, by precision of the stored weights: rounding a
#: weight to float32 moves energies by some 1e-6 eV/atom
TOLERANCE = {"float32": (1e-5, 1e-4), "float64": (1e-9, 1e-8)}


@dataclass(frozen=True)
class Exported:
    """One file and its largest differences from the potential, over all compared structures."""

    file: str
    sha256: str
    energy_ev_per_atom: float
    forces_ev_per_ang: float
    stress_ev_per_ang3: float


def export_native(
    potential: BayesianPotential,
    folder: str | Path,
    *,
    draws: int = 0,
    amplitude: float | None = None,
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
        overwrite: replace an earlier export.
        progress: called with each file's name when it is done.

    Raises:
        BlipError: the adapter has no such format, the folder exists, or cannot be written.
        GateError: the vendor's program gets other numbers from a file.
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
    frames = probe_structures(sorted(potential.references) or sorted(potential.backbone.elements)[:8])
    suffix = potential.backbone.native_suffix
    members: list[int | None] = [None, *range(draws)]
    done: list[Exported] = []
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            new = Path(temporary) / "export"
            new.mkdir()
            for draw in members:
                name = f"mean{suffix}" if draw is None else f"draw-{draw:02d}{suffix}"
                plain = member(potential, draw, n_draws=draws, amplitude=width)
                plain.write_native(new / name, potential.references)
                done.append(_compare(plain, new / name, reference, draw, frames))
                if progress is not None:
                    progress(name)
            meta = _meta(potential, width, done)
            (new / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
            if folder.exists():
                folder.rename(Path(temporary) / "old")
            new.rename(folder)
    except OSError as error:
        raise BlipError(
            f"cannot write: {error.strerror or error}", file=folder, remedy="choose another folder"
        ) from error
    return done


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


def probe_structures(elements: Sequence[int]) -> list[Atoms]:
    """A sheared, rattled crystal with every element at least once, and a free cluster cut from it.

    Neighbours are about 1.2 covalent bond lengths apart. Made up, because a model folder holds no
    frames and the comparison needs none that make sense.
    """
    side = max(2, int(np.ceil(len(elements) ** (1 / 3) - 1e-9)))
    numbers = np.resize(np.asarray(elements), side**3)
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    spacing = 2.4 * float(np.max(covalent_radii[numbers]))
    rng = np.random.default_rng(0)
    shear = np.array([[1.0, 0.05, -0.03], [0.0, 0.97, 0.04], [0.0, 0.0, 1.02]])
    positions = spacing * grid @ shear + rng.normal(0, 0.04 * spacing, (side**3, 3))
    crystal = Atoms(numbers, positions=positions, cell=spacing * side * shear, pbc=True)
    cluster = Atoms(numbers[:5], positions=positions[:5])
    return [crystal, cluster]


def _double(potential: BayesianPotential, amplitude: float, draws: int) -> BayesianPotential:
    """A copy in float64 that draws as the files do."""
    twin = copy.deepcopy(potential).to_dtype("float64")
    twin.amplitude, twin.n_draws = amplitude, draws
    return twin


def _compare(
    plain: Backbone, path: Path, reference: BayesianPotential, draw: int | None, frames: Sequence[Atoms]
) -> Exported:
    """Open a file as a user of the vendor's program would, and compare.

    Raises:
        GateError: energies or forces differ by more than ``TOLERANCE``, plus 1e-6 of their size in
            float32, which holds no more digits.
    """
    dtype = plain.native_dtype or str(plain.dtype).removeprefix("torch.")
    e_limit, f_limit = TOLERANCE[dtype]
    digits = 1e-6 if dtype == "float32" else 1e-11
    calculator = plain.open_native(path)
    worst = [0.0, 0.0, 0.0]
    for atoms in frames:
        batch = reference.backbone.batch([atoms]).to(reference.backbone.device)
        mode: Any = "off" if draw is None else "draw"
        with torch.no_grad():
            ours = reference(batch, mode=mode, draw=draw, forces=True, stress=True)
        assert ours.forces is not None
        theirs = atoms.copy()
        theirs.calc = calculator
        energy, forces = ours.energy.item(), ours.forces.cpu().numpy()
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
            raise GateError(
                f"the vendor's program gets other numbers from this file: off by {off[0]:.1e} eV/atom and "
                f"{off[1]:.1e} eV/Å (allowed: {allowed[0]:.1e}, {allowed[1]:.1e}); nothing was exported",
                file=path.name,
                remedy="this is a defect of the adapter or an untested version of its backend: see "
                "'blip-finetune doctor'",
            )
        worst = [max(a, b) for a, b in zip(worst, off, strict=True)]
    return Exported(path.name, sha256(path), *worst)


def _meta(potential: BayesianPotential, amplitude: float, done: Sequence[Exported]) -> dict[str, Any]:
    """What a reader of the files has to know."""
    backbone, calibration = potential.backbone, potential.calibration
    return {
        "format": f"{backbone.name} native",
        "blip_ft": blip_ft.__version__,
        "versions": backbone.versions(),
        "base": backbone.origin,
        "dtype": backbone.native_dtype or str(backbone.dtype).removeprefix("torch."),
        "amplitude": amplitude,
        "multiply_spread_by": 1 / amplitude,
        "calibration": None if calibration is None else calibration.to_dict(),
        "references_ev": {str(z): e for z, e in potential.references.items()},
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
