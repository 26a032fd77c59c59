"""The keys below ``posterior``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ByteSize, Field

from blip_ft.config.base import Positive, Strict


class PosteriorConfig(Strict):
    """The distribution over the weights."""

    family: Literal["channel", "weight", "adaptive", "subspace", "pathwise", "posthoc_laplace"] = "pathwise"
    """``channel``: one std per output channel; ``weight``: one per weight; ``adaptive``: one per row
    of a layer's input, from an inference network; ``subspace``: a correlated Gaussian along the
    directions in which training and context frames are most uncertain; ``pathwise``: the full covariance of
    all noisy weights, as samples of it; ``posthoc_laplace``: the same as low rank plus diagonal, after plain
    fine-tuning: a baseline"""
    mode: Literal["local", "structure", "flipout"] = "structure"
    """noise in training: ``local``: independent per row (scalars only); ``structure``: one weight
    sample per structure; ``flipout``: one per step with random signs per structure, which needs
    less memory, but is only uncorrelated between structures. ``local`` and ``flipout`` need independent weights:
    ``channel``, ``weight``"""
    prior: Literal["pretrained", "dropout"] = "pretrained"
    """``pretrained``: N(w0, s^2) around the pretrained weights; ``dropout``: N(0, s^2 theta^2) around
    zero with the mean's own size (variational dropout, alpha0 = s^2), which does not hold the mean;
    all stds are then in units of abs(theta). For comparison; not for families with a closed form"""
    prior_scale: Positive | Literal["auto"] = "auto"
    """std s of the prior around the pretrained weights, in units of each matrix's rms; ``auto``
    (families with a closed form): chosen by leaving groups of training frames out"""
    empirical_bayes: bool = False
    """give every matrix and e3nn path its own s, the one that maximises the ELBO, fitted after every
    epoch; ``prior_scale`` is where they start and what small paths keep (``channel``, ``weight``)"""
    init_std: Positive = 0.003
    """std of the posterior at the start, in the same units (``channel``, ``weight``, ``adaptive``)"""
    min_std: Positive = 1e-4
    """``adaptive``: least std that the inference network can give, in the same units"""
    max_std: Positive = 0.3
    """``adaptive``: greatest; training says where the clamp binds"""
    rank: Annotated[int, Field(ge=1)] = 128
    """``subspace``: number of directions r; ``pathwise``: number of samples"""
    projections: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    """families with a closed form: random projections of each structure's forces that stand for all of
    them; ``all``: every force component, as far as their gradients fit into ``max_bytes`` (``subspace``: 8)"""
    max_bytes: Annotated[ByteSize, Field(gt=0)] | None = None
    """families with a closed form: bound on the directions or samples in the model file, and on the gradients held
    in memory while they are fitted: a number of bytes or ``200 MB``. Where the recipe needs more, the run takes
    fewer projections, then a lower rank (not below 32); ``subspace`` stores half precision before that, and
    after it puts noise on fewer weights (``scalar``, ``readout``). The run says so. Without a bound all but ``subspace`` take
    3 GB of gradients; docs/uncertainty.md"""
    storage: Literal["auto", "float32", "float16"] = "auto"
    """``subspace``: how directions are stored; ``auto``: ``float16``, or ``float32`` where
    ``max_bytes`` is given and leaves room"""
    amplitude: Annotated[float, Field(gt=0, le=1)] = 0.03
    """families with a closed form: width of the draws, in training as in predictions, in units of the
    posterior's; spreads are divided by it. Narrow draws stay where the model is linear; 1: draws at full
    width, with a covariance that is stationary for these"""
    context: Annotated[float, Field(ge=0)] = 0.4
    """``subspace``: unlabelled perturbed copies of training frames whose directions are also in,
    per training frame; ``objective.kind: function_kl`` compares on as many"""
    mean_steps: Annotated[int, Field(ge=0)] = 1
    """``pathwise``, ``subspace``: most Gauss-Newton steps of the mean at the final fit, each no wider than
    validation frames insist on, until they insist on none; with any, the first fit tries one too. None where
    a noisy weight's mean does not move by itself (``model.mean: frozen`` or ``lora``)"""
    start: Annotated[float, Field(ge=0, le=1)] = 0.6
    """``pathwise``, ``subspace``: share of the epochs after which the posterior is fitted for the first time and
    the noise comes in; it is fitted again at the end"""


#: families whose covariance has a closed form
CLOSED = ("pathwise", "subspace", "posthoc_laplace")
#: of these, those whose draws come in pairs (``Posterior.paired``)
PAIRED = ("pathwise", "posthoc_laplace")
