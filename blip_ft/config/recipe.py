"""The whole recipe, and the sections that concern neither the data nor the posterior."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from blip_ft.config.data import DataConfig, Source
from blip_ft.config.posterior import PosteriorConfig, PosteriorSection
from blip_ft.strict import Fraction, OriginText, PathText, Positive, Strict
from blip_ft.terms import OBJECTIVES, objective_spec


class LoraOptions(Strict):
    """Changes of low rank, for ``model.mean: lora``."""

    rank: Annotated[int, Field(ge=1)] = 8
    """rank of the change of each matrix"""
    alpha: Positive = 16.0
    """the product of the two factors is multiplied by alpha / rank"""


class ModelConfig(Strict):
    """Which potential, and which of its weights are trained and which carry noise."""

    adapter: str
    """name of the adapter, see ``blip-finetune doctor``"""
    checkpoint: OriginText
    """the vendor's model name, or a file in the vendor's format"""
    options: dict[str, Any] = {}
    """further arguments of the adapter's ``load`` (head, task, modality)"""
    from_scratch: bool = False
    """start from the vendor's initial weights in this architecture, with ``seed``, instead of the
    pretrained ones; the prior is centred there. Use ``train: rest`` with it, or what is not a linear
    block keeps its initial value"""
    dtype: Literal["float32", "float64"] = "float32"
    """precision of weights and training"""
    tf32: bool = False
    """train with float32 matrix products in TF32, on GPUs that have it: 10 bits of mantissa in place of 23. Refused
    where the model's forces do not survive it (docs/adapters.md, "Precision")"""
    train: str | list[str] = "all"
    """converted modules whose mean is trained: a preset of the adapter (``all``, ``scalar``,
    ``readout``), regular expressions on module names, or ``none``; ``rest`` trains all of them and
    every other parameter (norms, biases) too, held by the same penalty"""
    mean: Literal["full", "lora", "frozen"] = "full"
    """how the mean of ``train`` changes: every weight (``full``), by products of two thin matrices
    (``lora``, needs the extra of the same name), or not at all (``frozen``)"""
    lora: LoraOptions = LoraOptions()
    noise: str | list[str] = "all"
    """converted modules that carry noise, likewise; ``none`` for none"""
    trust: bool = False
    """open pickled files that are not on the list of published releases"""


def _known(kind: str) -> str:
    """``objective.kind`` names registered objectives and terms."""
    objective_spec(kind)
    return kind


class ObjectiveConfig(Strict):
    """What training minimises."""

    kind: Annotated[str, AfterValidator(_known), Field(json_schema_extra={"enum": [*OBJECTIVES.known()]})] = (
        "elbo"
    )
    """``elbo``: expected NLL and T/N times the KL from the prior; ``crps``: fair CRPS of ``draws``
    samples over the label noise, with the KL of the mean alone: the spread learns the errors of the
    training frames; ``elbo+crps``: their sum; ``function_kl``: expected NLL, and the KL of the
    predictions from the pretrained model's on unlabelled frames in place of the KL of the weights.
    With CRPS only for ``channel``, ``weight`` and ``adaptive``, whose spread is learned step by step.
    Terms of other packages are joined by ``+``"""
    draws: Annotated[int, Field(ge=1)] | None = None
    """independent noise samples per step, each a pass through the model; by default 1 for ``elbo``,
    2 for the others (CRPS needs two or more)"""
    crps_weight: Positive = 1.0
    """``elbo+crps``: weight of the CRPS beside the NLL, both summed over labels in units of the noise"""
    frames: Source | None = None
    """``function_kl``: frames, with or without labels, on which the pretrained model is to be
    remembered; by default those of ``data.context`` and perturbed copies of the training frames
    (``posterior.perturbed_share`` of them)"""
    likelihood: Literal["gaussian", "student_t", "joint_student_t"] = "gaussian"
    """law of the label noise: ``student_t``: single outliers pull less; ``joint_student_t``: one
    unknown noise level per structure for its energy, forces and stress together, so that a badly
    converged frame loses weight as a whole. In a closed form the mean is trained with it, the
    covariance keeps Gaussian noise of the same std"""
    degrees_of_freedom: Annotated[float, Field(gt=2)] = 4.0
    """of the two laws of Student; large is Gaussian. Noise stds below are stds for all laws"""
    energy_std: Positive = 2e-3
    """noise of the energy label, eV/atom"""
    forces_std: Positive = 2e-2
    """noise of a force component, eV/Å"""
    stress_std: Positive = 3e-3
    """noise of a stress component, eV/Å^3"""
    learn_noise: bool = False
    """learn these three from the values above instead of keeping them"""
    use_stress: bool = False
    """train on stress labels where they exist"""
    temperature: Positive | Literal["auto"] = "auto"
    """weight T of the KL term: 1 is Bayes, below it the posterior is colder; ``auto`` (families with a
    closed form): 1. The others need far less"""
    kl_warmup: Annotated[int, Field(ge=0)] = 0
    """epochs over which the KL term grows from 0 to its full weight"""

    @property
    def kl_temperature(self) -> float:
        """T as a number."""
        return 1.0 if self.temperature == "auto" else self.temperature


class OptimizerConfig(Strict):
    """Adam and its schedule."""

    learning_rate: Positive = 1e-3
    """of the mean; cosine decay to zero over the run"""
    std_learning_rate: Positive = 1e-2
    """of the posterior's log std"""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """share of the steps over which the learning rate rises"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """decay towards the pretrained weights (0 under the ELBO, whose KL already does it)"""
    ema_decay: Fraction | None = None
    """keep, validate and use an exponential moving average of the mean over the steps, with this decay
    (0.99 averages over some 100 steps); plain fine-tuning does the same"""
    patience: Annotated[int, Field(ge=1)] | None = 10
    """epochs in a row with a held-out score more than 2 % above the best one, after which training stops; ``null``:
    it never does. The state of the best epoch, or the pretrained one if none is better, is used in any case"""
    broken: Literal["stop", "leave_out"] = "stop"
    """what to do about frames that make a loss or gradient not finite, or a million times larger than usual: stop and
    name them, or leave them out from there on and list them in the receipt"""


class PlainConfig(Strict):
    """Plain fine-tuning with the same optimiser, steps and early stop, for comparison."""

    enabled: bool = False
    """train it too and judge it beside the Bayesian model; it costs as long as the Bayesian training without noise.
    The shipped recipes, which are examples and benchmarks, do"""
    learning_rate: Positive | None = None
    """its own learning rate, where the best on validation differs from ``optimizer``'s"""


class UncertaintyConfig(Strict):
    """Prediction and calibration after training."""

    n_draws: Annotated[int, Field(ge=2)] = 16
    """fixed posterior draws that the trained model predicts with"""
    calibration_draws: Annotated[int, Field(ge=2)] = 32
    """draws on the calibration frames, if more: the scatter of a few draws about the right width would be
    calibrated against by wider error bars, far from the data most of all"""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """structures per call in evaluation"""
    linearity_frames: Annotated[int, Field(ge=0)] = 4
    """test frames, of all sets together, on which the report compares real draws with the linearised
    model; each costs some ``4 linearity_draws`` calls; 0 for none"""
    linearity_draws: Annotated[int, Field(ge=2)] = 6
    """draws of this comparison; from the number of latent numbers on (``posterior.rank``) exact force
    stds of the linearised model are computed too: 256 is thorough"""


class VerifyConfig(Strict):
    """The part of ``blip-finetune verify`` that needs no dynamics, after every fit."""

    enabled: bool = True
    """compare forces and virial with finite differences, look for holes at short distance, and measure the drift from
    the pretrained model; it takes seconds"""


class Recipe(Strict):
    """A whole run. ``blip-finetune fit`` takes the name of a shipped recipe or a YAML path."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.+-]*$", coerce_numbers_to_str=True)]
    """the run's folder is ``<output>/<name>``; letters, digits and ``_ . + -``"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """of the order of frames, the noise and the draws"""
    output: PathText = "runs"
    """folder of all runs; ``~`` and ``$VARIABLES`` are replaced here, as in all paths of a recipe"""
    overwrite: bool = False
    """replace an existing run of this name instead of refusing, once the new one is whole"""
    keep_pieces: bool = False
    """keep what ``blip-finetune resume`` goes on from when the run is whole (``pieces/``)"""
    data: DataConfig
    model: ModelConfig
    posterior: PosteriorSection = Field(default_factory=PosteriorConfig)
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    plain: PlainConfig = PlainConfig()
    uncertainty: UncertaintyConfig = UncertaintyConfig()
    verify: VerifyConfig = VerifyConfig()
    trainer: dict[str, Any] = {}
    """keyword arguments of ``lightning.Trainer`` (``max_epochs``, ``accelerator``, ``devices``)"""

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.output) / self.name
