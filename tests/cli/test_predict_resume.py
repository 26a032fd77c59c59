"""``predict`` that is stopped and goes on: what is kept, what is made again, what is left out."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.io import read, write

from blip_ft.cli import predict_file as module
from blip_ft.system.signals import Stopped

from .structures import leftovers, structure

#: runs the command in a process that is killed, or cannot write, at some batch
PROGRAM = """
import os, resource, signal, sys
from blip_ft import cli
from blip_ft.cli import predict_file
what, after = sys.argv[1], int(sys.argv[2])
calls, predict_atoms = 0, predict_file.predict_atoms
def counted(*args, **options):
    global calls
    calls += 1
    if calls > after:
        if what == "FULL":
            resource.setrlimit(resource.RLIMIT_FSIZE, (after, after))
        else:
            os.kill(os.getpid(), getattr(signal, what))
    return predict_atoms(*args, **options)
if what != "NONE":
    predict_file.predict_atoms = counted
if what == "FULL":
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, after))
    after = 10**9
sys.exit(cli.main(sys.argv[3:]))
"""


def process(what: str, after: int, *argv: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: exit code, standard output, standard error."""
    arguments = [sys.executable, "-c", PROGRAM, what, str(after), *(str(a) for a in argv)]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Eleven structures of 6 to 12 atoms, three of them molecules."""
    some = [structure(seed=i, periodic=i % 4 != 3) for i in range(11)]
    some[5] = some[5] * (2, 1, 1)
    write(tmp_path / "in.extxyz", some)
    return tmp_path / "in.extxyz"


@pytest.fixture(params=["out.extxyz", "out.extxyz.gz"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int, error: BaseException) -> None:
    """Let the model fail in every batch behind some."""
    calls, predict_atoms = 0, module.predict_atoms

    def failing(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > batches:
            raise error
        return predict_atoms(*args, **options)

    monkeypatch.setattr(module, "predict_atoms", failing)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [(KeyboardInterrupt(), 130, "interrupted"), (Stopped(signal.SIGTERM), 143, "SIGTERM: ended")],
)
def test_what_is_stopped_goes_on_to_the_same_file(
    monkeypatch: pytest.MonkeyPatch,
    call: Any,
    run: Path,
    many: Path,
    target: Path,
    error: Any,
    code: int,
    text: str,
):
    options = ("predict", run, many, "-o", target, "--batch-size", "2")
    assert call(*options)[0] == 0
    whole = target.read_bytes()
    target.unlink()
    for batches in (1, 2, 1):  # stopped three times
        with monkeypatch.context() as patch:
            stop_after(patch, batches, error)
            got, out, err = call(*options, "--resume")
        assert (got, out) == (code, "")
        assert text in err
        assert "--resume goes on" in err
    assert "8 structures are done and kept in" in err
    got, out, _ = call(*options, "--resume")
    assert (got, out) == (0, f"{target}: 11 structures\n")
    assert target.read_bytes() == whole
    assert leftovers(target.parent) == ["in.extxyz", target.name]


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -9), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal(run: Path, many: Path, tmp_path: Path, name: str, code: int):
    target = tmp_path / "out.extxyz"
    options = ("predict", run, many, "-o", target, "--batch-size", "3")
    stopped = process(name, 2, *options)
    assert stopped.returncode == code, stopped.stderr
    assert leftovers(tmp_path) == ["in.extxyz", "out.extxyz.part", "out.extxyz.part.json"]
    assert len(read(tmp_path / "out.extxyz.part", ":", format="extxyz")) == 6
    if name != "SIGKILL":
        assert "6 structures are done and kept in" in stopped.stderr
    again = process("NONE", 0, *options, "--resume")
    assert again.returncode == 0, again.stderr
    resumed = target.read_bytes()
    target.unlink()
    assert process("NONE", 0, *options).returncode == 0
    assert target.read_bytes() == resumed
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_full_disk_keeps_what_is_whole(run: Path, many: Path, tmp_path: Path):
    """A limit on the size of files cuts a write as a full disk does."""
    target = tmp_path / "out.extxyz"
    options = ("predict", run, many, "-o", target, "--batch-size", "2")
    limit = 6000
    stopped = process("FULL", limit, *options)
    assert stopped.returncode == 2
    assert "cannot write" in stopped.stderr
    assert "--resume goes on" in stopped.stderr
    kept = read(tmp_path / "out.extxyz.part", ":", format="extxyz")
    assert 0 < len(kept) < 11
    assert len(kept) % 2 == 0
    assert (tmp_path / "out.extxyz.part").stat().st_size <= limit
    assert process("NONE", 0, *options, "--resume").returncode == 0
    assert len(read(target, ":")) == 11
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != limit


def test_a_disk_full_from_the_start_leaves_nothing(run: Path, many: Path, tmp_path: Path):
    stopped = process("FULL", 100, "predict", run, many, "-o", tmp_path / "out.extxyz")
    assert stopped.returncode == 2
    assert "cannot write" in stopped.stderr
    assert leftovers(tmp_path) == ["in.extxyz"]


def half_of(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def edited(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def longer(path: Path) -> None:
    with path.open("a") as file:
        file.write("6\nnot whole")


@pytest.mark.parametrize("damage", [half_of, edited, longer])
@pytest.mark.parametrize("name", ["out.extxyz.part", "out.extxyz.part.json"])
def test_damaged_batches_are_made_again(
    monkeypatch: pytest.MonkeyPatch, call: Any, run: Path, many: Path, tmp_path: Path, name: str, damage: Any
):
    target = tmp_path / "out.extxyz"
    options = ("predict", run, many, "-o", target, "--batch-size", "2")
    assert call(*options)[0] == 0
    whole = target.read_bytes()
    target.unlink()
    with monkeypatch.context() as patch:
        stop_after(patch, 4, KeyboardInterrupt())
        call(*options)
    damage(tmp_path / name)
    assert call(*options, "--resume")[:2] == (0, f"{target}: 11 structures\n")
    assert target.read_bytes() == whole


def test_an_unfinished_prediction_is_not_replaced_in_silence(
    monkeypatch: pytest.MonkeyPatch, call: Any, run: Path, pathwise: Path, many: Path, tmp_path: Path
):
    target = tmp_path / "out.extxyz"
    options = ("-o", target, "--batch-size", "2")
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        call("predict", run, many, *options)
    kept = (tmp_path / "out.extxyz.part").read_bytes()
    code, _, err = call("predict", run, many, *options)
    assert code == 2
    assert "4 structures are done" in err
    assert "--resume" in err
    assert "--overwrite" in err
    other = tmp_path / "other.extxyz"
    write(other, read(many, "1:"))
    for argv, what in (
        ((pathwise, many, *options), "another model"),
        ((run, other, *options), "another input"),
        ((run, f"{many}@1:", *options), "another input"),
        ((run, many, *options, "--draws", "2"), "another number of draws"),
        ((run, many, *options, "--method", "energy"), "another method"),
        ((run, many, *options, "--dtype", "float32"), "another model"),
        ((run, many, *options, "--batch-atoms", "30"), "another batch_atoms"),
        ((run, many, "-o", target), "another batch_size"),
    ):
        code, _, err = call("predict", *argv, "--resume")
        assert code == 2, argv
        assert what in err
    assert (tmp_path / "out.extxyz.part").read_bytes() == kept
    assert call("predict", run, many, *options, "--overwrite")[0] == 0
    assert leftovers(tmp_path) == ["in.extxyz", "other.extxyz", "out.extxyz"]


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_two_programs_do_not_write_one_output(call: Any, run: Path, many: Path, tmp_path: Path):
    import fcntl

    with (tmp_path / "out.extxyz.part").open("wb") as other:
        other.write(b"of another program")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        code, _, err = call("predict", run, many, "-o", tmp_path / "out.extxyz", "--resume")
    assert code == 2
    assert "another program is writing" in err
    assert (tmp_path / "out.extxyz.part").read_bytes() == b"of another program"


# ---- frames that cannot be predicted -----------------------------------------------------------


def poisoned(path: Path) -> list[Atoms]:
    """Frames 1, 4, 5 and 8 cannot be predicted, each for a reason of its own; returns the others."""
    frames = [structure(seed=i) for i in range(9)]
    frames[1].numbers[0] = 79
    frames[4].positions[0, 0] = np.nan
    frames[8].positions[1] = frames[8].positions[0]
    write(path, frames)
    lines = path.read_text().splitlines(keepends=True)
    lines[5 * 8 + 3] = "Si 0.0 zero 0.0\n"
    path.write_text("".join(lines))
    return [a for i, a in enumerate(frames) if i not in (1, 4, 5, 8)]


@pytest.mark.parametrize("size", ["1", "3", "16"])
def test_bad_frames_are_left_out_and_listed(call: Any, run: Path, tmp_path: Path, size: str):
    good = poisoned(tmp_path / "in.xyz")
    options = ("predict", run, tmp_path / "in.xyz", "-o", tmp_path / "out.xyz", "--batch-size", size)
    code, out, err = call(*options, "--skip-bad")
    assert (code, out) == (3, f"{tmp_path / 'out.xyz'}: 5 structures, 4 left out\n")
    for number, reason in ((1, "element Au"), (4, "NaN"), (5, ""), (8, "not finite")):
        (line,) = [text for text in err.splitlines() if f"in.xyz, frame {number}: " in text]
        assert reason in line
    for before, after in zip(good, read(tmp_path / "out.xyz", ":"), strict=True):
        np.testing.assert_allclose(after.positions, before.positions, atol=1e-7)
        assert np.isfinite(after.get_forces()).all()


def test_a_prediction_stopped_by_a_bad_frame_goes_on_without_it(call: Any, run: Path, tmp_path: Path):
    poisoned(tmp_path / "in.xyz")
    options = ("predict", run, tmp_path / "in.xyz", "--batch-size", "1", "-o")
    code, _, err = call(*options, tmp_path / "out.xyz")
    assert code == 2
    assert "frame 1" in err
    assert "1 structures are done and kept" in err
    assert call(*options, tmp_path / "out.xyz", "--resume", "--skip-bad")[0] == 3
    assert call(*options, tmp_path / "whole.xyz", "--skip-bad")[0] == 3
    assert (tmp_path / "out.xyz").read_bytes() == (tmp_path / "whole.xyz").read_bytes()


def test_numbers_are_those_of_the_input_with_a_selector(call: Any, run: Path, tmp_path: Path):
    poisoned(tmp_path / "in.xyz")
    out = tmp_path / "out.xyz"
    code, text, err = call("predict", run, f"{tmp_path / 'in.xyz'}@3:7", "-o", out, "--skip-bad")
    assert (code, text) == (3, f"{out}: 2 structures, 2 left out\n")
    assert "frame 4: " in err
    assert "frame 5: " in err


def test_no_good_frame_is_an_error(call: Any, run: Path, tmp_path: Path):
    gold = structure()
    gold.numbers[:] = 79
    write(tmp_path / "in.xyz", [gold, gold])
    code, _, err = call(
        "predict", run, tmp_path / "in.xyz", "-o", tmp_path / "out.xyz", "--skip-bad", "--batch-size", "1"
    )
    assert code == 2
    assert "no frame can be predicted" in err
    assert leftovers(tmp_path) == ["in.xyz"]


# ---- logs and pipes ----------------------------------------------------------------------------


def test_a_line_a_minute_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, call: Any, run: Path, many: Path, tmp_path: Path
):
    from blip_ft.cli import predict_progress

    now = iter(range(0, 10**6, 25))  # every look at the clock is 25 s later
    monkeypatch.setattr(predict_progress.time, "monotonic", lambda: float(next(now)))
    options = ("predict", run, many, "-o", tmp_path / "out.extxyz", "--batch-size", "1")
    _, _, err = call(*options)
    lines = [text for text in err.splitlines() if text.startswith("predicting")]
    assert lines == [
        "predicting: 3/11 structures, 3 min 20 s left",
        "predicting: 6/11 structures, 2 min 05 s left",
        "predicting: 9/11 structures, 50 s left",
    ]


def test_structures_of_an_earlier_call_took_no_time():
    from blip_ft.cli.predict_progress import line

    assert line(90, 100, 80, 60.0) == "predicting: 90/100 structures, 1 min 00 s left"
    assert line(90, None, 80, 60.0) == "predicting: 90 structures, 0.167 per second"
    assert line(100, 10100, 0, 72.0) == "predicting: 100/10100 structures, 2 h 00 min left"


@pytest.mark.parametrize(("closed", "code"), [("stderr", 0), ("stdout", 1)])
def test_a_reader_that_leaves_stops_no_prediction(
    run: Path, many: Path, tmp_path: Path, closed: str, code: int
):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    argv = ["predict", str(run), str(many), "-o", str(tmp_path / "out.extxyz")]
    with subprocess.Popen([sys.executable, "-m", "blip_ft.cli", *argv], **pipes) as child:  # type: ignore[call-overload]
        getattr(child, closed).close()
        child.wait(timeout=300)
    assert child.returncode == code
    assert len(read(tmp_path / "out.extxyz", ":")) == 11
    assert leftovers(tmp_path) == ["in.extxyz", "out.extxyz"]


def test_the_journal_says_what_the_part_is_of(
    monkeypatch: pytest.MonkeyPatch, call: Any, run: Path, many: Path, tmp_path: Path
):
    with monkeypatch.context() as patch:
        stop_after(patch, 1, KeyboardInterrupt())
        call("predict", run, many, "-o", tmp_path / "out.extxyz", "--batch-size", "2")
    first = json.loads((tmp_path / "out.extxyz.part.json").read_text().splitlines()[0])
    assert first["method"] == "draws"
    assert first["batch_size"] == 2
    assert len(first["model"]) == len(first["input"]) == 64
