"""The data report: everything that can be said about a set before anything is trained on it.

``examine`` looks at every frame of every role and at the labels beside a pretrained model's
predictions. It is what ``blip-finetune check`` prints and a part of ``blip-finetune fit``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np
from ase import Atoms, units
from ase.data import chemical_symbols
from ase.formula import Formula

from blip_ft.backbones.protocol import Backbone
from blip_ft.data.batch.dataset import FrameDataset, Item, make_item
from blip_ft.data.batch.ledger import Ledger
from blip_ft.data.check.energy_sets import energy_sets, known_sets
from blip_ft.data.check.label_faults import (
    MIN_FRAMES,
    Compared,
    LabelCheck,
    LabelFault,
    check_labels,
    energy_residual,
)
from blip_ft.data.check.leaks import group_leaks
from blip_ft.data.check.sets import check_frames, unit_findings
from blip_ft.data.findings import SEVERITIES, Finding, place
from blip_ft.data.frame import FrameRow
from blip_ft.data.read.unused import unmatched_labels
from blip_ft.data.robust import Floats
from blip_ft.data.split.splits import Splits
from blip_ft.errors import DataError

#: frames whose labels are compared with the pretrained model; of more, an even sample
MAX_COMPARED = 5000


@dataclass
class DataReport:
    """What ``examine`` found.

    Attributes:
        findings: errors first.
        summary: ``{role: {...}}``: counts, elements and ranges, see :func:`summarise`.
        model: ``{role: {...}}``: errors of the pretrained model, see :func:`model_errors`.
        frames: one entry per frame that was compared, for plots: ``role``, ``energy`` and
            ``energy_residual`` (eV/atom, relative), ``forces`` (rms label), ``forces_residual``,
            ``forces_usual`` (eV/Å), ``fault``.
        bad: ``{role: {row: reason}}`` of the frames with a wrong label.
        certain: those of them whose label is wrong beyond doubt.
    """

    findings: list[Finding]
    summary: dict[str, dict[str, Any]]
    model: dict[str, dict[str, Any]] = field(default_factory=dict)
    frames: dict[str, list[Any]] = field(default_factory=dict)
    bad: dict[str, dict[int, str]] = field(default_factory=dict)
    certain: dict[str, dict[int, str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "summary": self.summary,
            "model": self.model,
            "findings": [f.to_json() for f in self.findings],
        }


def examine(
    splits: Splits,
    backbone: Backbone,
    *,
    findings: Sequence[Finding] | None = None,
    use_stress: bool = False,
    most: int = MAX_COMPARED,
    progress: Callable[[int, int], Any] | None = None,
    sets: Mapping[str, FrameDataset] | None = None,
    ledger: Ledger | None = None,
    sets_by: str | None = None,
) -> DataReport:
    """Look at all frames, and at their labels beside the pretrained model.

    Args:
        splits: frames of every role.
        backbone: the pretrained model, as loaded.
        findings: of ``check_frames``, ``group_leaks``, ``labels_found`` and ``check_units`` where they have
            been called; otherwise all are done here, and a wrong unit is a finding, not an error.
        use_stress: stress will be trained on.
        most: frames to compare with the model; of more, an even sample is taken and said so.
        progress: called with the number of frames predicted and of all that will be.
        sets: the roles with their graphs, where these are needed again.
        ledger: of the model, where its predictions are.
        sets_by: column that names the set of a frame, where each set has references of its own.

    Raises:
        DataError: an empty role, a frame without labels, or an element the model does not know.
    """
    roles = splits.roles()
    if findings is None:
        # the message names the groups; whole roles of frames would bury what else is found
        leaks = [replace(finding, frames=[]) for finding in group_leaks(splits)]
        found = check_frames(splits, backbone) + leaks + unmatched_labels(roles, use_stress=use_stress)
    else:
        found = list(findings)
    report = DataReport(found, {name: summarise(frames) for name, frames in roles.items()})
    chosen = _chosen(roles, most)
    total = sum(len(frames) for frames in roles.values())
    if len(chosen) < total:
        message = f"labels of {len(chosen)} of {total} frames, evenly taken, are compared with the model"
        found.append(Finding("coverage", "info", [], message, "data.check_frames sets their number"))
    names, rows = [name for name, _ in chosen], [roles[name][index] for name, index in chosen]
    items = None if sets is None else (sets[name][index] for name, index in chosen)
    compared = compare(rows, backbone, progress, items=items, ledger=ledger)
    report.model = model_errors(names, compared)
    units_found, wrong_unit = list[Finding](), False

    def units(index: Sequence[int]) -> tuple[list[Finding], bool]:
        few = [names[i] for i in index], [rows[i] for i in index], [compared[i] for i in index]
        return _units(*few, use_stress, by_state=not backbone.conditions)

    if findings is None:
        units_found, wrong_unit = units(range(len(rows)))
    if not wrong_unit:  # everything looks wrong until the unit is right
        judged = judge_labels(rows, compared, use_stress=use_stress, sets_by=sets_by)
        found += judged.findings
        report.frames = _curves(names, compared, judged.check)
        for frames_of, wrong in ((report.bad, judged.bad), (report.certain, judged.certain)):
            for i, reason in wrong.items():
                role, index = chosen[i]
                frames_of.setdefault(role, {})[index] = reason
        if findings is None and judged.bad:  # a few wrong labels make all forces seem not to correlate
            units_found, _ = units([i for i in range(len(rows)) if i not in judged.bad])
        if 0 < len(compared) < MIN_FRAMES:
            message = f"{len(compared)} frames are too few to tell a wrong label from an error of the model"
            found.append(Finding("coverage", "info", [], message))
    found += units_found
    found.sort(key=lambda f: SEVERITIES.index(f.severity))
    return report


@dataclass
class JudgedLabels:
    """Labels beside predictions.

    Attributes:
        findings: sets of energies and wrong labels.
        check: residuals and faults.
        bad: {place of the frame: reason} of those with a wrong label.
        certain: those of them whose label is wrong beyond doubt.
    """

    findings: list[Finding]
    check: LabelCheck
    bad: dict[int, str] = field(default_factory=dict)
    certain: dict[int, str] = field(default_factory=dict)


def judge_labels(
    rows: Sequence[FrameRow], compared: Sequence[Compared], *, use_stress: bool, sets_by: str | None = None
) -> JudgedLabels:
    """Which labels do not belong to their structures.

    Args:
        rows: of the schema.
        compared: the same beside the pretrained model.
        use_stress: stress will be trained on.
        sets_by: column that names the set of a frame, where each set has references of its own.
    """
    sets_found = energy_sets(rows, compared) if sets_by is None else known_sets(rows, compared, sets_by)
    check = check_labels(sets_found.aligned(compared))  # each energy beside those of its own set
    if not use_stress:  # no frame is lost for a label that nobody trains on
        check.faults = [replace(f, certain=f.certain and f.label != "stress") for f in check.faults]
    judged = JudgedLabels([*sets_found.findings, *label_findings(check.faults, rows)], check)
    for fault in (f for f in check.faults if f.cause != "group" or f.certain):
        judged.bad[fault.index] = f"{fault.label} {_note(fault, rows)}"
        if fault.certain:
            judged.certain[fault.index] = judged.bad[fault.index]
    return judged


def without_bad_labels(splits: Splits, wrong: Mapping[str, Mapping[int, str]]) -> Splits:
    """The splits without frames that have a wrong label, each listed among the dropped ones.

    Args:
        splits: all roles.
        wrong: ``{role: {row: reason}}``: ``bad`` or ``certain`` of the report.

    Raises:
        DataError: nothing would be left of a role.
    """
    kept, dropped = {}, list(splits.dropped)
    for name, frames in splits.roles().items():
        bad = wrong.get(name, {})
        kept[name] = frames.select([i for i in range(len(frames)) if i not in bad]) if bad else frames
        dropped += [f"{place(frames[i])}: wrong label, {reason}" for i, reason in sorted(bad.items())]
        if not len(kept[name]):
            raise DataError(
                f"every frame of {name} has a wrong label",
                field="data.bad_labels",
                remedy="see blip-finetune check, and mend the labels",
            )
    n = sum(len(bad) for bad in wrong.values())
    tests = {name.removeprefix("test/"): f for name, f in kept.items() if name.startswith("test/")}
    rule = f"{splits.rule} {n} frame{'s' * (n != 1)} with a wrong label {'is' if n == 1 else 'are'} left out."
    return replace(
        splits,
        train=kept["train"],
        validation=kept["validation"],
        calibration=kept["calibration"],
        test=tests,
        rule=rule,
        dropped=dropped,
    )


# ---- what the set is -------------------------------------------------------------------------


def summarise(frames: datasets.Dataset) -> dict[str, Any]:
    """Counts, elements, compositions, ranges of labels; energies eV/atom, forces eV/Å, stress GPa."""
    n, energy, largest, rms, pressure = [], [], [], [], []
    stress_range = [np.inf, -np.inf]
    elements: set[int] = set()
    compositions: set[tuple[int, ...]] = set()
    labels = {"energy": 0, "forces": 0, "stress": 0}
    for row in frames:
        n.append(len(row["numbers"]))
        elements |= set(row["numbers"])
        compositions.add(tuple(np.bincount(row["numbers"])))
        for label in labels:
            labels[label] += row[label] is not None
        if row["energy"] is not None:
            energy.append(row["energy"] / n[-1])
        if row["forces"] is not None:
            norms = np.linalg.norm(row["forces"], axis=1)
            largest.append(float(norms.max()))
            rms.append(float(np.sqrt(np.mean(norms**2) / 3.0)))
        if row["stress"] is not None:
            values = np.asarray(row["stress"]) / units.GPa
            pressure.append(float(-values[:3].mean()))
            stress_range = [min(stress_range[0], values.min()), max(stress_range[1], values.max())]
    return {
        "frames": len(n),
        "atoms": int(np.sum(n)),
        "atoms_per_frame": _range(n),
        "elements": [chemical_symbols[z] for z in sorted(elements)],
        "compositions": len(compositions),
        "groups": len(set(frames["group"]) - {""}),
        "labels": labels,
        "energy_ev_per_atom": _range(energy),
        "force_rms_ev_per_ang": _range(rms),
        "largest_force_ev_per_ang": _range(largest),
        "stress_gpa": [float(v) for v in stress_range] if pressure else None,
        "pressure_gpa": _range(pressure),
    }


def _range(values: Sequence[float]) -> list[float] | None:
    """Smallest, median and largest."""
    if not len(values):
        return None
    return [float(np.min(values)), float(np.median(values)), float(np.max(values))]


# ---- beside the model ------------------------------------------------------------------------


def _chosen(roles: Mapping[str, datasets.Dataset], most: int) -> list[tuple[str, int]]:
    """(role, row) of the frames to compare."""
    total = sum(len(frames) for frames in roles.values())
    out: list[tuple[str, int]] = []
    for name, frames in roles.items():
        share = len(frames) if total <= most else round(most * len(frames) / total)
        if share:
            index = np.unique(np.linspace(0, len(frames) - 1, share).round().astype(int))
            out += [(name, int(i)) for i in index]
    return out


def compare(
    rows: Sequence[FrameRow],
    backbone: Backbone,
    progress: Callable[[int, int], Any] | None = None,
    *,
    items: Iterable[Item] | None = None,
    ledger: Ledger | None = None,
) -> list[Compared]:
    """Labels of rows of the schema beside the predictions of a model.

    Args:
        rows: the frames.
        backbone: the model.
        progress: called with the number of frames done and of all.
        items: of the same frames, where graphs exist already.
        ledger: of the model, where predictions do.
    """
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(done, len(rows))

    ledger = Ledger(backbone) if ledger is None else ledger
    structures: list[Atoms] = []

    def seen() -> Iterator[Item]:
        for item in (make_item(row, backbone) for row in rows) if items is None else items:
            structures.append(item.atoms)
            yield item

    known = ledger.ask(seen(), advance)
    return [
        Compared(
            atoms,
            row["energy"],
            None if row["forces"] is None else np.asarray(row["forces"], dtype=float),
            None if row["stress"] is None else np.asarray(row["stress"], dtype=float),
            said.energy,
            said.forces,
            said.stress,
            said.features,
            row["group"],
        )
        for row, atoms, said in zip(rows, structures, known, strict=True)
    ]


def _units(
    names: Sequence[str],
    rows: Sequence[FrameRow],
    compared: Sequence[Compared],
    use_stress: bool,
    *,
    by_state: bool,
) -> tuple[list[Finding], bool]:
    """Findings on units and signs per role, and whether energies or forces are in a wrong unit.

    What holds for train is not repeated for the other roles, and of a role that was divided off the sources of
    train only what is an error is told: that a few frames of one kind hardly correlate says little, where those of
    the whole file do.
    """
    found: list[Finding] = []
    wrong: set[str] = set()
    sources = {row["source"] for name, row in zip(names, rows, strict=True) if name == "train"}
    for role in dict.fromkeys(names):
        members = [i for i, name in enumerate(names) if name == role]
        divided = role != "train" and all(rows[i]["source"] in sources for i in members)
        predictions = [
            {
                "energy": compared[i].model_energy,
                "forces": compared[i].model_forces,
                "stress": compared[i].model_stress,
            }
            for i in members
        ]
        by_quantity = unit_findings(
            [rows[i] for i in members], predictions, use_stress=use_stress, by_state=by_state
        )
        for quantity, finding in by_quantity.items():
            if quantity not in wrong and not (divided and finding.severity != "error"):
                found.append(replace(finding, message=f"{role}: {finding.message}"))
            if finding.severity == "error":
                wrong.add(quantity)
    return found, bool(wrong & {"energy", "forces"})


def model_errors(roles: Sequence[str], compared: Sequence[Compared]) -> dict[str, dict[str, Any]]:
    """Mean absolute errors of the pretrained model per role, without what is wrong with its zero.

    Energies are compared after a shift per element (least squares over all roles).
    """
    labelled = [i for i, c in enumerate(compared) if c.energy is not None]
    residual = np.full(len(compared), np.nan)
    if labelled:
        elements = sorted({int(z) for i in labelled for z in np.unique(compared[i].atoms.numbers)})
        shares = np.array([[np.mean(compared[i].atoms.numbers == z) for z in elements] for i in labelled])
        raw = np.array([energy_residual(compared[i]) for i in labelled])
        residual[labelled] = raw - shares @ np.linalg.lstsq(shares, raw, rcond=None)[0]
    out: dict[str, dict[str, Any]] = {}
    for role in dict.fromkeys(roles):
        members = [i for i, name in enumerate(roles) if name == role]
        forces = [c.forces - c.model_forces for c in (compared[i] for i in members) if c.forces is not None]
        stress = [
            c.stress - c.model_stress
            for c in (compared[i] for i in members)
            if c.stress is not None and c.model_stress is not None
        ]
        out[role] = {
            "frames": len(members),
            "energy_mae_mev_per_atom": _mean(1e3 * np.abs(residual[members])),
            "energy_labels": int(np.isfinite(residual[members]).sum()),
            "force_mae_mev_per_ang": _mean(1e3 * np.abs(np.concatenate(forces)) if forces else np.zeros(0)),
            "force_labels": sum(f.size for f in forces),
            "stress_mae_gpa": _mean(np.abs(np.array(stress)) / units.GPa),
            "stress_labels": sum(s.size for s in stress),
        }
    return out


def _mean(values: Floats) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else None


def _curves(roles: Sequence[str], compared: Sequence[Compared], check: LabelCheck) -> dict[str, list[Any]]:
    faults: dict[int, str] = {}
    for fault in (f for f in check.faults if f.cause != "group"):
        faults[fault.index] = ", ".join(filter(None, (faults.get(fault.index), fault.label)))
    size = [np.nan if c.forces is None else float(np.sqrt(np.mean(c.forces**2))) for c in compared]
    energy = [np.nan if c.energy is None else c.energy / len(c.atoms) for c in compared]
    columns = {
        "energy": energy,
        "energy_residual": check.energy.tolist(),
        "energy_usual": check.energy_usual.tolist(),
        "forces": size,
        "forces_residual": check.forces.tolist(),
        "forces_usual": check.forces_usual.tolist(),
    }
    return {
        "role": list(roles),
        **{k: [None if not np.isfinite(v) else float(v) for v in values] for k, values in columns.items()},
        "fault": [faults.get(i, "") for i in range(len(compared))],
    }


# ---- faults as findings ----------------------------------------------------------------------

_MESSAGES = {
    ("energy", "offset"): "the energies of {n} frames are off from what the model and the other frames say",
    ("forces", "axes"): "the forces of {n} frames fit only with other axes",
    ("forces", "factor"): "the forces of {n} frames fit only with a factor",
    ("forces", "frame"): "the forces of {n} frames are those of another frame",
    ("forces", "atoms"): "the forces of {n} frames fit only in another order of the atoms",
    ("forces", "unknown"): "the forces of {n} frames do not belong to their structures",
    ("stress", "unknown"): "the stresses of {n} frames do not belong to their structures",
}
_REMEDIES = {
    "offset": "another kind of structure than the others (molecule, surface, other composition), other settings "
    "or level of theory, or a calculation that did not converge: look which; remove or repeat the frames "
    "that are wrong (data.bad_labels: drop leaves them out)",
    "axes": "write positions and forces in the same frame of axes",
    "factor": "convert all frames from one unit",
    "frame": "labels and structures were joined in different orders: join them again",
    "atoms": "a program sorted the atoms (by element, say): bring forces into the order of the positions",
    "unknown": "labels of another structure, a calculation that did not finish or converge, or a kind of structure "
    "that the model does not know: look which; remove or repeat the frames that are wrong (data.bad_labels: "
    "drop leaves them out)",
}


_PLURAL = {"energy": "energies", "forces": "forces", "stress": "stresses"}
_CERTAIN = "mend or remove them; fit leaves them out, in every role, unless data.bad_labels is warn (uses them) or stop"


def label_findings(faults: Sequence[LabelFault], rows: Sequence[FrameRow]) -> list[Finding]:
    """One finding for each label and cause, with every frame."""
    out = []
    certain: dict[str, list[LabelFault]] = {}
    for fault in (f for f in faults if f.certain):
        certain.setdefault(fault.label, []).append(fault)
    for label, members in certain.items():
        frames = [place(rows[fault.index], _note(fault, rows)) for fault in members]
        message = f"the {_PLURAL[label]} of {len(members)} frames are wrong beyond doubt"
        out.append(Finding("label", "warning", frames, message, _CERTAIN))
    groups: dict[tuple[str, str], list[LabelFault]] = {}
    for fault in (f for f in faults if not f.certain):
        groups.setdefault((fault.label, fault.cause), []).append(fault)
    together = groups.pop(("energy", "group"), [])
    if together:
        names = sorted({_kind(rows[fault.index]) for fault in together})
        message = f"all energies of {', '.join(names)} are off from what the model and the others say"
        remedy = "an error of the model there, or other settings than for the rest"
        out.append(Finding("label", "info", [], message, remedy))
    for key, members in groups.items():
        frames = [place(rows[fault.index], _note(fault, rows)) for fault in members]
        message = _MESSAGES[key].format(n=len(members))
        out.append(Finding("label", "warning", frames, message, _REMEDIES[key[1]]))
    return out


def _kind(row: FrameRow) -> str:
    formula = Formula.from_list([chemical_symbols[z] for z in row["numbers"]]).format("hill")
    return f"{formula} ({row['group']})" if row["group"] else formula


def _composition(row: FrameRow) -> tuple[tuple[int, ...], ...]:
    """Elements and their reduced numbers."""
    zs, counts = np.unique(row["numbers"], return_counts=True)
    return tuple(zs.tolist()), tuple((counts // np.gcd.reduce(counts)).tolist())


def _note(fault: LabelFault, rows: Sequence[FrameRow]) -> str:
    energy = fault.label == "energy"
    factor, unit = {"energy": (1e3, "meV/atom"), "forces": (1e3, "meV/Å")}.get(
        fault.label, (1 / units.GPa, "GPa")
    )
    usual = factor * fault.usual  # unknown where there are few frames
    known = f", usual {usual:{'.1f' if energy else '.3g'}}" if np.isfinite(usual) else ""
    if energy:
        own = _composition(rows[fault.index])
        others = (row for i, row in enumerate(rows) if i != fault.index)
        alone = (
            ""
            if any(map(own.__eq__, map(_composition, others)))
            else "; no other frame is of this composition"
        )
        return f"{factor * fault.size:+.0f} {unit}{known}{alone}"
    if fault.other is not None:
        return f"those of frame {rows[fault.other]['frame']}"
    if fault.text:
        return fault.text
    return f"off by {factor * fault.size:.3g} {unit}{known}"
