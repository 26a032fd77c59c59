"""The largest structure that fits, with calls whose memory is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.build import bulk, molecule

from blip_ft import cli
from blip_ft.errors import BlipError
from blip_ft.system import memory_used
from blip_ft.training import largest as module
from blip_ft.training.largest import boxed, doubled, largest_structure

from .test_cost import tree_of

CPU = torch.device("cpu")


def taking(bytes_per_atom: int, sizes: list[int]):
    """A call that takes so much memory, and gives it back."""

    def call(atoms: Atoms) -> None:
        sizes.append(len(atoms))
        np.ones(bytes_per_atom * len(atoms), dtype=np.uint8)

    return call


@pytest.mark.parametrize("megabytes", [0.25, 1])
def test_what_takes_so_much_per_atom_has_room_for_so_many(megabytes: float):
    sizes: list[int] = []
    found = largest_structure(taking(int(1e6 * megabytes), sizes), bulk("Si", cubic=True), CPU, free=4e8)
    assert found == pytest.approx(0.9 * 4e8 / (megabytes * 1e6), rel=0.15)
    assert sizes == [8 * 2**k for k in range(len(sizes))]  # doubled until it says something
    assert max(sizes) < found


def test_not_more_than_was_tried_where_memory_runs_out():
    def call(atoms: Atoms) -> None:
        if len(atoms) > 20:
            raise MemoryError

    assert largest_structure(call, bulk("Si", cubic=True), CPU, free=1e12) == 16


def test_what_is_no_lack_of_memory_is_raised():
    def call(atoms: Atoms) -> None:
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        largest_structure(call, bulk("Si", cubic=True), CPU)


def test_a_system_that_does_not_tell_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "free_bytes", lambda device: None)
    with pytest.raises(BlipError, match="how much memory is free"):
        largest_structure(lambda atoms: None, bulk("Si", cubic=True), CPU)


def test_the_density_stays():
    crystal = doubled(doubled(bulk("Si", cubic=True)))
    assert len(crystal) == 32
    assert crystal.get_volume() / 32 == pytest.approx(bulk("Si", cubic=True).get_volume() / 8)


@pytest.mark.parametrize("cell", [None, [10.0, 10.0, 0.0], [0.0, 0.0, 30.0]])
def test_molecules_and_slabs_are_repeated_with_room_between(cell: list[float] | None):
    atoms = molecule("CH3CH2OH")
    if cell is not None:
        atoms.set_cell(cell)
        atoms.set_pbc([length > 0 for length in cell])
    grown = doubled(doubled(boxed(atoms)))
    assert len(grown) == 36
    assert (grown.pbc == atoms.pbc).all()
    between = grown.get_all_distances()[:9, 9:]
    assert between.min() >= module.SPACING - 1e-9
    assert np.allclose(grown.get_all_distances()[:9, :9], atoms.get_all_distances())


def test_the_limit_of_a_control_group_counts(monkeypatch: pytest.MonkeyPatch):
    unlimited = memory_used.free_bytes(CPU)
    assert unlimited is not None
    monkeypatch.setattr(memory_used, "_left_of_groups", lambda: [1e6])
    assert memory_used.free_bytes(CPU) == 1e6
    monkeypatch.setattr(memory_used, "_left_of_groups", list)
    monkeypatch.setattr(memory_used, "_available", lambda: None)
    assert memory_used.free_bytes(CPU) is None


def test_check_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(module, "free_bytes", lambda device: 2e7)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree_of(tmp_path, plain={"enabled": False})), encoding="utf-8")
    assert cli.main(["check", str(path), "--largest", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cost"]["largest_atoms"]
    assert found.keys() == {"training step", "prediction"}
    assert all(10 < atoms < 1e6 for atoms in found.values())
    assert cli.main(["check", str(path), "--largest", "--no-cost"]) == 2
    assert "--no-cost" in capsys.readouterr().err
