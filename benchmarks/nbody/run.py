"""N-body: error and error bars of one model, an ensemble and Bayesian forms of the same networks.

    python -m benchmarks.nbody.run train --methods plain adaptive --sizes 3000 --seeds 0 1 2 [--epochs 1000]
    python -m benchmarks.nbody.run table

One row of benchmarks/results/nbody.json per architecture, method, size and seed; what is there is not made again. All
methods have the same optimiser, epochs, batches and samples (2,000 to choose the epoch and the scale of the error
bars, 2,000 to judge). Scores are of 100 samples; ``crps`` and ``nll`` after one factor on the stds that the validation
samples choose, ``crps_raw`` of the samples as they are. NLL in nats per coordinate.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import norm, spearmanr
from torch import Tensor, nn

from blip_ft import BayesianModule
from blip_ft.objectives.crps import fair_crps, gaussian_crps
from blip_ft.variational.noise import Noise

from .data import Samples, load
from .models import MODELS, NOISY, ROWS, WIDTH, rows_of

OUT = Path(__file__).parents[1] / "results" / "nbody.json"
SIZES, JUDGED, BATCH = (100, 300, 1000, 3000), 2000, 100
#: samples of the posterior in predictions, members of an ensemble, and samples of a training step by CRPS
SAMPLES, MEMBERS, TRAINED = 100, 5, 4
#: epochs between two looks at the validation samples
EVERY = 10


class Method:
    """A network and how it is trained and sampled.

    Args:
        architecture: key of ``MODELS``.
        seed: of weights, batches and noise.
        options: of the command line.
    """

    bayesian = True

    def __init__(self, architecture: str, seed: int, options: argparse.Namespace) -> None:
        torch.manual_seed(seed)
        self.options, self.seed = options, seed
        self.model = self.make(MODELS[architecture])

    def make(self, network: Callable[..., nn.Module]) -> nn.Module:
        """The module that is trained."""
        return network()

    def loss(self, batch: Samples, keys: list[int], epoch: int) -> Tensor:
        """Of a batch of training samples, of the mean squared error's size."""
        error: Tensor = (self.model(batch) - batch.target).square().mean()
        return error

    def mean(self, batch: Samples) -> Tensor:
        """(N, 5, 3) one prediction."""
        out: Tensor = self.model(batch)
        return out

    def samples(self, batch: Samples) -> Tensor:
        """(K, N, 5, 3) predictions."""
        return self.mean(batch)[None]


class Plain(Method):
    """One network; its error bar is the RMSE of validation samples."""

    bayesian = False


class Dropout(Method):
    """MC dropout (Gal and Ghahramani, ICML 2016)."""

    def make(self, network: Callable[..., nn.Module]) -> nn.Module:
        return network(dropout=self.options.dropout)

    def mean(self, batch: Samples) -> Tensor:
        self.model.eval()
        out: Tensor = self.model(batch)
        self.model.train()
        return out

    def samples(self, batch: Samples) -> Tensor:
        return torch.stack([self.model(batch) for _ in range(SAMPLES)])


class Blip(Method):
    """Variational layers by ``blip_ft.BayesianModule``."""

    family, mode = "weight", "structure"

    def settings(self) -> dict[str, Any]:
        """Keys of the posterior."""
        return {"mode": self.mode, "prior_scale": 0.3, "init_std": 0.01}

    def make(self, network: Callable[..., nn.Module]) -> nn.Module:
        return BayesianModule(
            network(),
            family=self.family,
            train="rest",
            noise=NOISY,
            rows=ROWS,
            seed=self.seed,
            n_draws=SAMPLES,
            **self.settings(),
        )

    @property
    def bayes(self) -> BayesianModule:
        """The model."""
        assert isinstance(self.model, BayesianModule)
        return self.model

    def loss(self, batch: Samples, keys: list[int], epoch: int) -> Tensor:
        noise = Noise(self.mode, epoch=epoch)  # type: ignore[arg-type]
        out = self.bayes(batch, noise=noise, keys=keys, rows=rows_of(len(batch)))
        own = self.bayes.converted.noise.structure_kl
        kl = self.bayes.kl() if own is None else own.mean()
        error: Tensor = (out - batch.target).square().mean()
        return error + self.options.kl * kl / self.bayes.posterior.n_weights

    def samples(self, batch: Samples) -> Tensor:
        return self.bayes.draws(batch)


class Adaptive(Blip):
    """Spread from an inference network, one sample of weights per structure."""

    family = "adaptive"


class Published(Adaptive):
    """The paper's: independent noise per row, dropout prior with p0 = 0.5, KL averaged over weights.

    Its inference network reads x_i, x_j and a_ij; ours the input of each layer.
    """

    mode = "local"

    def settings(self) -> dict[str, Any]:
        return {"mode": "local", "prior": "dropout", "prior_scale": 1.0, "init_std": 0.1, "max_std": 2.0}

    def samples(self, batch: Samples) -> Tensor:
        noises = [Noise("local", sample=k) for k in range(SAMPLES)]
        keys, rows = list(range(len(batch))), rows_of(len(batch))
        return torch.stack([self.bayes(batch, noise=n, keys=keys, rows=rows) for n in noises])


class _Pushed(nn.Module):
    """A linear layer whose output a number that all rows of a sample share pushes along learned directions."""

    def __init__(self, base: nn.Linear, latent: int = 32) -> None:
        super().__init__()
        self.base, self.push = base, nn.Linear(latent, base.out_features, bias=False)
        nn.init.zeros_(self.push.weight)
        self.z: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        return out if self.z is None else out + self.push(self.z)


class PMLIP(Method):
    """One noise vector per sample into the first layer of each network, trained by CRPS (arXiv 2605.19939)."""

    def make(self, network: Callable[..., nn.Module]) -> nn.Module:
        model = network()
        self.pushed: list[tuple[str, _Pushed]] = []
        self.to_noise = nn.Linear(32, 32, bias=False)
        model.add_module("to_noise", self.to_noise)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Sequential) and name.endswith(("message", "update")):
                module[0] = _Pushed(module[0])
                self.pushed.append((name, module[0]))
        return model

    def drawn(self, batch: Samples, generator: torch.Generator | None = None) -> Tensor:
        """A prediction with one noise vector for each sample."""
        z = self.to_noise(torch.randn(len(batch), 32, generator=generator))
        rows = rows_of(len(batch))
        for name, layer in self.pushed:
            layer.z = z[rows["edge" if name.endswith("message") else "body"]]
        try:
            out: Tensor = self.model(batch)
        finally:
            for _, layer in self.pushed:
                layer.z = None
        return out

    def loss(self, batch: Samples, keys: list[int], epoch: int) -> Tensor:
        return fair_crps(torch.stack([self.drawn(batch) for _ in range(TRAINED)]), batch.target).mean()

    def samples(self, batch: Samples) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.stack([self.drawn(batch, generator) for _ in range(SAMPLES)])


METHODS: dict[str, type[Method]] = {
    "plain": Plain,
    "mc_dropout": Dropout,
    "blip_published": Published,
    "adaptive": Adaptive,
    "weight": Blip,
    "pmlip": PMLIP,
}


def train(method: Method, data: Samples, validation: Samples, epochs: int) -> float:
    """Adam with a cosine; keeps the epoch whose mean prediction is the best on validation. Returns CPU seconds."""
    started = time.process_time()
    parameters = [p for p in method.model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=method.options.rate, weight_decay=1e-12)
    steps = epochs * -(-len(data) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(method.seed)
    best, kept = float("inf"), copy.deepcopy(method.model.state_dict())
    for epoch in range(epochs):
        for index in torch.randperm(len(data), generator=generator).split(BATCH):
            optimizer.zero_grad()
            method.loss(data[index], index.tolist(), epoch).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
            schedule.step()
        if epoch % EVERY == EVERY - 1 or epoch + 1 == epochs:
            with torch.no_grad():
                error = float((method.mean(validation) - validation.target).square().mean())
            if error < best:
                best, kept = error, copy.deepcopy(method.model.state_dict())
    method.model.load_state_dict(kept)
    return time.process_time() - started


@torch.no_grad()
def predict(methods: list[Method], samples: Samples) -> Tensor:
    """(K, N, 5, 3) of one method, or of the members of an ensemble, in parts that fit into memory."""
    parts = []
    for first in range(0, len(samples), BATCH):
        part = samples[slice(first, first + BATCH)]
        parts.append(torch.cat([m.samples(part) for m in methods]))
    return torch.cat(parts, dim=1)


def scores(of_validation: Tensor, of_test: Tensor, validation: Samples, test: Samples) -> dict[str, float]:
    """Scores of the test samples, with the factor on the stds that validation samples choose."""

    def moments(drawn: Tensor, target: Tensor) -> tuple[np.ndarray, np.ndarray]:
        error = (target - drawn.mean(dim=0)).double().numpy()
        if len(drawn) == 1:
            return error, np.ones_like(error)
        return error, drawn.double().std(dim=0).clamp(min=1e-9).numpy()

    error, std = moments(of_validation, validation.target)
    rms = np.sqrt(np.mean((error / std) ** 2))
    nll: Callable[[float], float] = lambda c: float(-norm.logpdf(error, scale=np.exp(c) * std).mean())
    factor = float(
        np.exp(minimize_scalar(nll, bounds=(np.log(rms) - 4, np.log(rms) + 1), method="bounded").x)
    )
    error, raw = moments(of_test, test.target)
    std = factor * raw
    body, spread = np.sqrt((error**2).sum(axis=2)).ravel(), np.sqrt((std**2).sum(axis=2)).ravel()
    null = test.velocity.norm(dim=2).double().numpy().ravel()
    return {
        "mse_x10": 10 * float(np.mean(error**2)),
        "nll": float(-norm.logpdf(error, scale=std).mean()),
        "crps": float(gaussian_crps(error, std).mean()),
        "crps_raw": raw_crps(of_test, test.target),
        "coverage90": float(np.mean(np.abs(error) < norm.ppf(0.95) * std)),
        "spearman": float(spearmanr(spread, body).statistic) if len(of_test) > 1 else float("nan"),
        "spearman_null_speed": abs(float(spearmanr(null, body).statistic)),
        "factor": factor,
    }


def raw_crps(samples: Tensor, target: Tensor) -> float:
    """CRPS of samples as they are; of one sample its absolute error."""
    if len(samples) == 1:
        return float((samples[0] - target).abs().mean())
    return float(fair_crps(samples, target).mean())


def read() -> list[dict[str, Any]]:
    """All rows so far."""
    return list(json.loads(OUT.read_text(encoding="utf-8"))) if OUT.exists() else []


def run(args: argparse.Namespace) -> None:
    """Train what is not there yet."""
    torch.set_num_threads(1)
    everything = load(args.folder, "train", max(SIZES))
    validation, test = load(args.folder, "validation", JUDGED), load(args.folder, "test", JUDGED)
    for seed in args.seeds:
        for architecture in args.architectures:
            for size in args.sizes:
                for name in args.methods:
                    cell = {
                        "dataset": "nbody",
                        "architecture": architecture,
                        "method": name,
                        "n_train": size,
                        "seed": seed,
                        "epochs": args.epochs,
                    }
                    if any(cell.items() <= row.items() for row in read()):
                        continue
                    members = MEMBERS if name == "ensemble" else 1
                    kind = METHODS["plain" if name == "ensemble" else name]
                    trained, seconds = [], 0.0
                    for member in range(members):
                        trained.append(kind(architecture, 10 * seed + member, args))
                        seconds += train(trained[-1], everything[slice(0, size)], validation, args.epochs)
                    found = scores(predict(trained, validation), predict(trained, test), validation, test)
                    options = {"kl": args.kl, "dropout": args.dropout, "rate": args.rate}
                    row = cell | found | {"seconds": round(seconds, 1), "options": options, "width": WIDTH}
                    OUT.write_text(json.dumps([*read(), row], indent=1) + "\n", encoding="utf-8")
                    print(json.dumps(row), flush=True)


def table(args: argparse.Namespace) -> None:
    """Mean and spread over seeds, as Markdown."""
    columns = ("mse_x10", "nll", "crps", "crps_raw", "coverage90", "spearman")
    rows = read()
    print("| architecture | samples | method | seeds | " + " | ".join(columns) + " | cost |")
    print("|---" * (len(columns) + 5) + "|")
    for key in sorted({(r["architecture"], r["n_train"], r["epochs"]) for r in rows}):
        some = [r for r in rows if (r["architecture"], r["n_train"], r["epochs"]) == key]
        plain = [r["seconds"] for r in some if r["method"] == "plain"]
        for name in ("plain", "ensemble", *list(METHODS)[1:]):
            of = [r for r in some if r["method"] == name]
            if not of:
                continue
            cells = [f"{np.mean([r[c] for r in of]):.4f} ({np.std([r[c] for r in of]):.4f})" for c in columns]
            cost = f"{np.mean([r['seconds'] for r in of]) / np.mean(plain):.1f}" if plain else "–"
            print(f"| {key[0]} | {key[1]} | {name} | {len(of)} | " + " | ".join(cells) + f" | {cost} |")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("train")
    one.add_argument("--methods", nargs="+", choices=[*METHODS, "ensemble"], default=[*METHODS, "ensemble"])
    one.add_argument("--architectures", nargs="+", choices=MODELS, default=list(MODELS))
    one.add_argument("--sizes", nargs="+", type=int, choices=SIZES, default=list(SIZES))
    one.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    one.add_argument("--epochs", type=int, default=1000)
    one.add_argument("--rate", type=float, default=1e-3)
    one.add_argument("--kl", type=float, default=1e-4, help="weight of the KL per noisy weight")
    one.add_argument("--dropout", type=float, default=0.1)
    one.add_argument("--folder", type=Path, default=Path("runs/nbody"), help="where the samples are kept")
    one.set_defaults(run=run)
    two = commands.add_parser("table")
    two.set_defaults(run=table)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
