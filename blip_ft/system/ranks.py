"""Which of the processes of a run this is."""

from __future__ import annotations

import os


def is_rank_zero() -> bool:
    """Whether this process is the first of its run (the launcher sets the environment)."""
    return all(
        os.environ.get(k, "0") in ("", "0") for k in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK")
    )
