"""What charge and spin of the frames mean to the model, said once for all roles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from blip_ft.backbones import electrons
from blip_ft.backbones.protocol import Backbone
from blip_ft.data.findings import Finding, place


def electron_findings(rows: Iterable[Mapping[str, Any]], backbone: Backbone) -> list[Finding]:
    """At most one finding: frames that lack what the model takes, or have what it does not take.

    Args:
        rows: of the schema, all roles.
        backbone: the model; frames that lack what it must have have been refused (``Backbone.check``).
    """
    rows = list(rows)
    return _lacking(rows, backbone) if backbone.conditions else _unused(rows, backbone)


def _lacking(rows: list[Mapping[str, Any]], backbone: Backbone) -> list[Finding]:
    """Frames for which the model takes its default."""
    parts, frames = [], dict[str, None]()
    for key, default in backbone.conditions.items():
        without = [place(row) for row in rows if row.get(key) is None]
        if without and default is not None:
            count = "no frame has" if len(without) == len(rows) else f"{len(without)} frames have no"
            parts.append(f"{count} {key}, the model takes {electrons.plain(default)}")
            frames |= dict.fromkeys(without if len(without) < len(rows) else ())
    if not parts:
        return []
    remedy = "give them with the frames (charge, spin), or set model.options.charge and model.options.spin"
    return [Finding("coverage", "info", list(frames), "; ".join(parts), remedy)]


def _unused(rows: list[Mapping[str, Any]], backbone: Backbone) -> list[Finding]:
    """Frames whose charge or spin the model does not see."""
    having = [row for row in rows if any(row.get(key) is not None for key in electrons.KEYS)]
    if not having:
        return []
    states = {electrons.state(row.get("charge"), row.get("spin")) for row in rows}
    names = " and ".join(k for k in electrons.KEYS if any(row.get(k) is not None for row in having))
    message = f"{len(having)} frames have {names}, which this {backbone.name} model does not take"
    if len(states) == 1:
        return [Finding("coverage", "info", [], message, "they change nothing; all frames have the same")]
    charged = [
        place(row, _text(row))
        for row in having
        if electrons.state(row.get("charge"), row.get("spin")) != electrons.NEUTRAL
    ]
    message += f": frames of {len(states)} different states are alike to it"
    remedy = "train on frames of one state, or take a model that knows them (UMA, an omol model of Orb)"
    return [Finding("coverage", "warning", charged, message, remedy)]


def _text(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {electrons.plain(row[k])}" for k in electrons.KEYS if row.get(k) is not None)
