"""The folder of a run: made at once, held by one program, replaced only by a whole run.

``run.json`` makes a folder a run: its recipe, where and by whom it was begun, and whether it is whole. With
``overwrite=true`` the earlier run of the name stays until the new one, in ``NAME.new`` beside it, is whole;
then the two change places. What is no run is never removed.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip_ft.config import Recipe
from blip_ft.errors import BlipError, CheckpointError, RecipeError
from blip_ft.files import WRITING, check_unused, remedy_of, sole_writer, whole_file
from blip_ft.potential.checkpoint import META, require_space
from blip_ft.potential.checks import check_seal, sealed

#: what a folder has that is a run
RECORD = "run.json"
#: a run of an earlier version has one of these
EARLIER = ("receipt.json", f"model/{META}", "metrics.csv")
#: ending of the folder of a run that is to replace another, and of one that is being replaced
NEW, OLD = ".new", ".old"
#: disk space that a run may take, bytes
RUN_BYTES = 300_000_000
#: names the folder to the further ranks that Lightning starts on this machine
VARIABLE = "BLIP_FT_RUN"
#: seconds in which the first rank makes the folder
PATIENCE = 300.0


@dataclass
class RunFolder:
    """A run that is being written.

    Attributes:
        final: its folder once it is whole.
        folder: its folder now.
        record: content of ``run.json``.
        begun: whether training has begun: an error before leaves nothing.
        made: folders that were made for it, the outermost first.
    """

    final: Path
    folder: Path
    record: dict[str, Any]
    begun: bool = False
    made: list[Path] = field(default_factory=list)

    @property
    def recipe(self) -> Recipe:
        """With which it was begun."""
        return Recipe.model_validate(self.record["recipe"])

    @property
    def whole(self) -> bool:
        """Whether everything has been written."""
        return bool(self.record["state"] == "whole")

    def write_record(self, **changes: Any) -> None:
        """Write ``run.json``.

        Raises:
            BlipError: it cannot be written.
        """
        self.record = sealed(self.record | changes)
        with whole_file(self.folder / RECORD) as file:
            json.dump(self.record, file, indent=1)

    def finish(self) -> None:
        """Let a whole run take the place of the one that it replaces.

        Raises:
            BlipError: a folder cannot be renamed; nothing is lost, and ``resume`` ends it.
        """
        if self.folder == self.final:
            return
        old = self.final.with_name(self.final.name + OLD)
        try:
            if self.final.exists():
                check_is_run(self.final)
                check_unused(self.final)
                if old.exists():
                    check_is_run(old)
                    shutil.rmtree(old)
                self.final.rename(old)
            self.folder.rename(self.final)
            (self.final / WRITING).unlink(missing_ok=True)  # the lock has gone along
            if old.exists():
                check_is_run(old)
                shutil.rmtree(old)
        except OSError as error:
            raise BlipError(
                f"the whole run in {self.folder} cannot take the place of the earlier one: {error}",
                file=self.final,
                remedy=f"{remedy_of(error)}; then blip-finetune resume {self.final}",
            ) from error
        self.folder = self.final

    def take_back(self) -> None:
        """Remove what :func:`new_run` has made."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in reversed(self.made):
            with suppress(OSError):  # another run may have come into it
                path.rmdir()


@contextmanager
def new_run(recipe: Recipe) -> Iterator[RunFolder]:
    """Make the folder of a run and hold it; an error before training begins removes it again.

    Raises:
        RecipeError: a run of this name exists, or something that is no run.
        BlipError: another program writes there, or it cannot be made.
    """
    final, folder = recipe.folder, place_of(recipe)
    require_space(folder, RUN_BYTES)
    made = [p for p in reversed(folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise exists(folder, "a run of this name exists already") from error
    except OSError as error:
        raise BlipError(f"cannot write the run: {error}", file=folder, remedy=remedy_of(error)) from error
    run = RunFolder(final, folder, first_record(recipe, final if folder != final else None), made=made)
    with sole_writer(folder):
        try:
            run.write_record()
            yield run
        except Exception:
            if not run.begun:
                run.take_back()
            raise


def place_of(recipe: Recipe) -> Path:
    """Where a new run is to be written; an unfinished replacement of the same name is removed.

    Raises:
        RecipeError: a run of this name exists and may not be replaced, or something that is no run.
        BlipError: another program writes there.
    """
    final = recipe.folder
    new = final.with_name(final.name + NEW)
    replaces = (read_record(new) or {}).get("replaces") == final.name
    if not os.path.lexists(final):
        if replaces:
            raise exists(final, f"{new.name} is to replace a run of this name")
        return final
    if not recipe.overwrite:
        record = read_record(final)
        raise exists(
            final,
            "a run of this name exists already",
            resumable=record is not None and record["state"] != "whole",
        )
    check_is_run(final)
    check_unused(final)
    if os.path.lexists(new):
        if not replaces:
            raise exists(new, "the new run would be written here first, and this is something else")
        check_unused(new)
        shutil.rmtree(new)
    return new


def first_record(recipe: Recipe, replaces: Path | None) -> dict[str, Any]:
    """``run.json`` at the start."""
    return {
        "format": 1,
        "state": "unfinished",
        "name": recipe.name,
        "replaces": None if replaces is None else replaces.name,
        "recipe": recipe.model_dump(mode="json"),
        "directory": str(Path.cwd()),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "started": time.time(),
        "launch": launch_of(os.environ),
    }


@contextmanager
def old_run(folder: Path) -> Iterator[RunFolder]:
    """Hold the folder of a run that was begun before, or of what is to replace it.

    Raises:
        CheckpointError: no run, or its record is damaged.
        BlipError: another program writes there.
    """
    folder, final = unfinished(folder.resolve())
    with sole_writer(folder):
        record = read_record(folder)
        if record is None:
            raise CheckpointError(
                "no run that could go on",
                file=folder,
                remedy="give the folder of a run (runs/<name>); one of an earlier version has to be trained again",
            )
        check_seal(record, folder / RECORD)
        run = RunFolder(final, folder, record, begun=True)
        if not run.whole:
            run.write_record(launch=launch_of(os.environ), host=socket.gethostname(), process=os.getpid())
        yield run


def unfinished(folder: Path) -> tuple[Path, Path]:
    """Where a run is, and where it will be: of a replacement and what it replaces either may be named."""
    if folder.name.endswith(NEW):
        final = folder.with_name(folder.name.removesuffix(NEW))
        if (read_record(folder) or {}).get("replaces") == final.name:
            return folder, final
    new = folder.with_name(folder.name + NEW)
    if (read_record(new) or {}).get("replaces") == folder.name:
        return new, folder
    return folder, folder


def read_record(folder: Path) -> dict[str, Any] | None:
    """``run.json`` of a folder; ``None`` where there is none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"state", "recipe", "replaces"} <= record.keys() else None


def check_is_run(folder: Path) -> None:
    """Raise unless a folder is a run, of this version or an earlier one, and no link to one.

    Raises:
        RecipeError: it is not.
    """
    here = folder.is_dir() and not folder.is_symlink()
    if not here or (read_record(folder) is None and not any((folder / name).exists() for name in EARLIER)):
        raise RecipeError(
            "this is no run, and only runs are replaced",
            file=folder,
            field="name",
            remedy="choose another name=..., or move it away yourself",
        )


def requeued(recipe: Recipe) -> bool:
    """Whether a run was begun by an earlier start of this SLURM job, with the same recipe."""
    job = os.environ.get("SLURM_JOB_ID")
    record = read_record(unfinished(recipe.folder)[0])
    if not job or record is None or record.get("job") != job:
        return False
    return bool(record["recipe"] == recipe.model_dump(mode="json"))


def exists(folder: Path, problem: str, *, resumable: bool = True) -> RecipeError:
    """The error for a name that is taken."""
    ways = [f"go on with it (blip-finetune resume {folder})"] if resumable else []
    ways += ["replace it (overwrite=true)", "choose another name=..."]
    return RecipeError(problem, file=folder, field="name", remedy=", or ".join(ways))


def launch_of(environment: Any) -> str:
    """What all processes of one start have in common, where something else than Lightning starts them."""
    keys = (
        "SLURM_JOB_ID",
        "SLURM_STEP_ID",
        "SLURM_RESTART_COUNT",
        "TORCHELASTIC_RUN_ID",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    return " ".join(str(environment.get(key, "")) for key in keys)


def followed(recipe: Recipe | None, folder: Path | None, seconds: float = PATIENCE) -> Path:
    """Folder of the run that the first rank has opened, for the other ranks.

    Args:
        recipe: of a new run.
        folder: that is to go on.
        seconds: to wait for it.

    Raises:
        BlipError: the first rank has not made it.
    """
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    if folder is not None:
        return unfinished(folder.resolve())[0]
    assert recipe is not None
    final, launch, end = recipe.folder, launch_of(os.environ), time.monotonic() + seconds
    while time.monotonic() < end:
        for place in (final.with_name(final.name + NEW), final):
            record = read_record(place)
            if record is not None and record.get("launch") == launch and record["state"] != "whole":
                return place
        time.sleep(0.2)
    raise BlipError(
        "the first rank has not made the folder of the run",
        file=final,
        remedy="look at its message; all nodes must see the same folder",
    )
