"""Train, validation, calibration and test frames, and the promise that no frame is in two of them.

Roles that the recipe gives are loaded as given. The others are divided off ``data.train`` by
``data.split.by``:

``given``
    The source's own ``split`` column: ``train``, ``validation``, ``calibration``; ``test``
    becomes the test set ``seen``, every other name an unseen test set of that name.
``group``
    Whole groups (trajectories, phases, ...; files where the frames name no group) go to one role
    each. With fewer groups than roles, every group is cut into contiguous blocks in file order.
``composition``, ``structure``
    The same with groups of one reduced formula, or of one structure (copies stay together).
``block``
    Every group is cut into contiguous blocks in file order.
``random``
    Frame by frame.
``file``
    As ``splits.json`` of an earlier run says (:mod:`blip_ft.data.split.splits_file`).
``auto``
    The source's own column if it names ``train`` and some other role (roles it lacks are divided
    off its ``train`` frames), else by group, else at random.

How frames are divided is in :mod:`blip_ft.data.split.division`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

import datasets
import numpy as np

from blip_ft.config import DataConfig, Source
from blip_ft.data.frame import to_atoms
from blip_ft.data.read.plan import as_text, label_options
from blip_ft.data.read.set_aside import SetAside
from blip_ft.data.read.sources import load_source
from blip_ft.data.split.division import by_block, by_group, by_random, fractions
from blip_ft.data.split.duplicates import first_same
from blip_ft.data.split.reference_sets import check_sets
from blip_ft.data.split.sample import sample_of
from blip_ft.data.split.splits_file import from_file
from blip_ft.errors import DataError
from blip_ft.files import file_name

HELD_OUT = ("validation", "calibration", "test")
#: names that reports and metrics use for something else
RESERVED = frozenset({"train", "validation", "calibration", "test", "all", "unseen"})
#: letters of the longest name of a test set: it becomes part of a file's name
MAX_NAME = 200
#: frames of each part; test sets are ``test/seen`` and ``test/<unseen>``
Parts = dict[str, datasets.Dataset]


@dataclass
class Splits:
    """The frames of every role.

    Attributes:
        train: frames to learn from.
        validation: frames that choose the checkpoint and the steps of the mean.
        calibration: frames that choose the scale of the error bars.
        test: ``seen`` and one entry per unseen set; may be empty.
        rule: what was done, in sentences.
        dropped: frames that no role took, each as ``"file, frame: reason"``.
        isolated: energies of isolated atoms in all sources, eV by atomic number, that of ``train`` first;
            they are references and no frames to train on.
        isolated_of: the same by reference set, where there are several.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    calibration: datasets.Dataset
    test: dict[str, datasets.Dataset]
    rule: str
    dropped: list[str] = field(default_factory=list)
    isolated: dict[int, float] = field(default_factory=dict)
    isolated_of: dict[str, dict[int, float]] = field(default_factory=dict)

    def roles(self) -> Parts:
        """All sets by name; test sets as ``test/seen``, ``test/<unseen>``."""
        roles = {"train": self.train, "validation": self.validation, "calibration": self.calibration}
        return roles | {f"test/{name}": frames for name, frames in self.test.items()}


def load_splits(config: DataConfig) -> Splits:
    """Load all roles of a recipe.

    Raises:
        DataError: a source cannot be read, a role that was asked for would be empty, a test set
            has a reserved name, a frame stands in two roles, or names no reference set of the recipe's.
    """
    sets = config.reference_sets
    aside = SetAside(by=None if sets is None else sets.by)
    frames = load_role(config, config.train) if config.stream is None else sample_of(config)
    source = aside.examples(frames)
    given = {name: aside.examples(part) for name, part in _load_given(config).items()}
    if aside.others and config.references == "isolated_atoms":
        raise aside.others[0]
    # a stream is not divided: what is not given is not there
    wanted = [role for role in HELD_OUT if not _has(given, role) and config.stream is None]
    if config.stream is None:
        parts, rules, dropped = _divide(source, config, wanted)
    else:
        parts, dropped = {"train": source}, []
        rules = [f"{_text(config)} is a stream of {config.stream.frames} frames; train is a sample of it."]
    dropped += aside.places
    divided = set(parts)
    parts |= given
    if given:
        rules.append(f"As given: {', '.join(given)}.")
    for name, frames in parts.items():
        _check_name(name)
        if name.removeprefix("test/") in RESERVED and name.startswith("test/"):
            raise DataError(
                f"a test set cannot be called '{name.removeprefix('test/')}'",
                file=_text(config),
                field="data.test",
                remedy="give it another name",
            )
        if not len(frames):
            raise DataError(
                f"no frame is left for {name}: {' '.join(rules)}", file=_text(config), remedy=_GIVE
            )
    if dropped:
        rules.append(f"{len(dropped)} frames are in no role.")
    rules.append(f"Frames: {', '.join(f'{name} {len(frames)}' for name, frames in parts.items())}.")
    splits = Splits(
        train=parts["train"],
        validation=parts["validation"],
        calibration=parts["calibration"],
        test={n.removeprefix("test/"): frames for n, frames in parts.items() if n.startswith("test/")},
        rule=" ".join(rules),
        dropped=dropped,
        isolated=aside.energies,
        isolated_of=aside.of_sets,
    )
    check_disjoint(splits, divided)
    if sets is not None:
        check_sets(sets, splits.roles())
    return splits


def check_disjoint(splits: Splits, divided: Collection[str] = ()) -> None:
    """Refuse a structure that stands in two roles (two test sets may share frames).

    Args:
        splits: all roles.
        divided: names of the roles that come from ``data.train``: where one of them shares a
            frame with another source, the message says "train", which the user wrote.

    Raises:
        DataError: names one such pair and how many there are.
    """
    roles = splits.roles()
    places = [(name, row) for name, frames in roles.items() for row in frames]
    first = first_same([to_atoms(row, labels=False) for _, row in places])
    shared = [
        (places[i], places[j]) for j, i in enumerate(first) if _role(places[i][0]) != _role(places[j][0])
    ]
    if shared:
        (name, row), (other, twin) = shared[0]
        if (name in divided) != (other in divided):
            name, other = ("train" if n in divided else n for n in (name, other))
        more = f"; {len(shared)} such frames in all" if len(shared) > 1 else ""
        raise DataError(
            f"the frame stands in {other} and, as frame {row['frame']} of {row['source']}, in {name}{more}",
            file=twin["source"],
            frame=twin["frame"],
            remedy="give every structure to one role only, for instance by slices file@0:80 and file@80:",
        )


def _check_name(part: str) -> None:
    """Names of test sets become parts of names of files.

    Raises:
        DataError: an empty one, or one that is too long.
    """
    name = part.removeprefix("test/")
    if part.startswith("test/") and not (name.strip() and len(file_name(name)) <= MAX_NAME):
        raise DataError(
            f"a test set cannot be called '{name[:40]}'",
            field="data.test",
            remedy=f"give it a name of up to {MAX_NAME} letters",
        )


_GIVE = "give more frames, files for data.validation, data.calibration, data.test, or another data.split"


def load_role(config: DataConfig, spec: Source, *, labels: bool = True) -> datasets.Dataset:
    """One source of a recipe, with the recipe's names and units.

    Args:
        config: the recipe's ``data``.
        spec: the source.
        labels: refuse frames without energy and forces.

    Raises:
        DataError: it cannot be read.
    """
    return load_source(spec, labels=labels, **label_options(config))


def _load_given(config: DataConfig) -> Parts:
    """The roles that the recipe names a source for."""
    tests = config.test if isinstance(config.test, dict) else {"seen": config.test}
    sources = {"validation": config.validation, "calibration": config.calibration} | {
        f"test/{name}": spec for name, spec in tests.items()
    }
    return {name: load_role(config, spec) for name, spec in sources.items() if spec is not None}


def _divide(
    source: datasets.Dataset, config: DataConfig, wanted: list[str]
) -> tuple[Parts, list[str], list[str]]:
    """Parts of ``data.train``, sentences on how they were made, frames left out."""
    by, names = config.split.by, set(source["split"]) - {""}
    if by == "file":
        return from_file(config.split.file, source, wanted, _text(config))
    own = by == "given" or (by == "auto" and "train" in names and len(names) > 1)
    parts: Parts = {"train": source}
    rules: list[str] = []
    dropped: list[str] = []
    if own:
        parts, dropped = _own_column(source, config, wanted)
        rules.append(f"{_text(config)} names its own splits.")
        wanted = [] if by == "given" else [r for r in wanted if not _has(parts, r)]
    if not wanted:
        return parts, rules, dropped
    pool = parts["train"]
    groups = _groups(pool, by)
    if by == "group" and not any(groups):
        raise DataError(
            "the frames name no groups",
            file=_text(config),
            field="data.split.by",
            remedy="name the key that holds them: data.fields: {group: my_key}, or split at random",
        )
    shares = fractions({role: getattr(config.split, role) for role in wanted}, len(pool), _text(config))
    if by == "block":
        indices, rule = by_block(groups, shares)
    elif by != "random" and any(groups):
        indices, rule = by_group(groups, shares, config.split.seed)
    else:
        indices, rule = by_random(len(pool), shares, config.split.seed)
    if by in ("composition", "structure"):
        rule = f"Groups: {by}. {rule}"
    indices, twins = _without_twins(pool, indices)
    dropped += twins
    for role, chosen in indices.items():
        parts["test/seen" if role == "test" else role] = pool.select(sorted(chosen))
    return parts, [*rules, rule], dropped


def _own_column(source: datasets.Dataset, config: DataConfig, wanted: list[str]) -> tuple[Parts, list[str]]:
    """Parts as the ``split`` column has them; those that the recipe gives otherwise are left out."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(source["split"]):
        members[name].append(index)
    if set(members) == {""}:
        raise DataError(
            "the source has no column that names splits",
            file=_text(config),
            field="data.split.by",
            remedy="name it: data.fields: {split: my_key}; or divide the frames otherwise (data.split.by: auto, group, "
            "random), or give sources for data.validation, data.calibration and data.test",
        )
    if "" in members:
        row = source[members[""][0]]
        raise DataError(
            "the frame names no split and others of the source do",
            file=row["source"],
            frame=row["frame"],
            field="split",
            remedy="name its split, or set data.split.by to group or random",
        )
    if config.split.by == "given":
        lacking = {"train", *wanted} - set(members) - {"test"}
        if lacking:
            raise DataError(
                f"the source names no frames for {', '.join(sorted(lacking))}; "
                f"it names {', '.join(sorted(members))}",
                file=_text(config),
                field="split",
                remedy=_GIVE,
            )
    parts: Parts = {}
    dropped: list[str] = []
    for name, indices in members.items():
        role = name if name in ("train", "validation", "calibration") else "test"
        if role == "train" or role in wanted:
            part = {"test": "test/seen"}.get(name, name if role == name else f"test/{name}")
            parts[part] = source.select(indices)
        else:
            reason = f"marked '{name}', and the recipe gives {role} otherwise"
            dropped += [f"{_place(source[i])}: {reason}" for i in indices]
    return parts, dropped


def _groups(frames: datasets.Dataset, by: str) -> list[str]:
    """Group of every frame; a frame that names none belongs to its file if there are several."""
    if by == "composition":
        return [_formula(numbers) for numbers in frames["numbers"]]
    if by == "structure":
        return [str(head) for head in first_same([to_atoms(row, labels=False) for row in frames])]
    several = len(set(frames["source"])) > 1
    return [
        group or (source if several else "")
        for group, source in zip(frames["group"], frames["source"], strict=True)
    ]


def _formula(numbers: list[int]) -> str:
    """Reduced formula: ``2x8 1x14`` for SiO2, whatever the number of units."""
    zs, counts = np.unique(numbers, return_counts=True)
    unit = int(np.gcd.reduce(counts))
    return " ".join(f"{count // unit}x{z}" for z, count in zip(zs, counts, strict=True))


def _without_twins(
    pool: datasets.Dataset, parts: dict[str, list[int]]
) -> tuple[dict[str, list[int]], list[str]]:
    """Leave out copies of a structure that another role holds; held-out roles come first."""
    first = first_same([to_atoms(row, labels=False) for row in pool])
    owner: dict[int, str] = {}
    dropped = []
    kept: dict[str, list[int]] = {role: [] for role in parts}
    for role in sorted(parts, key=lambda r: r == "train"):
        for index in parts[role]:
            if owner.setdefault(first[index], role) == role:
                kept[role].append(index)
            else:
                dropped.append(f"{_place(pool[index])}: same structure as a frame of {owner[first[index]]}")
    return kept, dropped


def _role(part: str) -> str:
    return part.partition("/")[0]


def _has(parts: Parts, role: str) -> bool:
    return any(_role(part) == role for part in parts)


def _place(row: dict[str, object]) -> str:
    return f"{row['source']}, frame {row['frame']}"


def _text(config: DataConfig) -> str:
    return as_text(config.train)
