#!/usr/bin/env bash
# SevenNet: names of modalities are case-sensitive, and each model spells them its own way.
#
# 7net-mf-0 knows 'PBE' and 'R2SCAN' and refuses 'pbe'; the documentation of the argument lists lower-case names only
# ('mpa', 'matpes_pbe', ...), as other models have them. One expects either to work.
# Seen with sevenn 0.13.0 (7net-mf-0, in its wheel). Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check sevenn==0.13.0 ase==3.29.0 torch==2.13.0
cd "$folder"; "$folder/env/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

from sevenn.calculator import SevenNetCalculator

print("sevenn", version("sevenn"))
found = {}
for modal in ("PBE", "pbe"):
    try:
        SevenNetCalculator("7net-mf-0", modal=modal, device="cpu")
        found[modal] = "works"
    except ValueError as error:
        found[modal] = f"ValueError: {error}"
    print(modal, found[modal])
assert found["PBE"] == "works" and found["pbe"].startswith("ValueError")
PYTHON
