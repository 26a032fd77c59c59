"""``blip-finetune select`` and what is behind it, on runs of the fake backbone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import read, write

from blip_ft.cli import select as command
from blip_ft.closed_form.gradients import GradientRows
from blip_ft.closed_form.statistics_file import read_statistics
from blip_ft.data.batch.dataset import FrameDataset
from blip_ft.data.frame import atoms_key
from blip_ft.data.read.sources import load_source
from blip_ft.errors import BlipError, DataError
from blip_ft.potential.checkpoint import load_model
from blip_ft.select.choose import METHODS, Wish, choose
from blip_ft.select.features import Calls, RowFile, Whitening, energy_rows, label_rows
from blip_ft.select.greedy import Information
from blip_ft.select.pool import Known, Pool, look
from blip_ft.select.write import COLUMNS
from blip_ft.uncertainty.linearized import predict_linearized

from .conftest import potential_of, structures

Call = Callable[..., tuple[int, str, str]]


def opened(run: Path, source: Path) -> tuple[Any, Known, Pool]:
    potential, known = load_model(run), Known.of_run(run)
    return potential, known, look(str(source), potential, known)


def frames_of(path: Path) -> list[Atoms]:
    found = read(path, ":")
    assert isinstance(found, list)
    return found


def chosen(call: Call, run: Path, pool: Path, out: Path, *options: object) -> dict[str, Any]:
    code, text, _ = call(run, pool, "-o", out, "--json", *options)
    assert code == 0
    found: dict[str, Any] = json.loads(text)
    return found


class TestCovariance:
    def test_conditioning_is_adding_to_the_posterior(self, run: Path, pool: Path, tmp_path: Path) -> None:
        """The covariance of other outputs, after frames were taken here and after ``posterior.add`` of their labels."""
        potential, known, candidates = opened(run, pool)
        whitening, objective = Whitening(potential), known.recipe.objective
        rows = [r for _, r in label_rows(candidates, potential, objective, whitening, Calls(), projections=4)]
        information = Information(whitening.width, objective.kl_temperature)
        for i in (3, 8, 20):
            information.take(rows[i])
        found = information.covariance(rows[5], rows[9])

        atoms = frames_of(pool)
        read_statistics(potential, run)
        posterior = potential.posterior
        write(tmp_path / "new.extxyz", [atoms[i] for i in (3, 8, 20)])
        write(tmp_path / "other.extxyz", [atoms[i] for i in (5, 9)])

        def features(name: str) -> Any:
            source = FrameDataset(load_source(str(tmp_path / name)), potential.backbone)
            made = GradientRows(objective, potential, source, seed=0, orthonormal=True)
            (out,) = made.features(posterior.features, posterior.buckets, 4)
            return out

        other = features("other.extxyz")
        by_frame = [other.gradients[torch.from_numpy(other.keys == candidates.keys[i])] for i in (5, 9)]
        before = posterior.covariance(*by_frame).numpy()
        np.testing.assert_allclose(rows[5] @ rows[9].T, before, rtol=1e-6, atol=1e-9)
        posterior.add(features("new.extxyz"))
        after = posterior.covariance(*by_frame).numpy()
        np.testing.assert_allclose(found, after, rtol=1e-6, atol=1e-9)
        assert not np.allclose(after, before, rtol=1e-2)

    def test_rows_of_energies_are_the_predicted_stds(self, run: Path, pool: Path) -> None:
        potential, known, candidates = opened(run, pool)
        whitening, objective = Whitening(potential), known.recipe.objective
        rows = [r for _, r in energy_rows(candidates, potential, objective, whitening, Calls())]
        atoms = frames_of(pool)
        stds = predict_linearized(potential, potential.backbone.batch(atoms), method="energy").energy_std
        expected = stds.numpy() / (objective.energy_std * np.array([len(a) for a in atoms]))
        np.testing.assert_allclose([np.linalg.norm(r) for r in rows], expected, rtol=1e-8)
        both = [r for _, r in label_rows(candidates, potential, objective, whitening, Calls(), projections=2)]
        np.testing.assert_allclose([r[0] for r in rows], [r[0] for r in both], rtol=1e-6, atol=1e-10)

    def test_samples_of_other_families(self, pathwise: Path, pool: Path) -> None:
        """Rows have the variance that the samples have."""
        potential, known, candidates = opened(pathwise, pool)
        whitening = Whitening(potential)
        assert whitening.width == 32
        rows = [r for _, r in energy_rows(candidates, potential, known.recipe.objective, whitening, Calls())]
        atoms = frames_of(pool)
        stds = predict_linearized(potential, potential.backbone.batch(atoms), method="energy").energy_std
        expected = stds.numpy() / (known.recipe.objective.energy_std * np.array([len(a) for a in atoms]))
        np.testing.assert_allclose([np.linalg.norm(r) for r in rows], expected, rtol=1e-8)

    def test_a_copy_that_is_shifted(self, run: Path, tmp_path: Path) -> None:
        """Moved as a whole it has another content key and the same labels: only their noise is left to be averaged."""
        atoms = structures(4, 7, width=0.3)
        twins = [a.copy() for a in atoms]
        for a in twins:
            a.positions += 0.37
        write(tmp_path / "twins.extxyz", atoms + twins)
        potential, known, candidates = opened(run, tmp_path / "twins.extxyz")
        assert len(candidates) == 8
        whitening, objective = Whitening(potential), known.recipe.objective
        rows = [r for _, r in label_rows(candidates, potential, objective, whitening, Calls(), projections=9)]
        information = Information(whitening.width, objective.kl_temperature)
        before = information.gains(rows)
        information.take(rows[0])
        after = information.gains(rows)
        assert after[4] == pytest.approx(after[0], rel=1e-5)
        assert after[4] <= 10 * 0.5 * np.log(2)
        assert (after[4] / before[4] < after[[1, 2, 3]] / before[[1, 2, 3]]).all()

    def test_scores_are_force_stds(self, run: Path, pool: Path, tmp_path: Path) -> None:
        """All components: the calibrated rms std of the linearised model."""
        potential, known, candidates = opened(run, pool)
        found = choose(potential, known, candidates, Wish(frames=3, projections=99), scratch=tmp_path)
        whitening = Whitening(potential)
        rows = [
            r
            for _, r in label_rows(
                candidates, potential, known.recipe.objective, whitening, Calls(), projections=99
            )
        ]
        scale = potential.calibration.forces.scale * known.recipe.objective.forces_std
        for c in found:
            variance = np.square(rows[c.candidate][1:]).sum(axis=1)
            assert len(variance) == 3 * c.atoms
            assert c.score == pytest.approx(scale * np.sqrt(variance.mean()), rel=1e-6)

    def test_half_precision(self, run: Path, pool: Path, tmp_path: Path) -> None:
        potential, known, candidates = opened(run, pool)
        whole, half = (
            choose(potential, known, candidates, Wish(frames=6, precision=p), scratch=tmp_path)
            for p in ("float32", "float16")
        )
        assert [c.candidate for c in whole] == [c.candidate for c in half]
        np.testing.assert_allclose([c.gain for c in whole], [c.gain for c in half], rtol=5e-3)


class TestSame:
    @pytest.mark.parametrize("method", METHODS)
    def test_whatever_the_order_and_the_calls(self, call: Call, run: Path, pool: Path, method: str) -> None:
        """Another order of candidates, in two files, and another number of them in a call."""
        folder, atoms = pool.parent, frames_of(pool)
        atoms = [*atoms, atoms[4].copy(), atoms[11].copy()]
        write(pool, atoms)
        order = np.random.default_rng(1).permutation(len(atoms))
        (folder / "parts").mkdir()
        write(folder / "parts/b.extxyz", [atoms[i] for i in order[:13]])
        write(folder / "parts/a.extxyz", [atoms[i] for i in order[13:]])
        options = ("-n", 7, "--method", method, "--group-limit", 3, "--audit", 0.3, "--seed", 5)
        one = chosen(call, run, pool, folder / "one.extxyz", *options)
        two = chosen(call, run, folder / "parts/*.extxyz", folder / "two.extxyz", *options, "--batch-size", 1)
        three = chosen(
            call, run, pool, folder / "three.extxyz", *options, "--batch-size", 32, "--batch-atoms", 40
        )
        keys = [[atoms_key(a) for a in frames_of(folder / f"{n}.extxyz")] for n in ("one", "two", "three")]
        assert keys[0] == keys[1] == keys[2]
        assert [c["method"] for c in one["chosen"]] == ["audit"] * 2 + [method] * 5
        for other in (two, three):
            for name in ("score", "gain", "alone"):
                values = [[np.nan if c[name] is None else c[name] for c in f["chosen"]] for f in (one, other)]
                np.testing.assert_allclose(*values, rtol=1e-5)
        groups = [c["group"] for c in one["chosen"]]
        assert max(groups.count(g) for g in groups) <= 3

    def test_labels_are_not_looked_at(self, call: Call, run: Path, pool: Path) -> None:
        """Nor lost: other labels, or none, make the same choice."""
        folder, atoms = pool.parent, frames_of(pool)
        one = chosen(call, run, pool, folder / "one.extxyz", "-n", 5)
        assert all(
            "REF_forces" in a.arrays and "REF_energy" in a.info for a in frames_of(folder / "one.extxyz")
        )
        for i, a in enumerate(atoms):
            a.info.pop("REF_energy")
            a.arrays["REF_forces"] *= np.nan if i % 2 else 100
        write(folder / "other.extxyz", atoms)
        two = chosen(call, run, folder / "other.extxyz", folder / "two.extxyz", "-n", 5)
        assert [c["frame"] for c in one["chosen"]] == [c["frame"] for c in two["chosen"]]

    def test_random_depends_on_the_seed(self, call: Call, run: Path, pool: Path) -> None:
        found = [
            [
                c["frame"]
                for c in chosen(
                    call,
                    run,
                    pool,
                    pool.parent / f"{k}.extxyz",
                    "-n",
                    6,
                    "--method",
                    "random",
                    "--seed",
                    seed,
                )["chosen"]
            ]
            for k, seed in enumerate((0, 0, 1))
        ]
        assert found[0] == found[1] != found[2]


class TestCommand:
    def test_columns(self, call: Call, run: Path, pool: Path) -> None:
        out = pool.parent / "out.extxyz"
        code, text, _ = call(run, pool, "-n", 4, "-o", out, "--audit", 0.25)
        assert code == 0
        assert "chosen by" in text
        assert "4 frames" in text
        before, found = frames_of(pool), frames_of(out)
        for i, a in enumerate(found):
            assert set(COLUMNS) <= a.info.keys()
            assert a.info["select_order"] == i + 1
            assert a.info["select_method"] == ("covariance" if i else "audit")
            same = before[a.info["select_frame"]]
            assert a.info["select_source"] == str(pool)
            assert a.info["select_group"] == same.info["trajectory"] == a.info["trajectory"]
            np.testing.assert_array_equal(a.positions, same.positions)
            np.testing.assert_array_equal(a.arrays["REF_forces"], same.arrays["REF_forces"])
        gains = [a.info["select_gain"] for a in found[1:]]
        assert gains == sorted(gains, reverse=True)
        assert sorted(p.name for p in pool.parent.iterdir()) == ["out.extxyz", "pool.extxyz"]

    def test_atoms(self, call: Call, run: Path, pool: Path) -> None:
        found = chosen(call, run, pool, pool.parent / "out.extxyz", "--budget-atoms", 25)
        assert 22 < found["atoms"] <= 25
        assert found["atoms"] == sum(c["atoms"] for c in found["chosen"])
        per_atom = [c["gain"] / c["atoms"] for c in found["chosen"]]
        assert per_atom[:4] == sorted(per_atom[:4], reverse=True)

    def test_frames_of_the_run_and_copies(self, call: Call, run: Path, pool: Path) -> None:
        """In any role, and written with fewer digits; of copies the first in the alphabet stays."""
        train = frames_of(run.parent.parent / "train.extxyz")
        rounded = train[3].copy()
        rounded.positions = np.round(rounded.positions, 5)
        atoms = frames_of(pool)
        write(pool, [train[0], *atoms[:5], atoms[2].copy(), rounded])
        found = chosen(call, run, pool, pool.parent / "out.extxyz", "-n", 5)
        assert found["candidates"] == 5
        reasons = {e["place"].rpartition(" ")[2]: e["reason"] for e in found["excluded"]}
        assert reasons.keys() == {"0", "6", "7"}
        assert "of the run" in reasons["0"]
        assert "of the run" in reasons["7"]
        assert "frame 3" in reasons["6"]

    def test_bad_frames(self, call: Call, run: Path, pool: Path) -> None:
        """Elements that the model or its training frames do not have, and broken geometry."""
        atoms = frames_of(pool)
        unknown, bad = atoms[1].copy(), atoms[2].copy()
        unknown.numbers[0] = 92
        bad.positions[0] = np.nan
        write(pool, [atoms[0], unknown, bad, *atoms[3:6]])
        out = pool.parent / "out.extxyz"
        code, _, error = call(run, pool, "-n", 2, "-o", out)
        assert code == 2
        assert "frame 1" in error
        assert "What to do" in error
        assert not out.exists()
        code, text, error = call(run, pool, "-n", 2, "-o", out, "--skip-bad", "--json")
        assert code == 3
        assert [f["place"].rpartition(" ")[2] for f in json.loads(text)["left_out"]] == ["1", "2"]
        assert len(frames_of(out)) == 2

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (("-n", 31), "31 frames are asked for, and there are 30"),
            (("-n", 9, "--group-limit", 2), "there are 8 to choose from with at most 2"),
            (("--budget-atoms", 2), "smallest candidate"),
            ((), "how much to choose"),
        ],
    )
    def test_more_than_there_is(
        self,
        call: Call,
        run: Path,
        pool: Path,
        options: tuple[object, ...],
        says: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Told before any candidate is evaluated."""

        def never(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("evaluated")

        monkeypatch.setattr("blip_ft.select.features.output_gradients", never)
        out = pool.parent / "out.extxyz"
        code, _, error = call(run, pool, "-o", out, *options)
        assert code == 2
        assert says in " ".join(error.split())
        assert "What to do" in error
        assert not out.exists()

    def test_nothing_but_training_frames(self, call: Call, run: Path, tmp_path: Path) -> None:
        code, _, error = call(run, run.parent.parent / "train.extxyz", "-n", 1, "-o", tmp_path / "o.extxyz")
        assert code == 2
        assert "no candidate is left of 24 frames: 24 excluded" in error

    def test_no_run(self, call: Call, run: Path, pool: Path) -> None:
        code, _, error = call(run / "model", pool, "-n", 1, "-o", pool.parent / "o.extxyz")
        assert code == 2
        assert "recipe.yaml" in error


class TestFamilies:
    def test_without_a_covariance(self, run: Path, tmp_path: Path, pool: Path) -> None:
        known, candidates = Known.of_run(run), look(str(pool), load_model(run), Known.of_run(run))
        potential = potential_of("weight", prior_scale=0.1)
        potential.ood = load_model(run).ood
        for method in ("covariance", "energy"):
            with pytest.raises(BlipError, match="'weight' has no covariance") as caught:
                choose(potential, known, candidates, Wish(method, 2), scratch=tmp_path)
            assert "sketch" in caught.value.remedy
        for method in ("top", "ood", "farthest"):
            assert len(choose(potential, known, candidates, Wish(method, 2), scratch=tmp_path)) == 2

    def test_top_is_what_predict_says(self, run: Path, pool: Path, tmp_path: Path) -> None:
        potential, known, candidates = opened(run, pool)
        found = choose(potential, known, candidates, Wish("top", 30), scratch=tmp_path)
        scores = [c.score for c in found]
        assert scores == sorted(scores, reverse=True)

    def test_coordinates_have_the_length_of_the_score(self, run: Path, pool: Path) -> None:
        potential = load_model(run)
        batch = potential.backbone.batch(frames_of(pool))
        features = potential(batch).node_features
        where = potential.ood.coordinates(features, batch.numbers)
        torch.testing.assert_close(
            where.norm(dim=1), potential.ood.score(features, batch.numbers), rtol=1e-5, atol=0
        )


class TestCaution:
    def test_more_labels_than_samples(self, call: Call, run: Path, pathwise: Path, pool: Path) -> None:
        """32 samples hold what three frames of nine labels leave open; a sketch has no such bound."""
        out = pool.parent / "out.extxyz"
        for model, n, warned in ((pathwise, 3, False), (pathwise, 4, True), (run, 4, False)):
            code, _, error = call(model, pool, "-n", n, "-o", out, "--overwrite")
            assert code == 0
            assert ("32 numbers" in error) is warned

    def test_long_lists_are_cut(self, call: Call, run: Path, pool: Path) -> None:
        train = frames_of(run.parent.parent / "train.extxyz")
        write(pool, [*train, *frames_of(pool)[:2]])
        out = pool.parent / "out.extxyz"
        code, _, error = call(run, pool, "-n", 2, "-o", out, "--method", "random")
        assert code == 0
        assert error.count("excluded:") == 21
        assert "4 more" in error
        assert len(chosen(call, run, pool, out, "-n", 2, "--overwrite")["excluded"]) == 24


class TestLeftOut:
    @pytest.mark.parametrize(
        ("value", "says"), [(np.nan, "not finite"), (MemoryError("no"), "do not fit into memory")]
    )
    def test_when_it_is_evaluated(
        self,
        call: Call,
        run: Path,
        pool: Path,
        value: Any,
        says: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Refused, or left out and listed; all others are chosen as if it were not there."""

        def stds(potential: Any, atoms: list[Atoms], **options: Any) -> list[dict[str, Any]]:
            for a in atoms:
                if len(a) == 6 and isinstance(value, Exception):
                    raise value
            return [
                {"forces_std": np.full((len(a), 3), value if len(a) == 6 else a.positions[1, 0])}
                for a in atoms
            ]

        monkeypatch.setattr("blip_ft.select.features.predict_atoms", stds)
        out = pool.parent / "out.extxyz"
        options = ("-n", 20, "--method", "top", "--json", "--audit", 0.2)
        code, _, error = call(run, pool, "-o", out, *options)
        assert code == 2
        assert says in error
        assert "frame 0" in error
        assert "--skip-bad" in error
        assert not out.exists()
        code, text, _ = call(run, pool, "-o", out, *options, "--skip-bad")
        assert code == 3
        found = json.loads(text)
        assert len(found["left_out"]) == 10
        assert {c["atoms"] for c in found["chosen"]} == {3}
        assert len(found["chosen"]) == len(frames_of(out)) == 20


def test_defaults_of_the_command_are_those_of_the_library() -> None:
    """They are written twice, so that ``--help`` imports nothing."""
    parser = argparse.ArgumentParser()
    command.add(parser)
    given = parser.parse_args(["run", "pool", "-o", "out", "-n", "3"])
    wish = Wish(frames=3)
    assert (given.method, given.audit, given.seed) == (wish.method, wish.audit, wish.seed)
    assert (given.projections, given.batch_size) == (wish.projections, wish.structures)
    assert (given.storage, given.batch_atoms) == (wish.precision, wish.batch_atoms)
    (methods,) = (a.choices for a in parser._actions if a.dest == "method")
    assert tuple(methods) == METHODS


class TestSource:
    def test_that_changes_meanwhile(self, run: Path, pool: Path, tmp_path: Path) -> None:
        potential, known, candidates = opened(run, pool)
        atoms = frames_of(pool)
        write(pool, [*atoms[:10], *structures(20, 99)])
        with pytest.raises(DataError, match="has changed"):
            choose(potential, known, candidates, Wish(frames=2), scratch=tmp_path)
        write(pool, atoms[:10])
        with pytest.raises(DataError, match="have gone"):
            choose(potential, known, candidates, Wish(frames=2), scratch=tmp_path)

    def test_rows_on_disk(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        rows = [rng.normal(size=(k, 5)) for k in (2, 1, 4)]
        file = RowFile(tmp_path, 5, "float32", 7)
        for r in rows:
            file.append(r)
            np.testing.assert_allclose(file[0], rows[0], rtol=1e-6)
        for i, r in enumerate(rows):
            np.testing.assert_allclose(file[i], r, rtol=1e-6)
        np.testing.assert_allclose(
            np.concatenate([b for _, b in file.blocks()]), np.concatenate(rows), rtol=1e-6
        )
        file.close()
        assert not list(tmp_path.iterdir())

    def test_no_space(self, tmp_path: Path) -> None:
        with pytest.raises(BlipError):
            RowFile(tmp_path, 10**6, "float32", 10**9)
