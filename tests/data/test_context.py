"""Context frames: perturbed, unlabelled copies."""

import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.neighborlist import neighbor_list

from blip_ft.data.split import context
from blip_ft.data.split.context import RATTLE, SHEAR, STRAIN, make_context, perturbed

CRYSTAL = bulk("SiO", "rocksalt", 4.6, cubic=True)


def closest(atoms):
    return neighbor_list("d", atoms, 5.0).min()


def deformation_of(made):
    return np.linalg.solve(CRYSTAL.cell.array, made.cell.array)


def test_as_many_as_asked_for_and_reproducible():
    frames = [bulk("Si"), bulk("Si", cubic=True)]
    assert make_context(frames, 0, seed=0) == []
    first, again = make_context(frames, 5, seed=3), make_context(frames, 5, seed=3)
    assert len(first) == 5
    assert first == again
    assert all(a.calc is None and a not in frames for a in first)


def test_every_frame_before_any_a_second_time():
    frames = [bulk(symbol, "fcc", 4.0) for symbol in ("Al", "Cu", "Ag")]
    made = [a.get_chemical_symbols()[0] for a in make_context(frames, 6, seed=0)]
    assert sorted(made[:3]) == sorted(made[3:]) == ["Ag", "Al", "Cu"]


def test_labels_stay_behind():
    labelled = CRYSTAL.copy()
    labelled.info["REF_energy"] = -1.0
    labelled.arrays["REF_forces"] = np.zeros((len(labelled), 3))
    (made,) = make_context([labelled], 1, seed=0)
    assert made.info == {}
    assert made.arrays.keys() == {"numbers", "positions"}
    assert labelled.positions.tolist() == CRYSTAL.positions.tolist()


def test_strain_and_rattle_are_as_wide_as_stated(monkeypatch):
    """Where no atoms come too close: a symmetric strain, uniform on the whole, and displacements on top of it."""
    monkeypatch.setattr(context, "_closest", lambda atoms: 1.0)
    rng = np.random.default_rng(0)
    made = [perturbed(CRYSTAL, rng) for _ in range(600)]
    strain = np.array([deformation_of(a) - np.eye(3) for a in made])
    np.testing.assert_allclose(strain, strain.transpose(0, 2, 1), atol=1e-12)
    diagonal, shear = strain.diagonal(axis1=1, axis2=2), strain[:, [0, 0, 1], [1, 2, 2]]
    low, high = STRAIN
    assert diagonal.mean() == pytest.approx((low + high) / 2, abs=0.01)
    # all three share the uniform part
    assert np.cov(diagonal.T)[[0, 0, 1], [1, 2, 2]].mean() == pytest.approx((high - low) ** 2 / 12, rel=0.2)
    assert diagonal.std() == pytest.approx(np.hypot(SHEAR, (high - low) / 12**0.5), rel=0.1)
    assert shear.std() == pytest.approx(SHEAR / 2**0.5, rel=0.1)  # the symmetric half of a matrix of this std
    moved = np.array([a.positions - CRYSTAL.positions @ deformation_of(a) for a in made])
    widths = moved.std(axis=(1, 2))
    low, high = RATTLE
    assert widths.mean() == pytest.approx((low + high) / 2, rel=0.05)
    assert 0.5 * low < widths.min() < 1.5 * low
    assert 0.8 * high < widths.max() < 1.5 * high


def test_a_molecule_is_strained_about_its_centre(monkeypatch):
    monkeypatch.setattr(context, "RATTLE", (0.0, 0.0))
    before = molecule("C2H6")
    made = perturbed(before, np.random.default_rng(1))
    centre = before.positions.mean(axis=0)
    np.testing.assert_allclose(made.positions.mean(axis=0), centre, atol=1e-12)
    deformation, residual, _, _ = np.linalg.lstsq(before.positions - centre, made.positions - centre)
    np.testing.assert_allclose(residual, 0, atol=1e-20)
    np.testing.assert_allclose(deformation, deformation.T, atol=1e-12)
    assert 0.02 < np.abs(deformation - np.eye(3)).max() < 0.4
    assert not made.pbc.any()


@pytest.mark.parametrize("frame", [CRYSTAL, molecule("C2H6")], ids=["crystal", "molecule"])
def test_no_atoms_come_closer_than_stated(frame, monkeypatch):
    """What would is halved, strain and displacements alike, until it does not; all else stays as it is."""
    limit = context.CLOSEST * closest(frame)
    monkeypatch.setattr(context, "RATTLE", (0.05, 0.5))
    kept = [perturbed(frame, np.random.default_rng(seed)) for seed in range(50)]
    assert min(closest(a) for a in kept) >= limit
    monkeypatch.setattr(context, "_closest", lambda atoms: 1.0)
    free = [perturbed(frame, np.random.default_rng(seed)) for seed in range(50)]
    close = [closest(a) < limit for a in free]
    assert [one != other for one, other in zip(kept, free, strict=True)] == close
    assert 5 < sum(close) < 45
    if frame is CRYSTAL:
        size = [[np.linalg.norm(deformation_of(a) - np.eye(3)) for a in made] for made in (kept, free)]
        halvings = np.log2(np.divide(*size[::-1]))[close]
        np.testing.assert_allclose(halvings, halvings.round(), atol=1e-9)
