"""The files of a simulation, which grow, and the state that says how much of them is whole.

====================  ==================================================================================
``OUT.extxyz``        the trajectory
``OUT.log.csv``       a line for every error bar
``OUT.saved.extxyz``  frames above the first threshold, to be labelled; there is none without such frames
``OUT.state.npz``     where the run is, to the last digit: written whole, after the others
====================  ==================================================================================

What a kill has cut, or left behind the state, is cut off when the run goes on.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np
from ase import Atoms

from blip_ft.data.write.extxyz import write_frame
from blip_ft.errors import BlipError
from blip_ft.files import cannot_write, check_target, hold, whole_path

FORMAT, VERSION = "blip_ft simulation", 1
KINDS = ("trajectory", "log", "saved")


def paths(target: Path) -> dict[str, Path]:
    """All files of a trajectory's name."""
    stem = target.name.removesuffix(target.suffix)
    return {
        "trajectory": target,
        "log": target.with_name(f"{stem}.log.csv"),
        "saved": target.with_name(f"{stem}.saved.extxyz"),
        "state": target.with_name(f"{stem}.state.npz"),
    }


def check_output(target: Path, *, resume: bool, overwrite: bool) -> bool:
    """Whether a run goes on with what is there.

    Args:
        target: the trajectory.
        resume: go on where there is a state.
        overwrite: replace what is there where there is none.

    Raises:
        BlipError: the output exists, or its folder does not; it cannot go on; it is not called ``.extxyz``.
    """
    if target.suffix not in (".xyz", ".extxyz"):
        raise BlipError(
            "trajectories are written as extended XYZ", file=target, remedy="call the output .extxyz"
        )
    state = paths(target)["state"]
    if resume and state.is_file():
        return True
    if resume and target.exists() and not overwrite:
        raise BlipError(
            "this trajectory has no state beside it, and cannot go on",
            file=target,
            remedy=f"bring {state.name} back, or start anew with --overwrite; its last frame can be the start of "
            "another run",
        )
    for path in paths(target).values():
        check_target(path, overwrite=overwrite)
    return False


class Output:
    """The files of one run, held for this program.

    Args:
        target: the trajectory.
        header: what the run is, JSON-serialisable: another one does not go on with these files.
        resume: go on where there is a state.
        overwrite: replace what is there.

    Attributes:
        state: arrays of the last whole step, ``None`` at the beginning.
        meta: what else belongs to it.

    Raises:
        BlipError: the output exists, or its folder does not; it is of another run, damaged, or written by
            another program.
    """

    def __init__(self, target: Path, header: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        found = check_output(target, resume=resume, overwrite=overwrite)
        self.paths, self.header = paths(target), json.loads(json.dumps(header))
        self.state: dict[str, np.ndarray] | None = None
        self.meta: dict[str, Any] = {}
        state = self.paths["state"]
        if found:
            self.state, self.meta = _read_state(state)
            _same(self.header, self.meta["header"], state)
        self._files: dict[str, IO[bytes]] = {}
        try:
            self._open(found=found)
        except BaseException as error:
            for file in self._files.values():
                file.close()
            if isinstance(error, OSError):
                raise cannot_write(target, error) from error
            raise

    def _open(self, *, found: bool) -> None:
        target = self.paths["trajectory"]
        self._files["trajectory"] = _opened(target)
        hold(self._files["trajectory"], target)
        for part in target.parent.glob(f".*.part.{self.paths['state'].name}"):
            part.unlink()  # of a program that was killed while it wrote
        self.sizes = dict.fromkeys(KINDS, 0) | (self.meta["sizes"] if found else {})
        self._digest = hashlib.sha256()
        self._begun = found
        if not found:  # what is to be replaced stays until there is something in its place
            return
        for kind in KINDS:
            if kind == "saved" and not self.sizes[kind]:
                self.paths[kind].unlink(missing_ok=True)
                continue
            file = self._files.setdefault(
                kind, _opened(self.paths[kind]) if kind != "trajectory" else self._files[kind]
            )
            if os.fstat(file.fileno()).st_size < self.sizes[kind]:
                raise BlipError(
                    "is shorter than its state says: it was cut or replaced",
                    file=self.paths[kind],
                    remedy="bring the file back, or start anew with --overwrite",
                )
            if kind == "trajectory":
                self._check_whole(file)
            file.truncate(self.sizes[kind])
            file.seek(self.sizes[kind])

    def _check_whole(self, file: IO[bytes]) -> None:
        """Raise unless the trajectory is what the state was written for."""
        left = self.sizes["trajectory"]
        file.seek(0)
        while left:
            chunk = file.read(min(left, 1 << 20))
            self._digest.update(chunk)
            left -= len(chunk)
        if self.state is not None and self._digest.hexdigest() != self.meta["sha256"]:
            raise BlipError(
                "is not the trajectory that its state was written for",
                file=self.paths["trajectory"],
                remedy="bring the file back, or start anew with --overwrite",
            )

    # ---- writing -----------------------------------------------------------------------------
    def frame(self, atoms: Atoms, *, saved: bool = False) -> None:
        """Append a frame to the trajectory or to the saved ones."""
        text = io.StringIO()
        write_frame(text, atoms)
        self._append("saved" if saved else "trajectory", text.getvalue())

    def line(self, values: Mapping[str, Any]) -> None:
        """Append a line to the log, whose names are those of the first one."""
        cells = [
            "" if v is None else repr(float(v)) if isinstance(v, float) else str(v) for v in values.values()
        ]
        names = "" if self.sizes["log"] else ",".join(values) + "\n"
        self._append("log", f"{names}{','.join(cells)}\n")

    def _append(self, kind: str, text: str) -> None:
        data = text.encode()
        try:
            if not self._begun:
                self._begun = True
                for old in ("state", "saved"):
                    self.paths[old].unlink(missing_ok=True)
                self._files["trajectory"].truncate(0)
            if kind not in self._files:
                self._files[kind] = _opened(self.paths[kind])
                self._files[kind].truncate(0)
            self._files[kind].write(data)
            self._files[kind].flush()
        except OSError as error:
            raise cannot_write(self.paths[kind], error) from error
        self.sizes[kind] += len(data)
        if kind == "trajectory":
            self._digest.update(data)

    def commit(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Say that all that was written so far is whole.

        Args:
            arrays: of the step.
            meta: JSON-serialisable.
        """
        self.meta = {
            "format": FORMAT,
            "version": VERSION,
            "header": self.header,
            "sizes": dict(self.sizes),
            "sha256": self._digest.hexdigest(),
            **meta,
        }
        self.state = dict(arrays)
        content: dict[str, Any] = {"meta": np.array(json.dumps(self.meta)), **arrays}
        with whole_path(self.paths["state"]) as path, path.open("xb") as file:
            np.savez(file, **content)

    def close(self) -> None:
        """Cut off what is behind the last state; where there is none, leave nothing new."""
        for kind, file in self._files.items():
            with suppress(OSError):
                if self.state is not None:
                    file.truncate(self.meta["sizes"][kind])
                empty = os.fstat(file.fileno()).st_size == 0
                file.close()
                if empty or (self.state is None and self._begun):
                    self.paths[kind].unlink(missing_ok=True)


def _read_state(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        meta = json.loads(str(arrays.pop("meta")))
        if meta["format"] != FORMAT or meta["version"] != VERSION:
            raise ValueError("another format")
        meta["header"], meta["sizes"], meta["sha256"], arrays["positions"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise BlipError(
            f"is no state of a simulation, or a damaged one ({error})",
            file=path,
            remedy="bring the file back, or start anew with --overwrite",
        ) from error
    return arrays, meta


def _same(header: Mapping[str, Any], before: Mapping[str, Any], path: Path) -> None:
    """Raise unless a state is of this run."""
    other = [k for k in header if before.get(k) != header[k] and not isinstance(header[k], dict)]
    for key, value in header.items():
        if isinstance(value, dict):
            known = before.get(key) or {}
            other += [f"{k} ({known.get(k)}, not {v})" for k, v in value.items() if known.get(k) != v]
    if other:
        raise BlipError(
            f"the trajectory is of another {', another '.join(other)}",
            file=path,
            remedy="give the model, structure and options that it was begun with, another output, or --overwrite",
        )


def _opened(path: Path) -> IO[bytes]:
    """For reading and writing, not truncated: it may be another program's."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b")
