"""The data card of a hub-style folder: what a reader of the set must know, and what the hub indexes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import yaml
from ase.data import chemical_symbols

from blip_ft.data.frame import fingerprint
from blip_ft.data.read.sources import mappings

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_COLUMNS = """| column | shape | unit | |
|---|---|---|---|
| `numbers` | (n,) | | atomic numbers |
| `positions` | (n, 3) | Å | |
| `cell` | (3, 3) | Å | rows are lattice vectors; zeros without a cell |
| `pbc` | (3,) | | periodic along each lattice vector |
| `energy` | () | eV | total energy, or null |
| `forces` | (n, 3) | eV/Å | or null |
| `stress` | (6,) | eV/Å³ | positive = tensile; xx yy zz yz xz xy; or null |
| `weight` | () | | factor of the frame's log likelihood |
| `atom_weight` | (n,) | | factor of each atom's force terms, or null |
| `charge` | () | e | total charge, or null |
| `spin` | () | | spin multiplicity 2S + 1, or null |
| `group` | text | | trajectory, phase, ... or empty |
| `theory` | text | | level of theory, head, ... of the labels, or empty |
| `split` | text | | split, or empty |
| `mapping` | text | | names under which the labels were found in the source |
"""


@dataclass(frozen=True)
class Card:
    """What only the owner of a set knows.

    Attributes:
        title: name of the set.
        license: identifier as on the hub (``cc-by-4.0``), or ``""`` if it is not known.
        about: a sentence on where the set comes from and its level of theory.
    """

    title: str
    license: str = ""
    about: str = ""


def write_card(path: Path, frames: datasets.Dataset, splits: Mapping[str, int], card: Card) -> None:
    """Write ``README.md`` with the hub's metadata, counts, ranges, columns and fingerprint.

    Args:
        path: of the file.
        frames: all frames.
        splits: number of frames of each split.
        card: what the owner says.
    """
    data_files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    meta: dict[str, object] = {
        "pretty_name": card.title,
        "tags": ["chemistry", "materials-science", "interatomic-potential"],
        "size_categories": [next((name for limit, name in _SIZES if len(frames) < limit), "n>1M")],
        "configs": [{"config_name": "default", "data_files": data_files}],
    }
    if card.license:
        meta["license"] = card.license
    lines = [
        "---",
        yaml.safe_dump(meta, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {card.title}",
        "",
        card.about or "Origin and level of theory: **not stated**.",
        "" if card.license else "\nLicence: **not stated**.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _facts(frames, splits).items()),
        "",
        "## Columns",
        "",
        _COLUMNS,
        "## How labels were found",
        "",
        *(f"- {line}" for line in mappings(frames, paths=False)),
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def _facts(frames: datasets.Dataset, splits: Mapping[str, int]) -> dict[str, str]:
    """Counts and ranges; one pass over the rows, in constant memory."""
    elements: set[int] = set()
    sizes: list[int] = []
    energies: list[float] = []
    known = {"energy": 0, "forces": 0, "stress": 0}
    largest = 0.0
    for row in frames:
        elements.update(row["numbers"])
        sizes.append(len(row["numbers"]))
        for label in known:
            known[label] += row[label] is not None
        if row["energy"] is not None:
            energies.append(row["energy"] / len(row["numbers"]))
        if row["forces"] is not None:
            largest = max(largest, float(np.abs(row["forces"]).max(initial=0.0)))
    facts = {
        "frames": ", ".join(f"{split} {count}" for split, count in splits.items()),
        "elements": " ".join(chemical_symbols[z] for z in sorted(elements)),
        "atoms per frame": f"{min(sizes)} to {max(sizes)}",
        "labelled": ", ".join(f"{label} {count}" for label, count in known.items()),
    }
    if energies:
        facts["energy"] = f"{min(energies):.4f} to {max(energies):.4f} eV/atom"
    if known["forces"]:
        facts["largest force component"] = f"{largest:.3f} eV/Å"
    return facts | {"fingerprint": f"`{fingerprint(frames)}`"}
