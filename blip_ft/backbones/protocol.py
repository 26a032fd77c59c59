"""The protocol that every adapter fulfils.

A :class:`Backbone` wraps one vendor model. It knows how to turn an ``ase.Atoms`` into that
vendor's graph, how to batch graphs, and how to evaluate them. It knows nothing of Bayes.
Everything above it (training, prediction, calculators) speaks only this protocol, in

========================  ==================  ===========================================
quantity                  shape               unit, sign
========================  ==================  ===========================================
``energy``                (B,)                eV, total energy of a structure
``forces``                (n, 3)              eV/Å
``stress``                (B, 6)              eV/Å^3, ASE sign (positive = tensile) and
                                              Voigt order xx yy zz yz xz xy; NaN where the
                                              structure is not periodic in all directions
``node_energy``           (n,)                eV, sums to ``energy`` per structure; ``None``
                                              where the energy is no sum over atoms
``node_features``         (n, f)              invariant features of the atoms (optional), from
                                              which the out-of-distribution score is made
========================  ==================  ===========================================

with B structures and n atoms in all of them together.
"""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from ase import Atoms
from torch import Tensor, nn

from blip_ft.backbones import electrons
from blip_ft.errors import BlipError, DataError
from blip_ft.system.side_by_side import cut
from blip_ft.variational.layers import VariationalLayer, layer_type

#: coordinates beyond it, Å, have an error of 1e-8 Å and more in double precision: they come from a fault
LARGEST = 1e8


@dataclass
class Batch:
    """Several structures, ready for a backbone.

    Attributes:
        graph: what the vendor's model takes; opaque to everyone but the adapter.
        n_atoms: (B,) atoms per structure.
        numbers: (n,) atomic numbers.
        rows: for every kind of row that a converted layer can see (``atom``, ``edge``, ...),
            the structure that each row belongs to, (number of rows,). Rows of one structure
            are contiguous and structures ascend.
        keys: (B,) stable integer identity of each structure; noise is keyed by it.
        labels: optional ``energy`` (B,), ``forces`` (n, 3), ``stress`` (B, 6) with NaN where a
            label is missing, ``weight`` (B,) and ``atom_weight`` (n,); float64, units as in the module's
            table. Added by the data module.
        copies: ``m`` -> a batch of all structures m times over, without keys and labels, for several draws
            in one call; ``None`` where nobody has said how.
        parts: the same structures in several batches, to be evaluated side by side on a CPU; may be empty.
        in_turn: the parts are to be evaluated one after the other, as memory is short; on any device.
        items: what the batch was made of, to make parts of it later; empty where a data loader's worker has made it.
    """

    graph: Any
    n_atoms: Tensor
    numbers: Tensor
    rows: dict[str, Tensor]
    keys: list[int] = field(default_factory=list)
    labels: dict[str, Tensor] = field(default_factory=dict)
    copies: Callable[[int], Batch] | None = None
    parts: tuple[Batch, ...] = ()
    in_turn: bool = False
    items: tuple[Any, ...] = ()

    @property
    def n_structures(self) -> int:
        """Number of structures in the batch."""
        return int(self.n_atoms.numel())

    @property
    def structure(self) -> Tensor:
        """(n,) structure that each atom belongs to."""
        return self.rows["atom"]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        copies = self.copies
        return Batch(
            graph=_to(self.graph, device),
            n_atoms=self.n_atoms.to(device),
            numbers=self.numbers.to(device),
            rows={k: v.to(device) for k, v in self.rows.items()},
            keys=self.keys,
            labels={k: v.to(device) for k, v in self.labels.items()},
            copies=None if copies is None else lambda m: copies(m).to(device),
            parts=self.parts if torch.device(device).type == "cpu" else (),
            items=self.items,
        )


def _to(value: Any, device: torch.device | str) -> Any:
    """Move tensors in nested dicts, lists and objects with a ``to`` method."""
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to(v, device) for v in value)
    return value.to(device) if hasattr(value, "to") else value


@dataclass
class Prediction:
    """What a backbone returns; shapes, units and signs in the module's table."""

    energy: Tensor
    forces: Tensor | None = None
    stress: Tensor | None = None
    node_energy: Tensor | None = None
    node_features: Tensor | None = None


class Backbone(nn.Module, ABC):
    """One vendor model behind one interface.

    A subclass sets the class attributes, builds its vendor model as ``self.model`` and fulfils
    the abstract methods. It must not change the vendor model's numbers: the adapter contract
    (``blip_ft/testing/contract.py``) compares it with the vendor's own calculator.
    """

    #: name of the adapter, as in the entry point
    name: ClassVar[str]
    #: Python packages whose versions belong in a receipt
    packages: ClassVar[tuple[str, ...]] = ()
    #: ``{preset: regular expressions on module names}``; ``all`` and ``scalar`` must exist
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {"all": (".*",), "scalar": (".*",)}
    #: regular expressions on module names that must stay as they are: ``{pattern: reason}``
    keep: ClassVar[Mapping[str, str]] = {}
    #: whether forces and stress are exact derivatives of the energy; a model that predicts them by
    #: layers of their own ("direct") says ``False``
    conservative: bool = True
    #: whether the model predicts a stress at all; without one ``Prediction.stress`` is ``None``
    has_stress: bool = True
    #: whether the model turns with the structure by construction; one that has learned to says ``False``
    equivariant: ClassVar[bool] = True
    #: ``{precision: reason}`` of what training must not compute in; ``tf32`` is known
    refused_precisions: ClassVar[Mapping[str, str]] = {}
    #: how files in the vendor's format end (``.pth``); empty if the adapter cannot write any
    native_suffix: ClassVar[str] = ""
    #: whether :meth:`rearrange` was called
    _arranged: bool = False
    #: precision of the numbers in such a file (``float32``) where it is not that of the weights
    native_dtype: ClassVar[str] = ""
    #: how the vendor's program opens such a file for what is in use of it, with the keys of :meth:`choices`
    native_call: ClassVar[str] = ""

    model: nn.Module
    #: radius of the neighbour list, Å
    cutoff: float
    #: atomic numbers the model knows
    elements: frozenset[int]
    #: what to say about where the weights came from: ``{"checkpoint": ..., "sha256": ...}``
    origin: dict[str, str]

    # ---- loading -------------------------------------------------------------------------
    @classmethod
    @abstractmethod
    def load(cls, checkpoint: str, *, trust: bool = False, **options: Any) -> Backbone:
        """Load a vendor's model by name, or from a file in the vendor's format.

        Raises:
            CheckpointError: missing, damaged or untrusted file, or unknown model name.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON-serialisable constructor arguments from which :meth:`from_config` rebuilds the
        architecture (without weights).
        """

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> Backbone:
        """The same architecture with weights yet to be loaded into its state dict."""

    def choices(self) -> dict[str, Any]:
        """What of a model is in use that holds several: ``head``, ``task``, ``modal``, ``charge``, ``spin``.

        Empty where there is nothing to choose. ``charge`` and ``spin`` are those of structures that bring none of
        their own, and ``None`` where every structure has to. JSON-serialisable.
        """
        return {}

    # ---- graphs --------------------------------------------------------------------------
    @abstractmethod
    def graph(self, atoms: Atoms) -> Any:
        """The vendor's graph of one structure, on the CPU. Must not change ``atoms``."""

    @abstractmethod
    def collate(self, atoms: Sequence[Atoms], graphs: Sequence[Any]) -> Batch:
        """Batch graphs made by :meth:`graph`; leaves them unchanged so they can be cached."""

    # ---- evaluation ----------------------------------------------------------------------
    @abstractmethod
    def forward(
        self, batch: Batch, *, forces: bool = True, stress: bool = True, create_graph: bool = False
    ) -> Prediction:
        """Evaluate a batch.

        Args:
            batch: from :meth:`collate`.
            forces: compute forces (as the gradient of the energy where the model is
                conservative).
            stress: compute stress; implies the cost of forces.
            create_graph: keep the graph of the gradients, to differentiate forces again. When
                ``False`` energies still carry a graph to the parameters if grad is enabled.
        """

    @abstractmethod
    def row_kind(self, module_name: str) -> str:
        """Which of ``Batch.rows`` a linear module's input rows are: ``atom``, ``edge``, ..."""

    def layer_type(self, name: str, module: nn.Module) -> type[VariationalLayer] | str:
        """The variational form of one of the vendor's modules, or the reason why there is none.

        Overridden where a vendor has linear layers of its own, or where a plain linear layer sees more
        than scalars.

        Args:
            name: the module's name inside ``model``.
            module: the module; has parameters of its own.
        """
        return layer_type(module)

    @abstractmethod
    def stock_calculator(self) -> Any:
        """The vendor's own ASE calculator around an untouched copy of the model.

        Call before conversion. Used by the step-0 sanity check only.
        """

    def arrange(self) -> None:
        """:meth:`rearrange`, once."""
        if not self._arranged:
            self._arranged = True
            self.rearrange()

    def rearrange(self) -> None:
        """Make the vendor's code cheaper to differentiate, without changing a bit of what it gives.

        Called once (:meth:`arrange`), before conversion and after the stock calculator was made, whose code
        stays the vendor's. A model whose native file holds code, not weights alone, must be left as it is.
        """

    # ---- export --------------------------------------------------------------------------
    def write_native(self, path: Path, shift: Mapping[int, float]) -> None:
        """Write the model as a file that the vendor's own programs open without this package.

        ``blip_ft.potential.export`` calls it on a backbone whose vendor modules are all back in place
        (``variational.unload``), in the precision it was trained in, with the weights of the mean or
        of one draw. The file must hold vendor's classes and tensors only.

        Args:
            path: where to write; ends in :attr:`native_suffix`. It is a temporary name: no sibling
                files, and no mention of the name inside.
            shift: {atomic number: eV} to be added to the vendor's own energy of each atom of that
                element (elements not named: 0), so that the vendor's total energy is that of the
                trained potential. A model with several heads or tasks gets it in the one in use.
                Leave ``self`` as it is: write a shifted copy.

        Raises:
            BlipError: the adapter cannot write files, or this model cannot hold the shift.
        """
        raise BlipError(
            f"the {self.name} adapter cannot write its vendor's format",
            remedy="use the model folder with blip_ft.load, or blip_ft's calculator",
        )

    def open_native(self, path: Path, *, as_used: bool = False) -> Any:
        """The vendor's own ASE calculator on a file from :meth:`write_native`.

        The file is opened by the *vendor's* loader, so that what is compared with the trained
        potential is what a user without this package gets. Head, task or modality are those of
        ``self``.

        Args:
            path: a file in the vendor's format.
            as_used: compute in the precision that the vendor's program takes if nobody asks for another one. By
                default in float64 where it can be made to, since the comparison is then limited by the rounding of
                the stored weights alone.
        """
        raise BlipError(f"the {self.name} adapter cannot open its vendor's format")

    # ---- shared --------------------------------------------------------------------------
    @property
    def conditions(self) -> Mapping[str, float | None]:
        """What the model is told beside the geometry: ``charge`` (e), ``spin`` (multiplicity), or neither.

        The value is the model's for structures that have none in ``atoms.info``; ``None`` where each must
        have its own. An adapter that reads them in :meth:`graph` (:func:`blip_ft.backbones.electrons.given`)
        says so here.
        """
        return {}

    def check(self, atoms: Atoms, *, file: str | None = None, frame: int | None = None) -> None:
        """Raise a :class:`DataError` if the model cannot describe ``atoms``: coordinates that are no numbers, or an
        element that it does not know.
        """
        check_numbers(atoms, file=file, frame=frame)
        unknown = sorted(set(atoms.numbers.tolist()) - self.elements)
        if unknown:
            from ase.data import chemical_symbols

            symbols = ", ".join(chemical_symbols[z] for z in unknown)
            raise DataError(
                f"element {symbols} is unknown to the {self.name} model",
                remedy="choose a model that was trained on this element, or remove the frame",
                file=file,
                frame=frame,
                field="numbers",
            )
        if not (needed := [key for key, default in self.conditions.items() if default is None]):
            return
        known = electrons.given(atoms.info, file=file, frame=frame)
        for key in needed:
            if key not in known:
                raise DataError(
                    f"this {self.name} model needs the {key} of every structure",
                    remedy=f"give every frame its {key} (atoms.info['{key}'], a column, or under another name "
                    f"data.fields: {{{key}: NAME}}), or set model.options.{key} for all that have none",
                    file=file,
                    frame=frame,
                    field=key,
                )

    def batch(self, atoms: Sequence[Atoms], *, graphs: Sequence[Any] | None = None, parts: int = 1) -> Batch:
        """Graphs and batch of several structures in one call; ``parts`` as for ``data.dataset.collate``.

        Args:
            atoms: structures.
            graphs: theirs, where they are made already.
            parts: also put them into up to so many batches.
        """
        graphs = [self.graph(a) for a in atoms] if graphs is None else graphs

        def batch_of(some: range) -> Batch:
            chosen = atoms[some.start : some.stop], graphs[some.start : some.stop]
            batch = self.collate(*chosen)
            batch.copies = self.copies(*chosen)
            return batch

        batch = batch_of(range(len(atoms)))
        if len(pieces := cut([len(a) for a in atoms], parts)) > 1:
            batch.parts = tuple(batch_of(piece) for piece in pieces)
        return batch

    def copies(self, atoms: Sequence[Atoms], graphs: Sequence[Any]) -> Callable[[int], Batch]:
        """For ``Batch.copies``. Not for batches that a data loader's workers make: it cannot be pickled."""
        return lambda m: self.collate([*atoms] * m, [*graphs] * m)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def versions(self) -> dict[str, str]:
        """Versions of the packages this adapter stands on."""
        return {p: importlib.metadata.version(p) for p in self.packages}


def check_numbers(atoms: Atoms, *, file: str | None = None, frame: int | None = None) -> None:
    """Raise unless positions and cell are finite, and not so large that they have no digits left (:data:`LARGEST`).

    Vendors' searches find no neighbours for an atom at NaN, and their models then give it a finite energy.

    Raises:
        DataError: they are not; names the first atom.
    """
    finite = (np.abs(atoms.positions) < LARGEST).all(axis=1)
    if not finite.all():
        first = int(np.flatnonzero(~finite)[0])
        what, field = f"the position of atom {first} is {atoms.positions[first].tolist()}", "positions"
    elif not (np.abs(atoms.cell.array) < LARGEST).all():
        what, field = f"the cell is {atoms.cell.array.tolist()}", "cell"
    else:
        return
    raise DataError(
        f"{what}, which is no place",
        remedy="mend or remove the structure; in dynamics, take shorter steps from a relaxed structure",
        file=file,
        frame=frame,
        field=field,
    )
