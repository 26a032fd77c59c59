"""A posterior family and a term of the loss that the package has never heard of, through a whole run."""

from __future__ import annotations

import ast
import csv
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import pytest
import torch
import yaml
from ase import Atoms
from ase.io import write
from pydantic import Field
from torch import Tensor, nn

import blip_ft
from blip_ft import registry
from blip_ft.cli import main
from blip_ft.config import PosteriorConfig, parse_recipe
from blip_ft.data.frame import to_atoms
from blip_ft.errors import RecipeError
from blip_ft.families.base.options import FamilyOptions, Refuse
from blip_ft.families.base.posterior import Posterior
from blip_ft.families.registry import FAMILIES, family
from blip_ft.terms import OBJECTIVES, TERMS, objective, term
from blip_ft.training.terms import Part, Sources, Start, Step, Term
from blip_ft.uncertainty.predict import predict_atoms
from blip_ft.variational.base import VariationalLayer
from blip_ft.variational.prior import PretrainedPrior
from blip_ft.variational.sites import Site

from .labelled import frames


class ToyOptions(FamilyOptions):
    """One std for all weights."""

    law: ClassVar[Any]

    family: Literal["toy"] = "toy"
    width: Annotated[float, Field(gt=0)] = 0.01
    """std at the start, in units of each matrix's rms"""

    def check(self, refuse: Refuse) -> None:
        if self.width > 1:
            refuse("the width is more than the weights themselves", "posterior.width", "make it smaller")


class ToyPosterior(Posterior):
    options: ClassVar[type[FamilyOptions]] = ToyOptions

    def __init__(self, sites: Sequence[Site], prior: PretrainedPrior, width: float) -> None:
        super().__init__(sites, prior, width)
        like = prior.rms(self.sites[0].name)
        self.log_std = nn.Parameter(torch.full((), width, dtype=like.dtype).log())

    @classmethod
    def make(
        cls,
        sites: Sequence[Site],
        layers: Mapping[str, VariationalLayer],
        prior: PretrainedPrior,
        options: Any,
    ) -> Self:
        return cls(sites, prior, options.width)

    @property
    def latent_numel(self) -> int:
        return self.n_weights

    def sample(self, latent: Tensor) -> dict[str, Tensor]:
        return self._by_site(self.log_std.exp() * latent)

    def kl(self) -> Tensor:
        u = self.log_std - torch.tensor(self.prior.prior_scale).log()
        return self.n_weights * (0.5 * (torch.exp(2 * u) - 1) - u)

    def std(self) -> dict[str, Tensor]:
        return {s.name: self.log_std.exp() * self.prior.rms(s.name).expand(s.shape) for s in self.sites}


ToyOptions.law = ToyPosterior


class Quiet(Term):
    """Forces on stretched copies of the training frames must not be large."""

    def __init__(self, start: Start, frames: Sequence[Atoms]) -> None:
        self.backbone, self.frames = start.potential.backbone, frames

    @classmethod
    def load(cls, sources: Sources) -> list[Atoms]:
        stretched = [to_atoms(row, labels=False) for row in sources.train]
        for atoms in stretched:
            atoms.set_cell(1.02 * atoms.cell[:], scale_atoms=True)
        return stretched

    @classmethod
    def build(cls, start: Start, frames: Sequence[Any]) -> Self:
        return cls(start, frames)

    def __call__(self, step: Step) -> Part:
        batch = self.backbone.batch([self.frames[step.index % len(self.frames)]])
        batch.keys = [step.index]
        forces = torch.stack([p.forces for p in step.predict(batch)])
        return Part("quiet", alone=1e-2 * forces.square().mean())


@pytest.fixture
def registered() -> Iterator[None]:
    """As the decorators do it where a module is imported."""
    family(ToyOptions)
    term("quiet", draws=3)(Quiet)
    objective("mine", "what I want", ("likelihood", "kl", "quiet"))
    yield
    FAMILIES.remove("toy")
    TERMS.remove("quiet")
    OBJECTIVES.remove("mine")


def tree(**sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "run",
        "output": "runs",
        "data": {"train": "train.extxyz", "batch_size": 4},
        "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
        "posterior": {"family": "toy", "prior_scale": 0.2, "width": 0.02},
        "objective": {"temperature": 1e-4, "kind": "elbo+quiet"},
        "uncertainty": {"n_draws": 2, "linearity_draws": 2},
        "trainer": {"max_epochs": 2, "accelerator": "cpu"},
    }
    return base | sections


def fit(folder: Path, name: str, **sections: Any) -> list[dict[str, str]]:
    """Rows of the log of the steps."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree(name=name, **sections)))
    assert main(["fit", str(folder / "recipe.yaml")]) == 0
    with (folder / "runs" / name / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.usefixtures("registered")
def test_a_run_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write("train.extxyz", frames(24, other=True))
    rows = fit(tmp_path, "run", plain={"enabled": True})
    n_train = json.loads(Path("runs/run/receipt.json").read_text())["data"]["sets"]["train"]["n_frames"]
    for row in rows:
        nll, kl, quiet = (float(row[f"train/{name}"]) for name in ("nll", "kl", "quiet"))
        assert quiet > 0
        assert float(row["train/loss"]) == pytest.approx(nll + 1e-4 / n_train * kl + quiet, rel=1e-5)
    assert "the ELBO and 'quiet' (toy posterior)" in " ".join(capsys.readouterr().err.split())
    with (tmp_path / "runs/run/plain/metrics.csv").open() as file:
        assert "train/quiet" not in file.read(), "a term of the objective, not one of every training"

    used = yaml.safe_load(Path("runs/run/recipe.yaml").read_text())
    assert used["posterior"] == {"family": "toy", "prior_scale": 0.2, "perturbed_share": 0.4, "width": 0.02}
    potential = blip_ft.load("runs/run")
    assert isinstance(potential.posterior, ToyPosterior)
    assert potential.posterior.log_std.exp().item() != pytest.approx(0.02, rel=1e-3), "it was trained"
    (item,) = predict_atoms(potential, frames(1))
    assert item["energy_std"] > 0
    metrics = json.loads(Path("runs/run/metrics.json").read_text())
    assert metrics["blip"]["seen"]["force_crps_mev_per_ang"] > 0


@pytest.mark.usefixtures("registered")
def test_a_registered_objective_is_its_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("train.extxyz", frames(24, other=True))
    losses = [
        [row["train/loss"] for row in fit(tmp_path, name, objective={"temperature": 1e-4, "kind": kind})]
        for name, kind in (("a", "mine"), ("b", "elbo+quiet"))
    ]
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("registered")
class TestKeys:
    def test_draws_are_those_of_the_term(self) -> None:
        from blip_ft.terms import objective_spec

        assert objective_spec("elbo").draws == 1
        assert objective_spec("elbo+quiet").draws == 3
        assert objective_spec("elbo+quiet").terms == ("likelihood", "kl", "quiet")

    @pytest.mark.parametrize(
        ("posterior", "parts"),
        [
            ({"family": "toy", "rank": 3}, ["posterior.rank", "pathwise, sketch, subspace", "not to 'toy'"]),
            ({"family": "weight", "width": 0.1}, ["posterior.width", "posterior.family=toy"]),
            ({"family": "toy", "widht": 0.1}, ["posterior.widht", "did you mean 'width'?"]),
            ({"family": "toy", "width": -1}, ["posterior.width", "greater than 0"]),
            ({"family": "toy", "width": 2}, ["posterior.width", "more than the weights"]),
            ({"family": "tyo"}, ["posterior.family", "'toy'", "'pathwise'"]),
        ],
    )
    def test_refused_by_name(self, posterior: dict[str, Any], parts: list[str]) -> None:
        with pytest.raises(RecipeError) as caught:
            parse_recipe(tree(posterior={"prior_scale": 0.1} | posterior))
        for part in parts:
            assert part in str(caught.value)
        assert caught.value.field == parts[0]

    def test_unknown_terms(self) -> None:
        with pytest.raises(RecipeError, match=r"'quiett'.*'quiet'") as caught:
            parse_recipe(tree(objective={"kind": "elbo+quiett", "temperature": 1.0}))
        assert caught.value.field == "objective.kind"

    def test_a_name_is_taken_once(self) -> None:
        with pytest.raises(ValueError, match="'toy' already"):
            FAMILIES.add("toy", PosteriorConfig)
        family(ToyOptions)  # the same again, as where a module is loaded twice


def test_without_them_they_are_unknown() -> None:
    with pytest.raises(RecipeError, match="no such family"):
        parse_recipe(tree())
    with pytest.raises(RecipeError, match="'quiet'"):
        parse_recipe(tree(posterior={"family": "weight", "prior_scale": 0.1}))


ROOT = Path(__file__).parents[2]
#: files of the package outside ``families`` and the table of terms; adapters have families of models
ELSEWHERE = [
    path
    for path in sorted((ROOT / "blip_ft").rglob("*.py"))
    if path.relative_to(ROOT).parts[:2] not in {("blip_ft", "families"), ("blip_ft", "terms.py")}
]


def test_nobody_asks_for_a_family_or_an_objective_by_name() -> None:
    """No comparison with a name, no import of a family's own module; ``base`` and ``registry`` are for all."""
    names = {*FAMILIES.known(), *OBJECTIVES.known()} - {"channel", "weight"}  # words with other meanings
    assert {"pathwise", "elbo"} <= names
    found = []
    for path in ELSEWHERE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare | ast.MatchValue):
                text = ast.unparse(node)
                compared = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                if names & {v for v in compared if isinstance(v, str)} or ".family ==" in text:
                    found.append(f"{path.name}: {text}")
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                room = node.module.removeprefix("blip_ft.families.").partition(".")[0]
                if room != "blip_ft" and room in FAMILIES.known():
                    found.append(f"{path.name}: {ast.unparse(node)}")
    assert found == []
    assert len(ELSEWHERE) > 100


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an installed package."""

    def load() -> type[ToyOptions]:
        return ToyOptions

    class Points(list[Any]):
        names = {"toy"}

    point = type("Point", (), {"load": staticmethod(load)})

    def entry_points(*, group: str, name: str = "toy") -> Points:
        return Points([point] if group == "blip_ft.families" and name == "toy" else [])

    monkeypatch.setattr(registry.importlib.metadata, "entry_points", entry_points)
    assert importlib.metadata.entry_points is entry_points
    try:
        assert "toy" in FAMILIES.names()
        options = PosteriorConfig(family="toy", width=0.5)
        assert isinstance(options, ToyOptions)
    finally:
        FAMILIES.remove("toy")
