"""A training step of plain fine-tuning beside the vendor's own trainer's, same model, frames and batch, in one process.

    python benchmarks/trainer_step.py sevennet [--rounds 9] [--threads 1]
    python benchmarks/trainer_step.py mace mace-small mace-medium

``sevenn.train.trainer.Trainer.run_one_epoch`` on SevenNet-0, and ``mace.tools.train.take_step`` (what
``mace_run_train`` calls) on the small MACE of tests/models and on models with the sizes of MACE-MP small and
medium, whose weights are
random: a step costs the same. Both sides train all weights on energies and forces by Adam, four frames a step;
graphs are made before. Every round times each side once, in turn, and gives one ratio; shown are median and
quartiles. Writes benchmarks/results/trainer_step.json and keeps there what other models have, as they need two
environments.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from rich.console import Console
from rich.table import Table

from blip_ft.backbones.conservative import weights_only
from blip_ft.backbones.protocol import Backbone
from blip_ft.backbones.registry import get_adapter
from blip_ft.config import ModelConfig, ObjectiveConfig, PosteriorConfig, load_recipe
from blip_ft.data.batch.dataset import collate, make_item
from blip_ft.data.frame import to_atoms
from blip_ft.data.split.splits import load_splits
from blip_ft.objectives import Likelihood
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.system.allocator import keep_memory
from blip_ft.system.side_by_side import width
from blip_ft.variational.noise import OFF

OUT = Path(__file__).parent / "results" / "trainer_step.json"
STAND_IN = Path(__file__).parents[1] / "tests" / "models" / "sio2_mace.model"
BATCH, N_BATCHES = 4, 4
#: hidden irreps of MACE-MP-0
SIZES = {"mace-small": "128x0e", "mace-medium": "128x0e+128x1o"}
MODELS = ("sevennet", "mace", *SIZES)
Step = Callable[[int], object]


def backbone_of(name: str) -> Backbone:
    """The untouched model."""
    if name == "sevennet":
        return get_adapter("sevennet").load("7net-0")
    small = get_adapter("mace").load(str(STAND_IN), trust=True)
    if name == "mace":
        return small
    torch.manual_seed(0)
    changes = {
        "hidden_irreps": SIZES[name],
        "MLP_irreps": "16x0e",
        "max_ell": 3,
        "correlation": 3,
        "r_max": 6.0,
    }
    changes |= {"radial_MLP": [64, 64, 64], "num_bessel": 10}
    config = small.config()
    return type(small).from_config(config | {"architecture": config["architecture"] | changes})


def ours(backbone: Backbone, rows: list[dict[str, Any]]) -> Step:
    """A step as ``blip-finetune fit`` takes it with ``plain``."""
    potential = BayesianPotential(
        backbone, ModelConfig(adapter=backbone.name, checkpoint="-"), PosteriorConfig()
    )
    likelihood = Likelihood(ObjectiveConfig())
    items = [make_item(row, backbone) for row in rows]
    batches = [
        collate(backbone, items[i : i + BATCH], parts=width("cpu")) for i in range(0, len(items), BATCH)
    ]
    parameters = [p for p in potential.mean_parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step(n: int) -> None:
        batch = batches[n]
        optimizer.zero_grad(set_to_none=True)
        loss = likelihood(potential(batch, OFF, create_graph=True), batch).total.sum()
        with weights_only():
            loss.backward(inputs=parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()

    return step


def sevenn_trainer(backbone: Any, frames: list[Atoms]) -> Step:
    """The vendor's, on a copy of the model."""
    from sevenn.atom_graph_data import AtomGraphData
    from sevenn.train.dataload import atoms_to_graph
    from sevenn.train.loss import ForceLoss, PerAtomEnergyLoss
    from sevenn.train.trainer import Trainer
    from torch_geometric.loader import DataLoader

    graphs = [
        AtomGraphData.from_numpy_dict(atoms_to_graph(a, backbone.cutoff, y_from_calc=True)) for a in frames
    ]
    losses = [
        (PerAtomEnergyLoss(criterion=torch.nn.MSELoss()), 1.0),
        (ForceLoss(criterion=torch.nn.MSELoss()), 0.1),
    ]
    trainer = Trainer(copy.deepcopy(backbone.model), losses, torch.optim.Adam, {"lr": 1e-5}, device="cpu")
    batches = list(DataLoader(graphs, batch_size=BATCH))
    return lambda n: trainer.run_one_epoch([batches[n].clone()], is_train=True)


def mace_trainer(backbone: Any, frames: list[Atoms]) -> Step:
    """The vendor's, on its model with TorchScript kernels, as it trains."""
    from mace.data import AtomicData, KeySpecification, config_from_atoms
    from mace.modules import WeightedEnergyForcesLoss
    from mace.tools import AtomicNumberTable, torch_geometric
    from mace.tools.train import take_step

    from blip_ft.adapters.mace import vendor

    model = vendor.build(backbone.architecture, stock=True).to(backbone.dtype)
    model.load_state_dict(backbone.model.state_dict())
    keys, table = KeySpecification.from_defaults(), AtomicNumberTable(backbone.numbers)
    data = []
    for atoms in frames:
        marked = atoms.copy()
        marked.info["REF_energy"] = atoms.get_potential_energy()
        marked.arrays["REF_forces"] = atoms.get_forces()
        config = config_from_atoms(marked, key_specification=keys)
        data.append(AtomicData.from_config(config, z_table=table, cutoff=backbone.cutoff))
    batches = list(torch_geometric.dataloader.DataLoader(data, batch_size=BATCH))
    loss = WeightedEnergyForcesLoss(energy_weight=1.0, forces_weight=100.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, amsgrad=True)
    wanted = {"forces": True, "virials": False, "stress": False}

    def step(n: int) -> None:
        take_step(
            model=model,
            loss_fn=loss,
            batch=batches[n].clone(),
            optimizer=optimizer,
            ema=None,
            output_args=wanted,
            max_grad_norm=10.0,
            device=torch.device("cpu"),
        )

    return step


def compare(name: str, rounds: int) -> dict[str, Any]:
    """Ratios of one model."""
    backbone = backbone_of(name)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(backbone.dtype)  # mace's data are of the default type
    train = load_splits(load_recipe("sio2_sevennet", []).data).roles()["train"]
    stride = len(train) // (BATCH * N_BATCHES)
    rows = [train[i * stride] for i in range(BATCH * N_BATCHES)]
    frames = []
    for row in rows:
        atoms = to_atoms(row, labels=False)
        results = {"energy": row["energy"], "forces": row["forces"], "stress": row["stress"]}
        atoms.calc = SinglePointCalculator(atoms, **{k: v for k, v in results.items() if v is not None})
        frames.append(atoms)
    trainer = sevenn_trainer if name == "sevennet" else mace_trainer
    sides = {"trainer": trainer(backbone, frames), "ours": ours(backbone, rows)}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds + 2):  # two that compile and fill caches; TorchScript recompiles in its second call
        for side, step in sides.items():
            started = time.perf_counter()
            for n in range(N_BATCHES):
                step(n)
            times[side].append((time.perf_counter() - started) / N_BATCHES)
    torch.set_default_dtype(dtype)
    ratios = [a / b for a, b in zip(times["ours"][2:], times["trainer"][2:], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": median,
        "quartiles": [low, high],
        "atoms": sum(map(len, frames)) / N_BATCHES,
        **{f"{side}_ms": 1e3 * statistics.median(t[2:]) for side, t in times.items()},
    }


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: quartiles need two or more")
    keep_memory()
    torch.set_num_threads(arguments.threads)
    known = json.loads(OUT.read_text()) if OUT.exists() else {}
    table = Table("model", "trainer, ms", "ours, ms", "ratio", "quartiles")
    for name in arguments.models:
        row = compare(name, arguments.rounds) | {"threads": arguments.threads}
        known[name] = row
        low, high = row["quartiles"]
        table.add_row(
            name,
            f"{row['trainer_ms']:.0f}",
            f"{row['ours_ms']:.0f}",
            f"{row['ratio']:.3f}",
            f"{low:.3f} to {high:.3f}",
        )
    OUT.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
