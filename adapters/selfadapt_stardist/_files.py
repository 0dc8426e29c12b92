"""From a StarDist model folder, its zip or its name to a PyTorch network, and back to a folder."""

import io
import json
import logging
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import nn

from selfadapt import Input, ModelError
from selfadapt_stardist._network import Architecture, StarDist2D

logger = logging.getLogger(__name__)

RELEASES = "https://github.com/stardist/stardist-models/releases/download/v0.1"
PRETRAINED = {
    "2D_versatile_fluo": "4ad678d0758eed6e55625f1b5ae30771e59adb79f1239e09b9772eac8846c3dd",
    "2D_versatile_he": "f1696ef0631bd7e1c0e5c0d3017e2b4c6a95e284c6aab9c22fc2f08317817b28",
    "2D_paper_dsb2018": "4c11cf68512341d9e8ce3d1278c64ceb8ac400582739f85fcab079a2e82840d2",
    "2D_demo": "a1efaebd7103db6236655bf158b6e21cf5b38d58ec77a509802244a89a260fa4",
}
"""StarDist's own 2-D networks and the SHA-256 of their zips, as `stardist.models` lists them."""

CONFIG, THRESHOLDS, WEIGHTS = "config.json", "thresholds.json", "weights_best.h5"
SIDECAR = "selfadapt.json"
"""Beside StarDist's own files: how images go in, which these do not say."""
DEFAULT_THRESHOLDS = {"prob": 0.5, "nms": 0.4}
"""What StarDist takes where there is no thresholds.json."""


@dataclass(frozen=True)
class StarDistModel:
    """What a StarDist model folder holds.

    Args:
        network: with the weights of the folder.
        config: all of config.json, the settings of its training included.
        thresholds: of object probability and of overlap, by the names "prob" and "nms".
        input: how images go in, where selfadapt has written the folder (StarDist reads over it).
    """

    network: StarDist2D
    config: Mapping[str, Any]
    thresholds: Mapping[str, float]
    input: Input | None = None


def read_model(model: str) -> StarDistModel:
    """Open a model folder, the zip of one, or one of StarDist's own models by its name.

    Raises:
        ModelError: there is no such model, or it is not a 2-D StarDist network.
    """
    source = repr(model)
    try:
        folder = _folder(model)
        config = _json(folder / CONFIG, source)
        _check_config(config, source)
        network = StarDist2D(Architecture.from_config(config))
        weights = _weights_file(folder, source)
        read_weights(network, weights.read_bytes(), f"{weights.name} of {source}")
        sidecar = folder / SIDECAR
        told = Input.from_dict(_json(sidecar, source)) if sidecar.is_file() else None
        return StarDistModel(network.eval(), config, _thresholds(folder, source), told)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ModelError(f"{source} is a damaged zip ({error}): get it again.") from None


def _folder(model: str) -> Any:
    """The folder that a path or a name means, as a `Path` or as one inside a zip."""
    path = Path(model).expanduser()
    if model in PRETRAINED and not path.exists():
        path = _download(model)
    if not path.exists():
        raise ModelError(
            f"there is no model {model!r}: give a StarDist model folder, its zip, or one of "
            f"{', '.join(PRETRAINED)}."
        )
    candidates: list[Any] = [path]
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise ModelError(
                f"{model!r} is neither a folder nor a zip: StarDist keeps a model in a folder of "
                f"{CONFIG}, {THRESHOLDS} and {WEIGHTS}, give that."
            )
        archive = zipfile.Path(path)
        candidates = [archive, *archive.iterdir()]  # many zips hold a folder, and that the files
    for candidate in candidates:
        if candidate.is_dir() and (candidate / CONFIG).is_file():
            return candidate
    raise ModelError(
        f"{model!r} is no StarDist model: there is no {CONFIG} in it. Give the folder that holds "
        f"{CONFIG} and {WEIGHTS}."
    )


def _download(name: str) -> Path:
    """The zip of a model, from where StarDist (Keras) keeps it or, the first time, the web."""
    home = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser()
    file = home / "models" / "StarDist2D" / name / f"{name}.zip"
    if not zipfile.is_zipfile(file):  # absent, or a download that was cut off
        file.parent.mkdir(parents=True, exist_ok=True)
        url = f"{RELEASES}/python_{name}.zip"
        logger.warning("Downloading %s to %s", url, file)
        try:
            torch.hub.download_url_to_file(url, str(file), PRETRAINED[name], progress=False)
        except (OSError, RuntimeError) as error:
            raise ModelError(
                f"{name!r} cannot be downloaded ({error}): connect to the internet, or give a "
                f"folder that holds its {CONFIG} and {WEIGHTS}."
            ) from None
    return file


def _json(file: Any, source: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file.name} of {source} is no JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file.name} of {source} holds a {type(content).__name__}, no settings.")
    return content


def _check_config(config: Mapping[str, Any], source: str) -> None:
    if config.get("n_dim") == 3 or "Z" in str(config.get("axes")) or "rays_json" in config:
        raise ModelError(
            f"{source} is a 3-D StarDist model: only 2-D ones can be adapted, as rays on a sphere "
            "do not turn into one another with the image."
        )
    if "n_rays" not in config:
        raise ModelError(f"{source} is no StarDist model: its {CONFIG} has no n_rays.")
    if config.get("backbone", "unet") != "unet":
        raise ModelError(
            f"{source} has the backbone {config['backbone']!r}: StarDist's 2-D networks are U-Nets."
        )


def _weights_file(folder: Any, source: str) -> Any:
    """The file that StarDist itself loads: the newest that is called "best", else the newest."""
    files = [
        file
        for file in folder.iterdir()
        if file.name.endswith((".h5", ".hdf5")) and not file.name.startswith(".")
    ]
    if not files:
        raise ModelError(f"{source} has no weights: there is no {WEIGHTS} in it.")

    def rank(file: Any) -> tuple[bool, float, bool]:
        age = file.stat().st_mtime if isinstance(file, Path) else 0.0  # unpacked all at once
        return "best" in file.name, age, file.name == WEIGHTS

    return max(files, key=rank)


def _thresholds(folder: Any, source: str) -> dict[str, float]:
    file = folder / THRESHOLDS
    if not file.is_file():
        logger.warning(
            "%s has no %s: StarDist's own defaults are taken, prob_thresh %.1f and nms_thresh "
            "%.1f. Give both if the model was tuned to others.",
            source, THRESHOLDS, DEFAULT_THRESHOLDS["prob"], DEFAULT_THRESHOLDS["nms"],
        )  # fmt: skip
        return dict(DEFAULT_THRESHOLDS)
    content = _json(file, source)
    for name in DEFAULT_THRESHOLDS:
        value = content.get(name)
        if not isinstance(value, int | float) or not 0 < value < 1:
            raise ModelError(
                f"{THRESHOLDS} of {source} has {name}={value!r}: it must be a number between 0 "
                "and 1."
            )
    return {name: float(content[name]) for name in DEFAULT_THRESHOLDS}


def read_weights(network: StarDist2D, content: bytes, source: str) -> None:
    """Copy the weights of a Keras file (HDF5, as Keras 2 and StarDist write it) into a network.

    Layers go by their names. Those that Keras has numbered (`conv2d_7`) go by their order, as the
    number depends on what else the session had built.

    Raises:
        ModelError: it is no such file, or that of another architecture.
    """
    stored = _stored_weights(content, source)
    for name, layer in network.keras_layers():
        kind = _unnamed_kind(name)
        key = name if kind is None else next((k for k in stored if _unnamed_kind(k) == kind), name)
        if key not in stored:
            raise ModelError(
                f"{source} has no layer {name!r}: it is that of another architecture than "
                f"{CONFIG} says."
            )
        arrays, targets = stored.pop(key), _tensors(layer)
        found = [array.shape for array in arrays]
        wanted = [_to_keras(target).shape for target in targets]
        if found != wanted:
            hint = ""
            if name == "dist" and found[-1] != wanted[-1]:
                hint = f" (n_rays={wanted[-1][0]}, and the file has {found[-1][0]})"
            raise ModelError(
                f"{source} has a layer {key!r} of shapes {found}, and {CONFIG} asks for {wanted}"
                f"{hint}: the two files do not belong together."
            )
        for target, array in zip(targets, arrays, strict=True):
            if not np.isfinite(array).all():
                raise ModelError(f"{source} has NaN or infinity in the layer {key!r}.")
            tensor = torch.from_numpy(array.astype(np.float32))
            target.data.copy_(tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor)
    if stored:
        raise ModelError(
            f"{source} has {len(stored)} layers more than {CONFIG} says ({', '.join(stored)}): "
            "it is that of another architecture."
        )


def _stored_weights(content: bytes, source: str) -> dict[str, list[Any]]:
    """Arrays of each layer that has any, in the order of the file."""
    try:
        with h5py.File(io.BytesIO(content)) as file:
            root = file.get("model_weights", file)  # a whole model, not only its weights
            stored = {}
            for layer in map(_text, root.attrs["layer_names"]):
                names = [_text(name) for name in root[layer].attrs["weight_names"]]
                if names:
                    stored[layer] = [root[layer][name][()] for name in names]
            return stored
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{source} is no file of Keras weights ({error}): give one that StarDist has saved."
        ) from None


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _unnamed_kind(layer: str) -> str | None:
    """Which kind of layer Keras has numbered; None for a layer with a name of its own."""
    kind, _, number = layer.rpartition("_")
    kind = kind if number.isdigit() else layer
    return kind if kind in ("conv2d", "batch_normalization") else None


def _tensors(layer: nn.Module) -> list[torch.Tensor]:
    """Weights in the order of Keras."""
    if isinstance(layer, nn.BatchNorm2d):
        names = ["weight", "bias", "running_mean", "running_var"]
    else:
        names = ["weight", "bias"]
    return [getattr(layer, name) for name in names]


def _to_keras(tensor: torch.Tensor) -> Any:
    array = tensor.detach().cpu().float().numpy()
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


WEIGHT_NAMES = {
    nn.Conv2d: ["kernel:0", "bias:0"],
    nn.BatchNorm2d: ["gamma:0", "beta:0", "moving_mean:0", "moving_variance:0"],
}


def write_model(model: StarDistModel, path: Path) -> None:
    """Write the folder that `stardist.models.StarDist2D(None, name, basedir)` loads.

    Raises:
        ModelError: a weight is not finite, or the path is there already or in no folder.
    """
    _check_saving(model.network, path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        partial = Path(scratch) / "model"
        partial.mkdir()
        (partial / CONFIG).write_text(json.dumps(dict(model.config)))
        (partial / THRESHOLDS).write_text(json.dumps(dict(model.thresholds)))
        if model.input is not None:
            (partial / SIDECAR).write_text(json.dumps(model.input.to_dict()))
        _write_weights(model.network, partial / WEIGHTS)
        os.replace(partial, path)


def write_state(network: nn.Module, path: Path) -> None:
    """Write the state dict of another author's network.

    Raises:
        ModelError: a weight is not finite, or the path is there already or in no folder.
    """
    _check_saving(network, path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        torch.save(network.state_dict(), Path(scratch) / "state")
        os.replace(Path(scratch) / "state", path)


def _check_saving(network: nn.Module, path: Path) -> None:
    for name, tensor in network.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"the network cannot be saved: {name} has NaN or infinity.")
    if path.exists():
        raise ModelError(f"{str(path)!r} exists already: give another name.")
    if not path.parent.is_dir():
        raise ModelError(f"there is no folder {str(path.parent)!r} to save to.")


def _write_weights(network: StarDist2D, path: Path) -> None:
    """The file of `keras_model.save_weights`, in the layout of Keras 2, which Keras 3 reads too."""
    layers = dict(network.keras_layers())
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in layers]
        file.attrs["backend"] = b"tensorflow"
        file.attrs["keras_version"] = b"2.15.0"  # whose layout this is
        for name, layer in layers.items():
            group = file.create_group(name)
            names = [f"{name}/{weight}" for weight in WEIGHT_NAMES[type(layer)]]
            group.attrs["weight_names"] = [weight.encode() for weight in names]
            for weight, tensor in zip(names, _tensors(layer), strict=True):
                group[weight] = _to_keras(tensor)
