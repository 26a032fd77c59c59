"""One line for each check, and the whole in a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from blip_ft.errors import readable

#: in a run's folder: :meth:`Verdict.to_dict`
VERDICT = "verify.json"

Result = Literal["pass", "warn", "fail"]
#: from good to bad
ORDER: tuple[Result, ...] = ("pass", "warn", "fail")


@dataclass(frozen=True)
class Check:
    """One number and its limit.

    Attributes:
        name: of the check.
        result: ``pass``, ``warn`` or ``fail``.
        value: what was found; ``None`` where the model gave no finite number.
        limit: beyond which the check fails.
        unit: of both.
        note: what a reader of the table should know.
    """

    name: str
    result: Result
    value: float | None
    limit: float
    unit: str
    note: str = ""


def at_most(name: str, value: float, *, good: float, limit: float, unit: str, note: str = "") -> Check:
    """A check of a number that should be small: passes up to ``good``, fails beyond ``limit``."""
    if not math.isfinite(value):
        return Check(name, "fail", None, limit, unit, note)
    result: Result = "pass" if value <= good else "warn" if value <= limit else "fail"
    return Check(name, result, value, limit, unit, note)


@dataclass(frozen=True)
class Verdict:
    """What all checks come to.

    Attributes:
        checks: in the order in which they were made.
        hottest: K; temperature of the molecular dynamics, ``None`` where there was none.
        notes: what was not checked, and why.
        beside: the same checks of other models (``pretrained``, ``plain``), as far as they were made.
    """

    checks: Sequence[Check]
    hottest: float | None = None
    notes: Sequence[str] = ()
    beside: Mapping[str, Sequence[Check]] = field(default_factory=dict)

    @property
    def result(self) -> Result:
        """The worst of all lines."""
        return max((c.result for c in self.checks), key=ORDER.index, default="pass")

    @property
    def sentence(self) -> str:
        """May one run molecular dynamics with this, and up to where."""
        failed = [c.name for c in self.checks if c.result == "fail"]
        if failed:
            return f"No molecular dynamics with this model: {', '.join(failed)} failed."
        doubtful = [c.name for c in self.checks if c.result == "warn" and not c.name.startswith("dimer_")]
        but = f" Look at {', '.join(doubtful)} first." if doubtful else ""
        if self.hottest is None:
            return f"Nothing speaks against molecular dynamics, which was not tried: blip-finetune verify does.{but}"
        cell = " at constant volume" if all(c.name != "virial" for c in self.checks) else ""
        walls = [c.value for c in self.checks if c.name.startswith("dimer_") and c.value is not None]
        bounds = f", where no two atoms meet with more than {min(walls):.0f} eV" if walls else ""
        return f"Molecular dynamics may be run{cell} up to {self.hottest:.0f} K{bounds}.{but}"

    def to_json(self) -> dict[str, Any]:
        """What ``blip-finetune verify --json`` prints."""
        keys = ("name", "result", "value", "limit")
        return {"verdict": self.result, "checks": [{k: getattr(c, k) for k in keys} for c in self.checks]}

    def to_dict(self) -> dict[str, Any]:
        """All of it, for ``verify.json`` in a run's folder."""
        return {
            "verdict": self.result,
            "sentence": self.sentence,
            "hottest": self.hottest,
            "notes": list(self.notes),
            "checks": [asdict(c) for c in self.checks],
            "beside": {name: [asdict(c) for c in checks] for name, checks in self.beside.items()},
        }


def checks_of(rows: Sequence[Mapping[str, Any]]) -> list[Check]:
    """Checks that :meth:`Verdict.to_dict` has stored."""
    return [Check(**row) for row in rows]


def verdict_rows(verdict: Mapping[str, Any]) -> list[dict[str, str]]:
    """A stored verdict as rows of text: name, result, value, limit and note, and the values of the models beside it."""
    beside = {model: {c["name"]: c for c in checks} for model, checks in verdict["beside"].items()}
    return [
        {
            "name": c["name"],
            "result": c["result"],
            "value": f"{readable(c['value'])} {c['unit']}".strip(),
            "limit": f"{readable(c['limit'])} {c['unit']}".strip(),
            "note": c["note"],
            **{m: _beside(found.get(c["name"])) for m, found in beside.items()},
        }
        for c in verdict["checks"]
    ]


def _beside(check: Mapping[str, Any] | None) -> str:
    return "–" if check is None else f"{readable(check['value'])} ({check['result']})"
