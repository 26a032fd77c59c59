"""A potential as a model of TorchSim.

What TorchSim hands over is turned into structures as the backbone knows them, each with a graph of its own, and all
are evaluated in one call. TorchSim counts in eV, Å, eV/Å and eV/Å^3, with the sign of stress that ASE has; its cells
are transposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Self

import numpy as np
import torch
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from torch import Tensor, nn

from blip_ft.data.check.overlaps import worst_overlap
from blip_ft.errors import BlipError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.calibration import Calibration
from blip_ft.system.side_by_side import width
from blip_ft.torchsim.package import torch_sim, with_interface
from blip_ft.uncertainty.moments import BatchMoments
from blip_ft.uncertainty.predict import Method, predict_batch

_NO_STRESS = "no stress: structures are not periodic in all directions, or compute_stress is off"


class Results(dict[str, Tensor]):
    """What an evaluation gives; asking for a stress that is not there says why it is not."""

    def __missing__(self, key: str) -> NoReturn:
        if key == "stress":
            raise BlipError(
                _NO_STRESS,
                field="stress",
                remedy="integrators and optimisers of fixed cells; or structures with pbc=True, compute_stress=True",
            )
        raise KeyError(key)


class TorchSimModel(nn.Module):
    """A potential as TorchSim's ``ModelInterface``: for its integrators, optimisers, batchers and reporters.

    A call with a state of B structures and n atoms in all evaluates them together and returns

    ===================  ============  =========================================================================
    key                  shape         what
    ===================  ============  =========================================================================
    ``energy``           (B,)          eV
    ``forces``           (n, 3)        eV/Å
    ``stress``           (B, 3, 3)     eV/Å^3, with ASE's sign; absent where the state is not periodic in all
                                       directions, and with ``compute_stress`` off
    ``energy_std``       (B,)          epistemic std of the energy, calibrated, eV
    ``forces_std_norm``  (n,)          epistemic std of the force, calibrated: root of the summed variances, eV/Å
    ``ood_score``        (n,)          distance from the training atoms
    ===================  ============  =========================================================================

    the last three as far as the method and the model give them. Numbers are those of
    :class:`~blip_ft.uncertainty.calculator.BlipCalculator` with the same ``method`` and ``n_draws``.

    Integrators and optimisers of TorchSim keep energy, forces and stress alone: :attr:`results` has the rest.

    Args:
        potential: from ``blip_ft.load``.
        method: see :class:`~blip_ft.uncertainty.calculator.BlipCalculator`.
        n_draws: likewise; 0 for no error bars.
        dtype: of the numbers of a simulation; by default that of the weights. float64 with weights in float32 adds
            little to the cost, and integrates without the rounding of coordinates.
        charge: e, of every structure, for models that take one.
        spin: multiplicity, likewise.

    Attributes:
        results: of the last call; empty before the first.

    Raises:
        MissingBackendError: TorchSim is not installed.
        BlipError: a charge or spin that the model does not take, or one that it needs and that is not given.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """An instance that is also a ``ModelInterface``, which is first imported here."""
        both: type[Self] = with_interface(cls)  # type: ignore[arg-type]  # mypy takes a class with __hash__ for not hashable
        return object.__new__(both)

    def __init__(
        self,
        potential: BayesianPotential,
        *,
        method: Method = "draws",
        n_draws: int | None = None,
        dtype: torch.dtype | None = None,
        charge: float | None = None,
        spin: float | None = None,
    ) -> None:
        super().__init__()
        given = {key: value for key, value in (("charge", charge), ("spin", spin)) if value is not None}
        conditions, name = potential.backbone.conditions, potential.backbone.name
        if unknown := sorted(given.keys() - conditions.keys()):
            raise BlipError(
                f"this {name} model takes no {unknown[0]}", field=unknown[0], remedy="leave it out"
            )
        if needed := [key for key, value in conditions.items() if value is None and key not in given]:
            raise BlipError(
                f"this {name} model needs the {needed[0]} of the structures",
                field=needed[0],
                remedy=f"give it as {needed[0]}=",
            )
        self.potential, self.method, self.n_draws, self.info = potential, method, n_draws, given
        self.compute_stress = self.compute_forces = True
        self.results = Results()
        self._numbers = dtype
        self._seen = False

    # ---- what TorchSim asks of a model ---------------------------------------------------------
    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.potential.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers of a simulation."""
        return self._numbers or self.potential.backbone.dtype

    @property
    def compute_stress(self) -> bool:
        """Whether calls give stress."""
        return self._stress

    @compute_stress.setter
    def compute_stress(self, value: bool) -> None:
        self._stress = value

    @property
    def compute_forces(self) -> bool:
        """Whether calls give forces; they are evaluated in any case."""
        return self._forces

    @compute_forces.setter
    def compute_forces(self, value: bool) -> None:
        self._forces = value

    def forward(self, state: Any, **_: Any) -> Results:
        """Evaluate all structures of a state in one call.

        Args:
            state: TorchSim's ``SimState``, or a mapping with its fields.

        Raises:
            DataError: the model cannot describe a structure (``frame``: its number in the state).
            BlipError: atoms on top of each other in the first call, or a prediction that is not finite.
        """
        structures = self._structures(state)
        backbone = self.potential.backbone
        for number, atoms in enumerate(structures):
            backbone.check(atoms, frame=number)
            if not self._seen:
                _refuse_overlaps(atoms, number)
        batch = backbone.batch(structures, parts=width(backbone.device)).to(backbone.device)
        periodic = bool(structures[0].pbc.all())
        moments = predict_batch(
            self.potential,
            batch,
            n_draws=self.n_draws,
            method=self.method,
            stress=self.compute_stress and periodic,
        )
        self.results = self._read(moments, periodic=periodic)
        self._seen = True
        return Results(self.results)

    # ---- structures in, numbers out ------------------------------------------------------------
    def state(self, atoms: Atoms | Sequence[Atoms]) -> Any:
        """A ``SimState`` of structures, in :attr:`dtype` and on :attr:`device`.

        As TorchSim's own (``torch_sim.io.atoms_to_state``), which takes a slab for a molecule, without a word.

        Raises:
            BlipError: no structure, one that is periodic in some directions only, or periodic ones beside others.
        """
        structures = [atoms] if isinstance(atoms, Atoms) else list(atoms)
        if not structures:
            raise BlipError("no structure", remedy="at least one")
        for number, one in enumerate(structures):
            if one.pbc.any() and not one.pbc.all():
                raise BlipError(
                    f"periodic in {int(one.pbc.sum())} of 3 directions, and TorchSim knows all or none",
                    frame=number,
                    field="pbc",
                    remedy="a slab with vacuum in its cell may be periodic in all: atoms.pbc = True; or the md command",
                )
            if one.pbc.all() != structures[0].pbc.all():
                raise BlipError(
                    "periodic structures and others in one state",
                    frame=number,
                    field="pbc",
                    remedy="a state for each kind",
                )
        return torch_sim().io.atoms_to_state(structures, self.device, self.dtype)

    def _structures(self, state: Any) -> list[Atoms]:
        """The structures of a state."""
        fields = ("positions", "atomic_numbers", "cell", "pbc", "system_idx")
        given = state if isinstance(state, Mapping) else {name: getattr(state, name) for name in fields}
        positions, numbers = _numpy(given["positions"]), _numpy(given["atomic_numbers"])
        cells = _numpy(given["cell"]).reshape(-1, 3, 3)
        index = given.get("system_idx")
        of = np.zeros(len(positions), dtype=int) if index is None else _numpy(index)
        # one bool, or one for each direction
        pbc = np.broadcast_to(_numpy(torch.as_tensor(given["pbc"])), 3)
        return [
            Atoms(numbers[of == i], positions[of == i], cell=cell.T, pbc=pbc, info=dict(self.info))
            for i, cell in enumerate(cells)
        ]

    def _read(self, moments: BatchMoments, *, periodic: bool) -> Results:
        """Calibrated numbers."""
        mean, calibration = moments.mean, self.potential.calibration or Calibration.identity()
        found: dict[str, Tensor | None] = {"energy": mean.energy}
        if self.compute_forces:
            found["forces"] = mean.forces
        if self.compute_stress and periodic and mean.stress is not None:
            found["stress"] = torch.as_tensor(voigt_6_to_full_3x3_stress(_numpy(mean.stress)))
        broken = (~torch.isfinite(mean.energy)).nonzero().flatten().tolist()
        for name, value in found.items():
            if value is not None and not bool(torch.isfinite(value).all()):
                raise BlipError(
                    "the model's prediction is not finite",
                    frame=broken[0] if broken else None,
                    field=name,
                    remedy="the structure is far from all that the model knows: look at the start and the time step",
                )
        if moments.energy_std is not None:
            found["energy_std"] = calibration.energy.scale * moments.energy_std
        if moments.forces_std_norm is not None:
            found["forces_std_norm"] = calibration.forces.scale * moments.forces_std_norm
        found["ood_score"] = moments.ood_score
        return Results(
            {
                name: value.detach().to(self.device, self.dtype)
                for name, value in found.items()
                if value is not None
            }
        )


def _numpy(value: Tensor) -> Any:
    return value.detach().cpu().numpy()


def _refuse_overlaps(atoms: Atoms, number: int) -> None:
    """Raise if atoms lie on top of each other."""
    if (found := worst_overlap(atoms)) is not None:
        distance, i, j = found
        raise BlipError(
            f"atoms {i} ({atoms.symbols[i]}) and {j} ({atoms.symbols[j]}) overlap: {distance:.2f} Å",
            frame=number,
            field="positions",
            remedy="look at the units, the cell (TorchSim's is transposed) and the structure",
        )
