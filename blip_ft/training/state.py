"""What training changes in a potential, as tensors and JSON: the pretrained weights, which stay, are not among it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from blip_ft.families.base.posterior import ClosedFormPosterior
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.distance import FeatureDistance
from blip_ft.training.pieces import Pieces

#: prefixes of the tensors of the out-of-distribution score, and of what a posterior can be updated with
OOD, STATISTICS = "ood.", "statistics."


def changing(potential: BayesianPotential, *, posterior: bool = True) -> list[str]:
    """Names in ``state_dict`` of what training changes.

    Args:
        potential: the model.
        posterior: those of the posterior too.
    """
    trained = {name for name, parameter in potential.named_parameters() if parameter.requires_grad}
    parts = ("prior.", "posterior.") if posterior else ("prior.",)
    return [
        name
        for name in potential.state_dict()
        if name.startswith(parts) or (name in trained and not name.startswith("posterior."))
    ]


def match_precision(potential: BayesianPotential, tensors: Mapping[str, Tensor]) -> None:
    """Give what is to be loaded the precision that it had: Lightning has converted what was made in another one."""
    own = {**dict(potential.named_parameters()), **dict(potential.named_buffers())}
    for name, tensor in tensors.items():
        if name in own and own[name].dtype != tensor.dtype:
            own[name].data = own[name].data.to(tensor.dtype)


def numbers_of(potential: BayesianPotential) -> dict[str, Any]:
    """What no tensor holds: as JSON gives it back, so that it is the same before and after."""
    reports = json.loads(json.dumps(potential.fit_reports))
    return {
        "amplitude": float(potential.amplitude),
        "prior_scale": float(potential.prior.prior_scale),
        "fit_reports": reports,
    }


def set_numbers(potential: BayesianPotential, numbers: Mapping[str, Any]) -> None:
    """The inverse of :func:`numbers_of`."""
    potential.amplitude = numbers["amplitude"]
    potential.prior.prior_scale = numbers["prior_scale"]
    potential.fit_reports[:] = numbers["fit_reports"]


def keep_state(
    pieces: Pieces | None,
    name: str,
    potential: BayesianPotential,
    *,
    posterior: bool = True,
    statistics: bool = False,
    **about: Any,
) -> None:
    """Keep what training has changed so far.

    Args:
        pieces: where; ``None``: nowhere.
        name: of the piece.
        potential: the model.
        posterior: with the posterior, whose covariance can be a hundred times the rest.
        statistics: with what it can be updated with.
        about: what else belongs to this place of the run, as JSON has it.
    """
    if pieces is None:
        return
    state = potential.state_dict()
    tensors: dict[str, Tensor] = {key: state[key] for key in changing(potential, posterior=posterior)}
    if potential.ood is not None:
        tensors |= {OOD + key: value for key, value in potential.ood.tensors().items()}
    if statistics and isinstance(potential.posterior, ClosedFormPosterior):
        tensors |= {STATISTICS + key: value for key, value in potential.posterior.statistics().items()}
    pieces.keep_tensors(name, tensors, numbers_of(potential) | about | {"with_posterior": posterior})


def recall_state(pieces: Pieces | None, name: str, potential: BayesianPotential) -> dict[str, Any] | None:
    """Put a potential into the state of a piece.

    Returns:
        What was kept about it; ``None`` if the piece is not whole, and then the potential is as before.
    """
    found = None if pieces is None else pieces.tensors(name)
    if found is None:
        return None
    tensors, about = found
    ood = {k.removeprefix(OOD): tensors.pop(k) for k in list(tensors) if k.startswith(OOD)}
    statistics = {
        k.removeprefix(STATISTICS): tensors.pop(k) for k in list(tensors) if k.startswith(STATISTICS)
    }
    if tensors.keys() != set(
        changing(potential, posterior=about["with_posterior"])
    ):  # of another model: not a piece of this run
        return None
    match_precision(potential, tensors)
    potential.load_state_dict(tensors, strict=False)
    potential.ood = FeatureDistance.from_tensors(ood) if ood else None
    if statistics and isinstance(potential.posterior, ClosedFormPosterior):
        potential.posterior.set_statistics(statistics)
    set_numbers(potential, about)
    return about
