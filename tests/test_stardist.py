"""StarDist in PyTorch: against stored outputs of StarDist itself, its encoder, and its errors."""

import hashlib
import json
import logging
import os
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import torch
from helpers import discs
from stardist.data import test_image_nuclei_2d as nuclei
from stardist.geometry import star_dist
from stardist.utils import edt_prob
from torch import nn

from selfadapt import (
    D4,
    ConfigError,
    ImageError,
    ModelError,
    OutputError,
    Rays,
    load_adapter,
    open_images,
    predict,
)
from selfadapt._cli import main
from selfadapt.testing import AdapterTests, HeadTests
from selfadapt_stardist import Architecture, Port, StarDist2D, StardistAdapter, _files

REFERENCES = Path(__file__).parent / "stardist_references"
NAMES = ("plain", "unequal", "normalised")
IMAGE, MASK = nuclei(return_mask=True)


def network(**options):
    torch.manual_seed(0)
    small = {"n_rays": 8, "unet_n_filter_base": 4, "unet_n_depth": 2, "net_conv_after_unet": 8}
    made = StarDist2D(Architecture(**(small | options)))
    made.dist.bias.data += 5  # distances that make polygons
    return made.eval()


class TestGrid2(AdapterTests):
    def make_adapter(self):
        return StardistAdapter(network(grid=(2, 2)), prob_thresh=0.4)

    def load(self, path):
        return StardistAdapter.from_pretrained(str(path))


def test_an_image_of_which_nothing_is_left_is_named():
    with pytest.raises(ImageError, match=r"1 x 200 pixels is too small for scale 0\.5"):
        StardistAdapter(network(), prob_thresh=0.4, scale=0.5).segment(
            np.random.default_rng(0).random((1, 200))
        )


class TestClassesUnequalGridBatchNorm(TestGrid2):
    def make_adapter(self):
        made = network(grid=(2, 1), n_classes=2, n_channel_in=3, unet_batch_norm=True)
        return StardistAdapter(made, prob_thresh=0.4)


class DistanceFirst(nn.Module):
    """A port: distances first, rectified, then a probability."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, images):
        prob, dist = self.net(images)
        return [dist.relu(), prob.sigmoid()]


PORT = Port(
    n_rays=8, outputs=("dist", "prob"), logits=False, embedding="net.middle.0", size_multiple=4
)


class TestPort(AdapterTests):
    def make_adapter(self):
        return StardistAdapter(DistanceFirst(), PORT, prob_thresh=0.4)

    def load(self, path):
        adapter = self.make_adapter()
        adapter.model.load_state_dict(torch.load(path))
        return adapter


# --- equal to StarDist


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_instances_are_those_of_keras(name):
    adapter, stored = StardistAdapter(REFERENCES / name), np.load(REFERENCES / name / "outputs.npz")
    image = torch.from_numpy(stored["image"].transpose(2, 0, 1).copy())
    outputs = predict(adapter, adapter.model, image).outputs
    prob, dist = outputs["prob"].sigmoid()[0], outputs["dist"].clamp(min=1e-3).permute(1, 2, 0)
    np.testing.assert_allclose(prob, stored["prob"], atol=1e-5)
    np.testing.assert_allclose(dist, stored["dist"], atol=1e-5)
    if "prob_class" in stored:
        classes = outputs["prob_class"].softmax(0).permute(1, 2, 0)
        np.testing.assert_allclose(classes, stored["prob_class"], atol=1e-5)
    assert stored["labels"].max() > 0
    rows, columns = stored["labels"].shape
    np.testing.assert_array_equal(adapter.decode(outputs, (rows, columns)), stored["labels"])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_and_saved_is_the_same_bit_for_bit(name, tmp_path):
    StardistAdapter(REFERENCES / name).save(tmp_path / "again")
    for file in ("config.json", "thresholds.json"):
        before, after = (
            json.loads((f / file).read_text()) for f in (REFERENCES / name, tmp_path / "again")
        )
        assert before == after
    before, after = (stored_arrays(f) for f in (REFERENCES / name, tmp_path / "again"))
    assert len(before) == len(after) > 20
    for one, other in zip(before, after, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def stored_arrays(folder):
    """All weights of a Keras file, in the order in which Keras loads them."""
    with h5py.File(folder / "weights_best.h5") as file:
        groups = [file[layer] for layer in file.attrs["layer_names"]]
        return [group[name][()] for group in groups for name in group.attrs["weight_names"]]


def test_layers_that_keras_has_numbered_go_by_their_order(tmp_path):
    """Whoever builds several models in one session gets conv2d_7 and not conv2d."""
    folder = copy_of("normalised", tmp_path)
    with h5py.File(folder / "weights_best.h5", "a") as file:
        names = list(file.attrs["layer_names"])
        renamed = [f"conv2d_{k + 9}" if n.startswith("conv2d") else n for k, n in enumerate(names)]
        for old, new in zip(names, renamed, strict=True):
            if old != new:
                file.move(old, new)
        file.attrs["layer_names"] = renamed
    one, other = (
        StardistAdapter(f).model.state_dict() for f in (folder, REFERENCES / "normalised")
    )
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("inner", ["", "2D_demo/"])
def test_a_zip_of_the_folder_opens_too(inner, tmp_path):
    archive = zip_of("plain", tmp_path / "model.zip", inner)
    adapter = StardistAdapter(archive)
    assert adapter.outputs["dist"].channels == 8
    assert (
        adapter.prob_thresh
        == json.loads((REFERENCES / "plain/thresholds.json").read_text())["prob"]
    )


def zip_of(name, archive, inner=""):
    with zipfile.ZipFile(archive, "w") as file:
        for part in (REFERENCES / name).iterdir():
            file.write(part, inner + part.name)
    return archive


def test_a_name_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    archive = zip_of("plain", tmp_path / "python_2D_demo.zip")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(_files, "RELEASES", tmp_path.as_uri())
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    with pytest.raises(ModelError, match=r"'2D_demo' cannot be downloaded .*invalid hash value"):
        StardistAdapter("2D_demo")
    monkeypatch.setitem(_files.PRETRAINED, "2D_demo", digest)
    assert StardistAdapter("2D_demo").channels == 1
    archive.unlink()
    assert StardistAdapter("2D_demo").channels == 1  # from where Keras keeps it
    with pytest.raises(ModelError, match="'2D_versatile_he' cannot be downloaded"):
        StardistAdapter("2D_versatile_he")


def test_images_are_normalised_as_csbdeep_does():
    from csbdeep.utils import normalize

    adapter = StardistAdapter(network(n_channel_in=2))
    pair = np.stack([IMAGE, IMAGE.T])
    np.testing.assert_allclose(adapter.prepare(pair), normalize(pair, 1, 99.8, (1, 2)), atol=1e-6)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (4, 2)])
def test_an_image_of_several_tiles_gives_what_the_whole_gives(grid):
    """Three tiles and more: where pooling would see other pixels together, it shows in these."""
    adapter = StardistAdapter(network(grid=grid, unet_n_depth=2))
    image = torch.from_numpy(adapter.prepare(IMAGE[None, :501, :430]))
    adapter.tile = 512
    whole = predict(adapter, adapter.model, image).outputs
    adapter.tile = 200
    tiled = predict(adapter, adapter.model, image).outputs
    for name in whole:
        assert not torch.equal(whole[name], tiled[name])
        torch.testing.assert_close(whole[name], tiled[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(5, 40), (31, 31), (1, 2)])
def test_small_images_are_padded(size):
    adapter = StardistAdapter(network(grid=(4, 4)))
    assert adapter.segment(np.random.default_rng(0).random(size)).shape == size


def test_gray_and_scale_are_applied():
    from scipy import ndimage

    adapter = StardistAdapter(network(), gray=True, invert=True, scale=0.5)
    colour = np.stack([255 - IMAGE[:100, :120]] * 3)
    plain = StardistAdapter(network()).prepare(IMAGE[None, :100, :120])
    np.testing.assert_allclose(
        adapter.prepare(colour), ndimage.zoom(plain, (1, 0.5, 0.5), order=1), atol=1e-5
    )


# --- symmetries, by StarDist's own encoder on real masks


class TestRaysOnRealMasks(HeadTests):
    head = Rays(32)
    tolerance = 1e-3

    def encode(self, labels):
        dist = star_dist(labels, self.head.channels, grid=self.head.grid)
        return np.ascontiguousarray(dist.transpose(2, 0, 1))

    @pytest.mark.parametrize("g", D4, ids=str)
    def test_encoder_law(self, g):
        assert g in self.head.symmetries
        labels = np.ascontiguousarray(MASK[:200, 40:312]).astype(np.int32)
        for axis, grid in enumerate(self.head.grid):  # what a flip carries off the lattice
            np.moveaxis(labels, axis, 0)[labels.shape[axis] - grid + 1 :] = 0
        moved = g.move(torch.from_numpy(labels), self.head.grid).numpy()
        got = torch.from_numpy(self.encode(np.ascontiguousarray(moved)))
        expected = self.head.transform(g, torch.from_numpy(self.encode(labels)))
        assert float((got - expected).abs().max()) < self.tolerance


class TestRaysOnRealMasksGrid2(TestRaysOnRealMasks):
    head = Rays(32, grid=2)


class TestRaysOnRealMasksGrid4(TestRaysOnRealMasks):
    head = Rays(32, grid=4)


def test_fewer_symmetries_are_said(caplog):
    with caplog.at_level(logging.WARNING):
        StardistAdapter(network(n_rays=30))
        StardistAdapter(network(n_rays=5))
        StardistAdapter(network(grid=(4, 2)))
    assert [record.getMessage()[:52] for record in caplog.records] == [
        "With 30 rays on a grid of (1, 1), 4 of the eight fli",
        "With 5 rays on a grid of (1, 1), 2 of the eight flip",
        "With 8 rays on a grid of (4, 2), 4 of the eight flip",
    ]


# --- ports


class Encoder(nn.Module):
    """A perfect port: it takes labels for images, and encodes them by StarDist's own functions."""

    def __init__(self, *, row_first, logits):
        super().__init__()
        self.row_first, self.logits = row_first, logits
        self.bottleneck = nn.Conv2d(1, 4, 1)

    def forward(self, images):
        self.bottleneck(images)
        labels = [image[0].round().int().numpy() for image in images]
        if self.row_first:  # rays from the rows on are those from the columns on, transposed
            dist = [star_dist(np.ascontiguousarray(each.T), 32).swapaxes(0, 1) for each in labels]
        else:
            dist = [star_dist(each, 32) for each in labels]
        prob = torch.from_numpy(np.stack([edt_prob(each) for each in labels]))[:, None]
        dist = torch.from_numpy(np.stack(dist)).permute(0, 3, 1, 2)
        return (prob.logit(1e-3) if self.logits else prob), dist


class Labels(StardistAdapter):
    """The labels are the image."""

    def prepare(self, image, whole=None):
        return image.astype(np.float32)


@pytest.mark.parametrize("row_first", [False, True])
@pytest.mark.parametrize("logits", [False, True])
def test_conventions_of_a_port_are_decoded_and_wrong_ones_refused(row_first, logits):
    def make(**changes):
        options = {"row_first": row_first, "logits": logits} | changes
        port = Port(**options, embedding="bottleneck", size_multiple=8)
        return Labels(Encoder(row_first=row_first, logits=logits), port)

    labels = MASK[:160, 30:215].astype(np.int32)
    found = make().segment(labels)
    inner = np.unique(labels[8:-8, 8:-8])[1:]  # StarDist leaves out centres at the very edge
    best = [np.bincount(found[labels == n]).max() / (labels == n).sum() for n in inner]
    assert np.median(best) > 0.9

    images = open_images([labels.astype(np.float32)])
    make().check(images)
    with pytest.raises(ModelError, match=f"are not as said.*Give row_first={row_first}"):
        make(row_first=not row_first).check(images)
    with pytest.raises(ModelError, match=f"so give logits={logits}"):
        make(logits=not logits).check(images)


class Changed(Encoder):
    """A port with another idea of rays."""

    def __init__(self, change):
        super().__init__(row_first=False, logits=True)
        self.change = change

    def forward(self, images):
        prob, dist = super().forward(images)
        return prob, self.change(dist)


@pytest.mark.parametrize(
    "change",
    {
        "clockwise": lambda d: d.flip(1).roll(1, 1),
        "from the left": lambda d: d.roll(16, 1),
        "doubled": lambda d: d * 2,
        "in cells of a grid of 4": lambda d: d / 4,
        "as a share": lambda d: d / 32,
    }.values(),
)
def test_rays_that_are_no_convention_of_ours_are_refused(change):
    port = Port(embedding="bottleneck", size_multiple=8)
    images = open_images([MASK[:160, 30:215].astype(np.float32)])
    Labels(Changed(lambda d: d), port).check(images)
    with pytest.raises(ModelError, match=r"distances fall by .* where 1 is right"):
        Labels(Changed(change), port).check(images)


@pytest.mark.parametrize(
    "change", [lambda d: d.roll(4, 1), lambda d: d / 2], ids=["from the diagonal", "halved"]
)
def test_rays_that_fit_badly_are_said(change, caplog):
    """A network may just know the images badly, so this is no error."""
    port = Port(embedding="bottleneck", size_multiple=8)
    images = open_images([MASK[:160, 30:215].astype(np.float32)])
    with caplog.at_level(logging.WARNING):
        Labels(Changed(lambda d: d), port).check(images)
        assert not caplog.records
        Labels(Changed(change), port).check(images)
    assert "The rays fit badly: distances fall by" in caplog.text


def test_blank_windows_tell_nothing_about_a_port(tmp_path):
    import zarr

    whole = zarr.create_array(
        str(tmp_path / "a.zarr"), shape=(2100, 2100), chunks=(300, 300), dtype="float32"
    )
    whole[300:460, 1300:1485] = MASK[:160, 30:215]
    windows = [w for image in open_images(tmp_path / "a.zarr") for w in image.windows()]
    port = Port(embedding="bottleneck", size_multiple=8)
    with pytest.raises(ModelError, match="where 1 is right"):
        Labels(Changed(lambda d: d * 2), port).check(windows)


def test_the_size_that_a_port_takes_need_not_be_a_multiple_of_its_grid():
    port = Port(n_rays=8, grid=(4, 4), embedding="0", size_multiple=2)
    adapter = StardistAdapter(nn.Sequential(nn.Conv2d(1, 9, 4, 4)), port)
    assert adapter.multiples == (4, 4)
    assert adapter.segment(IMAGE[:161, :185]).shape == (161, 185)


def test_the_encoder_law_finds_a_wrong_ray_convention():
    """Averaging with it would blend each star with its mirror image, in silence."""
    encoder, labels = TestRaysOnRealMasks(), MASK[:200, 40:312].astype(np.int32)
    encoded = torch.from_numpy(encoder.encode(labels))
    for g in D4:
        moved = torch.from_numpy(
            encoder.encode(np.ascontiguousarray(g.move(torch.from_numpy(labels))))
        )
        right = float((Rays(32).transform(g, encoded) - moved).abs().max())
        wrong = float((Rays(32, row_first=True).transform(g, encoded) - moved).abs().max())
        assert right < 1e-3
        same_in_both = g.flip == g.transposes  # half turns and transpositions
        assert wrong == right if same_in_both else wrong > 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": ("prob",)}, "takes each of prob, dist once"),
        ({"outputs": ("prob", "dist", "prob_class")}, "takes each of prob, dist once"),
        ({"n_classes": 2}, "takes each of prob, dist, prob_class once"),
    ],
)
def test_outputs_of_a_port_must_be_named(changes, message):
    with pytest.raises(OutputError, match=message):
        Port(embedding="bottleneck", **changes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"p": 0, "d": 0}, "gives a dictionary of p, d: say which is which"),
        ((0,), "gives 1 outputs, and outputs="),
        (None, "gives a NoneType, and outputs="),
    ],
)
def test_a_network_that_gives_something_else_is_refused(given, message):
    with pytest.raises(OutputError, match=message):
        PORT.named(given, PORT.spec())


def test_a_port_may_give_a_dictionary_one_tensor_or_more_outputs_than_are_named():
    spec, prob, dist = PORT.spec(), torch.rand(1, 1, 4, 4), torch.rand(1, 8, 4, 4)
    for raw in ({"prob": prob, "dist": dist}, torch.cat([dist, prob], 1), (dist, prob, None)):
        named = PORT.named(raw, spec)
        assert torch.equal(named["prob"], prob)
        assert torch.equal(named["dist"], dist)
    named = Port(outputs={"prob": "p", "dist": "d"}, embedding="").named({"p": 1, "d": 2}, spec)
    assert named == {"prob": 1, "dist": 2}


def test_a_module_needs_a_port_and_a_port_a_module():
    with pytest.raises(ModelError, match=r"a Encoder is no StarDist2D.*with port=Port"):
        StardistAdapter(Encoder(row_first=False, logits=True))
    with pytest.raises(ModelError, match="port is for a network that is built already"):
        StardistAdapter(REFERENCES / "plain", PORT)
    with pytest.raises(ModelError, match=r"no layer 'neck'.*one of its layers: net"):
        StardistAdapter(DistanceFirst(), Port(n_rays=8, embedding="neck"))


# --- the shell


def test_the_shell_adapts_segments_and_evaluates(tmp_path, capsys):
    for k in range(4):
        image, labels = discs(k, (96, 101))
        for kind, pixels in (("images", image), ("masks", labels.astype(np.uint16))):
            (tmp_path / kind).mkdir(exist_ok=True)
            tifffile.imwrite(tmp_path / kind / f"{k}.tif", pixels)
    images, run = str(tmp_path / "images"), str(tmp_path / "run")
    words = ["--adapter", "stardist", "--model", str(REFERENCES / "plain"), "--nms_thresh", "0.3"]
    words += ["--scale", "0.7", "--pmin", "2"]
    few = ["--iterations", "2", "--batch_size", "2", "--crop", "64", "--views", "2"]
    assert main(["adapt", *words, *few, "--images", images, "--out", run, "--stop", "none"]) in (
        0,
        3,
    )
    assert f"Use it:  StarDist2D(None, name='model', basedir='{run}').p" in capsys.readouterr().out
    adapted = StardistAdapter(f"{run}/model", scale=0.7, pmin=2)  # the run knows them
    assert adapted.nms_thresh == 0.3  # what was asked for is what StarDist will take
    out = tmp_path / "labels"
    assert main(["segment", "--model", run, "--images", images, "--out", str(out)]) == 0
    for file in out.iterdir():
        pixels = tifffile.imread(tmp_path / "images" / file.name)
        np.testing.assert_array_equal(tifffile.imread(file), adapted.segment(pixels))
    masks = str(tmp_path / "masks")
    assert main(["evaluate", "--model", run, "--images", images, "--masks", masks]) == 0
    assert '"ap50"' in capsys.readouterr().out
    bad = ["--adapter", "stardist", "--model", str(tmp_path), "--images", images]
    assert main(["adapt", *bad, "--out", str(tmp_path / "other")]) == 2
    assert "there is no config.json in it" in capsys.readouterr().err


def test_the_registry_knows_it():
    assert load_adapter("stardist") is StardistAdapter


# --- bad input: one sentence


def copy_of(name, tmp_path):
    return Path(shutil.copytree(REFERENCES / name, tmp_path / name))


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


BAD = {
    "3-D": (lambda f: change(f, n_dim=3, axes="ZYXC"), "is a 3-D StarDist model"),
    "another network's config": (
        lambda f: (f / "config.json").write_text('{"axes": "YXC"}'),
        "no StarDist model: its config.json has no n_rays",
    ),
    "broken config": (
        lambda f: (f / "config.json").write_text("{"),
        "config.json of .* is no JSON",
    ),
    "config of nothing": (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
    "no config": (lambda f: (f / "config.json").unlink(), "there is no config.json in it"),
    "no weights": (lambda f: (f / "weights_best.h5").unlink(), "has no weights"),
    "weights of nothing": (
        lambda f: (f / "weights_best.h5").write_bytes(b"no"),
        "weights_best.h5 of .* is no file of Keras weights",
    ),
    "more rays": (lambda f: change(f, n_rays=16), r"\(n_rays=16, and the file has 8\)"),
    "a wider network": (
        lambda f: change(f, unet_n_filter_base=8),
        "layer 'down_level_0_no_0' of shapes .* do not belong together",
    ),
    "a deeper network": (lambda f: change(f, unet_n_depth=3), "no layer 'down_level_2_no_0'"),
    "a shallower network": (
        lambda f: change(f, unet_n_depth=1),
        "a layer 'middle_0' .* do not belong together",
    ),
    "another grid": (lambda f: change(f, grid=[2, 2]), "has no layer 'conv2d'"),
    "no class head": (lambda f: change(f, n_classes=None), "has 2 layers more than config"),
    "no grid": (lambda f: change(f, grid=[3, 1]), "must be two powers of two"),
    "half a grid": (lambda f: change(f, grid=2), "grid=2 is not allowed: it must be two whole"),
    "no pool": (lambda f: change(f, unet_pool=[0, 2]), "unet_pool=.0, 2. is not allowed"),
    "rays in words": (lambda f: change(f, n_rays="8"), "n_rays='8' is not allowed"),
    "a depth in words": (lambda f: change(f, unet_n_depth="2"), "unet_n_depth='2' is not allowed"),
    "much dropout": (lambda f: change(f, unet_dropout=3), "unet_dropout=3 is not allowed"),
    "classes in words": (lambda f: change(f, n_classes="x"), "n_classes='x' is not allowed"),
    "features in words": (
        lambda f: change(f, net_conv_after_unet="x"),
        "net_conv_after_unet='x' is not allowed",
    ),
    "another activation": (
        lambda f: change(f, unet_activation="maxout"),
        "unet_activation='maxout' is not allowed: it must be one of relu",
    ),
    "another backbone": (lambda f: change(f, backbone="resnet"), "has the backbone 'resnet'"),
    "thresholds out of range": (
        lambda f: (f / "thresholds.json").write_text('{"prob": 1.5, "nms": 0.3}'),
        "thresholds.json of .* has prob=1.5",
    ),
    "half of the thresholds": (
        lambda f: (f / "thresholds.json").write_text('{"prob": 0.5}'),
        "has nms=None",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_folder_that_is_no_such_model_is_refused(case, tmp_path):
    damage, message = BAD[case]
    folder = copy_of("unequal" if "class" in case else "plain", tmp_path)
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        StardistAdapter(folder)
    assert "\n" not in str(caught.value)


def test_the_newest_of_the_best_weights_are_taken(tmp_path):
    """As StarDist does; files of macOS's own are passed over."""
    folder = copy_of("plain", tmp_path)
    best = folder / "weights_best.h5"
    with h5py.File(shutil.copy(best, folder / "weights_best_finetuned.h5"), "a") as file:
        file["prob/prob/bias:0"][...] = 7
    shutil.copy(best, folder / "weights_last.h5")
    (folder / "._weights_best.h5").write_bytes(b"no")
    os.utime(best, (1, 1))
    assert StardistAdapter(folder).model.prob.bias.item() == 7
    os.utime(folder / "weights_best_finetuned.h5", (0, 0))
    assert StardistAdapter(folder).model.prob.bias.item() != 7


def test_a_damaged_zip_raises_nothing_but_a_model_error(tmp_path):
    content = bytearray(zip_of("plain", tmp_path / "model.zip").read_bytes())
    rng = np.random.default_rng(0)
    refused = 0
    for k in range(60):
        damaged = content.copy()
        damaged[int(rng.integers(len(content)))] ^= 255
        file = tmp_path / f"{k}.zip"
        file.write_bytes(damaged)
        with suppress(ModelError):  # or it opens: not every byte matters
            StardistAdapter(file)
            continue
        refused += 1
    assert refused > 5


def test_without_thresholds_stardists_own_are_taken_and_said(tmp_path, caplog):
    folder = copy_of("plain", tmp_path)
    (folder / "thresholds.json").unlink()
    with caplog.at_level(logging.WARNING):
        adapter = StardistAdapter(folder)
    assert (adapter.prob_thresh, adapter.nms_thresh) == (0.5, 0.4)
    assert "has no thresholds.json: StarDist's own defaults are taken" in caplog.text


def test_weights_that_are_not_finite_are_neither_read_nor_saved(tmp_path):
    folder = copy_of("plain", tmp_path)
    with h5py.File(folder / "weights_best.h5", "a") as file:
        file["prob/prob/bias:0"][...] = np.nan
    with pytest.raises(ModelError, match="NaN or infinity in the layer 'prob'"):
        StardistAdapter(folder)
    adapter = StardistAdapter(network())
    adapter.model.middle[0][0].weight.data[0] = torch.inf
    with pytest.raises(ModelError, match=r"cannot be saved: middle.0.0.weight has NaN"):
        adapter.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("port", [None, PORT])
def test_saving_replaces_nothing(port, tmp_path):
    adapter = StardistAdapter(DistanceFirst() if port else network(), port)
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelError, match="exists already"):
        adapter.save(tmp_path / "there")
    with pytest.raises(ModelError, match="there is no folder"):
        adapter.save(tmp_path / "none" / "model")
    adapter.save(tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"there", "new"}


def test_how_to_open_it_says_what_adapting_was_told(tmp_path):
    adapter = StardistAdapter(network(), scale=0.5, pmax=99.9)
    assert adapter.usage(tmp_path / "m") == (
        f"StarDist2D(None, name='m', basedir='{tmp_path}')"
        ".predict_instances(normalize(image, 1, 99.9, axis=(0, 1)), scale=0.5)"
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nothing_here", "there is no model 'nothing_here': give a StarDist model folder"),
        (__file__, "is neither a folder nor a zip"),
    ],
)
def test_what_is_no_model_is_refused(model, message):
    with pytest.raises(ModelError, match=message):
        StardistAdapter(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prob_thresh": 0.0}, "prob_thresh=0.0 is not allowed"),
        ({"nms_thresh": 2.0}, "nms_thresh=2.0 is not allowed"),
        ({"scale": 0.0}, "scale=0.0 is not allowed"),
        ({"gray": "invert"}, "gray='invert' is not allowed"),
        ({"pmin": 99.9}, "percentiles 99.9 and 99.8 are not allowed"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        StardistAdapter(network(), **options)
