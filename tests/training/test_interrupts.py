"""Signals end a run with their exit code and a line on how to go on; SLURM's gives it a place in the queue."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blip_ft.cli import main
from blip_ft.training.run_folder import read_record

from .test_resume import PATHWISE, differences, prepare

Capture = pytest.CaptureFixture[str]

PLACES = {
    "prepared": "blip_ft.data.batch.ledger:Ledger._predict",
    "a step": "blip_ft.training.module:FineTuneModule.training_step",
    "a validation": "blip_ft.training.module:FineTuneModule.validation_step",
    "rows": "blip_ft.closed_form.gradients:GradientRows._fill",
    "predictions": "blip_ft.training.evaluate:predict_set",
    "writing": "blip_ft.training.fit:save_model",
}


def send_at(place: str, number: int, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a signal at the n-th call of a function, which then does its work."""
    module, _, path = PLACES[place].partition(":")
    owner: Any = importlib.import_module(module)
    *owners, name = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), 0

    def sending(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, sending)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("signals")
    recipe = prepare(folder, PATHWISE)
    assert main(["fit", str(recipe), "name=whole"]) == 0
    return folder


@pytest.mark.parametrize(
    ("place", "number", "code"),
    [(place, signal.SIGTERM, 143) for place in PLACES]
    + [("a step", signal.SIGINT, 130), ("rows", signal.SIGINT, 130)],
)
def test_the_exit_code_and_the_way_on(
    place: str,
    number: int,
    code: int,
    made: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = made / "runs" / tmp_path.name.replace("[", "").replace("]", "")
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        send_at(place, number, {"writing": 1, "prepared": 1, "rows": 2}.get(place, 6), patch)
        assert main(["fit", str(made / "recipe.yaml"), f"name={run.name}"]) == code
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    message = " ".join(capsys.readouterr().err.split())
    assert f"{signal.Signals(number).name}: ended; what is done is kept in {run}" in message
    assert f"blip-finetune resume {run}" in message
    assert main(["resume", str(run)]) == 0
    if place == "a step":  # the last of an epoch: it is finished, and what it led to is kept
        assert "going on after 2 epochs and 0 batches" in capsys.readouterr().err
    assert differences(made / "runs/whole", run) == []


def test_slurm_starts_the_job_again(
    made: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGUSR1 asks for a new start, whose command is the same and goes on; the working directory stays clean."""
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for key, value in {
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "fit",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }.items():
        monkeypatch.setenv(key, value)
    command = ["fit", str(made / "recipe.yaml"), "name=queued"]
    run = made / "runs/queued"
    for call in (5, 9):
        with monkeypatch.context() as patch:
            send_at("a step", signal.SIGUSR1, call, patch)
            assert main(command) == 128 + signal.SIGUSR1
    assert (tmp_path / "asked").read_text() == 2 * "requeue 4711\n"
    assert "SLURM starts job 4711 again" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "seed=5"]) == 2  # another run of this name
    assert main(command) == 0
    assert differences(made / "runs/whole", run) == []
    assert main(command) == 0  # started again once more
    assert "this run is whole" in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    assert main(command) == 2  # another job
    record = read_record(run)
    assert record is not None
    assert record["job"] == "4711"


@pytest.mark.parametrize("answer", ["missing", "refused"])
def test_slurm_that_does_not_answer(answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from blip_ft.system.signals import requeue

    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("PATH", str(tmp_path))
    if answer == "refused":
        (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'Requeue disabled' >&2\nexit 1\n")
        (tmp_path / "scontrol").chmod(0o755)
    said = requeue()
    assert "10_2" in said
    assert ("Requeue disabled" in said) == (answer == "refused")


@pytest.mark.default
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_program_that_is_ended(number: int, code: int, made: Path, tmp_path: Path) -> None:
    """From outside, as schedulers and terminals do it."""
    run = made / "runs" / f"outside{number}"
    command = [sys.executable, "-m", "blip_ft.cli", "fit", str(made / "recipe.yaml"), f"name={run.name}"]
    options = ["trainer.max_epochs=10000", "plain={}"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, cwd=tmp_path) as program:
        assert program.stderr is not None
        for line in program.stderr:
            if line.startswith("epoch 3/"):
                program.send_signal(number)
                break
        rest = program.stderr.read()
        assert program.wait(60) == code
    assert "Traceback" not in rest
    assert f"blip-finetune resume {run}" in " ".join(rest.split())
    assert (run / "pieces/epochs.json").exists()
    assert list(tmp_path.iterdir()) == []
