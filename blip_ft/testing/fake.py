"""A tiny backbone for tests: a potential in pure torch that fulfils the whole protocol in milliseconds.

It is not trained on anything. It has what makes real backbones awkward: rows that are atoms and
rows that are edges, one linear layer that is used under two names, energy references that must
stay, and forces and stress that are derivatives of the energy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.neighborlist import primitive_neighbor_list
from torch import Tensor, nn

from blip_ft.backbones import edges, electrons
from blip_ft.backbones.conservative import ConservativeBackbone, Evaluation, sum_rows
from blip_ft.backbones.protocol import Batch
from blip_ft.errors import CheckpointError, RecipeError, nearest

#: width of the atoms' features, hidden width, number of radial functions; ``charged`` also sees charge and spin
_SIZES = {"tiny": (8, 16, 6), "charged": (8, 16, 6)}
_ELEMENTS = (1, 6, 7, 8, 14)
_CUTOFF = 4.0  # Å


class FakeModel(nn.Module):
    """One round of message passing on scalar features.

    Args:
        width: number of features per atom.
        hidden: width of the hidden layers.
        n_radial: number of radial functions.
        seed: of the weights.
        charged: add an embedding of charge and spin to every atom's features.
    """

    references: Tensor

    def __init__(
        self, width: int, hidden: int, n_radial: int, seed: int = 0, *, charged: bool = False
    ) -> None:
        super().__init__()
        self.embedding = nn.Linear(len(_ELEMENTS), width, bias=False)
        self.radial = nn.Sequential(nn.Linear(n_radial, hidden), nn.SiLU(), nn.Linear(hidden, width))
        self.update = nn.Linear(width, width)
        self.update_again = self.update  # tied on purpose
        self.readout = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        self.register_buffer("references", torch.zeros(len(_ELEMENTS)))
        self.register_buffer(
            "frequencies", math.pi / _CUTOFF * torch.arange(1, n_radial + 1), persistent=False
        )
        self.conditioner = nn.Linear(2, width, bias=False) if charged else None
        self.double()
        self._draw(seed)

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        """Weights from N(0, 1/fan-in) and references around -5 eV, a pure function of the seed."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 100
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise / math.sqrt(fan_in))
        self.references.copy_(torch.randn(len(_ELEMENTS), generator=generator, dtype=torch.float64) - 5.0)

    def forward(
        self, species: Tensor, edge_index: Tensor, distance: Tensor, electrons: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Energies and features of the atoms.

        Args:
            species: (n,) index into the known elements.
            edge_index: (2, e) receiving and sending atom of every edge.
            distance: (e,) Å.
            electrons: (n, 2) charge and spin of each atom's structure, for a model that sees them.

        Returns:
            (n,) eV, and (n, width).
        """
        one_hot = nn.functional.one_hot(species, len(_ELEMENTS)).to(distance.dtype)
        features = self.embedding(one_hot)
        if self.conditioner is not None:
            features = features + self.conditioner(electrons)
        r = distance.unsqueeze(1)
        basis = torch.sin(self.frequencies.to(r.dtype) * r) / r  # type: ignore[operator]
        u = (r / _CUTOFF).clamp(max=1.0)
        envelope = (1 - u) ** 3 * (1 + 3 * u + 6 * u**2)  # two continuous derivatives at the cutoff
        messages = self.radial(basis) * envelope * features[edge_index[1]]
        features = features + sum_rows(messages, edge_index[0], species.numel())
        features = nn.functional.silu(self.update(features))
        features = features + nn.functional.silu(self.update_again(features))
        energy = self.readout(features).squeeze(1) + self.references[species]
        return energy, features


class FakeBackbone(ConservativeBackbone):
    """The tiny test backbone; float64 by default.

    Args:
        size: ``tiny``, or ``charged``, which also sees charge and spin.
        seed: of the weights.
    """

    name: ClassVar[str] = "fake"
    packages: ClassVar[tuple[str, ...]] = ("torch", "ase")
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "all": (r"embedding|update(_again)?|radial\.\d+|readout\.\d+",),
        "scalar": (r"radial\.\d+|readout\.\d+",),
        "readout": (r"readout\.\d+",),
        "radial": (r"radial\.\d+",),
    }
    native_suffix: ClassVar[str] = ".pt"
    keep: ClassVar[Mapping[str, str]] = {"conditioner": "embedding of charge and spin"}

    def __init__(self, size: str = "tiny", seed: int = 0) -> None:
        super().__init__()
        self.size, self.seed = size, seed
        self.model = FakeModel(*_SIZES[size], seed=seed, charged=size == "charged")
        self.cutoff = _CUTOFF
        self.elements = frozenset(_ELEMENTS)
        self.origin = {"checkpoint": f"{size}, seed {seed}", "sha256": ""}

    # ---- loading -------------------------------------------------------------------------
    @classmethod
    def load(
        cls, checkpoint: str = "tiny", *, trust: bool = False, seed: int = 0, **options: Any
    ) -> FakeBackbone:
        """Make the backbone; it reads no file.

        Raises:
            CheckpointError: unknown size.
            RecipeError: unknown option.
        """
        if options:
            raise RecipeError(
                f"the fake adapter has no option '{next(iter(options))}'",
                remedy="valid names: seed",
                field="model.options",
            )
        if checkpoint not in _SIZES:
            raise CheckpointError(
                f"there is no fake model '{checkpoint}'",
                remedy=nearest(checkpoint, _SIZES),
                field="model.checkpoint",
            )
        return cls(checkpoint, seed)

    def config(self) -> dict[str, Any]:
        """Size and seed."""
        return {"size": self.size, "seed": self.seed}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FakeBackbone:
        """The same architecture; see :meth:`config`."""
        return cls(config["size"], config["seed"])

    # ---- graphs --------------------------------------------------------------------------
    @property
    def conditions(self) -> Mapping[str, float | None]:
        """Charge 0 and spin 1 in the size that sees them."""
        return {"charge": 0.0, "spin": 1.0} if self.size == "charged" else {}

    def graph(self, atoms: Atoms) -> dict[str, Tensor]:
        """Edges of one structure; keys as in :func:`blip_ft.backbones.edges.collate`, and ``electrons`` (2,)
        where they count.
        """
        self.check(atoms)
        plain = edges.bare(atoms)
        i, j, vector = primitive_neighbor_list(  # type: ignore[no-untyped-call]
            "ijD", plain.pbc, plain.cell.array, plain.positions, self.cutoff, self_interaction=False
        )
        own: dict[str, Tensor] = {}
        if self.conditions:
            known = {**self.conditions, **electrons.given(atoms.info)}
            own["electrons"] = torch.tensor([known[k] for k in electrons.KEYS], dtype=torch.float64)
        return {
            "edge_index": torch.as_tensor(np.stack((i, j)), dtype=torch.int64),
            "edge_vec": torch.as_tensor(vector, dtype=torch.float64).reshape(-1, 3),
            **edges.scalars(atoms),
            **own,
        }

    def collate(self, atoms: Sequence[Atoms], graphs: Sequence[dict[str, Tensor]]) -> Batch:
        """Batch graphs: atoms and edges are concatenated, structure after structure."""
        batch = edges.collate(atoms, graphs)
        if self.conditions:
            batch.graph["electrons"] = torch.stack([g["electrons"] for g in graphs])
        return batch

    # ---- evaluation ----------------------------------------------------------------------
    def energy_of(self, batch: Batch, *, leaves: bool = True) -> Evaluation:
        """Energies; the leaves are a displacement (n, 3) of all atoms and a strain (B, 3, 3), both 0."""
        edge_vec = batch.graph["edge_vec"].to(self.dtype)
        shift = edge_vec.new_zeros((batch.numbers.numel(), 3)).requires_grad_(leaves)
        strain = edge_vec.new_zeros((batch.n_structures, 3, 3)).requires_grad_(leaves)
        receiver, sender = batch.graph["edge_index"]
        edge_vec = edge_vec + shift[sender] - shift[receiver]
        edge_vec = edge_vec + torch.einsum("ei,eij->ej", edge_vec, strain[batch.rows["edge"]])
        known = torch.tensor(_ELEMENTS, device=batch.numbers.device)
        species = torch.searchsorted(known, batch.numbers)
        state = batch.graph.get("electrons")
        if state is not None:
            state = state.to(edge_vec.dtype)[batch.structure]
        node_energy, features = self.model(species, batch.graph["edge_index"], edge_vec.norm(dim=1), state)
        energy = sum_rows(node_energy, batch.structure, batch.n_structures)
        return Evaluation(node_energy, energy, (shift, strain) if leaves else (), features)

    def assemble(self, batch: Batch, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Forces and stress from ``dE/d(displacement)`` and ``dE/d(strain)``."""
        pull, virial = grads
        stress = edges.voigt(virial) / batch.graph["volume"].to(pull.dtype).unsqueeze(1)
        return -pull, stress.masked_fill(~batch.graph["periodic"].unsqueeze(1), torch.nan)

    def row_kind(self, module_name: str) -> str:
        """``edge`` inside the radial network, ``atom`` everywhere else."""
        return "edge" if module_name.split(".")[0] == "radial" else "atom"

    def stock_calculator(self) -> Calculator:
        """A calculator around a copy, one structure at a time."""
        return _FakeCalculator(copy.deepcopy(self))

    # ---- export --------------------------------------------------------------------------
    def write_native(self, path: Path, shift: Mapping[int, float]) -> None:
        """Size and state dict, by ``torch.save``."""
        state = {name: tensor.cpu().clone() for name, tensor in self.state_dict().items()}
        for number, energy in shift.items():
            state["model.references"][_ELEMENTS.index(number)] += energy
        torch.save({"size": self.size, "state": state}, path)

    def open_native(self, path: Path, *, as_used: bool = False) -> Calculator:
        """A calculator on what the file holds, in float64 or in the precision of the file."""
        content = torch.load(path, weights_only=True)
        twin = FakeBackbone(content["size"])
        twin.load_state_dict(content["state"])
        stored = content["state"]["model.references"].dtype
        return _FakeCalculator(twin.to(stored if as_used else torch.float64))


class _FakeCalculator(Calculator):
    """Energy, forces and stress (where periodic) of one structure."""

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def __init__(self, backbone: FakeBackbone) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.backbone = backbone

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        """Evaluate ``atoms``."""
        super().calculate(atoms, properties, system_changes)  # type: ignore[no-untyped-call]
        prediction = self.backbone(self.backbone.batch([atoms]).to(self.backbone.device))
        self.results = {
            "energy": prediction.energy.item(),
            "free_energy": prediction.energy.item(),
            "forces": prediction.forces.numpy(force=True),
            "stress": prediction.stress[0].numpy(force=True),
        }
