"""What readers say of a file that another library cannot read, and of what may have caused it."""

from __future__ import annotations

import errno
import lzma
import pickle
import zlib
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
from ase.data import atomic_numbers, chemical_symbols

from blip_ft.data.read.hub import quiet
from blip_ft.errors import DataError, first_line

#: kinds of files that are read as tables
TABLES = frozenset({"table", "parquet", "arrow", "a folder of tables", "npz"})
_ISOTOPES = {"D": "deuterium", "T": "tritium"}


def guard(read: Callable[[], Any], name: str, kind: str) -> Any:
    """``read()`` without noise; whatever a vendor's reader raises becomes a DataError."""
    try:
        with quiet():
            return read()
    except Exception as error:
        raise unreadable(name, error, kind) from error


def unreadable(name: str, error: Exception, kind: str = "", frame: int | None = None) -> DataError:
    """The error for a file that ``error`` stopped the reading of.

    Args:
        name: how the user wrote the file.
        error: what was raised.
        kind: the format it was read as.
        frame: the frame that was being read, where only that one can be meant.
    """
    if isinstance(error, DataError):
        return error
    cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
    error = cause if isinstance(cause, Exception) else error
    what = f"cannot be read as {kind}" if kind else "cannot be read"
    symbol = _unknown_symbol(error)
    problem = first_line(error) if symbol is None else f"'{symbol}' is not a chemical element"
    remedy = symbol_remedy(symbol) if symbol is not None else _remedy(error, kind, frame)
    return DataError(f"{what}: {problem}", file=name, frame=frame, remedy=remedy)


def symbol_remedy(symbol: str) -> str:
    """What to do about a text that is no chemical symbol."""
    if symbol in _ISOTOPES:
        return (
            f"write H for {_ISOTOPES[symbol]}: potentials know no masses (those of the atoms go into a "
            "column masses)"
        )
    element = symbol.rstrip("0123456789+-*_")
    close = element if element in atomic_numbers else ""
    if not close and "_" in symbol and symbol.partition("_")[0] in atomic_numbers:
        close = symbol.partition("_")[0]
    if not close:
        close = next(iter(get_close_matches(symbol.capitalize(), chemical_symbols[1:], n=1)), "")
    hint = f"did you mean '{close}'? " if close else ""
    return f"{hint}write chemical symbols; labels of sites, molecules or dummy atoms go into a column of their own"


def os_remedy(error: OSError) -> str:
    """What to do about a file that the system does not give."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return "check that you may read it"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "it is no longer there, or a link leads nowhere: check the path"
    if error.errno == errno.EISDIR:
        return "this is a folder: name the files in it, for instance by a pattern"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many files are open: raise the limit (ulimit -n) or join the files"
    return "check the disk or the network that it lies on, and that the file is whole"


def _remedy(error: Exception, kind: str, frame: int | None) -> str:
    given = getattr(error, "remedy", "")
    text = str(error)
    if given:
        return str(given)
    if isinstance(error, ImportError):
        return f"ASE reads this format with a package that is not installed: pip install {error.name or 'it'}"
    if isinstance(error, MemoryError):
        return "the file does not fit into memory: divide it, or convert it to extended XYZ"
    if isinstance(error, pickle.UnpicklingError):
        return "save it again with arrays of numbers and texts alone: Python objects are not loaded, they may run code"
    if isinstance(error, UnicodeDecodeError):
        return "it is no text in UTF-8: a packed or binary file under another name, or a text to be converted (iconv)"
    if isinstance(error, NotImplementedError):
        return "ASE does not read this kind of it: convert it to extended XYZ with the program that wrote it"
    if isinstance(error, zlib.error | EOFError | lzma.LZMAError) or "gzip" in type(error).__name__.lower():
        return "the packed file is damaged or cut short, or its ending names another packer: copy it again"
    if isinstance(error, OSError) and error.errno is not None:
        return os_remedy(error)
    if "locked" in text:
        return "another program is writing it: wait until that has finished, or copy the file"
    if "ncomplete" in text:
        return "the calculation has not come to the end of its first step, or the file is cut: look at its last lines"
    if kind in TABLES:
        return (
            "a file that is cut or of another format than its name says, or one whose columns or types are not "
            "those of the rows before: look at the row that is named, else open it with the library that wrote it"
        )
    if kind in ("db", "json", "aselmdb"):
        return (
            "a damaged file, or none that ASE's database wrote: copy it again, or export it to extended XYZ"
        )
    if frame is not None:
        before = f"; the {frame} frames before it can be read (@:{frame})" if frame else ""
        return (
            f"look at frame {frame}: a line that is cut or too long, asterisks in place of a number, another "
            f"format from there on; mend or remove it{before}"
        )
    return (
        "check that the file is whole, of the format its name says, and that no step has asterisks or texts in "
        "place of numbers"
    )


def _unknown_symbol(error: Exception) -> str | None:
    """The text that ASE looked up as a chemical symbol in vain."""
    if not isinstance(error, KeyError) or len(error.args) != 1 or not isinstance(error.args[0], str):
        return None
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = "" if last is None else Path(last.tb_frame.f_code.co_filename).name
    return error.args[0] if where in ("symbols.py", "formula.py", "atom.py", "atoms.py") else None
