"""What converted models cost, as ratios to the untouched backbone, side by side in one run.

    python benchmarks/cost.py [--backends sevennet chgnet diep mace uma orb] [--rounds 15] [--sizes 1 16] [--device cpu]
    python benchmarks/cost.py --fit [--device cpu]     # the shipped recipe's posterior against 24 epochs, once
    python benchmarks/cost.py --md [--sizes 1 8]       # steps of dynamics with error bars against those without

Every round times each variant once, in a random order, and takes its ratio to the reference of the
same round; shown are the median ratio and its quartiles. The reference of the calls is the
untouched backbone's energies and forces, that of the training steps the converted model's step
without noise (which is what plain fine-tuning does), that of dynamics the same run with ``--draws 0``, in float64, in
supercells of ``sizes`` cells; frames and logs are written in both. Memory is what a step keeps for its backward
pass, each storage once. Frames: quartz, 9 atoms. Writes benchmarks/results/cost.json, and keeps there what other
backends, batch sizes and devices have, as backends need several environments. ``mace``, ``uma`` and ``orb``
are the small models of tests/models, on which what is added weighs more than on the foundations that they stand
for.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from blip_ft.backbones.protocol import Backbone, Batch
from blip_ft.backbones.registry import get_adapter
from blip_ft.closed_form.fitter import ClosedFormFitter
from blip_ft.config import ModelConfig, ObjectiveConfig, PosteriorConfig, load_recipe
from blip_ft.data.batch.dataset import collate
from blip_ft.families.registry import without_foreign_keys
from blip_ft.objectives import Likelihood
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.simulate.forces import Forces
from blip_ft.simulate.guard import Limits
from blip_ft.simulate.options import Dynamics
from blip_ft.simulate.output import Output
from blip_ft.simulate.run import Run
from blip_ft.training.fit import prepare
from blip_ft.uncertainty.predict import Method, predict_batch
from blip_ft.variational.noise import OFF, Noise

OUT = Path(__file__).parent / "results" / "cost.json"
STAND_INS = Path(__file__).parents[1] / "tests" / "models"


@dataclass(frozen=True)
class Model:
    """A model that needs no download."""

    adapter: str
    checkpoint: str
    options: dict[str, str] = field(default_factory=dict)


BACKENDS = {
    "sevennet": Model("sevennet", "7net-0"),
    "chgnet": Model("chgnet", "0.3.0"),
    "diep": Model("diep", "fold1"),
    "mace": Model("mace", str(STAND_INS / "sio2_mace.model")),
    "uma": Model("fairchem", str(STAND_INS / "sio2_uma.pt"), {"task": "omat"}),
    "orb": Model("orb", str(STAND_INS / "sio2_orb.ckpt"), {"architecture": "orb-v3-conservative-inf-omat"}),
}
#: without ``--backends``: real foundations, whose weights are in their packages
DEFAULT = ("sevennet", "chgnet")
RANK = 64
#: most that a ratio should be
TARGETS = {
    "converted, no noise": 1.03,
    "energy_std in one pass": 1.25,
    "8 draws": {"cpu": 7.2, "cuda": 3.0},
    "8 draws and energy_std, default": {"cpu": 7.2, "cuda": 3.0},
    "step, local": 1.2,
    "step, structure": 1.35,
    "memory of a step, structure": 1.3,
    "whole fit": 1.0,
    "md, every 10": 1.3,
    "md, every 20": 1.3,
}


def quartz(n: int) -> list[Any]:
    """n different frames of quartz, rattled."""
    from ase.spacegroup import crystal

    cell = crystal(
        ["Si", "O"],
        [(0.4697, 0, 1 / 3), (0.4133, 0.2672, 0.2142)],
        spacegroup=152,
        cellpar=[4.916, 4.916, 5.405, 90, 90, 120],
    )
    out = []
    for seed in range(n):
        out.append(cell.copy())
        out[-1].rattle(0.05, seed=seed)
    return out


def potential_of(backbone: Backbone, name: str, family: str, noise: str) -> BayesianPotential:
    potential = BayesianPotential(
        copy.deepcopy(backbone),
        ModelConfig(adapter=BACKENDS[name].adapter, checkpoint=BACKENDS[name].checkpoint, noise=noise),
        PosteriorConfig(
            **without_foreign_keys({"family": family, "rank": RANK, "prior_scale": 0.1, "init_std": 0.003})
        ),
        n_draws=8,
    )
    if family == "subspace":  # any directions cost the same
        posterior = potential.posterior
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(posterior.directions.shape, generator=generator)
        posterior.directions.copy_(rows / rows.norm(dim=1, keepdim=True))
        posterior.set_covariance(np.eye(RANK), 0.01, 1.0)
    if family == "pathwise":
        generator = torch.Generator().manual_seed(0)
        potential.posterior.directions.copy_(
            0.01 * torch.randn(potential.posterior.directions.shape, generator=generator) / RANK**0.5
        )
        potential.amplitude = 0.03
    return potential


def timed(call: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def saved_bytes(call: Callable[[], object]) -> int:
    """Bytes that are kept for the backward pass while ``call`` runs."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storages.values())


def ratios(
    variants: dict[str, Callable[[], object]], reference: str, rounds: int, device: str
) -> dict[str, list[float]]:
    rng = np.random.default_rng(0)
    for call in variants.values():
        call()
        call()
    out: dict[str, list[float]] = {name: [] for name in variants if name != reference}
    for _ in range(rounds):
        times = {name: timed(variants[name], device) for name in rng.permutation(list(variants))}
        for name, values in out.items():
            values.append(times[name] / times[reference])
    return out


def labelled(backbone: Backbone, n: int, device: str) -> Batch:
    batch = backbone.batch(quartz(n)).to(device)
    batch.keys = list(range(n))
    prediction = backbone(batch)
    batch.labels = {"energy": prediction.energy.detach() + 0.01, "forces": prediction.forces.detach() + 0.01}
    return batch


def step(potential: BayesianPotential, batch: Batch, mode: str) -> Callable[[], None]:
    likelihood = Likelihood(ObjectiveConfig()).to(potential.backbone.device)

    def call() -> None:
        prediction = potential(batch, Noise(mode), create_graph=True)
        loss = likelihood(prediction, batch).total.sum() + potential.kl()
        loss.backward()
        potential.zero_grad(set_to_none=True)

    return call


def measure(
    backbone: Backbone, name: str, size: int, rounds: int, device: str, console: Console
) -> list[dict[str, Any]]:
    """Rows of one backend and batch size."""
    batch = labelled(backbone, size, device)
    subspace = potential_of(backbone, name, "subspace", "scalar").to(device)
    channel = potential_of(backbone, name, "channel", "scalar").to(device)
    default = potential_of(backbone, name, "pathwise", "scalar").to(device)

    def predict(potential: BayesianPotential, method: Method, n: int | None = None) -> Callable[[], object]:
        return lambda: predict_batch(potential, batch, stress=False, method=method, n_draws=n)

    console.print(f"{name}, batch of {size}: calls")
    calls = {
        "untouched": lambda: backbone(batch, stress=False),
        "converted, no noise": lambda: subspace(batch, OFF),
        "energy_std in one pass": predict(subspace, "energy"),
        "energy_std in one pass, channel": predict(channel, "energy"),
        "8 draws": predict(subspace, "draws"),
        "8 draws and energy_std, default": predict(default, "draws"),
        "energy_std in one pass, default": predict(default, "energy"),
        "16 directions": predict(subspace, "linear", 16),
    }
    found = ratios(calls, "untouched", rounds, device)
    console.print(f"{name}, batch of {size}: training steps")
    steps = {
        "step, no noise": step(subspace, batch, "off"),
        "step, local": step(channel, batch, "local"),
        "step, structure": step(subspace, batch, "structure"),
        "step, structure, default": step(default, batch, "structure"),
        "step, structure, channel": step(channel, batch, "structure"),
    }
    found |= ratios(steps, "step, no noise", rounds, device)
    kept = saved_bytes(steps["step, no noise"])
    found["memory of a step, structure"] = [saved_bytes(steps["step, structure"]) / kept]
    rows = []
    for what, values in found.items():
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        row = {"backend": name, "batch": size, "device": device, "what": what}
        rows.append(row | {"ratio": median, "low": low, "high": high, "target": target(what, device)})
    return rows


def target(what: str, device: str) -> float | None:
    found = TARGETS.get(what)
    return found[device.partition(":")[0]] if isinstance(found, dict) else found


def measure_fit(device: str, console: Console) -> list[dict[str, Any]]:
    """The final fit of the shipped recipe, with its step of the mean, over 24 epochs of plain fine-tuning.

    At the pretrained weights; of the epochs one is timed, its forward and backward passes alone.
    """
    accelerator = "cpu" if device == "cpu" else "gpu"
    recipe = load_recipe("sio2_sevennet", [f"trainer.accelerator={accelerator}"])
    prepared = prepare(recipe, Console(quiet=True))
    potential, train = prepared.potential.to(device), prepared.sets["train"]
    size = recipe.data.batch_size
    starts = range(0, len(train), size)
    parts = [[train[i] for i in range(start, min(start + size, len(train)))] for start in starts]
    steps = [step(potential, collate(potential.backbone, part).to(device), "off") for part in parts]
    steps[0]()
    epochs = recipe.trainer["max_epochs"] * sum(timed(one, device) for one in steps)
    console.print(f"{recipe.trainer['max_epochs']} epochs: {epochs:.0f} s; now the fit")
    fitter = ClosedFormFitter(recipe, potential, prepared.sets, console)
    rows = timed(lambda: fitter.rows.rows(None), device) / epochs
    whole = timed(lambda: fitter.fit(final=True), device) / epochs
    common = {"backend": "sevennet", "batch": len(train), "device": device}
    return [
        common | {"what": what, "ratio": ratio, "low": ratio, "high": ratio, "target": target(what, device)}
        for what, ratio in (("gradients of all labels", rows), ("whole fit", whole))
    ]


def measure_md(
    backbone: Backbone, name: str, size: int, rounds: int, device: str, console: Console
) -> list[dict[str, Any]]:
    """Steps of NVE with error bars over those without, of ``size`` cells of quartz."""
    potential = potential_of(backbone.to(torch.float64), name, "pathwise", "scalar").to(device)
    (cell,) = quartz(1)
    start = cell * {1: (1, 1, 1), 2: (1, 1, 2), 4: (1, 2, 2), 8: (2, 2, 2)}[size]
    console.print(f"{name}, {len(start)} atoms: dynamics")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:

        def run(every: int, draws: int | None) -> Callable[[], object]:
            options = Dynamics("nve", 20, temperature=300.0, every=every, draws=draws)
            output = Output(Path(folder) / f"{every}-{draws}.extxyz", {}, resume=False, overwrite=False)
            stack.callback(output.close)
            one = Run(start, options, Limits(), Forces(potential, stress=False), output)
            one.begin("quartz")

            def twenty_steps() -> None:
                one.dynamics = replace(options, steps=one.step + 20)
                one.go_on(None)

            return twenty_steps

        found: dict[str, list[float]] = {}
        for every in (10, 20):
            calls = {"without": run(every, 0), f"md, every {every}": run(every, None)}
            found |= ratios(calls, "without", rounds, device)
    common = {"backend": name, "batch": size, "device": device}
    rows = []
    for what, values in found.items():
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        rows.append(
            common | {"what": what, "ratio": median, "low": low, "high": high, "target": target(what, device)}
        )
    return rows


def of_dynamics(row: dict[str, Any]) -> bool:
    return bool(row["what"].startswith("md"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", default=DEFAULT, choices=sorted(BACKENDS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", nargs="+", type=int, default=(1, 16), help="structures per batch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fit", action="store_true", help="time the fit of the posterior instead")
    parser.add_argument("--md", action="store_true", help="time dynamics with error bars instead")
    parser.add_argument("--output", type=Path, default=OUT)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in () if given.fit else given.backends:
        model = BACKENDS[name]
        backbone = get_adapter(model.adapter).load(model.checkpoint, **model.options).to(given.device)
        for size in given.sizes:
            what = measure_md if given.md else measure
            rows += what(backbone, name, size, given.rounds, given.device, Console(stderr=True))
    if given.fit:
        rows += measure_fit(given.device, Console(stderr=True))
    new = {(r["backend"], r["batch"], r["device"], of_dynamics(r)) for r in rows}
    kept = json.loads(given.output.read_text()) if given.output.exists() else []
    kept = [r for r in kept if (r["backend"], r["batch"], r["device"], of_dynamics(r)) not in new]
    given.output.write_text(json.dumps([*kept, *rows], indent=1) + "\n")
    table = Table("backend", "batch", "what", "ratio", "quartiles", "target")
    for r in rows:
        target = "" if r["target"] is None else f"{r['target']:.2f}"
        quartiles = f"{r['low']:.2f} to {r['high']:.2f}"
        table.add_row(r["backend"], str(r["batch"]), r["what"], f"{r['ratio']:.2f}", quartiles, target)
    Console().print(table)


if __name__ == "__main__":
    main()
