"""Variational layers around any torch module, for models that are no interatomic potentials.

A batch of such a module has rows (nodes, edges, samples) that belong to structures (graphs, samples); noise is a
function of a structure's key, never of the batch that it comes in. docs/python.md has an example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from blip_ft.config import PosteriorConfig
from blip_ft.errors import ConversionError
from blip_ft.families.model import VariationalModel, drawing
from blip_ft.variational.convert import convert, matches
from blip_ft.variational.layers import VariationalLayer, layer_type
from blip_ft.variational.noise import OFF, Noise, RowLayout

#: the kind of rows of modules that no pattern names
ROW = "row"


class _Plain:
    """What conversion asks of a model.

    Args:
        module: whose linear layers are replaced in place.
        kinds: {kind of row: regular expression on module names}.
    """

    name = "torch"
    presets: Mapping[str, tuple[str, ...]] = {"all": (".*",)}
    keep: Mapping[str, str] = {}

    def __init__(self, module: nn.Module, kinds: Mapping[str, str]) -> None:
        self.model, self.kinds = module, kinds

    def layer_type(self, name: str, module: nn.Module) -> type[VariationalLayer] | str:
        """As the class of the module has it."""
        del name
        return layer_type(module)

    def row_kind(self, module_name: str) -> str:
        """The first kind whose pattern matches."""
        found = (kind for kind, pattern in self.kinds.items() if matches([pattern], module_name))
        return next(found, ROW)


class BayesianModule(VariationalModel):
    """A torch module whose linear layers are variational; step 0 is the module, to the bit.

    Args:
        module: converted in place; its ``forward`` stays as it is.
        family: posterior family whose spread is trained step by step: ``weight``, ``channel``, ``adaptive``.
        train: modules whose mean is trained, as regular expressions on their names; ``all``: every linear layer;
            ``rest``: all other parameters too.
        noise: modules whose weights carry noise, likewise.
        rows: {kind of row: regular expression on module names}, what the input rows of a layer are; layers that none
            names have rows of the kind ``row``.
        seed: of all noise.
        n_draws: fixed draws to predict with.
        options: keys of ``posterior`` (docs/recipes.md).

    Raises:
        ConversionError: a pattern matches nothing, the noise mode does not suit the family, or the module is itself a
            layer.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        family: str = "weight",
        train: str | Sequence[str] = "all",
        noise: str | Sequence[str] = "all",
        rows: Mapping[str, str] | None = None,
        seed: int = 0,
        n_draws: int = 16,
        **options: Any,
    ) -> None:
        super().__init__()
        if not list(module.children()):
            raise ConversionError(
                f"{type(module).__name__} has no modules inside that could be replaced",
                remedy="put it into torch.nn.Sequential",
            )
        self.module = module
        posterior = PosteriorConfig(family=family, **options)
        if posterior.closed_form:
            raise ConversionError(
                f"'{family}' is fitted to gradients of all labels, which recipes make",
                remedy="use family='weight', 'channel' or 'adaptive'",
                field="family",
            )
        # as in BayesianPotential: gradients of what is frozen are not made
        self.vary(
            convert(_Plain(module, rows or {}), train=train, noise=noise),
            posterior,
            seed=seed,
            n_draws=n_draws,
        )

    @contextmanager
    def perturbed(
        self, noise: Noise, keys: Sequence[int], rows: Mapping[str, Tensor] | None = None
    ) -> Iterator[None]:
        """Perturb the weights for the calls inside.

        Args:
            noise: which perturbation.
            keys: one number for each structure of the batch; not read in ``draw`` and ``off``.
            rows: {kind: (rows,) ascending number of the structure in ``keys`` that each row belongs to}; the kind
                ``row`` is one row per structure unless given.

        Raises:
            ValueError: rows of a kind that layers have are not given.
        """

        def layouts() -> Mapping[str, RowLayout]:
            given = {ROW: torch.arange(len(keys), device=self.device), **(rows or {})}
            kinds = {layer.rows for layer in self.converted.layers.values()}
            if missing := sorted(kinds - given.keys()):
                raise ValueError(f"rows of these kinds are not given: {', '.join(missing)}")
            return {kind: RowLayout.from_index(index, len(keys)) for kind, index in given.items()}

        with self.perturbed_by(noise, keys, layouts):
            yield

    def forward(
        self,
        *args: Any,
        noise: Noise = OFF,
        keys: Sequence[int] = (),
        rows: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Any:
        """The module's output, with the mean weights or with noise (:meth:`perturbed`)."""
        with self.perturbed(noise, keys, rows):
            return self.module(*args, **options)

    @torch.no_grad()
    def draws(self, *args: Any, n_draws: int | None = None, **options: Any) -> Tensor:
        """(K, ...) outputs at K draws of the posterior, the same ones in every call.

        Args:
            args: of the module.
            n_draws: K; by default the number that the model was made with.
            options: of the module.

        Raises:
            BlipError: fewer than two.
        """
        count = self.n_draws if n_draws is None else n_draws
        with drawing(self, count):
            return torch.stack([self(*args, noise=Noise.of_draw(k), **options) for k in range(count)])
