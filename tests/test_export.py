"""Export to the vendor's format, on the fake backbone: the numbers, the folder, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk

from blip_ft.backbones.protocol import Backbone
from blip_ft.cli import main
from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.errors import BlipError, SanityCheckError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.checkpoint import save_model
from blip_ft.potential.export import export_native, member
from blip_ft.potential.probes import probe_structures
from blip_ft.testing.fake import FakeBackbone
from blip_ft.uncertainty.predict import predict_atoms


@pytest.fixture
def potential() -> BayesianPotential:
    """Trained mean, spread, amplitude and references are all away from their defaults."""
    potential = BayesianPotential(
        FakeBackbone.load("tiny"),
        ModelConfig(adapter="fake", checkpoint="tiny"),
        PosteriorConfig(family="weight", prior_scale=0.3, init_std=0.05),
        n_draws=6,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for delta in potential.mean_parameters:
            delta.add_(0.05 * torch.randn(delta.shape, generator=generator, dtype=torch.float64))
    potential.references = {8: -321.5, 14: 4.25}
    potential.amplitude = 0.5
    return potential


def crystal():
    atoms = bulk("SiO", "rocksalt", 4.4)
    atoms.rattle(0.1, seed=3)
    return atoms


def test_files_are_the_mean_and_the_draws_of_predict(potential, tmp_path):
    done = export_native(potential, tmp_path / "out", draws=6)
    assert [e.file for e in done] == ["mean.pt", *[f"draw-{k:02d}.pt" for k in range(6)]]
    assert max(e.energy_ev_per_atom for e in done) < 1e-9
    values = []
    for item in done:
        atoms = crystal()
        atoms.calc = FakeBackbone().open_native(tmp_path / "out" / item.file)
        values.append(atoms.get_potential_energy())
    (mean,) = predict_atoms(potential, [crystal()], n_draws=0)
    (draws,) = predict_atoms(potential, [crystal()])
    assert values[0] == pytest.approx(mean["energy"], abs=1e-9)
    assert np.mean(values[1:]) == pytest.approx(draws["energy"], abs=1e-9)
    meta = json.loads((tmp_path / "out/export.json").read_text())
    assert meta["multiply_spread_by"] == 2.0
    assert np.std(values[1:]) * meta["multiply_spread_by"] == pytest.approx(draws["energy_std"], rel=1e-9)
    assert len({e.sha256 for e in done}) == 7


def test_the_amplitude_can_be_chosen(potential, tmp_path):
    export_native(potential, tmp_path / "out", draws=4, amplitude=1.0)
    full = FakeBackbone().open_native(tmp_path / "out/draw-00.pt").backbone.state_dict()
    half = member(potential, 0, n_draws=4, amplitude=0.5).state_dict()
    mean = member(potential, None).state_dict()
    key = "model.embedding.weight"
    torch.testing.assert_close(full[key] - mean[key], 2 * (half[key] - mean[key]))


def test_the_potential_is_left_alone(potential, tmp_path):
    before = {k: v.clone() for k, v in potential.state_dict().items()}
    export_native(potential, tmp_path / "out", draws=2)
    after = potential.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert (potential.amplitude, potential.n_draws) == (0.5, 6)


def test_single_precision(potential, tmp_path):
    potential.to_dtype("float32")
    (mean,) = export_native(potential, tmp_path / "out")
    assert 0 < mean.energy_ev_per_atom < 1e-3  # a reference of -321 eV has no more digits
    assert torch.load(tmp_path / "out/mean.pt")["state"]["model.references"].dtype == torch.float32


def notes(folder: Path) -> str:
    return "\n".join(json.loads((folder / "export.json").read_text())["notes"])


def test_all_electron_energies_in_single_precision(potential, tmp_path):
    """20 keV per atom: float32 has steps of 15.6 meV for 9 atoms, which the comparison in float64 does not see."""
    potential.references = {14: -20337.0, 8: -2041.0}
    assert notes_of(potential, tmp_path / "double") == ""
    potential.to_dtype("float32")
    (mean,) = export_native(potential, tmp_path / "out", references=True)
    assert mean.energy_as_used_ev_per_atom > 1e-4
    found = notes(tmp_path / "out")
    for part in ("20337 eV per atom", "steps of 2.4 meV per atom", "--references beside"):
        assert part in found
    (mean,) = export_native(potential, tmp_path / "beside", references=False)
    assert mean.energy_as_used_ev_per_atom < 1e-5
    assert notes(tmp_path / "beside") == ""
    meta = json.loads((tmp_path / "beside/export.json").read_text())
    assert meta["references_in_files"] is False
    assert meta["references_ev"] == {"14": -20337.0, "8": -2041.0}
    atoms = crystal()
    atoms.calc = FakeBackbone().open_native(tmp_path / "beside" / mean.file)
    (own,) = predict_atoms(potential, [crystal()], n_draws=0)
    assert atoms.get_potential_energy() - 20337.0 - 2041.0 == pytest.approx(own["energy"], abs=1e-4)


def test_narrow_draws_of_large_energies(potential, tmp_path):
    """The spread of the files is multiplied by 33, and its rounding with it."""
    potential.to_dtype("float32")
    potential.amplitude = 0.03
    potential.references = {14: -360.0, 8: -430.0}
    assert notes_of(potential, tmp_path / "mean") == ""  # 0.05 meV per atom
    found = notes_of(potential, tmp_path / "draws", draws=2)
    assert "floor of rounding of about 0.49 meV per atom" in found
    assert "times 33.3" in found
    assert notes_of(potential, tmp_path / "beside", draws=2, references=False) == ""


def notes_of(potential, folder, **options) -> str:
    export_native(potential, folder, **options)
    return notes(folder)


class TwoHeads(FakeBackbone):
    native_call = "Calculator('{file}', head='{head}')"

    def choices(self):
        return {"head": "r2scan"}


def test_an_export_says_what_it_is_for(potential, tmp_path):
    export_native(potential, tmp_path / "plain")
    assert json.loads((tmp_path / "plain/export.json").read_text())["for"] == {}
    assert notes(tmp_path / "plain") == ""
    potential.backbone.__class__ = TwoHeads
    export_native(potential, tmp_path / "out")
    assert json.loads((tmp_path / "out/export.json").read_text())["for"] == {"head": "r2scan"}
    assert notes(tmp_path / "out") == "The files are for head=r2scan: Calculator('mean.pt', head='r2scan')."


class Forgetful(FakeBackbone):
    """Writes the vendor's own references instead of the shifted ones."""

    def write_native(self, path, shift):
        super().write_native(path, {})


class Sloppy(FakeBackbone):
    """Loses a weight."""

    def write_native(self, path, shift):
        with torch.no_grad():
            self.model.embedding.weight[0, 3] += 1e-3
        super().write_native(path, shift)


@pytest.mark.parametrize("kind", [Forgetful, Sloppy])
def test_a_file_with_other_numbers_is_not_exported(potential, tmp_path, kind):
    potential.backbone.__class__ = kind
    with pytest.raises(SanityCheckError, match="other numbers") as caught:
        export_native(potential, tmp_path / "out", draws=2)
    assert caught.value.file == "mean.pt"
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_without_a_format_says_so(potential, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeBackbone, "write_native", Backbone.write_native)
    with pytest.raises(BlipError, match="cannot write its vendor's format"):
        export_native(potential, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_no_draws_of_a_model_without_posterior(potential, tmp_path):
    point = BayesianPotential(
        FakeBackbone.load("tiny"), potential.model_config, PosteriorConfig(family="subspace", rank=4)
    )
    with pytest.raises(BlipError, match="no posterior"):
        export_native(point, tmp_path / "out", draws=2)
    assert len(export_native(point, tmp_path / "out")) == 1


def test_folders(potential, tmp_path):
    export_native(potential, tmp_path / "out", draws=2)
    with pytest.raises(BlipError, match="export exists"):
        export_native(potential, tmp_path / "out")
    export_native(potential, tmp_path / "out", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["export.json", "mean.pt"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(BlipError, match="not an export"):
        export_native(potential, tmp_path / "mine", overwrite=True)
    with pytest.raises(BlipError, match="folder does not exist"):
        export_native(potential, tmp_path / "no/out")


@pytest.mark.parametrize("elements", [[14], [8, 14], list(range(1, 90))])
def test_probe_structures(elements):
    crystal, cluster = probe_structures(elements)
    assert set(crystal.numbers) == set(elements)
    assert crystal.pbc.all()
    assert not cluster.pbc.any()
    assert crystal.get_all_distances(mic=True)[np.triu_indices(len(crystal), 1)].min() > 0.4


def test_the_command(potential, tmp_path, capsys):
    save_model(potential, tmp_path / "run/model")
    assert main(["export", str(tmp_path / "run"), "--to", "native", "--draws", "2"]) == 0
    out = capsys.readouterr().out
    assert "draw-01.pt" in out
    assert "0.5 of the posterior's width" in out
    folder: Path = tmp_path / "run/export-native"
    assert sorted(p.name for p in folder.iterdir()) == ["draw-00.pt", "draw-01.pt", "export.json", "mean.pt"]
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "other")]) == 0
    assert "width" not in capsys.readouterr().out
    beside = ["export", str(tmp_path / "run"), "--references", "beside", "-o", str(tmp_path / "beside")]
    assert main(beside) == 0
    assert "without references: add those of export.json" in capsys.readouterr().out
    assert json.loads((tmp_path / "beside/export.json").read_text())["references_in_files"] is False
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "run"), "--draws", "1"])
    assert main(["export", str(tmp_path / "run")]) == 2  # exists


@pytest.mark.parametrize("free", [0, 10**12], ids=["full", "quota"])
def test_a_full_disk_is_an_error_and_leaves_nothing(potential, tmp_path, monkeypatch, free):
    """Torch says so in words of its own."""

    def full(self, path, shift):
        path.write_bytes(b"half")
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
        raise RuntimeError(
            "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"
        )

    monkeypatch.setattr(FakeBackbone, "write_native", full)
    with pytest.raises(BlipError, match="cannot write") as caught:
        export_native(potential, tmp_path / "out", draws=2)
    assert ("free disk space" in caught.value.remedy) == (free == 0)
    assert list(tmp_path.iterdir()) == []


def test_a_defect_of_an_adapter_keeps_its_trace_back(potential, tmp_path, monkeypatch):
    def broken(self, path, shift):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(FakeBackbone, "write_native", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        export_native(potential, tmp_path / "out")


def test_too_little_space_is_told_before_anything_is_written(potential, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(BlipError, match="MB free, about"):
        export_native(potential, tmp_path / "out", draws=2)


def test_another_program_exports_to_the_same_folder(potential, tmp_path, monkeypatch):
    write_native = FakeBackbone.write_native

    def slowly(self, path, shift):
        write_native(self, path, shift)
        (tmp_path / "out").mkdir()
        (tmp_path / "out/export.json").write_text("theirs")

    monkeypatch.setattr(FakeBackbone, "write_native", slowly)
    with pytest.raises(BlipError, match="export exists"):
        export_native(potential, tmp_path / "out")
    assert (tmp_path / "out/export.json").read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
