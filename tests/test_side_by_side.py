"""Pieces of work in threads, and batches evaluated in parts: the numbers are those of the whole."""

from __future__ import annotations

import contextvars
import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blip_ft.config import ObjectiveConfig
from blip_ft.data.batch.dataset import Item, collate
from blip_ft.data.frame import content_key
from blip_ft.objectives import Likelihood
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.system.side_by_side import cut, side_by_side, width
from blip_ft.uncertainty.calculator import BlipCalculator
from blip_ft.uncertainty.predict import Method, predict_atoms, predict_batch
from blip_ft.variational.noise import OFF, Noise

from .potential.around_fake import make, structures

SIZES = st.lists(st.integers(0, 50), min_size=0, max_size=12)
DOUBLE = torch.float64


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
class TestThreads:
    def test_results_are_in_order_and_pieces_at_the_same_time(self):
        together = threading.Barrier(3, timeout=30)

        def work(n: int) -> tuple[int, int]:
            if n < 3:
                together.wait()
            return n, torch.get_num_threads()

        assert side_by_side(work, range(7)) == [(n, 1) for n in range(7)]

    def test_threads_are_shared_out(self):
        together = threading.Barrier(2, timeout=30)

        def work(_: int) -> int:
            together.wait()
            return torch.get_num_threads()

        assert side_by_side(work, range(2), threads=2) == [1, 1]
        torch.set_num_threads(3)
        assert side_by_side(lambda n: torch.get_num_threads(), range(2), threads=1) == [3, 3]

    def test_the_callers_grad_mode_and_context_are_those_of_the_pieces(self):
        variable = contextvars.ContextVar("variable", default=0)
        variable.set(5)
        with torch.no_grad():
            assert (
                side_by_side(lambda n: (torch.is_grad_enabled(), variable.get()), range(4))
                == [(False, 5)] * 4
            )
        assert side_by_side(lambda n: torch.is_grad_enabled(), range(4)) == [True] * 4

    def test_pieces_have_no_pieces(self):
        assert width("cpu") == 3
        assert width("cuda") == 1

        def work(n: int) -> tuple[int, list[str]]:
            return width("cpu"), side_by_side(lambda k: threading.current_thread().name, range(2))

        for inside, names in side_by_side(work, range(3)):
            assert inside == 1
            assert len(set(names)) == 1

    def test_the_first_error_is_raised_when_all_have_ended(self):
        ended = []

        def work(n: int) -> None:
            try:
                if n in (1, 2):
                    raise ValueError(n)
            finally:
                ended.append(n)

        with pytest.raises(ValueError, match=r"^1$"):
            side_by_side(work, [0, 1])
        assert sorted(ended) == [0, 1]


@given(SIZES, st.integers(1, 6))
def test_cuts_are_consecutive_and_none_is_empty(sizes: list[int], pieces: int):
    cuts = cut(sizes, pieces)
    assert [n for c in cuts for n in c] == list(range(len(sizes)))
    assert len(cuts) == min(pieces, len(sizes))
    assert all(len(c) for c in cuts)


def test_cuts_are_about_equal():
    assert cut([10, 10, 10, 10], 2) == [range(2), range(2, 4)]
    assert cut([30, 10, 10, 10], 2) == [range(1), range(1, 4)]
    assert cut([1] * 9, 3) == [range(3), range(3, 6), range(6, 9)]


# ---- batches in parts ------------------------------------------------------------------------


def items_of(backbone: Any) -> list[Item]:
    out = []
    for n, atoms in enumerate(structures()):
        generator = torch.Generator().manual_seed(n)
        labels = {
            "energy": torch.randn((), generator=generator, dtype=DOUBLE),
            "forces": torch.randn(len(atoms), 3, generator=generator, dtype=DOUBLE),
            "stress": torch.full((6,), torch.nan, dtype=DOUBLE),
        }
        key = content_key(atoms.numbers, atoms.positions, atoms.cell.array)
        out.append(Item(atoms, backbone.graph(atoms), labels, key))
    return out


def loss_and_gradients(
    potential: BayesianPotential, parts: int, mode: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    batch = collate(potential.backbone, items_of(potential.backbone), parts=parts)
    assert len(batch.parts) == (parts if parts > 1 else 0)
    likelihood = Likelihood(ObjectiveConfig())
    out = potential(batch, Noise(mode, epoch=2, step=3), create_graph=True)
    loss = likelihood(out, batch).total.sum() + potential.kl()
    loss.backward()
    gradients = {name: p.grad for name, p in potential.named_parameters()}
    potential.zero_grad(set_to_none=True)
    return loss.detach(), gradients


@pytest.mark.usefixtures("three_threads")
class TestParts:
    @pytest.mark.parametrize("parts", [2, 3, 4])
    @pytest.mark.parametrize(
        ("family", "mode"),
        [
            ("weight", "off"),
            ("weight", "structure"),
            ("weight", "local"),
            ("channel", "structure"),
            ("channel", "flipout"),
            ("subspace", "structure"),
            ("subspace", "draw"),
            ("adaptive", "structure"),
        ],
    )
    def test_the_loss_and_its_gradients_are_those_of_the_whole_batch(self, family, mode, parts):
        potential = make(
            family=family, mode=mode if mode in ("local", "flipout") else "structure", init_std=0.2
        )
        whole, expected = loss_and_gradients(potential, 1, mode)
        value, gradients = loss_and_gradients(potential, parts, mode)
        torch.testing.assert_close(value, whole, rtol=1e-12, atol=0)
        for name, gradient in expected.items():
            assert (gradients[name] is None) == (gradient is None), name
            if gradient is not None:
                torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12)

    def test_both_sides_are_real(self):
        """Parts give other rounding than the whole somewhere, so they were evaluated; the loss has a gradient."""
        potential = make(family="subspace", init_std=0.2)
        batch = collate(potential.backbone, items_of(potential.backbone), parts=2)
        out = potential(batch, Noise("structure"), create_graph=True)
        assert type(out.energy.grad_fn).__name__ != "_PartsBackward"  # references are added to it
        assert type(out.forces.grad_fn).__name__ == "_PartsBackward"
        torch.set_num_threads(1)
        out = potential(batch, Noise("structure"), create_graph=True)
        assert type(out.forces.grad_fn).__name__ != "_PartsBackward"
        torch.set_num_threads(3)

    def test_a_batch_in_parts_is_differentiated_once(self):
        potential = make()
        batch = collate(potential.backbone, items_of(potential.backbone), parts=2)
        out = potential(batch, OFF, create_graph=True)
        total = out.forces.square().sum()
        total.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="once"):
            total.backward()

    @pytest.mark.parametrize("method", ["draws", "energy", "linear"])
    @pytest.mark.parametrize("family", ["subspace", "channel"])
    def test_predictions(self, family: str, method: Method):
        potential = make(family=family, init_std=0.2, n_draws=6)
        items = items_of(potential.backbone)
        whole = predict_batch(potential, collate(potential.backbone, items), method=method)
        parts = predict_batch(
            potential, collate(potential.backbone, items, parts=3, copies=True), method=method
        )
        for name, value in vars(whole).items():
            other = getattr(parts, name)
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-12, equal_nan=True)
            elif name != "mean":
                assert other == value
        for name, value in vars(whole.mean).items():
            if value is not None:
                torch.testing.assert_close(
                    getattr(parts.mean, name), value, rtol=1e-9, atol=1e-12, equal_nan=True
                )


def test_one_potential_in_several_threads_of_the_user():
    """Noise belongs to the thread: before, stds of one were those of another."""
    potential = make(family="subspace", init_std=0.2, n_draws=6)
    atoms = structures()
    expected = [predict_atoms(potential, [a], n_draws=4 + 2 * (n % 2)) for n, a in enumerate(atoms)]
    found: dict[int, Any] = {}

    def work(n: int) -> None:
        for _ in range(5):
            found[n] = predict_atoms(potential, [atoms[n]], n_draws=4 + 2 * (n % 2))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(atoms))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, (one,) in enumerate(expected):
        for name in ("energy", "energy_std"):
            assert found[n][0][name] == pytest.approx(one[name], rel=1e-12)
        for name in ("forces", "forces_std"):
            assert found[n][0][name] == pytest.approx(one[name], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("method", ["draws", "energy", "linear"])
def test_four_calculators_of_one_potential_in_four_threads(method: Method):
    potential = make(family="subspace", init_std=0.2, n_draws=6)

    def values(n: int) -> dict[str, Any]:
        atoms = structures()[n]
        atoms.calc = BlipCalculator(potential, method=method)
        for _ in range(3):  # as steps of dynamics
            atoms.positions += 0.01
            atoms.get_forces()
        return dict(atoms.calc.results)

    expected, found = [values(n) for n in range(4)], {}

    def work(n: int) -> None:
        found[n] = values(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, wanted in enumerate(expected):
        assert found[n].keys() == wanted.keys()
        for key, value in wanted.items():
            assert found[n][key] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), key


# ---- noise ahead -----------------------------------------------------------------------------


def noise_of(potential: BayesianPotential, keys: list[int], epoch: int = 0) -> dict[str, torch.Tensor]:
    batch = potential.backbone.batch(structures()[: len(keys)])
    batch.keys = keys
    with torch.no_grad(), potential.perturbed(Noise("structure", epoch=epoch), batch):
        return {name: w.clone() for name, w in potential.converted.noise.weights.items()}


class TestAhead:
    @pytest.mark.parametrize("family", ["subspace", "channel"])
    @pytest.mark.parametrize("block", [1, 2, 3, 100])
    def test_noise_is_the_same(self, family: str, block: int):
        potential = make(family=family, init_std=0.2)
        order = [7, 3, 9, 1, 4]
        expected = [noise_of(potential, keys) for keys in ([7, 3], [9, 1], [4], [1, 7])]
        potential._ahead.limit = block * potential.posterior.n_weights * 8
        potential.expect(order)
        for keys, wanted in zip(([7, 3], [9, 1], [4], [1, 7]), expected, strict=True):
            for name, value in noise_of(potential, keys).items():
                torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-15)

    def test_blocks_are_made_once_and_anew_when_something_changes(self, monkeypatch: pytest.MonkeyPatch):
        potential = make(family="subspace", init_std=0.2)
        asked: list[int] = []
        sample = potential.posterior.sample
        monkeypatch.setattr(
            potential.posterior, "sample", lambda latent: asked.append(len(latent)) or sample(latent)
        )
        potential.expect([1, 2, 3, 4])
        for keys in ([1, 2], [3], [4]):
            noise_of(potential, keys)
        assert asked == [4]
        first = noise_of(potential, [1])
        with torch.no_grad():
            potential.posterior.scale.mul_(2)
        for name, value in noise_of(potential, [1]).items():
            torch.testing.assert_close(value, 2 * first[name])
        potential.amplitude = 0.5
        for name, value in noise_of(potential, [1]).items():
            torch.testing.assert_close(value, first[name])
        other = noise_of(potential, [1], epoch=1)
        assert not any(torch.equal(other[name], value) for name, value in first.items())
        assert asked == [4, 4, 4, 4]
        potential.expect(())
        noise_of(potential, [1, 2])
        assert asked[-1] == 2

    def test_a_structure_that_was_not_expected(self):
        potential = make(family="subspace", init_std=0.2)
        wanted = noise_of(potential, [5, 1])
        potential.expect([1, 2])
        for name, value in noise_of(potential, [5, 1]).items():
            assert torch.equal(value, wanted[name])

    def test_copies_expect_nothing(self):
        potential = make(family="subspace", init_std=0.2)
        potential.expect([1, 2])
        noise_of(potential, [1])
        assert copy.deepcopy(potential)._ahead._samples == {}


def test_families_with_gradients_of_their_spread_keep_them():
    potential = make(family="weight", init_std=0.1)
    potential.expect([item.key for item in items_of(potential.backbone)])
    _, gradients = loss_and_gradients(potential, 1, "structure")
    spread = {f"posterior.{name}" for name, _ in potential.posterior.named_parameters()}
    assert spread
    assert all(gradients[name] is not None and bool(gradients[name].any()) for name in spread)
