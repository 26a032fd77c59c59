"""The vendor's side of the SevenNet adapter: names, checkpoints, its model and its calculator."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor, nn

from blip_ft.adapters.shared.names import check_listed
from blip_ft.adapters.shared.vendor import copy_kernels_as_they_are, eager_e3nn, import_backend, quiet
from blip_ft.errors import CheckpointError, RecipeError, nearest

#: keys of the vendor's configuration from which its model is built
ARCHITECTURE = (
    "version",
    "_number_of_species",
    "_type_map",
    "_number_of_modalities",
    "_modal_map",
    "act_gate",
    "act_radial",
    "act_scalar",
    "_normalize_sph",
    "channel",
    "conv_denominator",
    "cutoff",
    "cutoff_function",
    "interaction_type",
    "irreps_manual",
    "is_parity",
    "lmax",
    "lmax_edge",
    "lmax_node",
    "num_convolution_layer",
    "radial_basis",
    "readout_as_fcn",
    "readout_fcn_activation",
    "readout_fcn_hidden_neurons",
    "scale",
    "self_connection_type",
    "shift",
    "train_denominator",
    "train_shift_scale",
    "use_bias_in_linear",
    "use_modal_node_embedding",
    "use_modal_output_block",
    "use_modal_self_inter_intro",
    "use_modal_self_inter_outro",
    "use_modal_wise_scale",
    "use_modal_wise_shift",
    "use_modality",
    "weight_nn_hidden_neurons",
)
_ACTIVATIONS = ("relu", "silu", "tanh", "abs", "ssp", "sigmoid", "elu")
#: what they may name
_LISTED: dict[str, tuple[str, ...]] = {
    "act_gate": _ACTIVATIONS,
    "act_scalar": _ACTIVATIONS,
    "act_radial": _ACTIVATIONS,
    "readout_fcn_activation": _ACTIVATIONS,
    "interaction_type": ("nequip",),
    "self_connection_type": ("none", "nequip", "linear"),
    "radial_basis_name": ("bessel",),
    "cutoff_function_name": ("poly_cut", "XPLOR"),
}


def find(checkpoint: str) -> Path:
    """Path of a file or of a model known by name; the vendor's loader downloads it if need be."""
    from sevenn._const import CHECKPOINT_DOWNLOAD_LINKS
    from sevenn.util import get_available_pretrained_models, pretrained_name_to_path

    path = Path(checkpoint).expanduser()
    if path.is_file():
        return path
    if path.suffix == ".pth" or len(path.parts) > 1:
        raise CheckpointError("there is no such file", remedy="check the path", file=checkpoint)
    try:
        return Path(pretrained_name_to_path(checkpoint))
    except ValueError as error:
        names = get_available_pretrained_models()
        raise CheckpointError(
            f"there is no SevenNet model '{checkpoint}'",
            remedy=f"{nearest(checkpoint, names)}; or give the path of a .pth file",
            field="model.checkpoint",
        ) from error
    except OSError as error:
        links = "; ".join(CHECKPOINT_DOWNLOAD_LINKS.values())
        raise CheckpointError(
            f"the weights of '{checkpoint}' could not be downloaded ({type(error).__name__})",
            remedy=f"fetch the file by hand and give its path; the vendor's files are: {links}",
            field="model.checkpoint",
        ) from error


def open_checkpoint(path: Path, content: Any) -> tuple[dict[str, Any], nn.Module]:
    """Reduced configuration and model from a checkpoint that has been read already."""
    import sevenn.checkpoint

    module: Any = sevenn.checkpoint
    foreign = CheckpointError(
        "is not a SevenNet checkpoint that this version of sevenn can read",
        remedy="check the path; sevenn's own training writes such files",
        file=path,
    )
    if not isinstance(content, dict) or not content.get("config") or not content.get("model_state_dict"):
        raise foreign
    # Filled in by hand, so that the vendor does not open the file a second time as a pickle.
    checkpoint = module.SevenNetCheckpoint(path)
    try:
        with quiet(), eager_e3nn():
            checkpoint._config = module._config_cp_routine(dict(content["config"]))
            check(checkpoint._config, file=path)
            checkpoint._model_state_dict = content["model_state_dict"]
            checkpoint._loaded = True
            model = checkpoint.build_model()
    except (KeyError, ValueError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        raise foreign from error
    config = checkpoint.config
    return {key: _plain(config[key]) for key in ARCHITECTURE if key in config}, copy_kernels_as_they_are(
        model
    )


def check(architecture: Mapping[str, Any], *, file: Path | None = None) -> None:
    """Raise unless what a configuration names is in the adapter's list.

    Raises:
        CheckpointError: it is not.
    """
    named = {**architecture, **architecture["radial_basis"], **architecture["cutoff_function"]}
    for key, names in _LISTED.items():
        value = named.get(key)
        for name in _leaves(value):
            check_listed(name, names, f"values of '{key}'", file=file)


def _leaves(value: Any) -> list[Any]:
    """What is named once, by parity, or for each layer."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    return [] if value is None else [value]


def build(architecture: dict[str, Any]) -> nn.Module:
    """The vendor's model of an architecture, with random weights and e3nn kernels.

    Raises:
        CheckpointError: the architecture names something that is not in the adapter's list.
    """
    check(architecture)
    import_backend("sevennet", "sevenn")
    with quiet(), eager_e3nn():
        from sevenn.model_build import build_E3_equivariant_model

        kernels = {"use_flash_tp": False, "use_oeq": False, "cuequivariance_config": {}}
        model: nn.Module = build_E3_equivariant_model({**copy.deepcopy(architecture), **kernels})
    return copy_kernels_as_they_are(model)


def checkpoint_of(
    architecture: dict[str, Any], model: nn.Module, modal: str | None, shift: Mapping[int, float]
) -> dict[str, Any]:
    """What the vendor's training saves, with ``shift`` (eV per atomic number) in its energy shift.

    The vendor's shift is one number, one per element, or one per modality and element; it becomes as
    fine as it must be for the shift to act on the elements, and on the modality, that it is meant for.
    """
    import sevenn

    type_map = architecture["_type_map"]
    config = copy.deepcopy(architecture) | {
        # the state dict is in this version's order: an older number would make it reorder weights again
        "version": sevenn.__version__,
        "chemical_species": [chemical_symbols[z] for z in type_map],
        "dtype": "single",
    }
    state = {name: value.detach().to("cpu", torch.float32).clone() for name, value in _floating(model)}
    state |= {name: value.cpu().clone() for name, value in model.state_dict().items() if name not in state}
    table, scale = (state[f"rescale_atomic_energy.{key}"] for key in ("shift", "scale"))
    if modal is None:
        table, scale = (t.expand(len(type_map)).clone() for t in (table, scale))
        row = table
        config["scale"] = scale.tolist()
    else:
        modal_map = architecture["_modal_map"]
        if table.dim() == 1:
            table = table.expand(len(modal_map), -1).clone()
            config["use_modal_wise_shift"] = True
        row = table[modal_map[modal]]
    for number, energy in shift.items():
        row[type_map[number]] += energy
    config["shift"] = table.tolist()
    state |= {"rescale_atomic_energy.shift": table, "rescale_atomic_energy.scale": scale}
    check = build(config)  # the vendor builds the same, or says why not
    check.load_state_dict(state)
    return {
        "config": config,
        "model_state_dict": state,
        "optimizer_state_dict": {},
        "scheduler_state_dict": {},
        "epoch": 0,
        "time": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        "hash": "",
    }


def _floating(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in model.state_dict().items() if value.is_floating_point()]


def open_native(path: Path, modal: str | None, device: torch.device, dtype: torch.dtype) -> Any:
    """The vendor's calculator on a checkpoint opened by the vendor's loader."""
    import_backend("sevennet", "sevenn")
    from sevenn.util import load_checkpoint

    with quiet():
        model: nn.Module = load_checkpoint(path).build_model()
        register_coefficients(model)
        return calculator(model.to(device, dtype), modal, device)


def _plain(value: Any) -> Any:
    """Tensors, arrays and e3nn objects as numbers, lists and strings; keys are kept."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return value.tolist()
    if type(value) in (list, tuple):  # not its subclasses, such as e3nn's Irreps
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def check_modal(modal: str | None, modal_map: Mapping[str, int]) -> str | None:
    """The modality to use, or an error that lists the valid ones."""
    if modal is None and not modal_map:
        return None
    if modal in modal_map:
        return modal
    if not modal_map:
        problem, remedy = "this model has no modalities", "leave model.options.modal out"
    elif modal is None:
        problem, remedy = "this model needs a modality", f"valid names: {', '.join(modal_map)}"
    else:
        problem = f"unknown modality '{modal}'"
        remedy = f"{nearest(modal, modal_map)} (valid names: {', '.join(modal_map)})"
    raise RecipeError(problem, remedy=remedy, field="model.options.modal")


def register_coefficients(model: nn.Module) -> None:
    """Fixed Bessel frequencies are a plain attribute at the vendor's; as a buffer they follow the
    model to another device or type.
    """
    for module in model.modules():
        if type(module).__name__ == "BesselBasis" and "coeffs" in vars(module):
            module.register_buffer("coeffs", vars(module).pop("coeffs"), persistent=False)


def scalar_columns(readout: Any, device: torch.device) -> Tensor:
    """Columns of a readout's input that are even scalars."""
    irreps = readout._irreps_in_wo_modal if hasattr(readout, "_irreps_in_wo_modal") else readout.irreps_in
    parts = [
        torch.arange(part.start, part.stop, device=device)
        for part, (_, ir) in zip(irreps.slices(), irreps, strict=True)
        if ir.l == 0 and ir.p == 1
    ]
    return torch.cat(parts) if parts else torch.arange(0, device=device)


def calculator(model: nn.Module, modal: str | None, device: torch.device) -> Any:
    """``SevenNetCalculator``; for float64 weights a subclass that feeds it float64 graphs."""
    from ase.calculators.calculator import Calculator, all_changes
    from sevenn.atom_graph_data import AtomGraphData
    from sevenn.calculator import SevenNetCalculator
    from sevenn.nn.node_embedding import OnehotEmbedding
    from sevenn.train.dataload import unlabeled_atoms_to_graph
    from sevenn.util import dtype_correct

    base: Any = Calculator
    dtype = next(p.dtype for p in model.parameters())
    arguments: dict[str, Any] = {
        "model": model,
        "file_type": "model_instance",
        "device": device,
        "modal": modal,
    }
    if dtype == torch.float32:
        return SevenNetCalculator(**arguments)

    def cast(_module: nn.Module, _inputs: Any, data: Any) -> Any:
        for key in ("x", "node_attr"):
            if key in data and data[key].is_floating_point():
                data[key] = data[key].to(dtype)
        return data

    for module in model.modules():
        if isinstance(module, OnehotEmbedding):
            module.register_forward_hook(cast)

    class _DoubleCalculator(SevenNetCalculator):  # type: ignore[misc]
        """The vendor's calculator with its graph in the type of the weights."""

        def calculate(
            self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes
        ) -> None:
            base.calculate(self, atoms, properties, system_changes)
            graph = unlabeled_atoms_to_graph(atoms.copy(), self.cutoff)
            data = AtomGraphData(**{key: dtype_correct(value, dtype) for key, value in graph.items()})
            if self.modal:
                data["data_modality"] = self.modal
            self.results = self.output_to_results(self.model(data.to(self.device)))

    return _DoubleCalculator(**arguments)
