"""``blip-finetune check``: text, JSON, exit codes, and the same report inside a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from blip_ft import cli
from blip_ft.testing.fake import FakeBackbone

WRONG = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``fake.yaml`` and 30 frames with the model's labels, one of them wrong."""
    folder: Path = tmp_path_factory.mktemp("check")
    calculator = FakeBackbone(seed=3).stock_calculator()
    rng = np.random.default_rng(0)
    grid = 2.1 * np.stack(np.meshgrid(*[np.arange(2)] * 3), axis=-1).reshape(-1, 3)[:6]
    frames = []
    for i in range(30):
        atoms = Atoms("SiO2SiO2", grid + rng.normal(0, 0.1, (6, 3)), cell=[4.4, 4.6, 4.8], pbc=True)
        atoms.calc = calculator
        energy, forces = atoms.get_potential_energy() - 3.0, 1.02 * atoms.get_forces()
        if i == WRONG:
            forces = forces[::-1]
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        frames.append(atoms)
    write(folder / "frames.extxyz", frames)
    recipe = {
        "output": str(folder / "runs"),
        "data": {"train": str(folder / "frames.extxyz")},
        "model": {"adapter": "fake", "checkpoint": "tiny", "options": {"seed": 3}, "dtype": "float64"},
        "posterior": {"family": "weight", "prior_scale": 0.1},
        "objective": {"temperature": 1e-3},
        "plain": {"enabled": False},
        "uncertainty": {"n_draws": 3},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1},
    }
    (folder / "fake.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    def run_main(*argv: str | Path) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in argv])
        return code, *capsys.readouterr()

    return run_main


def test_json_names_the_frame(call: Any, folder: Path) -> None:
    code, out, _ = call("check", folder / "fake.yaml", "--json")
    assert code == 0
    tree = json.loads(out)
    assert sum(s["frames"] for s in tree["summary"].values()) == 30
    labels = [f for f in tree["findings"] if f["kind"] == "label"]
    assert [f["frames"] for f in labels] == [[WRONG]]
    assert labels[0]["files"] == [str(folder / "frames.extxyz")]
    assert {"kind", "severity", "frames", "message", "remedy"} <= set(labels[0])
    assert not (folder / "runs").exists()


def test_text_shows_roles_and_findings(call: Any, folder: Path) -> None:
    code, out, _ = call("check", folder / "fake.yaml")
    assert code == 0
    for words in (
        "train",
        "calibration",
        "energy, eV/atom",
        "model: force MAE",
        f"frame {WRONG}",
        "What to do:",
    ):
        assert words in out


def test_html_has_the_table_the_figure_and_the_findings(call: Any, folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "data.html"
    code, out, err = call("check", folder / "fake.yaml", "--html", page, "--json")
    assert code == 0
    assert json.loads(out)["findings"]  # nothing else on standard output
    assert str(page) in err
    text = page.read_text(encoding="utf-8")
    for words in ("What every role holds", "Labels beside the pretrained model", "<svg", f"frame {WRONG}"):
        assert words in text
    assert not any(f'{attribute}="http' in text for attribute in ("src", "href"))
    assert "<script" not in text
    code, _, _ = call("check", folder / "fake.yaml", "data.train=none.xyz", "--html", page)
    assert code == 2
    assert "there is no such file" in page.read_text(encoding="utf-8")
    code, _, err = call("check", folder / "fake.yaml", "--html", tmp_path / "no/data.html")
    assert code == 2
    assert "folder does not exist" in err


def test_what_cannot_be_read_is_a_finding_and_exit_code_2(call: Any, folder: Path, tmp_path: Path) -> None:
    text = (folder / "frames.extxyz").read_text().splitlines()
    text[3] = text[3].replace(text[3].split()[-1], "nan")
    (tmp_path / "bad.extxyz").write_text("\n".join(text))
    code, out, err = call("check", folder / "fake.yaml", f"data.train={tmp_path / 'bad.extxyz'}", "--json")
    assert code == 2
    (finding,) = json.loads(out)["findings"]
    assert (finding["kind"], finding["severity"], finding["frames"]) == ("label", "error", [0])
    assert "frame 0" in err
    assert "Traceback" not in err


def test_strict_is_exit_code_2_where_fit_would_refuse(call: Any, folder: Path) -> None:
    wrong = "data.units={forces: -1 * eV/Ang}"
    code, out, _ = call("check", folder / "fake.yaml", wrong, "--json")
    assert code == 0
    assert [f["kind"] for f in json.loads(out)["findings"] if f["severity"] == "error"] == ["sign"]
    code, _, err = call("check", folder / "fake.yaml", wrong, "--strict")
    assert code == 2
    assert "wrong sign" in err
    assert call("check", folder / "fake.yaml", "--strict")[0] == 0


def test_fit_stops_drops_or_warns(call: Any, folder: Path) -> None:
    code, _, err = call("fit", folder / "fake.yaml", "name=stop", "data.bad_labels=stop")
    assert code == 2
    assert f"frame {WRONG}, field 'forces'" in err
    assert not (folder / "runs/stop").exists()
    code, _, err = call("fit", folder / "fake.yaml", "name=drop", "data.bad_labels=drop")
    assert code == 0
    run = folder / "runs/drop"
    receipt = json.loads((run / "receipt.json").read_text())
    assert [f"frame {WRONG}: wrong label" in text for text in receipt["data"]["dropped"]] == [True]
    assert sum(s["n_frames"] for s in receipt["data"]["sets"].values()) == 29
    page = (run / "report.html").read_text()
    assert "Labels beside the pretrained model" in page
    assert "What every role holds" in page
    assert call("report", run)[0] == 0
    again = (run / "report.html").read_text()
    assert again.count("<svg") == page.count("<svg")
    assert "Labels beside the pretrained model" in again
