"""Groups (trajectories, phases, ...) that stand in the training frames and in a held-out role."""

from __future__ import annotations

from blip_ft.data.findings import Finding
from blip_ft.data.split.splits import Splits

_REMEDY = (
    "errors there are those of neighbours in a trajectory; for new ones divide by group (data.split.by: group) or give "
    "frames of other groups"
)
_ONE_GROUP = (
    "all frames are of this one group: if it is one trajectory, errors are those of its neighbours, and "
    "another one would "
    "tell more; name trajectories by data.fields: {group: KEY} if there are several"
)


def group_leaks(splits: Splits) -> list[Finding]:
    """One finding for each held-out role that shares groups with the training frames.

    Neighbouring frames of a trajectory are nearly one structure, so errors on such a role are
    smaller, and error bars better, than on a new trajectory. That is a warning for test sets. For
    validation and calibration, which are often cut off the same trajectories on purpose, it is
    mentioned. Frames that name no group are not compared. One group of all frames tells nothing apart, least
    of all where it is the name of the substance: that is mentioned too.
    """
    train = set(splits.train["group"]) - {""}
    single = len({group for frames in splits.roles().values() for group in set(frames["group"])}) == 1
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
                "warning" if role.startswith("test") and not single else "info",
                places,
                f"{role}: {len(places)} of {len(frames)} frames are of groups that are trained on ({names})",
                _ONE_GROUP if single else _REMEDY,
            )
        )
    return findings
