"""Calculations that did not converge, as their own files tell.

ASE's readers drop what a program says about convergence, so OUTCAR and vasprun.xml are looked at once
more beside them, one flag for each ionic step:

OUTCAR        a line says that EDIFF was not reached, or (VASP 5) no line says that it was and the last
              electronic step is the NELM-th
vasprun.xml   as many electronic steps as NELM allows (what pymatgen goes by)

An ORCA energy that is not a number, and a step of Quantum ESPRESSO with forces and without a final energy,
are those readers' way to say so; elsewhere a value such as ``scf_converged`` that is false.
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
_FALSE = frozenset({"f", "false", "no", "0"})


def steps(path: Path, kind: str) -> Iterator[bool]:
    """For each frame that ASE reads of a file whether it converged; True where nothing is said.

    Args:
        path: the file, compressed or not.
        kind: ASE's name of the format.
    """
    reader = {"vasp-out": _outcar, "vasp-xml": _vasprun}.get(kind)
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
