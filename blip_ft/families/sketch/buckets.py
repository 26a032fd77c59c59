"""Count sketch of the weights: every weight has one bucket and one sign, both from a keyed hash.

Charikar, Chen and Farach-Colton (ICALP 2002). The map S (P, m) has one +-1 in every row and is never
stored: the hash is a function of its version, a seed, the name of a site and the place of a weight in it, the same on
every device and in every process. Bucket and sign come from 64 bits, the bucket modulo m: where m divides M, buckets
of m are sums of those of M, so that what was summed in M buckets need not be summed again for m.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip_ft.variational.sites import Site

#: of the hash; another one makes other buckets of the same weights
VERSION = 1


def places(sites: Sequence[Site], buckets: int, seed: int = 0) -> Tensor:
    """(P,) int32 place of every weight: its bucket, plus ``buckets`` where its sign is negative.

    With as many buckets as weights each has its own, and the sketch is the identity.
    """
    total = sum(s.numel for s in sites)
    if buckets == total:
        return torch.arange(total, dtype=torch.int32)
    out = np.empty(total, dtype=np.int32)
    start = 0
    for site in sites:
        key = repr(("sketch", VERSION, seed, site.name)).encode()
        digest = hashlib.blake2b(key, digest_size=16).digest()
        bits = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(site.numel)
        bucket = (bits >> np.uint64(1)) % np.uint64(buckets)
        out[start : start + site.numel] = bucket + (bits & np.uint64(1)) * np.uint64(buckets)
        start += site.numel
    return torch.from_numpy(out)


def mark(place: Tensor) -> int:
    """63 bits that tell one map from another: of a version, of the sites, or of a number of buckets."""
    digest = hashlib.blake2b(repr(VERSION).encode(), digest_size=8)
    digest.update(place.cpu().numpy().astype("<i4").tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def to_buckets(flat: Tensor, place: Tensor, buckets: int) -> Tensor:
    """(B, P) -> (B, m) x S, in the precision of x; differentiable."""
    out: Tensor = _ToBuckets.apply(flat, place, buckets)
    return out


def to_weights(values: Tensor, place: Tensor) -> Tensor:
    """(B, m) -> (B, P) v S^T; differentiable."""
    out: Tensor = _ToWeights.apply(values, place)
    return out


def folded(values: Tensor, buckets: int) -> Tensor:
    """(B, M) sums in M buckets -> (B, m) those in m buckets; m divides M."""
    return values.reshape(len(values), -1, buckets).sum(dim=1)


class _ToBuckets(torch.autograd.Function):
    """x S; torch's own derivative of a gather adds number by number, and much slower."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, place: Tensor, buckets: int) -> Tensor:
        ctx.save_for_backward(place)
        signed = flat.new_zeros(len(flat), 2 * buckets).index_add_(1, place, flat)
        return signed[:, :buckets] - signed[:, buckets:]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (place,) = ctx.saved_tensors
        return _ToWeights.apply(grads[0], place), None, None


class _ToWeights(torch.autograd.Function):
    """v S^T."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.buckets = values.shape[1]
        return torch.cat([values, -values], dim=1).index_select(1, place)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (place,) = ctx.saved_tensors
        return _ToBuckets.apply(grads[0], place, ctx.buckets), None
