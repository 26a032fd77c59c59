"""Fits the posteriors that have a closed form to a model and its training frames.

Their mathematics is in ``blip_ft.families``; here are the steps of a fit: gradient rows, scales and
covariance, Gauss-Newton steps of the mean, and the Gauss-Newton matrix at draws for families that ask for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ase import Atoms
from rich.console import Console
from torch import Tensor

from blip_ft.closed_form.gradients import GradientRows
from blip_ft.config import Recipe
from blip_ft.data.batch.dataset import FrameDataset, Item
from blip_ft.data.frame import atoms_key
from blip_ft.data.split.context import make_context
from blip_ft.families.base.linear import ClosedFormData, Collected, LinearizedModel, as_good, choose_scales
from blip_ft.families.base.options import ClosedFormOptions
from blip_ft.families.base.posterior import ClosedFormPosterior
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.system.progress import progress
from blip_ft.uncertainty.predict import predict_set

#: scales of a Gauss-Newton step that are tried, shares of the prior's. Validation frames, which resemble the training
#: frames, would take the widest that there is; a phase that is left out wants a fourth of s (docs/decisions.md)
STEP_SCALES = (1 / 16, 1 / 8, 1 / 4)


@dataclass
class ClosedFormFitter:
    """Everything that stays the same between fits of one run.

    Args:
        recipe: options.
        potential: its posterior is set.
        sets: needs ``train`` and ``validation``.
        console: for progress.
        unlabelled: structures (``data.context``) for families that need context, beside perturbed training
            frames.
        moved: called with all steps so far after every Gauss-Newton step of the mean.
    """

    recipe: Recipe
    potential: BayesianPotential
    sets: dict[str, FrameDataset]
    console: Console
    unlabelled: Sequence[Atoms] = ()
    moved: Callable[[list[float]], object] | None = None

    def __post_init__(self) -> None:
        options, train = self.recipe.posterior, self.sets["train"]
        context: list[Item] = []
        if options.needs_context:
            atoms = [train[i].atoms for i in range(len(train))]
            backbone = self.potential.backbone
            made = make_context(atoms, math.ceil(options.perturbed_share * len(train)), self.recipe.seed)
            context = [Item(a, backbone.graph(a), {}, atoms_key(a)) for a in (*made, *self.unlabelled)]
        orthonormal = isinstance(options, ClosedFormOptions) and options.orthonormal_projections
        self.rows = GradientRows(
            self.recipe.objective,
            self.potential,
            train,
            context,
            seed=self.recipe.seed,
            orthonormal=orthonormal,
        )

    @property
    def options(self) -> ClosedFormOptions:
        """Of the family."""
        options = self.recipe.posterior
        assert isinstance(options, ClosedFormOptions)
        return options

    @property
    def posterior(self) -> ClosedFormPosterior:
        """That is fitted."""
        posterior = self.potential.posterior
        assert isinstance(posterior, ClosedFormPosterior)
        return posterior

    @property
    def mean_is_free(self) -> bool:
        """Whether every noisy weight may move by itself: not where the mean is frozen, of low rank, or noisy
        beyond what is trained.
        """
        deltas = self.potential.converted.deltas
        return all(
            d.is_leaf and d.requires_grad for d in (deltas[s.name] for s in self.potential.posterior.sites)
        )

    # ---- fits ------------------------------------------------------------------------------
    def leave_out(self, keys: Collection[int]) -> None:
        """Do without some training frames from here on: those that broke the training."""
        if keys:
            self.rows.leave_out(keys)

    def fit(self, *, final: bool = False, done: Sequence[float] = ()) -> dict[str, Any]:
        """Gauss-Newton steps of the mean, then scales and covariance where they have led to.

        Args:
            final: with all rows, steps until one is refused, and an average over more draws. Else one step, after
                the covariance.
            done: steps that the mean has behind it, of a final fit that was ended.
        """
        wanted = self.options.most_mean_steps if self.mean_is_free else 0
        if not final:
            wanted = min(wanted, 1)
        steps = list(done)
        rows: LinearizedModel | Collected | None = None
        report: dict[str, Any] = {}
        while True:
            refused = bool(steps) and not steps[-1]
            number = len(steps) - refused  # a refused step has left the mean, and the rows, as they were
            rows = None  # as large as all that follows: free it before the next
            rows = self._make_rows(number, final=final)
            last = refused or number == wanted
            # gradients of another mean do not cancel where those of this one do: near the data a posterior from
            # before the step is too wide. In training it only steers the noise.
            if last or not final:
                report = self._fit_posterior(rows, number, final=final)
            if last:
                break
            assert isinstance(rows, LinearizedModel)
            scale = report["prior_scale"] if report else choose_scales(self._data(rows), {})[0]
            steps.append(self.move_mean(rows, scale))
            if self.moved is not None:
                self.moved(steps)
            if not final:
                break
            if not steps[-1]:
                report = self._fit_posterior(rows, number, final=final)
                break
        report["mean_steps"] = steps
        return self.settle(report, final=final)

    def _make_rows(self, number: int, *, final: bool) -> LinearizedModel | Collected:
        frames = len(self.rows.labelled) + len(self.rows.context)  # made only where they are used
        projections = self.options.projections_of_fit(last=final)
        collected = self.posterior.collect()
        with progress(self.console, "gradients for the posterior", frames, bar=final) as advance:
            if collected is None:
                return self.rows.rows(
                    projections, number=number, context=self.options.needs_context, progress=advance
                )
            made = self.rows.features(
                collected.features, collected.width, projections, number=number, progress=advance
            )
            for rows in made:
                collected.add(rows)
            return collected

    def _fit_posterior(
        self, rows: LinearizedModel | Collected, number: int, *, final: bool
    ) -> dict[str, Any]:
        made = {"projections": self.options.projections_of_fit(last=final), "number": number}
        return self.posterior.fit(self._data(rows)) | {"rows_of": made}

    def _data(self, rows: LinearizedModel | Collected) -> ClosedFormData:
        scale = self.options.prior_scale
        return ClosedFormData(
            rows=rows,
            prior_scale=None if scale == "auto" else float(scale),
            temperature=self.recipe.objective.kl_temperature,
        )

    def settle(self, report: dict[str, Any], *, final: bool) -> dict[str, Any]:
        """Width of the draws, and the covariance from real draws where the family wants that.

        Args:
            report: of the posterior's fit: ``prior_scale`` and ``temperature``; completed and returned.
            final: average over more draws.
        """
        posterior = self.posterior
        s = report["prior_scale"]
        if final:
            # in training the mean keeps the wide prior it started with: an s from the first fit's few
            # projections can be several times too small, and would pull the mean back
            self.potential.prior.prior_scale = s
        self.potential.amplitude = self.options.amplitude
        projections = self.options.projections_of_fit(last=False)
        posterior.settle(report, lambda basis, draw: self.rows.hessian(basis, projections, draw), final=final)
        report |= {
            "amplitude": self.potential.amplitude,
            "effective_parameters": posterior.effective_parameters(),
        }
        self.potential.fit_reports.append({"final": final} | report)
        self.console.print(
            f"posterior: {posterior.describe(report)}; prior scale {s:.3g}, "
            f"{report['effective_parameters']:.0f} effective "
            f"parameters, draws at {self.potential.amplitude:.2g} of the width"
        )
        return report

    # ---- the mean --------------------------------------------------------------------------
    def move_mean(self, rows: LinearizedModel, scale: float) -> float:
        """A damped Gauss-Newton step of the mean, no wider than validation frames insist on.

        Args:
            rows: with errors at the present mean.
            scale: s, the prior's.

        Returns:
            The step's scale as a share of s, one of :data:`STEP_SCALES`; 0 for no step.
        """
        deltas, sites = self.potential.converted.deltas, self.potential.posterior.sites
        steps = rows.steps([share * scale for share in STEP_SCALES])
        before = {s.name: deltas[s.name].detach().clone() for s in sites}

        def move(step: Tensor | None) -> None:
            parts = [None] * len(sites) if step is None else step.split([s.numel for s in sites])
            with torch.no_grad():
                for site, part in zip(sites, parts, strict=True):
                    deltas[site.name].copy_(before[site.name])
                    if part is not None:
                        unit = self.potential.prior.rms(site.name)
                        deltas[site.name].add_(part.reshape(site.shape) * unit)

        tried = {0.0: self.validation_misfit()}
        for share, step in zip(STEP_SCALES, steps, strict=True):
            move(step)
            tried[share] = self.validation_misfit()
        share = self._narrowest(tried)
        move(steps[STEP_SCALES.index(share)] if share else None)
        return share

    @staticmethod
    def _narrowest(tried: dict[float, Misfit]) -> float:
        """The narrowest step, none included, within a standard error (paired differences) of the best one.

        What is left to gain near the validation frames costs accuracy away from them: the weights move on in
        directions that the labels hardly determine.
        """
        rest = tried[0.0]
        best = min(tried.values(), key=lambda found: found.value).by_frame(rest)
        return min(share for share, found in tried.items() if as_good(found.by_frame(rest), best))

    def validation_misfit(self) -> Misfit:
        """Errors of the mean weights on the validation frames."""
        p = predict_set(self.potential, self.sets["validation"], "validation", n_draws=0, stress=False)
        frames = range(len(p.n_atoms))
        forces = [p.forces_error[p.structure == i].ravel() for i in frames]
        return Misfit([[f, np.atleast_1d(e)] for f, e in zip(forces, p.energy_error, strict=True)])


class Misfit:
    """NLL of labels under Laplacian noise of unknown width, of energies and forces each.

    At the best width it is n log(mean |error|) for n labels of a kind, up to a constant: a step may not
    pay for forces with energies that are many times worse, however small beside the objective's noise.

    Args:
        errors: for every frame the errors of each kind; not finite where there is no label.

    Attributes:
        widths: mean |error| of each kind, NaN without labels.
        value: the NLL per frame.
    """

    def __init__(self, errors: Sequence[Sequence[np.ndarray]]) -> None:
        known = [[np.abs(e[np.isfinite(e)]) for e in kinds] for kinds in errors]
        self._sums = np.array([[e.sum() for e in kinds] for kinds in known])
        counts = np.array([[e.size for e in kinds] for kinds in known]).sum(axis=0)
        self.widths = [
            max(float(total) / n, 1e-9) if n else math.nan
            for total, n in zip(self._sums.sum(axis=0), counts, strict=True)
        ]
        terms = [n * math.log(b) for n, b in zip(counts, self.widths, strict=True) if n]
        self.value = sum(terms) / len(errors)

    def by_frame(self, other: Misfit) -> np.ndarray:
        """(F,) NLL of every frame, up to a constant, with the widths of another."""
        terms: np.ndarray = np.nansum(self._sums / np.array(other.widths), axis=1)
        return terms
