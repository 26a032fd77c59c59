"""The keys below ``data``: sources, roles, labels, units and batches."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from blip_ft.strict import Fraction, PathText, Positive, Strict

Quantity = Literal["energy", "length", "forces", "stress", "virial"]
StressOrder = Literal["ase", "vasp"]


class SourceConfig(Strict):
    """A source with options of its own: in place of a path, anywhere in ``data``."""

    path: PathText
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


# which of its forms is meant shows at once, so that a typo is one error and not one for every other form


def _kind(value: Any) -> str:
    if isinstance(value, dict | SourceConfig):
        return "options"
    return "list" if isinstance(value, list) else "text"


def _kind_of_tests(value: Any) -> str:
    options = isinstance(value, SourceConfig) or (
        isinstance(value, dict) and isinstance(value.get("path"), str)
    )
    return "options" if options else "sets" if isinstance(value, dict) else _kind(value)


_OneSource = Annotated[
    Annotated[PathText, Tag("text")] | Annotated[SourceConfig, Tag("options")], Discriminator(_kind)
]
#: a source: path, glob, ``path@selector``, hub id, name of an embedded set, options, or a list of these
Source = Annotated[
    Annotated[PathText, Tag("text")]
    | Annotated[SourceConfig, Tag("options")]
    | Annotated[list[_OneSource], Tag("list")],
    Discriminator(_kind),
]
#: one source, or named sets of frames
Tests = Annotated[
    Annotated[PathText, Tag("text")]
    | Annotated[SourceConfig, Tag("options")]
    | Annotated[list[_OneSource], Tag("list")]
    | Annotated[dict[str, Source], Tag("sets")],
    Discriminator(_kind_of_tests),
]


class SplitConfig(Strict):
    """How a single source is divided when no files are given for the other roles."""

    by: Literal["auto", "given", "group", "composition", "structure", "block", "random", "file"] = "auto"
    """``given``: the source's own ``split`` column; ``group``: whole trajectories (or phases, files)
    stay together; ``composition``: frames of one reduced formula do; ``structure``: copies of one
    structure do; ``block``: contiguous blocks in file order inside each group; ``random``: frame by
    frame; ``file``: as ``data.split.file`` says; ``auto``: the first of given, group and random that
    the source can serve"""
    file: PathText | None = None
    """the ``splits.json`` of an earlier run: every frame gets the role it had there, by content"""
    validation: Fraction = 0.15
    """share of the frames for choosing the checkpoint"""
    calibration: Fraction = 0.15
    """share of the frames for the scale of the error bars"""
    test: Fraction = 0.2
    """share of the frames that nothing is chosen on"""
    seed: Annotated[int, Field(ge=0)] = 0
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


class ReferenceSetsConfig(Strict):
    """References of their own for the energies of each level of theory (head, functional, ...) in the frames."""

    default: str
    """the set on whose zero the model's energies are; those of the other sets are brought onto it"""
    by: Literal["theory", "group"] = "theory"
    """what names the set of a frame: its level of theory, or its group; which key of the source that is,
    ``data.fields``
    says where it is not found by itself"""
    energies: dict[str, dict[str, float]] = {}
    """``data.references: given``: energies of isolated atoms of each set, eV: ``{pbe: {Si: -0.8, O: -1.9},
    r2scan: {...}}``
    """


class DataConfig(Strict):
    """Where the frames come from."""

    train: Source
    """frames to learn from; a single source is also divided into the roles not given below"""
    validation: Source | None = None
    """frames that choose the checkpoint and the length of Gauss-Newton steps"""
    calibration: Source | None = None
    """frames that choose the scale of the error bars"""
    test: Tests | None = None
    """frames that choose nothing; a mapping gives several sets: ``seen`` and named unseen ones"""
    context: Source | None = None
    """structures without labels that you mean to simulate: the ``subspace`` posterior is made wide in
    the directions that matter there, beside those of ``posterior.perturbed_share``; ``objective.kind:
    function_kl`` compares on them too"""
    replay: ReplayConfig | None = None
    """replay against forgetting and probe of the drift"""
    split: SplitConfig = SplitConfig()
    fields: dict[str, str] = {}
    """names of the labels in the source, where they are not found by themselves:
    ``{energy: my_energy, forces: my_forces, stress: my_stress, group: run}``; also ``virial``,
    ``energy_per_atom``, ``weight``, ``atom_weight``, ``charge``, ``spin``, ``theory``, ``split``, and for
    tables ``numbers``, ``positions``, ``cell``, ``pbc``"""
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
    ``isolated_atoms``: the same with the energies of the isolated atoms in the sources"""
    reference_energies: dict[str, float] = {}
    """``given``: energy of each isolated atom at the level of the labels, eV: ``{Si: -0.8, O: -1.9}``"""
    reference_sets: ReferenceSetsConfig | None = None
    """energies of several levels of theory in one training: ``data.references`` holds for each of them by itself, the
    labels of all are brought onto the zero of ``default``"""
    batch_by: Literal["structures", "atoms", "edges"] = "structures"
    """what ``batch_size`` counts; ``atoms`` and ``edges`` bound the memory of a step where structures
    differ in size"""
    check_frames: Annotated[int, Field(ge=0)] = 5000
    """frames whose labels are compared with the pretrained model before training; of more, an even
    sample; 0 for none"""
    bad_labels: Literal["auto", "warn", "drop", "stop"] = "auto"
    """what to do about labels that do not belong to their structures. ``auto``: leave out frames whose
    label is wrong beyond doubt (docs/data.md), each is listed, and warn of the others; ``warn``: use all;
    ``drop``: leave
    all of these frames out; ``stop``"""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """structures per rank and step, or at most so many atoms or edges (``data.batch_by``)"""
    atoms_at_once: Annotated[int, Field(ge=1)] | None = None
    """atoms of a step that are in memory at once: a larger batch is evaluated in parts and the gradient evaluates each
    again (activation checkpointing), with the same result. By default the whole batch, in parts once memory runs out"""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """processes that build graphs"""
    cache_gb: Annotated[float, Field(ge=0)] = 4.0
    """memory for graphs that are kept, per process; beyond it they are built anew in every epoch"""
    stream: StreamConfig | None = None
    """read ``data.train`` as a stream: for sets that do not fit on the disk; needs its number of frames,
    and sources for ``validation``, ``calibration`` and ``test``"""
