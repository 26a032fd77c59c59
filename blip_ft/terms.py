"""Terms of the loss by name, and objectives as lists of them; imports no torch.

``objective.kind`` names an objective, a term, or several joined by ``+`` (``elbo+toy``). A term of another package is
an entry point::

    [project.entry-points."blip_ft.terms"]
    toy = "toy_term:Toy"

or is registered on the fly, by putting :func:`term` over a subclass of :class:`blip_ft.training.terms.Term`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

from blip_ft.errors import nearest
from blip_ft.registry import Registry, resolve

Class = TypeVar("Class", bound=type)


@dataclass(frozen=True)
class TermSpec:
    """A term, and what it needs.

    Attributes:
        name: in ``objective.kind``.
        law: the :class:`~blip_ft.training.terms.Term`, or ``module:class``.
        draws: independent noise samples per step that it takes where the recipe does not say.
        least_draws: fewest that it can work with.
        compares: whether it compares predictions on frames beside the training frames.
        learns_spread: whether the spread follows it step by step, as no closed form does.
        fixed_noise: whether it is in units of the label noise, which can then not be learned from it.
        everywhere: whether it stands beside every objective, in plain fine-tuning too, where a recipe has
            something for it.
    """

    name: str
    law: Any
    draws: int = 1
    least_draws: int = 1
    compares: bool = False
    learns_spread: bool = False
    fixed_noise: bool = False
    everywhere: bool = False

    @property
    def term_class(self) -> Any:
        """The class; imports torch."""
        return resolve(self.law)


@dataclass(frozen=True)
class ObjectiveSpec:
    """A named list of terms.

    Attributes:
        words: what training minimises, for the line that announces it.
        terms: names, in the order in which they are summed.
        as_plain: whether plain fine-tuning leads to the mean of it, around which a covariance may be put.
    """

    words: str
    terms: tuple[str, ...]
    as_plain: bool = False

    @property
    def specs(self) -> list[TermSpec]:
        """Of the terms."""
        return [TERMS[name] for name in self.terms]

    @property
    def draws(self) -> int:
        """Noise samples per step where the recipe does not say."""
        return max(spec.draws for spec in self.specs)

    def __add__(self, other: ObjectiveSpec) -> ObjectiveSpec:
        """The terms of both, each once."""
        return ObjectiveSpec(
            f"{self.words} and {other.words}", tuple(dict.fromkeys((*self.terms, *other.terms)))
        )


_OURS = (
    TermSpec("likelihood", "blip_ft.training.terms:ExpectedNll"),
    TermSpec("kl", "blip_ft.training.terms:WeightKl"),
    TermSpec("kl_of_mean", "blip_ft.training.terms:MeanKl"),
    TermSpec(
        "crps",
        "blip_ft.training.terms:LabelCrps",
        draws=2,
        least_draws=2,
        learns_spread=True,
        fixed_noise=True,
    ),
    TermSpec("function_kl", "blip_ft.training.function_prior:FunctionKl", draws=2, compares=True),
    TermSpec("rehearsal", "blip_ft.training.replay:Rehearsal", everywhere=True),
)

TERMS: Registry[TermSpec] = Registry("blip_ft.terms")
for _spec in _OURS:
    TERMS.add(_spec.name, _spec)

#: what plain fine-tuning minimises
PLAIN = ObjectiveSpec("the likelihood of the mean", ("likelihood",), as_plain=True)

OBJECTIVES: Registry[ObjectiveSpec] = Registry("blip_ft.objectives")
for _name, _objective in {
    "elbo": ObjectiveSpec("the ELBO", ("likelihood", "kl"), as_plain=True),
    "crps": ObjectiveSpec("the CRPS", ("crps", "kl_of_mean")),
    "elbo+crps": ObjectiveSpec("the ELBO and the CRPS", ("likelihood", "crps", "kl")),
    "function_kl": ObjectiveSpec(
        "the likelihood and the KL of the predictions", ("likelihood", "function_kl")
    ),
}.items():
    OBJECTIVES.add(_name, _objective)


def term(name: str, **needs: Any) -> Callable[[Class], Class]:
    """Register a class as a term, a decorator.

    Args:
        name: in ``objective.kind``.
        needs: further arguments of :class:`TermSpec`.
    """

    def register(cls: Class) -> Class:
        TERMS.add(name, TermSpec(name, cls, **needs))
        return cls

    return register


def objective(name: str, words: str, terms: Iterable[str], *, as_plain: bool = False) -> None:
    """Register a list of terms under a name; arguments as for :class:`ObjectiveSpec`."""
    OBJECTIVES.add(name, ObjectiveSpec(words, tuple(terms), as_plain))


def objective_spec(kind: str) -> ObjectiveSpec:
    """The terms of an ``objective.kind``.

    Raises:
        ValueError: a part of it is neither an objective nor a term.
    """
    if kind in OBJECTIVES:
        return OBJECTIVES[kind]
    return reduce(ObjectiveSpec.__add__, (_part(name) for name in kind.split("+")))


def _part(name: str) -> ObjectiveSpec:
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if name in TERMS:
        return ObjectiveSpec(f"'{name}'", (TERMS[name].name,))
    known = nearest(name, {*OBJECTIVES.names(), *TERMS.names()})
    raise ValueError(f"there is no objective or term '{name}' (names are joined by +): {known}")


def everywhere() -> list[TermSpec]:
    """Terms that stand beside every objective."""
    return [spec for name in TERMS.names() if (spec := TERMS[name]).everywhere]
