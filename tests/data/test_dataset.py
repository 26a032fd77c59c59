from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from blip_ft.data.batch.dataset import FrameDataset, collate, make_item
from blip_ft.data.batch.sampler import EpochBatchSampler
from blip_ft.data.frame import content_key, to_atoms
from blip_ft.data.read.sources import load_source
from blip_ft.testing.fake import FakeBackbone

Frames = Callable[..., list[Atoms]]
Save = Callable[..., str]


def test_item_has_structure_labels_and_key(frames: Frames, save: Save, backbone: FakeBackbone) -> None:
    expected = frames(3)
    items = FrameDataset(load_source(save(expected)), backbone)
    assert len(items) == 3
    for atoms, item in zip(expected, (items[i] for i in range(3)), strict=True):
        np.testing.assert_allclose(item.atoms.positions, atoms.positions, atol=1e-8)
        assert item.atoms.calc is None
        assert {k: (v.shape, v.dtype) for k, v in item.labels.items()} == {
            "energy": ((), torch.float64),
            "forces": ((6, 3), torch.float64),
            "stress": ((6,), torch.float64),
            "weight": ((), torch.float64),
            "atom_weight": ((6,), torch.float64),
        }
        for label, value in atoms.calc.results.items():
            np.testing.assert_allclose(item.labels[label].numpy(), value, atol=1e-8)
        assert item.key == content_key(item.atoms.numbers, item.atoms.positions, item.atoms.cell.array)


def test_graphs_are_made_once(
    frames: Frames, save: Save, backbone: FakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    graph = backbone.graph
    monkeypatch.setattr(backbone, "graph", lambda atoms: made.append(atoms) or graph(atoms))
    items = FrameDataset(load_source(save(frames(3))), backbone)
    assert made == []
    assert items[1] is items[1]
    assert len(made) == 1
    assert items[-1] is items[2]


def test_batch_has_labels_and_keys_in_order(frames: Frames, save: Save, backbone: FakeBackbone) -> None:
    items = FrameDataset(load_source(save(frames(4))), backbone)
    chosen = [items[i] for i in (2, 0, 3)]
    before = copy.deepcopy([item.labels for item in chosen])
    batch = collate(backbone, chosen)
    assert batch.keys == [item.key for item in chosen]
    assert batch.n_atoms.tolist() == [6, 6, 6]
    assert batch.labels["energy"].shape == (3,)
    assert batch.labels["forces"].shape == (18, 3)
    assert batch.labels["stress"].shape == (3, 6)
    for k, item in enumerate(chosen):
        assert batch.labels["energy"][k] == item.labels["energy"]
        assert torch.equal(batch.labels["forces"][batch.structure == k], item.labels["forces"])
        assert torch.equal(batch.labels["stress"][k], item.labels["stress"])
        assert all(torch.equal(item.labels[n], before[k][n]) for n in item.labels)


def test_missing_labels_are_nan(tmp_path: Path, backbone: FakeBackbone) -> None:
    (tmp_path / "a.xyz").write_text(
        "2\nenergy=-1.0\nO 0 0 0\nH 0 0 1\n"
        "1\nProperties=species:S:1:pos:R:3:forces:R:3\nO 0 0 0 0.1 0.2 0.3\n"
    )
    items = FrameDataset(load_source(str(tmp_path / "a.xyz")), backbone)
    labels = collate(backbone, [items[0], items[1]]).labels
    assert labels["energy"][0] == -1.0
    assert labels["energy"].isnan().tolist() == [False, True]
    assert labels["forces"].isnan().all(dim=1).tolist() == [True, True, False]
    assert labels["forces"][2].tolist() == [0.1, 0.2, 0.3]
    assert labels["stress"].shape == (2, 6)
    assert labels["stress"].isnan().all()


def test_stress_of_a_slab_is_not_used(frames: Frames, save: Save, backbone: FakeBackbone) -> None:
    some = frames(2)
    some[0].pbc = some[0].calc.atoms.pbc = (True, True, False)
    rows = load_source(save(some))
    assert rows["stress"][0] is not None, "the source had it"
    items = FrameDataset(rows, backbone)
    assert items[0].labels["stress"].isnan().all()
    assert not items[1].labels["stress"].isnan().any()


def test_to_atoms_with_and_without_labels(frames: Frames, save: Save) -> None:
    expected = frames(1)[0]
    row = load_source(save([expected]))[0]
    atoms = to_atoms(row)
    assert atoms.get_potential_energy() == pytest.approx(expected.get_potential_energy())
    np.testing.assert_allclose(atoms.get_forces(), expected.get_forces(), atol=1e-8)
    np.testing.assert_allclose(atoms.get_stress(), expected.get_stress(), atol=1e-12)
    assert to_atoms(row, labels=False).calc is None
    assert to_atoms(row | {"energy": None, "forces": None, "stress": None}).calc is None
    assert set(to_atoms(row | {"forces": None}).calc.results) == {"energy", "stress"}


def test_workers_and_the_main_process_give_the_same_batches(
    frames: Frames, save: Save, backbone: FakeBackbone
) -> None:
    items = FrameDataset(load_source(save(frames(7))), backbone)

    def epoch(workers: int) -> list[tuple[list[int], torch.Tensor]]:
        loader = DataLoader(
            items,
            batch_sampler=EpochBatchSampler(7, 3, seed=1),
            collate_fn=lambda chosen: collate(backbone, chosen),
            num_workers=workers,
        )
        return [(batch.keys, batch.labels["forces"]) for batch in loader]

    for (keys, forces), (other_keys, other_forces) in zip(epoch(0), epoch(2), strict=True):
        assert keys == other_keys
        assert torch.equal(forces, other_forces)


# ---- keys --------------------------------------------------------------------------------------


def test_keys_do_not_depend_on_file_format_or_place(
    frames: Frames, save: Save, backbone: FakeBackbone
) -> None:
    a = load_source(save(frames(4), "a.xyz"))
    b = load_source(save([to_atoms(a[i]) for i in (3, 1, 0, 2)], "b.traj"))
    first = [make_item(row, backbone).key for row in a]
    second = [make_item(row, backbone).key for row in b]
    assert [second[i] for i in (2, 1, 3, 0)] == first
    assert len(set(first)) == 4


def test_keys_are_the_same_on_every_machine() -> None:
    assert content_key([8, 1], [[0, 0, 0], [0, 0, 0.97]], [[0.0] * 3] * 3) == KNOWN_KEY


KNOWN_KEY = 5217914376628754046


@given(
    decimals=st.lists(st.integers(-(10**9), 10**9), min_size=6, max_size=6),
    noise=st.lists(st.floats(-1e-10, 1e-10), min_size=6, max_size=6),
)
def test_keys_survive_rounding_of_decimal_numbers(decimals: list[int], noise: list[float]) -> None:
    positions = np.reshape(decimals, (2, 3)) * 1e-8
    cell = 9.0 * np.eye(3)
    key = content_key([8, 1], positions, cell)
    assert 0 <= key < 2**63
    assert content_key(np.array([8, 1]), positions + np.reshape(noise, (2, 3)), cell + 1e-12) == key


@pytest.mark.parametrize("what", ["numbers", "positions", "cell", "order"])
def test_keys_see_every_part(what: str) -> None:
    numbers, positions, cell = np.array([8, 1]), np.array([[0, 0, 0], [0, 0, 0.97]]), 9.0 * np.eye(3)
    key = content_key(numbers, positions, cell)
    if what == "numbers":
        numbers = np.array([8, 2])
    elif what == "positions":
        positions = positions + np.array([[0, 0, 0], [0, 2e-6, 0]])
    elif what == "cell":
        cell = cell + 2e-6
    else:
        numbers, positions = numbers[::-1], positions[::-1]
    assert content_key(numbers, positions, cell) != key
