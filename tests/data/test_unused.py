"""Labels that no frame has though something is there that could be one: never a silent training without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from blip_ft.config import DataConfig
from blip_ft.data.read.sources import load_source, mappings
from blip_ft.data.read.unused import labels_found, unmatched_labels
from blip_ft.data.split.splits import load_splits
from blip_ft.errors import DataError

Frames = Callable[..., list[Atoms]]
Save = Callable[..., str]


def renamed_in(frames: list[Atoms], **names: str) -> list[Atoms]:
    """The frames with some labels under other names; others are gone."""
    out = []
    for atoms in frames:
        copy = atoms.copy()
        copy.arrays["forces_of_mine"] = atoms.calc.results["forces"]
        for label, name in names.items():
            copy.info[name] = atoms.calc.results[label]
        out.append(copy)
    return out


def findings_of(path: str, *, use_stress: bool = False, **options: object) -> list[str]:
    splits = load_splits(DataConfig(train=path, fields={"forces": "forces_of_mine"}, **options))
    return [str(f) for f in unmatched_labels(splits.roles(), use_stress=use_stress)]


def test_an_energy_of_another_name_is_named_with_the_line_to_write(frames: Frames, save: Save) -> None:
    some = renamed_in(frames(12), energy="TotEnergy")
    for atoms in some:
        atoms.info |= {"cutoff": -1.0, "nneightol": 1.2}
    path = save(some)
    (text,) = findings_of(path)
    assert text.startswith("warning: train: no frame has an energy; nothing uses 'TotEnergy' - ")
    assert "data.fields: {energy: TotEnergy}" in text
    assert "nothing" not in mappings(load_source(path, fields={"forces": "forces_of_mine"}))[0]
    fields = {"forces": "forces_of_mine", "energy": "TotEnergy"}
    splits = load_splits(DataConfig(train=path, fields=fields))
    assert unmatched_labels(splits.roles()) == []
    assert None not in splits.train["energy"][:]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("E0", "{energy: E0}"),
        ("toten", "{energy: toten}"),
        ("energy_pa_per_atom", "{energy_per_atom: energy_pa_per_atom}"),
        ("mystery", "{energy: mystery}"),
        ("free_energy", "{energy: free_energy}"),
    ],
)
def test_names_that_people_give(name: str, line: str, frames: Frames, save: Save) -> None:
    (text,) = findings_of(save(renamed_in(frames(8), energy=name)))
    assert f"nothing uses '{name}'" in text
    assert line in text


def test_a_table(frames: Frames, tmp_path: Path) -> None:
    import json

    rows = [
        {"numbers": a.numbers.tolist(), "positions": a.positions.tolist(), "cell": a.cell.array.tolist()}
        | {"F": a.calc.results["forces"].tolist(), "E_tot": a.calc.results["energy"]}
        for a in frames(8)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = load_splits(DataConfig(train=str(tmp_path / "a.jsonl"), fields={"energy": "E_tot"}))
    (finding,) = unmatched_labels(splits.roles())
    assert "no frame has forces; nothing uses 'F'" in finding.message
    with pytest.raises(
        DataError, match=r"neither energy nor forces(.|\n)*for instance data.fields: \{energy: E_tot\}"
    ):
        load_source(str(tmp_path / "a.jsonl"))


def test_stress_that_is_trained_on_and_not_there_is_an_error(frames: Frames, save: Save) -> None:
    some = frames(12)
    for atoms in some:
        atoms.info["virials"] = np.eye(3) * atoms.calc.results.pop("stress")[0]
    splits = load_splits(DataConfig(train=save(some)))
    assert unmatched_labels(splits.roles()) == []
    (finding,) = unmatched_labels(splits.roles(), use_stress=True)
    assert finding.severity == "error"
    assert "no frame has a stress; nothing uses 'virials'" in finding.message
    assert "data.fields: {virial: virials}" in finding.remedy
    with pytest.raises(DataError, match="no frame has a stress"):
        labels_found(splits.roles(), use_stress=True)
    fields = {"virial": "virials"}
    assert (
        labels_found(load_splits(DataConfig(train=save(some), fields=fields)).roles(), use_stress=True) == []
    )


def test_stress_that_nobody_has(frames: Frames, save: Save) -> None:
    some = frames(12)
    for atoms in some:
        del atoms.calc.results["stress"]
    with pytest.raises(DataError, match=r"no frame has a stress(.|\n)*give frames with a stress"):
        labels_found(load_splits(DataConfig(train=save(some))).roles(), use_stress=True)


def test_one_file_of_two_has_another_name(frames: Frames, save: Save) -> None:
    other = renamed_in(frames(6, seed=1), energy="TotEnergy")
    for atoms in other:
        atoms.arrays["forces"] = atoms.arrays.pop("forces_of_mine")
    path = save(other, "b.xyz")
    splits = load_splits(
        DataConfig(
            train=save(frames(6)),
            validation=path,
            calibration=save(frames(3, seed=3), "c.xyz"),
            test=save(frames(3, seed=4), "d.xyz"),
        )
    )
    (finding,) = unmatched_labels(splits.roles())
    assert finding.message == "validation: no frame has an energy; nothing uses 'TotEnergy'"
    mixed = load_splits(DataConfig(train=[save(frames(6)), path], split={"by": "random"}))
    found = [f for f in unmatched_labels(mixed.roles()) if "train" in f.message]
    assert all(f"{path}, frame" in place for f in found for place in f.frames)
    assert "frames have no energy; nothing uses 'TotEnergy'" in found[0].message


def test_a_text_that_has_eaten_the_energy(frames: Frames, tmp_path: Path) -> None:
    head = 'Properties=species:S:1:pos:R:3:forces:R:3 note="a \\" energy=-1.0"'
    rows = [f"1\n{head}\nO {i} 0 0 0.1 0 0\n" for i in range(8)]
    (tmp_path / "a.xyz").write_text("".join(rows))
    splits = load_splits(DataConfig(train=str(tmp_path / "a.xyz")))
    (finding,) = unmatched_labels(splits.roles())
    assert "a text holds 'energy='" in finding.message
    assert "not closed" in finding.remedy


def test_clean_sets_say_nothing(frames: Frames, save: Save) -> None:
    some = frames(12)
    for atoms in some:
        atoms.info |= {"free_energy_of": 1.0, "virials": np.eye(3), "step": 5, "band_gap": 0.5}
    for name in ("a.xyz", "a.traj"):
        splits = load_splits(DataConfig(train=save(some, name)))
        assert labels_found(splits.roles(), use_stress=True) == []
    forces_only = renamed_in(frames(12))
    assert findings_of(save(forces_only, "forces.xyz")) == []
