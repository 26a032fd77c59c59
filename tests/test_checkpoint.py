import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

import blip_ft
from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.errors import BlipError, CheckpointError
from blip_ft.families.registry import without_foreign_keys
from blip_ft.potential import checkpoint
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.calibration import Calibration, PropertyCalibration
from blip_ft.potential.checkpoint import find_model, load_model, require_space, save_model, sha256
from blip_ft.potential.checks import sealed
from blip_ft.potential.distance import FeatureDistance
from blip_ft.testing.fake import FakeBackbone, FakeModel
from blip_ft.uncertainty.predict import predict_atoms


def make(*, family="weight", prior_scale=0.3, seed=3, n_draws=3, **model):
    """A trained, calibrated potential whose pretrained weights are not those of a fresh backbone."""
    backbone = FakeBackbone(seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in backbone.parameters():
            p.mul_(1 + 0.1 * torch.rand(p.shape, generator=generator, dtype=torch.float64))
    potential = BayesianPotential(
        backbone,
        ModelConfig(adapter="fake", checkpoint="tiny", **model),
        PosteriorConfig(
            **without_foreign_keys(
                {"family": family, "prior_scale": prior_scale, "init_std": 0.05, "rank": 8}
            )
        ),
        seed=seed,
        n_draws=n_draws,
    )
    with torch.no_grad():
        for p in [*potential.mean_parameters, *potential.posterior.parameters()]:
            p.add_(0.02 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        if family == "subspace":  # as if fitted: orthonormal directions, a covariance, a prior scale
            posterior = potential.posterior
            shape = posterior.directions.shape
            rows = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64).T).Q.T
            posterior.directions.copy_(rows.half())
            posterior.set_covariance(np.diag(np.arange(1.0, 1.0 + shape[0])), 0.17, 2.0)
            potential.prior.prior_scale = 0.17
    potential.references = {14: -123.456789012345, 8: -7.0}
    potential.calibration = Calibration(
        energy=PropertyCalibration(0.001, 1.25, conformal={0.9: 1.7, 0.99: float("inf")}),
        forces=PropertyCalibration(0.02, 0.8),
    )
    return potential


def frames():
    crystal = bulk("SiO", "rocksalt", 4.6)
    crystal.rattle(0.1, seed=1)
    return [crystal, molecule("H2O")]


def predictions(potential):
    """Plain lists, exact through JSON."""
    return [
        {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in item.items()}
        for item in predict_atoms(potential, frames())
    ]


def everything_in(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


@pytest.fixture
def saved(tmp_path):
    """(folder of a saved model, its predictions)."""
    potential = make()
    save_model(potential, tmp_path / "run" / "model")
    return tmp_path / "run" / "model", predictions(potential)


class TestScore:
    """The out-of-distribution score in the file."""

    def scored(self, **options):
        potential = make(**options)
        features = np.random.default_rng(1).normal(size=(60, 8))
        potential.ood = FeatureDistance.fit(features, np.repeat([1, 8, 14], 20), ["a", "b"] * 30)
        return potential

    def test_comes_back_in_every_precision(self, tmp_path):
        potential = self.scored()
        save_model(potential, tmp_path / "model")
        expected = predictions(potential)
        assert all(len(item["ood_score"]) == len(a) for item, a in zip(expected, frames(), strict=True))
        assert predictions(load_model(tmp_path / "model")) == expected
        again = load_model(tmp_path / "model", dtype="float32")
        for name, tensor in again.ood.tensors().items():
            assert torch.equal(tensor, potential.ood.tensors()[name])
        save_model(load_model(tmp_path / "model"), tmp_path / "again")
        assert sha256(tmp_path / "again/model.safetensors") == sha256(tmp_path / "model/model.safetensors")

    def test_a_file_of_the_first_version_has_none(self, saved):
        folder, expected = saved
        edit(folder, lambda m: m.update(format_version=1), again=False)
        loaded = load_model(folder)
        assert loaded.ood is None
        assert predictions(loaded) == expected
        assert "ood_score" not in expected[0]

    def test_damage(self, tmp_path):
        potential = self.scored()
        potential.ood.tensors = lambda: {"scale": torch.ones(3)}
        save_model(potential, tmp_path / "model")
        with pytest.raises(CheckpointError, match="do not fit the model"):
            load_model(tmp_path / "model")


class TestRoundTrip:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"family": "channel"},
            {"family": "subspace", "prior_scale": "auto"},
            {"train": "rest"},
            {"train": "readout", "noise": "radial"},
            {"noise": "none"},
        ],
        ids=["weight", "channel", "subspace", "rest", "parts", "no-noise"],
    )
    def test_identical(self, tmp_path, options):
        potential = make(**options)
        save_model(potential, tmp_path / "model")
        loaded = load_model(tmp_path / "model")
        assert predictions(loaded) == predictions(potential)
        assert ("energy_std" in predictions(loaded)[0]) == (options != {"noise": "none"})
        assert loaded.references == potential.references
        assert loaded.calibration == potential.calibration
        assert loaded.model_config == potential.model_config
        assert loaded.posterior_config == potential.posterior_config
        assert (loaded.seed, loaded.n_draws) == (3, 3)
        assert loaded.backbone.origin == potential.backbone.origin
        assert loaded.prior.prior_scale == potential.prior.prior_scale
        torch.testing.assert_close(loaded.kl(), potential.kl(), rtol=1e-14, atol=0)
        for name, tensor in potential.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)

    def test_in_another_process(self, saved, tmp_path):
        folder, expected = saved
        code = (
            "import importlib.util, json, sys\n"
            "spec = importlib.util.spec_from_file_location('t', sys.argv[1])\n"
            "module = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(module)\n"
            "import blip_ft\n"
            "print(json.dumps(module.predictions(blip_ft.load(sys.argv[2]))))\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, __file__, str(folder)],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        )
        found = json.loads(run.stdout)
        # another process may sum in another order, hence to the last digits
        for item, other in zip(found, expected, strict=True):
            assert item.keys() == other.keys()
            for key, value in other.items():
                if value is None:
                    assert item[key] is None
                else:
                    np.testing.assert_allclose(item[key], value, rtol=1e-12, atol=1e-13, err_msg=key)

    def test_pretrained_weights_come_from_the_file(self, saved):
        """Also the prior's scale, which is measured on them."""
        loaded = load_model(saved[0])
        fresh = FakeBackbone(seed=0)
        assert not torch.equal(loaded.converted.pretrained["readout.0"], fresh.model.readout[0].weight)
        rms = loaded.converted.pretrained["readout.0"].square().mean().sqrt()
        torch.testing.assert_close(loaded.prior.std("readout.0")[0, 0], 0.3 * rms)

    def test_float32(self, tmp_path):
        potential = make().to_dtype("float32")
        save_model(potential, tmp_path / "model")
        loaded = load_model(tmp_path / "model")
        assert loaded.backbone.dtype == torch.float32
        assert predictions(loaded) == predictions(potential)

    def test_another_precision(self, saved):
        folder, expected = saved
        loaded = load_model(folder, dtype="float32")
        assert loaded.backbone.dtype == torch.float32
        for item, exact in zip(predictions(loaded), expected, strict=True):
            assert item["energy"] == pytest.approx(exact["energy"], abs=1e-4)
            assert item["energy_std"] == pytest.approx(exact["energy_std"], rel=1e-3)

    def test_saving_twice_gives_the_same_tensors(self, saved, tmp_path):
        save_model(load_model(saved[0]), tmp_path / "again")
        assert sha256(tmp_path / "again" / "model.safetensors") == sha256(saved[0] / "model.safetensors")

    def test_by_the_folder_of_the_run(self, saved):
        folder, expected = saved
        assert find_model(folder.parent) == find_model(folder) == folder
        assert predictions(blip_ft.load(folder.parent)) == expected

    def test_a_saved_model_is_replaced(self, saved):
        folder, expected = saved
        save_model(make(seed=9), folder)
        assert everything_in(folder.parent) == ["model", "model/model.json", "model/model.safetensors"]
        assert predictions(load_model(folder)) == predictions(make(seed=9)) != expected


class TestContent:
    def test_two_files_and_no_pickle(self, saved, monkeypatch):
        folder, expected = saved
        assert everything_in(folder) == ["model.json", "model.safetensors"]

        def refuse(*args, **kwargs):
            raise AssertionError("unpickling")

        for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
            monkeypatch.setattr(module, name, refuse)
        assert predictions(load_model(folder)) == expected

    def test_json_names_what_is_needed(self, saved):
        meta = json.loads((saved[0] / "model.json").read_text(encoding="utf-8"))
        assert meta["format_version"] == checkpoint.FORMAT_VERSION
        assert meta["adapter"] == "fake"
        assert meta["backbone"] == {"size": "tiny", "seed": 0}
        assert meta["base"] == {"checkpoint": "tiny, seed 0", "sha256": ""}
        assert meta["dtype"] == "float64"
        own = {"family", "prior_scale", "perturbed_share", "mode", "prior", "init_std", "empirical_bayes"}
        assert meta["posterior"].keys() == own
        assert meta["references"] == {"14": -123.456789012345, "8": -7.0}
        assert {"torch", "ase"} <= meta["versions"].keys()
        assert meta["tensors_sha256"] == sha256(saved[0] / "model.safetensors")


def edit(folder, change, *, again=True):
    """Change the JSON, with a checksum to match."""
    file = folder / "model.json"
    meta = json.loads(file.read_text(encoding="utf-8"))
    change(meta)
    file.write_text(json.dumps(sealed(meta) if again else meta), encoding="utf-8")


class TestDamage:
    """Each a CheckpointError that names the file."""

    @pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
    def test_tensors_cut_short(self, saved, share):
        file = saved[0] / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError, match="cut short or changed") as e:
            load_model(saved[0])
        assert e.value.file == str(file)

    def test_one_bit_of_the_tensors(self, saved):
        file = saved[0] / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(bytes(content))
        with pytest.raises(CheckpointError, match="cut short or changed"):
            load_model(saved[0])

    def test_no_tensors(self, saved):
        (saved[0] / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="missing") as e:
            load_model(saved[0])
        assert e.value.file == str(saved[0] / "model.safetensors")

    def test_tensors_of_another_model(self, saved, tmp_path):
        """A folder put together from two models, with a checksum to match."""
        save_model(make(family="channel"), tmp_path / "other")
        content = (tmp_path / "other" / "model.safetensors").read_bytes()
        (saved[0] / "model.safetensors").write_bytes(content)
        edit(saved[0], lambda m: m.update(tensors_sha256=sha256(saved[0] / "model.safetensors")))
        with pytest.raises(CheckpointError, match="do not fit the model") as e:
            load_model(saved[0])
        assert e.value.file == str(saved[0] / "model.safetensors")

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": "new"}', "\ufeff{}"])
    def test_not_our_json(self, saved, text):
        (saved[0] / "model.json").write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError) as e:
            load_model(saved[0])
        assert e.value.file == str(saved[0] / "model.json")

    def test_json_that_is_no_text(self, saved):
        (saved[0] / "model.json").write_bytes(b"\xff\xfe\x00\x80")
        with pytest.raises(CheckpointError, match="not readable"):
            load_model(saved[0])

    @pytest.mark.parametrize(
        "key",
        [
            "adapter",
            "backbone",
            "base",
            "dtype",
            "model",
            "posterior",
            "prior_scale",
            "seed",
            "n_draws",
            "references",
            "calibration",
            "tensors_sha256",
            "format_version",
        ],
    )
    def test_a_key_is_gone(self, saved, key):
        edit(saved[0], lambda m: m.pop(key))
        with pytest.raises(CheckpointError) as e:
            load_model(saved[0])
        expected = "model.safetensors" if key == "tensors_sha256" else "model.json"
        assert e.value.file == str(saved[0] / expected)

    @pytest.mark.parametrize(
        "change",
        [
            {"dtype": "float99"},
            {"posterior": {"family": "unheard of"}},
            {"posterior": []},
            {"model": {"adapter": "fake", "checkpoint": "tiny", "colour": "blue"}},
            {"backbone": {"size": "huge", "seed": 0}},
            {"backbone": None},
            {"seed": "seven"},
            {"references": {"Si": 1.0}},
            {"references": [1, 2]},
            {"calibration": {"energy": 3}},
        ],
        ids=str,
    )
    def test_a_value_is_edited(self, saved, change):
        edit(saved[0], lambda m: m.update(change))
        with pytest.raises(CheckpointError) as e:
            load_model(saved[0])
        assert e.value.file == str(saved[0] / "model.json")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            *[("amplitude", v) for v in (float("nan"), 0.0, -0.03, 2.0, "0.03", True)],
            *[("prior_scale", v) for v in (float("nan"), 0, -1.0, float("inf"), None)],
            *[("n_draws", v) for v in (0, 1, -4, 2.5, float("nan"))],
            *[("references", v) for v in ({"14": float("nan")}, {"14": "-5"}, {"0": 1.0}, {"400": 1.0})],
            ("seed", 1.5),
            ("dtype", "hub"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("version", [2, 3])
    def test_a_value_is_impossible(self, saved, key, value, version):
        """Also where an older file has no checksum."""
        edit(saved[0], lambda m: m.update({key: value, "format_version": version}))
        with pytest.raises(CheckpointError, match=r"is .*, not ") as e:
            load_model(saved[0])
        assert (e.value.file, e.value.field) == (str(saved[0] / "model.json"), key)

    @pytest.mark.parametrize("change", [{"amplitude": 0.5}, {"references": {}}, {"comment": "mine"}], ids=str)
    def test_any_edit_is_seen(self, saved, change):
        edit(saved[0], lambda m: m.update(change), again=False)
        with pytest.raises(CheckpointError, match="changed since it was saved") as e:
            load_model(saved[0])
        assert e.value.file == str(saved[0] / "model.json")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_tensors_that_are_no_numbers(self, tmp_path, value):
        potential = make()
        with torch.no_grad():
            potential.posterior.get_parameter(
                next(n for n, _ in potential.posterior.named_parameters())
            ).flatten()[0] = value
        save_model(potential, tmp_path / "model")
        with pytest.raises(CheckpointError, match="no numbers") as e:
            load_model(tmp_path / "model")
        assert e.value.field.startswith("posterior.")
        assert e.value.file == str(tmp_path / "model" / "model.safetensors")

    def test_an_adapter_that_is_not_installed(self, saved):
        edit(saved[0], lambda m: m.update(adapter="fke"))
        with pytest.raises(BlipError, match="did you mean 'fake'"):
            load_model(saved[0])

    def test_from_a_newer_program(self, saved):
        edit(saved[0], lambda m: m.update(format_version=checkpoint.FORMAT_VERSION + 1))
        with pytest.raises(CheckpointError, match="newer than this program") as e:
            load_model(saved[0])
        assert "upgrade" in str(e.value)
        assert e.value.file == str(saved[0] / "model.json")

    @pytest.mark.parametrize("name", ["nothing", "file", "empty"])
    def test_no_model_there(self, tmp_path, name):
        (tmp_path / "file").write_text("text")
        (tmp_path / "empty").mkdir()
        with pytest.raises(CheckpointError, match="no trained model here") as e:
            load_model(tmp_path / name)
        assert e.value.file == str(tmp_path / name)


class TestProbe:
    """What the model gave when it was saved, beside what it gives now."""

    def test_a_model_of_an_older_format_opens(self, saved):
        folder, expected = saved

        def older(meta):
            meta["format_version"] = 2
            del meta["probe"], meta["sha256"]

        edit(folder, older, again=False)
        assert predictions(load_model(folder)) == expected

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("loaded", ["float32", "float64"])
    def test_precisions(self, tmp_path, dtype, loaded):
        save_model(make().to_dtype(dtype), tmp_path / "model")
        meta = json.loads((tmp_path / "model/model.json").read_text())
        assert set(meta["probe"]["numbers"]) == {8, 14}
        load_model(tmp_path / "model", dtype=loaded)

    def test_a_package_that_computes_something_else(self, saved, monkeypatch):
        """As another version of a vendor's package might: the same weights, other numbers."""
        forward = FakeModel.forward

        def other(self, species, edge_index, distance, *rest):
            energy, features = forward(self, species, edge_index, 1.001 * distance, *rest)
            return energy, features

        monkeypatch.setattr(FakeModel, "forward", other)
        with pytest.raises(CheckpointError, match="versions that are installed here") as e:
            load_model(saved[0])
        assert e.value.file == str(saved[0] / "model.json")
        edit(saved[0], lambda m: m["versions"].update(ase="3.20.1", torch="1.9.0+cpu", gone="2.0"))
        with pytest.raises(
            CheckpointError, match=r"saved with ase 3\.20\.1 \(here .*\), gone 2\.0 \(here absent\)"
        ) as e:
            load_model(saved[0])
        assert "pip install ase==3.20.1 gone==2.0 torch==1.9.0" in e.value.remedy

    def test_a_difference_that_does_not_matter(self, saved, monkeypatch):
        forward = FakeModel.forward
        monkeypatch.setattr(
            FakeModel, "forward", lambda self, *inputs: tuple(x * (1 + 1e-7) for x in forward(self, *inputs))
        )
        edit(saved[0], lambda m: m["versions"].update(torch="1.9.0"))
        load_model(saved[0])

    def test_a_model_without_numbers_has_none(self, tmp_path):
        potential = make()
        potential.references = {14: float("nan"), 8: 0.0}
        save_model(potential, tmp_path / "model")
        assert json.loads((tmp_path / "model/model.json").read_text())["probe"] is None


class TestFailedSave:
    """The old state stays, nothing else does."""

    def test_a_file_in_place_of_the_parent(self, tmp_path):
        (tmp_path / "runs").write_text("mine")
        with pytest.raises(CheckpointError, match="cannot write the model") as e:
            save_model(make(), tmp_path / "runs" / "model")
        assert e.value.file == str(tmp_path / "runs" / "model")
        assert everything_in(tmp_path) == ["runs"]
        assert (tmp_path / "runs").read_text() == "mine"

    def test_a_file_in_place_of_the_folder(self, tmp_path):
        (tmp_path / "model").write_text("mine")
        with pytest.raises(CheckpointError, match="is not a model") as e:
            save_model(make(), tmp_path / "model")
        assert e.value.file == str(tmp_path / "model")
        assert (tmp_path / "model").read_text() == "mine"
        assert everything_in(tmp_path) == ["model"]

    def test_a_folder_with_something_else(self, tmp_path):
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "thesis.tex").write_text("mine")
        with pytest.raises(CheckpointError, match="is not a model"):
            save_model(make(), tmp_path / "thesis")
        assert everything_in(tmp_path) == ["thesis", "thesis/thesis.tex"]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_no_permission(self, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(CheckpointError, match="cannot write the model"):
            save_model(make(), tmp_path / "locked" / "model")
        assert everything_in(tmp_path) == ["locked"]

    @pytest.mark.parametrize("earlier", [False, True], ids=["first", "replacing"])
    @pytest.mark.parametrize("stage", ["tensors", "json", "name"])
    def test_disk_full(self, tmp_path, monkeypatch, stage, earlier):
        folder = tmp_path / "model"
        if earlier:
            save_model(make(seed=1), folder)
        before = everything_in(tmp_path)
        potential = make()

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        path = type(tmp_path)
        if stage == "tensors":

            def half(tensors, target):
                target.write_bytes(b"half")
                full()

            monkeypatch.setattr(checkpoint, "save_file", half)
        elif stage == "json":
            monkeypatch.setattr(path, "write_text", full)
        else:
            rename = path.rename

            def only_away(self, target):
                return (
                    full()
                    if self.parent.name.startswith(".") and self.name == "model"
                    else rename(self, target)
                )

            monkeypatch.setattr(path, "rename", only_away)
        with pytest.raises(CheckpointError, match="No space left on device") as e:
            save_model(potential, folder)
        monkeypatch.undo()
        assert e.value.file == str(folder)
        assert everything_in(tmp_path) == before
        if earlier:
            assert predictions(load_model(folder)) == predictions(make(seed=1))


class TestRequireSpace:
    def test_enough(self, tmp_path):
        require_space(tmp_path / "not" / "yet", 1)
        assert everything_in(tmp_path) == []

    def test_too_little(self, tmp_path):
        with pytest.raises(CheckpointError, match="MB free, about") as e:
            require_space(tmp_path / "run", 10**18)
        assert e.value.file == str(tmp_path)

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(CheckpointError, match="cannot write here"):
            require_space(tmp_path / "file" / "run", 1)


@pytest.mark.parametrize("version", [1, 2])
def test_folders_of_earlier_formats_open(version):
    """As they were written: the options of every family in one flat mapping."""
    stored = Path(__file__).parent / "models" / f"format{version}"
    meta = json.loads((stored / "model/model.json").read_text())
    assert meta["format_version"] == version
    assert {"rank", "min_std", "storage", "empirical_bayes"} <= meta["posterior"].keys()
    expected = json.loads((stored / "predictions.json").read_text())
    found = predictions(load_model(stored))
    for one, other in zip(found, expected, strict=True):
        # what no calibration frame had a label of was given as zero then, and is absent now
        assert other.keys() - one.keys() <= {"stress_std_aleatoric", "stress_std_total"}
        for key, value in other.items():
            if value is not None and key in one:
                np.testing.assert_allclose(one[key], value, rtol=1e-9, atol=1e-12, err_msg=key)
