"""Orb (package ``orb-models``): graph networks that learn rotations instead of building them in.

Two kinds: *conservative* models, whose forces and stress are gradients of the energy, and *direct*
ones, which predict the three by heads of their own. Neither is exactly equivariant.

The energy is not a sum over atoms: a network reads the *mean* of the atoms' features, and the result
is multiplied by their number. There are therefore no atomic energies, and the energy of two distant
molecules is not the sum of theirs unless they are alike. In conservative models the repulsion of
close pairs is averaged over atoms, too. Both are the vendor's.

Rows are ``atom``, ``edge`` and ``structure`` (heads that read means). Edges follow the convention of
:mod:`blip_ft.backbones.edges`, with the vendor's sender in the role of the receiving atom.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from ase import Atoms
from torch import Tensor, nn

from blip_ft.adapters.orb import vendor
from blip_ft.adapters.shared.files import open_file
from blip_ft.adapters.shared.vendor import import_backend, parameter_names, quiet, refuse_options
from blip_ft.backbones import edges, electrons
from blip_ft.backbones.conservative import ConservativeBackbone, Evaluation
from blip_ft.backbones.protocol import Backbone, Batch, Prediction
from blip_ft.errors import RecipeError
from blip_ft.variational.layers import VariationalLayer, layer_type

_EDGES = r"model\._encoder\._edge_fn\.mlp\.NN-\d+"
#: reads products of radial functions and spherical harmonics
_DIRECTIONS = "model._encoder._edge_fn.mlp.NN-0"
_BODY = (
    r"model\._encoder\._(node|edge)_fn\.mlp\.NN-\d+"
    r"|model\.gnn_stacks\.\d+\.(_(node|edge)_mlp\.mlp\.NN-\d+|_(receive|send)_attn|_cond_(node|edge)_proj)"
)
_READOUT = r"heads\.(energy|forces|stress)\.mlp\.NN-\d+"


class OrbBackbone(Backbone):
    """An Orb model: what conservative and direct ones share. :meth:`load` returns one of the two.

    Args:
        architecture: the vendor's name of the model whose architecture this is.
        sizes: arguments of the vendor's architecture function.
        electrons: ``charge`` (e) and ``spin`` (multiplicity) of structures that do not bring their own
            in ``atoms.info``; models that are conditioned on them only.
        model: the vendor's model; built with random weights if not given.
        origin: where the weights came from.
    """

    name: ClassVar[str] = "orb"
    packages: ClassVar[tuple[str, ...]] = ("orb-models", "torch")
    equivariant: ClassVar[bool] = False
    native_suffix: ClassVar[str] = ".ckpt"
    native_call: ClassVar[str] = (
        "structures with atoms.info['charge'] = {charge} and atoms.info['spin'] = {spin}"
    )
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "all": (rf"({_BODY}|{_READOUT})",),
        "scalar": (rf"(?!{re.escape(_DIRECTIONS)})({_BODY}|{_READOUT})",),
        "readout": (_READOUT,),
        "radial": (_EDGES,),
    }
    keep: ClassVar[Mapping[str, str]] = {
        r"heads\.energy\.reference(\..*)?": "energy reference of each element: the reference shift handles it",
        r"heads\.confidence(\..*)?": "the vendor's confidence: no part in energy, forces or stress",
        r"model\._decoder(\..*)?": "left over from pretraining: no part in energy, forces or stress",
        r"model\.conditioner(\..*)?": "embedding of charge and spin, not a linear layer",
    }

    def __init__(
        self,
        architecture: str,
        sizes: Mapping[str, int],
        *,
        electrons: Mapping[str, float] | None = None,
        model: nn.Module | None = None,
        origin: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.architecture, self.sizes = architecture, dict(sizes)
        self.electrons = dict(electrons or {})
        self.origin = dict(origin or {})
        self.model = vendor.build(architecture, sizes) if model is None else model
        self.kind = vendor.architectures()[architecture]
        self.has_stress = self.kind.has_stress
        self.cutoff = vendor.RADIUS
        self.elements = frozenset(range(1, vendor.N_ELEMENTS + 1))
        self._stock_names = parameter_names(self.model)

    def choices(self) -> dict[str, Any]:
        """Charge and spin, of a model that is conditioned on them."""
        return {key: self.electrons.get(key) for key in ("charge", "spin")} if self.kind.charged else {}

    # ---- loading -------------------------------------------------------------------------
    @classmethod
    def load(
        cls,
        checkpoint: str,
        *,
        trust: bool = False,
        architecture: str | None = None,
        charge: float | None = None,
        spin: float | None = None,
        **options: Any,
    ) -> OrbBackbone:
        """Load an Orb model.

        Args:
            checkpoint: a name such as ``orb-v3-conservative-inf-omat``, which the vendor's loader
                downloads, or the path of a state dict (``.ckpt``).
            trust: open a file even if that can run code that it contains.
            architecture: the name of the model that a file is, or is fine-tuned from; its sizes are
                read from the file.
            charge: total charge (e) of all structures that have none in ``atoms.info``; models that
                are conditioned on it (``omol``) only.
            spin: spin multiplicity, likewise.
            options: none are known.

        Raises:
            CheckpointError: missing, damaged or untrusted file, unknown name, or no download.
            RecipeError: unknown option; architecture missing or unknown; charge for a model without.
        """
        refuse_options(options, cls.name, known=("architecture", "charge", "spin"))
        import_backend(cls.name, "orb_models")
        path, architecture = vendor.find(checkpoint, architecture)
        electrons = {k: float(v) for k, v in {"charge": charge, "spin": spin}.items() if v is not None}
        kind = vendor.architectures()[architecture]
        if electrons and not kind.charged:
            raise RecipeError(
                f"'{architecture}' knows neither charge nor spin",
                remedy="leave them out, or use an 'omol' model",
                field=f"model.options.{next(iter(electrons))}",
            )
        content, digest = open_file(path, trust=trust)
        sizes, model = vendor.open_checkpoint(path, content, architecture)
        return _class_of(kind)(
            architecture,
            sizes,
            electrons=electrons,
            model=model,
            origin={"checkpoint": checkpoint, "sha256": digest},
        )

    def config(self) -> dict[str, Any]:
        """Architecture, sizes, charge and spin, and origin, all JSON-serialisable."""
        return {
            "architecture": self.architecture,
            "sizes": dict(self.sizes),
            "electrons": dict(self.electrons),
            "origin": dict(self.origin),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> OrbBackbone:
        """The same architecture with random weights; see :meth:`config`."""
        import_backend(cls.name, "orb_models")
        kind = vendor.architecture_of(config["architecture"])
        return _class_of(kind)(
            config["architecture"],
            config["sizes"],
            electrons=config.get("electrons"),
            origin=config.get("origin"),
        )

    # ---- graphs --------------------------------------------------------------------------
    @property
    def conditions(self) -> Mapping[str, float | None]:
        """Charge and spin in ``omol`` models, with the values that the options gave."""
        return {key: self.electrons.get(key) for key in electrons.KEYS} if self.kind.charged else {}

    def graph(self, atoms: Atoms) -> dict[str, Tensor]:
        """The vendor's edges of one structure in float64.

        Keys as in :func:`edges.collate`, and ``positions`` (n, 3), ``cell`` (3, 3), and for models
        conditioned on them ``total_charge`` () and ``total_spin`` ().

        Raises:
            DataError: charge or spin are needed and neither the structure nor the options have them, or they
                are no numbers.
        """
        self.check(atoms)
        # The vendor has no slabs and wires: they go into a box. Free molecules stay as they are.
        frame = edges.boxed(atoms, 2 * self.cutoff) if atoms.pbc.any() else edges.bare(atoms)
        edge_index, edge_vec = vendor.radius_graph(frame, self.kind.max_neighbors)
        graph = {
            "edge_index": edge_index,
            "edge_vec": edge_vec,
            "positions": torch.tensor(frame.positions, dtype=torch.float64),
            "cell": torch.tensor(frame.cell.array, dtype=torch.float64),
            **edges.scalars(atoms),
        }
        if self.kind.charged:
            known = self.electrons | electrons.given(atoms.info)
            for key in electrons.KEYS:
                graph[f"total_{key}"] = torch.tensor(known[key], dtype=torch.float64)
        return graph

    def collate(self, atoms: Sequence[Atoms], graphs: Sequence[dict[str, Tensor]]) -> Batch:
        """Batch graphs: atoms and edges are concatenated, structure after structure."""
        batch = edges.collate(atoms, graphs)
        batch.graph["positions"] = torch.cat([g["positions"] for g in graphs])
        for key in ("cell", *(("total_charge", "total_spin") if self.kind.charged else ())):
            batch.graph[key] = torch.stack([g[key] for g in graphs])
        batch.rows["structure"] = torch.arange(len(atoms))
        return batch

    # ---- modules -------------------------------------------------------------------------
    def row_kind(self, module_name: str) -> str:
        """``structure`` in heads that read means, ``edge`` where edges are updated, else ``atom``."""
        if module_name.startswith(("heads.energy.", "heads.stress.")):
            return "structure"
        edge = r"(_edge_fn|_edge_mlp|_receive_attn|_send_attn|_cond_edge_proj)"
        return "edge" if re.search(rf"\.{edge}(\.|$)", module_name) else "atom"

    def layer_type(self, name: str, module: nn.Module) -> type[VariationalLayer] | str:
        """As for any linear layer, but the first one on edges sees directions."""
        return vendor.VariationalDirectionalLinear if name == _DIRECTIONS else layer_type(module)

    def stock_calculator(self) -> Any:
        """The vendor's calculator around a copy of the model; in float64 on graphs in float64.

        Raises:
            RuntimeError: the model has been converted already.
        """
        if parameter_names(self.model) != self._stock_names:
            raise RuntimeError("the stock calculator must be made before the model is converted")
        with quiet():
            return vendor.calculator(copy.deepcopy(self.model), self.device, self.electrons)

    # ---- export --------------------------------------------------------------------------
    def write_native(self, path: Path, shift: Mapping[int, float]) -> None:
        """A state dict; the shift goes into the vendor's reference energies."""
        vendor.write(self.model, path, shift)

    def open_native(self, path: Path, *, as_used: bool = False) -> Any:
        """The vendor's calculator on a state dict, in float64 or in float32, the vendor's default."""
        dtype = torch.float32 if as_used else torch.float64
        model = vendor.read_back(path, self.architecture, self.sizes, dtype)
        with quiet():
            return vendor.calculator(model, torch.device("cpu"), self.electrons)


class ConservativeOrb(OrbBackbone, ConservativeBackbone):
    """A model whose forces and stress are derivatives of its energy."""

    def forward(
        self, batch: Batch, *, forces: bool = True, stress: bool = True, create_graph: bool = False
    ) -> Prediction:
        """Evaluate a batch; no stress where the vendor's model has none."""
        stress = stress and self.has_stress
        return ConservativeBackbone.forward(
            self, batch, forces=forces, stress=stress, create_graph=create_graph
        )

    def energy_of(self, batch: Batch, *, leaves: bool = True) -> Evaluation:
        """Energies; the leaf is ``edge_vec`` (e, 3)."""
        edge_vec = batch.graph["edge_vec"].to(self.dtype).detach().clone().requires_grad_(leaves)
        graphs = vendor.atom_graphs(batch, edge_vec, self.kind.max_neighbors)
        model: Any = self.model
        with vendor.precision(self.dtype):
            features = model.model(graphs)["node_features"]
            energy = model.heads["energy"].predict(features, graphs).reshape(-1)
            if model.pair_repulsion:
                energy = energy + model.pair_repulsion_fn(graphs)["energy"]
        return Evaluation(None, energy, (edge_vec,) if leaves else (), features)

    def assemble(self, batch: Batch, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Forces and stress from ``dE/d(edge_vec)`` (e, 3)."""
        (pull,) = grads
        return edges.forces(batch, pull), edges.voigt(edges.stress(batch, pull))


class DirectOrb(OrbBackbone):
    """A model with heads for energy, forces and (most of them) stress."""

    conservative = False

    def forward(
        self, batch: Batch, *, forces: bool = True, stress: bool = True, create_graph: bool = False
    ) -> Prediction:
        """Evaluate a batch; see :meth:`blip_ft.backbones.protocol.Backbone.forward`.

        Forces and stress are outputs like the energy; with ``create_graph`` they carry a graph to the
        weights, as those of a conservative model do.
        """
        edge_vec = batch.graph["edge_vec"].to(self.dtype)
        graphs = vendor.atom_graphs(batch, edge_vec, self.kind.max_neighbors)
        wanted = {"energy": True, "forces": forces, "stress": stress and self.has_stress}
        model: Any = self.model
        out: dict[str, Tensor] = {}
        with vendor.precision(self.dtype):
            features = model.model(graphs)["node_features"]
            repulsion = model.pair_repulsion_fn(graphs) if model.pair_repulsion else {}
            for key in (k for k, w in wanted.items() if w):
                value = model.heads[key].predict(features, graphs)
                value = value + repulsion[key] if repulsion else value
                out[key] = value if create_graph or key == "energy" else value.detach()
        if "stress" in out:
            open_cells = ~batch.graph["periodic"].unsqueeze(1)
            out["stress"] = out["stress"].reshape(-1, 6).masked_fill(open_cells, torch.nan)
        return Prediction(
            energy=out["energy"].reshape(-1),
            forces=out.get("forces"),
            stress=out.get("stress"),
            node_features=features,
        )


def _class_of(kind: vendor.Architecture) -> type[OrbBackbone]:
    return ConservativeOrb if kind.conservative else DirectOrb
