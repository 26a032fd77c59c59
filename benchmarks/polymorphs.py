"""The shipped SiO2 recipe over several seeds: accuracy and error bars, seen phases and unseen ones.

    python benchmarks/polymorphs.py 0 1 2 3 4 [--accelerator gpu]     # half an hour or more a seed on a CPU

A seed sets the order of the frames, all noise, the context frames and the draws; the frames and their
roles are the embedded set's own. Each run is kept in runs/polymorphs-<seed>; a finished one is not run
again. Rows go to benchmarks/results/polymorphs.json, means and spreads over seeds are printed.
"""

from __future__ import annotations

import argparse

from seeds import over_seeds

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")
    given = parser.parse_args()
    device = f"trainer.accelerator={given.accelerator}"
    over_seeds("polymorphs", "sio2_sevennet", "sio2_polymorphs", given.seeds, [device])
