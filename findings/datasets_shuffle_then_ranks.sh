#!/usr/bin/env bash
# datasets: IterableDataset.shuffle() without a seed before split_dataset_by_node loses rows and doubles others.
#
# Each rank draws a seed of its own, so that ranks divide differently shuffled streams: of ten rows two ranks together see
# fewer, and some twice. shuffle(seed=...) is right. No warning is given.
# Seen with datasets 5.2.0. Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check datasets==5.2.0
cd "$folder"; HF_HOME="$folder/hub" HF_HUB_OFFLINE=1 "$folder/env/bin/python" - <<'PYTHON'
import datasets
from datasets.distributed import split_dataset_by_node


def rows(shards):
    for shard in shards:
        yield {"row": shard}


def seen(**options):
    """Rows that two ranks get, each of which builds its stream itself, as processes do."""
    out = []
    for rank in range(2):
        stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": list(range(10))})
        part = split_dataset_by_node(stream.shuffle(buffer_size=100, **options), rank=rank, world_size=2)
        out += [row["row"] for row in part]
    return out


datasets.disable_progress_bars()
without = [seen() for _ in range(10)]
print("datasets", datasets.__version__)
print("different rows of ten, without a seed:", [len(set(r)) for r in without])
print("with one:", len(set(seen(seed=0))))
assert min(len(set(r)) for r in without) < 10
assert len(set(seen(seed=0))) == 10
PYTHON
