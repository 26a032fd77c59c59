"""SevenNet (package ``sevenn``): NequIP-style equivariant potentials.

The vendor's modules are run one after the other on a plain dictionary of tensors, those on irreps by
``_sevennet_network``; only its last module, which differentiates the energy, is replaced, because it
ties ``create_graph`` to the module's train mode. :meth:`SevenNetBackbone.assemble` does the same
arithmetic (``sevenn.nn.force_output.ForceStressOutputFromEdge``).

Edges follow the convention of :mod:`blip_ft.backbones.edges`, but each pair of neighbours has one only: the
network uses it in both directions.
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

from blip_ft.adapters.sevennet import vendor
from blip_ft.adapters.sevennet.network import Network
from blip_ft.adapters.shared.activations import smooth
from blip_ft.adapters.shared.convolution import Pairs
from blip_ft.adapters.shared.files import open_file
from blip_ft.adapters.shared.graphs import rearrange
from blip_ft.adapters.shared.vendor import import_backend, parameter_names, quiet, refuse_options
from blip_ft.backbones import edges
from blip_ft.backbones.conservative import ConservativeBackbone, Evaluation, sum_rows
from blip_ft.backbones.protocol import Batch
from blip_ft.variational.e3nn_layers import VariationalInnerLinear, VariationalIrrepsLinear
from blip_ft.variational.layers import VariationalLayer

_RADIAL = r"\d+_convolution\.weight_nn\.layer\d+"
_READOUT = r"reduce_\w+\.linear|readout_FCN\.fcn\.layer\d+"
_BODY = (
    r"onehot_to_feature_x\.linear|\d+_self_(connection_intro|interaction_[12])\.linear|"
    r"\d+_self_connection_intro\.fc_tensor_product"
)


class SevenNetBackbone(ConservativeBackbone):
    """A SevenNet model.

    Args:
        architecture: the vendor's configuration, reduced to what its model is built from.
        modal: modality (level of theory) of a multi-fidelity model; ``None`` for the others.
        model: the vendor's model; built with random weights if not given.
        origin: where the weights came from.
    """

    name: ClassVar[str] = "sevennet"
    packages: ClassVar[tuple[str, ...]] = ("sevenn", "e3nn", "torch")
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "all": (rf"({_BODY}|{_RADIAL}|{_READOUT})",),
        "scalar": (rf"({_RADIAL}|{_READOUT})",),
        "readout": (rf"({_READOUT})",),
        "radial": (rf"({_RADIAL})",),
    }
    keep: ClassVar[Mapping[str, str]] = {
        r"rescale_atomic_energy": "energy reference of each element: the reference shift handles it",
        r"\d+_convolution": "mean number of neighbours: a fixed divisor, not a weight",
    }

    native_suffix: ClassVar[str] = ".pth"
    native_dtype: ClassVar[str] = "float32"
    native_call: ClassVar[str] = "SevenNetCalculator('{file}', modal='{modal}')"

    def __init__(
        self,
        architecture: dict[str, Any],
        *,
        modal: str | None = None,
        model: nn.Module | None = None,
        origin: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.modal = modal
        self.origin = dict(origin or {})
        self.model = vendor.build(architecture) if model is None else model
        vendor.register_coefficients(self.model)
        self._network = Network(self.model)
        self.cutoff = float(architecture["cutoff"])
        self.elements = frozenset(architecture["_type_map"])
        modal_map = architecture.get("_modal_map") or {}
        self._modal_index = modal_map[modal] if modal_map else None
        self._stock_names = parameter_names(self.model)

    def choices(self) -> dict[str, Any]:
        """The modality of a multi-fidelity model."""
        return {} if self.modal is None else {"modal": self.modal}

    # ---- loading -------------------------------------------------------------------------
    @classmethod
    def load(
        cls, checkpoint: str, *, trust: bool = False, modal: str | None = None, **options: Any
    ) -> SevenNetBackbone:
        """Load a SevenNet model.

        Args:
            checkpoint: a name such as ``7net-0``, ``7net-0_22may2024``, ``7net-l3i5`` or ``7net-mf-0``
                (shipped in the vendor's wheel) or of a release that the vendor's loader downloads, or
                the path of a ``.pth`` file.
            trust: open a file even if that can run code that it contains.
            modal: modality of a multi-fidelity model.
            options: none are known.

        Raises:
            CheckpointError: missing, damaged or untrusted file, or unknown name.
            RecipeError: unknown option; modality missing or unknown.
        """
        refuse_options(options, cls.name, known=("modal",))
        import_backend(cls.name, "sevenn")
        path = vendor.find(checkpoint)
        content, digest = open_file(path, trust=trust)
        architecture, model = vendor.open_checkpoint(path, content)
        return cls(
            architecture,
            modal=vendor.check_modal(modal, architecture.get("_modal_map") or {}),
            model=model,
            origin={"checkpoint": checkpoint, "sha256": digest},
        )

    def config(self) -> dict[str, Any]:
        """Architecture, modality and origin, all JSON-serialisable."""
        architecture = copy.deepcopy(self.architecture)
        architecture["_type_map"] = {str(z): i for z, i in architecture["_type_map"].items()}
        return {"architecture": architecture, "modal": self.modal, "origin": dict(self.origin)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SevenNetBackbone:
        """The same architecture with random weights; see :meth:`config`."""
        architecture = copy.deepcopy(config["architecture"])
        architecture["_type_map"] = {int(z): i for z, i in architecture["_type_map"].items()}
        return cls(architecture, modal=config.get("modal"), origin=config.get("origin"))

    # ---- graphs --------------------------------------------------------------------------
    def graph(self, atoms: Atoms) -> dict[str, Tensor]:
        """The vendor's edges of one structure, one for each pair, in float64; keys as in :func:`edges.collate`."""
        from sevenn.train.dataload import unlabeled_atoms_to_graph

        self.check(atoms)
        # In a box, since the vendor's own extension of open directions can make a cell singular.
        boxed = edges.boxed(atoms, 2 * self.cutoff)
        data = unlabeled_atoms_to_graph(boxed, self.cutoff, with_shift=True)
        index = torch.as_tensor(data["edge_index"], dtype=torch.int64).reshape(2, -1)
        once = edges.one_direction(index, torch.as_tensor(data["pbc_shift"]).reshape(-1, 3))
        return {
            "edge_index": index[:, once],
            "edge_vec": torch.as_tensor(data["edge_vec"], dtype=torch.float64).reshape(-1, 3)[once],
            **edges.scalars(atoms),
        }

    def collate(self, atoms: Sequence[Atoms], graphs: Sequence[dict[str, Tensor]]) -> Batch:
        """Batch graphs: atoms and edges are concatenated, structure after structure."""
        return edges.collate(atoms, graphs)

    # ---- evaluation ----------------------------------------------------------------------
    def energy_of(self, batch: Batch, *, leaves: bool = True) -> Evaluation:
        """Energies; the leaf is ``edge_vec`` (e, 3)."""
        dtype = self.dtype
        edge_vec = batch.graph["edge_vec"].to(dtype).detach().clone().requires_grad_(leaves)
        model: Any = self.model
        data: dict[str, Tensor] = {
            "edge_vec": edge_vec,
            "edge_index": batch.graph["edge_index"],
            "batch": batch.structure,
            "num_atoms": batch.n_atoms,
            "atomic_numbers": batch.numbers,
            "x": model._atomic_numbers_to_onehot(batch.numbers),
        }
        receiver, sender = batch.graph["edge_index"]
        pairs = Pairs.of(sender, receiver, torch.bincount(batch.rows["edge"]).tolist())
        if self._modal_index is not None:
            data["modal_type"] = torch.full_like(batch.n_atoms, self._modal_index)
        features = None
        for key, module in model.named_children():
            if key in ("reduce_input_to_hidden", "readout_FCN"):
                features = data["x"][:, vendor.scalar_columns(module, data["x"].device)]
            elif key == "rescale_atomic_energy":
                node_energy = module(data)["atomic_energy"].squeeze(1)
                break
            data = self._network(key, module, data, pairs)
            if key == "onehot_idx_to_onehot":
                # The vendor makes this embedding float32 whatever the type of the weights.
                data["x"], data["node_attr"] = data["x"].to(dtype), data["node_attr"].to(dtype)
        energy = sum_rows(node_energy, batch.structure, batch.n_structures)
        return Evaluation(node_energy, energy, (edge_vec,) if leaves else (), features)

    def assemble(self, batch: Batch, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Forces and stress from ``dE/d(edge_vec)`` (e, 3), in the vendor's arithmetic."""
        (pull,) = grads
        rows, columns = (0, 1, 2, 1, 2, 0), (0, 1, 2, 2, 0, 1)  # the vendor's choice of xx yy zz yz zx xy
        return edges.forces(batch, pull), edges.stress(batch, pull)[:, rows, columns]

    def row_kind(self, module_name: str) -> str:
        """``edge``, a pair of neighbours, inside the radial networks, ``atom`` everywhere else."""
        return "edge" if re.search(r"_convolution\.weight_nn(\.|$)", module_name) else "atom"

    def layer_type(self, name: str, module: nn.Module) -> type[VariationalLayer] | str:
        """As for all e3nn models, with features in inner order."""
        kind = super().layer_type(name, module)
        return VariationalInnerLinear if kind is VariationalIrrepsLinear else kind

    def stock_calculator(self) -> Any:
        """The vendor's calculator around a copy of the model; in float64 the same on float64 graphs.

        Raises:
            RuntimeError: the model has been converted already.
        """
        if parameter_names(self.model) != self._stock_names:
            raise RuntimeError("the stock calculator must be made before the model is converted")
        with quiet():
            return vendor.calculator(copy.deepcopy(self.model), self.modal, self.device)

    def rearrange(self) -> None:
        """Activations, and what e3nn's own code still does, in forms that are cheap to differentiate."""
        rearrange(self.model)
        smooth(self.model)

    # ---- export --------------------------------------------------------------------------
    def write_native(self, path: Path, shift: Mapping[int, float]) -> None:
        """A checkpoint as the vendor's training writes it, in float32."""
        torch.save(vendor.checkpoint_of(self.architecture, self.model, self.modal, shift), path)

    def open_native(self, path: Path, *, as_used: bool = False) -> Any:
        """``SevenNetCalculator`` on the file, in float64 or in float32, the vendor's only precision."""
        dtype = torch.float32 if as_used else torch.float64
        return vendor.open_native(path, self.modal, self.device, dtype)
