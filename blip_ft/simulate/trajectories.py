"""K draws of the posterior as K trajectories, and what they say together.

A draw has the posterior's own width (or a share of it, ``amplitude``): the small width at which predictions are linear
would drown in the statistical error of a trajectory. Each trajectory has velocities and noise of its own, so that
the variance between them is the sum of both errors (:mod:`blip_ft.simulate.observables`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ase import Atoms

from blip_ft.errors import BlipError
from blip_ft.files import check_target, whole_file, whole_path
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.calibration import Calibration
from blip_ft.simulate.guard import Limits
from blip_ft.simulate.observables import BLOCKS, LEAST, Track, observables
from blip_ft.simulate.options import Dynamics
from blip_ft.simulate.output import check_output
from blip_ft.simulate.run import Outcome, Say, simulate

#: trajectories that a variance is taken of, at least
FEWEST = 4


@dataclass(frozen=True)
class Ensemble:
    """How draws are run.

    Attributes:
        trajectories: K.
        amplitude: width of the draws, in units of the posterior's.
        discard: share of the frames that is left out at the beginning, while the structure settles.
    """

    trajectories: int
    amplitude: float = 1.0
    discard: float = 0.2

    def __post_init__(self) -> None:
        if self.trajectories < FEWEST or self.trajectories % 2:
            raise BlipError(
                f"{self.trajectories} trajectories say little about a variance, or draws come in pairs",
                field="--trajectories",
                remedy=f"an even number of {FEWEST} or more",
            )
        if not 0 < self.amplitude <= 1:
            raise BlipError(
                f"{self.amplitude:g} is no width", field="--amplitude", remedy="above 0 and up to 1"
            )
        if not 0 <= self.discard < 1:
            raise BlipError(
                f"{self.discard:g} is no share", field="--discard", remedy="0 or more, and below 1"
            )


def files(target: Path, trajectories: int) -> tuple[list[Path], Path, Path]:
    """Trajectories, results and figure of an output's name."""
    stem = target.name.removesuffix(target.suffix)
    width = len(str(trajectories - 1))
    tracks = [target.with_name(f"{stem}.draw-{k:0{width}}{target.suffix}") for k in range(trajectories)]
    return tracks, target.with_name(f"{stem}.observables.json"), target.with_name(f"{stem}.observables.png")


def check_ensemble(
    target: Path, dynamics: Dynamics, ensemble: Ensemble, *, resume: bool, overwrite: bool
) -> None:
    """Refuse what cannot be run or evaluated, before anything is.

    Raises:
        BlipError: an output exists, or there would be too few frames.
    """
    tracks, *results = files(target, ensemble.trajectories)
    for track in tracks:
        check_output(track, resume=resume, overwrite=overwrite)
    for result in results:
        check_target(result, overwrite=overwrite or resume)
    frames = int((1 - ensemble.discard) * (dynamics.steps // dynamics.every + 1))
    if frames < BLOCKS * LEAST:
        raise BlipError(
            f"{frames} frames of each trajectory are too few for {BLOCKS} blocks of {LEAST}",
            field="--steps",
            remedy="more steps, or a smaller --every",
        )


def simulate_draws(
    potential: BayesianPotential,
    start: Atoms,
    target: str | Path,
    dynamics: Dynamics,
    ensemble: Ensemble,
    *,
    file: str = "the structure",
    thin_cell: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], Say] | None = None,
) -> tuple[dict[str, Any], list[Outcome]]:
    """Run every draw and write ``OUT.observables.json`` and its figure.

    Args:
        potential: the model.
        start: structure.
        target: name from which those of the trajectories are made, ``OUT.draw-0.extxyz`` and so on.
        dynamics: of each; the seed of draw k is ``seed + k``.
        ensemble: which draws.
        file: where the structure is from, for messages.
        thin_cell: as for :func:`simulate`.
        resume: go on with the trajectories that are there.
        overwrite: replace what is there.
        progress: called with the number of each trajectory, gives what is told of its progress.

    Returns:
        What the JSON holds, and how each trajectory has ended.

    Raises:
        BlipError: as :func:`simulate`; a model without draws; a draw whose run has exploded.
    """
    if not potential.posterior.ready:
        raise BlipError(
            "the model has no posterior to draw from", field="--trajectories", remedy="leave it out"
        )
    target, K = Path(target), ensemble.trajectories
    check_ensemble(target, dynamics, ensemble, resume=resume, overwrite=overwrite)
    tracks, results, picture = files(target, K)
    outcomes = []
    for k, path in enumerate(tracks):
        done = simulate(
            potential,
            start,
            path,
            replace(dynamics, seed=dynamics.seed + k),
            Limits(),
            file=file,
            draw=(k, K, ensemble.amplitude),
            thin_cell=thin_cell,
            resume=resume,
            overwrite=overwrite,
            progress=None if progress is None else progress(k),
        )
        if done.stopped:
            raise BlipError(
                f"draw {k}: {done.reason}",
                file=path,
                remedy="a draw of this width cannot be simulated: a smaller --amplitude, a lower temperature, or "
                "training frames of what it met",
            )
        outcomes.append(done)
    scale = (potential.calibration or Calibration.identity()).forces.scale
    found: dict[str, Any] = {
        "trajectories": K,
        "amplitude": ensemble.amplitude,
        "scale": scale,
        "discarded_share": ensemble.discard,
        "blocks": BLOCKS,
        "dynamics": dynamics.to_dict(),
        "observables": observables(
            [Track.read(path, ensemble.discard) for path in tracks], scale / ensemble.amplitude
        ),
    }
    # here, because matplotlib takes a second to import
    from blip_ft.report.theme import to_png
    from blip_ft.simulate.figures import observables_figure

    with whole_file(results) as text:
        json.dump(found, text, indent=1)
    with whole_path(picture) as path:
        path.write_bytes(to_png(observables_figure(found["observables"])))
    return found, outcomes
