"""UMA and eSEN (package ``fairchem-core``): equivariant networks in edge-aligned frames (eSCN-MD).

The vendor's backbone and heads run on a batch of given edge vectors, the leaves of the gradient; the
vendor's neighbour search makes the edges. Outputs are scaled and element references added as the
vendor's predict unit does (``fairchem.core.units.mlip_unit.predict``), with energies summed in float64.

A checkpoint knows several *tasks*, the data sets (levels of theory) it was trained on; one of them is
chosen when the model is loaded. Mixtures of experts stay mixtures, as the vendor's ``traineval`` and
``batch`` settings have them; nothing is merged or compiled.

Three kinds of rows appear: ``atom``, ``edge`` and ``structure``. Edges follow the convention of
:mod:`blip_ft.backbones.edges`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from ase import Atoms
from torch import Tensor, nn

from blip_ft.adapters.fairchem import files, layers, tasks, vendor
from blip_ft.adapters.fairchem import model as escn
from blip_ft.adapters.shared.files import open_file
from blip_ft.adapters.shared.vendor import parameter_names, refuse_options
from blip_ft.backbones import edges
from blip_ft.backbones.conservative import ConservativeBackbone, Evaluation, sum_rows
from blip_ft.backbones.protocol import Backbone, Batch, Prediction
from blip_ft.errors import DataError
from blip_ft.variational.layers import VariationalLayer

_BLOCK = r"backbone\.blocks\.\d+"
_RADIAL = rf"(backbone\.edge_degree_embedding|{_BLOCK}\.edge_wise\.so2_conv_1)\.rad_func\.net\.\d+"
_HEAD = r"output_heads\.\w+(\.head)?"
_READOUT = rf"{_HEAD}\.(energy_block|scalar_block)(\.\d+)?"
_DIRECT = rf"{_HEAD}\.(linear|l2_linear)"
_SCALAR = rf"{_RADIAL}|{_READOUT}|backbone\.mix_csd|{_BLOCK}\.atom_wise\.scalar_mlp\.0"
_BODY = (
    rf"{_BLOCK}\.edge_wise\.so2_conv_[12]\.(fc_m0|so2_m_conv\.\d+\.fc)"
    rf"|{_BLOCK}\.atom_wise\.(so3_linear_[12]|grid_mlp\.\d+)"
)
#: modules whose input rows hold components that mix under rotation
_MIXING = r".*\.(so2_m_conv\.\d+\.fc|grid_mlp\.\d+)"


class _EscnBackbone(Backbone):
    """What conservative and direct models share.

    Args:
        model_config: the checkpoint's model configuration.
        tasks_config: its task configurations.
        task: the task to predict for.
        charge, spin: total charge (e) and spin multiplicity of structures that do not bring their own in
            ``atoms.info``; 0 and the vendor's default.
        origin: where the weights came from.
    """

    #: edges per atom at most
    max_neighbors: int

    name: ClassVar[str] = "fairchem"
    packages: ClassVar[tuple[str, ...]] = ("fairchem-core", "e3nn", "torch")
    native_suffix: ClassVar[str] = ".pt"
    native_call: ClassVar[str] = (
        "FAIRChemCalculator(load_predict_unit('{file}'), task_name='{task}') on structures with "
        "atoms.info['charge'] = {charge} and atoms.info['spin'] = {spin}"
    )
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "all": (rf"{_SCALAR}|{_BODY}|{_DIRECT}",),
        "scalar": (_SCALAR,),
        "readout": (rf"{_READOUT}|{_DIRECT}",),
        "radial": (_RADIAL,),
    }
    keep: ClassVar[Mapping[str, str]] = {
        r"backbone\.routing_mlp(\..*)?": "sends structures to experts: stays deterministic",
        r"backbone\.(charge|spin)_embedding(\..*)?": "embedding of the structure's total charge or spin",
        r"backbone\.dataset_embedding(\..*)?": "embedding of the task",
    }

    def __init__(
        self,
        model_config: dict[str, Any],
        tasks_config: list[Any],
        *,
        task: str | None = None,
        charge: int = 0,
        spin: int | None = None,
        origin: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.model_config, self.tasks_config = model_config, tasks_config
        self.task = tasks.choose_task(task, tasks_config)
        self.charge, self.spin = tasks.check_system(charge, spin, self.task)
        self.origin = dict(origin or {})
        file = self.origin.get("checkpoint")
        self.scales = tasks.read_task(self.task, tasks_config, file=file)
        model: Any = escn.build(model_config)
        self.model = model
        self._heads = tasks.choose_heads(model, self.scales, direct=not self.conservative, file=file)
        self._tables, model.backbone.distance_expansion.coeff = escn.constants(model_config)
        self.cutoff = float(model.backbone.cutoff)
        self.elements = frozenset(range(1, model.backbone.max_num_elements))
        self.register_buffer("_references", self.reference_table(), persistent=False)
        self.has_stress = self.conservative or "stress" in self._heads
        escn.attach_mixtures(model, self._heads, (self.charge, self.spin, self.task))
        self._stock_names = parameter_names(self.model)
        self._apply(lambda t: t)

    def reference_table(self) -> Tensor:
        """(elements + 1,) the vendor's energy of each element, eV; 0 where it has none."""
        table = torch.zeros(max(self.elements) + 1, dtype=torch.float64)
        known = self.scales.references[: len(table)]
        table[: len(known)] = known
        return table

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As in ``nn.Module``; tables are taken from float64 again, and energies stay in float64."""
        super()._apply(fn, recurse)
        backbone: Any = self.model.backbone
        for name, table in self._tables.items():
            owner, _, leaf = name.rpartition(".")
            module = backbone.get_submodule(owner)
            module._buffers[leaf] = table.to(module._buffers[leaf])
        device = next(self.model.parameters()).device
        self._buffers["_references"] = self.reference_table().to(device)
        return self

    def train(self, mode: bool = True) -> Any:
        """Set the mode; the vendor's model stays in evaluation mode, where nothing is dropped or plotted."""
        super().train(mode)
        self.model.eval()
        return self

    def choices(self) -> dict[str, Any]:
        """Task, charge and spin."""
        return {"task": self.task, "charge": self.charge, "spin": self.spin}

    # ---- loading -------------------------------------------------------------------------
    @classmethod
    def load(
        cls,
        checkpoint: str,
        *,
        trust: bool = False,
        task: str | None = None,
        charge: int = 0,
        spin: int | None = None,
        **options: Any,
    ) -> _EscnBackbone:
        """Load a UMA or eSEN model.

        Args:
            checkpoint: a published name such as ``uma-s-1p1``, which the vendor's loader downloads, or the
                path of an inference checkpoint (``.pt``).
            trust: open a file even if that can run code that it contains.
            task: data set whose level of theory is predicted, such as ``omat`` or ``omol``.
            charge: total charge (e) of structures that have none in ``atoms.info``.
            spin: spin multiplicity, likewise; by default 1 for ``omol`` and 0 (not given) else.
            options: none are known.

        Raises:
            CheckpointError: missing, damaged or untrusted file, unknown name, failed download, or another
                kind of model.
            RecipeError: unknown option; task missing or unknown; impossible charge or spin.
        """
        refuse_options(options, cls.name, known=("task", "charge", "spin"))
        vendor.require()
        path = vendor.find(checkpoint)
        content, digest = open_file(path, trust=trust, safe=vendor.safe_globals())
        model, task_configs, weights = vendor.open_checkpoint(path, content)
        config = {
            "model": model,
            "tasks": task_configs,
            "task": task,
            "charge": charge,
            "spin": spin,
            "origin": {"checkpoint": checkpoint, "sha256": digest},
        }
        backbone = cls.from_config(config)
        escn.load_weights(backbone.model, weights, file=path)
        return backbone

    def config(self) -> dict[str, Any]:
        """The checkpoint's configurations, task, charge, spin and origin, all JSON-serialisable."""
        return copy.deepcopy(
            {
                "model": self.model_config,
                "tasks": self.tasks_config,
                "task": self.task,
                "charge": self.charge,
                "spin": self.spin,
                "origin": self.origin,
            }
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> _EscnBackbone:
        """The same architecture with random weights, conservative or direct; see :meth:`config`."""
        config = copy.deepcopy(config)
        vendor.require()
        vendor.check(config["model"], config["tasks"], file=config["origin"].get("checkpoint"))
        kind = FairchemDirectBackbone if tasks.is_direct(config["model"]) else FairchemBackbone
        return kind(
            config["model"],
            config["tasks"],
            task=config["task"],
            charge=config["charge"],
            spin=config["spin"],
            origin=config["origin"],
        )

    # ---- graphs --------------------------------------------------------------------------
    @property
    def conditions(self) -> Mapping[str, float | None]:
        """Charge and spin, in every task."""
        return {"charge": float(self.charge), "spin": float(self.spin)}

    def check(self, atoms: Atoms, *, file: str | None = None, frame: int | None = None) -> None:
        """Raise a ``DataError`` if the model cannot describe ``atoms``, or has no embedding for charge or spin."""
        super().check(atoms, file=file, frame=frame)
        tasks.system_of(atoms, self.charge, self.spin, file=file, frame=frame)

    def graph(self, atoms: Atoms) -> dict[str, Tensor]:
        """The vendor's edges of one structure in float64; keys as in :func:`edges.collate`, and ``charge`` (),
        ``spin`` ().

        A structure without edges gets one from its first atom to itself, longer than the cutoff: the
        vendor's layers need an edge, and this one has no effect.

        Raises:
            DataError: an unknown element, a broken cell, an impossible charge or spin, or a free atom that
                the vendor looks up in a table.
        """
        self.check(atoms)
        if len(atoms) == 1 and not atoms.pbc.any() and not self.model.supports_single_atoms:
            raise DataError(
                "the vendor's model does not describe a free atom: its energies come from a table",
                remedy="remove the frame, or use a model that supports single atoms",
                field="numbers",
            )
        index, vec = files.vendor_edges(self.model.backbone, files.placed(atoms, self.cutoff))
        if not len(vec):
            index = torch.zeros(2, 1, dtype=torch.int64)
            vec = torch.full((1, 3), self.cutoff + 1.0, dtype=torch.float64)
        charge, spin = tasks.system_of(atoms, self.charge, self.spin)
        return {
            "edge_index": index.flip(0),
            "edge_vec": vec,
            "charge": torch.tensor(charge),
            "spin": torch.tensor(spin),
            **edges.scalars(atoms),
        }

    def collate(self, atoms: Sequence[Atoms], graphs: Sequence[dict[str, Tensor]]) -> Batch:
        """Batch graphs: atoms and edges are concatenated, structure after structure."""
        batch = edges.collate(atoms, graphs)
        batch.rows["structure"] = torch.arange(len(atoms))
        batch.graph |= {key: torch.stack([g[key] for g in graphs]) for key in ("charge", "spin")}
        return batch

    # ---- evaluation ----------------------------------------------------------------------
    def _embed(self, batch: Batch, edge_vec: Tensor) -> Tensor:
        """(n, (lmax + 1)^2, channels) features of the atoms from the vendor's backbone."""
        n = batch.n_structures
        backbone: Any = self.model.backbone
        data = escn.Inputs(
            atomic_numbers=batch.numbers,
            batch=batch.structure,
            natoms=batch.n_atoms,
            pos=edge_vec.new_zeros(batch.numbers.numel(), 3),
            charge=batch.graph["charge"],
            spin=batch.graph["spin"].clone(),  # one of the vendor's embeddings overwrites it
            dataset=[self.task] * n,
            edge_index=batch.graph["edge_index"].flip(0),
            edge_vec=edge_vec,
        )
        mixes = hasattr(backbone, "global_mole_tensors")
        with escn.MIXING if mixes else nullcontext():
            try:
                embedding: Tensor = backbone(data)["node_embedding"]
            finally:
                if mixes:  # part of the graph, which no copy can take along
                    backbone.global_mole_tensors.expert_mixing_coefficients = None
        return embedding

    def _read_out(self, batch: Batch, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Energies of the atoms (n,) and structures (B,), eV, float64."""
        head = self._heads["energy"]
        module: Any = self.model.get_submodule(head.path)
        with escn.head_mixture(self.model, head, self.task, batch.n_atoms, embedding):
            raw = module.energy_block(embedding[:, 0]).reshape(-1)
        scale = self.scales.energy.rounded(raw.dtype)
        node_energy = raw.double() * scale.rmsd + (scale.mean / batch.n_atoms.double())[batch.structure]
        references: Any = self._references
        node_energy = node_energy + references[batch.numbers]
        return node_energy, sum_rows(node_energy, batch.structure, batch.n_structures)

    def row_kind(self, module_name: str) -> str:
        """``edge`` in everything that turns with edges, ``structure`` where tasks are mixed in, else ``atom``."""
        if re.search(r"\.(rad_func|edge_wise)(\.|$)", module_name):
            return "edge"
        if re.match(r"backbone\.(mix_csd|routing_mlp|charge_embedding|spin_embedding)(\.|$)", module_name):
            return "structure"
        return "atom"

    def layer_type(self, name: str, module: nn.Module) -> type[VariationalLayer] | str:
        """The vendor's layers in their variational forms; see :mod:`blip_ft.adapters.fairchem.layers`."""
        used = tuple(f"{head.path}." for head in self._heads.values())
        if name.startswith("output_heads.") and not name.startswith(used):
            return f"belongs to a head that task '{self.task}' does not use"
        kind = layers.layer_type(module, mixes=re.fullmatch(_MIXING, name) is not None)
        return super().layer_type(name, module) if kind is None else kind

    # ---- files ---------------------------------------------------------------------------
    def stock_calculator(self) -> Any:
        """The vendor's calculator around a copy of the model, in the precision of the weights.

        The copy goes through a checkpoint in the vendor's format and its own loader, with the experts
        unmerged and nothing compiled. Structures that are periodic in one or two directions are put into a
        box, without which the vendor raises an error.

        Raises:
            RuntimeError: the model has been converted already.
        """
        if parameter_names(self.model) != self._stock_names:
            raise RuntimeError("the stock calculator must be made before the model is converted")
        return files.stock_calculator(self)

    def write_native(self, path: Path, shift: Mapping[int, float]) -> None:
        """Write an inference checkpoint; the shift goes into the element references of the task."""
        files.write(self, path, shift)

    def open_native(self, path: Path, *, as_used: bool = False) -> Any:
        """``FAIRChemCalculator`` on a checkpoint, in float64 or in float32, the vendor's default."""
        return files.calculator(self, path, torch.float32 if as_used else torch.float64)


class FairchemBackbone(_EscnBackbone, ConservativeBackbone):
    """A UMA or eSEN model whose forces and stress are derivatives of its energy."""

    def energy_of(self, batch: Batch, *, leaves: bool = True) -> Evaluation:
        """Energies; the leaf is ``edge_vec`` (e, 3)."""
        edge_vec = batch.graph["edge_vec"].to(self.dtype).detach().clone().requires_grad_(leaves)
        embedding = self._embed(batch, edge_vec)
        node_energy, energy = self._read_out(batch, embedding)
        return Evaluation(node_energy, energy, (edge_vec,) if leaves else (), embedding[:, 0])

    def assemble(self, batch: Batch, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Forces and stress from ``dE/d(edge_vec)`` (e, 3)."""
        (pull,) = grads
        return edges.forces(batch, pull), edges.voigt(edges.stress(batch, pull))


class FairchemDirectBackbone(_EscnBackbone):
    """An eSEN model with heads of their own for forces, and perhaps stress ("direct").

    Its forces are no derivatives: they do not conserve energy, and they do not sum to zero.
    """

    conservative = False

    def forward(
        self, batch: Batch, *, forces: bool = True, stress: bool = True, create_graph: bool = False
    ) -> Prediction:
        """Evaluate a batch; see :meth:`blip_ft.backbones.protocol.Backbone.forward`.

        Nothing is differentiated by positions; ``create_graph`` says whether forces and stress keep their
        graph to the weights. Without a stress head ``stress`` is ``None``.
        """
        edge_vec = batch.graph["edge_vec"].to(self.dtype)
        embedding = self._embed(batch, edge_vec)
        node_energy, energy = self._read_out(batch, embedding)
        out = Prediction(energy, node_energy=node_energy, node_features=embedding[:, 0])
        with torch.set_grad_enabled(create_graph and torch.is_grad_enabled()):
            kept = embedding if create_graph else embedding.detach()
            if forces:
                out.forces = self._direct_forces(kept)
            if stress and self.has_stress:
                out.stress = self._direct_stress(batch, kept)
        return out

    def _direct_forces(self, embedding: Tensor) -> Tensor:
        """Forces (n, 3), eV/Å, from the l = 1 part of the force head."""
        module: Any = self.model.get_submodule(self._heads["forces"].path)
        assert self.scales.forces is not None
        scale = self.scales.forces.rounded(embedding.dtype)
        vectors: Tensor = module.linear(embedding[:, :4])[:, 1:4, 0]
        return vectors * scale.rmsd + scale.mean

    def _direct_stress(self, batch: Batch, embedding: Tensor) -> Tensor:
        """Stress (B, 6), eV/Å^3, from the trace and the l = 2 part that the stress head predicts."""
        head = self._heads["stress"]
        module: Any = self.model.get_submodule(head.path)
        with escn.head_mixture(self.model, head, self.task, batch.n_atoms, embedding):
            trace = module.scalar_block(embedding[:, 0])
        rest = module.l2_linear(embedding[:, :9])[:, 4:9, 0]
        parts = sum_rows(torch.cat((trace, rest), dim=1), batch.structure, batch.n_structures)
        if module.reduce == "mean":
            parts = parts / batch.n_atoms.unsqueeze(1)
        assert self.scales.stress is not None
        scale = self.scales.stress.rounded(parts.dtype)
        matrix = escn.rank_two(parts) * scale.rmsd + scale.mean
        return edges.voigt(matrix).masked_fill(~batch.graph["periodic"].unsqueeze(1), torch.nan)
