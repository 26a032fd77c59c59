"""The vendor's side of the MACE adapter: names, model files, its model and its calculator.

A ``.model`` file is a whole pickled module, bound to the versions of mace and e3nn that wrote it.
It is read once: the arguments of the vendor's constructor are taken from it, the model is built
anew from them, given the file's state dict, and compared with the module of the file. From then
on only arguments and state dict are kept (with these a model also crosses versions of e3nn).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import http.client
import logging
import os
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blip_ft.adapters.mace.layers import forward as contract
from blip_ft.adapters.shared.convolution import EdgeConvolution
from blip_ft.adapters.shared.names import check_listed, check_object, own_name
from blip_ft.adapters.shared.vendor import copy_kernels_as_they_are, eager_e3nn, import_backend, quiet
from blip_ft.errors import CheckpointError, RecipeError, nearest

_SWITCH = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
#: constructor arguments that are irreps
_IRREPS = ("hidden_irreps", "MLP_irreps", "edge_irreps")
_KIND = "MACE classes"


def _listed(module: str, *names: str) -> dict[str, str]:
    return {name: f"mace.modules.{module}.{name}" for name in names}


_INTERACTIONS = _listed(
    "blocks",
    "RealAgnosticInteractionBlock",
    "RealAgnosticResidualInteractionBlock",
    "RealAgnosticAttResidualInteractionBlock",
    "RealAgnosticDensityInteractionBlock",
    "RealAgnosticDensityResidualInteractionBlock",
    "RealAgnosticResidualNonLinearInteractionBlock",
)
#: what an architecture may name: classes by the full name that they give themselves ...
_CLASSES = {
    "class": _listed("models", "MACE", "ScaleShiftMACE"),
    "interaction_cls": _INTERACTIONS,
    "interaction_cls_first": _INTERACTIONS,
    "readout_cls": _listed(
        "blocks",
        "LinearReadoutBlock",
        "NonLinearReadoutBlock",
        "NonLinearBiasReadoutBlock",
        "GeneralNonLinearBiasReadoutBlock",
    ),
}
#: ... and the vendor's activations
_GATES = {"abs": torch.abs, "tanh": torch.tanh, "silu": nn.functional.silu, "None": None}
#: constructor arguments of accelerated kernels: another way to compute the same
_KERNELS = ("cueq_config", "oeq_config")
#: what rounding the weights of one head anew may change, eV
_SAME = {torch.float32: 1e-5, torch.float64: 1e-10}
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


# ---- the package -------------------------------------------------------------------------------


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Keep torch's safe loading as it is outside, whatever the vendor's modules do to it inside.

    ``import mace`` switches torch's restricted unpickler off for the whole process by an environment
    variable, and so does the import of several of its modules.
    """
    before = os.environ.get(_SWITCH)
    try:
        # e3nn 0.4.4 reads its tables by torch.load at import; they hold slices
        with quiet(), torch.serialization.safe_globals([slice]):
            yield
    finally:
        if before is None:
            os.environ.pop(_SWITCH, None)
        else:
            os.environ[_SWITCH] = before


def import_mace() -> None:
    """Import the vendor's package and the modules of it that are used here.

    Raises:
        ImportError: the package is absent; names the extra to install.
    """
    with contained():
        import_backend("mace", "mace")
        import_backend("mace", "mace.calculators")
        import_backend("mace", "mace.modules")
        import_backend("mace", "mace.tools.scripts_utils")
    _copy_empty_weights()
    _leave_loading_to_the_vendor()


class _Torch(types.ModuleType):
    """torch for the vendor's calculators, whose ``torch.load`` reads whole modules, as they expect.

    The vendor asks for that by switching safe loading off in the whole process when it is imported, which
    :func:`contained` undoes. Here it holds for the files that a user gives to the vendor's own calculators, and for
    nothing else.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def load(*args: Any, **options: Any) -> Any:
        """``torch.load``, unrestricted unless asked for otherwise."""
        return torch.load(*args, **{"weights_only": False, **options})


def _leave_loading_to_the_vendor() -> None:
    """Let ``mace.calculators`` open the vendor's files also where safe loading is on in the process."""
    from mace.calculators import foundations_models
    from mace.calculators import mace as calculators

    for module in (foundations_models, calculators):
        if module.torch is torch:
            module.torch = _Torch("torch")


def _copy_empty_weights() -> None:
    """Let ``copy.deepcopy`` take the vendor's weights of paths that vanish by symmetry.

    Their constructor takes the data alone, and torch's copy of a parameter gives it ``requires_grad`` too.
    """
    from mace.modules.symmetric_contraction import EmptyParam

    def copied(empty: Any, memo: dict[int, Any]) -> Any:
        memo[id(empty)] = twin = EmptyParam(empty.data)
        return twin

    EmptyParam.__deepcopy__ = copied


# ---- names -------------------------------------------------------------------------------------


def names() -> dict[str, str]:
    """Published models by name, with the address of their file."""
    from mace.calculators import foundations_models as vendor

    found = {name: url for name, url in vendor.mace_mp_urls.items() if name}
    found |= {f"off23-{size}": url for size, url in vendor.mace_off_urls.items()}
    return found | {"mpa-0": found["medium-mpa-0"]}


def find(checkpoint: str) -> Path:
    """Path of a file or of a model known by name; the vendor's loader downloads it if need be."""
    path = Path(checkpoint).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".model", ".pt", ".pth") or len(path.parts) > 1:
        raise CheckpointError("there is no such file", remedy="check the path", file=checkpoint)
    known = names()
    if checkpoint not in known:
        raise CheckpointError(
            f"there is no MACE model '{checkpoint}'",
            remedy=f"{nearest(checkpoint, known)}; or give the path of a .model file",
            field="model.checkpoint",
        )
    from mace.calculators.foundations_models import download_mace_mp_checkpoint
    from mace.tools.utils import get_cache_dir

    url = known[checkpoint]
    place = Path(get_cache_dir()) / "".join(c for c in url.rpartition("/")[2] if c.isalnum() or c == "_")
    try:
        with contained():
            return Path(download_mace_mp_checkpoint(url))
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise CheckpointError(
            f"the weights of '{checkpoint}' could not be downloaded ({type(error).__name__})",
            remedy=f"fetch {url} by hand and save it as {place}, or give the path of your copy as "
            "model.checkpoint",
            field="model.checkpoint",
        ) from error


# ---- files -------------------------------------------------------------------------------------


def open_model(path: Path, content: Any) -> tuple[dict[str, Any], nn.Module]:
    """Architecture and model from the content of a ``.model`` file.

    Raises:
        CheckpointError: not a MACE model with energies, or one of a kind that cannot be rebuilt.
    """
    kind = type(content).__name__
    if not (isinstance(content, nn.Module) and type(content).__module__.startswith("mace.")):
        raise CheckpointError(
            "is not a MACE model file",
            remedy="give the .model file that mace's training writes at its end, not a checkpoint (.pt)",
            file=path,
        )
    if own_name(type(content)) not in _CLASSES["class"].values():
        raise CheckpointError(
            f"holds a {kind}, which is not an energy model of scalars and neighbours alone",
            remedy="use a MACE or ScaleShiftMACE model",
            file=path,
        )
    if wanted := getattr(content, "embedding_specs", None):
        raise CheckpointError(
            f"wants {' and '.join(wanted)} of each structure, which this adapter does not give it",
            remedy="use a model without such inputs: not an 'omol' one",
            file=path,
        )
    try:
        with contained():
            architecture = describe(content)
            model = build(architecture, file=path)
            model.load_state_dict(content.state_dict())
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(
            f"cannot be rebuilt by this version of mace ({str(error).partition(chr(10))[0]})",
            remedy="write it again with mace_run_train of the installed version; models with reduced "
            "Clebsch-Gordan products need 'pip install cuequivariance-torch'",
            file=path,
        ) from error
    _check_twin(path, content, model)
    return architecture, model


def describe(model: Any) -> dict[str, Any]:
    """Constructor arguments of a model, JSON-serialisable."""
    from mace import modules
    from mace.tools.scripts_utils import extract_config_mace_model

    basis = model.radial_embedding.bessel_fn
    if not hasattr(basis, "bessel_weights"):  # the vendor's function counts these, in every basis
        basis.bessel_weights = torch.zeros(model.radial_embedding.out_dim)
    plain = type(model).__name__ == "MACE"
    source = _as_scale_shift(model) if plain else model
    found: dict[str, Any] = extract_config_mace_model(source)
    if plain:
        del found["atomic_inter_scale"], found["atomic_inter_shift"]
    for key in (*_KERNELS, "embedding_specs", "use_embedding_readout"):
        found.pop(key, None)
    found["keep_last_layer_irreps"] = (
        found["num_interactions"] > 1
        and model.products[-1].linear.irreps_out == model.products[0].linear.irreps_out
        and len(found["hidden_irreps"]) > 1
    )
    found |= {key: None if found[key] is None else str(found[key]) for key in _IRREPS}
    found |= {key: found[key].__name__ for key in _CLASSES if key != "class"}
    gates = {function: name for name, function in modules.gate_dict.items()}
    found["gate"] = gates[found["gate"]]
    found["class"] = type(model).__name__
    found["dtype"] = _DTYPES[next(p.dtype for p in model.parameters())]
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in found.items()}


def build(architecture: dict[str, Any], *, stock: bool = False, file: Path | None = None) -> nn.Module:
    """The vendor's model with random weights.

    Args:
        architecture: from :func:`describe`.
        stock: with the kernels that the vendor's own files have (TorchScript), for export.
        file: for messages.

    Raises:
        CheckpointError: the architecture names something that is not in the adapter's list.
    """
    import_mace()
    from e3nn import o3
    from mace.tools.torch_tools import default_dtype

    arguments = copy.deepcopy(architecture)
    dtype = check_listed(arguments.pop("dtype"), _DTYPES.values(), "precisions", file=file)
    if kernels_named := [key for key in _KERNELS if arguments.get(key)]:
        check_listed(kernels_named[0], (), "arguments", file=file)
    classes = {key: _class_of(key, arguments.pop(key), file) for key in _CLASSES}
    for key in _IRREPS:
        arguments[key] = None if arguments[key] is None else o3.Irreps(arguments[key])
    kind = classes.pop("class")
    arguments |= classes
    arguments["gate"] = _GATES[check_listed(arguments["gate"], _GATES, "activations", file=file)]
    arguments["atomic_energies"] = np.array(arguments["atomic_energies"])
    kernels = contextlib.nullcontext() if stock else eager_e3nn()
    with contained(), kernels, default_dtype("float64"):
        model: nn.Module = kind(**arguments)
    model = model.to(getattr(torch, dtype))
    return model if stock else copy_kernels_as_they_are(model)


def _class_of(key: str, name: Any, file: Path | None) -> Any:
    """The vendor's class that an architecture names.

    Raises:
        CheckpointError: it is not in the list, or another class has this name.
    """
    from mace import modules

    names = _CLASSES[key]
    found = getattr(modules, check_listed(name, names, _KIND, file=file), None)
    return check_object(found, name, names, _KIND, file=file)


def fuse(model: Any) -> int:
    """Put :class:`EdgeConvolution` in the place of every tensor product and the sum behind it, their number;
    and sum the paths of symmetric contractions element by element.

    The vendor's blocks ask for product and sum in one call where ``conv_fusion`` is set, as it is for its GPU kernels.
    """
    n = 0
    for module in model.modules():
        if type(module).__name__ == "Contraction":
            vars(module)["forward"] = functools.partial(contract, module)
    for block in model.interactions:
        try:
            product = EdgeConvolution(block.conv_tp)
        except (ValueError, AttributeError):  # of another kind, or one of those kernels
            continue
        vars(block.conv_tp)["forward"] = product
        block.conv_fusion = True
        n += 1
    return n


def of_one_head(model: nn.Module, head: str) -> nn.Module:
    """The same model with one head alone, by the vendor's own function; ``model`` itself where that cannot be done.

    Whoever opens a file of several heads and names none gets a head that is called default, the first or the last.

    Args:
        model: of several heads, with the vendor's kernels (:func:`build` with ``stock``).
        head: the one to keep.
    """
    from mace.tools.scripts_utils import remove_pt_head
    from mace.tools.torch_tools import default_dtype

    heads: list[str] = list(model.heads)  # type: ignore[arg-type]
    dtype = next(p.dtype for p in model.parameters())
    basis: Any = model.radial_embedding.bessel_fn  # type: ignore[union-attr]
    counted = not hasattr(basis, "bessel_weights")
    if counted:  # the vendor's function counts these, in every basis
        n_basis: Any = model.radial_embedding.out_dim  # type: ignore[union-attr]
        basis.bessel_weights = torch.zeros(n_basis)
    try:
        with contained(), default_dtype(str(dtype).removeprefix("torch.")):
            single: nn.Module = remove_pt_head(model, head).to(dtype)
        same = bool(
            torch.allclose(
                _energies(single, 0), _energies(model, heads.index(head)), rtol=1e-9, atol=_SAME[dtype]
            )
        )
    except (AttributeError, RuntimeError, TypeError, ValueError, KeyError, IndexError):
        return model  # a plain MACE, or a readout that the function does not know
    finally:
        if counted:
            del basis.bessel_weights
    return single if same else model


def _as_scale_shift(model: Any) -> Any:
    """A view of a plain ``MACE`` from which the vendor's function takes arguments."""
    view = copy.copy(model)
    view.__class__ = type("ScaleShiftMACE", (type(model),), {})
    view.scale_shift = nn.Module()
    view.scale_shift.scale, view.scale_shift.shift = torch.ones(1), torch.zeros(1)
    return view


def _check_twin(path: Path, original: nn.Module, model: nn.Module) -> None:
    """Raise unless the rebuilt model gives the numbers of the file's own module.

    Some constants are not in the state dict (activations' norms, neighbours per atom); a version of
    mace that sets them otherwise would change the potential without an error.
    """
    theirs, ours = _energies(original), _energies(model)
    if not torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9):
        off = float((ours - theirs).abs().max())
        raise CheckpointError(
            f"this version of mace rebuilds another potential from this file (off by {off:.1e} eV)",
            remedy="use the version of mace-torch that wrote it",
            file=path,
        )


def _energies(model: nn.Module, head: int = 0) -> Tensor:
    """(6,) eV, energies of the atoms of a made-up structure, computed in float64."""
    n, counts = 6, torch.tensor([6])
    rng = np.random.default_rng(0)
    pairs = torch.tensor([(i, j) for i in range(n) for j in range(n) if i != j]).t().contiguous()
    place = torch.from_numpy(rng.uniform(0, 2.4, (n, 3)))
    elements = int(model.atomic_numbers.numel())  # type: ignore[operator, union-attr]
    index = torch.arange(n) % elements
    data = inputs(index, elements, pairs, place[pairs[1]] - place[pairs[0]], counts, head)
    with contained(), torch.no_grad():
        out = copy.deepcopy(model).double()(data, compute_force=False)
    energies: Tensor = out["node_energy"].double()
    return energies


# ---- evaluation --------------------------------------------------------------------------------


def inputs(
    element: Tensor, n_elements: int, edge_index: Tensor, edge_vec: Tensor, n_atoms: Tensor, head: int
) -> dict[str, Tensor]:
    """What the vendor's model takes, with edge vectors as its ``shifts`` and all atoms at the origin.

    Args:
        element: (n,) index into the model's elements.
        n_elements: number of elements.
        edge_index: (2, e) sending and receiving atom in the vendor's words.
        edge_vec: (e, 3) Å; its type is that of the computation.
        n_atoms: (B,).
        head: number of the head.
    """
    size = n_atoms.numel()
    zero = edge_vec.new_zeros(())
    return {
        "node_attrs": nn.functional.one_hot(element, n_elements).to(edge_vec.dtype),
        "positions": zero.expand(element.numel(), 3).clone(),
        "edge_index": edge_index,
        "shifts": edge_vec,
        "unit_shifts": torch.zeros_like(edge_vec),
        "cell": zero.expand(3 * size, 3),
        "batch": torch.repeat_interleave(torch.arange(size, device=n_atoms.device), n_atoms),
        "ptr": torch.cat((n_atoms.new_zeros(1), n_atoms.cumsum(0))),
        "head": torch.full_like(n_atoms, head),
    }


def scalar_columns(model: Any) -> list[int]:
    """Columns of the concatenated node features that are even scalars."""
    columns: list[int] = []
    offset = 0
    for product in model.products:
        irreps = product.linear.irreps_out
        for part, (_, ir) in zip(irreps.slices(), irreps, strict=True):
            if ir.l == 0 and ir.p == 1:
                columns += range(offset + part.start, offset + part.stop)
        offset += irreps.dim
    return columns


def check_head(head: str | None, heads: Sequence[str]) -> int:
    """Number of the head to use, or an error that lists the valid ones."""
    if head is not None and head in heads:
        return list(heads).index(head)
    if head is None and len(heads) == 1:
        return 0
    if head is None:
        problem, remedy = "this model has several heads", f"valid names: {', '.join(heads)}"
    else:
        problem = f"unknown head '{head}'"
        remedy = f"{nearest(head, heads)} (valid names: {', '.join(heads)})"
    raise RecipeError(problem, remedy=remedy, field="model.options.head")


def calculator(head: str, device: torch.device, dtype: str, **source: Any) -> Any:
    """``MACECalculator`` of ``model_paths`` or of ``models``."""
    import_mace()
    from mace.calculators import MACECalculator

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it warns of the precision that is asked for here
    try:
        with contained():
            return MACECalculator(device=str(device), default_dtype=dtype, head=head, **source)
    finally:
        logging.disable(level)
