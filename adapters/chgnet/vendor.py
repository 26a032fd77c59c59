"""The vendor's side of the CHGNet adapter: names, checkpoints, its layers and its calculator."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn

from blip_ft.adapters.shared.names import check_listed
from blip_ft.adapters.shared.vendor import import_backend, quiet
from blip_ft.backbones import edges
from blip_ft.backbones.protocol import Batch
from blip_ft.errors import BlipError, CheckpointError, nearest

#: atomic numbers 1 to 94 have an embedding
N_ELEMENTS = 94
_NORMS = ("batch", "layer")
#: what constructor arguments may name
_LISTED: dict[str, tuple[str, ...]] = {
    "composition_model": ("MPtrj", "MPtrj_e", "MPF", "MP-r2SCAN"),
    "non_linearity": ("relu", "silu", "scaledsilu", "gelu", "softplus", "sigmoid", "tanh"),
    "graph_converter_algorithm": ("fast", "legacy"),
    "read_out": ("ave", "attn", "weighted", "sum"),
    "final_mlp": ("normal", "MLP", "gatedMLP"),
    "gMLP_norm": _NORMS,
    "readout_norm": _NORMS,
    "conv_norm": _NORMS,
}


def find(checkpoint: str) -> Path:
    """Path of a file, or of a model shipped in the vendor's wheel."""
    import chgnet

    path = Path(checkpoint).expanduser()
    if path.is_file():
        return path
    shipped = Path(chgnet.__file__).parent / "pretrained"
    names = {folder.name: folder for folder in shipped.iterdir() if list(folder.glob("*.pth.tar"))}
    if checkpoint in names:
        return next(names[checkpoint].glob("*.pth.tar"))
    if path.suffix in (".tar", ".pth", ".pt") or len(path.parts) > 1:
        raise CheckpointError("there is no such file", remedy="check the path", file=checkpoint)
    raise CheckpointError(
        f"there is no CHGNet model '{checkpoint}'",
        remedy=f"{nearest(checkpoint, names)}; or give the path of a .pth.tar file",
        field="model.checkpoint",
    )


def open_checkpoint(path: Path, content: Any) -> tuple[dict[str, Any], nn.Module]:
    """Constructor arguments and model from a checkpoint that has been read already."""
    foreign = CheckpointError(
        "is not a CHGNet checkpoint that this version of chgnet can read",
        remedy="check the path; chgnet's own trainer writes such files",
        file=path,
    )
    saved = content.get("model") if isinstance(content, dict) else None
    if not isinstance(saved, dict) or not {"state_dict", "model_args"} <= saved.keys():
        raise foreign
    state = saved["state_dict"]
    # Version 0.2.0 had biases here; its files do not say so.
    biased = any(key.endswith("mlp_out.layers.1.bias") for key in state)
    arguments = {**saved["model_args"], "mlp_out_bias": biased}
    if not arguments.get("mlp_first", True):
        raise CheckpointError(
            "is a CHGNet model that pools atoms before its readout, so it has no atomic energies",
            remedy="use a model with mlp_first=True, such as all that are published",
            file=path,
        )
    try:
        arguments = json.loads(json.dumps(arguments))
        model = build(arguments)
        model.load_state_dict(state)
    except (TypeError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise foreign from error
    return arguments, model


def build(arguments: dict[str, Any]) -> nn.Module:
    """The vendor's model with random weights.

    Raises:
        CheckpointError: an argument names something that is not in the adapter's list.
    """
    for key, names in _LISTED.items():
        if arguments.get(key) is not None:
            check_listed(arguments[key], names, f"values of '{key}'")
    import_backend("chgnet", "chgnet")
    with quiet():
        from chgnet.model.model import CHGNet

        model: nn.Module = CHGNet(**copy.deepcopy(arguments))
    return model


def checkpoint_of(arguments: dict[str, Any], model: nn.Module, shift: Mapping[int, float]) -> dict[str, Any]:
    """What the vendor's trainer saves of a model, with ``shift`` (eV per atomic number) in its references.

    Raises:
        BlipError: the vendor counts references per structure in this model, not per atom.
    """
    net: Any = model
    if net.composition_model is not None and net.composition_model.is_intensive != net.is_intensive:
        raise BlipError(
            "this CHGNet model adds its references per structure and its energies per atom, or the reverse, "
            "so a shift per atom has no place in its file",
            remedy="use the model folder with blip_ft.load",
        )
    arguments, key = copy.deepcopy(arguments), "composition_model.fc.weight"
    state = {
        name: (value.float() if value.is_floating_point() else value).detach().cpu().clone()
        for name, value in model.state_dict().items()
    }
    if key not in state:
        arguments["composition_model"] = "MPtrj"  # any: its weights are those of the state dict
        state[key] = torch.zeros(1, N_ELEMENTS)
    for number, energy in shift.items():
        state[key][0, number - 1] += energy
    build(arguments).load_state_dict(state)  # the vendor builds the same, or says why not
    return {"model": {"state_dict": state, "model_args": arguments}}


def open_native(path: Path, device: torch.device, padding: float, dtype: torch.dtype) -> Any:
    """The vendor's calculator on a file opened by the vendor's loader."""
    import_backend("chgnet", "chgnet")
    with quiet():
        from chgnet.model.model import CHGNet

        return calculator(CHGNet.from_file(str(path)).to(device, dtype), device, padding)


def single_precision_edges(graph: Any, edge_index: Tensor) -> Tensor:
    """(e, 3) edge vectors of a ``CrystalGraph`` with the vendor's roundings, float32."""
    with torch.no_grad():
        positions = graph.atom_frac_coord @ graph.lattice
        images: Tensor = graph.neighbor_image.reshape(-1, 3) @ graph.lattice
        edge_vec: Tensor = (positions[edge_index[1]] + images) - positions[edge_index[0]]
    return edge_vec


def atom_features(model: Any, batch: Batch, edge_vec: Tensor) -> Tensor:
    """(n, f) features of the atoms that the readout sees, from the vendor's layers."""
    graph = batch.graph
    atom_graph = graph["edge_index"].t()
    length = edge_vec.norm(dim=1)
    direction = edge_vec / length.unsqueeze(1)
    atom, bond, edge, other_bond, other_edge = graph["angle"].unbind(1)
    bond_graph = torch.stack((atom, bond, other_bond), dim=1)

    of_bond = length[graph["edge_of_bond"]]
    basis = model.bond_basis_expansion.rbf_expansion_ag(of_bond)
    basis_short = model.bond_basis_expansion.rbf_expansion_bg(of_bond)
    atoms = model.atom_embedding(batch.numbers - 1)
    bonds = model.bond_embedding(basis)
    weights = model.bond_weights_ag(basis)
    weights_short = model.bond_weights_bg(basis_short)
    angles = model.angle_embedding(model.angle_basis_expansion(direction[edge], direction[other_edge]))
    # The vendor skips bond updates of a structure without angles; in a batch it forgets to, and its
    # energy then depends on the batch if the layer has a bias (version 0.2.0).
    updated = graph["has_angles"][batch.rows["bond"]].unsqueeze(1)

    def convolve(layer: Any) -> Tensor:
        out: Tensor = layer(
            atom_feas=atoms,
            bond_feas=bonds,
            bond_weights=weights,
            atom_graph=atom_graph,
            directed2undirected=graph["bond_of_edge"],
        )
        return out

    for index, layer in enumerate(model.atom_conv_layers[:-1]):
        atoms = convolve(layer)
        bond_layer, angle_layer = model.bond_conv_layers[index], model.angle_layers[index]
        if bond_layer is not None:
            new = bond_layer(
                atom_feas=atoms,
                bond_feas=bonds,
                bond_weights=weights_short,
                angle_feas=angles,
                bond_graph=bond_graph,
            )
            bonds = torch.where(updated, new, bonds)
            if angle_layer is not None:
                angles = angle_layer(
                    atom_feas=atoms, bond_feas=bonds, angle_feas=angles, bond_graph=bond_graph
                )
    atoms = convolve(model.atom_conv_layers[-1])
    return atoms if model.readout_norm is None else model.readout_norm(atoms)


def references(model: Any, batch: Batch) -> Tensor:
    """(n,) energies of the elements, eV.

    The vendor adds them per atom or per structure, depending on two flags; both are honoured.
    """
    composition = model.composition_model
    if composition is None:
        return torch.zeros_like(batch.numbers, dtype=next(model.parameters()).dtype)
    energy: Tensor = composition.fc.weight[0, batch.numbers - 1]
    if model.is_intensive == composition.is_intensive:
        return energy
    size = batch.n_atoms[batch.structure].to(energy.dtype)
    return energy * size if model.is_intensive else energy / size


def calculator(model: Any, device: torch.device, padding: float) -> Any:
    """``CHGNetCalculator`` that also takes structures without a cell.

    Args:
        model: a copy that the calculator may keep.
        device: where to run.
        padding: vacuum around structures that are not periodic, Å.
    """
    from chgnet.model.dynamics import CHGNetCalculator
    from chgnet.model.model import BatchedGraph
    from pymatgen.io.ase import AseAtomsAdaptor

    dtype = next(p.dtype for p in model.parameters())

    class _Calculator(CHGNetCalculator):  # type: ignore[misc]
        """The vendor's calculator behind a box, and with graphs in the type of the weights."""

        def calculate(
            self, atoms: Any = None, properties: Any = None, system_changes: Any = None, task: Any = "efs"
        ) -> None:
            box = edges.boxed(atoms, padding)
            if dtype == torch.float32:
                with quiet():
                    super().calculate(box, properties, system_changes, task)
            else:
                self.results = self._in_double(box)
            self.atoms = atoms.copy()
            if not atoms.pbc.all():
                self.results.pop("stress")

        def _in_double(self, box: Atoms) -> dict[str, Any]:
            """The vendor's energy function on a graph in float64."""
            structure = AseAtomsAdaptor.get_structure(box)
            net: Any = self.model.cpu()
            graph = net.graph_converter(structure)
            graph.lattice = torch.tensor(box.cell.array, dtype=dtype)
            graph.atom_frac_coord = torch.tensor(structure.frac_coords, dtype=dtype, requires_grad=True)
            graph.neighbor_image = graph.neighbor_image.to(dtype)
            batched = BatchedGraph.from_graphs(
                [graph], net.bond_basis_expansion, net.angle_basis_expansion, compute_stress=True
            )
            batched.volumes = torch.tensor([box.cell.volume], dtype=dtype)
            out = net._compute(batched, compute_force=True, compute_stress=True)
            size = len(box) if net.is_intensive else 1
            energy = out["e"].item() * size
            if net.composition_model is not None:
                energy += net.composition_model.get_site_energies([graph])[0].sum().item()
            return {
                "energy": energy,
                "free_energy": energy,
                "forces": out["f"][0].detach().numpy(),
                "stress": out["s"][0].detach().numpy() * self.stress_weight,
            }

    return _Calculator(model, use_device=str(device), on_isolated_atoms="ignore")
