"""Peak memory and speed of a training set that is read as a stream.

    python benchmarks/stream_memory.py --frames 200000 --limit-gb 2

A parquet file of rattled SiO2 frames is written by another process. Then one epoch of shuffled batches
with graphs goes through the loader that training uses. Exits with 1 if the peak of this process's
resident memory is above the limit. Without ``--graphs`` the rows are read and shuffled only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CHUNK = 5000


def write(path: str, frames: int) -> None:
    """Write the set in pieces; in a process of its own, whose memory does not count."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from blip_ft.data.read.sources import load_source

    rng = np.random.default_rng(0)
    rows = list(load_source("sio2_polymorphs"))
    columns = ("numbers", "positions", "cell", "pbc", "energy", "forces", "stress", "group")
    writer = None
    for start in range(0, frames, CHUNK):
        chosen = [rows[(start + i) % len(rows)] for i in range(min(CHUNK, frames - start))]
        table = pa.Table.from_pylist(
            [
                {c: row[c] for c in columns}
                | {
                    "positions": (
                        np.asarray(row["positions"]) + rng.normal(0, 0.05, (len(row["numbers"]), 3))
                    ).tolist()
                }
                for row in chosen
            ]
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=200_000)
    parser.add_argument("--limit-gb", type=float, default=2.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--graphs", action="store_true", help="also build the batches' graphs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "set.parquet")
        child = multiprocessing.get_context("spawn").Process(target=write, args=(path, args.frames))
        child.start()
        child.join()
        seen, seconds = run(path, args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
    print(f"{seen} frames, {seconds:.0f} s, {1e3 * seconds / seen:.2f} ms per frame, peak {peak:.2f} GB")
    return int(peak > args.limit_gb or seen != args.frames)


def run(path: str, args: argparse.Namespace) -> tuple[int, float]:
    """One epoch; number of frames and seconds."""
    from torch.utils.data import DataLoader

    from blip_ft.config import DataConfig, StreamConfig
    from blip_ft.data.batch.stream import FrameStream
    from blip_ft.data.split.sample import rows_of
    from blip_ft.testing.fake import FakeBackbone

    config = DataConfig(train=path, stream=StreamConfig(frames=args.frames))
    stream = FrameStream(rows_of(config), FakeBackbone(), frames=args.frames, batch_size=args.batch_size)
    started, seen = time.monotonic(), 0
    if args.graphs:
        for batch in DataLoader(stream, batch_size=None):
            seen += batch.n_structures
    else:
        for _ in stream._shuffled():
            seen += 1
    return seen, time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
