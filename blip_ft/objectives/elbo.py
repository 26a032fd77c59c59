"""The negative evidence lower bound of a fine-tune, as a mini-batch loss.

For a posterior over weights shared by all structures,

    -ELBO / N = mean_n E_q[NLL_n] + (T / N) KL(q || p),

N the number of training structures (all ranks), T the temperature (1 is Bayes). A step sees
some of the structures; its loss divides by the fixed N / steps per epoch and not by its own batch
size, so that the expected gradient does not depend on how the epoch is cut into batches
(batches of unequal size would otherwise weigh their structures unequally).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ElboScale:
    """Constants of the mini-batch loss.

    Args:
        n_train: N, structures in the whole training set, or the sum of their weights.
        steps_per_epoch: optimiser steps per epoch.
        temperature: T.
        kl_warmup: epochs over which the KL weight rises linearly from 0.
    """

    n_train: float
    steps_per_epoch: int
    temperature: float = 1.0
    kl_warmup: int = 0

    @property
    def divisor(self) -> float:
        """Structures that a step stands for."""
        return self.n_train / self.steps_per_epoch

    def kl_weight(self, epoch: float) -> float:
        """T/N times the warm-up factor at a (fractional) epoch."""
        ramp = min(1.0, epoch / self.kl_warmup) if self.kl_warmup else 1.0
        return self.temperature / self.n_train * ramp

    def structure_weight(self, epoch: float) -> float:
        """T times the warm-up factor: weight of a KL that each structure has of its own."""
        return self.kl_weight(epoch) * self.n_train

    def loss(self, nll: Tensor, kl: Tensor, *, epoch: float, world: int = 1) -> Tensor:
        """Loss of one rank's share of a step.

        Args:
            nll: (b,) NLL of the structures this rank has, with what else each structure adds.
            kl: KL of the whole posterior (spread and mean), a scalar.
            epoch: for the warm-up.
            world: number of ranks; gradients are averaged over ranks, so the share is scaled up.
        """
        return nll.sum() * (world / self.divisor) + self.kl_weight(epoch) * kl
