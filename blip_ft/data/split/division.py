"""How a set of frames is divided into roles: by group, by time block, at random.

Everything here works on indices and is a function of its arguments only: the same frames, shares
and seed give the same division on every machine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from blip_ft.errors import DataError


def fractions(held_out: Mapping[str, float], n: int, source: str) -> dict[str, float]:
    """Shares of all roles, ``train`` first with what the others leave.

    Args:
        held_out: share of each role to divide off.
        n: number of frames.
        source: what to name in errors.

    Raises:
        DataError: the shares leave nothing for training, or there are fewer frames than roles.
    """
    rest = 1.0 - sum(held_out.values())
    if rest <= 0:
        raise DataError(
            f"{', '.join(held_out)} take {sum(held_out.values()):.0%} of the frames and leave none to train on",
            field="data.split",
            remedy="make the shares smaller",
        )
    if n <= len(held_out):
        raise DataError(
            f"{n} frame{'s' * (n != 1)} cannot be divided into train, {', '.join(held_out)}",
            file=source,
            remedy="give more frames, or files for data.validation, data.calibration and data.test",
        )
    return {"train": rest, **held_out}


def counts(n: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Frames of each role: rounded shares of ``n``, at least one each, ``n`` together.

    ``n`` must be at least the number of roles.
    """
    result = {role: max(1, round(share * n)) for role, share in shares.items()}
    while sum(result.values()) > n:
        result[max(result, key=lambda role: result[role])] -= 1
    result[next(iter(result))] += n - sum(result.values())
    return result


def by_random(n: int, shares: Mapping[str, float], seed: int) -> tuple[dict[str, list[int]], str]:
    """Frame by frame; indices of each role, and what was done in a sentence."""
    order = np.random.default_rng(seed).permutation(n).tolist()
    return _cut(order, shares), f"Divided at random (seed {seed})."


def by_group(
    groups: Sequence[str], shares: Mapping[str, float], seed: int
) -> tuple[dict[str, list[int]], str]:
    """Whole groups to one role each, or blocks of every group where there are too few.

    The groups are shuffled and then taken from the largest to the smallest, each to the role that
    lacks most frames of its share; the last ones go to roles that are still empty.

    Args:
        groups: group of each frame.
        shares: share of each role.
        seed: of the shuffle.

    Returns:
        Indices of each role, and what was done in a sentence.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    if len(members) < len(shares):
        return _by_block(list(members.values()), len(groups), shares)
    names = list(members)
    order = sorted(
        np.random.default_rng(seed).permutation(len(names)).tolist(), key=lambda i: -len(members[names[i]])
    )
    roles: dict[str, list[int]] = {role: [] for role in shares}
    for place, index in enumerate(order):
        empty = [role for role, indices in roles.items() if not indices]
        candidates = empty if len(order) - place <= len(empty) else list(roles)
        lack = {role: shares[role] * len(groups) - len(roles[role]) for role in candidates}
        roles[max(lack, key=lambda role: lack[role])] += members[names[index]]
    return roles, f"Divided by whole groups ({len(members)} groups, seed {seed})."


def by_block(groups: Sequence[str], shares: Mapping[str, float]) -> tuple[dict[str, list[int]], str]:
    """Contiguous blocks in file order of every group: train first, then the others.

    Args:
        groups: group of each frame; all the same where there are none.
        shares: share of each role.

    Returns:
        Indices of each role, and what was done in a sentence.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    roles, _ = _by_block(list(members.values()), len(groups), shares)
    what = f" inside each of {len(members)} groups" if len(members) > 1 else ""
    return roles, f"Divided into contiguous blocks in file order{what}."


def _by_block(
    members: list[list[int]], n: int, shares: Mapping[str, float]
) -> tuple[dict[str, list[int]], str]:
    roles: dict[str, list[int]] = {role: [] for role in shares}
    for indices in members:
        if len(indices) < len(shares):
            roles["train"] += indices
            continue
        for role, block in _cut(indices, shares).items():
            roles[role] += block
    rule = (
        f"Divided into contiguous blocks in file order inside each group, since {len(members)} "
        f"group{'s' * (len(members) != 1)} cannot be shared whole by {len(shares)} roles."
    )
    if not all(roles.values()):
        roles = _cut(list(range(n)), shares)
        rule = "Divided into contiguous blocks in file order, since the groups are too small to be cut."
    return roles, rule


def _cut(order: list[int], shares: Mapping[str, float]) -> dict[str, list[int]]:
    """Consecutive pieces of ``order``, in the order of the roles."""
    edges = np.cumsum([0, *counts(len(order), shares).values()]).tolist()
    return {role: order[a:b] for role, a, b in zip(shares, edges, edges[1:], strict=False)}
