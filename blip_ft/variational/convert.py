"""Replace a backbone's linear modules by variational ones, say what was done, and undo it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from blip_ft.errors import ConversionError, nearest
from blip_ft.variational.base import VariationalLayer
from blip_ft.variational.lora import LowRank, lora_layers
from blip_ft.variational.mean import Change, FullChange
from blip_ft.variational.noise import NoiseState
from blip_ft.variational.sites import Site


class Convertible(Protocol):
    """What a backbone says of its model: which modules can be varied, and by which names they are chosen."""

    @property
    def name(self) -> str:
        """What to call it in a message."""

    @property
    def model(self) -> nn.Module:
        """The vendor's model, whose linear modules are replaced in place."""

    @property
    def presets(self) -> Mapping[str, tuple[str, ...]]:
        """``{preset: regular expressions on module names}``."""

    @property
    def keep(self) -> Mapping[str, str]:
        """Modules that must stay as they are: ``{regular expression: reason}``."""

    def layer_type(self, name: str, module: nn.Module) -> type[VariationalLayer] | str:
        """The variational form of a module, or the reason why there is none."""

    def row_kind(self, module_name: str) -> str:
        """What a module's input rows are: ``atom``, ``edge``, ..."""


@dataclass(frozen=True)
class ModulePlan:
    """What happens to one module that has parameters of its own."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_weights: int
    action: str  # "converted" or "left"
    trained: bool
    noisy: bool
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """Every module with parameters: converted, or left and why."""

    table: tuple[ModulePlan, ...]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The table as plain dicts, for JSON and for printing."""
        return [asdict(r) | {"shape": list(r.shape)} for r in self.table]

    @property
    def counts(self) -> dict[str, int]:
        """Number of weights: converted, trained, noisy, left."""
        done = [r for r in self.table if r.action == "converted"]
        return {
            "converted": sum(r.n_weights for r in done),
            "trained": sum(r.n_weights for r in self.table if r.trained),
            "noisy": sum(r.n_weights for r in done if r.noisy),
            "left": sum(r.n_weights for r in self.table if r.action == "left"),
        }


class Converted:
    """The result of :func:`convert`: sites, layers and the shared noise state."""

    def __init__(
        self,
        sites: dict[str, Site],
        layers: dict[str, VariationalLayer],
        noisy: tuple[str, ...],
        rest: dict[str, nn.Parameter],
        noise: NoiseState,
        report: ConversionReport,
    ) -> None:
        self.sites, self.layers, self.noisy = sites, layers, noisy
        self.rest, self.noise, self.report = rest, noise, report

    @property
    def pretrained(self) -> dict[str, Tensor]:
        """{site: pretrained weight}."""
        return {name: self.layers[name].pretrained for name in self.sites}

    @property
    def deltas(self) -> dict[str, Tensor]:
        """{site: the mean's difference from it}; those that are trained require grad."""
        return {name: self.layers[name].delta for name in self.sites}

    @property
    def mean_parameters(self) -> list[nn.Parameter]:
        """Trained parameters of the linear blocks' means."""
        return [p for name in self.sites for p in self.layers[name].change.parameters() if p.requires_grad]

    def reset_mean(self) -> None:
        """Put the means of the linear blocks back to the pretrained weights."""
        for name in self.sites:
            self.layers[name].change.reset()


def _patterns(spec: str | Sequence[str], backbone: Convertible) -> tuple[list[str], bool]:
    """Presets and patterns -> (regular expressions, whether ``rest`` is in).

    Raises:
        ConversionError: not a regular expression.
    """
    out: list[str] = []
    rest = False
    for item in [spec] if isinstance(spec, str) else spec:
        if item == "rest":  # everything: all linear blocks and what is left beside them
            rest = True
            out += [".*"]
        elif item in backbone.presets:
            out += list(backbone.presets[item])
        elif item != "none":
            try:
                re.compile(item)
            except re.error as error:
                raise ConversionError(
                    f"'{item}' is neither a preset nor a regular expression ({error})",
                    remedy=f"presets of this adapter: {', '.join(backbone.presets)}",
                    field="model.train / model.noise",
                ) from error
            out.append(item)
    return out, rest


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """id(parameter) -> modules that hold it; a module in two places appears once per place."""
    out: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                out.setdefault(id(parameter), []).append((name, module))
    return out


def plan(
    backbone: Convertible, *, train: str | Sequence[str] = "all", noise: str | Sequence[str] = "all"
) -> ConversionReport:
    """What :func:`convert` would do; changes nothing.

    Raises:
        ConversionError: a pattern matches no convertible module, or is none.
    """
    model = backbone.model
    owners = _owners(model)
    trained, rest = _patterns(train, backbone)
    noisy, _ = _patterns(noise, backbone)
    rows: list[ModulePlan] = []
    seen: set[int] = set()
    convertible: set[str] = set()
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        if not own or name.startswith(inside):
            continue
        reason = _reason(name, module, backbone, owners)
        kind = backbone.layer_type(name, module)
        weight = module._parameters.get("weight") if isinstance(kind, str) else kind.parameter(module)
        twin = weight is not None and id(weight) in seen
        seen.update(id(p) for p in own)
        converted = not reason
        # a tied weight goes by all of its names: what holds for one place holds for the others
        names = [n for n, _ in owners[id(weight)]] if converted else [name]
        shape = tuple(own[0].shape)
        size = sum(p.numel() for p in own)
        if converted:
            assert not isinstance(kind, str)
            shape = kind.shape(module)
            size = math.prod(shape)
            inside += (f"{name}.",)  # its weight may be kept in submodules
        convertible.update(names if converted else [])
        is_trained = any(matches(trained, n) for n in names)
        rows.append(
            ModulePlan(
                name=name,
                type=type(module).__name__,
                shape=shape,
                n_weights=0 if twin else size,
                action="converted" if converted else "left",
                trained=is_trained if converted else rest and not matches(list(backbone.keep), name),
                noisy=converted and any(matches(noisy, n) for n in names),
                reason=reason or ("shares its weight with an earlier module" if twin else ""),
            )
        )
    for pattern in [*trained, *noisy]:
        if not any(matches([pattern], n) for n in convertible):
            raise ConversionError(
                f"the pattern '{pattern}' matches no convertible module of this {backbone.name} model",
                remedy=f"{nearest(pattern, [*backbone.presets, *convertible])} "
                "List all modules with: blip-finetune inspect",
                field="model.train / model.noise",
            )
    return ConversionReport(tuple(rows))


def _reason(
    name: str, module: nn.Module, backbone: Convertible, owners: dict[int, list[tuple[str, nn.Module]]]
) -> str:
    """Why a module stays as it is; empty if it can be converted."""
    for pattern, why in backbone.keep.items():
        if matches([pattern], name):
            return why
    kind = backbone.layer_type(name, module)
    if isinstance(kind, str):
        return kind
    weight = kind.parameter(module)
    if id(weight) not in owners:
        return "its weight is computed from other parameters"
    for other, holder in owners[id(weight)]:
        if matches(list(backbone.keep), other) or isinstance(backbone.layer_type(other, holder), str):
            return f"its weight is shared with {other}, which stays as it is"
    return ""


def convert(
    backbone: Convertible,
    *,
    train: str | Sequence[str] = "all",
    noise: str | Sequence[str] = "all",
    low_rank: LowRank | None = None,
) -> Converted:
    """Replace linear modules in place.

    Args:
        backbone: its ``model`` is changed; tied weights stay tied.
        train: modules whose mean is trained: a preset of the adapter (``all``, ``scalar``, ...),
            regular expressions on module names, ``none``; ``rest`` stands for ``all`` and every
            other parameter.
        noise: modules that carry noise, likewise.
        low_rank: train changes of low rank instead of full ones.

    Raises:
        ConversionError: a pattern matches no convertible module, or the model is already converted.
        MissingBackendError: ``low_rank`` without peft.
    """
    model = backbone.model
    if any(isinstance(m, VariationalLayer) for m in model.modules()):
        raise ConversionError("the model is already converted", remedy="unload() it first")
    report = plan(backbone, train=train, noise=noise)
    state = NoiseState()
    sites: dict[str, Site] = {}
    layers: dict[str, VariationalLayer] = {}
    by_weight: dict[int, str] = {}
    trained: dict[str, tuple[nn.Module, type[VariationalLayer]]] = {}
    replaced: dict[int, VariationalLayer] = {}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for row in report.table:
        if row.action != "converted":
            continue
        module = model.get_submodule(row.name)
        kind = backbone.layer_type(row.name, module)
        assert not isinstance(kind, str)
        weight = kind.parameter(module)
        first = by_weight.setdefault(id(weight), row.name)
        if first == row.name:
            if row.trained:
                trained[first] = (module, kind)
            sites[first] = Site(first, kind.shape(module), kind.blocks(module))
            delta = nn.Parameter(weight.new_zeros(kind.shape(module)), requires_grad=row.trained)
            change: Change = FullChange(delta)
        else:
            change = layers[first].change
        layer = kind(module, sites[first], change, state, backbone.row_kind(row.name))
        replaced[id(module)] = layer
        layers.setdefault(row.name, layer)
    if low_rank is not None:
        lora = lora_layers(trained, low_rank)
        for layer in replaced.values():
            if layer.site.name in lora:
                layer.change = lora[layer.site.name]
    _swap(model, lambda m: replaced.get(id(m)))
    noisy = tuple(r.name for r in report.table if r.noisy and r.name in sites)
    others: dict[str, nn.Parameter] = {}
    if _patterns(train, backbone)[1]:
        weights = {id(p) for x in layers.values() for p in (*x.parameters_of(x.base), *x.change.parameters())}
        for name, parameter in model.named_parameters():
            if id(parameter) not in weights and not matches(list(backbone.keep), name.rpartition(".")[0]):
                parameter.requires_grad_(True)
                others[name] = parameter
    return Converted(sites, layers, noisy, others, state, report)


def unload(backbone: Convertible, *, merge: bool, perturbation: Mapping[str, Tensor] | None = None) -> None:
    """Put the vendor's modules back in place.

    Args:
        backbone: a converted backbone.
        merge: write the trained mean into the weights; ``False`` restores the pretrained ones,
            bit for bit.
        perturbation: with ``merge``, what a draw adds to the mean, {site: (*shape)}.
    """
    if merge:
        done: set[str] = set()
        for layer in [m for m in backbone.model.modules() if isinstance(m, VariationalLayer)]:
            if layer.site.name not in done:  # shared by layers with one weight
                done.add(layer.site.name)
                layer.merge((perturbation or {}).get(layer.site.name))
    _swap(backbone.model, lambda m: m.base if isinstance(m, VariationalLayer) else None)


def _swap(model: nn.Module, replacement: Any) -> None:
    """Replace child modules everywhere they are held; ``replacement(module)`` or None."""
    for parent in list(model.modules()):
        if isinstance(parent, VariationalLayer):
            continue
        for name, child in list(parent._modules.items()):
            if child is not None and (new := replacement(child)) is not None:
                parent._modules[name] = new


def matches(patterns: Sequence[str], name: str) -> bool:
    """True if any regular expression matches the whole ``name``."""
    return any(re.fullmatch(p, name) for p in patterns)
