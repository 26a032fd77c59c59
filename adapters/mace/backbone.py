"""MACE (package ``mace-torch``): equivariant potentials with products of many neighbours.

The vendor's own ``forward`` computes the energy. It takes edge vectors as positions' differences
plus ``shifts``; here all atoms are put at the origin and the shifts are the edge vectors, which are
then the leaves of the gradient, in the convention of :mod:`blip_ft.backbones.edges`. Node energies are added
in float64, as the vendor does for its own node energies: totals of many atoms lose digits in a
float32 sum.
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

from blip_ft.adapters.mace import vendor
from blip_ft.adapters.mace.layers import VariationalContraction
from blip_ft.adapters.shared.activations import smooth
from blip_ft.adapters.shared.files import open_file
from blip_ft.adapters.shared.graphs import rearrange
from blip_ft.adapters.shared.vendor import parameter_names, quiet, refuse_options
from blip_ft.backbones import edges
from blip_ft.backbones.conservative import ConservativeBackbone, Evaluation, sum_rows
from blip_ft.backbones.protocol import Batch
from blip_ft.errors import CheckpointError
from blip_ft.variational.layers import VariationalLayer

_RADIAL = r"interactions\.\d+\.(conv_tp_weights|density_fn)\.(layer|net\.)\d+"
_READOUT = r"readouts\.\d+\.linear(_1|_mid|_2)?"
_EMBEDDING = r"node_embedding\.linear|interactions\.\d+\.(source|target)_embedding"
_BODY = (
    r"interactions\.\d+\.(linear(_up|_down|_res|_1|_2)?|skip_(tp|linear))|"
    r"products\.\d+\.(linear|symmetric_contractions\.contractions\.\d+)"
)


class MACEBackbone(ConservativeBackbone):
    """A MACE model.

    Args:
        architecture: the vendor's constructor arguments (:func:`~blip_ft.adapters.mace.vendor.describe`).
        head: name of the head of a multi-head model; the only one of others if ``None``.
        model: the vendor's model; built with random weights if not given.
        origin: where the weights came from.

    Raises:
        RecipeError: head missing or unknown; lists the valid ones.
    """

    name: ClassVar[str] = "mace"
    packages: ClassVar[tuple[str, ...]] = ("mace-torch", "e3nn", "torch")
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "all": (rf"{_EMBEDDING}|{_BODY}|{_RADIAL}|{_READOUT}",),
        "scalar": (rf"{_EMBEDDING}|{_RADIAL}|{_READOUT}",),
        "readout": (_READOUT,),
        "radial": (_RADIAL,),
    }
    keep: ClassVar[Mapping[str, str]] = {
        r"interactions\.\d+": "two constants of the density's normalisation, not a linear map",
    }
    native_suffix: ClassVar[str] = ".model"
    native_call: ClassVar[str] = "MACECalculator('{file}', head='{head}')"

    def __init__(
        self,
        architecture: dict[str, Any],
        *,
        head: str | None = None,
        model: nn.Module | None = None,
        origin: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.heads: list[str] = list(architecture["heads"])
        self._head = vendor.check_head(head, self.heads)
        self.origin = dict(origin or {})
        self.model = vendor.build(architecture) if model is None else model
        self.cutoff = float(architecture["r_max"])
        self.numbers = [int(z) for z in architecture["atomic_numbers"]]
        self.elements = frozenset(self.numbers)
        index = torch.full((max(self.numbers) + 1,), -1)
        index[torch.tensor(self.numbers)] = torch.arange(len(self.numbers))
        self.register_buffer("_index", index, persistent=False)
        self.register_buffer("_scalars", torch.tensor(vendor.scalar_columns(self.model)), persistent=False)
        self._stock_names = parameter_names(self.model)

    @property
    def head(self) -> str:
        """Name of the head in use."""
        return self.heads[self._head]

    def choices(self) -> dict[str, Any]:
        """The head, of a model with several."""
        return {"head": self.head} if len(self.heads) > 1 else {}

    # ---- loading -------------------------------------------------------------------------
    @classmethod
    def load(
        cls, checkpoint: str, *, trust: bool = False, head: str | None = None, **options: Any
    ) -> MACEBackbone:
        """Load a MACE model.

        Args:
            checkpoint: a name such as ``small``, ``medium``, ``mpa-0``, ``mh-1`` or ``off23-small``,
                which the vendor's loader downloads once, or the path of a ``.model`` file.
            trust: open a file even if that can run code that it contains. Files of published models
                are known by their SHA-256 and need no trust.
            head: head of a multi-head model.
            options: none are known.

        Raises:
            CheckpointError: missing, damaged or untrusted file, unknown name, failed download, or a
                model without energies.
            RecipeError: unknown option; head missing or unknown.
        """
        refuse_options(options, cls.name, known=("head",))
        vendor.import_mace()
        path = vendor.find(checkpoint)
        with vendor.contained():
            try:
                content, digest = open_file(path, trust=trust)
            except ImportError as error:
                raise CheckpointError(
                    f"was written with the package '{error.name}', which is not installed",
                    remedy=f"pip install {error.name}, or write the file again without it",
                    file=path,
                ) from error
        architecture, model = vendor.open_model(path, content)
        return cls(architecture, head=head, model=model, origin={"checkpoint": checkpoint, "sha256": digest})

    def config(self) -> dict[str, Any]:
        """Constructor arguments, head and origin, all JSON-serialisable."""
        return {
            "architecture": copy.deepcopy(self.architecture),
            "head": self.head,
            "origin": dict(self.origin),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MACEBackbone:
        """The same architecture with random weights; see :meth:`config`."""
        return cls(copy.deepcopy(config["architecture"]), head=config["head"], origin=config.get("origin"))

    # ---- graphs --------------------------------------------------------------------------
    def graph(self, atoms: Atoms) -> dict[str, Tensor]:
        """The vendor's edges of one structure in float64; keys as in :func:`edges.collate`."""
        from mace.data.neighborhood import get_neighborhood

        self.check(atoms)
        box = edges.boxed(atoms, 2 * self.cutoff)
        index, shifts, _, _ = get_neighborhood(
            box.positions, self.cutoff, pbc=(True, True, True), cell=box.cell.array.copy()
        )
        vector = box.positions[index[1]] - box.positions[index[0]] + shifts
        return {
            "edge_index": torch.as_tensor(index, dtype=torch.int64),
            "edge_vec": torch.as_tensor(vector, dtype=torch.float64).reshape(-1, 3),
            **edges.scalars(atoms),
        }

    def collate(self, atoms: Sequence[Atoms], graphs: Sequence[dict[str, Tensor]]) -> Batch:
        """Batch graphs: atoms and edges are concatenated, structure after structure."""
        return edges.collate(atoms, graphs)

    # ---- evaluation ----------------------------------------------------------------------
    def energy_of(self, batch: Batch, *, leaves: bool = True) -> Evaluation:
        """Energies; the leaf is ``edge_vec`` (e, 3)."""
        edge_vec = batch.graph["edge_vec"].to(self.dtype).detach().clone().requires_grad_(leaves)
        element = self._index[batch.numbers]  # type: ignore[index]
        data = vendor.inputs(
            element, len(self.numbers), batch.graph["edge_index"], edge_vec, batch.n_atoms, self._head
        )
        out = self.model(data, compute_force=False)
        node_energy = out["node_energy"].double()
        energy = sum_rows(node_energy, batch.structure, batch.n_structures)
        features = out["node_feats"][:, self._scalars]
        return Evaluation(node_energy, energy, (edge_vec,) if leaves else (), features)

    def assemble(self, batch: Batch, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Forces and stress from ``dE/d(edge_vec)`` (e, 3)."""
        (pull,) = grads
        return edges.forces(batch, pull), edges.voigt(edges.stress(batch, pull))

    # ---- conversion ----------------------------------------------------------------------
    def row_kind(self, module_name: str) -> str:
        """``edge`` inside the radial networks, ``atom`` everywhere else."""
        return "edge" if re.search(r"\.(conv_tp_weights|density_fn)(\.|$)", module_name) else "atom"

    def layer_type(self, name: str, module: nn.Module) -> type[VariationalLayer] | str:
        """The vendor's symmetric contractions, and the general rule for everything else."""
        if type(module).__name__ != "Contraction":
            return super().layer_type(name, module)
        if VariationalContraction.parameters_of(module):
            return VariationalContraction
        return "all its paths vanish by symmetry"

    def stock_calculator(self) -> Any:
        """The vendor's calculator around a copy of the model.

        Raises:
            RuntimeError: the model has been converted already.
        """
        if parameter_names(self.model) != self._stock_names:
            raise RuntimeError("the stock calculator must be made before the model is converted")
        dtype = str(self.dtype).removeprefix("torch.")
        return vendor.calculator(self.head, self.device, dtype, models=[copy.deepcopy(self.model)])

    def rearrange(self) -> None:
        """Activations, what e3nn's own code does, and the product with the sum over neighbours in one."""
        rearrange(self.model)
        smooth(self.model)
        vendor.fuse(self.model)

    # ---- export --------------------------------------------------------------------------
    def write_native(self, path: Path, shift: Mapping[int, float]) -> None:
        """A whole module as the vendor's training writes it, with TorchScript kernels and the head in use alone."""
        model = vendor.build(self.architecture, stock=True).to(self.dtype)
        model.load_state_dict(self.model.state_dict())
        table: Any = model.atomic_energies_fn.atomic_energies  # type: ignore[union-attr]
        with torch.no_grad():
            for number, energy in shift.items():
                torch.atleast_2d(table)[self._head, self.numbers.index(number)] += energy
        if len(self.heads) > 1:
            model = vendor.of_one_head(model, self.head)
        with quiet():
            torch.save(model, path)

    def open_native(self, path: Path, *, as_used: bool = False) -> Any:
        """``MACECalculator`` on the file, in float64 or in the precision of the file, the vendor's default."""
        dtype = str(self.dtype).removeprefix("torch.") if as_used else "float64"
        return vendor.calculator(self.head, self.device, dtype, model_paths=str(path))
