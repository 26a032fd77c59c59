"""The prior and the posterior that a recipe asks for, over the weights of a converted model."""

from __future__ import annotations

from blip_ft.errors import ConversionError, RecipeError
from blip_ft.families.base.options import FamilyOptions
from blip_ft.families.base.posterior import Posterior
from blip_ft.families.registry import posterior_class
from blip_ft.variational.convert import Converted
from blip_ft.variational.prior import DropoutPrior, PretrainedPrior

#: prior scale until it is chosen from the data; holds the mean only, and loosely (docs/decisions.md)
START_PRIOR_SCALE = 1.0


def make_prior(converted: Converted, options: FamilyOptions) -> PretrainedPrior:
    """The prior that a recipe asks for."""
    scale = START_PRIOR_SCALE if options.prior_scale == "auto" else options.prior_scale
    if options.dropout_prior:
        layers = {name: converted.layers[name] for name in converted.sites}
        return DropoutPrior(converted.sites, layers, scale, converted.noisy, converted.rest)
    return PretrainedPrior(
        converted.sites,
        converted.pretrained,
        scale,
        converted.rest,
        empirical_bayes=options.scale_of_each_path,
    )


def make_posterior(converted: Converted, prior: PretrainedPrior, options: FamilyOptions) -> Posterior:
    """The posterior that a recipe asks for, over the weights that carry noise.

    Raises:
        ConversionError: the noise mode or the family does not suit the noisy weights.
        RecipeError: a value that the family cannot have.
    """

    def refuse(message: str, field: str, remedy: str) -> None:
        raise RecipeError(message, field=field, remedy=remedy)

    options.check(refuse)
    noisy = [converted.sites[name] for name in converted.noisy]
    mode = options.noise_mode
    if mode in ("local", "flipout") and not options.factorised:
        raise ConversionError(
            f"posterior.mode '{mode}' needs independent weights, '{options.family}' correlates them",
            remedy="use posterior.mode=structure",
            field="posterior.mode",
        )
    mixed = [s.name for s in noisy if not all(b.scalar for b in s.blocks)]
    if mode == "local" and mixed:
        raise ConversionError(
            f"posterior.mode 'local' reaches scalar paths only: {len(mixed)} noisy modules (first: "
            f"{mixed[0]}) have others, whose spread no data would ever narrow",
            remedy="use model.noise=scalar, or posterior.mode=structure",
            field="model.noise",
        )
    layers = {s.name: converted.layers[s.name] for s in noisy}
    if mode == "flipout":
        whole = [name for name, layer in layers.items() if layer.channels() is None]
        if whole:
            raise ConversionError(
                f"posterior.mode 'flipout' needs layers with channels: {len(whole)} noisy modules (first: "
                f"{whole[0]}) have none",
                remedy="use posterior.mode=structure, or model.noise=scalar",
                field="posterior.mode",
            )
    return posterior_class(options.family).make(noisy, layers, prior, options)
