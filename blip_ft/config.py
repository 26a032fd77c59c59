"""Every option of a recipe: type, default, meaning. One definition gives validation and docs.

A recipe is a YAML file with the keys of :class:`Recipe`. Unknown keys are refused at every
depth with the nearest valid name; ``trainer.*`` is checked against Lightning's own ``Trainer``.
Loading this module imports neither a backend nor Lightning.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError

from blip_ft.errors import RecipeError, nearest

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Strict(BaseModel):
    """Base of all sections: unknown keys are errors, values are checked when they are set."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)


Quantity = Literal["energy", "length", "forces", "stress", "virial"]
StressOrder = Literal["ase", "vasp"]


class SourceConfig(Strict):
    """A source with options of its own: in place of a path, anywhere in ``data``."""

    path: str
    """file, folder, glob, hub id or embedded set, with ``@selector`` if wanted"""
    config: str | None = None
    """hub: configuration (subset) of the set"""
    revision: str | None = None
    """hub: branch, tag or commit; give a commit for a run that can be repeated"""
    stream: bool = False
    """hub: read over the network row by row instead of downloading the files first"""
    split: str | None = None
    """name of a split, as ``@split``"""
    fields: dict[str, str] | None = None
    """in place of ``data.fields``"""
    units: dict[Quantity, str] | None = None
    """in place of ``data.units``"""
    stress_order: StressOrder | None = None
    """in place of ``data.stress_order``"""
    energy_offset: float | None = None
    """in place of ``data.energy_offset``"""


#: a source: path, glob, ``path@selector``, hub id, name of an embedded set, options, or a list of these
Source = str | SourceConfig | list[str | SourceConfig]


class SplitConfig(Strict):
    """How a single source is divided when no files are given for the other roles."""

    by: Literal["auto", "given", "group", "composition", "structure", "block", "random", "file"] = "auto"
    """``given``: the source's own ``split`` column; ``group``: whole trajectories (or phases, files)
    stay together; ``composition``: frames of one reduced formula do; ``structure``: copies of one
    structure do; ``block``: contiguous blocks in file order inside each group; ``random``: frame by
    frame; ``file``: as ``data.split.file`` says; ``auto``: the first of given, group and random that
    the source can serve"""
    file: str | None = None
    """the ``splits.json`` of an earlier run: every frame gets the role it had there, by content"""
    validation: Fraction = 0.15
    """share of the frames for choosing the checkpoint"""
    calibration: Fraction = 0.15
    """share of the frames for the scale of the error bars"""
    test: Fraction = 0.2
    """share of the frames that nothing is chosen on"""
    seed: int = 0
    """seed of the division; independent of the training seed"""


class StreamConfig(Strict):
    """A training set that is read row by row, in every epoch anew, and never as a whole."""

    frames: Annotated[int, Field(ge=1)]
    """number of frames; the likelihood of the whole set is scaled by it, and a stream of another
    length is an error"""
    weight: Positive | None = None
    """sum of their weights, if they have any; by default the number of frames"""
    buffer: Annotated[int, Field(ge=1)] = 1000
    """frames in memory among which the next one is drawn at random; 1 keeps the order"""
    sample: Annotated[int, Field(ge=2)] = 256
    """frames from the start of the stream that stand for all in checks, references and the subspace
    posterior"""


class ReplayConfig(Strict):
    """Frames of a second source against forgetting, and frames that show how much was forgotten."""

    source: Source | None = None
    """frames that come with every step, in a term of their own beside the objective"""
    labels: Literal["pretrained", "own"] = "pretrained"
    """``pretrained``: the pretrained model's predictions; ``own``: their labels, after energy
    references of their own"""
    ratio: Positive = 0.25
    """replayed frames per training frame"""
    weight: Positive = 1.0
    """1: a replayed frame pulls as much as a training frame"""
    probe: Source | None = None
    """frames on which the change from the pretrained model is reported after training
    (``drift.json``); labels are not needed"""


class DataConfig(Strict):
    """Where the frames come from."""

    train: Source
    """frames to learn from; a single source is also divided into the roles not given below"""
    validation: Source | None = None
    """frames that choose the checkpoint and the length of Gauss-Newton steps"""
    calibration: Source | None = None
    """frames that choose the scale of the error bars"""
    test: Source | dict[str, Source] | None = None
    """frames that choose nothing; a mapping gives several sets: ``seen`` and named unseen ones"""
    context: Source | None = None
    """structures without labels that you mean to simulate: the ``subspace`` posterior is made wide in
    the directions that matter there, beside those of ``posterior.context``; ``objective.kind:
    function_kl`` compares on them too"""
    replay: ReplayConfig | None = None
    """replay against forgetting and probe of the drift"""
    split: SplitConfig = SplitConfig()
    fields: dict[str, str] = {}
    """names of the labels in the source, where they are not found by themselves:
    ``{energy: my_energy, forces: my_forces, stress: my_stress, group: run}``; also ``virial``,
    ``energy_per_atom``, ``weight``, ``atom_weight``, ``split``, and for tables ``numbers``,
    ``positions``, ``cell``, ``pbc``"""
    units: dict[Quantity, str] = {}
    """units of the source where they are not eV, Å, eV/Å, eV/Å^3 (names of ``ase.units``); a factor
    of -1 turns the sign"""
    stress_order: StressOrder = "ase"
    """order of six stress components: ``ase`` (xx yy zz yz xz xy) or ``vasp`` (xx yy zz xy yz zx)"""
    energy_offset: float = 0.0
    """taken off every total energy, in the source's own unit: for sets of one composition whose
    energies are stored with a constant"""
    references: Literal["shift", "keep", "refit", "given", "isolated_atoms"] = "shift"
    """energy per element added to the model. ``shift``: of least norm that fits label minus pretrained
    energy; ``keep``: none; ``refit``: the atomic energies of the labels of least norm, in place of the
    pretrained ones; ``given``: so that isolated atoms have ``data.reference_energies``;
    ``isolated_atoms``: the same with the energies of one-atom frames in the training source"""
    reference_energies: dict[str, float] = {}
    """``given``: energy of each isolated atom at the level of the labels, eV: ``{Si: -0.8, O: -1.9}``"""
    batch_by: Literal["structures", "atoms", "edges"] = "structures"
    """what ``batch_size`` counts; ``atoms`` and ``edges`` bound the memory of a step where structures
    differ in size"""
    check_frames: Annotated[int, Field(ge=0)] = 5000
    """frames whose labels are compared with the pretrained model before training; of more, an even
    sample; 0 for none"""
    bad_labels: Literal["warn", "drop", "stop"] = "warn"
    """what to do about labels that do not belong to their structures: ``warn``, ``drop`` these
    frames (each is listed), or ``stop``"""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """structures per rank and step, or at most so many atoms or edges (``data.batch_by``)"""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """processes that build graphs"""
    cache_gb: Annotated[float, Field(ge=0)] = 4.0
    """memory for graphs that are kept, per process; beyond it they are built anew in every epoch"""
    stream: StreamConfig | None = None
    """read ``data.train`` as a stream: for sets that do not fit on the disk; needs its number of frames,
    and sources for ``validation``, ``calibration`` and ``test``"""


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
    checkpoint: str
    """the vendor's model name, or a file in the vendor's format"""
    options: dict[str, Any] = {}
    """further arguments of the adapter's ``load`` (head, task, modality)"""
    from_scratch: bool = False
    """start from the vendor's initial weights in this architecture, with ``seed``, instead of the
    pretrained ones; the prior is centred there. Use ``train: rest`` with it, or what is not a linear
    block keeps its initial value"""
    dtype: Literal["float32", "float64"] = "float32"
    """precision of weights and training"""
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


class PosteriorConfig(Strict):
    """The distribution over the weights."""

    family: Literal["channel", "weight", "adaptive", "subspace", "posthoc_laplace"] = "subspace"
    """``channel``: one std per output channel; ``weight``: one per weight; ``adaptive``: one per row
    of a layer's input, from an inference network; ``subspace``: a correlated Gaussian along the
    directions in which training and context frames are most uncertain; ``posthoc_laplace``: the full Laplace
    covariance, low rank plus diagonal, after plain fine-tuning: a baseline"""
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
    (``subspace``, ``posthoc_laplace``): chosen by leaving groups of training frames out"""
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
    """``subspace``: number of directions r"""
    projections: Annotated[int, Field(ge=1)] = 8
    """``subspace``, ``posthoc_laplace``: random projections of each structure's forces that stand
    for all of them"""
    max_bytes: Annotated[ByteSize, Field(gt=0)] | None = None
    """``subspace``: bound on the directions in the model file, and on the gradients held in memory while
    they are fitted: a number of bytes or ``200 MB``. Where the recipe needs more, the run
    stores half precision, takes fewer projections, then a lower rank (not below 32), then puts noise on fewer weights
    (``scalar``, ``readout``), and says so; docs/uncertainty.md"""
    storage: Literal["auto", "float32", "float16"] = "auto"
    """``subspace``: how directions are stored; ``auto``: ``float16``, or ``float32`` where
    ``max_bytes`` is given and leaves room"""
    amplitude: Annotated[float, Field(gt=0, le=1)] = 0.05
    """``subspace``, ``posthoc_laplace``: width of the draws, in training as in predictions, in units of the
    posterior's; spreads are divided by it. Narrow draws stay where the model is linear; 1: draws at full
    width, with a covariance that is stationary for these"""
    context: Annotated[float, Field(ge=0)] = 0.4
    """``subspace``: unlabelled perturbed copies of training frames whose directions are also in,
    per training frame; ``objective.kind: function_kl`` compares on as many"""
    mean_steps: Annotated[int, Field(ge=0)] = 2
    """``subspace``: Gauss-Newton steps of the mean at the final fit, each of the length that
    validation frames prefer, none where they do not insist; with any, the first fit tries one too"""
    start: Annotated[float, Field(ge=0, le=1)] = 0.6
    """``subspace``: share of the epochs after which the posterior is fitted for the first time and
    the noise comes in; it is fitted again at the end"""


#: families whose covariance has a closed form
CLOSED = ("subspace", "posthoc_laplace")


class ObjectiveConfig(Strict):
    """What training minimises."""

    kind: Literal["elbo", "crps", "elbo+crps", "function_kl"] = "elbo"
    """``elbo``: expected NLL and T/N times the KL from the prior; ``crps``: fair CRPS of ``draws``
    samples over the label noise, with the KL of the mean alone: the spread learns the errors of the
    training frames; ``elbo+crps``: their sum; ``function_kl``: expected NLL, and the KL of the
    predictions from the pretrained model's on unlabelled frames in place of the KL of the weights.
    With CRPS only for ``channel``, ``weight`` and ``adaptive``, whose spread is learned step by step"""
    draws: Annotated[int, Field(ge=1)] | None = None
    """independent noise samples per step, each a pass through the model; by default 1 for ``elbo``,
    2 for the others (CRPS needs two or more)"""
    crps_weight: Positive = 1.0
    """``elbo+crps``: weight of the CRPS beside the NLL, both summed over labels in units of the noise"""
    replay: Source | None = None
    """``function_kl``: frames, with or without labels, on which the pretrained model is to be
    remembered; by default those of ``data.context`` and perturbed copies of the training frames
    (``posterior.context`` of them)"""
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


class PlainConfig(Strict):
    """Plain fine-tuning with the same optimiser, steps and early stop, for comparison."""

    enabled: bool = True
    """train it too; it costs as long as the Bayesian training without noise"""
    learning_rate: Positive | None = None
    """its own learning rate, where the best on validation differs from ``optimizer``'s"""


class UncertaintyConfig(Strict):
    """Prediction and calibration after training."""

    n_draws: Annotated[int, Field(ge=2)] = 16
    """fixed posterior draws that the trained model predicts with"""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """structures per call in evaluation"""
    linearity_frames: Annotated[int, Field(ge=0)] = 4
    """test frames, of all sets together, on which the report compares real draws with the linearised
    model; each costs some ``4 linearity_draws`` calls; 0 for none"""
    linearity_draws: Annotated[int, Field(ge=2)] = 6
    """draws of this comparison; from the number of latent numbers on (``posterior.rank``) exact force
    stds of the linearised model are computed too: 256 is thorough"""


class Recipe(Strict):
    """A whole run. ``blip-finetune fit`` takes the name of a shipped recipe or a YAML path."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.+-]*$", coerce_numbers_to_str=True)]
    """the run's folder is ``<output>/<name>``; letters, digits and ``_ . + -``"""
    seed: int = 0
    """of the order of frames, the noise and the draws"""
    output: str = "runs"
    """folder of all runs"""
    overwrite: bool = False
    """replace an existing run of this name instead of refusing"""
    data: DataConfig
    model: ModelConfig
    posterior: PosteriorConfig = PosteriorConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    plain: PlainConfig = PlainConfig()
    uncertainty: UncertaintyConfig = UncertaintyConfig()
    trainer: dict[str, Any] = {}
    """keyword arguments of ``lightning.Trainer`` (``max_epochs``, ``accelerator``, ``devices``)"""

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.output) / self.name


# ---- loading -------------------------------------------------------------------------------


def shipped() -> dict[str, Path]:
    """Shipped recipes: name -> file."""
    folder = Path(str(files("blip_ft.recipes")))
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply ``key.subkey=value`` overrides (values are YAML).

    Raises:
        RecipeError: no such recipe, not YAML, unknown key (with the nearest valid name), or a
            value of the wrong type or range.
    """
    path = shipped().get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise RecipeError(
            f"there is no recipe '{name_or_path}'",
            remedy=f"give a YAML file or a shipped name: {', '.join(shipped())}",
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"not a YAML file: {error}", file=path, remedy="mend the syntax") from error
    if not isinstance(tree, dict):
        raise RecipeError("a recipe is a mapping of keys", file=path, remedy="see docs/recipes.md")
    tree = _numbers(tree)
    tree.setdefault("name", path.stem)
    for override in overrides or []:
        apply_override(tree, override)
    return parse_recipe(tree, file=path)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one ``key.subkey=value`` in a nested mapping; the value is YAML.

    Raises:
        RecipeError: not of this form, or a parent key that holds a value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(
            f"cannot read the override '{override}'", remedy="write key=value, for instance seed=1"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of '{key}' is not YAML: {error}", field=key) from error
    value = _numbers(value)
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"'{parent}' has no keys below it", field=key, remedy="check the key")
    tree[last] = value


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads ``1e-3`` as a string; take it as the number that everyone means, at any depth."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def parse_recipe(tree: dict[str, Any], *, file: Path | None = None) -> Recipe:
    """Validate a nested mapping; all errors are collected into one message."""
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        problems: dict[str, str] = {}
        for item in error.errors():
            location = _location(item["loc"], tree)
            key = ".".join(location)
            if item["type"] == "extra_forbidden":
                text = f"unknown key '{key}': {nearest(location[-1], _siblings(location))}"
            else:
                text = f"'{key}': {item['msg'].lower()} (got {item['input']!r})"
            # the branches of a union each complain; one line per key is enough
            problems[key] = f"{problems[key]}, or {item['msg'].lower()}" if key in problems else text
        raise RecipeError(
            "; ".join(problems.values()),
            file=file,
            field=", ".join(problems),
            remedy="all keys: docs/recipes.md",
        ) from error
    _check_trainer(recipe.trainer, file)
    _check_family(recipe, file)
    _check_data(recipe.data, file)
    return recipe


def _check_data(data: DataConfig, file: Path | None) -> None:
    """Options of the data that belong together."""
    if (data.references == "given") != bool(data.reference_energies):
        raise RecipeError(
            "data.references: given and data.reference_energies need each other",
            file=file,
            field="data.references",
            remedy="set both: references: given, reference_energies: {Si: -0.8, O: -1.9}",
        )
    if (data.split.by == "file") != (data.split.file is not None):
        raise RecipeError(
            "data.split.by: file and data.split.file need each other",
            file=file,
            field="data.split",
            remedy="set both, the file being the splits.json of a run's folder",
        )
    if data.stream is not None:
        for role in ("validation", "calibration", "test"):
            if getattr(data, role) is None:
                raise RecipeError(
                    f"a stream is not divided: there are no frames for {role}",
                    file=file,
                    field=f"data.{role}",
                    remedy=f"give data.{role} a source",
                )
        if data.batch_by != "structures":
            raise RecipeError(
                "the sizes of a stream's structures are not known beforehand",
                file=file,
                field="data.batch_by",
                remedy="use data.batch_by: structures",
            )


def _check_family(recipe: Recipe, file: Path | None) -> None:
    """Options that only some posterior families and objectives have."""
    options, objective = recipe.posterior, recipe.objective
    closed = options.family in CLOSED

    def refuse(message: str, field: str, remedy: str) -> None:
        raise RecipeError(message, file=file, field=field, remedy=remedy)

    if options.family != "subspace":
        for key, default in (("max_bytes", None), ("storage", "auto")):
            if getattr(options, key) != default:
                refuse(
                    f"posterior.{key} is for the directions of 'subspace', which '{options.family}' has not",
                    f"posterior.{key}",
                    "remove the key",
                )
    if closed and options.mode != "structure":
        refuse(
            f"'{options.mode}' noise needs independent weights, the {options.family} posterior correlates them",
            "posterior.mode",
            "use posterior.mode=structure",
        )
    if closed and options.prior == "dropout":
        refuse(
            f"the closed form of posterior.family={options.family} needs a prior of fixed width",
            "posterior.prior",
            "use posterior.prior=pretrained, or posterior.family=weight",
        )
    if options.empirical_bayes and (
        options.family not in ("channel", "weight") or options.prior == "dropout"
    ):
        refuse(
            "empirical Bayes scales need a 'pretrained' prior and posterior.family 'channel' or 'weight', not "
            f"'{options.prior}' and '{options.family}'",
            "posterior.empirical_bayes",
            "remove the key"
            + (": prior_scale=auto already chooses the scale from the data" if closed else ""),
        )
    if options.family == "adaptive" and not options.min_std < options.init_std < options.max_std:
        refuse(
            f"init_std {options.init_std} is not between min_std {options.min_std} and max_std {options.max_std}",
            "posterior.init_std",
            "change one of the three",
        )
    if options.family == "posthoc_laplace" and objective.kind != "elbo":
        refuse(
            f"posthoc_laplace is a covariance after plain fine-tuning, not after '{objective.kind}'",
            "objective.kind",
            "remove the key",
        )
    if closed and "crps" in objective.kind:
        refuse(
            f"objective.kind '{objective.kind}' learns the spread step by step, that of '{options.family}' has "
            "a closed form",
            "objective.kind",
            "use objective.kind=elbo, or posterior.family=channel, weight or adaptive",
        )
    if "crps" in objective.kind and objective.draws == 1:
        refuse("the fair CRPS needs two draws or more", "objective.draws", "use objective.draws=2 or more")
    if "crps" in objective.kind and objective.learn_noise:
        refuse(
            "the CRPS is measured in units of the label noise, which cannot be learned from it",
            "objective.learn_noise",
            "use objective.kind=elbo, or fixed noise",
        )
    if objective.replay is not None and objective.kind != "function_kl":
        refuse(
            f"objective.kind '{objective.kind}' replays no frames",
            "objective.replay",
            "use objective.kind=function_kl, or remove the key",
        )
    given = objective.replay is not None or recipe.data.context is not None
    if objective.kind == "function_kl" and not given and options.context == 0:
        refuse(
            "objective.kind 'function_kl' has no frames to compare on",
            "objective.replay",
            "give frames here or as data.context, or posterior.context > 0",
        )
    if closed:
        return
    for key, value in (
        ("posterior.prior_scale", options.prior_scale),
        ("objective.temperature", objective.temperature),
    ):
        if value == "auto":
            refuse(
                f"'auto' has a closed form for posterior.family={', '.join(CLOSED)}, not for '{options.family}'",
                key,
                "give numbers; posterior.prior_scale=0.1 objective.temperature=0.0003 are a start",
            )


def _location(parts: tuple[int | str, ...], tree: Any) -> list[str]:
    """Path of an error in the recipe, without the tags that pydantic adds for union branches."""
    out: list[str] = []
    for i, part in enumerate(parts):
        if isinstance(tree, dict) and (part in tree or i == len(parts) - 1):
            out.append(str(part))
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            out.append(str(part))
            tree = tree[part]
    return out or [str(p) for p in parts]


def _siblings(location: list[str]) -> list[str]:
    """Valid keys at the depth of an unknown key."""
    section: type[BaseModel] = Recipe
    for part in location[:-1]:
        field = section.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type):
            break
        if issubclass(field.annotation, BaseModel):
            section = field.annotation
    return list(section.model_fields)


def _check_trainer(options: dict[str, Any], file: Path | None) -> None:
    import inspect

    from lightning import Trainer

    valid = [p for p in inspect.signature(Trainer.__init__).parameters if p != "self"]
    for key in options:
        if key not in valid:
            raise RecipeError(
                f"unknown key 'trainer.{key}': {nearest(key, valid)}",
                file=file,
                field=f"trainer.{key}",
                remedy="trainer.* are the keyword arguments of lightning.Trainer",
            )
