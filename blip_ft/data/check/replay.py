"""Replayed frames (``data.replay``) are checked as the frames of every role are.

They are of another source, often of another level of theory, so their labels are judged among themselves. Labels are
looked at where they are trained on (``labels: own``); structures always.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ase import Atoms

from blip_ft.backbones.protocol import Backbone
from blip_ft.config import DataConfig, Recipe
from blip_ft.data.check.examine import JudgedLabels, compare, judge_labels
from blip_ft.data.check.label_faults import Compared
from blip_ft.data.check.sets import unit_findings
from blip_ft.data.findings import Finding
from blip_ft.data.frame import FrameRow, to_atoms
from blip_ft.data.read.set_aside import SetAside
from blip_ft.data.split.splits import load_role
from blip_ft.errors import DataError


@dataclass
class ReplayLabels:
    """What was found of the labels of replayed frames.

    Attributes:
        findings: each says that it is of replayed frames.
        labels: the frames with a wrong label.
        n: number of frames.
    """

    findings: list[Finding]
    labels: JudgedLabels
    n: int

    def kept(self, bad_labels: str) -> list[int]:
        """Places of the frames that are replayed, as ``data.bad_labels`` says.

        Raises:
            DataError: none would be left.
        """
        left_out = {"auto": self.labels.certain, "drop": self.labels.bad}.get(bad_labels, {})
        kept = [i for i in range(self.n) if i not in left_out]
        if self.n and not kept:
            raise DataError(
                "every replayed frame has a wrong label",
                field="data.replay",
                remedy="see blip-finetune check, and mend the labels, or use data.replay.labels: pretrained",
            )
        return kept


def replayed_rows(config: DataConfig, backbone: Backbone, findings: list[Finding]) -> list[FrameRow]:
    """The frames of ``data.replay.source`` that are replayed; what is set aside is entered in ``findings``.

    Raises:
        DataError: they cannot be read, have no labels where these are asked for, or hold an element that the model does
            not know.
    """
    options = config.replay
    assert options is not None
    assert options.source is not None
    own, aside = options.labels == "own", SetAside()
    frames = load_role(config, options.source, labels=own)
    rows: list[FrameRow] = list(aside.examples(frames) if own else frames)
    if aside.places:
        n = len(aside.places)
        message = f"replay: {n} frame{'s' * (n != 1)} {'is' if n == 1 else 'are'} left out"
        findings.append(Finding("coverage", "info", aside.places, message))
    for row in rows:
        backbone.check(to_atoms(row, labels=False), file=row["source"], frame=row["frame"])
    return rows


def beside(row: FrameRow, atoms: Atoms, prediction: Mapping[str, Any]) -> Compared:
    """Labels of one row beside a prediction of :func:`blip_ft.uncertainty.predict.predict_atoms`."""

    def label(name: str) -> Any:
        return None if row[name] is None else np.asarray(row[name], dtype=float)

    stress = prediction["stress"]
    return Compared(
        atoms,
        row["energy"],
        label("forces"),
        label("stress"),
        float(prediction["energy"]),
        np.asarray(prediction["forces"], dtype=float),
        None if stress is None else np.asarray(stress, dtype=float),
        group=row["group"],
    )


def judge_replay(
    recipe: Recipe,
    rows: Sequence[FrameRow],
    compared: Sequence[Compared],
    *,
    by_state: bool,
    raises: bool = True,
) -> ReplayLabels:
    """Units, sets of energies and wrong labels of replayed frames.

    Args:
        recipe: options.
        rows: the frames.
        compared: the same beside the pretrained model.
        by_state: the model does not take charge and spin.
        raises: what stops a run is raised, and not a finding.

    Raises:
        DataError: labels in a wrong unit, or wrong ones where ``data.bad_labels`` is ``stop``.
    """
    use_stress = recipe.objective.use_stress

    def units(index: Sequence[int]) -> list[tuple[str, Finding]]:
        predictions = [
            {"energy": c.model_energy, "forces": c.model_forces, "stress": c.model_stress}
            for c in (compared[i] for i in index)
        ]
        chosen = [rows[i] for i in index]
        return list(unit_findings(chosen, predictions, use_stress=use_stress, by_state=by_state).items())

    found = units(range(len(rows)))
    wrong = [(quantity, finding) for quantity, finding in found if finding.severity == "error"]
    if wrong and raises:
        quantity, finding = wrong[0]
        raise DataError(
            f"replay: {finding.message}", file=rows[0]["source"], field=quantity, remedy=finding.remedy
        )
    sets = recipe.data.reference_sets
    judged = judge_labels(
        [] if wrong else rows,  # everything looks wrong until the unit is right
        [] if wrong else compared,
        use_stress=use_stress,
        sets_by=None if sets is None else sets.by,
    )
    if judged.bad and not wrong:  # a few wrong labels make all forces seem not to correlate
        found = units([i for i in range(len(rows)) if i not in judged.bad])
    if judged.bad and raises and recipe.data.bad_labels == "stop":
        index, reason = next(iter(judged.bad.items()))
        raise DataError(
            f"{len(judged.bad)} replayed frames have labels that do not belong to their structures, the "
            f"first: {reason}",
            file=rows[index]["source"],
            frame=rows[index]["frame"],
            field=reason.partition(" ")[0],
            remedy="blip-finetune check lists all; mend or remove them, or set data.bad_labels to drop or warn",
        )
    findings = [finding for _, finding in found] + judged.findings
    return ReplayLabels(
        [replace(finding, message=f"replay: {finding.message}") for finding in findings], judged, len(rows)
    )


def examine_replay(
    recipe: Recipe, backbone: Backbone, progress: Callable[[int, int], Any] | None = None
) -> list[Finding]:
    """What ``blip-finetune check`` says of replayed frames; nothing where the recipe has none.

    Raises:
        DataError: as for :func:`replayed_rows`.
    """
    options, findings = recipe.data.replay, list[Finding]()
    if options is None or options.source is None:
        return findings
    rows = replayed_rows(recipe.data, backbone, findings)
    if options.labels == "own" and rows:
        compared = compare(rows, backbone, progress)
        by_state = not backbone.conditions
        findings += judge_replay(recipe, rows, compared, by_state=by_state, raises=False).findings
    return findings
