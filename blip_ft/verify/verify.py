"""All checks of a model, and the part of them that is cheap enough for every fit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from ase import Atoms
from rich.console import Console

from blip_ft.system.progress import progress
from blip_ft.verify.contacts import check_dimers, check_scan
from blip_ft.verify.derivatives import check_forces, check_virial
from blip_ft.verify.drift import check_drift, probe_frames
from blip_ft.verify.dynamics import check_hot, check_nve, hot_steps, nve_steps, repeated, seconds_per_step
from blip_ft.verify.frames import neutral
from blip_ft.verify.models import Verified
from blip_ft.verify.verdict import Check, Verdict

#: steps of a run without thermostat below which its slope says nothing
LEAST_STEPS = 100
#: share of the time for it, in each precision
NVE_SHARE = 0.15


def contacts(
    model: Verified, frames: Sequence[Atoms], pretrained: Sequence[Check] | None = None
) -> list[Check]:
    """Dimers of every pair of elements of the frames, and the hydrostatic scan.

    Args:
        model: what is verified.
        frames: of :mod:`blip_ft.verify.frames`.
        pretrained: the same of the pretrained model, where it is known.
    """
    scan = check_scan(model, frames)
    return [
        *check_dimers(model, elements_of(frames), neutral(frames), pretrained),
        *([scan] if scan else []),
    ]


def elements_of(frames: Sequence[Atoms]) -> list[int]:
    """Their atomic numbers."""
    return sorted({int(z) for a in frames for z in a.numbers})


def static_checks(
    model: Verified, frames: Sequence[Atoms], pretrained: Verified | None = None
) -> tuple[list[Check], list[str], list[Check]]:
    """Derivatives, holes, and drift from the pretrained model: what needs no dynamics.

    Args:
        model: what is verified.
        frames: as for :func:`contacts`.
        pretrained: where it is known.

    Returns:
        The checks; what was left out and why; the checks of the pretrained model.
    """
    notes, before = [], None if pretrained is None else contacts(pretrained, frames)
    checks = [check_forces(model.calculator(), frames[0])]
    periodic = next((a for a in frames if a.pbc.all()), None)
    virial = None if periodic is None else check_virial(model.calculator(), periodic)
    if virial is not None:
        checks.append(virial)
    elif periodic is None:
        notes.append("No virial and no hydrostatic scan: no frame is periodic in all directions.")
    else:
        notes.append("No virial: the model gives no stress.")
    checks += contacts(model, frames, before)
    if pretrained is not None:
        checks.append(check_drift(model, pretrained, probe_frames(elements_of(frames), neutral(frames))))
    return checks, notes, before or []


def verify(
    model: Verified,
    frames: Sequence[Atoms],
    temperature: float,
    *,
    pretrained: Verified | None = None,
    beside: Mapping[str, Sequence[Check]] | None = None,
    seconds: float = 300.0,
    console: Console | None = None,
) -> Verdict:
    """Every check of a model.

    Args:
        model: what is verified.
        frames: as for :func:`contacts`; dynamics starts at the first.
        temperature: of the dynamics, K.
        pretrained: where it is known.
        beside: checks of other models that were made before, to be shown.
        seconds: what the whole may take; dynamics is cut short, and says so.
        console: for progress; by default none.
    """
    console = console or Console(quiet=True)
    ends, start = time.monotonic() + seconds, repeated(frames[0])
    console.print("derivatives, dimers, compression ...")
    checks, notes, before = static_checks(model, frames, pretrained)
    precisions = [p for p in ("float64", "float32", "given") if p in model.calculators]
    for precision in precisions:
        rate = seconds_per_step(start, model.calculator(precision))
        fitting = int(NVE_SHARE * seconds / rate)
        steps = max(LEAST_STEPS, min(nve_steps(start), fitting))
        with progress(console, f"energy conservation, {precision}", steps, unit="steps") as advance:
            checks.append(
                check_nve(model.calculator(precision), start, precision, temperature, steps, advance)
            )
    fastest = precisions[-1]
    rate = seconds_per_step(start, model.calculator(fastest))
    steps = max(LEAST_STEPS, min(hot_steps(start), int((ends - time.monotonic()) / rate)))
    with progress(console, f"dynamics at {temperature:.0f} K", steps, unit="steps") as advance:
        checks.append(check_hot(model.calculator(fastest), start, temperature, steps, advance))
    others = {**(beside or {}), **({"pretrained": before} if before else {})}
    return Verdict(checks, temperature, notes, others)
