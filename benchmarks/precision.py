"""Errors of lower precisions against float64, per backbone: energies, forces, and the gradient that training needs.

    python benchmarks/precision.py [--backends sevennet chgnet diep mace uma orb] [--frames 16]

Frames are spread over the shipped SiO2 polymorphs. Reference is the backbone in float64. ``float32`` is the
backbone cast to it.
``tf32`` rounds the inputs of every float32 matrix product to 10 bits of mantissa, as the tensor cores of GPUs
do, and sums in
float32: the numbers of such a GPU on any machine, without its speed. ``bf16`` and ``fp16`` are torch's
autocast, Lightning's
``bf16-mixed`` and ``16-mixed``: weights in float32, matrix products in bfloat16 or float16. The gradient is
that of the mean squared error of energies and forces with respect to all weights, a second derivative of the
energy; shown is the norm of its error over its norm.

Writes benchmarks/results/precision.json, and keeps there what other backends have, as backends need several
environments.
``mace``, ``uma`` and ``orb`` are the small models of tests/models.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from cost import BACKENDS
from torch.utils._python_dispatch import TorchDispatchMode

from blip_ft.backbones.protocol import Backbone
from blip_ft.backbones.registry import get_adapter
from blip_ft.data.frame import to_atoms
from blip_ft.data.read.sources import load_source

OUT = Path(__file__).parent / "results" / "precision.json"
#: bits of the mantissa that TF32 leaves out of float32's 23
DROPPED = 13


class Tf32(TorchDispatchMode):
    """Within it matrix products of float32 numbers see them as TF32 does; also those of backward calls."""

    PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Round what enters a product."""
        if func.overloadpacket.__name__ in self.PRODUCTS:
            first = (
                1 if func.overloadpacket.__name__.startswith(("add", "badd")) else 0
            )  # what is added is not rounded
            args = tuple(rounded(a) if i >= first else a for i, a in enumerate(args))
        return func(*args, **(kwargs or {}))


def rounded(value: Any) -> Any:
    """A float32 tensor to the nearest TF32 number, ties to even; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        return value
    bits = value.contiguous().view(torch.int32)
    half = (1 << (DROPPED - 1)) - 1 + ((bits >> DROPPED) & 1)
    return (((bits + half) >> DROPPED) << DROPPED).view(torch.float32)


def evaluate(backbone: Backbone, frames: list[Atoms], within: Callable[[], Any]) -> dict[str, np.ndarray]:
    """Energies per atom (eV), forces (eV/Å) and the gradient of a loss, all in float64."""
    energies, forces, gradient = [], [], None
    parameters = [p.requires_grad_(True) for p in backbone.parameters() if p.is_floating_point()]
    for start in range(0, len(frames), 4):
        some = frames[start : start + 4]
        with within():
            batch = backbone.batch(some)
            out = backbone(batch, stress=False, create_graph=True)
            target = torch.from_numpy(np.random.default_rng(start).normal(size=tuple(out.forces.shape)))
            per_atom = out.energy.double() / batch.n_atoms
            loss = (out.forces.double() - target).square().mean() + per_atom.square().mean()
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = np.concatenate(
            [
                np.zeros(p.numel()) if g is None else g.detach().double().numpy().ravel()
                for p, g in zip(parameters, grads, strict=True)
            ]
        )
        gradient = flat if gradient is None else gradient + flat
        energies.append(per_atom.detach().numpy())
        forces.append(out.forces.detach().double().numpy())
    return {"energy": np.concatenate(energies), "forces": np.concatenate(forces), "gradient": gradient}


def errors(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Root mean squares and largest errors, meV/atom and meV/Å; ``None`` for what has overflowed."""
    energy, force = (1e3 * (got[k] - want[k]) for k in ("energy", "forces"))
    found = {
        "energy_rms_mev_per_atom": float(np.sqrt(np.mean(energy**2))),
        "energy_max_mev_per_atom": float(np.abs(energy).max()),
        "forces_rms_mev_per_ang": float(np.sqrt(np.mean(force**2))),
        "forces_max_mev_per_ang": float(np.abs(force).max()),
        "gradient_relative": float(
            np.linalg.norm(got["gradient"] - want["gradient"]) / np.linalg.norm(want["gradient"])
        ),
    }
    return {key: value if np.isfinite(value) else None for key, value in found.items()}


def frames_of(n: int) -> list[Atoms]:
    """Frames spread evenly over the shipped set."""
    rows = load_source("sio2_polymorphs")
    return [to_atoms(rows[int(i)], labels=False) for i in np.linspace(0, len(rows) - 1, n)]


@contextlib.contextmanager
def mixed(dtype: torch.dtype) -> Iterator[None]:
    """As Lightning's bf16-mixed and 16-mixed."""
    with torch.autocast("cpu", dtype=dtype):
        yield


def measure(name: str, frames: list[Atoms]) -> dict[str, Any]:
    """Errors of one backbone by precision, or why there are none."""
    model = BACKENDS[name]
    single = get_adapter(model.adapter).load(model.checkpoint, trust=True, **model.options).float()
    double = copy.deepcopy(single).double()
    for backbone in (single, double):
        backbone.arrange()
    want = evaluate(double, frames, contextlib.nullcontext)
    found: dict[str, Any] = {}
    within_of: dict[str, Callable[[], Any]] = {
        "float32": contextlib.nullcontext,
        "tf32": Tf32,
        "bf16": partial(mixed, torch.bfloat16),
        "fp16": partial(mixed, torch.float16),
    }
    for precision, within in within_of.items():
        try:
            found[precision] = errors(evaluate(single, frames, within), want)
        except Exception as error:  # noqa: BLE001 what a vendor's code raises is the result
            found[precision] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        print(name, precision, found[precision], flush=True)
    force = want["forces"]
    return {"forces_rms_ev_per_ang": float(np.sqrt(np.mean(force**2))), "precisions": found}


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["sevennet", "chgnet"])
    parser.add_argument("--frames", type=int, default=16)
    args = parser.parse_args()
    frames = frames_of(args.frames)
    results = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    for name in args.backends:
        results[name] = measure(name, frames) | {
            "frames": len(frames),
            "atoms": sum(map(len, frames)),
            "torch": torch.__version__,
        }
    OUT.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
