import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Chi2, Normal, StudentT

from blip_ft.backbones.protocol import Batch, Prediction
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


class TestStudent:
    @pytest.mark.parametrize("nu", [2.5, 4.0, 30.0])
    def test_independent_labels_against_torch(self, nu):
        prediction, batch = make_batch([2, 3], missing=0.2)
        options = config(use_stress=True, likelihood="student_t", degrees_of_freedom=nu)
        nll = Likelihood(options)(prediction, batch)
        law = StudentT(nu, 0.0, 0.2 * math.sqrt((nu - 2) / nu))  # of std 0.2
        assert law.stddev.item() == pytest.approx(0.2)
        off = prediction.forces - batch.labels["forces"]
        terms = -law.log_prob(torch.nan_to_num(off)) * ~torch.isnan(off)
        expected = torch.zeros(2, dtype=DOUBLE).index_add(0, batch.structure, terms.sum(dim=1).double())
        torch.testing.assert_close(nll.forces, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(nll.total, nll.energy + nll.forces + nll.stress)

    def test_joint_law_is_a_mixture_over_one_noise_level(self):
        """exp(-NLL) = E_g of Gaussians of variance sigma^2 (nu-2)/g, g ~ chi^2(nu): by quadrature."""
        nu, sizes = 5.0, [1]
        prediction, batch = make_batch(sizes)
        prediction = Prediction(
            *(
                v * s
                for v, s in zip(
                    (prediction.energy, prediction.forces, prediction.stress), (1.0, 0.1, 1.0), strict=True
                )
            )
        )
        options = config(use_stress=True, likelihood="joint_student_t", degrees_of_freedom=nu)
        joint = Likelihood(options)(prediction, batch).total[0]
        g = torch.linspace(1e-4, 80, 400_001, dtype=DOUBLE)
        log_density = Chi2(torch.tensor(nu, dtype=DOUBLE)).log_prob(g)
        for key, std in (("energy", 0.03), ("forces", 0.2), ("stress", 0.004)):
            off = (getattr(prediction, key) - batch.labels[key]).flatten()
            for value in off:
                log_density = log_density + Normal(0.0, std * ((nu - 2) / g).sqrt()).log_prob(value)
        top = log_density.max()
        exact = -(top + torch.trapezoid((log_density - top).exp(), g).log())
        torch.testing.assert_close(joint, exact, rtol=1e-7, atol=1e-7)

    def test_joint_law_is_gaussian_for_many_degrees_of_freedom(self):
        prediction, batch = make_batch([2, 3], missing=0.2)
        gauss = Likelihood(config(use_stress=True))(prediction, batch).total
        options = config(use_stress=True, likelihood="joint_student_t", degrees_of_freedom=1e7)
        torch.testing.assert_close(Likelihood(options)(prediction, batch).total, gauss, rtol=1e-3, atol=1e-3)

    def test_a_bad_frame_weighs_less_as_a_whole(self):
        """An error in the energy takes weight off the forces of the same frame, not of the other."""
        slopes = {}
        for law in ("gaussian", "student_t", "joint_student_t"):
            for shift in (0.0, 5.0):
                prediction, batch = make_batch([2, 2])
                prediction.forces = batch.labels["forces"] + 0.01
                prediction.energy = batch.labels["energy"] + shift * torch.tensor([1.0, 0.0])
                prediction.forces.requires_grad_()
                likelihood = Likelihood(config(likelihood=law))
                likelihood(prediction, batch).total.sum().backward()
                slopes[law, shift] = prediction.forces.grad[[0, 2], 0]
        for law in ("gaussian", "student_t"):
            torch.testing.assert_close(slopes[law, 5.0], slopes[law, 0.0])
        first, second = slopes["joint_student_t", 5.0] / slopes["joint_student_t", 0.0]
        assert first < 0.01
        assert second == pytest.approx(1.0)

    @pytest.mark.parametrize("law", ["student_t", "joint_student_t"])
    def test_learned_noise_and_gradients(self, law):
        prediction, batch = make_batch([2, 3], missing=0.3)
        likelihood = Likelihood(config(learn_noise=True, use_stress=True, likelihood=law))
        leaves = [prediction.energy, prediction.forces, prediction.stress, likelihood.log_std]

        def run(energy, forces, stress, _):
            return likelihood(Prediction(energy, forces, stress), batch).total

        assert torch.autograd.gradcheck(run, [leaf.requires_grad_() for leaf in leaves])

    @pytest.mark.parametrize("law", ["student_t", "joint_student_t"])
    def test_a_nan_prediction_is_not_a_missing_label(self, law):
        prediction, batch = make_batch([2, 1])
        prediction.forces[0] = NAN
        assert torch.isnan(Likelihood(config(likelihood=law))(prediction, batch).total[0])


def test_gradients():
    prediction, batch = make_batch([2, 3], missing=0.3)
    likelihood = Likelihood(config(learn_noise=True, use_stress=True))
    leaves = [prediction.energy, prediction.forces, prediction.stress, likelihood.log_std]

    def run(energy, forces, stress, _):
        return likelihood(Prediction(energy, forces, stress), batch).total

    assert torch.autograd.gradcheck(run, [leaf.requires_grad_() for leaf in leaves])
