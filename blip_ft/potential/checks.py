"""Whether a model folder is what was saved, and gives what it gave then.

Four questions: is the JSON the one that was written (its own checksum), are its values possible, are all tensors
numbers, and does the rebuilt model give the energy and forces of a made-up structure that were stored with it? The last
one sees what no file can tell: that another version of the vendor's package computes something else from the same
weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from blip_ft.data.split.reference_sets import ReferenceSets
from blip_ft.errors import BlipError, CheckpointError
from blip_ft.potential.probes import probes_of
from blip_ft.variational.noise import OFF

if TYPE_CHECKING:
    from blip_ft.potential.bayesian import BayesianPotential

#: key of the checksum
SEAL = "sha256"
AGAIN = "copy the whole folder again, or train again"
#: differences allowed to a stored probe, eV/atom and eV/Å for forces up to 1 eV/Å, more for larger ones in proportion
TOLERANCE = 1e-4
#: what float32 holds of an energy
_DIGITS = 1e-6
#: elements of the probe, at most: it is evaluated whenever a model is loaded
_MOST = 8


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON part of a model with its checksum; as it holds that of the tensors, it is one over the folder."""
    return {**meta, SEAL: _sum(meta)}


def check_seal(meta: Mapping[str, Any], file: Path) -> None:
    """Raise unless the JSON is the one that was written.

    Raises:
        CheckpointError: it is not.
    """
    if meta.get(SEAL) != _sum(meta):
        raise CheckpointError(
            "changed since it was saved: its checksum is another one",
            file=file,
            remedy=f"{AGAIN}; values of a model are not edited",
        )


def _sum(meta: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps({k: v for k, v in meta.items() if k != SEAL}))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_values(meta: Mapping[str, Any], file: Path) -> None:
    """Raise unless the numbers of the JSON are possible.

    Raises:
        CheckpointError: one is not; names its key.
    """

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    amplitude: Any = meta.get("amplitude")
    scale: Any = meta.get("prior_scale")
    references = meta.get("references")
    sets = meta.get("reference_sets")
    possible = {
        "reference_sets": (sets is None or _are_sets(sets), "sets of energies"),
        "amplitude": (number(amplitude) and 0 < amplitude <= 1, "a number above 0 and up to 1"),
        "prior_scale": (number(scale) and scale > 0, "a number above 0"),
        "n_draws": (whole(meta.get("n_draws")) and meta["n_draws"] >= 2, "a whole number of at least 2"),
        "seed": (whole(meta.get("seed")), "a whole number"),
        "dtype": (meta.get("dtype") in ("float32", "float64"), "float32 or float64"),
        "references": (
            isinstance(references, dict)
            and all(str(z).isdecimal() and 1 <= int(z) <= 118 for z in references)
            and all(number(e) for e in references.values()),
            "an energy for each atomic number",
        ),
    }
    for key, (good, wanted) in possible.items():
        if not good:
            raise CheckpointError(
                f"is {json.dumps(meta.get(key))[:80]}, not {wanted}", file=file, field=key, remedy=AGAIN
            )


def _are_sets(content: Any) -> bool:
    try:
        ReferenceSets.from_dict(content)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return True


def check_finite(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raise if a tensor holds NaN or infinity.

    Raises:
        CheckpointError: one does; names it.
    """
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError("holds values that are no numbers", file=file, field=name, remedy=AGAIN)


# ---- probe -----------------------------------------------------------------------------------


def make_probe(potential: BayesianPotential) -> dict[str, Any] | None:
    """A made-up structure with the energy and forces of the mean weights, JSON-serialisable.

    ``None`` where the model has no finite ones for it.
    """
    atoms = probes_of(potential, _MOST)[0]
    try:
        energy, forces = _evaluated(potential, atoms)
    except BlipError:  # a model with a rule of its own about what it describes
        return None
    if not (math.isfinite(energy) and np.isfinite(forces).all()):
        return None
    return {
        "numbers": atoms.numbers.tolist(),
        "positions": atoms.positions.tolist(),
        "cell": atoms.cell.array.tolist(),
        "info": dict(atoms.info),
        "energy": energy,
        "forces": forces.tolist(),
    }


def check_probe(potential: BayesianPotential, meta: Mapping[str, Any], file: Path) -> None:
    """Raise unless a loaded potential gives what it gave when it was saved.

    Args:
        potential: in the precision that it was saved in.
        meta: the JSON part; those of older versions have no probe.
        file: of the JSON part.

    Raises:
        CheckpointError: energy or forces differ by more than :data:`TOLERANCE`; names the versions that differ.
    """
    probe = meta.get("probe")
    if probe is None:
        return
    atoms = Atoms(probe["numbers"], probe["positions"], cell=probe["cell"], pbc=True, info=probe["info"])
    energy, forces = _evaluated(potential, atoms)
    wanted = np.asarray(probe["forces"])
    off = abs(energy - probe["energy"]) / len(atoms), float(np.abs(forces - wanted).max())
    allowed = (
        TOLERANCE + _DIGITS * abs(probe["energy"]) / len(atoms),
        TOLERANCE * max(1.0, float(np.abs(wanted).max())),
    )
    if off[0] <= allowed[0] and off[1] <= allowed[1]:  # NaN is beyond
        return
    now = potential.backbone.versions() | {"torch": torch.__version__}
    others = {k: v for k, v in meta.get("versions", {}).items() if now.get(k) != v}
    differ = ", ".join(f"{k} {v} (here {now.get(k, 'absent')})" for k, v in sorted(others.items()))
    install = " ".join(f"{k}=={v.partition('+')[0]}" for k, v in sorted(others.items()))
    raise CheckpointError(
        f"the model does not give what it gave when it was saved: off by {off[0]:.1e} eV/atom and {off[1]:.1e} eV/Å "
        f"on its stored structure; saved with {differ or 'the versions that are installed here'}",
        file=file,
        remedy=f"use the versions that it was saved with: pip install {install}" if others else AGAIN,
    )


def _evaluated(potential: BayesianPotential, atoms: Atoms) -> tuple[float, np.ndarray]:
    """Energy and forces of the mean weights."""
    batch = potential.backbone.batch([atoms]).to(potential.backbone.device)
    with torch.no_grad():
        out = potential(batch, OFF, forces=True)
    assert out.forces is not None
    return out.energy.item(), out.forces.double().cpu().numpy()
