import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blip_ft.data.batch.sampler import EpochBatchSampler
from blip_ft.objectives import ElboScale

DOUBLE = torch.float64


@st.composite
def plans(draw):
    """(number of structures, list of steps, each a list of the ranks' shares)."""
    n = draw(st.integers(1, 20))
    order = draw(st.permutations(range(n)))
    cuts = sorted(draw(st.sets(st.integers(1, n), max_size=5)) | {0, n})
    world = draw(st.integers(1, 3))
    steps = []
    for a, b in itertools.pairwise(cuts):
        inner = sorted(draw(st.lists(st.integers(a, b), min_size=world - 1, max_size=world - 1)))
        edges = [a, *inner, b]
        steps.append([list(order[i:j]) for i, j in itertools.pairwise(edges)])
    return n, steps, world


class TestBatchPlan:
    @given(plan=plans(), temperature=st.floats(0.01, 100), kl=st.floats(0, 1000))
    def test_an_epoch_does_not_depend_on_it(self, plan, temperature, kl):
        """Mean over steps and ranks = mean NLL + T/N KL, for unequal batches and unequal ranks."""
        n, steps, world = plan
        nll = torch.linspace(-3, 50, n, dtype=DOUBLE) ** 2
        kl = torch.tensor(kl, dtype=DOUBLE)
        scale = ElboScale(n, len(steps), temperature)
        losses = [
            [scale.loss(nll[ids], kl, epoch=3, world=world) for ids in shares] for shares in steps
        ]  # gradients, hence losses, are averaged over ranks
        epoch = sum(sum(step) / world for step in losses) / len(steps)
        torch.testing.assert_close(epoch, nll.mean() + temperature / n * kl)

    @pytest.mark.parametrize(("n", "batch_size", "world"), [(36, 4, 1), (37, 4, 2), (7, 4, 1), (5, 8, 3)])
    def test_with_the_real_sampler(self, n, batch_size, world):
        samplers = [EpochBatchSampler(n, batch_size, seed=1, world=world, rank=r) for r in range(world)]
        nll = torch.arange(n, dtype=DOUBLE)
        scale = ElboScale(n, len(samplers[0]))
        losses = [
            sum(scale.loss(nll[ids], torch.tensor(10.0), epoch=0, world=world) for ids in sampler)
            for sampler in samplers
        ]
        torch.testing.assert_close(
            sum(losses) / world / len(samplers[0]), nll.mean() + torch.tensor(10.0 / n, dtype=DOUBLE)
        )

    def test_every_structure_weighs_the_same(self):
        """Dividing by a batch's own size would weigh structures of small batches more."""
        nll = torch.ones(5, dtype=DOUBLE, requires_grad=True)
        scale = ElboScale(5, 2)
        zero = torch.zeros((), dtype=DOUBLE)
        (scale.loss(nll[:4], zero, epoch=0) + scale.loss(nll[4:], zero, epoch=0)).backward()
        torch.testing.assert_close(nll.grad, torch.full((5,), 2 / 5, dtype=DOUBLE))


class TestKlWeight:
    def test_exact(self):
        assert ElboScale(50, 10).kl_weight(0) == 1 / 50
        assert ElboScale(50, 10, temperature=3.0).kl_weight(7) == 3 / 50

    def test_warm_up_is_linear_in_the_epoch(self):
        scale = ElboScale(10, 5, temperature=2.0, kl_warmup=4)
        assert [scale.kl_weight(e) for e in (0, 1, 2.5, 4, 9)] == pytest.approx([0, 0.05, 0.125, 0.2, 0.2])

    def test_warm_up_scales_the_kl_only(self):
        scale = ElboScale(10, 5, kl_warmup=4)
        nll, kl = torch.ones(2, dtype=DOUBLE), torch.tensor(8.0, dtype=DOUBLE)
        assert scale.loss(nll, kl, epoch=0).item() == pytest.approx(1.0)
        assert scale.loss(nll, kl, epoch=2).item() == pytest.approx(1.0 + 0.4)
        assert scale.loss(nll, kl, epoch=4).item() == pytest.approx(1.0 + 0.8)

    def test_divisor(self):
        assert ElboScale(37, 10).divisor == 3.7
