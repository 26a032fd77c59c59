"""The verdict on a model at the end of its fit, from checks that need no dynamics."""

from __future__ import annotations

from collections.abc import Sequence

from ase import Atoms
from rich.console import Console

from blip_ft.training.prepare import Prepared
from blip_ft.verify.drift import check_drift, probe_frames
from blip_ft.verify.frames import neutral, training_frames
from blip_ft.verify.models import of_potential, pretrained_of
from blip_ft.verify.verdict import Check, Verdict
from blip_ft.verify.verify import contacts, elements_of, static_checks


def frames_to_verify(prepared: Prepared) -> list[Atoms]:
    """A few training frames."""
    return training_frames(prepared.sets["train"].frames)


def plain_checks(prepared: Prepared) -> list[Check]:
    """Holes and drift of the plainly fine-tuned model, which the potential is now."""
    frames, model = frames_to_verify(prepared), of_potential("plain", prepared.potential)
    pretrained = pretrained_of(prepared.potential)
    probe = probe_frames(elements_of(frames), neutral(frames))
    return [
        *contacts(model, frames, contacts(pretrained, frames)),
        check_drift(model, pretrained, probe),
    ]


def verdict_of(prepared: Prepared, plain: Sequence[Check], console: Console) -> Verdict:
    """Checks of the trained model beside the pretrained one, and the plain one where there is one."""
    potential = prepared.potential
    checks, notes, before = static_checks(
        of_potential("BLIP", potential), frames_to_verify(prepared), pretrained_of(potential)
    )
    beside = {"pretrained": before, **({"plain": plain} if plain else {})}
    verdict = Verdict(checks, notes=notes, beside=beside)
    console.print(f"verdict: {verdict.result}. {verdict.sentence}", markup=False)
    return verdict
