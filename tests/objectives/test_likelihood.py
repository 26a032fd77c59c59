import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from blip_ft.backbone import Batch, Prediction
from blip_ft.config import ObjectiveConfig
from blip_ft.objectives import Likelihood

DOUBLE = torch.float64
NAN = float("nan")


def make_batch(sizes, seed=0, missing=0.0):
    """(prediction, batch) of random numbers; a share of the labels is missing."""
    generator = torch.Generator().manual_seed(seed)
    n_atoms = torch.tensor(sizes)
    B, n = len(sizes), int(n_atoms.sum())

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    labels = {"energy": -5 * n_atoms + randn(B), "forces": randn(n, 3), "stress": 0.01 * randn(B, 6)}
    for value in labels.values():
        value[torch.rand(value.shape, generator=generator) < missing] = NAN
    index = torch.repeat_interleave(torch.arange(B), n_atoms)
    batch = Batch(None, n_atoms, torch.ones(n, dtype=torch.int64), {"atom": index}, labels=labels)
    prediction = Prediction(-5 * n_atoms + randn(B), randn(n, 3), 0.01 * randn(B, 6))
    return prediction, batch


def config(**changes):
    return ObjectiveConfig(energy_std=0.03, forces_std=0.2, stress_std=0.004, **changes)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    missing=st.sampled_from([0.0, 0.3, 1.0]),
    use_stress=st.booleans(),
)
def test_sum_over_labels_of_log_probabilities(sizes, seed, missing, use_stress):
    prediction, batch = make_batch(sizes, seed, missing)
    nll = Likelihood(config(use_stress=use_stress))(prediction, batch)
    start = 0
    for i, n in enumerate(sizes):
        energy = Normal(prediction.energy[i] / n, 0.03)
        forces = Normal(prediction.forces[start : start + n], 0.2)
        stress = Normal(prediction.stress[i], 0.004)

        def total(law, label):
            known = ~torch.isnan(label)
            return -law.log_prob(torch.where(known, label, 0.0))[known].sum()

        expected = {
            "energy": total(energy, batch.labels["energy"][i] / n),
            "forces": total(forces, batch.labels["forces"][start : start + n]),
            "stress": total(stress, batch.labels["stress"][i]) * use_stress,
        }
        for key, value in expected.items():
            torch.testing.assert_close(getattr(nll, key)[i], value)
        torch.testing.assert_close(nll.total[i], sum(expected.values()))
        start += n


class TestMissing:
    def test_gradients_are_finite_and_zero_where_nothing_is_known(self):
        prediction, batch = make_batch([2, 3], missing=0.5)
        batch.labels["energy"][0] = NAN
        leaves = [prediction.energy, prediction.forces, prediction.stress]
        for leaf in leaves:
            leaf.requires_grad_()
        Likelihood(config(use_stress=True))(prediction, batch).total.sum().backward()
        for leaf, key in zip(leaves, ("energy", "forces", "stress"), strict=True):
            unknown = torch.isnan(batch.labels[key])
            assert torch.isfinite(leaf.grad).all()
            assert (leaf.grad[unknown] == 0).all()
            assert (leaf.grad[~unknown] != 0).all()

    def test_no_label_at_all_is_zero(self):
        prediction, batch = make_batch([2], missing=1.0)
        assert Likelihood(config(use_stress=True))(prediction, batch).total.tolist() == [0.0]

    def test_kinds_that_are_absent(self):
        prediction, batch = make_batch([2, 1])
        whole = Likelihood(config(use_stress=True))(prediction, batch)
        del batch.labels["energy"], batch.labels["stress"]
        part = Likelihood(config(use_stress=True))(prediction, batch)
        assert part.energy.tolist() == part.stress.tolist() == [0.0, 0.0]
        assert torch.equal(part.total, whole.forces)

    def test_stress_that_neither_side_has(self):
        """Structures without periodicity: NaN on both sides."""
        prediction, batch = make_batch([2, 1])
        prediction.stress[0] = batch.labels["stress"][0] = NAN
        prediction.stress.requires_grad_()
        nll = Likelihood(config(use_stress=True))(prediction, batch)
        assert nll.stress[0] == 0
        nll.total.sum().backward()
        assert torch.isfinite(prediction.stress.grad).all()

    @pytest.mark.parametrize("key", ["energy", "forces", "stress"])
    def test_a_nan_prediction_is_not_a_missing_label(self, key):
        prediction, batch = make_batch([2, 1])
        getattr(prediction, key)[0] = NAN
        total = Likelihood(config(use_stress=True))(prediction, batch).total
        assert torch.isnan(total[0])


class TestNoise:
    def test_fixed_by_default(self):
        likelihood = Likelihood(config())
        assert not any(p.requires_grad for p in likelihood.parameters())
        assert likelihood.std == pytest.approx({"energy": 0.03, "forces": 0.2, "stress": 0.004})

    def test_learned_noise_ends_at_the_rms_error(self):
        prediction, batch = make_batch([3, 2, 4], seed=3)
        likelihood = Likelihood(config(learn_noise=True, use_stress=True))
        optimizer = torch.optim.LBFGS(
            likelihood.parameters(), max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-10
        )

        def closure():
            optimizer.zero_grad()
            loss = likelihood(prediction, batch).total.sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        n = batch.n_atoms
        errors = {
            "energy": (prediction.energy - batch.labels["energy"]) / n,
            "forces": prediction.forces - batch.labels["forces"],
            "stress": prediction.stress - batch.labels["stress"],
        }
        rms = {k: e.square().mean().sqrt().item() for k, e in errors.items()}
        assert likelihood.std == pytest.approx(rms, rel=1e-4)

    def test_in_float64_whatever_the_model(self):
        prediction, batch = make_batch([2, 3])
        exact = Likelihood(config())(prediction, batch).total
        prediction = Prediction(prediction.energy.float(), prediction.forces.float())
        rounded = Likelihood(config())(prediction, batch).total
        assert rounded.dtype == DOUBLE
        torch.testing.assert_close(rounded, exact, rtol=1e-4, atol=1e-4)


def test_gradients():
    prediction, batch = make_batch([2, 3], missing=0.3)
    likelihood = Likelihood(config(learn_noise=True, use_stress=True))
    leaves = [prediction.energy, prediction.forces, prediction.stress, likelihood.log_std]

    def run(energy, forces, stress, _):
        return likelihood(Prediction(energy, forces, stress), batch).total

    assert torch.autograd.gradcheck(run, [leaf.requires_grad_() for leaf in leaves])
