"""SevenNet-0 on a GPU against the same on the CPU: outputs, noise, error bars, training, files.

Skipped where torch finds no CUDA device. Two devices sum in different orders, so float32 agrees to
rounding of the energies (some 1e-6 eV/atom) and float64 to some 1e-9; trainings agree less, since every
step of Adam divides by the size of the gradient.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms, units
from ase.io import write
from ase.md.verlet import VelocityVerlet

import blip_ft
from blip_ft import load
from blip_ft.backbones.protocol import Batch
from blip_ft.cli import main
from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.data.batch.dataset import FrameDataset, collate
from blip_ft.data.frame import to_atoms
from blip_ft.data.read.sources import load_source
from blip_ft.families.registry import without_foreign_keys
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.checkpoint import load_model
from blip_ft.potential.export import export_native
from blip_ft.uncertainty.linearity import study
from blip_ft.uncertainty.moments import BatchMoments
from blip_ft.uncertainty.predict import predict_atoms, predict_batch
from blip_ft.variational.noise import Noise

from .training.labelled import frames

CPU, GPU = "cpu", "cuda"
ACCELERATORS = {CPU: "cpu", GPU: "gpu"}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
sevennet = pytest.mark.backend("sevennet")

RANK = 16
MODELS = ("pathwise", "subspace", "channel")
#: relative, then eV/atom, eV/Å, eV/Å^3, by precision
TOLERANCE = {"float32": (1e-5, 1e-5, 2e-4, 1e-5), "float64": (1e-9, 1e-10, 1e-8, 1e-9)}
#: of stds, relative and absolute (eV, eV/Å or eV/Å^3): small differences of large numbers
STD_TOLERANCE = {"float32": (2e-2, 5e-4), "float64": (1e-6, 1e-9)}
DTYPES = ["float32", "float64"]


# ---- models and frames -------------------------------------------------------------------------


def with_spread(potential: BayesianPotential) -> BayesianPotential:
    """As if fitted: a mean that has left the pretrained weights; directions, of ``subspace`` with a covariance."""
    generator = torch.Generator().manual_seed(1)
    if potential.posterior.family == "subspace":
        shape = potential.posterior.directions.shape
        rows = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64).T).Q.T
        potential.posterior.directions.copy_(rows.half())
        square = np.random.default_rng(0).normal(size=(RANK, RANK))
        potential.posterior.set_covariance(square @ square.T, 0.3, 1.0)
    if potential.posterior.family == "pathwise":
        samples = torch.randn(potential.posterior.directions.shape, generator=generator)
        potential.posterior.directions.copy_(0.003 * samples / RANK**0.5)
    with torch.no_grad():
        for parameter, rms in zip(potential.mean_parameters, potential.prior.sites, strict=True):
            move = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
            parameter.add_(0.01 * move * potential.prior.rms(rms))
    potential.references = {8: -3.0, 14: 7.0}
    return potential


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, str], BayesianPotential]:
    """By device and posterior family, float32."""
    from blip_ft.backbones.registry import get_adapter

    out = {}
    for family in MODELS:
        potential = BayesianPotential(
            get_adapter("sevennet").load("7net-0"),
            ModelConfig(adapter="sevennet", checkpoint="7net-0", noise="scalar"),
            PosteriorConfig(
                **without_foreign_keys(
                    {"family": family, "rank": RANK, "prior_scale": 0.1, "init_std": 0.003}
                )
            ),
            n_draws=8,
        )
        out[CPU, family] = with_spread(potential)
        out[GPU, family] = copy.deepcopy(potential).to(GPU)
    return out


@pytest.fixture(scope="module")
def structures() -> list[Atoms]:
    """Frames of three phases, of different sizes, and one that is not periodic."""
    chosen = [("train", 0), ("stishovite", 0), ("tridymite", 0)]
    rows = {role: load_source(f"sio2_polymorphs@{role}") for role, _ in chosen}
    atoms = [to_atoms(rows[role][i], labels=False) for role, i in chosen]
    cluster = atoms[0][:5]
    cluster.pbc = False
    return [*atoms, cluster]


@pytest.fixture
def batches(models: dict[tuple[str, str], BayesianPotential], structures: list[Atoms]) -> dict[str, Batch]:
    batch = models[CPU, "subspace"].backbone.batch(structures)
    batch.keys = [100 + i for i in range(len(structures))]
    return {CPU: batch, GPU: batch.to(GPU)}


@pytest.fixture(params=DTYPES)
def dtype(request: Any, models: dict[tuple[str, str], BayesianPotential]) -> Iterator[str]:
    """The models in this precision."""
    for potential in models.values():
        potential.to_dtype(request.param)
    yield request.param
    for potential in models.values():
        potential.to_dtype("float32")


def close(one: Any, other: Any, rtol: float, atol: float, what: str = "") -> None:
    a, b = (torch.as_tensor(x).detach().double().cpu() for x in (one, other))
    torch.testing.assert_close(
        a, b, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{what}: {text}" if what else text
    )


def same(one: Any, other: Any, dtype: str, n_atoms: torch.Tensor) -> None:
    """Two predictions in the tolerances of a precision."""
    rtol, energy, forces, stress = TOLERANCE[dtype]
    n = n_atoms.cpu().double()
    close(one.energy.cpu() / n, other.energy.cpu() / n, 0.0, energy, "energy")
    close(one.forces, other.forces, rtol, forces, "forces")
    if one.stress is not None:
        close(one.stress, other.stress, rtol, stress, "stress")


def same_moments(one: BatchMoments, other: BatchMoments, dtype: str, n_atoms: torch.Tensor) -> None:
    """Means and whatever stds there are."""
    same(one.mean, other.mean, dtype, n_atoms)
    for name in ("energy_std", "forces_std", "stress_std", "node_energy_std"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.nan_to_num().max() > 1e-4, name  # there is something to compare
            close(a, b, *STD_TOLERANCE[dtype], name)


# ---- one model on two devices ------------------------------------------------------------------


@sevennet
def test_everything_is_on_the_device(models: dict[tuple[str, str], BayesianPotential]) -> None:
    for family in MODELS:
        tensors = [*models[GPU, family].parameters(), *models[GPU, family].buffers()]
        assert {t.device.type for t in tensors} == {GPU}


@sevennet
def test_energies_forces_stress(
    models: dict[tuple[str, str], BayesianPotential], batches: dict[str, Batch], dtype: str
) -> None:
    ours, reference = (models[d, "subspace"](batches[d], stress=True) for d in (GPU, CPU))
    assert ours.energy.device.type == ours.forces.device.type == GPU
    assert reference.stress[-1].isnan().all()
    same(ours, reference, dtype, batches[CPU].n_atoms)


@sevennet
@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("pathwise", "structure"),
        ("pathwise", "draw"),
        ("subspace", "structure"),
        ("subspace", "draw"),
        ("channel", "structure"),
        ("channel", "local"),
        ("channel", "flipout"),
        ("channel", "draw"),
    ],
)
def test_noise_is_the_same_numbers(
    models: dict[tuple[str, str], BayesianPotential],
    batches: dict[str, Batch],
    dtype: str,
    family: str,
    mode: Any,
) -> None:
    out, weights = {}, {}
    for device in (CPU, GPU):
        potential = models[device, family]
        with potential.perturbed(Noise(mode, epoch=3, draw=5, step=7), batches[device]):
            weights[device] = dict(potential.converted.noise.weights)
        out[device] = potential(
            batches[device], Noise(mode, epoch=3, draw=5, step=7), stress=True, create_graph=True
        )
    assert (mode == "local") == (not weights[GPU])
    for name, w in weights[GPU].items():
        assert w.device.type == GPU
        # the latent numbers are equal to the bit, what is made of them to rounding
        close(w, weights[CPU][name], 1e-10, 1e-14, name)
    same(out[GPU], out[CPU], dtype, batches[CPU].n_atoms)
    off = models[CPU, family](batches[CPU])
    assert (out[CPU].energy - off.energy).abs().max() > 1e-3
    # and the gradients that a training step takes
    gradients = {}
    for device in (CPU, GPU):
        loss = out[device].forces.square().sum() + 1e-2 * models[device, family].kl()
        wanted = [p for p in models[device, family].parameters() if p.requires_grad]
        gradients[device] = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    scale = max(float(g.abs().max()) for g in gradients[CPU])
    for a, b in zip(gradients[GPU], gradients[CPU], strict=True):
        close(a, b, 1e-7, 1e-9 * scale)


@sevennet
def test_eight_draws(
    models: dict[tuple[str, str], BayesianPotential], batches: dict[str, Batch], dtype: str
) -> None:
    for family in MODELS:
        latent = [models[d, family].draw_latents(8) for d in (GPU, CPU)]
        assert torch.equal(*latent)
        ours, reference = (predict_batch(models[d, family], batches[d], n_draws=8) for d in (GPU, CPU))
        same_moments(ours, reference, dtype, batches[CPU].n_atoms)


@sevennet
@pytest.mark.parametrize("method", ["energy", "linear"])
def test_linearized(
    models: dict[tuple[str, str], BayesianPotential], batches: dict[str, Batch], dtype: str, method: Any
) -> None:
    for family, n_directions in (("pathwise", None), ("subspace", None), ("channel", 4)):
        ours, reference = (
            predict_batch(models[d, family], batches[d], method=method, n_draws=n_directions)
            for d in (GPU, CPU)
        )
        assert (ours.forces_std is None) == (method == "energy")
        same_moments(ours, reference, dtype, batches[CPU].n_atoms)


@sevennet
def test_exported_files(models: dict[tuple[str, str], BayesianPotential], tmp_path: Path) -> None:
    """The files of a potential on a GPU pass the comparison with the vendor's calculator, and are the CPU's."""
    done = {d: export_native(models[d, "subspace"], tmp_path / d, draws=2) for d in (CPU, GPU)}
    assert [f.file for f in done[GPU]] == ["mean.pth", "draw-00.pth", "draw-01.pth"]
    for file in done[GPU]:
        states = [
            torch.load(tmp_path / d / file.file, weights_only=False)["model_state_dict"] for d in (GPU, CPU)
        ]
        for name, value in states[0].items():
            assert value.device.type == CPU
            close(value, states[1][name], 1e-5, 1e-6, name)


# ---- a training --------------------------------------------------------------------------------


def few(folder: Path) -> list[str]:
    """Overrides: a few frames of the shipped set, a short training, everything else as in the recipe."""
    out = []
    for role, n in {"train": 8, "validation": 4, "calibration": 5, "test": 4}.items():
        rows = load_source(f"sio2_polymorphs@{role}")
        write(folder / f"{role}.extxyz", [to_atoms(rows[i * len(rows) // n]) for i in range(n)])
        out.append(f"data.{role}={folder / role}.extxyz")
    return [
        *out,
        "posterior.rank=24",
        "posterior.projections=2",
        "posterior.perturbed_share=0.25",
        "uncertainty.linearity_frames=2",
        "trainer.max_epochs=3",
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same training on both devices; says how much memory the GPU's took."""
    folder = tmp_path_factory.mktemp("gpu")
    overrides = few(folder)
    for device, accelerator in ACCELERATORS.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        own = [f"name={device}", f"output={folder}", f"trainer.accelerator={accelerator}"]
        assert main(["fit", "sio2_sevennet", *overrides, *own]) == 0
        peak = torch.cuda.max_memory_allocated() - before
        (folder / device / "peak").write_text(str(peak))
    return {device: folder / device for device in ACCELERATORS}


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@sevennet
def test_training(runs: dict[str, Path]) -> None:
    """The same start, to rounding; then rounding grows with every step of Adam, and fits may choose other steps."""
    metrics, history = (
        {d: read(f, name) for d, f in runs.items()} for name in ("metrics.json", "history.json")
    )
    for model in ("pretrained", "plain", "blip"):
        ours, reference = (metrics[d][model]["all"] for d in (GPU, CPU))
        rel, loose = (1e-3, 0.01) if model == "pretrained" else (0.25, 1.0)
        for key, absolute in (
            ("force_mae_mev_per_ang", 0.02 * loose),
            ("energy_mae_mev_per_atom", 2.0 * loose),
            ("force_crps_mev_per_ang", 0.02 * loose),
        ):
            assert ours[key] == pytest.approx(reference[key], rel=rel, abs=absolute), (model, key)
    for model in ("plain", "blip"):
        rows = [[r for r in history[d][model] if "train_loss" in r] for d in (GPU, CPU)]
        assert len(rows[0]) == len(rows[1]) == 3
        assert rows[0][0]["train_loss"] == pytest.approx(rows[1][0]["train_loss"], rel=1e-2)
        for (one, other), rel in zip(zip(*rows, strict=True), (0.03, 0.25, 0.25), strict=True):
            assert one["val_force_mae"] == pytest.approx(other["val_force_mae"], rel=rel)
    assert (
        metrics[GPU]["blip"]["all"]["force_mae_mev_per_ang"]
        < metrics[GPU]["pretrained"]["all"]["force_mae_mev_per_ang"]
    )
    for folder in runs.values():
        assert (folder / "report.html").stat().st_size > 1e4
        receipt = read(folder, "receipt.json")
        assert receipt["posterior"][-1]["final"]
        assert read(folder, "calibration.json")["forces"]["scale"] > 0


@sevennet
def test_peak_memory(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The GPU was used by the one run and not by the other."""
    peak = {device: int((folder / "peak").read_text()) for device, folder in runs.items()}
    with capsys.disabled():
        print(f"\npeak memory of the training on the GPU: {peak[GPU] / 1e6:.0f} MB")
    assert peak[CPU] == 0
    assert 2e7 < peak[GPU] < 8e9


@sevennet
def test_a_model_from_the_gpu_on_the_cpu(runs: dict[str, Path], structures: list[Atoms]) -> None:
    """The file holds no device: the same predictions on both, and those that the run has written."""
    on = {d: load_model(runs[GPU], device=d, dtype="float64") for d in (CPU, GPU)}
    assert {p.device.type for p in on[CPU].parameters()} == {CPU}
    for method in ("draws", "energy", "linear"):
        ours, reference = (predict_atoms(on[d], structures, method=method) for d in (GPU, CPU))
        for one, other in zip(ours, reference, strict=True):
            assert one.keys() == other.keys()
            for key, value in one.items():
                if value is not None:
                    close(value, other[key], 1e-5, 1e-7, f"{method}, {key}")
    kept = np.load(runs[GPU] / "predictions" / "blip-seen.npz", allow_pickle=False)
    rows = load_source(str(runs[GPU].parent / "test.extxyz"))
    potential = blip_ft.load(runs[GPU])
    dataset = FrameDataset(rows, potential.backbone)
    moments = predict_batch(potential, collate(potential.backbone, [dataset[i] for i in range(len(rows))]))
    close(moments.mean.energy, kept["energy"], 0.0, 1e-3, "energy")
    close(moments.mean.forces, kept["forces"], 1e-5, 2e-4, "forces")
    # stds of draws at a twentieth of the width: rounding counts twenty times
    close(moments.forces_std, kept["forces_std"], 0.05, 5e-3, "forces_std")
    other = load_model(runs[CPU], dtype="float64")  # and the mean is that of the training on the CPU
    for one, two in zip(predict_atoms(on[CPU], structures), predict_atoms(other, structures), strict=True):
        assert np.abs(one["forces"] - two["forces"]).mean() < 0.1 * np.abs(two["forces"]).mean()


@sevennet
def test_calculator(runs: dict[str, Path], structures: list[Atoms]) -> None:
    for method in ("draws", "energy"):
        results = {}
        for device in (CPU, GPU):
            atoms = structures[0].copy()
            atoms.calc = load(runs[GPU], device=device, dtype="float64").calculator(method=method)
            atoms.set_velocities(np.full((len(atoms), 3), 1e-3))
            VelocityVerlet(atoms, 1.0 * units.fs).run(3)
            atoms.get_stress()
            results[device] = {**atoms.calc.results, "positions": atoms.positions}
        assert results[GPU].keys() == results[CPU].keys() >= {"energy_std", "forces", "stress", "ood_score"}
        for key, value in results[GPU].items():
            assert isinstance(value, float | np.ndarray), key
            close(value, results[CPU][key], 1e-5, 1e-7, f"{method}, {key}")


@sevennet
def test_the_linearised_model_beside_draws(runs: dict[str, Path]) -> None:
    rows = load_source(str(runs[GPU].parent / "test.extxyz"))
    found = {}
    for device in (CPU, GPU):
        potential = load_model(runs[GPU], device=device, dtype="float64")
        sets = {"test": FrameDataset(rows, potential.backbone)}
        found[device] = study(potential, sets, n_frames=2, n_draws=32)["sets"]["test"]
    for quantity in ("energy", "forces"):
        for key in ("draws", "same", "exact"):
            close(found[GPU][quantity][key], found[CPU][quantity][key], 1e-5, 1e-7, f"{quantity}, {key}")


# ---- the other families and objectives, on the small test backbone ------------------------------

FAMILIES: dict[str, dict[str, Any]] = {
    "pathwise": {"posterior": {"family": "pathwise", "projections": "all", "start": 0.5}},
    "sketch": {"posterior": {"family": "sketch", "buckets": 128, "start": 0.5}},
    "adaptive": {"posterior": {"family": "adaptive"}},
    "adaptive, local, dropout prior": {
        "posterior": {"family": "adaptive", "mode": "local", "prior": "dropout"},
        "model": {"noise": "radial"},
    },
    "posthoc_laplace": {"posterior": {"family": "posthoc_laplace"}, "objective": {"temperature": 1.0}},
    "crps": {"posterior": {"family": "channel"}, "objective": {"kind": "crps"}},
    "function_kl, flipout": {
        "posterior": {"family": "weight", "mode": "flipout"},
        "objective": {"kind": "function_kl", "likelihood": "joint_student_t"},
    },
    "empirical Bayes, rest, learned noise": {
        "posterior": {"family": "weight", "empirical_bayes": True},
        "model": {"train": "rest"},
        "objective": {"learn_noise": True, "use_stress": False},
    },
    "subspace, average, replay": {
        "posterior": {"family": "subspace", "start": 0.5},
        "optimizer": {"ema_decay": 0.5},
        "data": {"replay": {"source": "other.extxyz", "labels": "own", "probe": "other.extxyz"}},
    },
}


@pytest.mark.parametrize("case", FAMILIES)
def test_families_and_objectives(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs in float64; the devices agree on every error and, less, on every error bar."""
    monkeypatch.chdir(tmp_path)
    write("train.extxyz", frames(24, scale=1.2))
    write("other.extxyz", frames(5, seed=1, scale=1.2))
    options = FAMILIES[case]
    found = {}
    for device, accelerator in ACCELERATORS.items():
        tree: dict[str, Any] = {
            "name": device,
            "data": {"train": "train.extxyz", "batch_size": 4} | options.get("data", {}),
            "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"} | options.get("model", {}),
            "posterior": without_foreign_keys(
                {"prior_scale": 0.2, "rank": 4, "projections": 1} | options["posterior"]
            ),
            "objective": {"temperature": 1e-4} | options.get("objective", {}),
            "optimizer": options.get("optimizer", {}),
            "uncertainty": {"n_draws": 4, "linearity_draws": 4},
            "trainer": {"max_epochs": 2, "accelerator": accelerator},
        }
        Path("recipe.yaml").write_text(yaml.safe_dump(tree))
        assert main(["fit", "recipe.yaml"]) == 0
        found[device] = read(Path("runs") / device, "metrics.json")
    for model, sets in found[CPU].items():
        for key in ("energy_mae_mev_per_atom", "force_mae_mev_per_ang", "force_crps_mev_per_ang"):
            assert found[GPU][model]["all"][key] == pytest.approx(sets["all"][key], rel=1e-4), (model, key)
