"""DIEP (package ``diep`` 2): an invariant graph network on bonds and triplets, described on grids.

The vendor's layers run on descriptors of our own (``descriptors.py``), with the vectors of the directed edges as the
leaves of the gradient; the numbers are the vendor's. The vendor rounds to single precision inside, whatever the
weights, so nothing of it that does so is called.

Structures that are not periodic in all directions are put into a box with three cutoffs of vacuum; they have no stress.

Two kinds of rows appear: ``atom``, and ``edge``, a directed edge. No layer sees triplets: they are summed into edges
before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from ase import Atoms
from ase.data import atomic_numbers
from torch import Tensor, nn

from blip_ft.adapters.diep import vendor
from blip_ft.adapters.shared.files import open_file
from blip_ft.adapters.shared.vendor import import_backend, parameter_names, quiet, refuse_options
from blip_ft.backbones import edges
from blip_ft.backbones.conservative import ConservativeBackbone, Evaluation, sum_rows
from blip_ft.backbones.protocol import Batch
from blip_ft.errors import CheckpointError

_READOUT = r"model\.final_layer\..*"
_ALL = rf"model\.(embedding|three_body_interactions|graph_layers)\..*|{_READOUT}"


class DIEPBackbone(ConservativeBackbone):
    """A DIEP model.

    Args:
        arguments: constructor arguments of the vendor's model.
        references: whether the vendor's potential has energies of elements.
        origin: where the weights came from.
    """

    name: ClassVar[str] = "diep"
    packages: ClassVar[tuple[str, ...]] = ("diep", "torch-geometric", "torch")
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "all": (_ALL,),
        "scalar": (_ALL,),
        "readout": (_READOUT,),
    }
    native_suffix: ClassVar[str] = ".pt"
    native_dtype: ClassVar[str] = "float32"

    def __init__(
        self, arguments: dict[str, Any], *, references: bool = True, origin: dict[str, str] | None = None
    ) -> None:
        super().__init__()
        self.arguments, self.references = arguments, references
        self.origin = dict(origin or {})
        self.model = vendor.build(arguments, references=references)
        net: Any = self.model.model
        self.cutoff = float(net.cutoff)
        self._kinds = {atomic_numbers[symbol]: kind for kind, symbol in enumerate(net.element_types)}
        self.elements = frozenset(self._kinds)
        table = torch.full((max(self.elements) + 1,), -1)
        table[list(self._kinds)] = torch.tensor(list(self._kinds.values()))
        self.register_buffer("kind_of", table, persistent=False)
        self.kind_of: Tensor
        self._stock_names = parameter_names(self.model)

    # ---- loading -------------------------------------------------------------------------
    @classmethod
    def load(cls, checkpoint: str, *, trust: bool = False, **options: Any) -> DIEPBackbone:
        """Load a DIEP model.

        Args:
            checkpoint: ``fold1`` (shipped in the vendor's wheel), the path of a folder that ``diep.export`` or
                ``Potential.save`` has written, or of a state dict beside the ``model.pt`` of such a folder.
            trust: open files even if they can run code that they contain.
            options: none are known.

        Raises:
            CheckpointError: missing, damaged or untrusted file, unknown name, or a kind of model that this adapter
                does not know.
            RecipeError: unknown option.
        """
        refuse_options(options, cls.name)
        import_backend(cls.name, "diep")
        path = vendor.find(checkpoint)
        state, digest = open_file(path, trust=trust)
        beside = path.with_name(vendor.ARGUMENTS)
        content, _ = open_file(beside, trust=trust)
        arguments = vendor.arguments_of(beside, content)
        try:
            backbone = cls(
                arguments,
                references="element_refs.property_offset" in state,
                origin={"checkpoint": checkpoint, "sha256": digest},
            )
            backbone.model.load_state_dict(state)
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"holds no weights of the DIEP model that {beside} describes, with this version of diep",
                remedy="check the path; diep.export writes such files",
                file=path,
            ) from error
        return backbone

    def config(self) -> dict[str, Any]:
        """The vendor's constructor arguments and the origin, all JSON-serialisable."""
        return {
            "arguments": copy.deepcopy(self.arguments),
            "references": self.references,
            "origin": dict(self.origin),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DIEPBackbone:
        """The same architecture with random weights; see :meth:`config`."""
        arguments = copy.deepcopy(config["arguments"])
        return cls(arguments, references=config["references"], origin=config.get("origin"))

    # ---- graphs --------------------------------------------------------------------------
    def graph(self, atoms: Atoms) -> dict[str, Tensor]:
        """The vendor's graph of one structure; keys as in :func:`edges.collate` and :func:`vendor.bonds`."""
        self.check(atoms)
        return {
            **vendor.bonds(self.model.model, edges.boxed(atoms, 3 * self.cutoff)),
            **edges.scalars(atoms),
        }

    def collate(self, atoms: Sequence[Atoms], graphs: Sequence[dict[str, Tensor]]) -> Batch:
        """Batch graphs: atoms, edges and triplets are concatenated, structure after structure."""
        batch = edges.collate(atoms, graphs)
        first = edges.starts(torch.tensor([g["edge_vec"].shape[0] for g in graphs]))
        batch.graph |= {
            "triplet": torch.cat([g["triplet"] + n for g, n in zip(graphs, first, strict=True)], dim=1),
            **{key: torch.cat([g[key] for g in graphs]) for key in ("order", "shared")},
        }
        return batch

    # ---- evaluation ----------------------------------------------------------------------
    def energy_of(self, batch: Batch, *, leaves: bool = True) -> Evaluation:
        """Energies, summed in float64; the leaf is ``edge_vec`` (e, 3)."""
        edge_vec = batch.graph["edge_vec"].to(self.dtype).detach().clone().requires_grad_(leaves)
        model: Any = self.model
        kinds = self.kind_of[batch.numbers]
        energy, features = vendor.atom_energies(model, batch, kinds, edge_vec)
        mean = model.data_mean.double() / batch.n_atoms  # the vendor's, of a structure
        node_energy = energy.double() + mean[batch.structure]
        if self.references:
            node_energy = node_energy + model.element_refs.property_offset.double()[kinds]
        total = sum_rows(node_energy, batch.structure, batch.n_structures)
        return Evaluation(node_energy, total, (edge_vec,) if leaves else (), features)

    def assemble(self, batch: Batch, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Forces and stress from ``dE/d(edge_vec)`` (e, 3)."""
        (pull,) = grads
        return edges.forces(batch, pull), edges.voigt(edges.stress(batch, pull))

    def row_kind(self, module_name: str) -> str:
        """``atom`` or ``edge``; see the module's text."""
        return "atom" if "update_network_atom" in module_name or "final_layer" in module_name else "edge"

    def stock_calculator(self) -> Any:
        """The vendor's calculator around a copy of the model; structures that are not periodic go to it in a box.

        Raises:
            RuntimeError: the model has been converted already.
        """
        if parameter_names(self.model) != self._stock_names:
            raise RuntimeError("the stock calculator must be made before the model is converted")
        with quiet():
            return vendor.calculator(copy.deepcopy(self.model), 3 * self.cutoff)

    # ---- export --------------------------------------------------------------------------
    def write_native(self, path: Path, shift: Mapping[int, float]) -> None:
        """A state dict, in float32, for the place of ``state.pt`` in the folder of the model that was fine-tuned."""
        torch.save(vendor.state_of(self.model, self._kinds, shift), path)

    def open_native(self, path: Path, *, as_used: bool = False) -> Any:
        """``DIEPCalculator`` on a state dict, in float64 or in float32, the vendor's default."""
        like: nn.Module = vendor.build(self.arguments, references=self.references)
        dtype = torch.float32 if as_used else torch.float64
        return vendor.calculator(vendor.open_native(path, like, dtype), 3 * self.cutoff)
