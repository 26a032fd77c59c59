"""A step of training that does not fit into memory goes on in parts.

Where memory runs out, in the evaluation or in the backward call, the step is made again with batches of at most half so
many atoms per part (:mod:`blip_ft.backbones.parts_in_turn`), and all steps after it keep to that bound. Loss
and gradients are those of the whole batch to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from blip_ft.backbones.protocol import Batch
from blip_ft.data.batch.dataset import collate
from blip_ft.errors import BlipError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.system.out_of_memory import is_out_of_memory, log, release
from blip_ft.uncertainty.batch_limits import ranges


@dataclass
class AtomLimit:
    """Atoms that are evaluated at once.

    Attributes:
        potential: makes and evaluates the batches.
        atoms: at most in a part of several structures; ``None`` until memory has run out.
        said: told in a sentence when the bound is made.
    """

    potential: BayesianPotential
    atoms: int | None = None
    said: Callable[[str], object] = log.warning

    def parts(self, batch: Batch) -> Batch:
        """The batch, in parts one after the other where it is larger than the bound."""
        if self.atoms is None or int(batch.n_atoms.sum()) <= self.atoms or batch.n_structures < 2:
            return batch
        if not batch.items:
            raise BlipError(
                "a step does not fit into memory, and batches that workers have made cannot be divided",
                field="data.num_workers",
                remedy="data.num_workers=0, or a smaller data.batch_size",
            )
        pieces = ranges(batch.n_atoms.tolist(), structures=batch.n_structures, atoms=self.atoms)
        if len(pieces) < 2:
            return batch
        backbone, device = self.potential.backbone, batch.n_atoms.device
        made = (collate(backbone, batch.items[p.start : p.stop]).to(device) for p in pieces)
        return replace(batch, parts=tuple(made), in_turn=True)

    def lower(self, batch: Batch, what: str) -> None:
        """Halve the bound, or make one, after ``batch`` did not fit.

        Raises:
            BlipError: nothing is left to be halved, or the family does not allow it.
        """
        sizes = batch.n_atoms.tolist()
        pieces = 1 if self.atoms is None else len(self.parts(batch).parts) or 1
        if pieces >= len(sizes):
            raise BlipError(
                f"{what} does not fit into memory, structure by structure: the largest has {max(sizes)} atoms",
                remedy="leave large structures out, train fewer weights (model.train), or use a device "
                "with more memory",
            )
        if not self.potential.posterior.draws_are_weights:
            raise BlipError(
                f"{what} does not fit into memory, and the spread of "
                f"'{self.potential.posterior.family}' depends on all structures of a batch: it cannot be divided",
                field="data.batch_size",
                remedy="a smaller data.batch_size",
            )
        largest = min(sum(sizes), self.atoms or sum(sizes))
        self.atoms = max(1, largest // 2)
        self.said(
            f"out of memory in {what} of {len(sizes)} structures ({sum(sizes)} atoms): going on in parts of "
            f"up to {self.atoms} atoms, with the same result"
        )

    def retry(self, error: Exception, batch: Batch, what: str) -> None:
        """Prepare another try after an exception that was caught.

        Raises:
            Exception: ``error`` itself, if memory has not run out.
            BlipError: see :meth:`lower`.
        """
        if not is_out_of_memory(error):
            raise error
        error.__traceback__ = None  # its frames hold the tensors
        release()
        self.lower(batch, what)
