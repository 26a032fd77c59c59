"""Calculations that did not converge, as their own files tell.

ASE's readers drop what a program says about convergence, so these files are looked at once more beside them, one
flag for each ionic step:

OUTCAR            a line says that EDIFF was not reached, or (VASP 5) no line says that it was and the last
                  electronic step is the NELM-th
vasprun.xml       as many electronic steps as NELM allows (what pymatgen goes by)
ORCA              the energy is marked ``(... not fully converged!)``, or the last word on the SCF is that it did not
                  converge
Quantum ESPRESSO  "convergence NOT achieved": energy without its ``!``, forces only with ``scf_must_converge=.false.``

ASE gives an ORCA energy that is marked as NaN, and a step of Quantum ESPRESSO without its energy; elsewhere a
value such as ``scf_converged`` that is false says so.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
from ase.io.formats import open_with_compression

#: values that say whether the electronic structure converged
FLAGS = ("scf_converged", "electronic_converged", "converged_electronic", "dft_converged", "converged")
_DELIMITER = "FREE ENERGIE OF THE ION-ELECTRON SYSTEM"  # the end of an ionic step, for ASE too
_NELM = re.compile(r"\bNELM\s*=\s*(\d+)")
_ITERATION = re.compile(r"Iteration\s+\d+\(\s*(\d+)\)")
#: what ORCA puts beside an energy: up to version 4, which ASE knows, and since version 5, where ASE finds no number
_ORCA_MARKS = ("Wavefunction not fully converged", "SCF not fully converged")
_ORCA_ENDS = ("ORCA TERMINATED NORMALLY", "ORCA GEOMETRY RELAXATION STEP")
#: where a structure begins in an output of pw.x, and what makes ASE count it as a frame
_PW_BEGIN = ("Program PWSCF", "ATOMIC_POSITIONS")
_PW_RESULT = (
    "!    total energy",
    "Forces acting on atoms",
    "total   stress",
    "Magnetic moment per site",
    "End of self-consistent calculation",
    "End of band structure calculation",
)
_FALSE = frozenset({"f", "false", "no", "0"})


def steps(path: Path, kind: str) -> Iterator[bool]:
    """For each frame that ASE reads of a file whether it converged; True where nothing is said.

    Args:
        path: the file, compressed or not.
        kind: ASE's name of the format.
    """
    reader = {
        "vasp-out": _outcar,
        "vasp-xml": _vasprun,
        "orca-output": _orca,
        "espresso-out": _espresso,
    }.get(kind)
    return repeat(True) if reader is None else chain(reader(path), repeat(True))


def says_no(values: Mapping[str, Any], kind: str = "") -> bool:
    """Whether the values of a frame say that its calculation did not converge.

    Args:
        values: results, info and arrays.
        kind: ASE's name of the format, where it is one.
    """
    energy = values.get("energy")
    if kind == "orca-output" and isinstance(energy, float) and np.isnan(energy):
        return True
    if kind == "espresso-out" and energy is None and values.get("forces") is not None:
        return True
    return any(_is_false(values[name]) for name in FLAGS if name in values)


def _is_false(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in _FALSE
    return isinstance(value, bool | np.bool_ | int | np.integer) and not value


def _outcar(path: Path) -> Iterator[bool]:
    most, last, word = 0, 0, ""
    with open_with_compression(str(path), "rt") as file:
        for line in file:
            if _DELIMITER in line:
                yield word == "reached" or (word == "" and not 1 < most <= last)
                last, word = 0, ""
            elif "Iteration" in line and (found := _ITERATION.search(line)):
                last = int(found[1])
            elif "aborting loop" in line:
                word = "not" if "not reached" in line or "hard stop" in line else "reached"
            elif not most and "NELM" in line and (found := _NELM.search(line)):
                most = int(found[1])


def _vasprun(path: Path) -> Iterator[bool]:
    most = 0
    try:
        with open_with_compression(str(path), "rb") as file:
            for _, element in ET.iterparse(file):
                if element.tag == "i" and element.get("name") == "NELM":
                    most = int((element.text or "0").strip())
                elif element.tag == "calculation":
                    yield not 1 < most <= len(element.findall("scstep"))
                    element.clear()
    except (ET.ParseError, ValueError):  # cut short: ASE reads the steps before
        return


def orca_text(path: Path) -> str:
    """An ORCA output with the mark of unconverged energies that ASE knows."""
    with open_with_compression(str(path), "rt") as file:
        text: str = file.read()
    return text.replace(_ORCA_MARKS[1], _ORCA_MARKS[0])


def _orca(path: Path) -> Iterator[bool]:
    good = True
    with open_with_compression(str(path), "rt") as file:
        for line in file:
            if "SCF CONVERGED AFTER" in line or "SCF NOT CONVERGED AFTER" in line:
                good = "NOT" not in line
            elif "FINAL SINGLE POINT ENERGY" in line and any(mark in line for mark in _ORCA_MARKS):
                good = False
            if any(end in line for end in _ORCA_ENDS):
                yield good
                good = True


def _espresso(path: Path) -> Iterator[bool]:
    good, frame = True, False
    with open_with_compression(str(path), "rt") as file:
        for line in file:
            if any(word in line for word in _PW_BEGIN):
                if frame:
                    yield good
                good, frame = True, False
            elif "convergence NOT achieved" in line:
                good = False
            elif not frame:
                frame = any(word in line for word in _PW_RESULT)
    if frame:
        yield good
