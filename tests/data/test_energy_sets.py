"""Energies that fall into sets, and the key that tells them apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from ase import Atoms

from blip_ft.data.check.energy_sets import energy_sets
from blip_ft.data.check.label_faults import Compared, check_labels

#: eV
OWN = {8: -400.0, 14: -100.0}


def frame(i: int, rng: np.random.Generator, symbols: str = "Si2O4") -> Compared:
    """A frame whose energy is the model's, plus constants per element and 10 meV/atom of noise."""
    atoms = Atoms(symbols, positions=rng.uniform(0, 5, (len(Atoms(symbols)), 3)), cell=[5, 5, 5], pbc=True)
    model = float(rng.normal(-30, 2))
    energy = model + sum(OWN[z] for z in atoms.numbers) + rng.normal(0, 0.01) * len(atoms)
    forces = rng.normal(0, 1, (len(atoms), 3))
    return Compared(atoms, energy, forces, None, model, forces + rng.normal(0, 0.02, forces.shape))


def set_of(
    names: Sequence[str], shifts: dict[str, Any], column: str = "theory", symbols: Sequence[str] = ("Si2O4",)
) -> tuple[list[dict[str, Any]], list[Compared]]:
    """Rows and frames; ``shifts`` gives eV/atom, or eV by element."""
    rng = np.random.default_rng(0)
    frames, rows = [], []
    for i, name in enumerate(names):
        one = frame(i, rng, symbols[(i // 2) % len(symbols)])
        shift = shifts.get(name, 0.0)
        assert one.energy is not None
        one.energy += sum(shift[z] if isinstance(shift, dict) else shift for z in one.atoms.numbers)
        frames.append(one)
        text = f"plain: energy <- energy, {column} <- {'head' if column == 'theory' else 'config_type'}"
        rows.append({"source": "q.extxyz", "frame": i, "mapping": text, "theory": "", "group": ""})
        rows[-1][column] = name
    return rows, frames


TWO = ["pbe", "r2scan"] * 12


def test_two_heads_are_named_with_their_key() -> None:
    rows, frames = set_of(TWO, {"r2scan": 0.35})
    (finding,) = energy_sets(rows, frames).findings
    assert (finding.kind, finding.severity) == ("label", "warning")
    assert re.match(
        r"the energies fall into sets by head: r2scan \+3[45]\d meV/atom from pbe", finding.message
    )
    assert "data: {train: q.extxyz@pbe, fields: {split: head}}" in finding.remedy
    assert "data.replay: {source: q.extxyz@r2scan, labels: own}" in finding.remedy


@pytest.mark.parametrize("column", ["theory", "group"])
def test_a_small_offset_of_levels_of_theory(column: str) -> None:
    rows, frames = set_of(TWO, {"r2scan": 0.1}, column)
    (finding,) = energy_sets(rows, frames).findings
    assert ("head" if column == "theory" else "config_type") in finding.message


def test_a_phase_may_be_off_because_the_model_is() -> None:
    names = ["quartz", "stishovite"] * 12
    assert energy_sets(*set_of(names, {"stishovite": 0.1}, "group")).findings == []
    assert len(energy_sets(*set_of(names, {"stishovite": 0.4}, "group")).findings) == 1


def test_constants_by_element_are_found_where_compositions_overlap() -> None:
    shift = {8: 2.0, 14: -4.0}  # of SiO2 nothing is left
    mixed = ("Si2O4", "Si2O2", "Si3O2")
    rows, frames = set_of(TWO * 2, {"r2scan": shift}, symbols=mixed)
    found = energy_sets(rows, frames)
    assert len(found.findings) == 1
    want = [
        sum(shift[z] for z in f.atoms.numbers) if r["theory"] == "r2scan" else 0.0
        for r, f in zip(rows, frames, strict=True)
    ]
    np.testing.assert_allclose(found.offset, want, atol=0.15)


def test_clean_sets_say_nothing() -> None:
    assert energy_sets(*set_of(TWO, {})).findings == []
    assert energy_sets(*set_of(["pbe"] * 24, {})).findings == []
    assert energy_sets(*set_of([""] * 24, {})).findings == []
    # another composition is what tells them apart: references by element bring both together
    apart = [("pbe" if i // 2 % 2 else "r2scan") for i in range(24)]
    rows, frames = set_of(apart, {"r2scan": 1.0}, symbols=("Si2O4", "Si4O2"))
    assert energy_sets(rows, frames).findings == []


def test_too_few_frames_are_no_set() -> None:
    names = ["pbe"] * 20 + ["r2scan"] * 2
    assert energy_sets(*set_of(names, {"r2scan": 0.35})).findings == []


def test_files_tell_sets_apart() -> None:
    rows, frames = set_of(TWO, {"r2scan": 0.35})
    for row in rows:
        row["source"], row["theory"] = f"{row['theory']}.xyz", ""
    (finding,) = energy_sets(rows, frames).findings
    assert re.search(r"by file: r2scan\.xyz \+3[45]\d meV", finding.message)


def test_wrong_labels_are_found_inside_a_set() -> None:
    rows, frames = set_of(TWO * 2, {"r2scan": 0.35})
    assert frames[5].energy is not None
    frames[5].energy += 0.3 * 6
    assert check_labels(frames).faults == []  # lost between the two sets
    faults = check_labels(energy_sets(rows, frames).aligned(frames)).faults
    assert [(f.index, f.label) for f in faults] == [(5, "energy")]
