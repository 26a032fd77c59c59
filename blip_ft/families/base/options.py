"""The keys below ``posterior`` that families share, and what may be asked about a family; imports no torch.

Others ask these questions, never for a family's name: training, checks of a recipe and predictions work with a family
that they have not heard of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import ByteSize, Field

from blip_ft.families.base.budget import Fitted, Room
from blip_ft.strict import Positive, Strict

#: projections per frame, where the recipe wants every component, of fits that only steer the noise in training
#: or move the mean
STEERING = 8


class Refuse(Protocol):
    """Raises a :class:`~blip_ft.errors.RecipeError`."""

    def __call__(self, message: str, field: str, remedy: str) -> None:
        """With what is wrong, where, and what to do about it."""


class FamilyOptions(Strict):
    """The distribution over the weights: the keys that every family has. Of all others only those of the family that
    is chosen are valid.
    """

    # ---- what may be asked about a family -------------------------------------------------------
    #: the mathematics: a class of posteriors, or ``module:class``, which imports torch when it is used
    law: ClassVar[Any]
    #: whether the covariance has a closed form, which is fitted to gradients of the training frames
    closed_form: ClassVar[bool] = False
    #: whether it is fitted once, around the mean that plain fine-tuning leaves
    after_plain: ClassVar[bool] = False
    #: whether weights are independent, as noise of mode ``local`` and ``flipout`` needs
    factorised: ClassVar[bool] = False
    #: whether draws come in pairs +-z and spreads are those of half their differences: for families that move so
    #: many weights that curvature would drown the spread near the data
    paired: ClassVar[bool] = False
    #: whether a draw is a set of weights, which a vendor's file can hold
    draws_are_weights: ClassVar[bool] = True
    #: whether frames without labels matter to its fit
    needs_context: ClassVar[bool] = False
    #: precision in which gradient rows are held while it is fitted; ``None``: the model's
    row_dtype: ClassVar[str | None] = None

    family: str
    """which one; each has further keys, below"""
    prior_scale: Positive | Literal["auto"] = "auto"
    """std s of the prior around the pretrained weights, in units of each matrix's rms; ``auto``
    (families with a closed form): chosen by leaving groups of training frames out"""
    perturbed_share: Annotated[float, Field(ge=0)] = 0.4
    """perturbed copies of training frames without labels, per training frame, for families that want directions
    away from the data (``subspace``), and for ``objective.kind: function_kl``, which compares on as many"""

    @classmethod
    def name(cls) -> str:
        """The family's name in a recipe."""
        found: str = cls.model_fields["family"].default
        return found

    @property
    def noise_mode(self) -> Literal["local", "structure", "flipout"]:
        """Noise in training."""
        return "structure"

    @property
    def dropout_prior(self) -> bool:
        """Whether the prior is around zero, with the mean's own size."""
        return False

    @property
    def scale_of_each_path(self) -> bool:
        """Whether every matrix and path gets a prior scale of its own, fitted after every epoch."""
        return False

    def check(self, refuse: Refuse) -> None:
        """What no single key can say; called with every recipe and every potential that is built."""
        del refuse

    def fit_to_budget(self, room: Room, say: Callable[[str], object]) -> Fitted[Self]:
        """The options with what has to be smaller for ``posterior.max_bytes``, and the modules with noise.

        Args:
            room: model and frames.
            say: is told what was reduced, from what to what, with the bytes.

        Raises:
            RecipeError: nothing fits; the message has the smallest bound that would.
        """
        del say
        return Fitted(self, room.noise)


class IndependentOptions(FamilyOptions):
    """Independent weights whose spread is learned step by step."""

    factorised: ClassVar[bool] = True

    mode: Literal["local", "structure", "flipout"] = "structure"
    """noise in training: ``local``: independent per row (scalars only); ``structure``: one weight
    sample per structure; ``flipout``: one per step with random signs per structure, which needs
    less memory, but is only uncorrelated between structures"""
    prior: Literal["pretrained", "dropout"] = "pretrained"
    """``pretrained``: N(w0, s^2) around the pretrained weights; ``dropout``: N(0, s^2 theta^2) around
    zero with the mean's own size (variational dropout, alpha0 = s^2), which does not hold the mean;
    all stds are then in units of abs(theta). For comparison"""
    init_std: Positive = 0.003
    """std of the posterior at the start, in the same units"""

    @property
    def noise_mode(self) -> Literal["local", "structure", "flipout"]:
        """As the recipe says."""
        return self.mode

    @property
    def dropout_prior(self) -> bool:
        """As the recipe says."""
        return self.prior == "dropout"


class FactorisedOptions(IndependentOptions):
    """Independent weights, each with a std of its own or of its channel."""

    empirical_bayes: bool = False
    """give every matrix and e3nn path its own s, the one that maximises the ELBO, fitted after every
    epoch; ``prior_scale`` is where they start and what small paths keep"""

    @property
    def scale_of_each_path(self) -> bool:
        """As the recipe says."""
        return self.empirical_bayes

    def check(self, refuse: Refuse) -> None:
        """Empirical Bayes needs a prior around the pretrained weights."""
        if self.empirical_bayes and self.dropout_prior:
            refuse(
                f"empirical Bayes scales need a 'pretrained' prior, not '{self.prior}'",
                "posterior.empirical_bayes",
                "remove the key",
            )


class ClosedFormOptions(FamilyOptions):
    """A covariance of all weights with noise that has a closed form."""

    closed_form: ClassVar[bool] = True
    #: whether projections of a structure's forces are orthonormal, and never more than there are components
    orthonormal_projections: ClassVar[bool] = False

    projections: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    """random projections of each structure's forces that stand for all of them; ``all``: every force
    component, as far as their gradients fit into ``max_bytes``"""
    max_bytes: Annotated[ByteSize, Field(gt=0)] | None = None
    """bound on the directions or samples in the model file, and on the gradients held in memory while they are
    fitted: a number of bytes or ``200 MB``. Where the recipe needs more, the run takes fewer projections, then a
    lower rank (not below 32). The run says so. Without a bound it takes 3 GB of gradients; docs/uncertainty.md"""
    amplitude: Annotated[float, Field(gt=0, le=1)] = 0.03
    """width of the draws, in training as in predictions, in units of the
    posterior's; spreads are divided by it. Narrow draws stay where the model is linear; 1: draws at full
    width, with a covariance that is stationary for these"""

    @property
    def most_mean_steps(self) -> int:
        """Most Gauss-Newton steps of the mean at the final fit; 0 where a fit leaves the mean alone."""
        return 0

    @property
    def first_fit(self) -> float:
        """Share of the epochs after which it is fitted for the first time."""
        return 1.0

    def algebra(self, rows: float, weights: int, number: int, *, moves: bool) -> tuple[float, float]:
        """Products of numbers, and bytes held at once, of a fit beside the making of its rows.

        Args:
            rows: of gradients.
            weights: that carry noise.
            number: bytes per number of the model.
            moves: a step of the mean in place of a covariance.
        """
        samples = 0 if moves else getattr(self, "rank", 0)
        products = rows * rows * weights + 20 * rows**3 + 4 * (3 + samples) * rows * weights
        return products, rows * weights * number + 3 * 8 * rows * rows

    def projections_of_fit(self, *, last: bool) -> int | None:
        """R of a fit, ``None`` for every force component; fits that are not the last make do with fewer."""
        if self.projections == "all":
            return None if last else STEERING
        return self.projections if last else min(self.projections, STEERING)


class TrainedClosedFormOptions(ClosedFormOptions):
    """A closed form that is fitted during training, moves the mean, and gives the noise."""

    mean_steps: Annotated[int, Field(ge=0)] = 1
    """most Gauss-Newton steps of the mean at the final fit, each no wider than
    validation frames insist on, until they insist on none; with any, the first fit tries one too. None where
    a noisy weight's mean does not move by itself (``model.mean: frozen`` or ``lora``)"""
    start: Annotated[float, Field(ge=0, le=1)] = 0.6
    """share of the epochs after which the posterior is fitted for the first time and
    the noise comes in; it is fitted again at the end"""

    @property
    def most_mean_steps(self) -> int:
        """As the recipe says."""
        return self.mean_steps

    @property
    def first_fit(self) -> float:
        """As the recipe says."""
        return self.start
