"""Where the posterior is known in closed form: energies that are linear in the weights.

The whole path of training is used: convert, noise, likelihood, KL, ElboScale.
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from blip_ft.backbones.protocol import Backbone, Batch, Prediction
from blip_ft.config import ModelConfig, ObjectiveConfig, PosteriorConfig
from blip_ft.objectives import ElboScale, Likelihood
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.variational.noise import Noise

DOUBLE = torch.float64
NOISE = 0.5  # std of a label


class LinearBackbone(Backbone):
    """Rows of features times a matrix; one column is the energy, three are forces."""

    name = "linear"
    presets = {"all": ("linear",), "scalar": ("linear",)}

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.model = nn.Sequential()
        self.model.add_module("linear", nn.Linear(weight.shape[1], weight.shape[0], bias=False).double())
        with torch.no_grad():
            self.model.linear.weight.copy_(weight)

    def forward(self, batch: Batch, **_: Any) -> Prediction:
        out = self.model(batch.graph)
        energy = out.new_zeros(batch.n_structures).index_add(0, batch.structure, out[:, 0])
        return Prediction(energy, out if out.shape[1] == 3 else None)

    def row_kind(self, module_name: str) -> str:
        return "atom"

    def _unused(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    load = from_config = classmethod(_unused)
    config = graph = collate = stock_calculator = _unused


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


class Regression:
    """N labels y = X w + noise, prior N(w0, s^2): one structure of one atom per label."""

    def __init__(self, n=24, d=4, *, orthogonal=True, prior_scale=0.8, seed=0, **posterior):
        self.X = randn(n, d, seed=seed)
        if orthogonal:
            self.X = torch.linalg.qr(self.X).Q * torch.linspace(1.0, 6.0, d, dtype=DOUBLE)
        self.w0 = randn(d, seed=seed + 1)
        self.s = prior_scale * self.w0.square().mean().sqrt()
        truth = self.w0 + self.s * randn(d, seed=seed + 2)
        self.y = self.X @ truth + NOISE * randn(n, seed=seed + 3)
        self.potential = BayesianPotential(
            LinearBackbone(self.w0[None]),
            ModelConfig(adapter="linear", checkpoint="-"),
            PosteriorConfig(family="weight", prior_scale=prior_scale, **posterior),
        )
        self.likelihood = Likelihood(ObjectiveConfig(energy_std=NOISE))

    # ---- exact ---------------------------------------------------------------------------
    @property
    def posterior(self) -> MultivariateNormal:
        precision = self.X.T @ self.X / NOISE**2 + torch.eye(len(self.w0), dtype=DOUBLE) / self.s**2
        target = self.X.T @ self.y / NOISE**2 + self.w0 / self.s**2
        return MultivariateNormal(torch.linalg.solve(precision, target), precision_matrix=precision)

    @property
    def log_evidence(self) -> Tensor:
        covariance = NOISE**2 * torch.eye(len(self.y), dtype=DOUBLE) + self.s**2 * self.X @ self.X.T
        return MultivariateNormal(self.X @ self.w0, covariance).log_prob(self.y)

    # ---- the model under test -------------------------------------------------------------
    def batch(self, index: Tensor | None = None) -> Batch:
        index = torch.arange(len(self.y)) if index is None else index
        n = len(index)
        ones = torch.ones(n, dtype=torch.int64)
        rows = {"atom": torch.arange(n)}
        return Batch(self.X[index], ones, ones, rows, keys=index.tolist(), labels={"energy": self.y[index]})

    @property
    def delta(self) -> nn.Parameter:
        return self.potential.converted.deltas["linear"]

    @property
    def log_std(self) -> nn.Parameter:
        return self.potential.posterior.log_std[0]

    @property
    def mean(self) -> Tensor:
        return self.w0 + self.delta.detach()[0]

    @property
    def std(self) -> Tensor:
        return self.potential.posterior.std()["linear"].detach()[0]

    def set(self, mean: Tensor, std: Tensor) -> None:
        with torch.no_grad():
            self.delta.copy_(mean - self.w0)
            self.log_std.copy_((std / self.potential.prior.rms("linear")).log())

    def exact_nelbo(self, scale: ElboScale) -> Tensor:
        """The loss with its expectation taken exactly.

        The NLL is quadratic in the weights, so its mean over the 2d points mean ± sqrt(d) sigma_i e_i
        is its expectation.
        """
        state, batch, d = self.potential.converted.noise, self.batch(), len(self.w0)
        nll = torch.zeros(len(self.y), dtype=DOUBLE)
        for shift in d**0.5 * torch.cat([self.std.diag(), -self.std.diag()]):
            state.mode, state.weights = "draw", {"linear": shift[None]}
            nll = nll + self.likelihood(self.potential.backbone(batch), batch).total / (2 * d)
        state.clear()
        return scale.loss(nll, self.potential.kl(), epoch=0)


class TestEvidence:
    def test_nelbo_at_the_exact_posterior_is_minus_log_evidence(self):
        problem = Regression()
        exact = problem.posterior
        problem.set(exact.mean, exact.variance.sqrt())
        n = len(problem.y)
        nelbo = n * problem.exact_nelbo(ElboScale(n, 1))
        torch.testing.assert_close(nelbo, -problem.log_evidence, rtol=1e-12, atol=1e-12)

    @given(
        n=st.integers(1, 8),
        d=st.integers(1, 4),
        prior_scale=st.floats(0.05, 2.0),
        seed=st.integers(0, 1000),
        steps=st.integers(1, 5),
    )
    def test_gap_to_the_evidence_is_the_kl_to_the_posterior(self, n, d, prior_scale, seed, steps):
        """NELBO(q) = -log evidence + KL(q || posterior), for any q and any design."""
        problem = Regression(n, d, orthogonal=False, prior_scale=prior_scale, seed=seed)
        std = (0.5 * randn(d, seed=seed + 5)).exp()
        mean = randn(d, seed=seed + 4)
        problem.set(mean, std)
        # a loss stands for N / steps structures, so a full batch counts `steps` times
        scale = ElboScale(n, steps)
        loss = problem.exact_nelbo(scale)
        kl = problem.potential.kl() / n
        nelbo = n * ((loss - kl) / steps + kl)
        gap = kl_divergence(MultivariateNormal(mean, std.square().diag()), problem.posterior)
        torch.testing.assert_close(nelbo, -problem.log_evidence + gap, rtol=1e-8, atol=1e-8)


class TestTraining:
    @pytest.mark.parametrize(
        ("mode", "plan"),
        [("structure", [24]), ("local", [24]), ("structure", [13, 11])],
        ids=["structure", "local", "unequal-batches"],
    )
    def test_recovers_the_exact_posterior(self, mode, plan):
        """Orthogonal design: the posterior is factorised, so mean field is exact.

        Mean within a tenth of the posterior std, std within 5 %.
        """
        problem = Regression(mode=mode, init_std=0.1)
        exact = problem.posterior
        assert (exact.covariance_matrix - exact.variance.diag()).abs().max() < 1e-12
        potential, scale = problem.potential, ElboScale(24, len(plan))
        parameters = [*potential.mean_parameters, *potential.posterior.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=0.05)
        # averaged over the later steps, as the noise in the gradient never ends
        average, first, last = [torch.zeros_like(p) for p in parameters], 250, 1000
        steps = [(epoch, index) for epoch in range(last) for index in torch.arange(24).split(plan)][:last]
        for step, (epoch, index) in enumerate(steps):
            batch = problem.batch(index)
            nll = problem.likelihood(potential(batch, Noise(mode, epoch=epoch)), batch).total
            loss = scale.loss(nll, potential.kl(), epoch=epoch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step == first:
                optimizer.param_groups[0]["lr"] = 0.02
            if step >= first:
                for total, p in zip(average, parameters, strict=True):
                    total += p.detach() / (last - first)
        with torch.no_grad():
            for total, p in zip(average, parameters, strict=True):
                p.copy_(total)
        std = exact.variance.sqrt()
        assert ((problem.mean - exact.mean) / std).abs().max() < 0.1
        assert (problem.std / std).log().abs().max() < 0.05
        # and it is a result: neither the start nor the prior
        assert ((problem.w0 - exact.mean) / std).abs().max() > 1
        assert problem.std.max() > 2 * problem.std.min()


class TestGradientNoise:
    """Eight structures of eight atoms whose rows of features are separate data."""

    B, ATOMS, D = 8, 8, 2

    def gradients(self, mode, n=150):
        """(n, parameters) gradients of the loss of one batch, each with fresh noise."""
        rows = self.B * self.ATOMS
        X, y = randn(rows, self.D, seed=3), randn(rows, 3, seed=4)
        index = torch.repeat_interleave(torch.arange(self.B), self.ATOMS)
        batch = Batch(
            X,
            torch.full((self.B,), self.ATOMS),
            torch.ones(rows, dtype=torch.int64),
            {"atom": index},
            keys=list(range(self.B)),
            labels={"forces": y},
        )
        potential = BayesianPotential(
            LinearBackbone(randn(3, self.D, seed=5)),
            ModelConfig(adapter="linear", checkpoint="-"),
            PosteriorConfig(family="weight", init_std=0.3),
            n_draws=n,
        )
        likelihood = Likelihood(ObjectiveConfig(forces_std=0.5))
        parameters = [*potential.mean_parameters, *potential.posterior.parameters()]
        out = []
        for k in range(n):
            prediction = potential(batch, Noise(mode, epoch=k, draw=k))
            loss = likelihood(prediction, batch).total.sum() / self.B
            out.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
        return torch.stack(out)

    def test_local_below_structure_below_shared_draw(self):
        """The expected gradient is the same; sharing noise among more rows makes it noisier."""
        gradients = {mode: self.gradients(mode) for mode in ("local", "structure", "draw")}
        half = 3 * self.D
        for part in (slice(0, half), slice(half, None)):  # the mean's, and the log std's
            noise = {mode: g[:, part].var(dim=0).sum() for mode, g in gradients.items()}
            assert 2 * noise["local"] < noise["structure"]
            assert 2 * noise["structure"] < noise["draw"]
        local = gradients["local"]
        for mode in ("structure", "draw"):
            error = ((local.var(dim=0) + gradients[mode].var(dim=0)) / len(local)).sqrt()
            assert ((local.mean(dim=0) - gradients[mode].mean(dim=0)) / error).abs().max() < 5
