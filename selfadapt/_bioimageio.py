"""A network as a bioimage.io package: a ZIP file with weights, test tensors and a description.

What it says of itself is tried before it appears: by bioimageio.core's own test, and by the
outputs of its pipeline against those of the adapter.
"""

import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from selfadapt._adapter import Adapter
from selfadapt._disk import appearing
from selfadapt._errors import ConfigError, ModelError
from selfadapt._images import open_windows
from selfadapt._input import check_settled, prepare
from selfadapt._lazy import LazyImage
from selfadapt._masks import refuse_masks
from selfadapt._network import NetworkSource, check_network, copy_network, uncompiled
from selfadapt._normalize import Image, in_single, resize_image
from selfadapt._package_steps import others_of, postprocessing, preprocessing
from selfadapt._package_words import Words, name_of, notes, readme, story
from selfadapt._predict import raw_outputs
from selfadapt._symmetry import Grid
from selfadapt._tiles import pad_far_side
from selfadapt._traced import near, save_traced, torchscript_quiet, trace
from selfadapt._trials import choose_places

SIDE = 512
"""Largest side of the test image, in pixels."""
IMAGE = "image"
"""What packages call what goes in."""
DESCRIPTION, TORCHSCRIPT = "bioimageio.yaml", "torchscript.pt"


@torch.no_grad()
def export_bioimageio(
    adapter: Adapter,
    images: Any,
    path: str | Path,
    *,
    name: str | None = None,
    authors: Sequence[str] = (),
    license: str | None = None,
    run: str | Path | None = None,
    channel_axis: int | None = None,
) -> tuple[str, ...]:
    """Write a network as a bioimage.io package, for the programs that open those.

    Its weights are TorchScript. Each head is an output of its own: probabilities, where the head
    gives logits. The package has passed the test of bioimageio.core, whose outputs were those of
    the adapter within 1e-4 of the largest one.

    Args:
        adapter: the network.
        images: any source that `open_images` takes. A part of one of them, at most 512 x 512
            pixels, becomes the test image: whoever has the package can see it.
        path: the ZIP file to write.
        name: 5 to 128 letters, digits, spaces and _+-(); default: that of the file.
        authors: names of those who answer for the package.
        license: an SPDX identifier, such as "CC-BY-4.0".
        run: folder of the run that the network comes from, of which the package then tells.
        channel_axis: see `open_images`.

    Returns:
        What is to be done to an image first, since the format cannot say it: a sentence each.

    Raises:
        ConfigError: bioimageio.core is missing, the file exists, or a name is not allowed.
        ModelError: the network cannot be written as TorchScript, images go in as the format cannot
            say, or the package gives other outputs.
        ImageError: no image can be used.
    """
    target = Path(path)
    check_package(target)
    _check_license(license)
    words = Words(name=name or name_of(target), authors=authors, license=license)
    check_network(getattr(adapter, "model", None))
    check_settled(adapter)
    history = story(run)
    sources = open_windows(images, channel_axis=channel_axis)
    refuse_masks(sources)
    image = _test_image(adapter, sources)
    network = uncompiled(adapter.model)
    plain = adapter.with_model(copy_network(network, torch.device("cpu"), frozen=True))
    # what a package can say
    plain.input = replace(adapter.input, scale=1.0, channels=None, gray=False, tta=False)
    prepared = prepare(plain, image, "the test image")
    traced, least = trace(plain, prepared)
    raw = raw_outputs(plain, plain.model, prepared)
    with tempfile.TemporaryDirectory(prefix="selfadapt-", ignore_cleanup_errors=True) as made:
        folder = Path(made)
        save_traced(traced, folder / TORCHSCRIPT)
        np.save(folder / f"{IMAGE}.npy", image[None])
        for head, output in _values(plain, raw).items():
            np.save(folder / f"{head}.npy", output[None].numpy())
        text = readme(words, adapter, history)
        (folder / "README.md").write_text(text, encoding="utf-8")
        description = words.describe(plain.outputs) | {
            "type": "model",
            "inputs": [_input(plain, image, least)],
            "outputs": [_output(plain, head, raw[head]) for head in plain.outputs],
            "weights": _weights(folder, plain.source()),
        }
        package = _pack(folder, description)
        _check(package, plain, image)
        with appearing(target) as partial:
            shutil.copyfile(package, partial)
    return notes(adapter)


def check_package(target: Path) -> None:
    """Raise ConfigError where bioimageio.core is missing, or a package could not be written."""
    if find_spec("bioimageio") is None or find_spec("bioimageio.core") is None:
        raise ConfigError(
            "a bioimage.io package needs bioimageio.core: pip install 'selfadapt[bioimageio]'"
        )
    if target.suffix != ".zip" or "\0" in str(target):
        raise ConfigError(f"{str(target)!r} is no name of a ZIP file: give one that ends in .zip.")
    if target.exists():
        raise ConfigError(f"{str(target)!r} exists already: give a new name.")
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder for {str(target)!r}.")


def _check_license(license: str | None) -> None:
    from bioimageio.spec.generic.v0_3 import LicenseId

    if license is None:
        return
    try:
        LicenseId(license)
    except ValueError:
        raise ConfigError(
            f"license={license!r} is not known: give an identifier of spdx.org/licenses, such as "
            "CC-BY-4.0."
        ) from None


def _test_image(adapter: Adapter, sources: Sequence[LazyImage]) -> Image:
    """Part of an image `[C, H, W]` as a package takes it: its channels, at the network's scale."""
    place = choose_places(sources)[0]
    image = adapter.input.select(in_single(place.image, place.image)[0])
    size = adapter.input.size(*image.shape[1:])
    if size != image.shape[1:]:
        image = resize_image(image, size)
    fixed = adapter.fixed_size
    multiples: Grid = (fixed, fixed) if fixed else adapter.multiples
    cut = [slice(None)]
    for have, middle, multiple in zip(size, place.middle, multiples, strict=True):
        side = max(min(have, fixed or min(SIDE, adapter.tile)) // multiple, 1) * multiple
        start = min(max(round(middle * adapter.input.scale) - side // 2, 0), max(have - side, 0))
        cut.append(slice(start, start + side))
    part = torch.from_numpy(np.ascontiguousarray(image[tuple(cut)], np.float32))
    return np.asarray(pad_far_side(part, multiples, adapter.padding))


def _values(adapter: Adapter, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: head.values(raw[name]) for name, head in adapter.outputs.items()}


def _input(adapter: Adapter, image: Image, least: Grid) -> dict[str, Any]:
    sizes: list[Any] = [
        side if adapter.fixed_size else {"min": side, "step": step}
        for side, step in zip(least, adapter.multiples, strict=True)
    ]
    names = [f"channel{k}" for k in range(len(image))]
    return {
        "id": IMAGE,
        "axes": [
            {"type": "batch"},
            {"type": "channel", "channel_names": names},
            {"type": "space", "id": "y", "size": sizes[0]},
            {"type": "space", "id": "x", "size": sizes[1]},
        ],
        "test_tensor": {"source": f"{IMAGE}.npy"},
        "data": {"type": "float32"},
        "preprocessing": preprocessing(adapter, image),
    }


def _output(adapter: Adapter, name: str, raw: Tensor) -> dict[str, Any]:
    head = adapter.outputs[name]
    names = [name] if head.channels == 1 else [f"{name}{k}" for k in range(head.channels)]
    space = [
        {"type": "space", "id": axis, "scale": grid, "size": {"tensor_id": IMAGE, "axis_id": axis}}
        for axis, grid in zip("yx", head.grid, strict=True)
    ]
    return {
        "id": name,
        "axes": [{"type": "batch"}, {"type": "channel", "channel_names": names}, *space],
        "test_tensor": {"source": f"{name}.npy"},
        "data": {"type": "float32"},
        "postprocessing": postprocessing(name, head, raw),
    }


def _weights(folder: Path, source: NetworkSource | None) -> dict[str, Any]:
    """The weights of a package; writes those of `source`, too."""
    torchscript = {"source": TORCHSCRIPT, "pytorch_version": str(torch.__version__)}
    if source is None:
        return {"torchscript": torchscript}
    torch.save(dict(source.state), folder / "state.pt")
    shutil.copyfile(source.file, folder / "network.py")
    torch_itself = f"torch=={torch.__version__.partition('+')[0]}"
    needs = ["python", "pip", {"pip": [torch_itself, *source.needs]}]
    environment = {"channels": ["conda-forge"], "dependencies": needs}
    (folder / "environment.yaml").write_text(yaml.safe_dump(environment, sort_keys=False))
    return {
        "pytorch_state_dict": {
            "source": "state.pt",
            "pytorch_version": str(torch.__version__),
            "architecture": {
                "source": "network.py",
                "callable": source.name,
                "kwargs": dict(source.kwargs),
            },
            "dependencies": {"source": "environment.yaml"},
        },
        "torchscript": torchscript | {"parent": "pytorch_state_dict"},
    }


def _pack(folder: Path, description: Mapping[str, Any]) -> Path:
    """The package of a folder, in it."""
    from bioimageio.spec.model.v0_5 import ModelDescr

    told = {"format_version": ModelDescr.implemented_format_version, **description}
    (folder / DESCRIPTION).write_text(yaml.safe_dump(told, sort_keys=False), encoding="utf-8")
    package = folder / "package.zip"
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(folder.iterdir()):
            if file != package:
                packed.write(file, file.name)
    return package


def _check(package: Path, adapter: Adapter, image: Image) -> None:
    """Raise ModelError unless bioimageio.core's test passes, and its outputs are the adapter's."""
    from bioimageio.core import create_prediction_pipeline, load_model_description
    from bioimageio.core import test_model as test_package
    from bioimageio.core.digest_spec import create_sample_for_model

    with torchscript_quiet():
        summary = test_package(package, devices=["cpu"])
        if summary.status != "passed":
            wrong = [error.msg for detail in summary.details for error in detail.errors]
            raise ModelError(
                f"the package does not pass the test of bioimageio.core: {' '.join(wrong[:1])}"
            )
        opened = load_model_description(package)
        kinds: list[Any] = [kind for kind, weights in opened.weights if weights is not None]
        for kind in kinds:
            with create_prediction_pipeline(opened, weights_format=kind, devices=["cpu"]) as ready:
                for given in (image, others_of(image)):
                    sample = create_sample_for_model(opened, inputs={IMAGE: given[None]})
                    found = ready.predict_sample_without_blocking(sample).members
                    _refuse_other(adapter, given, {str(k): t.data for k, t in found.items()})


def _refuse_other(adapter: Adapter, given: Image, found: Mapping[str, Any]) -> None:
    """Raise ModelError unless `found` are the adapter's values for an image."""
    prepared = prepare(adapter, given, "the test image")
    for name, wanted in _values(adapter, raw_outputs(adapter, adapter.model, prepared)).items():
        if not near(torch.from_numpy(np.array(found[name])), wanted[None]):
            raise ModelError(
                f"the package gives other values for head {name!r} than the adapter: what its "
                "`prepare` does, bioimage.io cannot say."
            )
