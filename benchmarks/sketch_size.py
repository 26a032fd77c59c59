"""Memory and time of the sketched posterior against the number of frames.

    python benchmarks/sketch_size.py SiO2_zeo_EDI.extxyz.gz --frames 36 150 600 [--projections R]

SevenNet-0 as it comes; frames are evenly spread over the file (origin and licence: docs/data.md). Each number has a
process of its own: shown are its peak resident memory before and after the fit, and CPU seconds of the rows and of the
algebra beside those of 24 epochs of training, from the time of 16 steps of four frames. Graphs are not kept. Rows
go to benchmarks/results/sketch_size.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip_ft.backbones.registry import get_adapter
from blip_ft.closed_form.budget import fit_to_budget
from blip_ft.closed_form.gradients import GradientRows
from blip_ft.config import load_recipe
from blip_ft.data.batch.dataset import FrameDataset, GraphCache, collate
from blip_ft.data.read.sources import load_source
from blip_ft.families.base.linear import ClosedFormData
from blip_ft.families.sketch.posterior import SketchPosterior
from blip_ft.files import whole_file
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.system.memory_used import peak_bytes
from blip_ft.variational.noise import Noise

OUT = Path(__file__).parent / "results" / "sketch_size.json"
EPOCHS, STEPS, BATCH = 24, 16, 4


def measure(path: str, frames: int, wanted: int | None) -> dict[str, Any]:
    """One size."""
    torch.set_num_threads(1)
    every = load_source(path)
    chosen = np.unique(np.linspace(0, len(every) - 1, frames).round().astype(int)).tolist()
    recipe = load_recipe("sio2_sevennet", ["posterior={family: sketch}"])
    backbone = get_adapter("sevennet").load("7net-0")
    train = FrameDataset(every.select(chosen), backbone, GraphCache(0.0))
    sizes = train.sizes("atoms")
    recipe = fit_to_budget(recipe, backbone, sizes, 0, lambda line: print(line, file=sys.stderr))
    potential = BayesianPotential(backbone, recipe.model, recipe.posterior).to_dtype("float32")
    posterior, options = potential.posterior, recipe.posterior
    assert isinstance(posterior, SketchPosterior)
    cpu = torch.device("cpu")
    step = seconds_of_a_step(potential, train)
    before = peak_bytes(cpu)
    rows = GradientRows(recipe.objective, potential, train, seed=0, orthonormal=True)
    projections = wanted or options.projections_of_fit(last=True)
    started = time.process_time()
    collected = posterior.collect()
    for part in rows.features(collected.features, collected.width, projections):
        collected.add(part)
    made = time.process_time()
    report = posterior.fit(ClosedFormData(collected))
    done = time.process_time()
    training = EPOCHS * step * len(train)
    return {
        "frames": len(train),
        "rows": report["n_train_rows"],
        "projections": projections,
        "buckets": report["buckets"],
        "effective_parameters": report["effective_parameters"],
        "absorbed": report["absorbed"],
        "before_gb": before / 1e9,
        "peak_gb": peak_bytes(cpu) / 1e9,
        "rows_seconds": made - started,
        "algebra_seconds": done - made,
        "training_seconds": training,
        "share": (done - started) / training,
    }


def seconds_of_a_step(potential: BayesianPotential, train: FrameDataset) -> float:
    """Of training, for each frame: with forces, and the gradient of a loss on them."""
    seconds = 0.0
    for number in range(STEPS + 1):
        items = [train[(BATCH * number + i) % len(train)] for i in range(BATCH)]
        batch = collate(potential.backbone, items)
        started = time.process_time()
        out = potential(batch, Noise(), create_graph=True)
        assert out.forces is not None
        out.forces.square().sum().backward(inputs=potential.mean_parameters)
        seconds += time.process_time() - started if number else 0.0
        potential.zero_grad(set_to_none=True)
    return seconds / (STEPS * BATCH)


def main() -> None:
    """All sizes, each in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path")
    parser.add_argument("--frames", type=int, nargs="+", default=[36, 150, 600])
    parser.add_argument(
        "--projections", type=int, help="of each frame's forces; by default as a fit takes them"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.path, given.frames[0], given.projections)))
        return
    rows = []
    for frames in given.frames:
        command = [sys.executable, __file__, given.path, "--one", "--frames", str(frames)]
        if given.projections is not None:
            command += ["--projections", str(given.projections)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        with whole_file(OUT) as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
