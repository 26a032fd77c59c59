"""The finished batches of a prediction, kept beside its output until it is whole.

``OUT.part`` holds the text of the output as far as it is made, whole batches of whole frames;
``OUT.part.json`` one line of JSON that says what it is the prediction of, and one for each batch: frames read,
frames left out, where the batch ends in ``OUT.part`` and its SHA-256. A batch counts once its line is there, so a
program that is killed at any moment loses the batch that it was at. Whatever stands behind the last whole batch, or
was changed since, is cut off when work goes on. The last step gives ``OUT.part`` its name: nothing is copied. Both
are plain files of the folder that the next call of the program speaks of.

Outputs that end in ``.gz`` are packed batch by batch, which gzip's format allows and its readers expect.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from blip_ft.errors import BlipError
from blip_ft.files import cannot_write, hold, move_into_place

FORMAT = "blip_ft prediction, unfinished"
VERSION = 1


def part_of(target: Path) -> Path:
    """Where the text of an unfinished output stands."""
    return target.with_name(f"{target.name}.part")


def journal_of(target: Path) -> Path:
    """Where it is said what that is."""
    return target.with_name(f"{target.name}.part.json")


@dataclass
class Progress:
    """How far a prediction is.

    Attributes:
        read: frames of the input that were dealt with.
        left_out: those that could not be predicted: place and reason.
        size: bytes of the output.
    """

    read: int = 0
    left_out: list[tuple[str, str]] = field(default_factory=list)
    size: int = 0

    @property
    def written(self) -> int:
        """Frames in the output."""
        return self.read - len(self.left_out)


class KeptBatches:
    """What :func:`keep_batches` gives: append to it, then :meth:`finish`.

    Attributes:
        progress: how far it is.
        header: what the batches are the prediction of; with ``resume`` that of the kept ones.
    """

    def __init__(self, target: Path, header: Mapping[str, Any], progress: Progress, body: IO[bytes]) -> None:
        self.target, self.header, self.progress = target, dict(header), progress
        self._body = body
        self._journal: IO[str] | None = None
        self._packed = target.suffix == ".gz"

    def append(self, text: str, read: int, left_out: Sequence[tuple[str, str]]) -> None:
        """Keep one batch.

        Args:
            text: of its frames, in the output's format.
            read: frames of the input that it stands for.
            left_out: those of them that are not in ``text``.

        Raises:
            BlipError: it cannot be written; the batches before it are kept.
        """
        data = text.encode()
        if self._packed:
            data = gzip.compress(data, mtime=0) if data else b""
        now = self.progress
        try:
            self._body.write(data)
            self._body.flush()
            line = {
                "read": now.read + read,
                "left_out": [list(pair) for pair in left_out],
                "end": now.size + len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
            self._open_journal().write(json.dumps(line) + "\n")
            self._open_journal().flush()
        except OSError as error:
            raise cannot_write(self.target, error) from error
        now.read, now.size = now.read + read, now.size + len(data)
        now.left_out += left_out

    def finish(self, *, overwrite: bool) -> None:
        """Give the output its name.

        Raises:
            BlipError: it cannot be renamed, or the name is taken and is not to be replaced; the batches are kept.
        """
        try:
            self._body.close()
            move_into_place(part_of(self.target), self.target, overwrite=overwrite)
        except OSError as error:
            raise cannot_write(self.target, error) from error
        self._close_journal()
        journal_of(self.target).unlink(missing_ok=True)

    def _open_journal(self) -> IO[str]:
        """Made with the first batch, so that a prediction that fails before leaves nothing."""
        if self._journal is None:
            path = journal_of(self.target)
            new = not path.exists()
            self._journal = path.open("a", encoding="utf-8")
            if new:
                self._journal.write(json.dumps({"format": FORMAT, "version": VERSION, **self.header}) + "\n")
        return self._journal

    def _close_journal(self) -> None:
        if self._journal is not None:
            with suppress(OSError):  # what could not be written was reported when it was
                self._journal.close()
            self._journal = None

    def discard(self) -> None:
        """Leave nothing behind: what was kept is of no use."""
        self.progress.read = 0

    def close(self) -> None:
        """Leave whole batches behind, or nothing if there are none."""
        self._close_journal()
        with suppress(OSError):
            self._body.close()
        if not self.progress.read:
            for path in (part_of(self.target), journal_of(self.target)):
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            return
        part, journal = part_of(self.target), journal_of(self.target)
        if part.exists():  # what a full disk or an interrupt has cut
            with suppress(OSError, _DamagedError):
                os.truncate(part, self.progress.size)
                _header, _known, end = _read(journal, part)
                os.truncate(journal, end)


@contextmanager
def keep_batches(
    target: Path, header: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[KeptBatches]:
    """Open the kept batches of an output, those of an earlier call or none.

    Args:
        target: the output.
        header: what it is the prediction of, JSON-serialisable. A value of ``None`` is for the earlier call to say.
        resume: go on from what an earlier call has left, from the start if it has left nothing.
        overwrite: throw away what an earlier call has left.

    Raises:
        BlipError: an earlier call has left batches and neither ``resume`` nor ``overwrite`` says what to do with them;
            they belong to another model, input or option; another program is writing them; they cannot be written.
    """
    part, journal = part_of(target), journal_of(target)
    found = part.exists() and journal.exists()
    if found and not resume and not overwrite:
        raise BlipError(
            "an unfinished prediction of this name is here" + _how_far(part, journal),
            file=part,
            remedy="add --resume to go on with it, or --overwrite to start anew",
        )
    try:
        # not truncated: it may be another program's
        body = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b")
    except OSError as error:
        raise cannot_write(target, error, kept=False) from error
    with body:
        hold(body, part)
        progress, end = Progress(), 0
        given = dict(header)
        if found and resume:
            try:
                before, progress, end = _read(journal, part)
            except _DamagedError:
                before = {}  # not even the first line is whole: start anew
            _same(given, before, journal)
            given = {k: before.get(k) if v is None and before else v for k, v in given.items()}
        try:
            if journal.exists():
                if progress.read:
                    os.truncate(journal, end)
                else:
                    journal.unlink()
            body.truncate(progress.size)
            body.seek(progress.size)
        except OSError as error:
            raise cannot_write(target, error) from error
        kept = KeptBatches(target, given, progress, body)
        try:
            yield kept
        finally:
            kept.close()


def how_to_go_on(target: Path) -> str:
    """A sentence about the batches that are kept for an output; empty if there are none."""
    part, journal = part_of(target), journal_of(target)
    if not (part.exists() and journal.exists()):
        return ""
    try:
        _, progress, _ = _read(journal, part)
    except _DamagedError:
        return ""
    return f"{progress.read} structures are done and kept in {part}: the same command with --resume goes on"


class _DamagedError(Exception):
    """The first line of a journal is not there."""


def _read(journal: Path, part: Path) -> tuple[dict[str, Any], Progress, int]:
    """Header, progress up to the last batch that is whole, and where the journal's line of that batch ends."""
    try:
        lines = journal.read_bytes().splitlines(keepends=True)
        header = json.loads(lines[0])
        if header.pop("format") != FORMAT or header.pop("version") != VERSION:
            raise _DamagedError
    except (OSError, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise _DamagedError from error
    progress, end = Progress(), len(lines[0])
    with part.open("rb") as body:
        for line in lines[1:]:
            try:
                batch = json.loads(line)
                data = body.read(batch["end"] - progress.size)
                whole = hashlib.sha256(data).hexdigest() == batch["sha256"] and line.endswith(b"\n")
                read, left_out = int(batch["read"]), [(str(a), str(b)) for a, b in batch["left_out"]]
            except (ValueError, KeyError, TypeError):
                break
            if not whole:
                break
            progress.read, progress.size = read, batch["end"]
            progress.left_out += left_out
            end += len(line)
    return header, progress, end


def _same(header: Mapping[str, Any], before: Mapping[str, Any], journal: Path) -> None:
    """Raise unless kept batches are of the same model, input and options."""
    other = [k for k, v in header.items() if before and v is not None and before.get(k) != v]
    if other:
        raise BlipError(
            f"the unfinished prediction is of another {', another '.join(other)}",
            file=journal,
            remedy="give the model, input and options that it was started with, or --overwrite to start anew",
        )


def _how_far(part: Path, journal: Path) -> str:
    try:
        return f" ({_read(journal, part)[1].read} structures are done)"
    except _DamagedError:
        return ""
