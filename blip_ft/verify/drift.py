"""How far a model has drifted from its pretrained model on structures that nobody trains on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.data import chemical_symbols, reference_states

from blip_ft.potential.probes import probe_structures
from blip_ft.verify.models import Verified, evaluated
from blip_ft.verify.verdict import Check, at_most

#: rms change of the forces over the rms of the pretrained model's
DRIFT_GOOD, DRIFT_LIMIT = 0.3, 1.0


def probe_frames(elements: Sequence[int], info: dict[str, object]) -> list[Atoms]:
    """Rattled elemental crystals, where ASE knows a simple one, and a made-up crystal of all elements.

    Args:
        elements: atomic numbers.
        info: charge and spin, where the model takes them.
    """
    frames = []
    for z in sorted(set(elements)):
        state = reference_states[z]
        if state is not None and state["symmetry"] in ("fcc", "bcc", "hcp", "diamond"):
            atoms = bulk(chemical_symbols[z], cubic=state["symmetry"] != "hcp")
            atoms.rattle(0.1, seed=z)
            frames.append(atoms)
    frames.append(probe_structures(sorted(set(elements)))[0])
    for atoms in frames:
        atoms.info.update(info)
    return frames


def check_drift(model: Verified, pretrained: Verified, frames: Sequence[Atoms]) -> Check:
    """Rms change of the forces over the rms of the pretrained model's forces, on probe frames."""
    now, before = (
        np.concatenate([evaluated(a, m.calculator()).get_forces().ravel() for a in frames])
        for m in (model, pretrained)
    )
    change, size = (float(np.sqrt(np.mean(f**2))) for f in (now - before, before))
    note = f"{1e3 * change:.0f} meV/Å on {len(frames)} probe frames"
    return at_most("pretrained_drift", change / size, good=DRIFT_GOOD, limit=DRIFT_LIMIT, unit="", note=note)
