#!/usr/bin/env bash
# datasets: Dataset.to_json keeps ten decimals of a float64.
#
# -395.21001234567893 eV is written as -395.2100123457. One expects the shortest text that reads back equal, as Python's and
# pandas' CSV writers give. For total energies of thousands of atoms that is enough, for finite differences of them it is not.
# Seen with datasets 5.2.0. Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check datasets==5.2.0
cd "$folder"; HF_HOME="$folder/hub" HF_HUB_OFFLINE=1 "$folder/env/bin/python" - <<'PYTHON'
import json

import datasets

datasets.disable_progress_bars()
energy = -395.21001234567893
datasets.Dataset.from_list([{"energy": energy}]).to_json("a.jsonl")
(line,) = open("a.jsonl").read().splitlines()
back = json.loads(line)["energy"]
print("datasets", datasets.__version__, repr(energy), "->", line, "off by", abs(back - energy))
assert 0 < abs(back - energy) < 1e-9
PYTHON
