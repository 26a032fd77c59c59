"""How far real draws, the one-pass methods and the linearised model agree, and up to which amplitude.

With weights theta + a A z_k, k = 1..K the latent numbers of centred draws at amplitude a (in units of
the posterior's width), an output that is linear in the weights has the spread a s,

    s^2 = mean_k (dy/dz z_k)^2,                                                          (1)

the spread of the linearised model over *the same draws*: a comparison with it has no sampling error.
The exact std of the linearised model (``linearized``) is the expectation of (1); a std from K centred
draws scatters around it by 1/sqrt(2 (K - 1)), relative, from K/2 pairs by 1/sqrt(K) (``draws.sampling_error``).

The mean over centred draws leaves the mean model by curvature only. ``MAX_SHIFT`` of the full-width spread
is a shift that does no harm; figures mark it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip_ft.backbones.conservative import ConservativeBackbone
from blip_ft.backbones.protocol import Batch
from blip_ft.data.batch.dataset import FrameDataset, collate
from blip_ft.families.model import drawing
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.uncertainty.draws import moments_of_draws, sampling_error
from blip_ft.uncertainty.linearized import MAX_DIRECTIONS, energy_gradients, latent_derivatives
from blip_ft.uncertainty.predict import predict_batch
from blip_ft.uncertainty.results import FloatArray
from blip_ft.variational.noise import Noise

#: shift of the mean over draws from the mean model that does no harm, in units of the spread
MAX_SHIFT = 0.05
#: amplitude of the central differences that stand for derivatives where there are none
STEP = 0.1
#: components whose std is below this share of their set's median are zero by symmetry
ZERO = 1e-4
#: amplitudes of a quick look, beside the one that the model uses
QUICK = (0.3, 1.0)
#: and of a thorough one
THOROUGH = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

#: outputs of one draw or one derivative: energy (B,) eV, forces (n, 3) eV/Å
Outputs = tuple[Tensor, Tensor]


def study(
    potential: BayesianPotential,
    sets: Mapping[str, FrameDataset],
    *,
    n_frames: int,
    n_draws: int,
    amplitudes: Sequence[float] = QUICK,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Compare draws with the linearised model on a few frames of each set.

    Args:
        potential: trained; is left as it is.
        sets: frames by set; labels are not used.
        n_frames: of all sets together, taken evenly; the first sets where there are more sets.
        n_draws: K. With as many as the posterior has latent numbers or more, the exact force stds of
            ``linear`` are computed too.
        amplitudes: at which draws are taken, beside the potential's own.
        progress: called after each set.

    Returns:
        JSON-like: ``n_draws``, ``amplitude`` (the potential's), ``max_shift``, ``sampling_error``,
        ``derivatives`` (``linear``: exact; ``differences``: central ones, where the family or the
        model has no linear form) and ``sets``: by name ``n_frames``, ``energy`` and ``forces``. These
        hold the stds in eV and eV/Å, flat, by origin: ``draws`` (at the potential's amplitude,
        over it), ``same`` (equation 1), ``exact`` (``None`` where not computed), and ``curve``: for
        every amplitude ``shift`` (rms shift of the mean over draws, over the rms of ``same``) and
        quartiles ``low``, ``median``, ``high`` of the std over amplitude, over ``same``.
        Without posterior or frames ``sets`` is empty.
    """
    chosen = {n: d for n, d in list(sets.items())[:n_frames] if len(d)}
    result: dict[str, Any] = {
        "n_draws": n_draws,
        "amplitude": potential.amplitude,
        "max_shift": MAX_SHIFT,
        "sampling_error": sampling_error(n_draws, paired=potential.posterior.paired),
        "derivatives": "linear" if _has_derivatives(potential) else "differences",
        "sets": {},
    }
    if not potential.posterior.ready:
        return result
    for i, (name, dataset) in enumerate(chosen.items()):
        share = min(len(dataset), n_frames // len(chosen) + (i < n_frames % len(chosen)))
        items = [dataset[int((j + 0.5) * len(dataset) / share)] for j in range(share)]
        batch = collate(potential.backbone, items).to(potential.backbone.device)
        result["sets"][name] = {"n_frames": share} | _compare(potential, batch, n_draws, amplitudes)
        progress()
    return result


def _compare(
    potential: BayesianPotential, batch: Batch, n_draws: int, amplitudes: Sequence[float]
) -> dict[str, Any]:
    """The entries of one set."""
    mean = predict_batch(potential, batch, n_draws=0, stress=False).mean
    assert mean.forces is not None
    centre = (mean.energy, mean.forces)
    same, exact = _linearised(potential, batch, n_draws)
    curves: tuple[list[dict[str, float | None]], ...] = ([], [])
    drawn: list[FloatArray] = []
    for amplitude in sorted({*amplitudes, potential.amplitude}):
        with drawing(potential, n_draws, amplitude):
            moments = moments_of_draws(potential, batch, n_draws, stress=False)
        assert moments.energy_std is not None
        assert moments.forces_std is not None
        assert moments.mean.forces is not None
        stds = [_flat(moments.energy_std), _flat(moments.forces_std)]
        means = [moments.mean.energy, moments.mean.forces]
        if amplitude == potential.amplitude:
            drawn = stds
        for k, curve in enumerate(curves):
            shift = float((means[k] - centre[k]).square().mean().sqrt())
            low, median, high = quartiles(stds[k], same[k])
            curve.append(
                {
                    "amplitude": amplitude,
                    "shift": shift / max(float(np.sqrt(np.mean(same[k] ** 2))), 1e-30),
                    "low": low,
                    "median": median,
                    "high": high,
                }
            )
    return {
        what: {
            "draws": drawn[k].tolist(),
            "same": same[k].tolist(),
            "exact": None if exact[k] is None else _list(exact[k]),
            "curve": curves[k],
        }
        for k, what in enumerate(("energy", "forces"))
    }


def _linearised(
    potential: BayesianPotential, batch: Batch, n_draws: int
) -> tuple[list[FloatArray], list[FloatArray | None]]:
    """Stds of energies and forces of the linearised model: over the same draws, and exact."""
    exact: list[FloatArray | None] = [None, None]
    if potential.posterior.draws_are_weights:
        _, gradients = energy_gradients(potential, batch, stress=False)
        exact[0] = _flat(potential.posterior.linear_variance(gradients).sqrt())
    if not _has_derivatives(potential):
        parts = list(_differences(potential, batch, n_draws))
        columns = [torch.stack(x) for x in zip(*parts, strict=True)]
    else:
        latents = potential.draw_latents(n_draws).double()
        r = potential.posterior.latent_numel
        whole = r <= min(n_draws, MAX_DIRECTIONS)
        directions = torch.eye(r, dtype=torch.float64) if whole else latents
        derivatives = [(e, f) for e, f, _ in latent_derivatives(potential, batch, directions)]
        columns = [torch.stack(x) for x in zip(*derivatives, strict=True)]
        if whole:
            exact[1] = _flat(columns[1].square().sum(dim=0).sqrt())
            columns = [torch.tensordot(latents.to(c), c, dims=1) for c in columns]
    return [_flat(c.square().mean(dim=0).sqrt()) for c in columns], exact


def _has_derivatives(potential: BayesianPotential) -> bool:
    return potential.posterior.draws_are_weights and isinstance(potential.backbone, ConservativeBackbone)


def _differences(potential: BayesianPotential, batch: Batch, n_draws: int) -> Iterator[Outputs]:
    """Central differences along each draw; their error is of second order in :data:`STEP`."""
    for k in range(n_draws):
        ends = []
        for sign in (1.0, -1.0):
            with drawing(potential, n_draws, sign * STEP), torch.no_grad():
                out = potential(batch, Noise("draw", draw=k), stress=False)
            ends.append((out.energy.double(), out.forces.double()))
        (e1, f1), (e0, f0) = ends
        yield (e1 - e0) / (2 * STEP), (f1 - f0) / (2 * STEP)


# ---- numbers out of it -------------------------------------------------------------------------


def quartiles(draws: FloatArray, reference: FloatArray) -> tuple[float | None, float | None, float | None]:
    """Quartiles of the ratio, without components whose std vanishes by symmetry; ``None`` if none is left."""
    ratio = _ratio(draws, reference)
    if not ratio.size:
        return None, None, None
    low, median, high = np.quantile(ratio, (0.25, 0.5, 0.75))
    return float(low), float(median), float(high)


def _ratio(draws: FloatArray, reference: FloatArray) -> FloatArray:
    known = reference > ZERO * np.median(reference)
    ratio: FloatArray = draws[known] / reference[known]
    return ratio


def agreement(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a table: stds from draws over those of the linearised model, all sets and each.

    Keys: ``quantity`` (``energy``, ``forces``), ``reference`` (``exact``, ``same``), ``set`` (``""`` for
    all), ``n``, ``low``, ``median``, ``high`` (quartiles of the ratio), ``correlation`` (Pearson; ``None``
    for fewer than three), ``expected`` (relative sampling error of each ratio).
    """
    rows: list[dict[str, Any]] = []
    sets = result["sets"]
    for quantity in ("energy", "forces"):
        for reference in ("exact", "same"):
            groups = {"": list(sets), **{name: [name] for name in sets}}
            for title, names in groups.items():
                parts = [sets[n][quantity] for n in names if sets[n][quantity][reference] is not None]
                if not parts or (title and len(sets) == 1):
                    continue
                draws = np.concatenate([p["draws"] for p in parts])
                linear = np.concatenate([p[reference] for p in parts])
                low, median, high = quartiles(draws, linear)
                rows.append(
                    {
                        "quantity": quantity,
                        "reference": reference,
                        "set": title,
                        "n": int(_ratio(draws, linear).size),
                        "low": low,
                        "median": median,
                        "high": high,
                        "correlation": _correlation(draws, linear),
                        "expected": result["sampling_error"] if reference == "exact" else 0.0,
                    }
                )
    return rows


def _correlation(a: FloatArray, b: FloatArray) -> float | None:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _flat(values: Tensor) -> FloatArray:
    flat: FloatArray = values.detach().double().cpu().numpy().reshape(-1)
    return flat


def _list(values: FloatArray | None) -> list[float]:
    assert values is not None
    return [float(v) for v in values]
