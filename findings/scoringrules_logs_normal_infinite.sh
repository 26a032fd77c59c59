#!/usr/bin/env bash
# scoringrules: the log score of a normal law is infinite beyond 38.6 standard deviations, beyond 14 in float32.
#
# -log p(z) = z^2/2 + log(2 pi)/2 is 761.4 at z = 39. The density is computed first and underflows, so that one frame of a phase
# never seen makes the mean of a set infinite. One expects the logarithm of the density, not of its underflow.
# Seen with scoringrules 0.10.0. Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check scoringrules==0.10.0
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import math

import numpy as np
import scoringrules

print("scoringrules", scoringrules.__version__)
for z in (10, 38, 39):
    exact = z * z / 2 + math.log(2 * math.pi) / 2
    print(z, "stds:", float(scoringrules.logs_normal(float(z), 0.0, 1.0)), "exact:", exact)
single = [float(scoringrules.logs_normal(np.float32(z), np.float32(0), np.float32(1))) for z in (13, 15)]
print("float32, 13 and 15 stds:", single)
assert math.isinf(scoringrules.logs_normal(39.0, 0.0, 1.0)) and math.isfinite(scoringrules.logs_normal(38.0, 0.0, 1.0))
assert math.isfinite(single[0]) and math.isinf(single[1])
PYTHON
