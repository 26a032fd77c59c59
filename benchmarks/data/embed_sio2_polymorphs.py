"""Make the embedded set: extended XYZ of ``generate_sio2_polymorphs.py`` to parquet.

python benchmarks/data/embed_sio2_polymorphs.py sio2_polymorphs_pbe.extxyz.gz

The text must have the SHA-256 that the set's README states; the parquet file is then the same
to the last bit of every number.
"""

import argparse
import gzip
import hashlib
from pathlib import Path

import ase.io
import pyarrow as pa
import pyarrow.parquet as pq

from blip_ft.data.read import embedded
from blip_ft.data.read.schema import FEATURES
from blip_ft.data.read.sources import load_source

SHA256 = "a3fc80029e89a32b004bc5042f53ec5ee0ca57585f76664449b88d1b20208a58"
EXTRA = {"phase": pa.string(), "temperature_K": pa.int64(), "trajectory": pa.string(), "step": pa.int64()}
#: columns that say nothing about this set
LEFT_OUT = ["weight", "atom_weight", "charge", "spin", "theory", "mapping"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="extended XYZ, compressed with gzip")
    parser.add_argument("-o", "--output", type=Path, default=embedded.path("sio2_polymorphs"))
    args = parser.parse_args()
    found = hashlib.sha256(gzip.decompress(args.source.read_bytes())).hexdigest()
    if found != SHA256:
        parser.error(f"{args.source} has SHA-256 {found}, expected {SHA256}")
    table = load_source(str(args.source)).remove_columns(LEFT_OUT).with_format("arrow")[:]
    names = table.column_names
    table = table.set_column(names.index("source"), "source", pa.array(["sio2_polymorphs"] * len(table)))
    infos = [atoms.info for atoms in ase.io.read(args.source, ":")]
    for name, kind in EXTRA.items():
        table = table.append_column(name, pa.array([info[name] for info in infos], kind))
    assert table.column_names == [*(name for name in FEATURES if name not in LEFT_OUT), *EXTRA]
    # Without the Hugging Face metadata, which names a type of the library's present version.
    pq.write_table(table.replace_schema_metadata(None), args.output, compression="zstd", compression_level=19)
    print(f"{args.output}: {len(table)} frames, {args.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
