import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blip_ft.variational.sites import Block, Site, block_rms, expand_channels


@st.composite
def sites(draw):
    """A site of one to three blocks."""
    blocks, start = [], 0
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
        blocks.append(Block(start, shape, draw(st.integers(0, 1))))
        start += blocks[-1].numel
    return Site("site", (start,), tuple(blocks))


def test_sizes():
    site = Site("s", (10,), (Block(0, (2, 3), 1), Block(6, (4, 1), 0)))
    assert site.numel == 10
    assert [b.numel for b in site.blocks] == [6, 4]
    assert [b.channels for b in site.blocks] == [3, 4]
    assert site.channels == 7


def test_blocks_must_hold_all_weights():
    with pytest.raises(ValueError, match="hold 6 of 7 weights"):
        Site("s", (7,), (Block(0, (2, 3), 1),))


class TestBlockRms:
    two = Site("s", (6,), (Block(0, (2, 2), 1), Block(4, (1, 2), 1)))

    def test_each_block_its_own(self):
        weight = torch.tensor([1.0, -1.0, 1.0, -1.0, 3.0, 4.0])
        expected = torch.tensor([1.0] * 4 + [12.5**0.5] * 2)
        torch.testing.assert_close(block_rms(weight, self.two), expected)

    def test_a_zero_path_takes_the_scale_of_its_layer(self):
        weight = torch.tensor([2.0, 2.0, 2.0, 2.0, 0.0, 0.0])
        expected = torch.tensor([2.0] * 4 + [(16 / 6) ** 0.5] * 2)
        torch.testing.assert_close(block_rms(weight, self.two), expected)

    @pytest.mark.parametrize(("output_axis", "fan_in"), [(0, 4), (1, 9)])
    def test_a_zero_matrix_takes_its_fan_in(self, output_axis, fan_in):
        site = Site("s", (9, 4), (Block(0, (9, 4), output_axis),))
        torch.testing.assert_close(block_rms(torch.zeros(9, 4), site), torch.full((9, 4), fan_in**-0.5))

    @given(site=sites(), dtype=st.sampled_from([torch.float32, torch.float64]), scale=st.floats(1e-3, 1e3))
    def test_scales_with_the_weight_and_keeps_shape_and_dtype(self, site, dtype, scale):
        weight = torch.randn(site.shape, dtype=dtype, generator=torch.Generator().manual_seed(site.numel))
        rms = block_rms(weight, site)
        assert rms.shape == site.shape
        assert rms.dtype == dtype
        torch.testing.assert_close(block_rms(scale * weight, site), scale * rms)
        # the mean square over the tensor is that of the weight
        torch.testing.assert_close(rms.square().mean(), weight.square().mean())

    def test_carries_no_gradient(self):
        assert not block_rms(torch.ones(6, requires_grad=True), self.two).requires_grad


class TestExpandChannels:
    def test_both_orientations(self):
        site = Site("s", (10,), (Block(0, (2, 3), 1), Block(6, (2, 2), 0)))
        values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
        assert expand_channels(values, site).tolist() == [1, 2, 3, 1, 2, 3, 4, 4, 5, 5]

    def test_matrix_of_a_linear_layer(self):
        site = Site("s", (2, 3), (Block(0, (2, 3), 0),))
        assert expand_channels(torch.tensor([1.0, 2.0]), site).tolist() == [[1, 1, 1], [2, 2, 2]]

    @given(site=sites())
    def test_every_weight_has_the_value_of_its_channel(self, site):
        expanded = expand_channels(torch.arange(site.channels), site)
        assert expanded.shape == site.shape
        channel = 0
        for block in site.blocks:
            matrix = expanded.reshape(-1)[block.start : block.start + block.numel].reshape(block.shape)
            by_channel = matrix if block.output_axis == 0 else matrix.T
            for row in by_channel:
                assert (row == channel).all()
                channel += 1
