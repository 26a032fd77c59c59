"""Two finished runs side by side: their metrics, and where their recipes differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from blip_ft.report.run_folders import Run
from blip_ft.uncertainty.metrics import single_sets

#: what differs between any two runs, or says only where one stands
_UNTOLD = frozenset({"name", "output", "overwrite"})


@dataclass(frozen=True)
class Figure:
    """One metric of one model on one set, in both runs; ``None`` where a run has none.

    Attributes:
        model: ``pretrained``, ``plain`` or ``blip``.
        set_name: test set.
        metric: key of ``metrics.json``.
        one: in the first run.
        other: in the second run.
    """

    model: str
    set_name: str
    metric: str
    one: float | None
    other: float | None

    @property
    def change(self) -> float | None:
        """Second minus first, relative to the first; ``None`` where that has no meaning."""
        if self.one is None or self.other is None or not self.one:
            return None
        return (self.other - self.one) / abs(self.one)


@dataclass(frozen=True)
class Difference:
    """A key of the recipe with its two values; ``None`` in :attr:`missing` runs is no value.

    Attributes:
        key: as in an override: ``trainer.max_epochs``.
        one: in the first run.
        other: in the second run.
        missing: numbers (0, 1) of the runs whose recipe has no such key.
    """

    key: str
    one: Any
    other: Any
    missing: tuple[int, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` has found.

    Attributes:
        runs: the two.
        figures: model by model, set by set, in the order of ``metrics.json``.
        recipe: differences, by key.
        notes: what keeps figures from being compared.
    """

    runs: tuple[Run, Run]
    figures: list[Figure]
    recipe: list[Difference]
    notes: list[str]


def compare(one: Run, other: Run) -> Comparison:
    """Metrics and recipes of two finished runs.

    Args:
        one: the first, with metrics and recipe.
        other: the second, likewise.
    """
    figures = []
    models = [m for m in ("pretrained", "plain", "blip") if m in one.metrics or m in other.metrics]
    for model in models:
        sides = one.metrics.get(model, {}), other.metrics.get(model, {})
        names = list(dict.fromkeys((*sides[0], *sides[1])))
        for name in [*single_sets(names), *(n for n in names if n not in single_sets(names))]:
            values = sides[0].get(name, {}), sides[1].get(name, {})
            for metric in dict.fromkeys((*values[0], *values[1])):
                figures.append(Figure(model, name, metric, *(v.get(metric) for v in values)))
    return Comparison((one, other), figures, _differences(one.recipe, other.recipe), _notes(one, other))


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    left, right = dict(_leaves(one)), dict(_leaves(other))
    out = []
    for key in sorted(left.keys() | right.keys()):
        missing = tuple(i for i, side in enumerate((left, right)) if key not in side)
        if key not in _UNTOLD and (missing or left[key] != right[key]):
            out.append(Difference(key, left.get(key), right.get(key), missing))
    return out


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys as overrides have them; an empty mapping is a value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _notes(one: Run, other: Run) -> list[str]:
    """Sets of one name whose frames or labels differ (by the fingerprints of the receipts)."""
    prints = []
    for run in (one, other):
        sets = (
            run.receipt.get("data", {}).get("sets", {}) if isinstance(run.receipt.get("data"), dict) else {}
        )
        prints.append({n: s.get("fingerprint") for n, s in sets.items() if isinstance(s, Mapping)})
    both = [n for n in prints[0] if n in prints[1]]
    return [
        f"the frames of '{name}' are others in the two runs: figures on them are not of the same thing"
        for name in both
        if prints[0][name] != prints[1][name] and name not in ("train", "validation", "calibration")
    ]
