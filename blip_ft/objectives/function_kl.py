"""KL of the model's predictive from the pretrained model's, output by output.

On a structure x without labels the pretrained model says f0(x) with a known error s0 (its RMSE on the
training labels): N(f0, s0^2). The fine-tuned one says N(m, v + s^2), m and v the mean and variance over
the posterior, s the label noise. Per output

    KL = 1/2 [ (v + s^2 + (m - f0)^2) / s0^2 - 1 - ln((v + s^2) / s0^2) ].

The first part holds the mean near what the model knew, the last lets the spread grow to the pretrained
model's own error where labels say nothing. Outputs are taken one at a time (as in functional variational
inference with marginals): on finitely many structures this is finite, while a KL between functions is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from blip_ft.backbones.protocol import Batch, Prediction
from blip_ft.objectives.likelihood import compared


def gaussian_kl(samples: Tensor, centre: Tensor, noise: float, error: float) -> Tensor:
    """The formula above from K samples of an output.

    v + (m - f0)^2 is the mean of (x_k - f0)^2, without bias. ln(v + s^2) takes the sample variance; its
    bias vanishes for v << s^2 and is a constant, -1.27 for K = 2, for v >> s^2, so the gradient is right
    in both limits. With K = 1 there is no spread: v = 0.

    Args:
        samples: (K, ...).
        centre: (...) f0.
        noise: s.
        error: s0.
    """
    second = (samples - centre).square().mean(dim=0) + noise**2
    variance = samples.var(dim=0) if len(samples) > 1 else torch.zeros_like(centre)
    return 0.5 * (second / error**2 - 1 - torch.log((variance + noise**2) / error**2))


def function_kl(
    samples: Sequence[Prediction], batch: Batch, noise: Mapping[str, float], error: Mapping[str, float]
) -> Tensor:
    """KL of each structure, summed over its energy (per atom) and force components; (B,) nats.

    Args:
        samples: K predictions with independent noise.
        batch: its labels are the pretrained model's predictions.
        noise: label noise by kind, eV/atom and eV/Å.
        error: error of the pretrained model by kind.
    """
    sides = [compared(p, batch, stress=False) for p in samples]
    out = samples[0].energy.new_zeros(batch.n_structures, dtype=torch.float64)
    for kind, (_, centre, rows) in sides[0].items():
        values = torch.stack([side[kind][0] for side in sides])
        terms = gaussian_kl(values, centre, noise[kind], error[kind])
        out = out.index_add(0, rows, terms.flatten(1).sum(dim=1))
    return out
