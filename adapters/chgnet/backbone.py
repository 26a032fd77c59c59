"""CHGNet (package ``chgnet``): an invariant graph network on bonds and angles.

The vendor featurises structures one by one with positions that require grad. Here the same layers
run on concatenated index tensors, with the vectors of the directed edges as the leaves of the
gradient; the numbers are the vendor's (``chgnet.model.model.CHGNet._compute``).

The vendor rounds coordinates to single precision, and angles near 0 and 180 degrees amplify that to
some 1e-4 eV/Å in forces. A float32 model is therefore given the vendor's own rounded vectors, so
that it agrees with the vendor's calculator; a float64 model gets exact ones.

Structures that are not periodic in all directions are put into a box with three cutoffs of
vacuum, since the vendor's graphs need a lattice; they have no stress.

Four kinds of rows appear: ``atom``; ``edge``, a directed edge of the atom graph; ``bond``, an
undirected edge; ``angle``, a pair of edges at one atom that are both shorter than the bond graph's
cutoff.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from ase import Atoms
from torch import Tensor, nn

from blip_ft.adapters.chgnet import vendor
from blip_ft.adapters.shared.files import open_file
from blip_ft.adapters.shared.vendor import import_backend, parameter_names, quiet, refuse_options
from blip_ft.backbones import edges
from blip_ft.backbones.conservative import ConservativeBackbone, Evaluation, sum_rows
from blip_ft.backbones.protocol import Batch

_EMBEDDING = r"bond_embedding|bond_weights_[ab]g|angle_embedding"
_BODY = r"(atom_conv|bond_conv|angle)_layers\..*"
_READOUT = r"mlp\..*"


class CHGNetBackbone(ConservativeBackbone):
    """A CHGNet model.

    Args:
        arguments: constructor arguments of the vendor's model.
        model: the vendor's model; built with random weights if not given.
        origin: where the weights came from.
    """

    name: ClassVar[str] = "chgnet"
    packages: ClassVar[tuple[str, ...]] = ("chgnet", "pymatgen", "torch")
    refused_precisions: ClassVar[Mapping[str, str]] = {
        "tf32": "forces are off by 27 meV/Å (rms, SiO2): its normalisation divides small signals near the "
        "cutoff by their "
        "spread",
    }
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "all": (rf"{_EMBEDDING}|{_BODY}|{_READOUT}",),
        "scalar": (rf"{_EMBEDDING}|{_BODY}|{_READOUT}",),
        "readout": (_READOUT,),
        "radial": (_EMBEDDING,),
    }
    keep: ClassVar[Mapping[str, str]] = {
        r"composition_model(\..*)?": "energy reference of each element: the reference shift handles it",
        r"site_wise": "magnetic moments: no part in energy, forces or stress",
    }

    native_suffix: ClassVar[str] = ".pth.tar"
    native_dtype: ClassVar[str] = "float32"

    def __init__(
        self,
        arguments: dict[str, Any],
        *,
        model: nn.Module | None = None,
        origin: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.arguments = arguments
        self.origin = dict(origin or {})
        self.model = vendor.build(arguments) if model is None else model
        converter: Any = self.model.graph_converter
        converter.set_isolated_atom_response("ignore")
        self.cutoff = float(converter.atom_graph_cutoff)
        self.elements = frozenset(range(1, vendor.N_ELEMENTS + 1))
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # noise is the posterior's business
        self._stock_names = parameter_names(self.model)

    # ---- loading -------------------------------------------------------------------------
    @classmethod
    def load(cls, checkpoint: str, *, trust: bool = False, **options: Any) -> CHGNetBackbone:
        """Load a CHGNet model.

        Args:
            checkpoint: ``0.3.0``, ``0.2.0`` or ``r2scan`` (shipped in the vendor's wheel), or the path
                of a file that the vendor's trainer wrote (``.pth.tar``).
            trust: open a file even if that can run code that it contains.
            options: none are known.

        Raises:
            CheckpointError: missing, damaged or untrusted file, unknown name, or a kind of model that
                has no atomic energies.
            RecipeError: unknown option.
        """
        refuse_options(options, cls.name)
        import_backend(cls.name, "chgnet")
        path = vendor.find(checkpoint)
        content, digest = open_file(path, trust=trust)
        arguments, model = vendor.open_checkpoint(path, content)
        return cls(arguments, model=model, origin={"checkpoint": checkpoint, "sha256": digest})

    def config(self) -> dict[str, Any]:
        """The vendor's constructor arguments and the origin, all JSON-serialisable."""
        return {"arguments": copy.deepcopy(self.arguments), "origin": dict(self.origin)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CHGNetBackbone:
        """The same architecture with random weights; see :meth:`config`."""
        return cls(copy.deepcopy(config["arguments"]), origin=config.get("origin"))

    def train(self, mode: bool = True) -> CHGNetBackbone:
        """Set the mode; batch normalisation always uses the vendor's stored statistics.

        With statistics of the batch, the energy of a structure would depend on its neighbours in the
        batch.
        """
        super().train(mode)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self

    # ---- graphs --------------------------------------------------------------------------
    def graph(self, atoms: Atoms) -> dict[str, Tensor]:
        """The vendor's graph of one structure.

        Keys as in :func:`edges.collate`, and ``edge_vec_single`` (e, 3), the vendor's rounded vectors,
        ``bond_of_edge`` (e,), ``edge_of_bond`` (b,), ``angle`` (a, 5) with columns atom, bond, edge,
        other bond, other edge.
        """
        from pymatgen.io.ase import AseAtomsAdaptor

        self.check(atoms)
        periodic = edges.boxed(atoms, 3 * self.cutoff)
        converter: Any = self.model.graph_converter
        with quiet():
            graph = converter(AseAtomsAdaptor.get_structure(periodic))
        edge_index = graph.atom_graph.reshape(-1, 2).to(torch.int64).t().contiguous()
        position = torch.tensor(periodic.positions, dtype=torch.float64)
        lattice = torch.tensor(periodic.cell.array, dtype=torch.float64)
        image = graph.neighbor_image.reshape(-1, 3).to(torch.float64)
        return {
            "edge_index": edge_index,
            "edge_vec": position[edge_index[1]] - position[edge_index[0]] + image @ lattice,
            "edge_vec_single": vendor.single_precision_edges(graph, edge_index),
            "bond_of_edge": graph.directed2undirected.to(torch.int64),
            "edge_of_bond": graph.undirected2directed.to(torch.int64),
            "angle": graph.bond_graph.reshape(-1, 5).to(torch.int64),
            **edges.scalars(atoms),
        }

    def collate(self, atoms: Sequence[Atoms], graphs: Sequence[dict[str, Tensor]]) -> Batch:
        """Batch graphs: atoms, edges, bonds and angles are concatenated, structure after structure."""
        batch = edges.collate(atoms, graphs)
        n_bonds = torch.tensor([g["edge_of_bond"].numel() for g in graphs])
        n_edges = torch.tensor([g["bond_of_edge"].numel() for g in graphs])
        n_angles = torch.tensor([g["angle"].shape[0] for g in graphs])
        first = list(zip(*(edges.starts(n) for n in (batch.n_atoms, n_bonds, n_edges)), strict=True))
        pairs = list(zip(graphs, first, strict=True))
        shift = torch.tensor([[atom, bond, edge, bond, edge] for atom, bond, edge in first])
        index = torch.arange(len(atoms))
        batch.graph |= {
            "edge_vec_single": torch.cat([g["edge_vec_single"] for g in graphs]),
            "bond_of_edge": torch.cat([g["bond_of_edge"] + bond for g, (_, bond, _) in pairs]),
            "edge_of_bond": torch.cat([g["edge_of_bond"] + edge for g, (_, _, edge) in pairs]),
            "angle": torch.cat([g["angle"] + s for g, s in zip(graphs, shift, strict=True)]),
            "has_angles": n_angles > 0,
        }
        batch.rows |= {
            "bond": torch.repeat_interleave(index, n_bonds),
            "angle": torch.repeat_interleave(index, n_angles),
        }
        return batch

    # ---- evaluation ----------------------------------------------------------------------
    def energy_of(self, batch: Batch, *, leaves: bool = True) -> Evaluation:
        """Energies; the leaf is ``edge_vec`` (e, 3)."""
        key = "edge_vec" if self.dtype == torch.float64 else "edge_vec_single"
        edge_vec = batch.graph[key].to(self.dtype).detach().clone().requires_grad_(leaves)
        features = vendor.atom_features(self.model, batch, edge_vec)
        model: Any = self.model
        node_energy = model.mlp(features).squeeze(1) + vendor.references(model, batch)
        energy = sum_rows(node_energy, batch.structure, batch.n_structures)
        return Evaluation(node_energy, energy, (edge_vec,) if leaves else (), features)

    def assemble(self, batch: Batch, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Forces and stress from ``dE/d(edge_vec)`` (e, 3)."""
        (pull,) = grads
        return edges.forces(batch, pull), edges.voigt(edges.stress(batch, pull))

    def row_kind(self, module_name: str) -> str:
        """``atom``, ``edge``, ``bond`` or ``angle``; see the module's text."""
        block, _, rest = module_name.partition(".")
        if block.startswith(("bond_embedding", "bond_weights")):
            return "bond"
        if block.startswith("angle"):
            return "angle"
        inside = rest.partition(".")[2]
        if block == "atom_conv_layers":
            return "edge" if inside.startswith("twoBody_atom") else "atom"
        if block == "bond_conv_layers":
            return "angle" if inside.startswith("twoBody_bond") else "bond"
        return "atom"

    def stock_calculator(self) -> Any:
        """The vendor's calculator around a copy of the model.

        Structures that are not periodic go to it in a box, without which it raises an error. In
        float64 the vendor's own layers are fed graphs in float64.

        Raises:
            RuntimeError: the model has been converted already.
        """
        if parameter_names(self.model) != self._stock_names:
            raise RuntimeError("the stock calculator must be made before the model is converted")
        with quiet():
            return vendor.calculator(copy.deepcopy(self.model), self.device, 3 * self.cutoff)

    # ---- export --------------------------------------------------------------------------
    def write_native(self, path: Path, shift: Mapping[int, float]) -> None:
        """A file that ``CHGNet.from_file`` reads, in float32."""
        torch.save(vendor.checkpoint_of(self.arguments, self.model, shift), path)

    def open_native(self, path: Path, *, as_used: bool = False) -> Any:
        """``CHGNetCalculator`` on the file, in float64 or in float32, the vendor's only precision."""
        dtype = torch.float32 if as_used else torch.float64
        return vendor.open_native(path, self.device, 3 * self.cutoff, dtype)
