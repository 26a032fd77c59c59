#!/usr/bin/env bash
# ASE, extended XYZ: an empty text in the comment line takes the key after it as its value.
#
# `config_type="" energy=-35.9` is read as config_type = "energy=-35.9": the energy is gone without a word. Before Lattice it
# is the cell that goes. One expects an empty text. ASE itself writes `config_type=` for info = {"config_type": ""}, and reads the
# next key into it.
# Seen with ase 3.29.0. Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check ase==3.29.0
cd "$folder"; "$folder/env/bin/python" - <<'PYTHON'
import io

import ase
from ase.io import read, write

frame = '2\n{} pbc="T T T" Properties=species:S:1:pos:R:3\nH 0 0 0\nH 0 0 1\n'
lattice = 'Lattice="5 0 0 0 5 0 0 0 5"'
print("ase", ase.__version__)
energy = read(io.StringIO(frame.format(f'{lattice} config_type="" energy=-35.9')), format="extxyz")
print("before energy :", energy.info, "calculator:", energy.calc)
cell = read(io.StringIO(frame.format(f'config_type="" {lattice} energy=-35.9')), format="extxyz")
print("before Lattice:", cell.info, "volume:", cell.cell.volume)
energy.info["config_type"] = ""
energy.info["mark"] = 1
write("own.xyz", energy, format="extxyz")
print("what ASE writes:", open("own.xyz").read().splitlines()[1])
own = read("own.xyz")
print("and reads      :", own.info)
assert energy.calc is None
assert cell.info["config_type"].startswith("Lattice=") and cell.cell.volume == 0
assert own.info.get("mark") != 1, "the key behind it survives now"
PYTHON
