"""The prior and the posterior that a recipe asks for, over the weights of a converted model."""

from __future__ import annotations

import torch

from blip_ft.config import PosteriorConfig
from blip_ft.errors import ConversionError, RecipeError
from blip_ft.variational.base import VariationalLayer
from blip_ft.variational.convert import Converted
from blip_ft.variational.posteriors import (
    FAMILIES,
    AdaptivePosterior,
    PathwisePosterior,
    Posterior,
    SubspacePosterior,
)
from blip_ft.variational.prior import DropoutPrior, PretrainedPrior
from blip_ft.variational.sites import Site

#: prior scale until it is chosen from the data; holds the mean only, and loosely (docs/decisions.md)
START_PRIOR_SCALE = 1.0


def make_prior(converted: Converted, options: PosteriorConfig) -> PretrainedPrior:
    """The prior that a recipe asks for."""
    scale = START_PRIOR_SCALE if options.prior_scale == "auto" else options.prior_scale
    if options.prior == "dropout":
        layers = {name: converted.layers[name] for name in converted.sites}
        return DropoutPrior(converted.sites, layers, scale, converted.noisy, converted.rest)
    return PretrainedPrior(
        converted.sites,
        converted.pretrained,
        scale,
        converted.rest,
        empirical_bayes=options.empirical_bayes,
    )


def make_posterior(converted: Converted, prior: PretrainedPrior, options: PosteriorConfig) -> Posterior:
    """The posterior that a recipe asks for, over the weights that carry noise.

    Raises:
        ConversionError: the noise mode or the family does not suit the noisy weights.
        RecipeError: a value that the family cannot have.
    """
    noisy = [converted.sites[name] for name in converted.noisy]
    family = FAMILIES[options.family]
    if options.mode in ("local", "flipout") and not family.factorised:
        raise ConversionError(
            f"posterior.mode '{options.mode}' needs independent weights, '{options.family}' correlates them",
            remedy="use posterior.mode=structure",
            field="posterior.mode",
        )
    mixed = [s.name for s in noisy if not all(b.scalar for b in s.blocks)]
    if options.mode == "local" and mixed:
        raise ConversionError(
            f"posterior.mode 'local' reaches scalar paths only: {len(mixed)} noisy modules (first: "
            f"{mixed[0]}) have others, whose spread no data would ever narrow",
            remedy="use model.noise=scalar, or posterior.mode=structure",
            field="model.noise",
        )
    layers = {s.name: converted.layers[s.name] for s in noisy}
    if options.mode == "flipout":
        whole = [name for name, layer in layers.items() if layer.channels() is None]
        if whole:
            raise ConversionError(
                f"posterior.mode 'flipout' needs layers with channels: {len(whole)} noisy modules (first: "
                f"{whole[0]}) have none",
                remedy="use posterior.mode=structure, or model.noise=scalar",
                field="posterior.mode",
            )
    if family is AdaptivePosterior:
        return _adaptive(noisy, layers, prior, options)
    if family is SubspacePosterior:
        storage = torch.float32 if options.storage == "float32" else torch.float16
        return SubspacePosterior(noisy, prior, options.init_std, rank=options.rank, storage=storage)
    if family is PathwisePosterior:
        return PathwisePosterior(noisy, prior, options.init_std, rank=options.rank)
    return family(noisy, prior, options.init_std)


def _adaptive(
    noisy: list[Site], layers: dict[str, VariationalLayer], prior: PretrainedPrior, options: PosteriorConfig
) -> AdaptivePosterior:
    widths = {name: layer.n_invariants for name, layer in layers.items()}
    blind = [name for name, width in widths.items() if width is None]
    if blind:
        raise ConversionError(
            f"posterior.family 'adaptive' reads invariant inputs, and {len(blind)} noisy modules (first: "
            f"{blind[0]}) have none that are known",
            remedy="use model.noise=scalar",
            field="model.noise",
        )
    if not options.min_std < options.init_std < options.max_std:
        raise RecipeError(
            f"init_std {options.init_std} is not between min_std {options.min_std} and max_std {options.max_std}",
            remedy="change one of the three",
            field="posterior.init_std",
        )
    return AdaptivePosterior(
        noisy,
        prior,
        options.init_std,
        inputs={name: width for name, width in widths.items() if width is not None},
        kinds={n: "update" if layer.rows == "atom" else "message" for n, layer in layers.items()},
        std_range=(options.min_std, options.max_std),
    )
