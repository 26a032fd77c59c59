"""What a run will take: time, memory and disk, from a few timed steps of its own model on its own frames.

Each stage of ``fit`` is counted in calls, and one call of each kind is timed on frames spread over the set.
Calls cost in proportion to atoms. Time of a closed form, besides its gradient rows, is that of three products of
matrices, whose rate is measured. What does not depend on the run (imports, figures of the report) was measured
once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ase import Atoms
from rich.console import Console

from blip_ft.backbones.conservative import weights_only
from blip_ft.backbones.protocol import Backbone
from blip_ft.closed_form.budget import fit_to_budget
from blip_ft.closed_form.fitter import STEP_SCALES, ClosedFormFitter
from blip_ft.closed_form.gradients import BATCH, groups_of
from blip_ft.config import Recipe
from blip_ft.data.batch.dataset import FrameDataset, Item, collate
from blip_ft.data.split.splits import Splits
from blip_ft.families.base.gram import gram_matrix
from blip_ft.families.base.linear import ClosedFormData
from blip_ft.families.base.options import ClosedFormOptions
from blip_ft.families.base.posterior import ClosedFormPosterior
from blip_ft.objectives import ElboScale, Likelihood
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.system.memory_used import peak_bytes
from blip_ft.system.side_by_side import width
from blip_ft.training.device import device_of
from blip_ft.training.evaluate import ROLES, draws_of
from blip_ft.training.largest import largest_structure
from blip_ft.training.objective import Objective, make_objective
from blip_ft.training.terms import Start
from blip_ft.uncertainty.linearity import study
from blip_ft.uncertainty.predict import predict_atoms, predict_set

#: batches of each kind that are timed, after one that is not
TIMED = 3
#: frames that predictions are timed on, of all sets together
FRAMES = 16
#: frames that gradient rows are timed on
ROW_FRAMES = BATCH
#: seconds of what every run does alike: imports of Lightning, scores of the metrics, figures of the report
FIXED = 10.0
#: Lightning's and the loggers' own time for each step, s
PER_STEP = 0.004
#: bytes of a report, tables and logs that every run writes, and of the logs of a step
FIXED_BYTES, STEP_BYTES = 1e5, 300
#: bytes of the predictions of one model for one atom, and of its points in the report's figures
ATOM_BYTES = 400
#: draws that are timed, of as many as there are: each costs what the others do
DRAWS = 4


@dataclass
class Cost:
    """What a run will take.

    Attributes:
        stages: {stage: seconds}.
        memory: most bytes at one time, on the GPU where there is one, else of the process.
        disk: bytes of the run's folder.
        steps: steps of training in all.
        device: what the steps were timed on.
        largest: {kind of call: atoms of the largest structure that fits}; ``None`` if nobody asked.
    """

    stages: dict[str, float] = field(default_factory=dict)
    memory: float = 0.0
    disk: float = 0.0
    steps: int = 0
    device: str = "cpu"
    largest: dict[str, int] | None = None

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(self.stages.values())

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "seconds": round(self.seconds, 1),
            "stages": {name: round(s, 1) for name, s in self.stages.items()},
            "memory_bytes": int(self.memory),
            "disk_bytes": int(self.disk),
            "steps": self.steps,
            "device": self.device,
            "largest_atoms": self.largest,
        }


def predict_cost(
    recipe: Recipe,
    splits: Splits,
    backbone: Backbone,
    sets: Mapping[str, FrameDataset],
    *,
    spent: float,
    unknown: int,
    largest: bool = False,
) -> Cost | None:
    """Time a few steps of every kind and count how often the run takes them.

    Args:
        recipe: options.
        splits: of its frames.
        backbone: arranged, in the precision of the recipe; converted here.
        sets: frames with graphs, by role.
        spent: seconds that reading the data and comparing them with the model has taken already, as ``fit`` will.
        unknown: frames that this has not asked the model about, as ``fit`` will.
        largest: also find the largest structure that fits into memory.

    Returns:
        ``None`` for a stream, whose epochs have no frames that could be looked at beforehand.
    """
    if recipe.data.stream is not None:
        return None
    sets = {name.removeprefix("test/"): dataset for name, dataset in sets.items()}
    n_atoms = [len(z) for z in splits.train["numbers"]]
    n_context = 0
    if recipe.posterior.needs_context:
        n_context = int(np.ceil(recipe.posterior.perturbed_share * len(n_atoms)))
    recipe = fit_to_budget(recipe, backbone, n_atoms, n_context, lambda line: None)
    potential = BayesianPotential(
        backbone, recipe.model, recipe.posterior, seed=recipe.seed, n_draws=recipe.uncertainty.n_draws
    )
    potential.to(device_of(recipe))
    meter = _Meter(recipe, potential, sets, n_context)
    cost = meter.cost(spent, unknown)
    if largest:
        cost.largest = meter.largest()
    return cost


class _Meter:
    """Times calls of one potential.

    Args:
        recipe: as it will be run.
        potential: not yet trained.
        sets: frames with graphs.
        n_context: frames without labels.
    """

    def __init__(
        self, recipe: Recipe, potential: BayesianPotential, sets: Mapping[str, FrameDataset], n_context: int
    ) -> None:
        self.recipe, self.potential, self.sets, self.n_context = recipe, potential, dict(sets), n_context
        self.sizes = {name: dataset.sizes("atoms") for name, dataset in sets.items()}
        from blip_ft.training.datamodule import FrameDataModule  # Lightning takes seconds to import
        from blip_ft.training.loop import DEFAULT_EPOCHS

        data = FrameDataModule(
            potential.backbone,
            sets["train"],
            sets["validation"],
            batch_size=recipe.data.batch_size,
            seed=recipe.seed,
            batch_by=recipe.data.batch_by,
        )
        self.batches = list(data.sampler())
        self.epochs = int(recipe.trainer.get("max_epochs") or DEFAULT_EPOCHS)

    def cost(self, spent: float, unknown: int) -> Cost:
        """All stages; the order is that of ``fit``."""
        recipe, potential, options = self.recipe, self.potential, self.recipe.posterior
        out = Cost(device=str(potential.backbone.device), stages={"data and checks": spent})
        held_out = [n for n in self.sets if n != "train"]
        mean = self._seconds_per_atom(0)
        atoms = {name: sum(sizes) for name, sizes in self.sizes.items()}
        share = unknown / max(1, sum(map(len, self.sets.values())))
        out.stages["data and checks"] += mean * share * sum(atoms.values())
        train_atoms, validation = atoms["train"], mean * atoms["validation"]
        trains = bool(potential.mean_parameters)
        posthoc = options.after_plain
        compared = recipe.plain.enabled and trains
        if compared or posthoc:
            step = self._step(plain=True)
            out.steps += self.epochs * len(self.batches)
            out.stages["plain training"] = self.epochs * (
                step * train_atoms + validation + PER_STEP * len(self.batches)
            )
        if compared:
            out.stages["plain predictions"] = mean * sum(atoms[n] for n in held_out)
        rows = 0.0
        closed = isinstance(options, ClosedFormOptions)
        before = self._step(plain=False) if trains or not closed else 0.0
        if isinstance(options, ClosedFormOptions):
            rows = self._closed_form(options, out, validation)
        if not posthoc and (trains or not closed):
            after = self._step(plain=False) if closed else before
            quiet = int(getattr(options, "first_fit", 0.0) * self.epochs) if closed else 0
            each = validation if closed else self._seconds_per_atom(4) * atoms["validation"]
            out.steps += self.epochs * len(self.batches)
            out.stages["training"] = (
                quiet * before + (self.epochs - quiet) * after
            ) * train_atoms + self.epochs * (each + PER_STEP * len(self.batches))
        draws = recipe.uncertainty.n_draws
        total = mean * train_atoms / 3  # features of training atoms, without forces
        few = self._seconds_per_atom(DRAWS)
        for name in held_out:  # the mean is a call more
            total += few * (draws_of(recipe, name, draws) + 1) / (DRAWS + 1) * atoms[name]
        out.stages["predictions"] = total
        out.stages["draws beside the linear model"] = self._linearity()
        out.stages["report"] = FIXED
        out.memory = peak_bytes(potential.backbone.device) + rows
        state = sum(t.numel() * t.element_size() for t in potential.state_dict().values())
        models = 2 + compared
        out.disk = (
            state
            + FIXED_BYTES
            + STEP_BYTES * out.steps
            + ATOM_BYTES * models * sum(atoms[n] for n in held_out)
        )
        return out

    def largest(self) -> dict[str, int]:
        """Atoms of the largest structure of a training step, and of a prediction with error bars."""
        potential, train = self.potential, self.sets["train"]
        potential.zero_grad(set_to_none=True)
        device = potential.backbone.device
        atoms = train[int(np.argmax(self.sizes["train"]))].atoms
        out = {}
        if potential.mean_parameters:
            steps = _Steps(self.recipe, potential, train, len(self.batches), plain=False)

            def take(grown: Atoms) -> None:
                steps.take([_labelled(potential.backbone, grown)], 0)

            out["training step"] = largest_structure(take, atoms, device)
            steps.undo()

        def predict(grown: Atoms) -> None:
            predict_atoms(potential, [grown], n_draws=2 if potential.posterior.ready else 0)

        return out | {"prediction": largest_structure(predict, atoms, device)}

    # ---- what is timed ---------------------------------------------------------------------
    def _spread(self, dataset: FrameDataset, count: int) -> FrameDataset:
        """Frames evenly spread over a set, in the order of their sizes."""
        order = np.argsort(dataset.sizes("atoms"), kind="stable")
        chosen = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
        return dataset.select([int(order[i]) for i in chosen])

    def _seconds_per_atom(self, draws: int) -> float:
        """Of predictions with so many draws, with the batches of an evaluation."""
        held_out = {n: d for n, d in self.sets.items() if n != "train" and len(d)}
        # of every set, as dense phases have more neighbours per atom
        total = sum(map(len, held_out.values()))
        some = [self._spread(d, max(1, round(FRAMES * len(d) / total))) for d in held_out.values()]

        def work() -> None:
            for frames in some:
                predict_set(
                    self.potential,
                    frames,
                    "timed",
                    n_draws=draws if self.potential.posterior.ready else 0,
                    batch_size=self.recipe.uncertainty.batch_size,
                )

        return _timed(work, 1 if draws else 2, warm=not draws) / sum(sum(d.sizes("atoms")) for d in some)

    def _step(self, *, plain: bool) -> float:
        """Seconds per atom of a step of training, with the optimiser's."""
        train = self.sets["train"]
        steps = _Steps(self.recipe, self.potential, train, len(self.batches), plain=plain)
        order = np.argsort([sum(self.sizes["train"][i] for i in b) for b in self.batches], kind="stable")
        middle = np.linspace(0, len(order) - 1, TIMED + 2).round().astype(int)[1:-1]
        chosen = [self.batches[order[i]] for i in middle]
        seconds = atoms = 0.0
        for number, index in enumerate([chosen[0], *chosen]):
            started = time.perf_counter()
            steps.take([train[i] for i in index], number)
            _wait(self.potential)
            if number:
                seconds += time.perf_counter() - started
                atoms += sum(self.sizes["train"][i] for i in index)
        steps.undo()
        return seconds / atoms

    # ---- closed forms ----------------------------------------------------------------------
    def _closed_form(self, options: ClosedFormOptions, out: Cost, validation: float) -> float:
        """Adds the fits of a posterior; returns the bytes that the largest holds at once. The posterior is then fitted
        to a few frames, so that what comes after is timed with its noise.
        """
        sizes, potential = np.array(self.sizes["train"]), self.potential
        weights = sum(s.numel for s in potential.posterior.sites)
        bytes_each = potential.backbone.dtype.itemsize
        first, slope = self._row_seconds(options)
        rate = self._rate(potential.backbone.dtype)

        def fit(projections: int | None, *, moves: bool = False) -> tuple[float, float]:
            """Seconds of one making of rows with what follows, and the bytes that are held."""
            groups = [sizes[i : i + BATCH] for i in range(0, len(sizes), BATCH)]
            outputs = [3 * int(g.max()) if projections is None else projections for g in groups]
            seconds = sum((first + slope * k) * g.sum() for k, g in zip(outputs, groups, strict=True))
            m = float((1 + (3 * sizes if projections is None else np.full_like(sizes, projections))).sum())
            seconds *= 1 + self.n_context / len(sizes)
            products, held = options.algebra(m, weights, bytes_each, moves=moves)
            return seconds + products / rate, held

        moves = options.most_mean_steps
        if not options.after_plain and options.first_fit < 1:
            seconds, _ = fit(options.projections_of_fit(last=False))
            tries = (1 + len(STEP_SCALES)) * validation if moves else 0.0
            out.stages["first fit of the posterior"] = seconds + tries
        last, held = fit(options.projections_of_fit(last=True))
        move, _ = fit(options.projections_of_fit(last=True), moves=True)
        tries = (1 + len(STEP_SCALES) + 1) * validation
        out.stages["posterior"] = last + moves * (move + tries)
        return held

    def _row_seconds(self, options: ClosedFormOptions) -> tuple[float, float]:
        """Seconds per atom of a batch: of its evaluation with the energy's gradient, and of each further output."""
        few = self._spread(self.sets["train"], ROW_FRAMES)
        fitter = ClosedFormFitter(
            self.recipe, self.potential, {"train": few, "validation": few}, Console(quiet=True)
        )
        atoms = sum(few.sizes("atoms"))
        fitter.rows.rows(1)
        one, more = (_timed(lambda r=r: fitter.rows.rows(r), 1, warm=False) for r in (2, 8))  # type: ignore[misc]
        slope = max(0.0, (more - one) / 6) / atoms
        rows = fitter.rows.rows(8, context=options.needs_context)
        posterior = self.potential.posterior
        assert isinstance(posterior, ClosedFormPosterior)
        if len(set(groups_of(few))) > 0:
            posterior.fit(ClosedFormData(rows, prior_scale=0.1, temperature=1.0))
        self.potential.amplitude = options.amplitude
        return max(0.0, one / atoms - 2 * slope), slope

    @staticmethod
    def _rate(dtype: torch.dtype) -> float:
        """Products of numbers per second, of a Gram matrix."""
        rows = torch.randn(600, 30_000, dtype=dtype, generator=torch.Generator().manual_seed(0))
        return 600.0**2 * 30_000 / _timed(lambda: gram_matrix(rows), 1)

    def _linearity(self) -> float:
        options = self.recipe.uncertainty
        tests = {n: d for n, d in self.sets.items() if n not in ROLES and len(d)}
        if not options.linearity_frames or not tests or not self.potential.posterior.ready:
            return 0.0
        name, dataset = max(tests.items(), key=lambda pair: len(pair[1]))
        frame = self._spread(dataset, 1)

        def work() -> None:
            study(self.potential, {name: frame}, n_frames=1, n_draws=options.linearity_draws)

        mean = np.mean([s for n in tests for s in self.sizes[n]])
        return _timed(work, 1, warm=False) * options.linearity_frames * float(mean) / frame.sizes("atoms")[0]


class _Steps:
    """Steps of training that leave no trace.

    Args:
        recipe: options of the objective.
        potential: whose weights move, by rounding at most, until :meth:`undo`.
        train: training frames.
        n_batches: of an epoch.
        plain: plain fine-tuning.
    """

    def __init__(
        self,
        recipe: Recipe,
        potential: BayesianPotential,
        train: FrameDataset,
        n_batches: int,
        *,
        plain: bool,
    ) -> None:
        likelihood = Likelihood(recipe.objective)
        scale = ElboScale(
            train.total_weight, n_batches, recipe.objective.kl_temperature, recipe.objective.kl_warmup
        )
        self.objective: Objective = make_objective(
            Start(recipe, potential, likelihood, scale, train), plain=plain
        )
        self.objective.likelihood.to(potential.backbone.device)
        self.parameters = [p for p in (*potential.parameters(), *likelihood.parameters()) if p.requires_grad]
        self.before = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0)

    def take(self, items: Sequence[Item], number: int) -> None:
        """One step with these structures."""
        backbone = self.objective.potential.backbone
        batch = collate(backbone, items, parts=width(backbone.device)).to(backbone.device)
        loss = self.objective(batch, epoch=0, batch_index=0, step=number, world=1).loss
        with weights_only():
            loss.backward(inputs=self.parameters)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def undo(self) -> None:
        """Put the weights back."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.before, strict=True):
                parameter.copy_(value)


def _labelled(backbone: Backbone, atoms: Atoms) -> Item:
    """An item of a structure whose labels are all zero."""
    labels = {"energy": torch.zeros(()), "forces": torch.zeros(len(atoms), 3), "stress": torch.zeros(6)}
    labels = {name: value.double() for name, value in labels.items()}
    return Item(atoms=atoms, graph=backbone.graph(atoms), labels=labels, key=0)


def _timed(work: Callable[[], Any], times: int, *, warm: bool = True) -> float:
    """Mean seconds, after a call that is not timed."""
    if warm:
        work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


def _wait(potential: BayesianPotential) -> None:
    if potential.backbone.device.type == "cuda":
        torch.cuda.synchronize()
