"""The vendor's side of the DIEP adapter: names, files, its layers and its calculator."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor, nn
from torch.nn.functional import pad

from blip_ft.adapters.diep import descriptors
from blip_ft.adapters.shared.names import check_listed
from blip_ft.adapters.shared.vendor import import_backend, quiet
from blip_ft.backbones import edges
from blip_ft.backbones.protocol import Batch
from blip_ft.errors import BlipError, CheckpointError, nearest

#: the vendor's files of arguments and of weights
ARGUMENTS, WEIGHTS = "model.pt", "state.pt"
#: what constructor arguments may name
_LISTED: dict[str, tuple[str, ...]] = {
    "activation_type": ("swish", "tanh", "sigmoid", "softplus2", "softexp"),
    "integral_mode": ("grid",),
    "triplet_frame": ("canonical", "bond"),
    "task_type": ("regression",),
}
#: what this adapter has no energy of atoms, or no test, for: {argument: value that it must have}
_NEEDED: dict[str, Any] = {"is_intensive": False, "include_state": False, "ntargets": 1}
_CLASSES = ("diep.models._diep.DIEP", "diep_pyg.models._diep.DIEP")  # its name while it was written


def find(checkpoint: str) -> Path:
    """The file of weights of a model folder, or of a model shipped in the vendor's wheel."""
    import diep

    path = Path(checkpoint).expanduser()
    if path.is_dir():
        path /= WEIGHTS
    if path.is_file():
        return path
    shipped = Path(diep.__file__).parent / "pretrained_models"
    names = {file.parent.name.removeprefix("diep_"): file for file in shipped.glob(f"*/{WEIGHTS}")}
    if checkpoint in names:
        return names[checkpoint]
    if path.suffix or len(path.parts) > 1:
        raise CheckpointError("there is no such file", remedy="check the path", file=str(path))
    raise CheckpointError(
        f"there is no DIEP model '{checkpoint}'",
        remedy=f"{nearest(checkpoint, names)}; or give the path of a folder with {ARGUMENTS} and {WEIGHTS}",
        field="model.checkpoint",
    )


def arguments_of(path: Path, content: Any) -> dict[str, Any]:
    """Constructor arguments of the vendor's model from its ``model.pt``, which has been read already.

    Raises:
        CheckpointError: it is no such file, or a model with a repulsion of its own.
    """
    saved = content.get("model") if isinstance(content, dict) else None
    if not isinstance(saved, dict) or not isinstance(saved.get("init_args"), dict):
        raise CheckpointError(
            "is not the file of arguments that diep writes",
            remedy=f"give the folder that diep.export has written, with {ARGUMENTS} and {WEIGHTS} in it",
            file=path,
        )
    check_listed(f"{saved.get('@module')}.{saved.get('@class')}", _CLASSES, "DIEP classes", file=path)
    if content.get("calc_repuls"):
        raise CheckpointError(
            "is a DIEP model with a repulsion of close pairs (calc_repuls), which this adapter does not compute",
            remedy="use a model without it, such as all that are published",
            file=path,
        )
    arguments = dict(saved["init_args"])
    if content.get("use_edges") is not None:  # the vendor's potential overrides its model
        arguments["use_edges"] = bool(content["use_edges"])
    try:
        plain: dict[str, Any] = json.loads(json.dumps(arguments))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            "has arguments that are no plain numbers and names", remedy="export the model anew", file=path
        ) from error
    return plain


def build(arguments: dict[str, Any], *, references: bool) -> nn.Module:
    """The vendor's ``Potential`` with random weights and, with ``references``, energies of elements that are zero.

    Raises:
        CheckpointError: an argument has a value that this adapter does not know.
    """
    for key, names in _LISTED.items():
        check_listed(arguments.get(key, names[0]), names, f"values of '{key}'")
    for key, value in _NEEDED.items():
        if arguments.get(key) != value:
            raise CheckpointError(
                f"its configuration has {key}: {arguments.get(key)}, and this adapter knows {value} alone",
                remedy="use a model of energies without state features, such as all that are published",
            )
    import_backend("diep", "diep")
    with quiet():
        from diep.apps.pes import Potential
        from diep.models._diep import DIEP

        model = DIEP(**arguments)
        zeros = torch.zeros(len(model.element_types)) if references else None
        potential: nn.Module = Potential(model, element_refs=zeros)
    for module in potential.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # noise is the posterior's business
    return potential


def bonds(model: Any, atoms: Atoms) -> dict[str, Tensor]:
    """The vendor's graph of a structure that is periodic in all directions.

    Returns:
        ``edge_index`` (2, e), ``edge_vec`` (e, 3) in Å, float64; ``triplet`` (2, t) the two edges of each triplet;
        ``order`` (t, 3), see :func:`descriptors.canonical_order`; ``shared`` (t,) whether a triplet stands for the same
        two edges in the other order too. It does in the canonical frame, unless a tie is decided by the order.
    """
    from diep.ext.ase import Atoms2Graph
    from diep.graph.compute import create_line_graph

    with quiet():
        graph = Atoms2Graph(model.element_types, model.cutoff).get_graph(atoms)[0]
        position = torch.tensor(atoms.positions, dtype=torch.float64)
        lattice = torch.tensor(atoms.cell.array, dtype=torch.float64)
        source, target = graph.edge_index
        vector = position[target] - position[source] + graph.pbc_offset.double().reshape(-1, 3) @ lattice
        graph.bond_dist = vector.norm(dim=1)
        triplet = create_line_graph(graph, model.threebody_cutoff).triple_index
    if not model.use_edges:
        triplet = triplet[:, :0]
    shared = torch.zeros(triplet.shape[1], dtype=torch.bool)
    order = descriptors.canonical_order(*_sides(atoms, graph.edge_index, vector, triplet))
    if model.diep_integrator.triplet_frame == "canonical":
        half = triplet[0] < triplet[1]
        triplet, order = triplet[:, half], order[half]
        mirrored = 2 - descriptors.canonical_order(*_sides(atoms, graph.edge_index, vector, triplet.flip(0)))
        shared = (order == mirrored).all(1)
        order = torch.cat((order, 2 - mirrored[~shared]))
        triplet = torch.cat((triplet, triplet.flip(0)[:, ~shared]), dim=1)
        shared = torch.cat((shared, torch.zeros(len(order) - len(shared), dtype=torch.bool)))
    return {
        "edge_index": graph.edge_index,
        "edge_vec": vector,
        "triplet": triplet,
        "order": order,
        "shared": shared,
    }


def _sides(atoms: Atoms, edge_index: Tensor, vector: Tensor, triplet: Tensor) -> tuple[Tensor, Tensor]:
    """Length of the side that faces each atom, and atomic numbers, (t, 3) each, as ``canonical_order`` has them."""
    numbers, (source, target) = torch.tensor(atoms.numbers, dtype=torch.int64), edge_index
    one, two = vector[triplet[0]], vector[triplet[1]]
    corner = torch.stack((target[triplet[0]], source[triplet[0]], target[triplet[1]]), dim=1)
    return torch.stack((two, one - two, one), dim=1).norm(dim=2), numbers[corner]


def atom_energies(potential: Any, batch: Batch, kinds: Tensor, edge_vec: Tensor) -> tuple[Tensor, Tensor]:
    """Energies of the atoms (n,) without references, eV, and the features (n, f) that they are made of.

    Args:
        potential: the vendor's ``Potential``, whose layers are called.
        batch: the structures.
        kinds: (n,) what the vendor counts the elements by.
        edge_vec: (e, 3) Å.
    """
    from diep.utils.cutoff import polynomial_cutoff

    model, (source, target) = potential.model, batch.graph["edge_index"]
    one, two = batch.graph["triplet"]
    integrator = model.diep_integrator
    charge = batch.numbers.to(edge_vec.dtype)
    charge = charge.sqrt() if integrator.use_effective_charge else charge
    length = edge_vec.norm(dim=1)
    near = polynomial_cutoff(length, model.threebody_cutoff)
    basis = descriptors.of_bonds(integrator, length, torch.stack((charge[source], charge[target]), dim=1))
    basis = basis * polynomial_cutoff(length, model.cutoff).unsqueeze(1)
    corners = torch.stack((charge[target[one]], charge[source[one]], charge[target[two]]), dim=1)
    threes = descriptors.of_triplets(integrator, edge_vec[one], edge_vec[two], corners, batch.graph["order"])
    threes = threes * (near[one] * near[two]).unsqueeze(1)
    # the second direction of what is not shared reads a row of zeros
    back = torch.where(batch.graph["shared"], target[one], len(kinds))

    graph = SimpleNamespace(edge_index=batch.graph["edge_index"], rbf=basis)
    node, edge = model.embedding.layer_node_embedding(kinds), model.embedding.layer_edge_embedding(basis)
    for three, layer in zip(model.three_body_interactions, model.graph_layers, strict=True):
        ends = pad(three.update_network_atom(node), (0, 0, 0, 1))
        around = basis.new_zeros(basis.shape).index_add(0, one, threes * ends[target[two]])
        around = around.index_add(0, two, threes * ends[back])
        edge = edge + three.update_network_bond(around)
        edge, node, _ = layer(graph, edge, node, None)
    return potential.data_std * model.final_layer.gated(node).squeeze(1), node


def state_of(potential: nn.Module, kinds: Mapping[int, int], shift: Mapping[int, float]) -> dict[str, Tensor]:
    """The vendor's state dict in float32, with ``shift`` (eV per atomic number) in its references.

    Args:
        potential: the vendor's ``Potential``.
        kinds: {atomic number: what the vendor counts the element by}.
        shift: eV by atomic number.

    Raises:
        BlipError: there is a shift, and the model has no references.
    """
    state = {
        name: (value.float() if value.is_floating_point() else value).detach().cpu().clone()
        for name, value in potential.state_dict().items()
    }
    key = "element_refs.property_offset"
    if shift and key not in state:
        raise BlipError(
            "this DIEP model has no energies of elements, so references have no place in its file",
            remedy="use --references beside, or the model folder with blip_ft.load",
        )
    for number, energy in shift.items():
        state[key][kinds[number]] += energy
    return state


def open_native(path: Path, like: nn.Module, dtype: torch.dtype) -> Any:
    """The vendor's ``Potential`` from a state dict, opened by the vendor's loader beside the arguments of ``like``."""
    from diep.apps.pes import Potential

    with tempfile.TemporaryDirectory() as folder, quiet():
        own: Any = like
        own.save(folder)
        files = {name: Path(folder) / name for name in (ARGUMENTS, "model.json")}
        return Potential.load({**files, WEIGHTS: path}).to(dtype).eval()


_VENDOR = threading.RLock()


@contextlib.contextmanager
def _computing(dtype: torch.dtype) -> Iterator[None]:
    """The vendor's own code in a type of numbers, with no sideways force of straight triplets (``descriptors.py``).

    Both are settings of the whole process, put back afterwards; threads take turns.
    """
    from diep import config
    from diep.layers import _diep

    def without_a_side(coords: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        flat, ordered = drawn(coords, numbers)
        sides = coords - coords[:, [1, 2, 0]]
        area = torch.linalg.cross(sides[:, 0], sides[:, 1]).square().sum(1)
        straight = area < descriptors.EPS**2 * sides.square().sum(2).amax(1)
        height = torch.where(straight.unsqueeze(1), flat[..., 1].detach(), flat[..., 1])
        return torch.stack((flat[..., 0], height), dim=2), ordered

    with _VENDOR:
        before, drawn = (config.float_th, config.float_np), _diep._canonicalize_triplets_batch
        config.float_th, config.float_np = dtype, np.float64 if dtype == torch.float64 else np.float32
        _diep._canonicalize_triplets_batch = without_a_side
        try:
            yield
        finally:
            config.float_th, config.float_np = before
            _diep._canonicalize_triplets_batch = drawn


def calculator(potential: Any, padding: float) -> Any:
    """``DIEPCalculator`` that also takes structures without a cell, and computes in the type of the weights.

    Args:
        potential: a copy that the calculator may keep.
        padding: vacuum around structures that are not periodic, Å.
    """
    from diep.pretrained import DIEPCalculator

    dtype = next(p.dtype for p in potential.parameters())

    class _Calculator(DIEPCalculator):  # type: ignore[misc]
        """The vendor's calculator behind a box."""

        def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = None) -> None:
            with _computing(dtype), quiet():
                super().calculate(edges.boxed(atoms, padding), properties, system_changes)
            self.atoms = atoms.copy()
            if not atoms.pbc.all():
                self.results.pop("stress")

    return _Calculator(potential=potential, stress_unit="eV/A3", use_voigt=True)
