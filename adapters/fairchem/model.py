"""fairchem's model (``HydraModel`` with an eSCN-MD backbone), made to run on given edges.

Nothing in it is merged, compiled, dropped or differentiated, and no random number is used up.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from blip_ft.adapters.fairchem.tasks import Head
from blip_ft.adapters.fairchem.vendor import importing, require
from blip_ft.adapters.shared.vendor import default_dtype
from blip_ft.errors import CheckpointError

#: keys of a backbone's configuration that say how to run, not what to compute
_RUNNING = {
    "always_use_pbc": False,
    "activation_checkpointing": False,
    "otf_graph": True,
    "use_quaternion_wigner": True,
    "execution_mode": "general",
}
#: width of a model that is built for its constants only
_NARROW = {"sphere_channels": 2, "hidden_channels": 2, "edge_channels": 2}


def build(config: dict[str, Any]) -> nn.Module:
    """The vendor's model of a configuration with random weights, made for given edges.

    Raises:
        CheckpointError: the vendor refuses the configuration.
    """
    require()
    import hydra

    config = running(config)
    try:
        with importing(), default_dtype(torch.float32):
            model: Any = hydra.utils.instantiate(config)
    except Exception as error:  # hydra wraps whatever a constructor raises
        cause = error.__cause__ or error
        raise CheckpointError(
            f"this version of fairchem-core cannot build its model ({type(cause).__name__}: {cause})",
            remedy="see 'blip-finetune doctor' for the version",
        ) from error
    backbone = model.backbone
    backbone.__class__ = _for_given_edges(cast("Hashable", type(backbone)))
    # forces are differentiated by the adapter, not inside the model
    backbone.regress_config.forces = backbone.regress_config.stress = backbone.regress_config.hessian = False
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif name.endswith("_embedding.lin_emb"):  # the vendor feeds it float32 whatever its weights are
            module.register_forward_pre_hook(lambda m, inputs: tuple(x.to(m.weight) for x in inputs))
    if hasattr(backbone, "composition_dropout"):
        backbone.composition_dropout = 0.0
    return model.eval()  # type: ignore[no-any-return]


def running(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the options that say how to run set to the plainest ones."""
    config = copy.deepcopy(config)
    config["backbone"] |= _RUNNING
    config["finetune_config"] = None  # it would open another checkpoint
    if "moe_layer_type" in config["backbone"]:
        config["backbone"]["moe_layer_type"] = "pytorch"
    return config


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, file: Path | None = None) -> None:
    """Put weights into a model.

    Raises:
        CheckpointError: they are others than the model has.
    """
    try:
        model.load_state_dict(dict(weights))
    except (RuntimeError, AttributeError) as error:
        raise CheckpointError(
            "its weights do not fit its own configuration under this version of fairchem-core",
            remedy="see 'blip-finetune doctor' for the version",
            file=file,
        ) from error


def constants(config: dict[str, Any]) -> tuple[dict[str, Tensor], float]:
    """Tables of the backbone in float64, by buffer name, and the exponent of its radial basis.

    The vendor computes them in the precision it is built in. A model that is cast to float64 later would
    keep single-precision ones, and differ from the vendor's float64 model by some 1e-8.
    """
    import hydra

    config = running(config)
    narrow = config["backbone"] | _NARROW
    for key in ("charge_balanced_channels", "spin_balanced_channels"):
        narrow[key] = None
    if "num_experts" in narrow:
        narrow["num_experts"] = 0
    config |= {"backbone": narrow, "heads": {}}
    with importing(), default_dtype(torch.float64):
        backbone: Any = hydra.utils.instantiate(config).backbone
    persistent = backbone.state_dict().keys()
    tables = {
        name: buffer
        for name, buffer in backbone.named_buffers()
        if name not in persistent and buffer.is_floating_point()
    }
    return tables, backbone.distance_expansion.coeff


class Inputs(dict[str, Any]):
    """What the vendor's model reads from its ``AtomicData``."""

    def get(self, key: str, default: Any = None) -> Any:
        """As ``dict.get``, with the keyword that the vendor uses."""
        return super().get(key, default)


@functools.cache
def _for_given_edges(base: Any) -> Any:
    """The vendor's backbone class, fed with edge vectors instead of positions.

    The vendor turns each edge's frame by a random angle, on which nothing depends but rounding. Here the
    angle is 0, so that the same input gives the same numbers and no random number is used up.
    """
    from fairchem.core.models.uma.common.quaternion.wigner_d_hybrid import axis_angle_wigner_hybrid

    vendors: Any = base

    class GivenEdges(vendors):  # type: ignore[misc]
        """A backbone on given edges."""

        def _generate_graph(self, data: Inputs) -> dict[str, Tensor]:
            edge_vec = data["edge_vec"]
            data["scatter_target"] = data["edge_index"][1]
            return {
                "edge_index": data["edge_index"],
                "edge_distance": edge_vec.norm(dim=1),
                "edge_distance_vec": edge_vec,
            }

        def _get_rotmat_and_wigner(self, edge_distance_vecs: Tensor) -> tuple[Tensor, Tensor]:
            wigner: tuple[Tensor, Tensor] = axis_angle_wigner_hybrid(
                edge_distance_vecs,
                self.lmax,
                gamma=edge_distance_vecs.new_zeros(len(edge_distance_vecs)),
                coeffs=self.wigner_data.coeffs,
                U_blocks=self.wigner_data.U_blocks,
                custom_kernels=self.wigner_data.custom_kernels,
            )
            return wigner

        @torch.no_grad()
        def reference_mix(self) -> Tensor:
            """(E,) coefficients of the experts, averaged over structures of one element each."""
            numbers = torch.arange(1, self.max_num_elements, device=self.sphere_embedding.weight.device)
            charge, spin, task = self.reference_system
            modules: Any = self._modules
            mix = modules["mix_csd"]
            modules["mix_csd"] = getattr(mix, "base", mix)  # the pretrained one, also after conversion
            try:
                embedding = self.csd_embedding(
                    torch.full_like(numbers, charge), torch.full_like(numbers, spin), [task] * len(numbers)
                )
                self.set_MOLE_coefficients(numbers, torch.arange(len(numbers)).to(numbers), embedding)
                coefficients: Tensor = self.global_mole_tensors.expert_mixing_coefficients
            finally:
                modules["mix_csd"] = mix
                self.global_mole_tensors.expert_mixing_coefficients = None
            return coefficients.mean(dim=0)

    GivenEdges.__name__ = GivenEdges.__qualname__ = base.__name__
    return GivenEdges


# ---- mixtures of experts ---------------------------------------------------------------------


def attach_mixtures(model: Any, used: Mapping[str, Head], system: tuple[int, int, str]) -> None:
    """Tell the mixtures of experts what their variational form needs (``_fairchem_layers``).

    Args:
        model: the vendor's model.
        used: heads in use.
        system: charge, spin and task of every structure.
    """
    backbone = model.backbone
    if getattr(backbone, "num_experts", 0):
        backbone.reference_system = system
        norm = backbone.mole_expert_coefficient_norm
        backbone.mole_expert_coefficient_norm = _RowWise(norm)
        mixing = backbone.global_mole_tensors
        mixing.reference = backbone.reference_mix
        mixing.share = _share(norm, backbone.num_experts)
    for head in used.values():
        if head.wrapper is not None and hasattr(head.wrapper, "global_mole_tensors"):
            chosen = _one_hot(head.wrapper, system[2])
            mixing = head.wrapper.global_mole_tensors
            mixing.reference, mixing.share = _Constant(chosen), chosen


@dataclass(frozen=True)
class _RowWise:
    """A normalisation of coefficients (B, E), structure by structure: the vendor's ``pnorm`` depends on
    the number of structures in a batch. One structure is normalised as the vendor does.
    """

    norm: Any

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(row) for row in x.split(1)])


@dataclass(frozen=True)
class _Constant:
    """A function that returns a tensor."""

    value: Tensor

    def __call__(self) -> Tensor:
        return self.value


def _share(norm: Any, experts: int) -> Tensor:
    """(E,) 1 / sum_e c_e for the sum that the vendor's normalisation gives, whatever the router says.

    (Softmax: 1 + 0.005 E, as the vendor adds 0.005 to every coefficient.)
    """
    probe = torch.linspace(-3.0, 3.0, 2 * experts, dtype=torch.float64).reshape(2, experts)
    sums = torch.cat([norm(row).sum(dim=1) for row in probe.square().split(1)])
    if (sums - sums[0]).abs().max() > 1e-9:
        raise CheckpointError(
            "its experts' coefficients have no fixed sum", remedy="use a published UMA or eSEN checkpoint"
        )
    return torch.full((experts,), 1 / sums[0].item(), dtype=torch.float64)


def _one_hot(wrapper: Any, task: str) -> Tensor:
    """(E,) 1 for the expert of a task in a head's mixtures."""
    out = torch.zeros(len(wrapper.dataset_name_to_exp), dtype=torch.float64)
    out[wrapper.dataset_name_to_exp[task]] = 1.0
    return out


#: held by the thread that evaluates layers which mix experts: the vendor keeps the shares inside the model
MIXING = threading.RLock()


@contextlib.contextmanager
def head_mixture(model: Any, head: Head, task: str, n_atoms: Tensor, like: Tensor) -> Iterator[None]:
    """Set the coefficients of a head's mixtures for one evaluation; nothing for other heads."""
    wrapper = head.wrapper
    if wrapper is None or not hasattr(wrapper, "global_mole_tensors"):
        yield
        return
    mixing = wrapper.global_mole_tensors
    with MIXING:
        mixing.mole_sizes = n_atoms.cpu()
        mixing.expert_mixing_coefficients = _one_hot(wrapper, task).to(like).expand(len(n_atoms), -1)
        try:
            yield
        finally:
            mixing.expert_mixing_coefficients = None


def rank_two(parts: Tensor) -> Tensor:
    """(B, 3, 3) from trace and l = 2 part, (B, 6), in the vendor's convention."""
    from fairchem.core.models.utils.irreps import cg_change_mat

    with default_dtype(torch.float64):
        change = cg_change_mat(2).to(parts)
    spherical = torch.cat((parts[:, :1], parts.new_zeros(len(parts), 3), parts[:, 1:]), dim=1)
    matrix: Tensor = (spherical @ change).reshape(-1, 3, 3)
    return matrix
