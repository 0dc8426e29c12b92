"""From a name or a weights file to a `CellposeModel`, checked key for key, and back to a file."""

import copy
import logging
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cellpose import io, models
from cellpose.models import CellposeModel
from torch import Tensor, nn

from selfadapt import ModelError
from selfadapt_cellpose._networks import check_network, is_transformer

logger = logging.getLogger(__name__)

VERSION = version("cellpose")
MAJOR = int(VERSION.partition(".")[0])
CELLPOSE_3_NAMES = ("cyto", "cyto2", "cyto3", "nuclei")
"""The zoo's names that everybody knows; Cellpose 4 would silently take its default instead."""
CPNET_WIDTHS = [32, 64, 128, 256]
"""The only widths that Cellpose's own loader builds."""
DIAMETERS = ("diam_mean", "diam_labels")
"""Version 3 files from before these were stored lack them, and no other tensor."""


def open_network(model: str | Path | CellposeModel) -> tuple[Any, CellposeModel, bool]:
    """A network of its own, the `CellposeModel` it comes from, and whether that has `diam_labels`.

    Raises:
        ModelError: there is no such model, or it does not fit the installed Cellpose.
    """
    if isinstance(model, str | Path):
        template, has_diameter = open_cellpose(str(model))
        net = template.net
    else:
        net, has_diameter = network_copy(model)
        template = model
    check_network(net)
    return net, template, has_diameter


def opening_line(path: Path, net: nn.Module, template: CellposeModel) -> str:
    """The line of Python that opens a saved network."""
    file = repr(str(path.absolute()))
    if is_transformer(net):
        return f"CellposeModel(pretrained_model={file}, use_bfloat16=False)"
    if template.nbase[1:] == CPNET_WIDTHS:
        channels = "" if net.nchan == 2 else f", nchan={net.nchan}"
        return f"CellposeModel(pretrained_model={file}{channels})"
    return f"CellposeAdapter({file}): Cellpose itself knows the widths {CPNET_WIDTHS} only"


def open_cellpose(model: str) -> tuple[CellposeModel, bool]:
    """The float32 model of a zoo name or a weights file, and whether the file has `diam_labels`.

    Raises:
        ModelError: there is no such model, or it does not fit the installed Cellpose.
    """
    path = find_weights(model)
    state = read_weights(path)
    if MAJOR >= 4:
        try:
            opened = CellposeModel(pretrained_model=str(path), use_bfloat16=False)
        except (RuntimeError, ValueError) as error:  # torch: a tensor has another shape
            raise ModelError(
                f"{str(path)!r} is of another architecture than its names say: "
                f"{str(error).splitlines()[-1].strip()}"
            ) from None
        except NameError:
            raise ModelError(
                f"{str(path)!r} is a CPDINO network, which needs the package dinov3: pip install "
                "git+https://github.com/facebookresearch/dinov3"
            ) from None
        check_state(state, opened.net, repr(str(path)))
    else:
        diameter = 17.0 if path.name == "nucleitorch_0" else 30.0  # as Cellpose has it
        net = build_cpnet(state, repr(str(path)), diameter)
        opened = CellposeModel(gpu=False, nchan=net.nchan)
        opened.net, opened.nbase, opened.pretrained_model = net, net.nbase, str(path)
        opened.net_ortho = None
        opened.diam_mean, opened.diam_labels = (float(getattr(net, name)) for name in DIAMETERS)
    return opened, "diam_labels" in state


def find_weights(model: str) -> Path:
    """The weights file that a path or a name means; Cellpose downloads what it knows."""
    path = Path(model).expanduser()
    if path.is_file():
        return path
    if "transformer" in model and model in models.MODEL_NAMES:
        raise ModelError(f"{model!r} is a SegFormer: only CPnet, CPSAM and CPDINO can be adapted.")
    if model in [*models.MODEL_NAMES, *models.get_user_models()]:
        try:
            return Path(models.model_path(model) if MAJOR < 4 else models.cache_model_path(model))
        except OSError as error:
            raise ModelError(
                f"Cellpose cannot download {model!r} ({error}): connect to the internet, or give "
                f"the path of its file (Cellpose looks in {models.MODEL_DIR})."
            ) from None
    if path.is_dir():
        raise ModelError(f"{model!r} is a folder: Cellpose keeps a network in one file, give that.")
    if model in CELLPOSE_3_NAMES:
        raise ModelError(f"{model!r} is a network of Cellpose 3, {_other_version(3)}")
    if model.startswith(("cpsam", "cpdino")):
        raise ModelError(f"{model!r} is a network of Cellpose 4, {_other_version(4)}")
    raise ModelError(
        f"there is no model {model!r}: give a weights file, or a name that Cellpose {VERSION} "
        f"knows ({', '.join(models.MODEL_NAMES[:4])}, ...)."
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, by the network's own names.

    Raises:
        ModelError: it is no Cellpose file, or one of another major version.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # every kind of file fails in its own way, with words for programmers
        reason = "torch cannot read it as one"
        raise _no_cellpose_file(repr(str(path)), reason) from None
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise _no_cellpose_file(
            repr(str(path)), f"it holds a {type(content).__name__}, no flat state dict"
        )
    state = dict(content)
    if "W2" in state:
        theirs = 4
    elif "output.2.weight" in state and any(name.startswith("downsample.") for name in state):
        theirs = 3
    else:
        raise _no_cellpose_file(
            repr(str(path)), f"its first tensors are {', '.join(list(state)[:3])}"
        )
    if theirs != min(MAJOR, 4):
        raise ModelError(
            f"{str(path)!r} is a network of Cellpose {theirs}, {_other_version(theirs)}"
        )
    return state


def _no_cellpose_file(source: str, reason: str) -> ModelError:
    return ModelError(
        f"{source} is no weights file of a Cellpose network ({reason}): give a file that "
        "Cellpose has trained or saved."
    )


def _other_version(needed: int) -> str:
    return (
        f"and Cellpose {VERSION} is installed, which cannot run it: use an environment with "
        f"pip install 'cellpose{'<4' if needed < 4 else '>=4'}'."
    )


def build_cpnet(state: Mapping[str, Tensor], source: str, diameter: float) -> nn.Module:
    """The CPnet of these tensors, whatever its widths; `diameter` where they have none."""
    from cellpose.resnet_torch import CPnet

    class AnyWidthCPnet(CPnet):  # type: ignore[misc]
        """A CPnet whose style fills the 256 numbers that Cellpose's tiler keeps for it."""

        def forward(self, data: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
            outputs, style, maps = super().forward(data)
            return outputs, nn.functional.pad(style, (0, 256 - style.shape[1])), maps

    projections = [
        tensor
        for name, tensor in state.items()
        if name.startswith("downsample.down.") and name.endswith(".proj.1.weight")
    ]
    if not projections:
        raise _no_cellpose_file(source, "its encoder has no layer")
    widths = [len(tensor) for tensor in projections]
    kind = CPnet if widths == CPNET_WIDTHS else AnyWidthCPnet
    channels, outputs = projections[0].shape[1], len(state["output.2.weight"])
    net: nn.Module = kind([channels, *widths], outputs, sz=3, mkldnn=False, diam_mean=diameter)
    check_state(state, net, source)
    net.load_state_dict(state, strict=False)  # strict but for DIAMETERS, just checked
    net.eval()
    return net


def rebuilt(net: nn.Module) -> nn.Module:
    """A copy of a CPnet, even of one that `eval` on a CPU has turned into MKL-DNN tensors."""
    state = {
        name: (tensor.to_dense() if tensor.is_mkldnn else tensor).detach().clone()
        for name, tensor in net.state_dict().items()
    }
    for name in [name for name in state if name.endswith("running_mean")]:
        # MKL-DNN layers do without; Cellpose's batch norm never looks at it
        counter = name.replace("running_mean", "num_batches_tracked")
        state.setdefault(counter, torch.tensor(0))
    return build_cpnet(state, "the given model", 30.0)


def network_copy(model: Any) -> tuple[nn.Module, bool]:
    """A copy of the network of a `CellposeModel`, and whether its file has `diam_labels`."""
    if not isinstance(model, CellposeModel):
        hint = ": give its CellposeModel, model.cp" if hasattr(model, "cp") else ""
        raise ModelError(f"a {type(model).__name__} is no name, file or CellposeModel{hint}.")
    check_network(model.net)
    try:
        state = read_weights(Path(str(model.pretrained_model)))
    except ModelError:  # the file is gone, or Cellpose reads it in another way
        state = None
    if not is_transformer(model.net):
        return rebuilt(model.net).to(model.device), state is None or "diam_labels" in state
    net: nn.Module = copy.deepcopy(model.net)
    if next(net.parameters()).dtype == torch.bfloat16:
        # what bfloat16 has rounded away is still in the file, if that is where it came from
        rounded = net.state_dict()
        if state is not None and all(
            name in state and torch.equal(state[name].to(torch.bfloat16), tensor.cpu())
            for name, tensor in rounded.items()
        ):
            net.float().load_state_dict(state)
        else:
            logger.warning(
                "The model is in bfloat16, and the file it came from does not say more: its "
                "rounded weights are taken."
            )
    return net, True


def shapes_of(net: nn.Module) -> dict[str, tuple[int, ...]]:
    """What the state dict of a network must hold."""
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def difference(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What is wrong with a state dict, name by name; None if nothing is.

    Cellpose's own loader takes what fits and leaves a missing layer at random values.
    """
    missing = [name for name in shapes if name not in state and name not in DIAMETERS]
    unknown = [name for name in state if name not in shapes]
    if missing:
        return f"lacks {len(missing)} of its {len(shapes)} tensors ({missing[0]}, ...)"
    if unknown:
        return f"has {len(unknown)} tensors that are none of its own ({unknown[0]}, ...)"
    for name, tensor in state.items():
        if tuple(tensor.shape) != shapes[name]:
            return f"has {name} of shape {tuple(tensor.shape)} instead of {shapes[name]}"
        if not bool(tensor.isfinite().all()):
            return f"has NaN or infinity in {name}"
    return None


def check_state(state: Mapping[str, Tensor], net: nn.Module, source: str) -> None:
    """Raise ModelError unless the tensors of `source` are those of the network."""
    if wrong := difference(state, shapes_of(net)):
        raise ModelError(
            f"{source} {wrong}: it is damaged, or of another architecture than "
            f"{type(net).__name__}."
        )


def write_weights(
    net: nn.Module, path: Path, shapes: Mapping[str, tuple[int, ...]], diameter: float | None
) -> None:
    """Save the flat float32 state dict of `net`, checked against `shapes` first, atomically.

    `diameter` becomes its `diam_labels`, which tell Cellpose; None leaves them.
    """
    state = {
        name: tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.cpu()
        for name, tensor in net.state_dict().items()
    }
    if wrong := difference(state, shapes):
        raise ModelError(f"the network cannot be saved for Cellpose: it {wrong}.")
    if diameter is not None:
        state["diam_labels"] = torch.full_like(state["diam_labels"], diameter)
    if not path.absolute().parent.is_dir():
        raise ModelError(f"there is no folder {str(path.absolute().parent)!r} to save to.")
    if path.is_dir():
        raise ModelError(f"{str(path)!r} is a folder: give the name of a file.")
    partial = path.with_name(f"{path.name}.partial")
    torch.save(state, partial)
    os.replace(partial, path)


def check_free(name: str) -> None:
    """Raise ModelError if Cellpose has another model of that name, which this would replace."""
    if name in models.MODEL_NAMES or (Path(models.MODEL_DIR) / name).exists():
        raise ModelError(
            f"Cellpose has a model {name!r} already: save under another name to register it."
        )


def register_in_gui(path: Path) -> None:
    """Copy a saved file to Cellpose's folder and put it into the list of its GUI."""
    Path(models.MODEL_DIR).mkdir(parents=True, exist_ok=True)
    io.add_model(str(path))
