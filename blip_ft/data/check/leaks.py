"""Groups (trajectories, phases, ...) that stand in the training frames and in a held-out role."""

from __future__ import annotations

from blip_ft.data.findings import Finding
from blip_ft.data.split.splits import Splits


def group_leaks(splits: Splits) -> list[Finding]:
    """One finding for each held-out role that shares groups with the training frames.

    Neighbouring frames of a trajectory are nearly one structure, so errors on such a role are
    smaller, and error bars better, than on a new trajectory. That is a warning for test sets. For
    validation and calibration, which are often cut off the same trajectories on purpose, it is
    mentioned. Frames that name no group are not compared.
    """
    train = set(splits.train["group"]) - {""}
    findings = []
    for role, frames in splits.roles().items():
        shared = sorted(train & set(frames["group"])) if role != "train" else []
        if not shared:
            continue
        places = [
            f"{source}, frame {frame}"
            for source, frame, group in zip(frames["source"], frames["frame"], frames["group"], strict=True)
            if group in train
        ]
        names = ", ".join(shared[:5]) + (", ..." if len(shared) > 5 else "")
        findings.append(
            Finding(
                "leak",
                "warning" if role.startswith("test") else "info",
                places,
                f"{role}: {len(places)} of {len(frames)} frames are of groups that are trained on ({names})",
                "errors there are those of neighbours in a trajectory; for new ones divide by group "
                "(data.split.by: group) or give frames of other groups",
            )
        )
    return findings
