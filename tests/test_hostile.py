"""Whatever is wrong with an input: a result, or one sentence of ours; never an error from inside.

A night's length is `SELFADAPT_EXAMPLES=2100 pytest tests/test_hostile.py` (10,000 inputs in all).
"""

import io
import json
import os
import random
import shutil
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import h5py
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import tifffile
import torch
import zarr
from helpers import IMAGES, SmallAdapter, discs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from selfadapt import Config, ImageError, Input, SelfAdaptation, SelfAdaptError, open_images
from selfadapt._cli import main
from selfadapt_smp import SmpAdapter
from selfadapt_stardist import StarDist2D, StardistAdapter
from selfadapt_stardist._network import Architecture

EXAMPLES = int(os.environ.get("SELFADAPT_EXAMPLES", "25"))
MANY = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
FEW = settings(MANY, max_examples=max(EXAMPLES // 5, 5))
SEEDS = st.integers(0, 2**32)

ODD = [
    None, True, False, 0, 1, -1, 0.5, -2.5, 2**70, 1e308, float("nan"), float("inf"), "", "x", "0",
    "../x", "/etc/passwd", "é\u2028", [], {}, [1, 2], [[]], {"a": {"b": []}}, ["x"] * 40, "9" * 99,
]  # fmt: skip


# --- arrays, settings, batches -------------------------------------------------------------------

KINDS = st.one_of(
    hnp.scalar_dtypes(), st.sampled_from(["O", "S3", "U2", "f2", "longdouble", ">u2", "?"])
)


@MANY
@given(st.data())
def test_any_array_gives_labels_or_a_sentence(data):
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=24))
    kind = np.dtype(data.draw(KINDS))
    if kind.kind in "OSUVmM":
        array = np.zeros(shape, kind)
    else:
        numbers = {"allow_nan": True, "allow_infinity": True} if kind.kind in "fc" else {}
        elements = hnp.from_dtype(kind, **numbers)
        array = data.draw(hnp.arrays(kind, shape, elements=elements))
    axis = data.draw(st.one_of(st.none(), st.integers(-4, 4)))
    try:
        labels = SmallAdapter().segment(array, channel_axis=axis)
        assert labels.dtype == np.int32
        assert labels.ndim == 2
    except SelfAdaptError:
        pass
    try:
        for image in open_images(array, channel_axis=axis)[:3]:
            assert image.read().ndim == 3
    except ImageError:
        pass


@pytest.mark.parametrize(
    "tensor",
    [
        torch.rand(20, 20).bfloat16(),
        torch.rand(20, 20).to_sparse(),
        torch.rand(20, 20, dtype=torch.complex64),
        torch.rand(20, 20, requires_grad=True),
        torch.rand(20, 20, device="meta"),
    ],
)
def test_any_tensor_gives_labels_or_a_sentence(tensor):
    try:
        assert SmallAdapter().segment(tensor).shape == (20, 20)
    except ImageError as error:
        assert "no array of numbers" in str(error) or "not numbers" in str(error)  # noqa: PT017


@MANY
@given(st.sampled_from([*Config.__dataclass_fields__, *Input.__dataclass_fields__]), SEEDS)
def test_any_setting_is_taken_or_refused(name, seed):
    value = random.Random(seed).choice([*ODD, object(), b"x", 1j, lambda: 0])
    for kind in (Config, Input):
        if name in kind.__dataclass_fields__:
            try:
                kind(**{name: value})
            except SelfAdaptError as error:
                assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "batch",
    [None, "x", [1], np.zeros((2, 1, 32, 32)), (torch.rand(2, 1, 32, 32), 1),
     torch.zeros(2, 1, 32, 32, dtype=torch.complex64), torch.rand(0, 1, 32, 32)],
)  # fmt: skip
def test_a_batch_that_is_none_is_named(batch):
    run = SelfAdaptation(SmallAdapter(), Config(iterations=2, device="cpu"))
    with pytest.raises(ImageError):
        run.loss(batch)


# --- files ---------------------------------------------------------------------------------------


def whole_files():
    """Name and content of a file of each kind."""
    rng = np.random.default_rng(0)
    stack = rng.integers(0, 4000, (3, 40, 30)).astype(np.uint16)
    colour = rng.integers(0, 255, (40, 30, 3)).astype(np.uint8)

    def tiff(pixels, **options):
        file = io.BytesIO()
        tifffile.imwrite(file, pixels, **options)
        return file.getvalue()

    def picture(kind, mode="RGB"):
        file = io.BytesIO()
        Image.fromarray(colour).convert(mode).save(file, kind)
        return file.getvalue()

    plain = {"photometric": "minisblack"}
    return [
        ("plain.tif", tiff(stack, **plain)),
        ("zlib.tif", tiff(stack, compression="zlib", **plain)),
        ("lzw.tif", tiff(stack, compression="lzw", predictor=True, **plain)),
        ("pages.tif", tiff(stack, metadata=None, contiguous=False, **plain)),
        ("tiled.tif", tiff(stack, tile=(16, 16), **plain)),
        ("imagej.tif", tiff(stack, imagej=True)),
        ("a.ome.tif", tiff(stack, ome=True, metadata={"axes": "TYX"}, **plain)),
        ("big.tif", tiff(stack, bigtiff=True, **plain)),
        ("jpeg.tif", tiff(colour, compression="jpeg", photometric="rgb")),
        ("a.png", picture("PNG")),
        ("p.png", picture("PNG", "P")),
        ("a.jpg", picture("JPEG")),
        ("c.jpg", picture("JPEG", "CMYK")),
        ("a.bmp", picture("BMP")),
    ]


FILES = whole_files()


def damaged(content, rng):
    """Some bytes changed, cut off, doubled or nulled."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = (
            rng.randrange(len(content))
            if rng.random() < 0.5
            else rng.randrange(min(400, len(content)))
        )
        how = rng.random()
        if how < 0.6:
            content[at] = rng.randrange(256)
        elif how < 0.75:
            del content[max(at, 1) :]
        elif how < 0.9:
            content[at : at + 8] = bytes(rng.choice([0, 255]) for _ in range(8))
        else:
            content[at:at] = content[:at][-64:]
    return bytes(content)


@MANY
@given(st.integers(0, len(FILES) - 1), SEEDS)
def test_a_damaged_image_file_is_read_or_named(which, seed):
    name, content = FILES[which]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(damaged(content, random.Random(seed)))
        try:
            for image in open_images(folder)[:8]:
                pixels = image.read()
                assert pixels.ndim == 3
        except ImageError as error:
            assert name in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017


def edited(data, rng):
    """JSON with one value that is another, or missing."""
    if isinstance(data, dict) and data and rng.random() < 0.8:
        key = rng.choice(list(data))
        rest = {k: v for k, v in data.items() if k != key}
        return rest if rng.random() < 0.15 else rest | {key: edited(data[key], rng)}
    if isinstance(data, list) and data and rng.random() < 0.8:
        at = rng.randrange(len(data))
        return [*data[:at], edited(data[at], rng), *data[at + 1 :]]
    return rng.choice(ODD)


def spoil(folder, rng):
    """Edit, damage or remove one file of a folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    victim = rng.choice(sorted(files))
    holds_json = victim.suffix == ".json" or victim.name.startswith(".z")
    if holds_json and rng.random() < 0.8:
        victim.write_text(json.dumps(edited(json.loads(victim.read_text()), rng)))
    elif rng.random() < 0.2:
        victim.unlink()
    else:
        victim.write_bytes(damaged(victim.read_bytes(), rng))


def make_stores(root):
    group = zarr.open_group(root / "two.zarr", mode="w", zarr_format=2)
    for version, store in ((2, group), (3, zarr.open_group(root / "three.zarr", mode="w"))):
        store.create_array("0", data=np.arange(900, dtype=np.uint16).reshape(1, 30, 30))
        axes = [{"name": name} for name in "cyx"]
        told = {"multiscales": [{"axes": axes, "datasets": [{"path": "0"}]}]}
        store.attrs.update(told if version == 2 else {"ome": told})
    plate = zarr.open_group(root / "plate.zarr", mode="w", zarr_format=2)
    plate.attrs["plate"] = {"wells": [{"path": "A/1"}]}
    plate.create_group("A/1").attrs["well"] = {"images": [{"path": "0"}]}
    image = plate.create_group("A/1/0")
    image.create_array("0", data=np.arange(900, dtype=np.uint16).reshape(30, 30))
    image.attrs["multiscales"] = [{"axes": ["y", "x"], "datasets": [{"path": "0"}]}]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    make_stores(root)
    return root


@MANY
@given(seed=SEEDS)
def test_a_damaged_zarr_store_is_read_or_named(stores, seed):
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "s"
        shutil.copytree(stores, copy)
        spoil(copy, rng)
        try:
            for image in open_images(copy)[:8]:
                assert image.read().ndim == 3
        except ImageError as error:
            assert "\n" not in str(error)  # noqa: PT017


# --- models --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    adapter = SmpAdapter.from_pretrained("demo")
    adapter.save(root / "smp")
    torch.manual_seed(0)
    network = StarDist2D(Architecture(n_rays=8, unet_n_depth=1, unet_n_filter_base=2))
    StardistAdapter(network).save(root / "stardist")
    return root


@FEW
@given(seed=SEEDS)
def test_a_damaged_model_folder_opens_or_is_named(models, seed):
    rng = random.Random(seed)
    kind, opened = rng.choice([("smp", SmpAdapter.from_pretrained), ("stardist", StardistAdapter)])
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model"
        shutil.copytree(models / kind, copy)
        spoil(copy, rng)
        try:
            adapter = opened(str(copy))
            adapter.segment(discs(0, (64, 64))[0])
        except SelfAdaptError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_odd_values_in_a_models_sidecar_open_or_are_named(models, tmp_path):
    folder = shutil.copytree(models / "smp", tmp_path / "model")
    told = json.loads((folder / "selfadapt.json").read_text())
    image = discs(0, (64, 64))[0]
    spoiled = [told | {"heads": 0.5}, told | {"input": told["input"] | {"scale": 1e308}}]
    for value in random.Random(0).sample(ODD, min(EXAMPLES // 8, len(ODD))):
        spoiled += [told | {name: value} for name in told]
        spoiled += [told | {"input": told["input"] | {name: value}} for name in told["input"]]
    for options in spoiled:
        (folder / "selfadapt.json").write_text(json.dumps(options))
        try:
            SmpAdapter.from_pretrained(str(folder)).segment(image)
        except SelfAdaptError as error:
            assert "\n" not in str(error)  # noqa: PT017


# --- the shell -----------------------------------------------------------------------------------


def shell(words):
    """Exit code and what was said on stderr; an exception ends the test."""
    said = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stopped:  # --help
            code = stopped.code
    return code, said.getvalue()


TINY = [
    "--iterations", "2", "--batch_size", "2", "--crop", "32", "--views", "2", "--device", "cpu",
    "--validate_every", "1", "--validation_images", "1", "--candidates", "default",
    "--calibrate", "false",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the bundled network, and its images."""
    root = tmp_path_factory.mktemp("run")
    (root / "images").mkdir()
    for k in range(3):
        tifffile.imwrite(root / "images" / f"{k}.tif", discs(k, (64, 64))[0])
    words = ["adapt", "--adapter", "smp", "--model", "demo", "--images", root / "images", *TINY]
    assert shell([*words, "--out", root / "run"])[0] in (0, 3)
    return root


@FEW
@given(seed=SEEDS)
def test_an_edited_run_folder_is_used_or_named(finished, seed):
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "run"
        shutil.copytree(finished / "run", copy)
        spoil(copy, rng)
        images = finished / "images"
        command = rng.choice(["report", "segment", "adapt"])
        words = {
            "report": ["report", copy],
            "segment": ["segment", "--model", copy, "--images", images,
                        "--out", Path(folder) / "o"],
            "adapt": ["adapt", "--adapter", "smp", "--model", "demo", "--images", images, *TINY,
                      "--out", copy, "--resume"],
        }[command]  # fmt: skip
        code, said = shell(words)
        assert code in (0, 2, 3)
        assert "Traceback" not in said


@FEW
@given(seed=SEEDS)
def test_any_config_file_is_taken_or_named(finished, seed):
    rng = random.Random(seed)
    told = {"adapter": "smp", "model": "demo", "images": str(finished / "images"), "seed": 3,
            "heads": "foreground,distance", "iterations": 0, "trainable": "all"}  # fmt: skip
    command = rng.choice(["adapt", "segment", "check"])
    if command != "adapt":  # settings are of no use there
        told = {key: told[key] for key in ("adapter", "model", "images", "heads")}
    name = rng.choice(list(told))
    told[name] = rng.choice(ODD)
    text = json.dumps(told)
    if rng.random() < 0.3:
        text = rng.choice([
            "[" * 3000, "a: &a [*a, *a]", "a: !!python/object/apply:os.system [echo]", "\x00",
            "- 1", "&a a: *a", "{" * 50, "adapter: smp\nadapter: cellpose", "a: b: c", "%YAML 9",
        ])  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "c.yaml"
        content = text.encode() if rng.random() < 0.9 else b"\xff\xfe\xfa" + text.encode()
        file.write_bytes(content)
        out = [] if command == "check" else ["--out", Path(folder) / "out"]
        code, said = shell([command, "--config", file, *out, "--channel_axis", "7"])
        assert code == 2
        assert said.count("\n") == 1


FLAGS = [
    "--scale", "--invert", "--heads", "--min_size", "--size_multiple", "--channels", "--iterations",
    "--seed", "--device", "--batch_size", "--out", "--threshold", "--gray", "--crop", "--trainable",
    "--normalize", "--embedding", "--precision", "--validation", "--stop", "--tau", "--fixed_size",
]  # fmt: skip


@FEW
@given(seed=SEEDS)
def test_any_flag_is_taken_or_named(finished, seed):
    rng = random.Random(seed)
    values = [
        "",
        "x",
        "-1",
        "0",
        "nan",
        "inf",
        "1e99",
        "[1]",
        "{}",
        "null",
        "true",
        "meta",
        "hpu",
        "é",
    ]
    words = []
    for flag in rng.sample(FLAGS, rng.randint(1, 3)):
        words += [flag, rng.choice(values)]
    begin = ["adapt", "--adapter", "smp", "--model", "demo", "--images", finished / "images"]
    with tempfile.TemporaryDirectory() as folder:
        # a channel axis that no image has ends it before any work
        code, said = shell([*begin, "--out", Path(folder) / "o", *words, "--channel_axis", "9"])
    assert code == 2
    assert said.count("\n") == 1


def test_reports_show_markup_and_names_as_text(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    told = json.loads((tmp_path / "run" / "result.json").read_text())
    evil = "<script>alert(1)</script>"
    told["reason"], told["examples"] = evil, [f"{evil}\udcff.tif"] * len(told["examples"])
    (tmp_path / "run" / "result.json").write_text(json.dumps(told))
    code, _ = shell(["report", tmp_path / "run"])
    assert code == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_weights_of_hdf5_lead_nowhere_else(tmp_path):
    torch.manual_seed(0)
    network = StarDist2D(Architecture(n_rays=8, unet_n_depth=1, unet_n_filter_base=2))
    StardistAdapter(network).save(tmp_path / "m")
    weights = tmp_path / "m" / "weights_best.h5"
    shutil.copy(weights, tmp_path / "other.h5")
    with h5py.File(weights, "r+") as file:
        layer = next(iter(file.keys()))
        del file[layer]
        file[layer] = h5py.ExternalLink(str(tmp_path / "other.h5"), f"/{layer}")
    with pytest.raises(SelfAdaptError):
        StardistAdapter(tmp_path / "m")


def test_the_images_of_these_tests_can_be_used():
    assert SmallAdapter().segment(IMAGES[0]).shape == IMAGES[0].shape
