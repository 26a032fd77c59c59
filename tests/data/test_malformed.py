"""Every input of the table is refused with file, frame, field and remedy, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blip_ft import cli
from blip_ft.data.read.sources import load_source
from blip_ft.errors import DataError

from .malformed import GOOD, TABLE, Malformed, lines, parquet, trajectory
from .test_bad_input import TEXTS, attempt


def test_the_table_is_large() -> None:
    assert len(TABLE) + len(TEXTS) >= 100
    assert len({case.name for case in TABLE}) == len(TABLE) >= 60


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_it_is_refused(case: Malformed, tmp_path: Path, cache: Path) -> None:
    source = case.make(tmp_path)
    with pytest.raises(DataError, match=case.words) as caught:
        load_source(source)
    error = caught.value
    assert error.file is not None
    assert error.file.startswith(str(tmp_path))
    assert error.remedy
    if case.frame is not None:
        assert error.frame == case.frame
    if case.field is not None:
        assert error.field == case.field
    assert [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"] == []


@pytest.mark.parametrize("name", ["million.xyz", "pointer.parquet", "swapped_forces.jsonl", "shards_zero"])
def test_the_program_prints_no_trace_back(
    name: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = next(case for case in TABLE if case.name == name).make(tmp_path)
    assert cli.main(["check", "sio2_sevennet", f"data.train={source}", "--json"]) == 2
    out, err = capsys.readouterr()
    assert '"severity": "error"' in out
    assert "What to do" in err
    assert "Traceback" not in err


def test_a_name_that_is_not_utf8(tmp_path: Path, cache: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.xyz"
    with open(path, "wb") as file:  # noqa: PTH123 (a name in bytes)
        file.write(GOOD.encode() + b"x\n")
    with pytest.raises(DataError, match=r"caf.\.xyz, frame 1: line 5"):
        load_source(os.fsdecode(path))


@pytest.mark.default
def test_a_hub_id_without_network(tmp_path: Path) -> None:
    code = "import sys; from blip_ft.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, "check", "sio2_sevennet", "data.train=nobody/nothing-of-this-name"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(argv, check=False, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert "nobody/nothing-of-this-name" in done.stderr
    assert "connect to the network once" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupted_reading_leaves_no_cache(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "long.xyz").write_text(GOOD * 300 + "x\n")
    with pytest.raises(DataError, match="frame 300"):
        load_source(str(tmp_path / "long.xyz"))
    assert [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"] == []
    (tmp_path / "long.xyz").write_text(GOOD * 300)
    assert len(load_source(str(tmp_path / "long.xyz"))) == 300


# ---- fuzz --------------------------------------------------------------------------------------


def binary(name: str, folder: Path) -> bytes:
    path = folder / f"good{name}"
    if not path.exists():
        {".traj": trajectory, ".parquet": parquet}[name](path)
    return path.read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from([".traj", ".parquet", ".jsonl"]))
def test_damaged_tables_and_trajectories(data: st.DataObject, name: str, tmp_path: Path) -> None:
    good = lines().encode() if name == ".jsonl" else binary(name, tmp_path)
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged)))
        damaged[at : at + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=12))
    path = tmp_path / f"bad{name}"
    path.write_bytes(damaged)
    _, error = attempt(path, "bad")  # any other exception is a defect
    assert error is None or (error.file == "bad" and error.remedy)
