"""fairchem's own programs: its neighbour search, inference checkpoints, and its calculator."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from ase import Atoms
from ase.calculators.calculator import all_changes
from torch import Tensor, nn

from blip_ft.adapters.fairchem import tasks, vendor
from blip_ft.backbones import edges
from blip_ft.errors import BlipError


class Checkpoint(Protocol):
    """What of a backbone goes into a checkpoint, and how one is used."""

    model: nn.Module
    model_config: dict[str, Any]
    tasks_config: list[Any]
    task: str
    elements: frozenset[int]
    charge: int
    spin: int
    cutoff: float
    max_neighbors: int

    @property
    def scales(self) -> Any:
        """Names and scales of the outputs."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""

    @property
    def device(self) -> torch.device:
        """Of the weights."""

    def reference_table(self) -> Tensor:
        """Element references of the task in use, eV."""


#: which of the vendor's neighbour searches is used (2: that of its inference settings)
_GRAPH_VERSION = 2


def placed(atoms: Atoms, cutoff: float) -> Atoms:
    """A bare copy that the vendor can place in a cell; partly periodic structures get a box.

    Raises:
        DataError: a periodic direction without a lattice vector, or lattice vectors in a plane.
    """
    plain = edges.bare(atoms)
    return edges.boxed(plain, 2 * cutoff) if plain.pbc.any() else plain


def vendor_edges(backbone: Any, atoms: Atoms) -> tuple[Tensor, Tensor]:
    """Edges of one structure in the vendor's order.

    Returns:
        (2, e) sending and receiving atom, and (e, 3) vector from the receiving to the sending one, Å, float64.
    """
    from fairchem.core.datasets.atomic_data import AtomicData
    from fairchem.core.graph.compute import generate_graph

    data = AtomicData.from_ase(atoms, target_dtype=torch.float64)
    graph = generate_graph(
        data,
        cutoff=backbone.cutoff,
        max_neighbors=backbone.max_neighbors,
        enforce_max_neighbors_strictly=False,
        radius_pbc_version=_GRAPH_VERSION,
        pbc=data.pbc,
    )
    return graph["edge_index"].to(torch.int64), graph["edge_distance_vec"].reshape(-1, 3)


def write(backbone: Checkpoint, path: Path, shift: Mapping[int, float]) -> None:
    """Write an inference checkpoint of a model whose vendor modules are in place.

    Args:
        backbone: not changed.
        path: where to write.
        shift: {atomic number: eV} added to the element references of the task's energy.

    Raises:
        BlipError: an element of the shift is none of the model's.
    """
    from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

    state = {k: v.detach().cpu().clone() for k, v in backbone.model.state_dict().items()}
    average = {f"module.{k}": v for k, v in state.items()}
    average["n_averaged"] = torch.tensor(1)
    torch.save(
        MLIPInferenceCheckpoint(
            model_config=copy.deepcopy(backbone.model_config),
            model_state_dict=state,
            ema_state_dict=average,
            tasks_config=_shifted(backbone, shift),
        ),
        path,
    )


def _shifted(backbone: Checkpoint, shift: Mapping[int, float]) -> list[Any]:
    """The task configurations with a shift in the references of the task in use."""
    configs = copy.deepcopy(backbone.tasks_config)
    if not shift:
        return configs
    unknown = sorted(set(shift) - backbone.elements)
    if unknown:
        raise BlipError(f"the model has no element {unknown[0]}, so it cannot hold its reference")
    table = backbone.reference_table()
    for number, energy in shift.items():
        table[number] += energy
    for task in configs:
        if task["name"] == backbone.scales.outputs["energy"]:
            task["element_references"] = {
                "_target_": "fairchem.core.modules.normalization.element_references.ElementReferences",
                "element_references": {"_target_": "torch.DoubleTensor", "_args_": [table.tolist()]},
            }
    return configs


def stock_calculator(backbone: Checkpoint) -> Any:
    """The vendor's calculator on a copy of a backbone, in its precision."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stock.pt"
        write(backbone, path, {})
        return calculator(backbone, path, backbone.dtype)


def calculator(backbone: Checkpoint, path: Path, dtype: torch.dtype) -> Any:
    """``FAIRChemCalculator`` on a checkpoint, opened by the vendor's loader.

    Args:
        backbone: whose task, charge, spin and device are used.
        path: inference checkpoint; it is not needed afterwards.
        dtype: precision to compute in.
    """
    with vendor.importing():
        from fairchem.core import FAIRChemCalculator
        from fairchem.core.units.mlip_unit import InferenceSettings, load_predict_unit

        settings = InferenceSettings(
            tf32=False,
            activation_checkpointing=False,
            merge_mole=False,
            compile=False,
            internal_graph_gen_version=_GRAPH_VERSION,
            base_precision_dtype=dtype,
        )
        unit = load_predict_unit(path, inference_settings=settings, device=backbone.device.type)
    cutoff, system = backbone.cutoff, (backbone.charge, backbone.spin)

    class _Calculator(FAIRChemCalculator):  # type: ignore[misc]
        """The vendor's calculator with the backbone's charge and spin for structures that have none."""

        def calculate(
            self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes
        ) -> None:
            inside = placed(atoms, cutoff)
            inside.info = dict(zip(("charge", "spin"), tasks.system_of(atoms, *system), strict=True))
            with vendor.importing():
                super().calculate(inside, properties, system_changes)
            self.atoms = atoms.copy()

    return _Calculator(unit, task_name=backbone.task)
