"""Rearranged code of e3nn: the same numbers to the last bit, to second order."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import symbolic_trace

from blip_ft.adapters.shared.graphs import cat, rearrange


class Paths(nn.Module):
    """Cuts a matrix the way e3nn does, each part times itself and a factor, and puts some of them together."""

    def __init__(self, edges: Sequence[int], *, width: int, narrow: bool) -> None:
        super().__init__()
        self.spans, self.width, self.narrow = list(itertools.pairwise(edges)), width, narrow

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, self.width)
        parts = [x.narrow(-1, a, b - a) if self.narrow else x[:, a:b] for a, b in self.spans]
        return torch.cat([(i + 1) * p * p for i, p in enumerate(parts)], dim=1)


def derivatives(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient of a function of it, and gradient of a function of that."""
    x = x.clone().requires_grad_(True)
    value = model(x)
    (first,) = torch.autograd.grad(value.sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return value.detach(), first.detach(), second


@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=6),
    rest=st.sampled_from([(0, 0), (1, 0), (0, 2)]),
    narrow=st.booleans(),
    seed=st.integers(0, 100),
)
def test_slices_that_are_all_become_one_split(
    sizes: list[int], rest: tuple[int, int], narrow: bool, seed: int
) -> None:
    """And others, with columns before or behind that nobody takes, stay slices."""
    edges = [rest[0] + n for n in itertools.accumulate([0, *sizes])]
    width = edges[-1] + rest[1]
    ours = symbolic_trace(Paths(edges, width=width, narrow=narrow))
    theirs = copy.deepcopy(ours)
    assert rearrange(ours) == 1
    assert ("split" in ours.code) == (rest == (0, 0))
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    for a, b in zip(derivatives(ours, x), derivatives(theirs, x), strict=True):
        assert torch.equal(a, b)


def test_writes_in_place_stay() -> None:
    """e3nn's ``Extract`` fills its outputs slice by slice, and reads none of these slices."""

    class Fill(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.reshape(-1, 5)
            out = x.new_zeros((3, 5))
            out.narrow(-1, 0, 2).copy_(x.narrow(-1, 3, 2))
            out.narrow(-1, 2, 3).copy_(x.narrow(-1, 0, 3))
            return out

    ours = symbolic_trace(Fill())
    theirs = copy.deepcopy(ours)
    rearrange(ours)
    x = torch.randn(3, 5)
    assert torch.equal(ours(x), theirs(x))
    assert bool(ours(x).any())


def test_results_that_nothing_reads_go() -> None:
    class Unused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.functional.einsum("ab,cb->ac", x, x)
            return 2 * x

    ours = symbolic_trace(Unused())
    assert "einsum" in ours.code
    rearrange(ours)
    assert "einsum" not in ours.code


def test_cat_to_second_order() -> None:
    parts = [torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (1, 3, 2)]

    def value(*x: Tensor) -> Tensor:
        return cat(x, 1).sin()

    assert torch.autograd.gradcheck(value, parts)
    assert torch.autograd.gradgradcheck(value, parts)
    assert torch.equal(cat(parts, 1), torch.cat(parts, 1))


@pytest.mark.backend("sevennet")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sevennet(dtype: torch.dtype) -> None:
    """The real model: energies, forces, stress, and what training needs of them."""
    from ase.build import bulk

    from blip_ft.adapters.sevennet.backbone import SevenNetBackbone

    theirs = SevenNetBackbone.load("7net-0").to(dtype=dtype)
    ours = SevenNetBackbone.load("7net-0").to(dtype=dtype)
    assert rearrange(ours.model) > 10
    atoms = bulk("SiO", "rocksalt", a=4.1)
    atoms.rattle(0.1, seed=0)
    found = []
    for backbone in (theirs, ours):
        out = backbone(backbone.batch([atoms]), forces=True, stress=True, create_graph=True)
        weights = [p for p in backbone.model.parameters() if p.requires_grad]
        (out.energy.sum() + out.forces.square().sum()).backward()
        found.append([out.energy, out.forces, out.stress, *(w.grad for w in weights)])
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
