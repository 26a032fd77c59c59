"""Energies of many structures where few fit into memory."""

from __future__ import annotations

import pytest
from ase.build import molecule

from blip_ft.testing.fake import FakeBackbone
from blip_ft.verify.models import of_backbone

from ..small_memory import memory_for


@pytest.mark.parametrize("atoms", [100, 7, 3])
def test_energies_are_those_of_the_whole(atoms: int):
    frames = [molecule("H2O") for _ in range(40)]
    for number, frame in enumerate(frames):
        frame.numbers[:] = 14, 8, 8
        frame.rattle(0.05, seed=number)
    model = of_backbone("fake", FakeBackbone.load("tiny"))
    want = model.energies_of(frames)
    with memory_for(atoms) as seen:
        got = model.energies_of(frames)
    assert got == pytest.approx(want, rel=1e-12)
    assert max(seen.fitted) <= atoms
    assert len(seen.failed) < 16  # of the first batch alone: what does not fit is not tried again
