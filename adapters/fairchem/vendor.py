"""fairchem's checkpoints: names, files, and what their configurations may say.

An inference checkpoint of fairchem is a pickled dataclass of plain containers: a configuration that
names the classes to build (``_target_``), weights, and one entry per *task*, a property of a data set
with its normaliser and element references. Names of classes are as good as code, so only those in a closed
list are accepted, whatever the file says (:mod:`blip_ft.adapters.shared.names`).
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import json
import logging
import random
import re
import threading
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip_ft.adapters.shared.names import check_listed, check_object
from blip_ft.adapters.shared.vendor import import_backend, quiet
from blip_ft.errors import CheckpointError, nearest

_UMA, _MODULES = "fairchem.core.models.uma", "fairchem.core.modules"
_KIND = "UMA or eSEN classes"


def _themselves(module: str, *names: str) -> dict[str, str]:
    """Objects that are called in configurations as they call themselves."""
    return {f"{module}.{name}": f"{module}.{name}" for name in names}


_BACKBONES = {
    "escnmd_backbone": f"{_UMA}.escn_md.eSCNMDBackbone",
    "escnmd_moe_backbone": f"{_UMA}.escn_moe.eSCNMDMoeBackbone",
    **_themselves(f"{_UMA}.escn_md", "eSCNMDBackbone"),
    **_themselves(f"{_UMA}.escn_moe", "eSCNMDMoeBackbone"),
}
_HEADS = _themselves(
    f"{_UMA}.escn_md",
    "MLP_EFS_Head",
    "MLP_Energy_Head",
    "MLP_Stress_Head",
    "Linear_Energy_Head",
    "Linear_Force_Head",
)
_WRAPPERS = _themselves(f"{_UMA}.escn_moe", "DatasetSpecificMoEWrapper", "DatasetSpecificSingleHeadWrapper")
#: for each key of a configuration whose value is a class, what it may name; anything else could be any function of
#: any installed package
_LISTED: dict[str, dict[str, str]] = {
    "model": _BACKBONES,
    "module": _HEADS | _WRAPPERS,
    "head_cls": _HEADS,
    "_target_": {
        **_themselves("fairchem.core.models.base", "HydraModel"),
        **_themselves("fairchem.core.units.mlip_unit.mlip_unit", "Task", "OutputSpec"),
        **_themselves(f"{_MODULES}.normalization.normalizer", "Normalizer"),
        **_themselves(f"{_MODULES}.normalization.element_references", "ElementReferences"),
        **_themselves(
            f"{_MODULES}.loss", "DDPMTLoss", "DDPLoss", "MAELoss", "MSELoss", "PerAtomMAELoss", "L2NormLoss"
        ),
        **{f"torch.nn.{name}": f"torch.nn.modules.loss.{name}" for name in ("L1Loss", "MSELoss")},
        **_themselves("torch", "DoubleTensor", "FloatTensor"),
    },
}


#: held by the thread whose random generators and messages are put aside: there is one set for the process
_ALONE = threading.RLock()


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import and build without the vendor's messages, and leave all random generators as they were.

    One thread after the other: each would put back what another has set meanwhile.
    """
    with _ALONE, _put_aside():
        yield


@contextlib.contextmanager
def _put_aside() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.random.fork_rng(), quiet():
            yield
    finally:
        logging.disable(level)
        random.setstate(states[0])
        np.random.set_state(states[1])


def require() -> None:
    """Import what models are made of.

    Raises:
        ImportError: the package is absent; see :func:`import_backend`.
    """
    import_backend("fairchem", "fairchem")
    with importing():
        import_backend("fairchem", "fairchem.core")
        import_backend("fairchem", "fairchem.core.models.uma.escn_moe")


def find(checkpoint: str) -> Path:
    """Path of a file or of a published model, which the vendor's loader downloads if need be.

    Raises:
        CheckpointError: no such file or name, or the download failed.
    """
    path = Path(checkpoint).expanduser()
    if path.is_file():
        return path
    with importing():
        from fairchem.core._config import CACHE_DIR
        from fairchem.core.calculate import pretrained_mlip
    names = pretrained_mlip.available_models
    if checkpoint not in names:
        if path.suffix in (".pt", ".pth") or len(path.parts) > 1:
            raise CheckpointError("there is no such file", remedy="check the path", file=checkpoint)
        raise CheckpointError(
            f"there is no fairchem model '{checkpoint}'",
            remedy=f"{nearest(checkpoint, names)}; or give the path of an inference checkpoint (.pt)",
            field="model.checkpoint",
        )
    try:
        return Path(pretrained_mlip.pretrained_checkpoint_path_from_name(checkpoint))
    except OSError as error:  # also what the hub's client raises
        published = pretrained_mlip._MODEL_CKPTS.checkpoints[checkpoint]
        file = f"{published.subfolder}/{published.filename}" if published.subfolder else published.filename
        page = f"https://huggingface.co/{published.repo_id}"
        raise CheckpointError(
            f"the weights of '{checkpoint}' could not be downloaded ({type(error).__name__})",
            remedy=f"accept the licence at {page}, log in with 'hf auth login', and run again; or fetch "
            f"{page}/resolve/main/{file} by hand and give its path (or copy it into the cache {CACHE_DIR} "
            f"with 'hf download {published.repo_id} {file} --cache-dir {CACHE_DIR}')",
            field="model.checkpoint",
        ) from error


def safe_globals() -> list[Any]:
    """The dataclass that a checkpoint is, and OmegaConf's containers: none runs code when built."""
    from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint
    from omegaconf import base, dictconfig, listconfig, nodes

    return [
        MLIPInferenceCheckpoint,
        collections.defaultdict,
        typing.Any,
        base.ContainerMetadata,
        base.Metadata,
        dictconfig.DictConfig,
        listconfig.ListConfig,
        nodes.AnyNode,
        dict,
        list,
        int,
    ]


def open_checkpoint(path: Path, content: Any) -> tuple[dict[str, Any], list[Any], dict[str, Tensor]]:
    """Model configuration, task configurations and weights of a checkpoint that has been read already.

    Weights are those that the vendor predicts with, an exponential average over training.

    Raises:
        CheckpointError: another kind of file or model, or one that names foreign classes.
    """
    foreign = CheckpointError(
        "is not an inference checkpoint of fairchem",
        remedy="check the path; a training checkpoint (folder) becomes one by fairchem's "
        "convert_train_checkpoint_to_inference_checkpoint",
        file=path,
    )
    state = getattr(content, "ema_state_dict", None)
    if type(content).__name__ != "MLIPInferenceCheckpoint" or not isinstance(state, Mapping):
        raise foreign
    try:
        model, tasks = _plain(content.model_config), _plain(content.tasks_config)
    except (AttributeError, TypeError, ValueError) as error:
        raise foreign from error
    if not isinstance(model, dict) or not isinstance(tasks, list):
        raise foreign
    check(model, tasks, file=path)
    _mend(model, path)
    weights = {re.sub(r"^(module\.)+", "", str(k)): v for k, v in state.items() if k != "n_averaged"}
    return model, tasks, weights


def _mend(model: dict[str, Any], path: Path) -> None:
    """The vendor's repairs of the configurations of older UMA releases, in place.

    Raises:
        CheckpointError: a release that this version of the package no longer knows (UMA 1.0).
    """
    from fairchem.core.models.uma.compat import apply_uma_compat_fixups

    holder: Any = SimpleNamespace(model_config=model)
    try:
        apply_uma_compat_fixups(holder, checkpoint_location=str(path))
    except RuntimeError as error:
        raise CheckpointError(
            "has no model_id, as UMA 1.0 has none, which this version of fairchem-core does not know",
            remedy="use UMA 1.1 or later",
            file=path,
        ) from error


def _plain(config: Any) -> Any:
    """OmegaConf containers as dicts and lists, and nothing that JSON cannot hold.

    Raises:
        TypeError: something else is in it.
        ValueError: it asks OmegaConf to compute a value.
    """
    from omegaconf import OmegaConf

    def container(value: Any) -> Any:
        written = OmegaConf.to_container(value, resolve=False)
        if any(":" in text for text in _texts(written) if "${" in text):
            raise ValueError("computed values")
        return OmegaConf.to_container(value, resolve=True)

    if OmegaConf.is_config(config):
        config = container(config)
    if isinstance(config, Mapping):
        config = {k: container(v) if OmegaConf.is_config(v) else v for k, v in config.items()}
    return json.loads(json.dumps(config))


def check(model: dict[str, Any], tasks: Sequence[Any], *, file: Path | str | None = None) -> None:
    """Raise unless a configuration describes an eSCN-MD model and names listed classes only.

    Nothing that it names is called.

    Raises:
        CheckpointError: it does not.
    """
    config = [model, list(tasks)]
    if any("${" in text for text in _texts(config)):
        raise CheckpointError(
            "its configuration refers to values elsewhere ('${')",
            remedy="use an inference checkpoint, in which all values are written out",
            file=file,
        )
    for key, name in class_names(config):
        names = _LISTED[key]
        check_object(_named(check_listed(name, names, _KIND, file=file)), name, names, _KIND, file=file)
    backbone = model.get("backbone")
    if not str(model.get("_target_", "")).endswith(".HydraModel") or not isinstance(backbone, dict):
        raise CheckpointError("holds no backbone", remedy="use a UMA or eSEN checkpoint", file=file)
    check_listed(backbone.get("model"), _BACKBONES, _KIND, file=file)


def _named(name: str) -> Any:
    """What the vendor takes for a listed name; ``None`` where this version has nothing of that name."""
    from fairchem.core.common.registry import registry

    module, _, leaf = name.rpartition(".")
    if not module:
        return registry.mapping["model_name_mapping"].get(name)
    with importing():
        return getattr(importlib.import_module(module), leaf, None)


def _texts(config: Any) -> Iterator[str]:
    """All texts in nested containers, keys too."""
    if isinstance(config, str):
        yield config
    elif isinstance(config, dict):
        for key, value in config.items():
            yield from _texts(key)
            yield from _texts(value)
    elif isinstance(config, list):
        for value in config:
            yield from _texts(value)


def class_names(config: Any) -> Iterator[tuple[str, str]]:
    """All names of classes in nested containers, with their keys."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key == "_target_" or (key in _LISTED and isinstance(value, str)):
                yield key, value
            else:
                yield from class_names(value)
    elif isinstance(config, list):
        for value in config:
            yield from class_names(value)
