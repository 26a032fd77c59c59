import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from blip_ft.variational.noise import NoiseState, RowLayout, grouped_matmul, keyed_row_normal, normal

counts_lists = st.lists(st.integers(0, 5), min_size=1, max_size=6)


def rows_of(counts):
    return RowLayout.from_index(torch.repeat_interleave(torch.tensor(counts)), len(counts))


class TestNormal:
    def test_numbers_are_frozen(self):
        # the draws of a saved model are made again from its seed: these numbers must never change
        expected = [-0.06732949898481182, 1.549316690385637, -0.6283418074056656]
        assert normal(("draw", 0, 0, "layer"), 3).tolist() == pytest.approx(expected, abs=1e-15)

    def test_function_of_the_key_alone(self):
        torch.manual_seed(1)
        first = normal(("structure", 3, 1, 12345, "layer"), 7)
        torch.manual_seed(2)
        normal(("other",), 100)
        assert torch.equal(first, normal(["structure", 3, 1, 12345, "layer"], 7))

    def test_same_in_another_process(self):
        code = (
            "from blip_ft.variational.noise import normal; print(normal(('a', 1, 2**62, 'b.c'), 4).tolist())"
        )
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert output.stdout.strip() == str(normal(("a", 1, 2**62, "b.c"), 4).tolist())

    def test_leaves_global_generators_alone(self):
        state = torch.random.get_rng_state()
        normal(("x",), 10)
        assert torch.equal(state, torch.random.get_rng_state())

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (("a", 1, 23), ("a", 12, 3)),
            (("a", 1), ("a", "1")),
            (("a", 2**63 - 1), ("a", 2**31 - 1)),
            (("a", 2**62), ("a", 2**62 + 1)),
            (("ab", "c"), ("a", "bc")),
        ],
    )
    def test_keys_that_differ(self, one, other):
        assert not torch.isclose(normal(one, 8), normal(other, 8)).any()

    def test_other_precision_is_the_same_noise_rounded(self):
        assert torch.equal(normal(("k",), 50, torch.float32), normal(("k",), 50).float())

    def test_law_is_standard_normal(self):
        one_stream = normal(("long",), 20_000).numpy()
        one_each = torch.cat([normal(("short", i), 1) for i in range(5_000)]).numpy()
        assert kstest(one_stream, "norm").pvalue > 1e-3
        assert kstest(one_each, "norm").pvalue > 1e-3

    def test_streams_of_neighbouring_keys_are_uncorrelated(self):
        streams = torch.stack([normal(("structure", 0, e, k), 4_000) for e in range(4) for k in range(4)])
        correlation = torch.corrcoef(streams) - torch.eye(16)
        assert correlation.abs().max() < 5 / 4_000**0.5

    def test_a_longer_stream_starts_alike(self):
        assert torch.equal(normal(("k",), 5), normal(("k",), 9)[:5])


class TestRows:
    @given(counts=counts_lists, width=st.integers(1, 4))
    def test_unpad_inverts_pad(self, counts, width):
        rows = rows_of(counts)
        assert rows.counts == tuple(counts)
        x = torch.arange(1.0, 1 + sum(counts) * width).reshape(sum(counts), width)
        padded = rows.pad(x)
        assert padded.shape == (len(counts), max(counts), width)
        start = 0
        for i, count in enumerate(counts):
            assert torch.equal(padded[i, :count], x[start : start + count])
            assert (padded[i, count:] == 0).all()
            start += count
        assert torch.equal(rows.unpad(padded), x)

    def test_trailing_structures_without_rows_are_counted(self):
        assert RowLayout.from_index(torch.tensor([0, 2, 2]), 5).counts == (1, 0, 2, 0, 0)

    def test_gradients_pass_through_padding(self):
        rows = rows_of([2, 0, 3])
        x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda a, b: grouped_matmul(a, b, rows), (x, weight))


class TestGroupedMatmul:
    @given(
        counts=counts_lists,
        shape=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        seed=st.integers(0, 100),
    )
    def test_equals_a_loop_over_rows(self, counts, shape, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        rows = rows_of(counts)
        x = torch.randn(sum(counts), shape[0], dtype=dtype, generator=generator)
        weight = torch.randn(len(counts), *shape, dtype=dtype, generator=generator)
        out = grouped_matmul(x, weight, rows)
        assert out.shape == (sum(counts), shape[1])
        assert out.dtype == dtype
        for r, structure in enumerate(rows.index.tolist()):
            torch.testing.assert_close(out[r], x[r] @ weight[structure])


class TestRowNormal:
    like = torch.zeros((), dtype=torch.float64)

    def draw(self, keys, counts, *, seed=0, epoch=0, site="layer", width=3):
        return keyed_row_normal(seed, epoch, keys)(site, rows_of(counts), width, self.like)

    @given(
        counts=st.lists(st.integers(0, 4), min_size=2, max_size=5),
        order=st.permutations(range(5)),
    )
    def test_belongs_to_the_structure_whatever_the_batch(self, counts, order):
        keys = [10 + i for i in range(len(counts))]
        order = [i for i in order if i < len(counts)]
        together = self.draw(keys, counts).split(counts)
        shuffled = self.draw([keys[i] for i in order], [counts[i] for i in order])
        for i, part in zip(order, shuffled.split([counts[i] for i in order]), strict=True):
            assert torch.equal(part, together[i])
            assert torch.equal(part, self.draw([keys[i]], [counts[i]]))

    @pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"site": "other"}, {"keys": [2]}])
    def test_seed_epoch_layer_and_structure_all_matter(self, change):
        first = self.draw([1], [50])
        other = self.draw(**({"keys": [1], "counts": [50]} | change))
        assert not torch.isclose(first, other).any()

    def test_rows_are_independent(self):
        eps = self.draw([1, 2], [3_000, 3_000], width=2).reshape(2, 3_000, 2)
        streams = torch.cat([eps[0].T, eps[1].T])
        torch.testing.assert_close(torch.cov(streams), torch.eye(4, dtype=torch.float64), atol=0.1, rtol=0)
        shifted = torch.corrcoef(torch.stack([eps[0, :-1, 0], eps[0, 1:, 0]]))[0, 1]
        assert abs(shifted) < 0.1

    def test_keys_and_structures_must_agree(self):
        with pytest.raises(ValueError, match="zip"):
            self.draw([1], [2, 2])


def test_clear_forgets_everything():
    state = NoiseState(
        "local", {"a": torch.ones(1)}, {"a": torch.ones(1)}, {"atom": rows_of([1])}, lambda *_: torch.ones(1)
    )
    state.clear()
    assert state == NoiseState()
