"""The program as a whole: help, exit codes, messages, options among overrides."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blip_ft import cli
from blip_ft.backbones.registry import missing_backend
from blip_ft.cli import doctor, inspect
from blip_ft.errors import BlipError

COMMANDS = (
    "fit",
    "resume",
    "check",
    "evaluate",
    "predict",
    "export",
    "inspect",
    "doctor",
    "recipes",
    "report",
    "runs",
    "compare",
)


@pytest.mark.parametrize("argv", [["--help"], *[[c, "--help"] for c in COMMANDS]])
def test_help_is_instant(argv: list[str]):
    code = (
        "import sys\nfrom blip_ft.cli import main\n"
        f"try: main({argv!r})\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'ase', 'lightning', 'pydantic', 'rich', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: blip-finetune" in done.stdout


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert [c for c in COMMANDS if f"\n    {c} " not in out] == []


@pytest.mark.parametrize(
    "argv",
    [[], ["nonsense"], ["fit"], ["predict", "a", "b"], ["predict", "a", "b", "-o", "c", "--batch-size", "0"]],
)
def test_wrong_usage_is_exit_code_2(argv: list[str]):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2


def test_installed_program_prints_its_version():
    program = Path(sys.executable).with_name("blip-finetune")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    import blip_ft

    assert done.stdout == f"blip-finetune {blip_ft.__version__}\n"


def raising(error: BaseException) -> Callable[[Any], None]:
    def command(args: Any) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            BlipError("no [bold]way[/]", remedy="go [home]"),
            2,
            "error: no [bold]way[/]\n  What to do: go [home]\n",
        ),
        (
            missing_backend("mace", "mace"),
            2,
            "with fairchem, sevennet, orb (different e3nn).\n",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 2, "No space left on device: '/x'\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "Permission denied: '/x'\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_errors_of_the_user_are_one_message(
    monkeypatch: pytest.MonkeyPatch, call: Any, error: BaseException, code: int, text: str
):
    monkeypatch.setattr(doctor, "run", raising(error))
    got, out, err = call("doctor")
    assert (got, out) == (code, "")
    assert err.endswith(text)
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    "error", [ValueError("x"), ImportError("libgomp.so.1"), OSError(errno.EIO, "broken disk"), KeyError("x")]
)
def test_defects_keep_their_trace_back(monkeypatch: pytest.MonkeyPatch, error: Exception):
    monkeypatch.setattr(doctor, "run", raising(error))
    with pytest.raises(type(error)):
        cli.main(["doctor"])


def test_a_missing_backend_names_its_extra(monkeypatch: pytest.MonkeyPatch, call: Any):
    monkeypatch.setitem(sys.modules, "sevenn", None)
    code, out, err = call("inspect", "sevennet:7net-0")
    assert (code, out) == (2, "")
    assert "pip install 'blip-ft[sevennet]'" in err
    assert "mace" in err


def test_a_reader_that_leaves_early_causes_no_complaint():
    process = subprocess.Popen(
        [sys.executable, "-m", "blip_ft.cli", "inspect", "fake:tiny", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--trust", "model.noise=scalar", "model.dtype=float64"],
        ["model.noise=scalar", "--trust", "model.dtype=float64"],
        ["model.noise=scalar", "model.dtype=float64", "--trust"],
    ],
)
def test_options_may_stand_anywhere_among_overrides(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        inspect, "_conversion", lambda spec, overrides: seen.append((spec, overrides)) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        cli.main(["inspect", "fake:tiny", *arguments])
    ((spec, overrides),) = seen
    assert spec == "fake:tiny"
    assert set(overrides) == {"model.noise=scalar", "model.dtype=float64", "model.trust=true"}


def test_an_unknown_option_is_still_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["inspect", "fake:tiny", "a=1", "--trsut", "b=2"], ["report", "here", "there"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert "unrecognized arguments" in capsys.readouterr().err
