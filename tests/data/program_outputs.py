"""Output files of ORCA and Quantum ESPRESSO as these programs write them, shortened to what readers look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RULE = "-" * 30


def orca(
    energies: Sequence[float], *, failed: Sequence[int] = (), note: str = "SCF not fully converged!"
) -> str:
    """An optimisation of water: a gradient in each step, and a last evaluation at the stationary point.

    Args:
        energies: of each step, Hartree.
        failed: steps whose SCF did not converge within its limit, and that went on all the same.
        note: what the program puts behind the energy then (up to version 4 ``Wavefunction not fully converged!``).
    """
    lines = [
        "                                 *****************",
        "                                 * O   R   C   A *",
        "                                 *****************",
        "                         Program Version 5.0.3 -  RELEASE  -",
        "",
        "Number of atoms                         ....  3",
    ]
    for step, energy in enumerate(energies):
        last = step == len(energies) - 1
        lines += [
            "         *************************************************************",
            "         *      FINAL ENERGY EVALUATION AT THE STATIONARY POINT       *"
            if last
            else f"         *                GEOMETRY OPTIMIZATION CYCLE {step + 1:3d}            *",
            "         *************************************************************",
            "---------------------------------",
            "CARTESIAN COORDINATES (ANGSTROEM)",
            "---------------------------------",
            f"  O      0.000000    0.000000    {0.119262 + 0.01 * step:.6f}",
            "  H      0.000000    0.763239   -0.477047",
            "  H      0.000000   -0.763239   -0.477047",
            "",
            "Number of atoms                         ....  3",
            "--------------",
            "SCF ITERATIONS",
            "--------------",
            "ITER       Energy         Delta-E        Max-DP      RMS-DP      [F,P]     Damp",
            f"  0    {energy + 0.1:.10f}   0.000000000000 0.04  0.001  0.04 0.7000",
        ]
        if step in failed:
            lines += [
                "               *****************************************************",
                "               *                     ERROR                         *",
                "               *           SCF NOT CONVERGED AFTER   8 CYCLES      *",
                "               *****************************************************",
            ]
        else:
            lines += [
                "               *****************************************************",
                "               *                     SUCCESS                       *",
                "               *           SCF CONVERGED AFTER   7 CYCLES          *",
                "               *****************************************************",
            ]
        behind = f" ({note})" if step in failed else ""
        lines += [
            "-------------------------   --------------------",
            f"FINAL SINGLE POINT ENERGY      {energy:.12f}{behind}",
            "-------------------------   --------------------",
        ]
        if not last:
            lines += [
                "                         ORCA SCF GRADIENT CALCULATION",
                "------------------",
                "CARTESIAN GRADIENT",
                "------------------",
                "",
                f"   1   O   :    0.000000000    0.000000000   {0.01 * (step + 1):.9f}",
                f"   2   H   :    0.000000000    0.003000000   {-0.005 * (step + 1):.9f}",
                f"   3   H   :    0.000000000   -0.003000000   {-0.005 * (step + 1):.9f}",
                "",
                "Difference to translation invariance:",
                f"{RULE}{RULE}",
                "                         ORCA GEOMETRY RELAXATION STEP",
                f"{RULE}{RULE}",
            ]
            if step == len(energies) - 2:
                lines.append("                    ***        THE OPTIMIZATION HAS CONVERGED     ***")
    lines += ["", "                             ****ORCA TERMINATED NORMALLY****", ""]
    return "\n".join(lines)


def espresso(energies: Sequence[float], *, failed: Sequence[int] = (), forces: bool = True) -> str:
    """Molecular dynamics of silicon with ``scf_must_converge = .false.``: without convergence no energy has its mark.

    Args:
        energies: of each step, Ry.
        failed: steps whose SCF did not converge.
        forces: the steps that failed have forces and stress all the same.
    """
    lines = [
        "",
        "     Program PWSCF v.7.2 starts on 10Nov2026 at 10: 0: 0 ",
        "",
        "     bravais-lattice index     =            0",
        "     lattice parameter (alat)  =      10.2000  a.u.",
        "     number of atoms/cell      =            2",
        "     number of atomic types    =            1",
        "     celldm(1)=  10.200000  celldm(2)=   0.000000  celldm(3)=   0.000000",
        "",
        "     crystal axes: (cart. coord. in units of alat)",
        "               a(1) = (  -0.500000   0.000000   0.500000 )  ",
        "               a(2) = (   0.000000   0.500000   0.500000 )  ",
        "               a(3) = (  -0.500000   0.500000   0.000000 )  ",
        "",
        "   Cartesian axes",
        "",
        "     site n.     atom                  positions (alat units)",
        "         1           Si  tau(   1) = (   0.0000000   0.0000000   0.0000000  )",
        "         2           Si  tau(   2) = (  -0.2500000   0.2500000   0.2500000  )",
        "",
        "     number of k points=     1",
        "                       cart. coord. in units 2pi/alat",
        "        k(    1) = (   0.0000000   0.0000000   0.0000000), wk =   2.0000000",
        "",
    ]
    for step, energy in enumerate(energies):
        if step:
            lines += [
                "ATOMIC_POSITIONS (alat)",
                f"Si              {0.001 * step:.10f}        0.0000000000        0.0000000000",
                "Si             -0.2500000000        0.2500000000        0.2500000000",
                "",
            ]
        lines += [
            "     Self-consistent Calculation",
            "     iteration #  1     ecut=    30.00 Ry     beta= 0.70",
            f"     total energy              =     {energy + 0.1:.8f} Ry",
            "",
            "     End of self-consistent calculation",
            "",
            "          k = 0.0000 0.0000 0.0000 (   283 PWs)   bands (ev):",
            "",
            "    -5.6039   6.2345   6.2345   6.2345",
            "",
            "     highest occupied level (ev):     6.2345",
            "",
        ]
        if step in failed:
            lines += [
                f"     total energy              =     {energy:.8f} Ry",
                "     estimated scf accuracy    <       0.00100000 Ry",
                "",
                "     convergence NOT achieved after   2 iterations: stopping",
                "",
            ]
        else:
            lines += [
                f"!    total energy              =     {energy:.8f} Ry",
                "     estimated scf accuracy    <       0.00000010 Ry",
                "",
                "     convergence has been achieved in   7 iterations",
                "",
            ]
        if step not in failed or forces:
            lines += [
                "     Forces acting on atoms (cartesian axes, Ry/au):",
                "",
                f"     atom    1 type  1   force =    {-0.001 * (step + 1):.8f}    0.00000000    0.00000000",
                f"     atom    2 type  1   force =    {0.001 * (step + 1):.8f}    0.00000000    0.00000000",
                "",
                "     Computing stress (Cartesian axis) and pressure",
                "",
                "          total   stress  (Ry/bohr**3)                   (kbar)     P=       -5.00",
                "  -0.00003400   0.00000000   0.00000000           -5.00        0.00        0.00",
                "   0.00000000  -0.00003400   0.00000000            0.00       -5.00        0.00",
                "   0.00000000   0.00000000  -0.00003400            0.00        0.00       -5.00",
                "",
            ]
    lines += ["     JOB DONE.", ""]
    return "\n".join(lines)


def water_energies(n: int) -> list[float]:
    """Made-up energies of an optimisation, Hartree."""
    return (-76.3 - 0.01 * np.arange(n)).tolist()
