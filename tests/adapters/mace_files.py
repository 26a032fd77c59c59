"""Small random MACE models in the vendor's own file format, made when they are needed."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip_ft.adapters.mace import vendor
from blip_ft.adapters.mace.backbone import MACEBackbone

ELEMENTS = (1, 6, 8, 14)
#: eV
REFERENCES = {1: -13.6, 6: -8.0, 8: -4.9, 14: -5.4}

#: what differs from a small MACE-MP-0
KINDS: dict[str, dict[str, Any]] = {
    # the form of MACE-MP-0 medium: scalars and vectors
    "vectors": {},
    # l up to 3 in the density, tensors in the features, products of four; double precision
    "tensors": {"hidden_irreps": "4x0e+4x1o+4x2e", "max_ell": 3, "correlation": 3, "dtype": "float64"},
    # MACE-MPA-0: density normalisation, transformed distances, screened nuclei
    "density": {
        "interaction_cls_first": "RealAgnosticDensityInteractionBlock",
        "interaction_cls": "RealAgnosticDensityResidualInteractionBlock",
        "distance_transform": "Agnesi",
        "pair_repulsion": True,
        "atomic_inter_scale": [0.002],  # not divided by the number of neighbours
    },
    # pseudovectors: products of order one and two that vanish by symmetry have weights of their own type
    "parities": {"hidden_irreps": "4x0e+4x1o+4x1e+4x2e"},
    "heads": {"heads": ["pbe", "r2scan"]},
    # MACE-MH-1: radial networks that see elements, products that do not, readouts with biases
    "nonlinear": {
        "interaction_cls_first": "RealAgnosticResidualNonLinearInteractionBlock",
        "interaction_cls": "RealAgnosticResidualNonLinearInteractionBlock",
        "readout_cls": "NonLinearBiasReadoutBlock",
        "use_agnostic_product": True,
        "edge_irreps": "4x0e+4x1o",
        "use_edge_irreps_first": True,
        "apply_cutoff": False,
        "use_last_readout_only": True,
        "heads": ["omat", "omol"],
    },
    "attention": {"interaction_cls": "RealAgnosticAttResidualInteractionBlock"},
    # no scale and shift, one layer, scalars only, Gaussians
    "plain": {
        "class": "MACE",
        "num_interactions": 1,
        "hidden_irreps": "8x0e",
        "radial_type": "gaussian",
        "interaction_cls_first": "RealAgnosticInteractionBlock",
        "gate": "tanh",
    },
}


def architecture(kind: str) -> dict[str, Any]:
    """Constructor arguments of a small model."""
    changes = KINDS[kind]
    heads = changes.get("heads", ["Default"])
    rows = [[REFERENCES[z] + 0.3 * i for z in ELEMENTS] for i in range(len(heads))]
    arguments: dict[str, Any] = {
        "class": "ScaleShiftMACE",
        "dtype": "float32",
        "r_max": 5.0,
        "num_bessel": 6,
        "num_polynomial_cutoff": 5,
        "max_ell": 2,
        "interaction_cls_first": "RealAgnosticResidualInteractionBlock",
        "interaction_cls": "RealAgnosticResidualInteractionBlock",
        "readout_cls": "NonLinearReadoutBlock",
        "num_interactions": 2,
        "num_elements": len(ELEMENTS),
        "hidden_irreps": "8x0e+8x1o",
        "edge_irreps": None,
        "MLP_irreps": "4x0e",
        "gate": "silu",
        "atomic_energies": rows,
        "avg_num_neighbors": 21.5,
        "atomic_numbers": list(ELEMENTS),
        "correlation": 2,
        "radial_type": "bessel",
        "radial_MLP": [8, 8],
        "atomic_inter_scale": [5.0 + i for i in range(len(heads))],
        "atomic_inter_shift": [0.05 * i for i in range(len(heads))],
        "heads": heads,
    } | changes
    if arguments["class"] == "MACE":
        del arguments["atomic_inter_scale"], arguments["atomic_inter_shift"]
    return arguments


@functools.cache
def load(kind: str, head: str | None = None) -> MACEBackbone:
    """The adapter around a model; shared, so tests change copies."""
    return MACEBackbone.load(str(path_of(kind)), trust=True, head=head)


@functools.cache
def path_of(kind: str) -> Path:
    """The file of a model; the same for all tests of a process."""
    folder = Path(tempfile.mkdtemp(prefix="mace-"))
    torch.manual_seed(sorted(KINDS).index(kind))
    arguments = architecture(kind)
    model = vendor.build({**arguments, "dtype": "float64"}, stock=True)
    # what no seed of the vendor's sets: constants that start at 0 or are tiny
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("beta", "bias")) or "_embedding" in name:
                parameter += torch.from_numpy(rng.normal(0, 0.1, parameter.shape))
    path = folder / f"{kind}.model"
    torch.save(model.to(getattr(torch, arguments["dtype"])), path)
    return path
