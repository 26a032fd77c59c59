"""The shipped SiO2 recipe on a zeolite: a set that decided nothing about the recipe.

    python benchmarks/zeolites.py DIR 0 1 2 [--accelerator gpu]     # an hour a seed on a busy CPU

DIR holds SiO2_zeo_EDI.extxyz.gz and SiO2_zeo_multi.extxyz.gz (origin and licence: docs/data.md). 36 frames
of the framework EDI train, 12 others choose the epoch, 12 calibrate and 30 are judged on; unseen are the five
frameworks of the second file with at most 30 atoms that are not EDI. Snapshots of the same dynamics are
in the training and the test frames of EDI, so errors on these are those of neighbours. Everything but the frames is
the recipe's; runs are kept in runs/zeolites-<seed>, rows go to benchmarks/results/zeolites.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ase.io
from seeds import over_seeds

from blip_ft.files import whole_file

SEEN = "SiO2_zeo_EDI.extxyz.gz"
UNSEEN = "SiO2_zeo_multi.extxyz.gz"
MAX_ATOMS = 30
#: slices of the seen framework that have no frame in common
ROLES = {"train": "0:1440:40", "validation": "20:1440:120", "calibration": "10:1440:120"}
TEST = "30:1440:48"


def unseen_frames(folder: Path) -> Path:
    """A file of the small unseen frameworks."""
    frames = ase.io.read(folder / UNSEEN, ":")
    chosen = [a for a in frames if len(a) <= MAX_ATOMS and a.info["config_type"] != "zeolite_EDI"]
    path = Path("runs/zeolites-unseen.extxyz")
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as file:
        ase.io.write(file, chosen, format="extxyz")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")
    given = parser.parse_args()
    seen = given.folder / SEEN
    tests = f"{{EDI: '{seen}@{TEST}', frameworks: '{unseen_frames(given.folder)}'}}"
    roles = [f"data.{role}={seen}@{part}" for role, part in ROLES.items()]
    device = f"trainer.accelerator={given.accelerator}"
    over_seeds("zeolites", "sio2_sevennet", "SiO2_zeo", given.seeds, [*roles, f"data.test={tests}", device])
