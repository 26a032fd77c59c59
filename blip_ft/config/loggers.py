"""``trainer.logger``: where Lightning writes the figures of every step, by names in place of objects.

``metrics.csv`` is always written, as reports are made of it. Beside it stand TensorBoard's files, or what the
key names: one logger, a list of them, or a mapping from each to the arguments of Lightning's class.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from blip_ft.errors import RecipeError, nearest

#: {name: (Lightning's class, the package that it needs)}
LOGGERS = {
    "csv": ("CSVLogger", ""),
    "tensorboard": ("TensorBoardLogger", "tensorboard"),
    "wandb": ("WandbLogger", "wandb"),
    "mlflow": ("MLFlowLogger", "mlflow"),
}


def chosen_loggers(value: Any) -> dict[str, dict[str, Any]]:
    """{name: arguments} of the loggers beside ``metrics.csv``.

    Args:
        value: of ``trainer.logger``: ``None`` and true stand for TensorBoard.

    Raises:
        RecipeError: an unknown name, or arguments that are no mapping.
    """
    if value is None or value is True:
        return {"tensorboard": {}}
    if value is False:
        return {}
    out: dict[str, dict[str, Any]] = {}
    for one in value if isinstance(value, list) else [value]:
        for name, options in one.items() if isinstance(one, Mapping) else [(one, {})]:
            if name not in LOGGERS:
                raise RecipeError(
                    f"there is no logger '{name}': {nearest(str(name), LOGGERS)}",
                    field="trainer.logger",
                    remedy="logger=wandb, a list, or a mapping such as logger: {wandb: {project: sio2, offline: true}}",
                )
            if not isinstance(options or {}, Mapping):
                raise RecipeError(
                    f"the arguments of '{name}' are no mapping",
                    field=f"trainer.logger.{name}",
                    remedy="for instance logger: {mlflow: {tracking_uri: http://localhost:5000}}",
                )
            out[str(name)] = dict(options or {})
    return out


def require_loggers(value: Any) -> None:
    """Raise unless the packages of all loggers are installed.

    Args:
        value: of ``trainer.logger``.

    Raises:
        RecipeError: one is not.
    """
    for name in chosen_loggers(value):
        package = LOGGERS[name][1]
        try:
            there = not package or importlib.util.find_spec(package) is not None
        except ValueError:  # a module without a spec, put there by the user's program
            there = True
        if not there:
            raise RecipeError(
                f"the logger '{name}' needs the package '{package}', which is not installed",
                field="trainer.logger",
                remedy=f"pip install {package}, or leave trainer.logger out",
            )
