"""What a step minimises: formulas, and independence of batches and ranks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from torch import Tensor, nn

from blip_ft.backbones.protocol import Backbone, Batch, Prediction
from blip_ft.config import ModelConfig, ObjectiveConfig, PosteriorConfig, Recipe, parse_recipe
from blip_ft.data.batch.dataset import Item, collate
from blip_ft.families.base.linear import ClosedFormData, LinearizedModel
from blip_ft.families.pathwise.posterior import PathwisePosterior
from blip_ft.families.registry import without_foreign_keys
from blip_ft.objectives import ElboScale, Likelihood, fair_crps
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.testing.fake import FakeBackbone
from blip_ft.training import function_prior
from blip_ft.training.function_prior import FunctionPrior
from blip_ft.training.objective import Objective, make_objective
from blip_ft.training.terms import Start
from blip_ft.variational.noise import Noise

DOUBLE = torch.float64
N = 7


def recipe(**sections: Any) -> Recipe:
    base = {
        "name": "x",
        "data": {"train": "-"},
        "model": {"adapter": "fake", "checkpoint": "tiny"},
        "objective": {"temperature": 0.01} | sections.pop("objective", {}),
        "posterior": without_foreign_keys(
            {"family": "weight", "prior_scale": 0.2, "init_std": 0.05} | sections.pop("posterior", {})
        ),
    }
    return parse_recipe(base | sections)


class Problem:
    """Seven small structures with made-up labels, and a potential that has moved."""

    def __init__(self, options: Recipe) -> None:
        self.recipe = options
        torch.manual_seed(0)
        self.potential = BayesianPotential(FakeBackbone(), options.model, options.posterior, n_draws=2)
        generator = torch.Generator().manual_seed(1)
        self.parameters = [*self.potential.mean_parameters, *self.potential.posterior.parameters()]
        with torch.no_grad():
            for p in self.parameters:
                p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=DOUBLE))
        if isinstance(self.potential.posterior, PathwisePosterior):
            nothing = np.zeros(20)
            rows = torch.randn(20, self.potential.posterior.n_weights, generator=generator, dtype=DOUBLE)
            data = LinearizedModel(rows, nothing, np.arange(20) % 3, nothing == 0)
            self.potential.posterior.fit(ClosedFormData(data, prior_scale=0.2))
        self.likelihood = Likelihood(options.objective)
        self.items = self.make_items(generator)

    def make_items(self, generator: torch.Generator) -> list[Item]:
        frames = [molecule("H2O"), molecule("CH3OH"), bulk("SiO", "rocksalt", 4.6), molecule("CO2")]
        out = []
        for i in range(N):
            a = frames[i % 4].copy()
            a.rattle(0.05, seed=i)
            labels = {
                "energy": -5.0 * len(a) + torch.randn((), generator=generator, dtype=DOUBLE),
                "forces": torch.randn(len(a), 3, generator=generator, dtype=DOUBLE),
                "stress": torch.full((6,), torch.nan, dtype=DOUBLE),
            }
            out.append(Item(a, self.potential.backbone.graph(a), labels, 100 + i))
        return out

    def batch(self, index: list[int]) -> Batch:
        return collate(self.potential.backbone, [self.items[i] for i in index])

    def replay(self, world: int = 1, rank: int = 0) -> FunctionPrior:
        items = [Item(i.atoms, i.graph, i.labels, 10 * i.key) for i in self.items[:5]]
        return FunctionPrior(self.potential, items, {"energy": 0.2, "forces": 0.5}, 0, world, rank)

    def objective(
        self, scale: ElboScale, *, replay: FunctionPrior | None = None, **options: Any
    ) -> Objective:
        """That of the recipe, which remembers the structures of :meth:`replay`."""
        plain = options.pop("plain", False)
        found = replay or self.replay(**options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(function_prior, "make_function_prior", lambda *args, **kwargs: found)
            start = Start(self.recipe, self.potential, self.likelihood, scale, train=[], **options)
            return make_objective(start, plain=plain)

    def epoch(self, plan: list[list[list[int]]], epoch: int = 2) -> tuple[float, list[Tensor]]:
        """Loss and gradient averaged over the steps of an epoch and the ranks of a step."""
        world = len(plan[0])
        scale = ElboScale(N, len(plan), self.recipe.objective.temperature)
        total: Any = 0.0
        for number, step in enumerate(plan):
            for rank, index in enumerate(step):
                objective = self.objective(scale, world=world, rank=rank)
                if not index:
                    continue
                share = objective(
                    self.batch(index), epoch=epoch, batch_index=number, step=number, world=world
                )
                total = total + share.loss / (world * len(plan))
        return total.item(), list(torch.autograd.grad(total, self.parameters, allow_unused=True))


KINDS = {
    "elbo": recipe(),
    "two draws": recipe(objective={"draws": 2}),
    "local": recipe(posterior={"mode": "local"}),
    "joint Student": recipe(objective={"likelihood": "joint_student_t"}),
    "dropout": recipe(posterior={"prior": "dropout"}),
    "empirical Bayes": recipe(posterior={"empirical_bayes": True}),
    "pathwise": recipe(posterior={"family": "pathwise", "rank": 6}),
    "adaptive": recipe(posterior={"family": "adaptive"}),
    "adaptive, local": recipe(posterior={"family": "adaptive", "mode": "local"}),
    "crps": recipe(objective={"kind": "crps"}),
    "elbo+crps": recipe(objective={"kind": "elbo+crps", "crps_weight": 0.3}),
    "function_kl": recipe(objective={"kind": "function_kl"}),
    "function_kl, adaptive": recipe(objective={"kind": "function_kl"}, posterior={"family": "adaptive"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_does_not_depend_on_batches_and_ranks(kind: str) -> None:
    problem = Problem(KINDS[kind])
    whole = problem.epoch([[list(range(N))]])
    plans = [
        [[[3, 1, 0, 6]], [[2, 5, 4]]],
        [[[6], [0, 1]], [[2, 3], [4, 5]]],
    ]
    for plan in plans:
        loss, gradients = problem.epoch(plan)
        assert loss == pytest.approx(whole[0], rel=1e-10)
        for found, expected in zip(gradients, whole[1], strict=True):
            if expected is not None:
                torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    # another epoch has other noise
    assert problem.epoch([[list(range(N))]], epoch=3)[0] != whole[0]


class TestFormulas:
    def step(self, options: Recipe, *, plain: bool = False) -> tuple[Problem, Any]:
        problem = Problem(options)
        scale = ElboScale(N, 1, options.objective.temperature)
        objective = problem.objective(scale, plain=plain)
        return problem, objective(problem.batch(list(range(N))), epoch=0, batch_index=0, step=0, world=1)

    def nll(self, problem: Problem, **options: Any) -> Tensor:
        batch = problem.batch(list(range(N)))
        return problem.likelihood(problem.potential(batch, Noise(**options)), batch).total

    def test_plain(self) -> None:
        problem, step = self.step(recipe(objective={"kind": "crps", "likelihood": "student_t"}), plain=True)
        assert step.loss.item() == pytest.approx(self.nll(problem, mode="off").mean().item())
        assert step.kl == 0

    def test_adaptive(self) -> None:
        """mean[NLL + T KL_n] + T/(2N) |delta|^2/s^2."""
        problem, step = self.step(recipe(posterior={"family": "adaptive"}))
        nll = self.nll(problem, mode="structure")
        own = problem.potential.structure_kl
        assert own.shape == (N,)
        assert (own > 0).all()
        mean = problem.potential.prior.kl_mean(dict(problem.potential.converted.deltas))
        expected = (nll + 0.01 * own).mean() + 0.01 / N * mean
        assert step.loss.item() == pytest.approx(expected.item())
        # logged in the units of the other families, so that loss = data + T/N KL
        assert step.loss.item() == pytest.approx(float(step.data + 0.01 / N * step.kl))

    def test_crps(self) -> None:
        problem, step = self.step(KINDS["crps"])
        batch = problem.batch(list(range(N)))
        samples = [problem.potential(batch, Noise("structure", sample=k)) for k in range(2)]
        energies = torch.stack([s.energy / batch.n_atoms for s in samples])
        score = fair_crps(energies, batch.labels["energy"] / batch.n_atoms).sum() / 2e-3
        forces = torch.stack([s.forces for s in samples])
        score = score + fair_crps(forces, batch.labels["forces"]).sum() / 2e-2
        mean = problem.potential.prior.kl_mean(dict(problem.potential.converted.deltas))
        assert step.loss.item() == pytest.approx(float(score / N + 0.01 / N * mean))

    def test_sum_of_both(self) -> None:
        weight, steps = 0.3, {}
        for kind in ("crps", "elbo+crps", "elbo"):
            options = recipe(objective={"kind": kind, "crps_weight": weight, "draws": 2})
            steps[kind] = self.step(options)[1]
        expected = steps["elbo"].loss + weight * steps["crps"].data
        assert steps["elbo+crps"].loss.item() == pytest.approx(expected.item())

    def test_samples_of_a_step_are_independent(self) -> None:
        problem = Problem(recipe())
        batch = problem.batch([0, 1])
        first, second = (problem.potential(batch, Noise("structure", sample=k)).energy for k in range(2))
        assert not torch.isclose(first, second).any()
        assert torch.equal(problem.potential(batch, Noise("structure")).energy, first)

    def test_function_kl_is_zero_at_the_pretrained_model_without_spread(self) -> None:
        """If labels are as noisy as the pretrained model is wrong."""
        options = recipe(objective={"kind": "function_kl", "energy_std": 0.2, "forces_std": 0.5})
        problem = Problem(options)
        with torch.no_grad():
            for p in problem.potential.mean_parameters:
                p.zero_()
            for p in problem.potential.posterior.parameters():
                p.fill_(-30.0)
        replay = problem.replay()
        with torch.no_grad():
            for item in replay.items:
                out = problem.potential(collate(problem.potential.backbone, [item]))
                item.labels = item.labels | {"energy": out.energy[0], "forces": out.forces}
        objective = problem.objective(ElboScale(N, 1, 0.01), replay=replay)
        step = objective(problem.batch([0]), epoch=0, batch_index=0, step=0, world=1)
        assert abs(step.kl.item()) < 1e-9

    def test_every_replayed_structure_comes_once_per_epoch(self) -> None:
        problem = Problem(recipe())
        for world, steps in itertools.product((1, 2), (1, 3, 8)):
            keys: list[int] = []
            for rank in range(world):
                replay = problem.replay(world, rank)
                for number in range(steps):
                    batch = replay.batch(4, number, steps)
                    keys += [] if batch is None else batch.keys
            assert sorted(keys) == [10 * item.key for item in problem.items[:5]]


class OneNumber(Backbone):
    """Every structure is one atom whose energy is one weight."""

    name = "one"
    presets = {"all": ("linear",), "scalar": ("linear",)}

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential()
        self.model.add_module("linear", nn.Linear(1, 1, bias=False).double())
        with torch.no_grad():
            self.model.linear.weight.fill_(1.0)

    def forward(self, batch: Batch, **_: Any) -> Prediction:
        return Prediction(self.model(batch.graph)[:, 0])

    def row_kind(self, module_name: str) -> str:
        return "atom"

    def _unused(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    load = from_config = classmethod(_unused)
    config = graph = collate = stock_calculator = _unused


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("weight", marks=pytest.mark.default),
        pytest.param("adaptive", marks=pytest.mark.full),
    ],
)
def test_crps_training_ends_at_the_true_mean_and_spread(family: str) -> None:
    """Labels N(1.2, 0.4^2); one weight with a keyed sample for every structure."""
    n, truth = 400, 0.4
    eps = torch.randn(n, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    y = 1.2 + truth * (eps - eps.mean()) / eps.std()
    ones = torch.ones(n, dtype=torch.int64)
    batch = Batch(
        torch.ones(n, 1, dtype=DOUBLE),
        ones,
        ones,
        {"atom": torch.arange(n)},
        keys=list(range(n)),
        labels={"energy": y},
    )
    posterior = PosteriorConfig(
        **without_foreign_keys({"family": family, "prior_scale": 5.0, "init_std": 0.1, "max_std": 3.0})
    )
    options = recipe(objective={"kind": "crps", "temperature": 1e-9}, posterior=posterior.model_dump())
    potential = BayesianPotential(OneNumber(), ModelConfig(adapter="-", checkpoint="-"), posterior)
    likelihood = Likelihood(ObjectiveConfig(energy_std=0.1))
    objective = make_objective(Start(options, potential, likelihood, ElboScale(n, 1, 1e-9)))
    parameters = [*potential.mean_parameters, *potential.posterior.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    spreads, means = [], []
    for epoch in range(250):
        step = objective(batch, epoch=epoch, batch_index=0, step=epoch, world=1)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        if epoch >= 150:
            with torch.no_grad():
                samples = potential(batch, Noise("structure", epoch=10000 + epoch)).energy
            spreads.append(samples.std())
            means.append(samples.mean())
    assert torch.stack(spreads).mean().item() == pytest.approx(truth, rel=0.06)
    assert torch.stack(means).mean().item() == pytest.approx(1.2, abs=0.03)
