"""What the stages of a run leave, so that a run that was ended goes on from the last whole piece.

A piece is a file in ``pieces/`` and a line about it in ``<name>.json``: its checksum and what belongs to it. Both are
written to a temporary name and renamed, the file first and under a new name: whenever the program ends, the JSON speaks
of a file that is whole. A piece whose file is missing, cut or edited is no piece, and is made again.

=======================  =====================================================================================
piece                    content
=======================  =====================================================================================
``pretrained``           what the pretrained model says about the frames; fingerprints of these
``plain-epochs``         Lightning's checkpoint of the plain training, the latest two
``plain``                mean after the plain training, its history
``epochs``               Lightning's checkpoint of the training, the latest two
``posterior-in-epochs``  mean and posterior after the closed form that is fitted in mid-training
``trained``              mean and spread of the best epoch, history
``mean-steps``           mean after each Gauss-Newton step of the last fit
``posterior``            the trained model: mean, posterior, feature distances
``predictions-...``      predictions of one model for some frames of one set
=======================  =====================================================================================

Tensors are safetensors, Lightning's checkpoints torch files that are read with ``weights_only``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip_ft.errors import BlipError, CheckpointError
from blip_ft.files import remedy_of, whole_file
from blip_ft.potential.checkpoint import sha256
from blip_ft.potential.checks import check_seal, sealed

#: folder of the pieces, inside that of the run
FOLDER = "pieces"
#: share of the time so far that pieces of a stage which is not at its end may take
SHARE = 0.02


class Pieces:
    """The pieces of one run.

    Args:
        run: its folder.
        console: where a piece that is not whole, or cannot be written, is told.
        writes: whether this process keeps pieces; the first of several ranks does.
    """

    def __init__(self, run: Path, console: Console, *, writes: bool = True) -> None:
        self.folder, self.console, self.writes = run / FOLDER, console, writes
        self._start = time.monotonic()
        self._spent = self._longest = 0.0
        self._warned: set[str] = set()

    # ---- reading ---------------------------------------------------------------------------
    def file(self, name: str) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole file of a piece, and what belongs to it; ``None`` if there is none."""
        listed = self._listed(name)
        for entry in listed:
            path = self.folder / entry["file"]
            try:
                if sha256(path) == entry["sha256"]:
                    return path, entry["about"]
                problem = "was cut or changed"
            except OSError as error:
                problem = f"cannot be read ({error.strerror})"
            self._say(f"{path} {problem}: this part of the work is done again")
        return None

    def tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors of a piece, and what belongs to them; ``None`` if it is not whole."""
        found = self.file(name)
        if found is None:
            return None
        try:
            return load_file(found[0]), found[1]
        except (OSError, SafetensorError) as error:
            self._say(f"{found[0]} cannot be read ({error}): this part of the work is done again")
            return None

    def _listed(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / f"{name}.json"
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            check_seal(meta, path)
            return list(meta["files"])
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError):
            self._say(f"{path} was cut or changed: this part of the work is done again")
            return []

    # ---- writing ---------------------------------------------------------------------------
    def keep_tensors(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Keep tensors; a disk that cannot take them is told once, and the run goes on."""
        if self.writes:  # clone: tied weights share memory, which safetensors refuses
            own = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
            self.keep(name, ".safetensors", lambda path: save_file(own, path), about)

    def keep(
        self,
        name: str,
        suffix: str,
        write: Callable[[Path], object],
        about: Mapping[str, Any],
        *,
        latest: int = 1,
        any_rank: bool = False,
    ) -> None:
        """Keep a file.

        Args:
            name: of the piece.
            suffix: ending of the file.
            write: writes it at the path that it is given.
            about: what belongs to it, as JSON has it.
            latest: how many are kept, this one included.
            any_rank: no two ranks keep a piece of this name, and each may.
        """
        if not (self.writes or any_rank):
            return
        started = time.monotonic()
        temporary = self.folder / f".{name}.{os.getpid()}.part{suffix}"
        try:
            self.folder.mkdir(exist_ok=True)
            before = self._listed(name)
            number = 1 + max(
                (int(m[1]) for e in before if (m := re.search(r"-(\d+)\.", e["file"]))), default=0
            )
            write(temporary)
            path = self.folder / f"{name}-{number}{suffix}"
            entry = {"file": path.name, "sha256": sha256(temporary), "about": dict(about)}
            temporary.replace(path)
            kept = [entry, *before][:latest]
            with whole_file(self.folder / f"{name}.json") as file:
                json.dump(sealed({"files": kept}), file)
            self._remove(e["file"] for e in before if e not in kept)
        except (
            OSError,
            SafetensorError,
            RuntimeError,
            BlipError,
        ) as error:  # torch's own writer raises RuntimeError
            why = remedy_of(error) if isinstance(error, OSError) else "free disk space"
            self._say(
                f"{self.folder / name} cannot be kept ({error.problem if isinstance(error, BlipError) else error}): "
                f"if the run is ended now, it goes on from an earlier place. {why}",
                once="keep",
            )
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        took = time.monotonic() - started
        self._spent += took
        self._longest = max(self._longest, took)

    def affordable(self) -> bool:
        """Whether a piece in mid-stage would take no more than its share of the time."""
        return self._spent + self._longest <= SHARE * (time.monotonic() - self._start)

    def forget(self, name: str) -> None:
        """Remove a piece."""
        if self.writes:
            listed = self._listed(name)
            (self.folder / f"{name}.json").unlink(missing_ok=True)
            self._remove(entry["file"] for entry in listed)

    def clear(self) -> None:
        """Remove all pieces."""
        if self.writes:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _remove(self, names: Any) -> None:
        for name in names:
            with suppress(OSError):
                (self.folder / name).unlink(missing_ok=True)

    def _say(self, text: str, once: str | None = None) -> None:
        if (once or text) not in self._warned:
            self._warned.add(once or text)
            self.console.print(text, style="yellow", markup=False, soft_wrap=True)
