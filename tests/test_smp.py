"""The SMP adapter: real SMP networks, TorchScript, plain modules, a third party's network."""

import json
import warnings
import zipfile

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from helpers import IMAGES, SHARED, SmallNet, config, discs, needs_shared
from stardist.data import test_image_nuclei_2d as nuclei
from torch import nn
from torch.nn import functional

from selfadapt import (
    Binary,
    Categorical,
    ConfigError,
    EmbeddingDrift,
    FalseNegativeRate,
    Input,
    ModelError,
    OutputError,
    OutputSpec,
    Rays,
    Scalar,
    adapt,
    match,
    open_images,
)
from selfadapt.testing import AdapterTests
from selfadapt_smp import Decode, SmpAdapter


def unet(classes: int, **options) -> nn.Module:
    torch.manual_seed(0)
    return smp.Unet(
        "tu-test_efficientnet", encoder_weights=None, in_channels=1, classes=classes,
        decoder_channels=(16, 16, 16, 8, 8), **options,
    ).eval()  # fmt: skip


class TestForeground(AdapterTests):
    heads = "foreground"

    def make_adapter(self):
        classes = sum(head.channels for head in SmpAdapter(unet(1), self.heads).outputs.values())
        return SmpAdapter(unet(classes), self.heads)

    def load(self, path):
        return SmpAdapter.from_pretrained(str(path))


class TestForegroundBoundary(TestForeground):
    heads = "foreground,boundary"


class TestForegroundDistance(TestForeground):
    heads = "foreground,distance"


class TestClasses(TestForeground):
    heads = "classes:3"


class TestDemo(AdapterTests):
    """A trained network, on images that it works on, given with their channels first."""

    channel_axis = 0

    @property
    def images(self):
        return [nuclei(return_mask=False)[None]]

    def make_adapter(self):
        return SmpAdapter.from_pretrained("demo")

    def load(self, path):
        return SmpAdapter.from_pretrained(str(path))


class TestTorchScript(AdapterTests):
    def make_adapter(self):
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            scripted = torch.jit.trace(unet(2), torch.rand(1, 1, 64, 64))
        return SmpAdapter(scripted, "foreground,distance")

    def load(self, path):
        return SmpAdapter.from_pretrained(
            str(path), heads="foreground,distance", trust_torchscript=True
        )


class TestPlainModule(AdapterTests):
    def make_adapter(self):
        torch.manual_seed(0)
        spec = OutputSpec(p=Binary(), d=Scalar(2))
        return SmpAdapter(SmallNet(), spec, embedding="bottleneck", size_multiple=2)

    def load(self, path):
        adapter = self.make_adapter()
        adapter.model.load_state_dict(torch.load(path))
        return adapter


@pytest.mark.parametrize("architecture", ["Unet", "UnetPlusPlus", "FPN", "MAnet", "DeepLabV3Plus"])
def test_other_architectures_adapt(architecture):
    torch.manual_seed(0)
    model = getattr(smp, architecture)("resnet18", encoder_weights=None, in_channels=1, classes=2)
    adapter = SmpAdapter(model, "foreground,distance")
    # so small that an untrained network does not lose its instances
    settings = config(iterations=2, batch_size=1, views=2, learning_rate=1e-6)
    result = adapt(adapter, [discs(0)[0]], config=settings, stop=None, progress=False)
    assert result.iteration == 2
    assert 0 < result.history[-1]["d_emb"] <= 2


def test_a_classification_output_beside_the_masks_is_left_aside():
    model = unet(1, aux_params={"classes": 4})
    adapter = SmpAdapter(model, "foreground")
    assert adapter.forward(model, torch.rand(1, 1, 64, 64))["foreground"].shape == (1, 1, 64, 64)


@pytest.mark.parametrize(
    "heads", ["foreground", "foreground,boundary", "foreground,distance", "classes:3"]
)
def test_each_recipe_finds_the_objects_that_perfect_outputs_show(heads):
    from scipy import ndimage
    from skimage.segmentation import find_boundaries

    labels = np.zeros((60, 80), np.int32)
    for number, (y, x) in enumerate([(15, 15), (15, 33), (40, 30), (42, 60)], 1):
        rows, columns = np.mgrid[:60, :80]
        labels[(rows - y) ** 2 + (columns - x) ** 2 < 81] = number
    distance = np.zeros((60, 80))
    for number in range(1, 5):
        distance += ndimage.distance_transform_edt(labels == number) / 9
    inside, edge = labels > 0, find_boundaries(labels, mode="inner")
    logit = lambda mask: torch.from_numpy(np.where(mask, 5.0, -5.0).astype(np.float32))[None]  # noqa: E731
    maps = {
        "foreground": logit(inside),
        "boundary": logit(edge),
        "distance": torch.from_numpy(distance.astype(np.float32))[None],
        "classes": torch.cat([logit(~inside), logit(inside & ~edge), logit(edge)]),
    }
    adapter = SmpAdapter(unet(1), heads)
    found = adapter.decode({name: maps[name] for name in adapter.outputs}, (0, 0))
    counts = match(labels, found, (0.7,))[0]
    if heads == "foreground":  # two discs touch: components cannot part them
        labels = ndimage.label(inside)[0]
        counts = match(labels, found, (0.7,))[0]
    assert (counts.tp, counts.fp, counts.fn) == (labels.max(), 0, 0)


def test_small_objects_are_dropped_and_nan_does_not_crash():
    outputs = {"foreground": torch.full((1, 20, 20), -5.0)}
    outputs["foreground"][0, 2:4, 2:4] = 5
    outputs["foreground"][0, 10:15, 10:15] = 5
    spec = OutputSpec(foreground=Binary())
    assert Decode(min_size=5)(outputs, spec).max() == 1
    assert Decode(min_size=4)(outputs, spec).max() == 2  # one of just so many pixels stays
    outputs["foreground"][:] = torch.nan
    assert Decode()(outputs, spec).max() == 0


def test_heads_without_a_recipe_need_a_function():
    spec = OutputSpec(dist=Rays(8), prob=Binary())
    adapter = SmpAdapter(unet(9), spec)
    assert not adapter.can_decode
    with pytest.raises(ModelError, match=r"no recipe from the heads \['dist', 'prob'\]"):
        adapter.decode({}, (0, 0))
    own = SmpAdapter(unet(9), spec, decode=lambda outputs, heads: np.ones((4, 4), np.int32))
    assert own.decode({}, (0, 0)).max() == 1


def test_probabilities_are_told_apart_from_logits():
    adapter = SmpAdapter(unet(1, activation="sigmoid"), OutputSpec(foreground=Binary(logits=False)))
    p = adapter.forward(adapter.model, torch.rand(1, 1, 64, 64))["foreground"].detach()
    assert 0 <= float(p.min()) <= float(p.max()) <= 1
    result = adapt(adapter, IMAGES[:2], config=config(iterations=4), stop=None, progress=False)
    assert result.iteration == 4


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SmpAdapter(SmallNet(), "foreground"), ModelError, "no layer 'encoder'.*stem"),
        (lambda: SmpAdapter(unet(1), "nuclei"), OutputError, "head 'nuclei' is not known"),
        (lambda: SmpAdapter(unet(1), "foreground,foreground"), OutputError, "named twice"),
        (lambda: SmpAdapter.from_pretrained("absent"), ModelError, "there is no model 'absent'"),
        (
            lambda: SmpAdapter(unet(1), "foreground", normalize="percntile"),
            ConfigError,
            "normalize='percntile' is not allowed: it must be 'percentile' or",
        ),
        (
            lambda: SmpAdapter(unet(1), "foreground", gray="invert"),
            ConfigError,
            "gray='invert' is not allowed: it must be True or False",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_files_of_other_kinds_are_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "state.pt")
    with pytest.raises(ModelError, match="no folder of SMP's save_pretrained"):
        SmpAdapter.from_pretrained(str(tmp_path / "state.pt"), heads="foreground")
    with pytest.raises(ModelError, match="neither a folder"):
        SmpAdapter.from_pretrained(str(tmp_path), heads="foreground")


def test_a_folder_of_smp_alone_asks_for_the_heads(tmp_path):
    unet(1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="--heads foreground,distance"):
        SmpAdapter.from_pretrained(str(tmp_path))
    assert list(SmpAdapter.from_pretrained(str(tmp_path), heads="foreground").outputs) == [
        "foreground"
    ]


def test_a_folder_that_says_how_images_went_in_is_not_overruled_without_a_word(tmp_path, caplog):
    smp.Unet("resnet18", encoder_weights=None, in_channels=1).save_pretrained(tmp_path)
    (tmp_path / "albumentations_config_eval.json").write_text("{}")
    for options, said in (({}, True), ({"normalize": "standard"}, False)):
        caplog.clear()
        SmpAdapter.from_pretrained(str(tmp_path), heads="foreground", **options)
        assert ("is not read: percentiles 1 and 99" in caplog.text) == said


def test_what_is_saved_opens_in_unmodified_smp(tmp_path):
    adapter = SmpAdapter(unet(2), "foreground,distance")
    adapter.save(tmp_path)
    reopened = smp.from_pretrained(tmp_path)
    for name, tensor in adapter.model.state_dict().items():
        assert torch.equal(tensor, reopened.state_dict()[name]), name


def test_the_options_of_a_saved_folder_come_back(tmp_path):
    adapter = SmpAdapter(
        unet(3), OutputSpec(classes=Categorical(3, logits=False)), normalize="standard",
        gray=True, invert=True, decode=Decode(threshold=0.3, min_size=4),
    )  # fmt: skip
    adapter.save(tmp_path)
    again = SmpAdapter.from_pretrained(str(tmp_path), min_size=9)
    assert repr(again.outputs) == repr(adapter.outputs)
    assert again.normalize == "standard"
    assert again.input == adapter.input == Input(gray=True, invert=True)
    assert again._decode == Decode(threshold=0.3, min_size=9)


def test_the_bundled_network_segments_the_image_of_the_stardist_package():
    from stardist.data import test_image_nuclei_2d

    image, labels = test_image_nuclei_2d(return_mask=True)
    adapter = SmpAdapter.from_pretrained("demo")
    assert match(labels, adapter.segment(image))[0].ap > 0.7


class BroadUNet(nn.Module):
    """UNet2DNucleiBroad as its licence file describes it, under its own tensor names."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1),
                nn.Conv2d(outputs, outputs, 3, padding=1),
                nn.ReLU(),
            )

        def up(inputs: int, outputs: int) -> nn.Sequential:
            doubled = nn.Upsample(scale_factor=2, mode="bilinear")
            return nn.Sequential(doubled, nn.Conv2d(inputs, outputs, 1))

        widths = [16, 32, 64]
        self.encoders = nn.ModuleList(block(a, b) for a, b in zip([1, 16, 32], widths, strict=True))
        self.base = block(64, 128)
        self.decoders = nn.ModuleList(block(2 * w, w) for w in reversed(widths))
        self.upsamplers = nn.ModuleList(up(2 * w, w) for w in reversed(widths))
        self.output = nn.Conv2d(16, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for level in self.encoders:
            x = level(x)
            skips.append(x)
            x = functional.max_pool2d(x, 2)
        x = self.base(x)
        for up, level in zip(self.upsamplers, self.decoders, strict=True):
            x = level(torch.cat([skips.pop(), up(x)], 1))
        return self.output(x).sigmoid()


@needs_shared
def test_a_third_partys_torchscript_network_predicts_as_its_authors_say_and_adapts():
    folder = SHARED / "models" / "unet2d_nuclei_broad"
    adapter = SmpAdapter.from_pretrained(
        str(folder / "weights_abe6.pt"), heads="foreground", activated=True, normalize="standard",
        trust_torchscript=True,
        size_multiple=8,
    )  # fmt: skip
    assert adapter.channels == 1
    given = np.load(folder / "test_input.npy").reshape(1, 512, 512)
    expected = np.load(folder / "test_output.npy").reshape(512, 512)
    with torch.no_grad():
        prepared = torch.from_numpy(adapter.prepare(given))[None]
        got = adapter.forward(adapter.model, prepared)["foreground"][0, 0]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    settings = config(iterations=4, crop=64)
    result = adapt(adapter, given, config=settings, stop=FalseNegativeRate(0.9), progress=False)
    assert result.iteration == 4


@needs_shared
def test_the_same_network_as_a_plain_module_has_a_bottleneck():
    folder = SHARED / "models" / "unet2d_nuclei_broad"
    weights = np.load(folder / "unet2d_nuclei_broad.npz")
    model = BroadUNet()
    model.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights.files})
    adapter = SmpAdapter(
        model, OutputSpec(foreground=Binary(logits=False)), embedding="base", size_multiple=8,
        normalize="standard",
    )  # fmt: skip
    given = np.load(folder / "test_input.npy").reshape(1, 512, 512)
    settings = config(iterations=4, crop=64)
    result = adapt(adapter, given, config=settings, stop=EmbeddingDrift(1.9), progress=False)
    assert result.history[-1]["d_emb"] > 0


@pytest.mark.parametrize(
    ("activation", "logits"), [(None, True), ("sigmoid", False), ("softmax2d", False)]
)
def test_the_networks_own_activation_wins_over_the_default(tmp_path, activation, logits):
    network = smp.Unet("resnet18", encoder_weights=None, activation=activation)
    assert SmpAdapter(network, "foreground").outputs["foreground"].logits == logits
    network.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | {"encoder_weights": "imagenet"}))
    opened = SmpAdapter.from_pretrained(str(tmp_path), heads="foreground")
    assert opened.outputs["foreground"].logits == logits
    opened.save(tmp_path / "again")
    again = SmpAdapter.from_pretrained(str(tmp_path / "again"))
    assert again.outputs["foreground"].logits == logits
    said = SmpAdapter.from_pretrained(str(tmp_path), heads="foreground", activated=logits)
    assert said.outputs["foreground"].logits != logits


def test_an_activation_that_is_neither_is_refused():
    network = smp.Unet("resnet18", encoder_weights=None, activation="tanh")
    with pytest.raises(ModelError, match="ends in Tanh"):
        SmpAdapter(network, "foreground")


def test_outputs_that_are_not_what_they_are_declared_to_be_are_named(caplog):
    images = open_images([discs(k, (96, 96))[0] for k in range(2)])
    SmpAdapter(unet(1), "foreground").check(images)
    assert not caplog.text
    network = smp.Unet("resnet18", encoder_weights=None, in_channels=1, activation="sigmoid")
    SmpAdapter(network, OutputSpec(foreground=Binary())).check(images)
    assert "declared to give logits, and gives values from 0." in caplog.text
    SmpAdapter(unet(1), OutputSpec(foreground=Binary(logits=False))).check(images)
    assert "declared to give probabilities, and gives values from -" in caplog.text
    caplog.clear()
    slide = np.zeros((64, 2100), np.float32)
    slide[:, 800:864] = discs(0, (64, 64))[0]  # the first of its windows has nothing in it
    SmpAdapter(network, OutputSpec(foreground=Binary())).check(open_images([slide]))
    assert "declared to give logits" in caplog.text


def test_a_folder_without_its_files_is_not_looked_up_in_the_internet(tmp_path, monkeypatch):
    monkeypatch.setattr("segmentation_models_pytorch.base.hub_mixin.hf_hub_download", None)
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        SmpAdapter.from_pretrained(str(tmp_path), heads="foreground")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"it has no model\.safetensors"):
        SmpAdapter.from_pretrained(str(tmp_path), heads="foreground")


class OneSize(nn.Module):
    """A position embedding of 64 x 64, as transformers have them."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(1, 4, 3, padding=1)
        self.place = nn.Parameter(torch.zeros(1, 4, 64, 64))
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, images):
        return self.head(self.encoder(images) + self.place)


def save_scripted(path):
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        torch.jit.save(torch.jit.script(OneSize()), path)


def test_a_network_that_takes_one_size_only_can_be_said_so(tmp_path):
    save_scripted(tmp_path / "net.pt")
    options = {"heads": "foreground", "fixed_size": 64, "trust_torchscript": True}
    adapter = SmpAdapter.from_pretrained(str(tmp_path / "net.pt"), **options)
    assert adapter.segment(discs(0, (70, 150))[0]).shape == (70, 150)
    settings = config(iterations=2, validate_every=2)
    images = [discs(k, (96, 96))[0] for k in range(2)]
    adapt(adapter, images, config=settings, calibrate=False, progress=False)
    with pytest.raises(ConfigError, match="fixed_size=0"):
        SmpAdapter(OneSize(), "foreground", fixed_size=0)


def test_a_torchscript_file_is_a_program_that_must_be_trusted(tmp_path):
    save_scripted(tmp_path / "net.pt")
    with pytest.raises(ModelError, match="if you trust its maker, give trust_torchscript=True"):
        SmpAdapter.from_pretrained(str(tmp_path / "net.pt"), heads="foreground")
    torch.save(OneSize().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ModelError, match="no folder of SMP's save_pretrained"):
        SmpAdapter.from_pretrained(str(tmp_path / "weights.pt"), heads="foreground")
    with (
        zipfile.ZipFile(tmp_path / "net.pt") as given,
        zipfile.ZipFile(tmp_path / "hidden.pt", "w") as hidden,
    ):  # torch looks names up whatever their case
        for name in given.namelist():
            hidden.writestr(name.replace("/code/", "/CODE/"), given.read(name))
    with pytest.raises(ModelError, match="trust_torchscript"):
        SmpAdapter.from_pretrained(str(tmp_path / "hidden.pt"), heads="foreground")


@pytest.mark.parametrize(
    "change", [{"encoder_name": "tu-hf-hub:evil/repo"}, {"decoder_channels": [60_000] * 5}]
)
def test_a_folder_leads_nowhere_and_fills_no_memory(tmp_path, change):
    smp.Unet("resnet18", encoder_weights=None).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | change))
    with pytest.raises(ModelError, match=r"it (leads to|holds)"):
        SmpAdapter.from_pretrained(str(tmp_path), heads="foreground")
