"""Packages of bioimage.io, opened and run by bioimageio.core itself."""

import io
import json
import shutil
import sys
import warnings
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import tifffile
import torch
import yaml
from helpers import SmallAdapter, SmallNet
from skimage.transform import resize
from stardist.data import test_image_nuclei_2d as nuclei
from torch import nn

from selfadapt import (
    Binary,
    ConfigError,
    ModelError,
    OutputSpec,
    Scalar,
    export_bioimageio,
    open_images,
    predict,
    prepare,
    to_gray,
)
from selfadapt._bioimageio import _check, _input, _output, _test_image
from selfadapt._cli import main
from selfadapt._package_steps import preprocessing
from selfadapt._package_words import Words, name_of
from selfadapt._traced import trace
from selfadapt_smp import SmpAdapter
from selfadapt_stardist import Architecture, StarDist2D, StardistAdapter

pytestmark = [
    pytest.mark.skipif(find_spec("bioimageio") is None, reason="needs bioimageio.core"),
    # bioimageio.spec leaves files to the garbage collector
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    # bioimageio.core loads TorchScript, which torch deprecates
    pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated:FutureWarning"),
]
NUCLEI = nuclei(return_mask=False)
PIECE = NUCLEI[100:196, 60:188]
COLOURS = np.stack([255 - np.roll(NUCLEI[:200, :264], k, 0) // (k + 1) for k in range(3)], -1)


def demo(**options) -> SmpAdapter:
    return SmpAdapter.from_pretrained("demo", **options)


def small(heads, channels=1, **options) -> SmpAdapter:
    """Around a plain network of three layers."""
    torch.manual_seed(0)
    outputs = sum(int(name.partition(":")[2] or 1) for name in heads.split(","))
    network = SmallNet(outputs, channels).eval()
    options = {"embedding": "bottleneck", "size_multiple": 2, **options}
    return SmpAdapter(network, heads, **options)


def unet(channels=1, classes=1, **options) -> nn.Module:
    torch.manual_seed(0)
    return smp.Unet(
        "tu-test_efficientnet", encoder_weights=None, in_channels=channels, classes=classes,
        decoder_channels=(16, 16, 16, 8, 8), **options,
    ).eval()  # fmt: skip


def run_package(path, image, kind=None):
    """Outputs of bioimageio.core for an image `[C, H, W]`, by head."""
    from bioimageio.core import create_prediction_pipeline, load_model_description
    from bioimageio.core import predict as predict_package

    pipeline = create_prediction_pipeline(load_model_description(path), weights_format=kind)
    found = predict_package(model=pipeline, inputs={"image": np.asarray(image)[None]}).members
    return {str(name): np.array(tensor.data)[0] for name, tensor in found.items()}


def assert_equal_outputs(path, adapter, image, *, of=None, kind=None):
    """Of bioimageio.core for `image`, and of the adapter for `of`, which it is made of."""
    prepared = prepare(adapter, image if of is None else of, "the image")
    raw = predict(adapter, adapter.model, prepared).outputs
    theirs = run_package(path, image, kind)
    assert list(theirs) == list(raw)
    for name, head in adapter.outputs.items():
        ours = head.values(raw[name]).numpy()
        assert ours.std() > 1e-3 * abs(ours).max()  # else nothing is compared
        np.testing.assert_allclose(theirs[name], ours, rtol=0, atol=1e-4 * abs(ours).max())


def read(path, name):
    with zipfile.ZipFile(path) as opened, opened.open(name) as file:
        return file.read()


def image_tested_in(path):
    return np.load(io.BytesIO(read(path, "image.npy")))[0]


def told_by(path):
    return yaml.safe_load(read(path, "bioimageio.yaml"))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The bundled network, with a piece of a real image."""
    path = tmp_path_factory.mktemp("package") / "nuclei.zip"
    assert export_bioimageio(demo(), [PIECE], path) == ()
    return path


def test_bioimageio_core_passes_a_package_wherever_it_lies(package, tmp_path):
    from bioimageio.core import test_model as test_package

    moved = tmp_path / "a folder (ü)" / "my nücléi #1.zip"
    moved.parent.mkdir()
    shutil.copy(package, moved)
    summary = test_package(moved)
    assert summary.status == "passed"
    for kind in ("pytorch_state_dict", "torchscript"):
        assert any(f"{kind} inference" in each.name for each in summary.details), kind


@pytest.mark.parametrize("kind", ["pytorch_state_dict", "torchscript"])
@pytest.mark.parametrize("type", [np.uint8, np.uint16, np.float32])
def test_its_outputs_are_those_of_the_adapter_at_other_sizes(package, kind, type):
    image = NUCLEI[None, 200:424, 30:190]
    image = (image / image.max() * 250).astype(type)
    assert_equal_outputs(package, demo(), image, kind=kind)


def test_it_says_what_it_is(package):
    told = told_by(package)
    assert told["name"] == "nuclei"
    [given] = told["inputs"]
    assert given["axes"][2]["size"] == {"min": 32, "step": 32}
    between = {"axes": ["y", "x"], "min_percentile": 1.0, "max_percentile": 99.0}
    assert given["preprocessing"] == [{"id": "scale_range", "kwargs": between}]
    assert [each["postprocessing"] for each in told["outputs"]] == [[{"id": "sigmoid"}], []]
    assert "SelfAdapt" in told["cite"][0]["text"]
    assert "license" not in told
    assert "`foreground`: Binary" in read(package, "README.md").decode()


def test_the_test_image_is_a_part_of_the_users(package, tmp_path):
    np.testing.assert_array_equal(image_tested_in(package), PIECE[None])
    crowded = np.full((700, 900), 3, np.uint8)  # where there is something to be seen
    crowded[60:188, 620:716] = PIECE.T / PIECE.max() * 200 + 10
    export_bioimageio(small("foreground"), [crowded], tmp_path / "crowded.zip")
    part = image_tested_in(tmp_path / "crowded.zip")
    assert part.shape == (1, 512, 512)
    assert (part > 9).sum() == PIECE.size


def test_a_break_of_steps_or_weights_is_noticed(package, tmp_path):
    from bioimageio.core import test_model as test_package

    broken = tmp_path / "broken.zip"
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(broken, "w") as new:
        for entry in old.namelist():
            data = old.read(entry)
            new.writestr(entry, data.replace(b"99.0", b"97.0") if "yaml" in entry else data)
    assert test_package(broken).status != "passed"
    image = PIECE[None].astype(np.float32)
    _check(package, demo(), image)
    with pytest.raises(ModelError, match=r"does not pass the test of bioimageio\.core"):
        _check(broken, demo(), image)
    narrow = demo()
    narrow.input = replace(narrow.input, high=98.9)
    with pytest.raises(ModelError, match="other values for head 'foreground'"):
        _check(package, narrow, image)
    changed = demo()
    with torch.no_grad():
        next(changed.model.parameters()).mul_(1.01)
    with pytest.raises(ModelError, match="other values"):
        _check(package, changed, image)
    bright, usual = demo(), demo().normalise  # as the steps say for the test image only
    bright.normalise = lambda given, whole: usual(given, whole) + (whole.max() > image.max())
    with pytest.raises(ModelError, match="other values"):
        _check(package, bright, image)


def scripted(classes):
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return torch.jit.trace(unet(classes=classes), torch.rand(1, 1, 64, 64))


def test_a_torchscript_file_becomes_a_package(tmp_path):
    from bioimageio.core import test_model as test_package

    file = tmp_path / "theirs.pt"
    SmpAdapter(scripted(2), "foreground,boundary").save(file)
    adapter = SmpAdapter.from_pretrained(
        str(file), heads="foreground,boundary", normalize="standard", trust_torchscript=True
    )
    path = tmp_path / "package.zip"
    export_bioimageio(adapter, [PIECE], path)
    assert list(told_by(path)["weights"]) == ["torchscript"]
    assert test_package(path).status == "passed"
    assert_equal_outputs(path, adapter, NUCLEI[None, 200:424, 30:190])


HALVES = np.stack([PIECE, 9 * NUCLEI[200:296, 160:288] + 40])
WAYS = {
    "standard": lambda: small("foreground", normalize="standard"),
    "as it is": lambda: small("foreground", normalize="none"),
    "inverted": lambda: small("foreground", invert=True),
    "inverted, standard": lambda: small("foreground", normalize="standard", invert=True),
    "other percentiles, inverted": lambda: StardistAdapter(stars(), pmin=3, invert=True),
    "two channels": lambda: small("foreground,distance", channels=2),
    "softmax": lambda: small("classes:3"),
    "probabilities": lambda: SmpAdapter(unet(activation="sigmoid"), "foreground"),
    "labels beside masks": lambda: SmpAdapter(unet(aux_params={"classes": 4}), "foreground"),
    "of a third party": SmallAdapter,
    "compiled": lambda: compiled(),
}


def compiled():
    adapter = SmallAdapter()
    return adapter.with_model(torch.compile(adapter.model, backend="eager"))


def stars():
    torch.manual_seed(0)
    small = {"unet_n_filter_base": 4, "net_conv_after_unet": 8, "unet_n_depth": 2}
    network = StarDist2D(Architecture(grid=(2, 2), n_rays=8, **small)).eval()
    with torch.no_grad():  # so that there is something to be seen in its outputs
        for parameter in network.parameters():
            parameter.mul_(2.5)
    return network


@pytest.mark.parametrize("way", WAYS)
def test_images_go_in_and_values_come_out_as_with_the_adapter(way, tmp_path):
    adapter = WAYS[way]()
    image = HALVES[: adapter.channels]
    path = tmp_path / "package.zip"
    assert export_bioimageio(adapter, [image], path, channel_axis=0) == ()
    assert_equal_outputs(path, adapter, image[:, ::-1, :96] + 3)


class OneSize(nn.Module):
    """A position embedding, as transformers have them."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(1, 1, 3, padding=1)
        self.place = nn.Parameter(torch.linspace(0, 1, 64).expand(1, 1, 64, 64).clone())

    def forward(self, images):
        return self.encoder(images) + self.place


def test_a_network_of_one_size_says_so(tmp_path):
    torch.manual_seed(0)
    adapter = SmpAdapter(OneSize(), "foreground", fixed_size=64)
    path = tmp_path / "package.zip"
    export_bioimageio(adapter, [PIECE], path)
    assert [axis["size"] for axis in told_by(path)["inputs"][0]["axes"][2:]] == [64, 64]
    assert_equal_outputs(path, adapter, NUCLEI[None, 90:154, 90:154])


def test_the_least_size_is_one_that_the_network_takes(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.ReflectionPad2d(8), nn.Conv2d(1, 1, 17))  # no side of 8 or less
    adapter = SmpAdapter(network, "foreground", embedding="1", size_multiple=4)
    path = tmp_path / "package.zip"
    export_bioimageio(adapter, [PIECE[:50, :70]], path)
    sizes = [axis["size"] for axis in told_by(path)["inputs"][0]["axes"][2:]]
    assert sizes == [{"min": 16, "step": 4}] * 2


class OwnUnet(smp.Unet):
    """Of which SMP knows nothing."""


def test_a_network_that_smp_cannot_build_again_has_no_source(tmp_path):
    adapter = SmpAdapter(unet(), "foreground")
    adapter.model.save_pretrained(tmp_path)
    again = SmpAdapter(smp.from_pretrained(tmp_path), "foreground").source()
    assert again.kwargs == adapter.source().kwargs
    source = adapter.source()
    assert source.kwargs["architecture"] == "Unet"
    assert {f"network.{name}" for name in adapter.model.state_dict()} == source.state.keys()
    assert "selfadapt" not in source.file.read_text()
    own = OwnUnet("tu-test_efficientnet", encoder_weights=None, in_channels=1)
    assert SmpAdapter(own, "foreground").source() is None
    assert small("foreground").source() is None


def test_what_the_format_cannot_say_is_said_in_notes_and_documentation(tmp_path):
    adapter = small("foreground", scale=0.5, gray=True, invert=True)
    adapter.input = replace(adapter.input, channels=(2, 0, 1), tta=True)
    path = tmp_path / "he.zip"
    notes = export_bioimageio(adapter, [COLOURS], path, channel_axis=-1)
    for told, note in zip(("channel 2, 0, 1", "luminance", "0.5", "flips"), notes, strict=True):
        assert told in note
        assert note in read(path, "README.md").decode()
    chosen = COLOURS.transpose(2, 0, 1)
    gray = resize(to_gray(chosen[[2, 0, 1]]), (1, 100, 132), order=1, anti_aliasing=True)
    np.testing.assert_allclose(image_tested_in(path), gray, atol=1e-3)
    once = replace(adapter.input, tta=False)
    plain = small("foreground", invert=True)
    assert_equal_outputs(path, plain, gray.astype(np.float32))
    # normalised before it is rescaled, an image differs a little
    ours = predict(adapter, adapter.model, prepare(adapter.with_input(once), chosen, "it")).outputs
    theirs = run_package(path, gray)["foreground"]
    assert abs(theirs - ours["foreground"].sigmoid().numpy()).mean() < 0.02


class Logarithm(SmallAdapter):
    def normalise(self, image, whole):
        return np.log1p(image)


class Compiling(SmallAdapter):
    def forward(self, model, images):
        return self.outputs.split(torch.compile(model, backend="eager")(images))


class Constant(SmallAdapter):
    def forward(self, model, images):
        return self.outputs.split(model(images) + float(images.mean()))


class Tiler(SmallAdapter):
    def forward_tiled(self, model, image):
        outputs = self.forward(model, image[None])
        return {name: (output[0] * 1.1).float() for name, output in outputs.items()}


class Cubes(Binary):
    def values(self, raw):
        return raw**3


def with_cubes():
    spec = OutputSpec(cubes=Cubes())
    return SmpAdapter(SmallNet(1), spec, embedding="bottleneck", size_multiple=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Logarithm, "images go into Logarithm in a way that bioimage.io has no steps for"),
        (lambda: small("foreground", normalize="none", invert=True), "no steps for"),
        (with_cubes, r"head 'cubes' \(Cubes\) means something"),
        (Compiling, "cannot be written as TorchScript"),
        (Tiler, "Tiler.forward_tiled gives other outputs than one pass"),
        (Constant, "gives other outputs for images of"),
        (
            lambda: SmpAdapter(OneSize(), "foreground"),
            "cannot be run on an image of .*fixed_size say",
        ),
    ],
)
def test_what_a_package_could_not_say_is_refused(make, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        export_bioimageio(make(), [PIECE], tmp_path / "package.zip")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("normalize", "step"), [("percentile", "scale_range"), ("standard", "zero_mean_unit_variance")]
)
def test_the_steps_of_each_normalisation_are_found_for_each_channel(
    normalize, step, channels, invert
):
    adapter = small("foreground", channels, normalize=normalize, invert=invert)
    image = NUCLEI[None, :90, :80] * np.arange(1, channels + 1, dtype=np.float32)[:, None, None]
    found = preprocessing(adapter, image)
    assert [each["id"] for each in found] == [step, *["scale_linear"] * invert]
    assert found[0]["kwargs"]["axes"] == ["y", "x"]


class Sides(nn.Conv2d):
    """Says how large an image is, which a trace takes for a constant."""

    def forward(self, images):
        return super().forward(images) + int(images.shape[-1])


class Spread(nn.Conv2d):
    """Two heads, of which the second needs more than one pixel."""

    def forward(self, images):
        return torch.cat(
            [super().forward(images), images / images.std((2, 3), correction=0, keepdim=True)], 1
        )


class Around(SmallAdapter):
    def __init__(self, network, size_multiple, tile=256, **heads):
        self.model, self.outputs = network.eval(), OutputSpec(**heads)
        self.size_multiple, self.tile = size_multiple, tile


class Backwards(SmallAdapter):
    def forward(self, model, images):
        return dict(reversed(super().forward(model, images).items()))


def test_a_size_that_became_a_constant_is_noticed_in_the_smallest_image_too():
    with pytest.raises(ModelError, match="which tracing makes constants"):
        trace(Around(Sides(1, 1, 1), 8, p=Binary()), torch.rand(1, 8, 8))


def test_the_least_size_is_at_most_a_tile_and_gives_all_heads_a_value():
    image = torch.rand(1, 8, 8)
    assert trace(Around(SmallNet(1), 8, tile=8, p=Binary()), image)[1] == (8, 8)
    spread = Around(Spread(1, 1, 1), 1, p=Binary(), distance=Scalar())
    assert trace(spread, image)[1] == (2, 2)


def test_heads_come_in_the_order_of_the_adapters_outputs():
    torch.manual_seed(0)
    adapter = Backwards()
    adapter.model.eval()
    image = torch.rand(1, 16, 16)
    traced, _ = trace(adapter, image)
    flow, cellprob = traced(image[None])
    assert (flow.shape[1], cellprob.shape[1]) == (2, 1)


def test_rows_and_columns_are_not_exchanged():
    adapter = Around(SmallNet(1), (2, 4), p=Binary(grid=(1, 2)))
    given = _input(adapter, np.random.default_rng(0).random((1, 8, 8), np.float32), (6, 12))
    assert {axis["id"]: axis["size"] for axis in given["axes"][2:]} == {
        "y": {"min": 6, "step": 2},
        "x": {"min": 12, "step": 4},
    }
    out = _output(adapter, "p", torch.rand(1, 8, 4))
    assert {axis["id"]: axis["scale"] for axis in out["axes"][2:]} == {"y": 1, "x": 2}


def test_the_test_image_is_where_something_is_to_be_seen_at_the_networks_scale():
    image = np.full((300, 3000), 3, np.uint8)
    image[100:196, 1000:1128] = PIECE
    part = _test_image(small("foreground", scale=0.5), open_images([image]))
    assert part.shape == (1, 150, 512)
    assert (part > 9).sum() > 0.2 * (PIECE > 9).sum()


@pytest.mark.parametrize("stem", ["a", "ünder", "x.y:z*?", "long " * 40, "abcd"])
def test_a_package_may_be_called_as_its_file_is(stem):
    name = name_of(Path(f"{stem}.zip"))
    assert Words(name=name).name == name


@pytest.mark.parametrize("stem", ["cells", "HeLa cells (2nd)", "a" * 100])
def test_a_name_that_is_allowed_stays(stem):
    assert name_of(Path(f"{stem}.zip")) == stem


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "package.tar"}, "no name of a ZIP file"),
        ({"path": "there.zip"}, "exists already"),
        ({"path": "no/folder/package.zip"}, "there is no folder"),
        ({"name": "nücléi of mice"}, "name 'nücléi of mice' is not allowed"),
        ({"name": "abc"}, "5 to 128 letters"),
        ({"authors": "Jane Doe"}, "give a list of names"),
        ({"authors": ["Jane/Doe"]}, "without slashes"),
        ({"license": "mine"}, "license='mine' is not known"),
    ],
)
def test_what_the_user_says_is_checked_before_any_work(options, message, tmp_path):
    (tmp_path / "there.zip").write_text("")
    path = tmp_path / options.pop("path", "package.zip")
    with pytest.raises(ConfigError, match=message):
        export_bioimageio(demo(), [], path, **options)
    assert [file.name for file in tmp_path.iterdir()] == ["there.zip"]
    assert not (tmp_path / "there.zip").read_text()


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bioimageio.core", None)
    with pytest.raises(ConfigError, match=r"pip install 'selfadapt\[bioimageio\]'"):
        export_bioimageio(demo(), [PIECE], tmp_path / "package.zip")


def test_the_shell_exports_a_run_with_its_story(tmp_path, capsys):
    images, run, path = tmp_path / "my images", tmp_path / "run", tmp_path / "näclei (1).zip"
    images.mkdir()
    tifffile.imwrite(images / "näclei.tif", NUCLEI[:128, :128].max() - NUCLEI[:128, :128])
    quick = {
        "iterations": 2, "batch_size": 1, "crop": 64, "views": 2, "validate_every": 2,
        "device": "cpu", "candidates": "default",
    }  # fmt: skip
    words = [word for name, value in quick.items() for word in (f"--{name}", str(value))]
    words += ["--adapter", "smp", "--model", "demo", "--images", str(images), "--out", str(run)]
    assert main(["adapt", *words]) in (0, 3)
    verdict = capsys.readouterr().out.splitlines()[-1]
    export = ["export", "--model", str(run), "--images", str(images), "--out", str(path)]
    assert main([*export, "--authors", "Jane Doe, Max Muster", "--license", "CC-BY-4.0"]) == 0
    shown = capsys.readouterr().out
    assert f"Package: {path}, tested by bioimageio.core" in shown
    told, text = told_by(path), read(path, "README.md").decode()
    assert told["authors"] == [{"name": "Jane Doe"}, {"name": "Max Muster"}]
    assert (told["name"], told["license"]) == ("n_clei (1)", "CC-BY-4.0")
    result = json.loads((run / "result.json").read_text())
    assert verdict.startswith(f"Verdict: {result['outcome']}.")
    for each in (f"Verdict: {result['outcome']}.", result["reason"], "inverted", "Expected AP"):
        assert each in text
    assert [step["id"] for step in told["inputs"][0]["preprocessing"]] == [
        "scale_range", "scale_linear",
    ]  # fmt: skip
    assert main(export) == 2
    assert "exists already: give a new name" in capsys.readouterr().err
    other = tmp_path / "of another.zip"
    assert main([*export[:-1], str(other), "--snapshot", "0"]) == 0
    assert "How it was adapted" in text
    assert "How it was adapted" not in read(other, "README.md").decode()  # that is of the kept one
