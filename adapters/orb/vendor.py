"""The vendor's side of the Orb adapter: names, architectures, files, its graphs and its calculator.

An Orb file is a bare state dict; the name of its architecture travels beside it. Here the name says
which of the vendor's architecture functions builds the model, with how many neighbours per atom, and
the sizes are read from the tensors, so that smaller models of the same architecture open too.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn

from blip_ft.adapters.shared.names import check_listed
from blip_ft.adapters.shared.vendor import default_dtype, import_backend, quiet
from blip_ft.backbones import edges, electrons
from blip_ft.backbones.protocol import Batch
from blip_ft.errors import CheckpointError, RecipeError, nearest
from blip_ft.variational.layers import VariationalLinear
from blip_ft.variational.sites import Block

RADIUS = 6.0  # Å, of every published model
#: one-hot vectors of the reference energies have 118 entries, the first of them unused
N_ELEMENTS = 117
#: arguments of the vendor's architecture functions that are sizes
_SIZES = (
    "num_message_passing_steps",
    "latent_dim",
    "base_mlp_hidden_dim",
    "base_mlp_depth",
    "head_mlp_hidden_dim",
    "head_mlp_depth",
)
_ELECTRONS = ("charge", "spin")
REFERENCE = "heads.energy.reference.linear.weight"


@dataclass(frozen=True)
class Architecture:
    """What the vendor's loading function of a model fixes beside its weights.

    Attributes:
        family: ``v3-conservative``, ``v3-direct`` or ``v2``.
        max_neighbors: edges go to this many nearest neighbours of an atom at most.
        charged: whether the model is conditioned on total charge and spin multiplicity.
        has_stress: whether it predicts a stress.
    """

    family: str
    max_neighbors: int
    charged: bool = False
    has_stress: bool = True

    @property
    def conservative(self) -> bool:
        """Whether forces are gradients of the energy."""
        return self.family == "v3-conservative"


def architectures() -> dict[str, Architecture]:
    """Architecture of every model that the installed vendor knows, without the withdrawn v1."""
    from orb_models.forcefield.pretrained import ORB_PRETRAINED_MODELS

    out = {}
    for name in ORB_PRETRAINED_MODELS:
        if name.endswith("-v2") or "-v2-" in name:
            out[name] = Architecture("v2", 20)
        elif match := re.fullmatch(r"orb-v3-(conservative|direct)-(20|inf)-\w+", name):
            out[name] = Architecture(f"v3-{match[1]}", 20 if match[2] == "20" else 120)
        elif match := re.fullmatch(r"orb-v3-(conservative|direct)-omol", name):
            out[name] = Architecture(f"v3-{match[1]}", 120, charged=True, has_stress=False)
        elif name.startswith("separate-d"):
            out[name] = Architecture("v3-direct", 120)
    return out


def architecture_of(name: Any) -> Architecture:
    """One of :func:`architectures`.

    Raises:
        CheckpointError: there is none of this name.
    """
    known = architectures()
    return known[check_listed(name, known, "architectures")]


def find(checkpoint: str, architecture: str | None) -> tuple[Path, str]:
    """Path of a file and its architecture; a vendor's model is downloaded by the vendor's own cache.

    Raises:
        CheckpointError: no such file or name, or no way to download it.
        RecipeError: a file without ``architecture``, an unknown one, or one that is not the model's.
    """
    known = architectures()
    if architecture is not None and architecture not in known:
        raise RecipeError(
            f"there is no Orb architecture '{architecture}'",
            remedy=f"{nearest(architecture, known)} (valid names: {', '.join(known)})",
            field="model.options.architecture",
        )
    path = Path(checkpoint).expanduser()
    if path.is_file():
        if architecture is None:
            raise RecipeError(
                f"an Orb file does not say which model it is, so '{path}' needs its architecture",
                remedy=f"give model.options.architecture, one of: {', '.join(known)}",
                field="model.options.architecture",
            )
        return path, architecture
    if path.suffix in (".ckpt", ".pt", ".pth") or len(path.parts) > 1:
        raise CheckpointError("there is no such file", remedy="check the path", file=checkpoint)
    if checkpoint not in known:
        raise CheckpointError(
            f"there is no Orb model '{checkpoint}'",
            remedy=f"{nearest(checkpoint, known)}; or give the path of a state dict",
            field="model.checkpoint",
        )
    if architecture not in (None, checkpoint):
        raise RecipeError(
            f"the architecture of '{checkpoint}' is not '{architecture}'",
            remedy="leave model.options.architecture out",
            field="model.options.architecture",
        )
    return _download(checkpoint), checkpoint


def _download(name: str) -> Path:
    """Path in the vendor's cache, downloaded with its progress bar if it is not there yet."""
    from cached_path import cached_path, get_cache_dir
    from orb_models.forcefield.pretrained import ORB_PRETRAINED_MODELS

    url = inspect.signature(ORB_PRETRAINED_MODELS[name]).parameters["weights_path"].default
    try:
        return Path(cached_path(url))
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        raise CheckpointError(
            f"the weights of '{name}' are neither in {get_cache_dir()} nor could they be downloaded "
            f"({type(error).__name__})",
            remedy=f"fetch {url} by hand, then give model.checkpoint=PATH/{url.rpartition('/')[2]} and "
            f"model.options.architecture={name}",
            field="model.checkpoint",
        ) from error


# ---- models ----------------------------------------------------------------------------------


@contextlib.contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """Default type of new tensors, which some of the vendor's layers compute in; afterwards it, and the
    precision of matrix products that the vendor's loader sets for the whole process, are what they were.
    """
    products = torch.get_float32_matmul_precision()
    with default_dtype(dtype):
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(products)


def build(architecture: str, sizes: Mapping[str, int]) -> nn.Module:
    """The vendor's model with random weights, in float32 on the CPU.

    Args:
        architecture: name of a vendor's model.
        sizes: arguments of the vendor's architecture function, as from :func:`read_sizes`.

    Raises:
        CheckpointError: no such architecture, or an argument that is no size.
    """
    import_backend("orb", "orb_models")
    kind = architecture_of(architecture)
    for key, value in sizes.items():
        check_listed(key, _SIZES, "sizes")
        if type(value) is not int:
            check_listed(value, (), f"values of '{key}'")
    with quiet(), precision(torch.float32):
        from orb_models.forcefield import pretrained
        from orb_models.forcefield.atomic_system import SystemConfig

        config = SystemConfig(radius=RADIUS, max_num_neighbors=kind.max_neighbors)
        options: dict[str, Any] = {**sizes, "device": "cpu", "system_config": config}
        if kind.family == "v2":
            function = pretrained.orb_v2_architecture
        else:
            options |= {"has_charge_spin_cond": kind.charged, "has_stress": kind.has_stress}
            function = (
                pretrained.orb_v3_conservative_architecture
                if kind.conservative
                else pretrained.orb_v3_direct_architecture
            )
        model: nn.Module = function(**options).eval()
    return model


def read_sizes(state: Mapping[str, Tensor], architecture: str) -> dict[str, int]:
    """Sizes of a model from the shapes in its state dict.

    Raises:
        KeyError: a tensor that every model of this architecture has is missing.
    """
    stacks = {int(m[1]) for k in state if (m := re.match(r"model\.gnn_stacks\.(\d+)\.", k))}
    steps = {"num_message_passing_steps": max(stacks, default=-1) + 1}
    if architectures()[architecture].family == "v2":
        return steps
    base, head = "model._encoder._node_fn.mlp.NN-", "heads.energy.mlp.NN-"
    return {
        **steps,
        "latent_dim": state["model.atom_emb.embeddings.weight"].shape[1],
        "base_mlp_hidden_dim": state[f"{base}0.weight"].shape[0],
        "base_mlp_depth": sum(k.startswith(base) and k.endswith(".weight") for k in state) - 1,
        "head_mlp_hidden_dim": state[f"{head}0.weight"].shape[0],
        "head_mlp_depth": sum(k.startswith(head) and k.endswith(".weight") for k in state) - 1,
    }


def open_checkpoint(path: Path, content: Any, architecture: str) -> tuple[dict[str, int], nn.Module]:
    """Sizes and model from a state dict that has been read already.

    Raises:
        CheckpointError: not a state dict of this architecture. The vendor's own loader leaves heads
            that a file lacks at random weights; here that is an error.
    """
    from orb_models.forcefield.load import replace_prefix

    foreign = CheckpointError(
        f"is not a state dict of an Orb model of the architecture '{architecture}'",
        remedy="check the path and model.options.architecture",
        file=path,
    )
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise foreign
    state = dict(content)
    for old, new in (("node_head.", "forces"), ("graph_head.", "energy"), ("stress_head.", "stress")):
        replace_prefix(state, old, f"heads.{new}.")  # files of the time of v2
    try:
        sizes = read_sizes(state, architecture)
        model = build(architecture, sizes)
        wanted = model.state_dict()
        for key in (k for k in wanted if k in state and state[k].numel() == wanted[k].numel()):
            state[key] = state[key].reshape(wanted[key].shape)  # (118,) and (1, 118) both occur
        missing = [k for k in wanted if k not in state and not k.startswith("heads.confidence.")]
        if missing:
            raise KeyError(missing[0])
        model.load_state_dict(state)
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise foreign from error
    return sizes, model


def write(model: nn.Module, path: Path, shift: Mapping[int, float]) -> None:
    """The state dict of a model with shifted reference energies.

    Args:
        model: a vendor's model; not changed.
        path: of the new file.
        shift: {atomic number: eV}.
    """
    state = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    for number, energy in shift.items():
        state[REFERENCE].view(-1)[number] += energy
    torch.save(state, path)


# ---- evaluation ------------------------------------------------------------------------------


class VariationalDirectionalLinear(VariationalLinear):
    """A linear layer on components of spherical harmonics.

    Noise per row would depend on how the structure lies in space, so that its block is not scalar:
    posteriors of mode ``local`` refuse it.
    """

    @staticmethod
    def blocks(base: Any) -> tuple[Block, ...]:
        """One matrix."""
        return (Block(0, tuple(base.weight.shape), output_axis=0, scalar=False),)


def radius_graph(atoms: Atoms, max_neighbors: int) -> tuple[Tensor, Tensor]:
    """The vendor's edges: indices (2, e) of sender and receiver, and vectors (e, 3) in Å, float64.

    Every atom sends to its ``max_neighbors`` nearest neighbours within the radius at most.
    """
    from orb_models.forcefield import featurization_utilities as features

    positions, cell = torch.from_numpy(atoms.positions.copy()), torch.from_numpy(atoms.cell.array.copy())
    if atoms.pbc.any():
        positions = features.map_to_pbc_cell(positions, cell)
    index, vectors, _ = features.compute_pbc_radius_graph(
        positions=positions,
        cell=cell,
        pbc=torch.from_numpy(atoms.pbc.copy()),
        radius=RADIUS,
        max_number_neighbors=max_neighbors,
        edge_method="knn_scipy",
        device="cpu",
        float_dtype=torch.float64,
    )
    return index.to(torch.int64), vectors.reshape(-1, 3)


def atom_graphs(batch: Batch, edge_vec: Tensor, max_neighbors: int) -> Any:
    """The vendor's ``AtomGraphs`` of a batch, with ``edge_vec`` (e, 3) in the type of the weights."""
    from orb_models.forcefield.base import AtomGraphs

    dtype, device, graph = edge_vec.dtype, edge_vec.device, batch.graph
    sender, receiver = graph["edge_index"]
    system = {"cell": graph["cell"].to(dtype)}
    for key in ("total_charge", "total_spin"):
        if key in graph:
            system[key] = graph[key].to(dtype)
    return AtomGraphs(
        senders=sender,
        receivers=receiver,
        n_node=batch.n_atoms,
        n_edge=torch.bincount(batch.rows["edge"], minlength=batch.n_structures),
        node_features={
            "positions": graph["positions"].to(dtype),
            "atomic_numbers": batch.numbers,
            "atomic_numbers_embedding": nn.functional.one_hot(batch.numbers, 118).to(dtype),
        },
        edge_features={"vectors": edge_vec},
        system_features=system,
        node_targets={},
        edge_targets={},
        system_targets={},
        system_id=None,
        fix_atoms=None,
        tags=None,
        radius=RADIUS,
        max_num_neighbors=torch.full_like(batch.n_atoms, max_neighbors, device=device),
    )


def calculator(model: nn.Module, device: torch.device, defaults: Mapping[str, float]) -> Any:
    """``ORBCalculator`` in the type of the weights.

    The vendor's graphs are made in torch's default type, which is set meanwhile. Slabs and wires, for
    which the vendor raises an error, go to it in a box.

    Args:
        model: the vendor's model.
        device: of the weights.
        defaults: ``charge`` and ``spin`` of structures that do not bring their own.
    """
    from orb_models.forcefield.calculator import ORBCalculator

    dtype = next(p.dtype for p in model.parameters())
    charged = getattr(getattr(model, "model", None), "conditioner", None) is not None

    class _Calculator(ORBCalculator):  # type: ignore[misc]
        """The vendor's calculator; see the function's text."""

        def check_state(self, atoms: Any, tol: float = 1e-15) -> list[str]:
            """As in ASE, and a changed charge or spin counts, which the vendor's calculator overlooks."""
            return electrons.changes(self.atoms, atoms, super().check_state(atoms, tol))

        def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = None) -> None:
            del properties, system_changes  # the vendor always computes everything
            frame = edges.boxed(atoms, 2 * RADIUS) if atoms.pbc.any() else edges.bare(atoms)
            frame.info = {**defaults, **electrons.given(atoms.info)} if charged else {}
            with precision(dtype):
                super().calculate(frame)
            self.atoms = atoms.copy()

    return _Calculator(model, device=device)


def read_back(path: Path, architecture: str, sizes: Mapping[str, int], dtype: torch.dtype) -> nn.Module:
    """A file opened by the vendor's own loader."""
    from orb_models.forcefield.pretrained import load_model

    name = "float64" if dtype == torch.float64 else "float32-high"
    with quiet(), precision(dtype):
        model: nn.Module = load_model(
            build(architecture, sizes), str(path), device="cpu", precision=name, compile=False
        )
    return model
