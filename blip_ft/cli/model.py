"""The trained model of a command."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from blip_ft.cli.console import announce
from blip_ft.errors import BlipError

if TYPE_CHECKING:
    from blip_ft.potential.bayesian import BayesianPotential


def load(args: argparse.Namespace) -> BayesianPotential:
    """The model of ``evaluate`` and ``predict``, on the device that was asked for."""
    announce(f"loading {args.model} ...")
    import torch

    from blip_ft.potential.checkpoint import load_model

    try:
        torch.empty(0, device=args.device, dtype=getattr(torch, args.dtype))
    except (RuntimeError, AssertionError, TypeError) as error:  # as builds of torch differ
        raise BlipError(
            f"torch cannot use {args.dtype} on the device '{args.device}': {str(error).partition(chr(10))[0]}",
            remedy="blip-finetune doctor shows the device of this machine; mps needs --dtype float32",
        ) from error
    return load_model(args.model, device=args.device, dtype=args.dtype, reference_set=args.reference_set)
