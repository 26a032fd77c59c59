"""Context frames: perturbed, unlabelled copies."""

from ase.build import bulk

from blip_ft.data.context import make_context


def test_as_many_as_asked_for_and_reproducible():
    frames = [bulk("Si"), bulk("Si", cubic=True)]
    assert make_context(frames, 0, seed=0) == []
    first, again = make_context(frames, 5, seed=3), make_context(frames, 5, seed=3)
    assert len(first) == 5
    assert first == again
    assert all(a.calc is None and a not in frames for a in first)
