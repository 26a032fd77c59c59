"""Flipped signs: the law of one sample per structure for each, uncorrelated between structures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from blip_ft.variational.noise import RowLayout, keyed_signs

DOUBLE = torch.float64
needs_e3nn = pytest.mark.backend("sevennet")
LAYERS = ["linear", pytest.param("irreps", marks=needs_e3nn), pytest.param("radial", marks=needs_e3nn)]


def make_base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(4, 3).double()
    import e3nn.nn
    import e3nn.o3

    if kind == "irreps":
        return e3nn.o3.Linear("3x0e+2x1o+1x2e", "2x0e+2x1o+1x0e", biases=True).double()
    return e3nn.nn.FullyConnectedNet([4, 3], nn.functional.silu).double().layer0


def width(base: nn.Module) -> int:
    if isinstance(base, nn.Linear):
        return base.in_features
    return base.irreps_in.dim if hasattr(base, "irreps_in") else int(base.weight.shape[0])


def inputs(base: nn.Module, rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width(base), generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def flip(b, counts, *, step=0, epoch=0, keys=None) -> None:
    """Set the noise of one training step."""
    rows = RowLayout.from_index(torch.repeat_interleave(torch.tensor(counts)), len(counts))
    keys = list(range(len(counts))) if keys is None else keys
    b.noise.clear()
    b.noise.weights = b.posterior.sample(b.posterior.latent([("flipout", 0, step)], DOUBLE))
    b.noise.signs = keyed_signs(0, epoch, keys)
    b.noise.rows, b.noise.mode = {"atom": rows}, "flipout"


@pytest.mark.parametrize("kind", LAYERS)
class TestOneStructure:
    def test_is_the_layer_with_flipped_weights(self, bench, kind):
        """Each structure sees an ordinary weight: the shared sample times signs r_i s_o."""
        base = make_base(kind)
        b = bench(base)
        counts = [2, 0, 3]
        x = inputs(base, 5)
        flip(b, counts)
        noise = b.layer._perturbation(x)
        shared = b.noise.weights["layer"][0]
        into, outof = b.layer.channels()
        signs = b.noise.signs("layer", int(into.max()) + 1, int(outof.max()) + 1, x)
        start = 0
        for i, count in enumerate(counts):
            part = x[start : start + count]
            weight = torch.empty_like(shared)
            for block, (r, s) in zip(b.site.blocks, block_signs(b, base, signs, i), strict=True):
                matrix = r[:, None] * s[None, :] if block.output_axis == 1 else s[:, None] * r[None, :]
                flat = weight.reshape(-1)[block.start : block.start + block.numel]
                flat.copy_(shared.reshape(-1)[block.start : block.start + block.numel] * matrix.reshape(-1))
            expected = b.layer.sampled(part, weight[None], RowLayout.single(part))
            torch.testing.assert_close(noise[start : start + count], expected, rtol=1e-12, atol=1e-12)
            start += count

    def test_covariance_over_steps(self, bench, kind):
        """That of ``structure`` mode, within structures; none between them."""
        base = make_base(kind)
        b = bench(base)
        x = inputs(base, 2)
        n = 3000
        with torch.no_grad():
            offs = []
            for step in range(n):
                flip(b, [1, 1], step=step, epoch=step)
                offs.append(b.layer._perturbation(x[[0, 0]])[:, :3].flatten())
            off = torch.stack(offs)
            unit = torch.eye(b.posterior.latent_numel, dtype=DOUBLE)
            factor = b.posterior.sample(unit)["layer"]
            rows = RowLayout.from_index(torch.arange(len(unit)), len(unit))
            response = b.layer.sampled(x[[0]].expand(len(unit), -1), factor, rows)[:, :3]
            exact = torch.block_diag(*2 * [response.T @ response])
        scale = exact.diagonal().sqrt().clamp_min(1e-12)
        correlation = (off.T @ off / n) / torch.outer(scale, scale)
        assert (correlation - exact / torch.outer(scale, scale)).abs().max() < 5 * (2 / n) ** 0.5


def block_signs(b, base, signs, i):
    """(input signs, output signs) of every block of the weight for structure i."""
    r, s = signs[0][i], signs[1][i]
    if not hasattr(base, "instructions"):
        return [(r, s)]

    def starts(irreps):
        total, out = 0, []
        for mul, _ in irreps:
            out.append(total)
            total += mul
        return out

    first, second = starts(base.irreps_in), starts(base.irreps_out)
    out = []
    for ins in base.instructions:
        if ins.i_in != -1:
            rows, columns = ins.path_shape
            a, c = first[ins.i_in], second[ins.i_out]
            out.append((r[a : a + rows], s[c : c + columns]))
    return out


def test_uncorrelated_is_not_independent(bench):
    """Squares of two structures' noise correlate: the shared sample's size is common to them."""
    base = nn.Linear(1, 1).double()
    b = bench(base)
    x = torch.ones(2, 1, dtype=DOUBLE)
    squares = []
    for step in range(200):
        flip(b, [1, 1], step=step, epoch=step)
        squares.append(b.layer._perturbation(x).detach().flatten().square())
    assert torch.corrcoef(torch.stack(squares).T)[0, 1] > 0.99


@given(order=st.permutations(range(4)))
def test_signs_belong_to_the_structure(order):
    like = torch.zeros((), dtype=DOUBLE)
    keys = [10, 11, 12, 13]
    first, second = keyed_signs(0, 3, keys)("layer", 5, 4, like)
    a, b = keyed_signs(0, 3, [keys[i] for i in order])("layer", 5, 4, like)
    assert torch.equal(a, first[list(order)])
    assert torch.equal(b, second[list(order)])
    assert set(first.flatten().tolist()) <= {-1.0, 1.0}
    assert not torch.equal(keyed_signs(0, 4, keys)("layer", 5, 4, like)[0], first)


@needs_e3nn
@pytest.mark.parametrize("seed", range(3))
def test_equivariant(bench, random_rotation, seed):
    import e3nn.o3

    base = make_base("irreps")
    b = bench(base)
    x, rotation = inputs(base, 5, seed), random_rotation(seed)

    def turn(values, irreps):
        points = torch.randn(40, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
        blocks = []
        for mul, ir in irreps:
            y, z = (e3nn.o3.spherical_harmonics(ir.l, p, True) for p in (points, points @ rotation.T))
            blocks += mul * [torch.linalg.lstsq(y, z).solution.T]
        return values @ torch.block_diag(*blocks).T

    flip(b, [2, 3])
    torch.testing.assert_close(
        b.layer(turn(x, base.irreps_in)), turn(b.layer(x), base.irreps_out), rtol=1e-11, atol=1e-11
    )
