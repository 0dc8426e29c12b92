"""The Cellpose adapter against Cellpose itself, whichever major version is installed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHARED, config, discs, needs_shared

from selfadapt import (
    Adapter,
    ConfigError,
    ImageError,
    Input,
    ModelError,
    SelfAdaptation,
    Vector,
    as_channels_first,
    load_adapter,
    match,
    open_images,
    predict,
)
from selfadapt._calibrate import search, settle
from selfadapt._cli import main
from selfadapt.testing import AdapterTests, HeadTests

cellpose_models = pytest.importorskip("cellpose.models", reason="needs cellpose")

import selfadapt_cellpose  # noqa: E402
from selfadapt_cellpose import CellposeAdapter  # noqa: E402
from selfadapt_cellpose._files import MAJOR  # noqa: E402

CellposeModel = cellpose_models.CellposeModel
cellpose3 = pytest.mark.skipif(MAJOR != 3, reason="of Cellpose 3")
cellpose4 = pytest.mark.skipif(MAJOR != 4, reason="of Cellpose 4")
OWN_SCALE = 12.0 if MAJOR == 3 else 30.0
"""The diameter at which the network trained below takes images as they are."""
BFLOAT16 = {} if MAJOR == 3 else {"use_bfloat16": False}


@pytest.fixture(scope="session", autouse=True)
def small_encoder():
    """Cellpose 4 really builds its CPSAM, but around two narrow blocks instead of 24 wide ones."""
    if MAJOR == 3:
        yield
        return
    from cellpose import vit
    from segment_anything.build_sam import _build_sam

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit, "sam_model_registry", {"vit_l": lambda _: _build_sam(64, 2, 2, [1])})
        yield


def make_network(seed: int = 0):
    torch.manual_seed(seed)
    if MAJOR == 3:
        from cellpose.resnet_torch import CPnet

        return CPnet([2, 32, 64, 128, 256], 3, sz=3)
    from cellpose.vit import CPSAM

    return CPSAM()


def flows_of(labels):
    """Cellpose's own targets: cellprob, then flow."""
    from cellpose.dynamics import labels_to_flows
    from skimage.segmentation import relabel_sequential

    labels = relabel_sequential(labels)[0]
    return labels_to_flows([labels], device=torch.device("cpu"))[0][1:4]


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A weights file that knows bright discs, trained for a moment with Cellpose's own targets."""
    net = make_network().train()
    if MAJOR == 4:
        net.rdrop = 0  # two blocks are too few to leave one out
        net.encoder.patch_embed.proj.weight.data *= 20  # is not trained, so let it say something
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 3e-3)
    side = 1 if MAJOR == 3 else 4  # in squares of 64 pixels
    for step in range(40):
        parts = [discs(step * side**2 + k, (64, 64)) for k in range(side**2)]
        image = np.concatenate([pixels for pixels, _ in parts], 1)
        targets = np.concatenate([np.stack(flows_of(labels)) for _, labels in parts], 2)
        image, targets = (
            np.concatenate(np.split(array, side, -1), -2).astype(np.float32)
            for array in (image, targets)
        )
        pixels = (image - np.percentile(image, 1)) / np.ptp(np.percentile(image, (1, 99)))
        images = np.stack([pixels, 0 * pixels]) if MAJOR == 3 else pixels[None]
        out = net(torch.from_numpy(images.astype(np.float32))[None])[0][0]
        cellprob, flow = torch.from_numpy(targets[0]), torch.from_numpy(targets[1:])
        loss = (out[:2] - 5 * flow).square().mean() / 2
        loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(out[2], cellprob)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.diam_labels.data.fill_(12.0)
    net.diam_mean.data.fill_(12.0 if MAJOR == 3 else 30.0)
    path = tmp_path_factory.mktemp("weights") / "discs"
    torch.save(net.state_dict(), path)
    return path


IMAGE = discs(7, (150, 231))[0]


class TestConformance(AdapterTests):
    @pytest.fixture(autouse=True)
    def _file(self, trained):
        self.file = trained

    def make_adapter(self):
        return CellposeAdapter(self.file, diameter=12)

    def load(self, path):
        return CellposeAdapter(path)


@cellpose3
class TestNarrowNetwork(TestConformance):
    image_shape = (2, 40, 51)

    def make_adapter(self):
        from cellpose.resnet_torch import CPnet

        torch.manual_seed(0)
        path = self.file.with_name("narrow")
        torch.save(CPnet([2, 4, 6, 8], 3, sz=3).state_dict(), path)
        return CellposeAdapter(path)


class TestVectorsAreCellposesFlows(HeadTests):
    """Cellpose's own targets obey the encoder law of `Vector`, to within its diffusion."""

    head = Vector()
    tolerance = 0.1

    def encode(self, labels):
        return flows_of(labels)[1:]


def masks_of_eval(model, image, channel_axis=None, **options):
    return model.eval(image.astype(np.float32), channel_axis=channel_axis, **options)[0]


def assert_same_masks(expected, found):
    """No instance is missing or new, and matched ones overlap almost entirely."""
    counts = match(expected.astype(np.int32), found, (0.5,))[0]
    assert (counts.fp, counts.fn) == (0, 0)
    assert counts.tp > 3
    ious = [
        np.logical_and(expected == k, found == other).sum()
        / np.logical_or(expected == k, found == other).sum()
        for k in range(1, int(expected.max()) + 1)
        for other in [np.bincount(found[expected == k]).argmax()]
    ]
    assert np.mean(ious) >= 0.99


@pytest.mark.parametrize("resample", [True, False])
@pytest.mark.parametrize("factor", [1, 0.9, 1.37])
def test_an_unadapted_network_gives_cellposes_masks(trained, factor, resample):
    diameter = factor * OWN_SCALE
    model = CellposeModel(gpu=False, pretrained_model=str(trained), **BFLOAT16)
    adapter = CellposeAdapter(trained, diameter=diameter, resample=resample)
    expected = masks_of_eval(model, IMAGE, diameter=diameter, resample=resample)
    assert_same_masks(expected, Adapter.segment(adapter, IMAGE))  # prepare, tiles, decode
    assert_same_masks(expected, adapter.segment(IMAGE))  # Cellpose's eval


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": False},
        {"normalize": {"normalize": True, "percentile": [3.0, 98.0]}},
        {"cellprob_threshold": 0.5, "min_size": 25},
        {"niter": 60, "augment": True, "tile_overlap": 0.3},
        {"bsize": 256, "max_size_fraction": 0.01},
    ],
)
def test_options_mean_what_they_mean_in_cellpose(trained, options):
    two = np.stack([IMAGE, IMAGE[::-1]])
    if options.get("normalize") is False:
        two = (two - np.percentile(two, 1)) / np.ptp(np.percentile(two, (1, 99)))
    model = CellposeModel(gpu=False, pretrained_model=str(trained), **BFLOAT16)
    adapter = CellposeAdapter(trained, diameter=OWN_SCALE, **options)
    expected = masks_of_eval(model, two, channel_axis=0, diameter=OWN_SCALE, **options)
    assert_same_masks(expected, Adapter.segment(adapter, two, channel_axis=0))
    assert_same_masks(expected, adapter.segment(two, channel_axis=0))


@pytest.mark.parametrize(
    "normalize",
    [
        {"tile_norm_blocksize": 40},
        {"tile_norm_blocksize": 64, "percentile": [3.0, 97.0], "tile_norm_smooth3D": 3},
        {"sharpen_radius": 4, "smooth_radius": 1},
        {"percentile": [5.0, 95.0], "norm3D": False},
        {"lowhigh": [[0.0, 20.0], [10.0, 30.0], [0.0, 15.0]][: 2 if MAJOR == 3 else 3]},
    ],
)
def test_what_is_learnt_from_is_what_eval_gives_the_network(trained, monkeypatch, normalize):
    seen = []
    run_net = cellpose_models.run_net

    def watched(net, images, **options):
        seen.append(np.array(images[0]))
        return run_net(net, images, **options)

    monkeypatch.setattr(cellpose_models, "run_net", watched)
    channels = [IMAGE, IMAGE[::-1], IMAGE[:, ::-1]][: 2 if MAJOR == 3 else 3]
    adapter = CellposeAdapter(trained, diameter=OWN_SCALE, normalize=normalize)
    pixels = np.stack(channels).astype(np.float32)
    adapter.segment(pixels, channel_axis=0)
    np.testing.assert_allclose(adapter.prepare(pixels), seen[0].transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("normalize", "scale", "offset"),
    [({"lowhigh": [1e6, 1e6 + 16]}, 1, 1e6), (False, 1, 4096.0)],
)
def test_values_that_are_taken_as_they_are_are_not_shifted(trained, normalize, scale, offset):
    image = scale * IMAGE.astype(np.float64) + offset
    adapter = CellposeAdapter(trained, diameter=OWN_SCALE, normalize=normalize)
    prepared = adapter.prepare(image[None])[0]
    expected = (image.astype(np.float32) - 1e6) / 16 if normalize else image
    np.testing.assert_allclose(prepared, expected, rtol=1e-5, atol=0.01)


@cellpose3  # version 4 divides by the height less one
def test_an_image_of_one_row_has_labels_of_one_row(trained):
    row = np.random.default_rng(0).random((1, 200)).astype(np.float32)
    assert CellposeAdapter(trained, diameter=OWN_SCALE).segment(row).shape == (1, 200)


@cellpose3
@pytest.mark.parametrize("channels", [(0, 0), (2, 0), (1, 3)])
def test_channels_are_chosen_as_cellpose_does(trained, channels):
    colour = np.stack([IMAGE, IMAGE + 3, IMAGE[:, ::-1]], -1)
    model = CellposeModel(gpu=False, pretrained_model=str(trained))
    adapter = CellposeAdapter(trained, diameter=12, channels=channels)
    expected = masks_of_eval(model, colour, channel_axis=-1, diameter=12, channels=list(channels))
    assert_same_masks(expected, Adapter.segment(adapter, colour, channel_axis=-1))
    assert_same_masks(expected, adapter.segment(colour, channel_axis=-1))


def test_images_are_left_as_they_are(trained):
    image = IMAGE.copy()[None]
    adapter = CellposeAdapter(trained, diameter=12)
    adapter.prepare(image)
    adapter.segment(image[0])
    np.testing.assert_array_equal(image[0], IMAGE)


def dense(model):
    """The network's state dict, whatever the layout of its tensors."""
    state = model.net.state_dict()
    return {name: t.to_dense() if t.is_mkldnn else t.clone() for name, t in state.items()}


def test_one_line_adapts_a_cellpose_model_and_leaves_it_alone(trained, capsys, caplog):
    caplog.set_level("INFO", "selfadapt_cellpose")
    model = CellposeModel(gpu=False, pretrained_model=str(trained), **BFLOAT16)
    images = [discs(k, (80, 91))[0] for k in range(3)]
    model.eval(images[0], diameter=11)  # Cellpose 3 leaves MKL-DNN tensors in the network
    before = dense(model)
    flags = dict(vars(model)) | {"net": None}
    adapted = selfadapt_cellpose.adapt(
        model, images, diameter=11, stop=None, calibrate=False,
        config=config(iterations=2, views=2, learning_rate=1e-5),  # no instance is to be lost
    )  # fmt: skip
    [ended] = [each for each in caplog.records if each.msg.startswith("Result: ")]
    assert "all 2 iterations" in ended.getMessage()
    assert ended.name == "selfadapt_cellpose._adapt"
    assert ended.levelname == ("WARNING" if "not to be trusted" in ended.getMessage() else "INFO")
    assert isinstance(adapted, CellposeModel)
    assert adapted.eval(images[0], diameter=11)[0].shape == (80, 91)
    assert dict(vars(model)) | {"net": None} == flags
    for name, tensor in dense(model).items():
        assert torch.equal(tensor, before[name]), name
    after = dense(adapted)
    assert len([name for name in before if not torch.equal(after[name], before[name])]) > 10
    assert float(adapted.net.diam_labels) == 11
    if MAJOR == 3:
        assert adapted.diam_labels == 11
        np.testing.assert_array_equal(
            adapted.eval(images[0])[0], adapted.eval(images[0], diameter=11)[0]
        )


def test_one_line_prints_nothing_and_warns_of_what_eval_must_be_told(trained, capsys, caplog):
    selfadapt_cellpose.adapt(
        CellposeModel(gpu=False, pretrained_model=str(trained), **BFLOAT16),
        [discs(k, (80, 91))[0] for k in range(2)], diameter=OWN_SCALE, invert=True,
        config=config(iterations=1, views=1, validate_every=1, validation_images=1),
        stop=None, calibrate=False, progress=False,
    )  # fmt: skip
    [warned] = [each for each in caplog.messages if each.startswith("Use it with")]
    assert warned.endswith("model.eval(image, invert=True)")
    assert capsys.readouterr() == ("", "")


def test_how_to_use_it_says_what_eval_must_be_told(trained, tmp_path):
    plain = CellposeAdapter(trained, diameter=OWN_SCALE).usage(tmp_path / "m")
    told = CellposeAdapter(trained, diameter=OWN_SCALE, invert=True, min_size=5)
    assert told.usage(tmp_path / "m") == f"{plain}.eval(image, invert=True, min_size=5)"
    normalize = {"percentile": [2, 98]}
    told = CellposeAdapter(trained, diameter=OWN_SCALE, normalize=normalize)
    assert told.usage(tmp_path / "m") == f"{plain}.eval(image, normalize={normalize})"
    told = CellposeAdapter(trained, diameter=OWN_SCALE, normalize=normalize, invert=True)
    both = {"invert": True} | normalize  # eval takes it from there only
    assert told.usage(tmp_path / "m") == f"{plain}.eval(image, normalize={both})"


def test_what_is_saved_opens_bit_for_bit_in_unmodified_cellpose(trained, tmp_path, capsys, caplog):
    adapter = CellposeAdapter(trained, diameter=OWN_SCALE)
    run = SelfAdaptation(adapter, config(views=2, device="cpu", learning_rate=1e-4))
    side = adapter.fixed_size or 64
    image = adapter.prepare(np.tile(IMAGE, (2, 2))[None])[:, :side, :side]
    run.step(torch.from_numpy(image)[None])
    adapted = adapter.with_model(run.student)
    with caplog.at_level("INFO"):
        adapted.save(tmp_path / "adapted")
    assert capsys.readouterr() == ("", "")
    opened = eval(
        caplog.messages[-1].removeprefix("Open it with "), {"CellposeModel": CellposeModel}
    )
    assert opened.net.state_dict().keys() == adapted.model.state_dict().keys()
    for name, tensor in opened.net.state_dict().items():
        assert tensor.dtype == adapted.model.state_dict()[name].dtype
        if name != "diam_labels":  # which holds the adapter's diameter
            assert torch.equal(tensor, adapted.model.state_dict()[name]), name
    assert float(opened.net.diam_labels) == OWN_SCALE
    assert float(opened.net.diam_mean) == float(torch.load(trained)["diam_mean"])
    assert_same_masks(masks_of_eval(opened, IMAGE, diameter=OWN_SCALE), adapted.segment(IMAGE))


def test_a_network_that_lacks_a_tensor_or_is_not_finite_is_not_saved(trained, tmp_path):
    adapter = CellposeAdapter(trained, diameter=12)
    del adapter.model.diam_mean
    adapter.model.register_buffer("other", torch.zeros(1))
    with pytest.raises(ModelError, match="has 1 tensors that are none of its own"):
        adapter.save(tmp_path / "model")
    adapter = CellposeAdapter(trained, diameter=12)
    next(adapter.model.parameters()).data.fill_(torch.nan)
    with pytest.raises(ModelError, match="NaN or infinity"):
        adapter.save(tmp_path / "model")
    adapter = CellposeAdapter(trained, diameter=12)
    with pytest.raises(ModelError, match="there is no folder"):
        adapter.save(tmp_path / "absent" / "model")
    assert not list(tmp_path.iterdir())


def test_a_model_can_be_put_into_the_list_of_the_gui(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(cellpose_models, "MODEL_DIR", tmp_path / "home")
    monkeypatch.setattr(cellpose_models, "MODEL_LIST_PATH", str(tmp_path / "home" / "list.txt"))
    adapter = CellposeAdapter(trained, diameter=12)
    adapter.save(tmp_path / "nuclei_hela", register=True)
    assert cellpose_models.get_user_models() == ["nuclei_hela"]
    by_name = CellposeAdapter("nuclei_hela")
    assert by_name.diameter == (12 if MAJOR == 3 else 30)
    with pytest.raises(ModelError, match="has a model 'nuclei_hela' already"):
        adapter.save(tmp_path / "nuclei_hela", register=True)
    with pytest.raises(ModelError, match="already"):
        adapter.save(tmp_path / cellpose_models.MODEL_NAMES[0], register=True)


def test_the_embedding_is_the_bottleneck_and_not_the_style(trained):
    adapter = CellposeAdapter(trained, diameter=12)
    image = torch.from_numpy(adapter.prepare(IMAGE[None]))
    embedding = predict(adapter, adapter.model, image).embedding
    assert embedding.shape == (256,)
    assert float(embedding.abs().min()) >= 0
    assert float(embedding.std()) > 0
    side = adapter.fixed_size or 64
    tile = image[:, :side, :side]
    tile = torch.nn.functional.pad(tile, (0, side - tile.shape[2], 0, side - tile.shape[1]))
    seen = []
    layer = adapter.embedding_module(adapter.model)
    with layer.register_forward_hook(lambda _, __, output: seen.append(output)), torch.no_grad():
        style = adapter.model(tile[None])[1]
    pooled = torch.nn.functional.normalize(seen[0].mean((2, 3)))
    if MAJOR == 3:  # its style is the pooled bottleneck
        torch.testing.assert_close(pooled, style)
    else:
        assert not style.any()


def test_parameters_that_nothing_is_learnt_by_stay_as_they_are(trained):
    adapter = CellposeAdapter(trained, diameter=12)
    frozen = {name for name, p in adapter.model.named_parameters() if not p.requires_grad}
    expected = {"diam_mean", "diam_labels"}
    if MAJOR == 4:
        expected |= {"W2", "encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias"}
    assert frozen == expected
    run = SelfAdaptation(adapter, config(crop=64, views=2, weight_decay=0.5, l2sp=1.0))
    side = adapter.fixed_size or 64
    for _ in range(2):
        run.step(torch.rand(2, adapter.channels or 1, side, side))
    for name, parameter in run.student.named_parameters():
        first = adapter.model.get_parameter(name)
        assert torch.equal(parameter, first) == (name in frozen), name


@cellpose4
def test_checkpointing_changes_memory_and_nothing_else(trained):
    kept = []
    for checkpoint in (False, True):
        adapter = CellposeAdapter(trained, checkpoint=checkpoint)
        run = SelfAdaptation(adapter, config(views=1, batch_size=1, strength=0, seed=3))
        torch.manual_seed(0)
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = run.loss(torch.rand(1, 1, 256, 256))
        loss.backward()
        kept.append((sum(sizes), [p.grad for p in run.parameters()], run.student.state_dict()))
    assert kept[1][0] < 0.6 * kept[0][0]
    torch.testing.assert_close(kept[0][1], kept[1][1])
    assert kept[0][2].keys() == kept[1][2].keys()


@pytest.fixture
def deterministic():
    """Relative positions are looked up by an index, whose backward sums in any order else."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@cellpose4
def test_stochastic_depth_is_repeated_by_a_resumed_run(trained, deterministic):
    batches = torch.rand(4, 1, 1, 256, 256)
    settings = config(batch_size=1, views=1)
    whole = SelfAdaptation(CellposeAdapter(trained), settings)
    for images in batches:
        whole.step(images)
    first, second = (SelfAdaptation(CellposeAdapter(trained), settings) for _ in range(2))
    for images in batches[:2]:
        first.step(images)
    second.load_state_dict(first.state_dict())
    torch.rand(5)
    for images in batches[2:]:
        second.step(images)
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, second.student.state_dict()[name]), name


@cellpose4
def test_float32_weights_come_back_from_the_file_of_a_bfloat16_model(trained):
    model = CellposeModel(gpu=False, pretrained_model=str(trained))
    assert next(model.net.parameters()).dtype == torch.bfloat16
    adapter = CellposeAdapter(model, diameter=30)
    for name, tensor in torch.load(trained).items():
        if name != "diam_labels":
            assert torch.equal(adapter.model.state_dict()[name], tensor), name
    model.net.out.bias.data += 1  # no longer the file's: what is in memory counts
    other = CellposeAdapter(model)
    assert torch.equal(other.model.out.bias, model.net.out.bias.float())


@cellpose3
def test_what_an_earlier_eval_leaves_in_cellpose_does_not_matter(trained):
    adapter = CellposeAdapter(trained, diameter=12)
    expected = adapter.segment(IMAGE)
    model = CellposeModel(gpu=False, pretrained_model=str(trained))
    model.eval(IMAGE.copy(), diameter=12, invert=True, normalize=True)  # changes a global of theirs
    np.testing.assert_array_equal(adapter.segment(IMAGE), expected)


@cellpose3
def test_an_old_zoo_file_keeps_the_diameter_that_cellpose_knows_by_its_name(trained, tmp_path):
    state = {name: t for name, t in torch.load(trained).items() if not name.startswith("diam_")}
    torch.save(state, tmp_path / "nucleitorch_0")
    model = CellposeModel(gpu=False, pretrained_model=str(tmp_path / "nucleitorch_0"))
    for given in (model, tmp_path / "nucleitorch_0"):
        adapter = CellposeAdapter(given)
        assert (adapter.diam_mean, adapter.diameter) == (17, None)
        adapter = CellposeAdapter(given, diameter=21)
        adapter.save(tmp_path / "saved")
        saved = CellposeModel(gpu=False, pretrained_model=str(tmp_path / "saved"))
        assert (saved.diam_mean, saved.diam_labels) == (17, 21)


@cellpose3
def test_a_missing_diameter_is_taken_from_the_file_and_said(trained, caplog):
    adapter = CellposeAdapter(trained)
    assert adapter.diameter == 12
    assert "diameter" not in caplog.text  # it may yet be found
    adapter.check(open_images(IMAGE))
    assert "12.0 pixels are taken, the model's own diam_labels" in caplog.text


@cellpose3
def test_where_a_diameter_is_said_or_found_none_is_missed(trained, caplog):
    found = settle(CellposeAdapter(trained), Input(scale=0.5))
    for adapter in (found, CellposeAdapter(trained, diameter=12)):
        adapter.check(open_images(IMAGE))
    assert not caplog.records


@cellpose3
def test_a_file_without_diameters_has_its_own_estimated_and_said(trained, tmp_path, monkeypatch):
    state = {name: t for name, t in torch.load(trained).items() if not name.startswith("diam_")}
    torch.save(state, tmp_path / "old")
    adapter = CellposeAdapter(tmp_path / "old")
    assert (adapter.diam_mean, adapter.diameter) == (30, None)
    with pytest.raises(ConfigError, match="scale must be found in the images first"):
        adapter.segment(IMAGE)
    adapter.diam_mean = 12.0  # what this network was trained at
    monkeypatch.setattr("selfadapt._calibrate.SCALES", (0.592, 1.0, 1.69))  # a search of seconds
    found = search(adapter, open_images([discs(k, (150, 231))[0] for k in range(7, 11)]))
    settled = found.adapter
    assert found.found
    assert f"(diameter {settled.diameter:.3g}), finds objects of about" in str(found)
    truth = np.median(np.bincount(discs(7, (150, 231))[1].ravel())[1:] ** 0.5) / (np.pi**0.5 / 2)
    assert 1 / 1.5 < settled.diameter / truth < 1.5
    assert settled.segment(IMAGE).max() > 3
    assert adapter.diameter is None
    # the file then tells Cellpose
    settled.save(tmp_path / "new")
    assert CellposeAdapter(tmp_path / "new").diameter == pytest.approx(settled.diameter)


@cellpose3
def test_channels_of_a_window_are_normalised_as_those_of_the_whole_image(trained):
    """Of a sample [C, 1, N] Cellpose would take the wrong axis for channels."""
    rng = np.random.default_rng(0)
    image = rng.random((3, 64, 80)) * np.array([60000, 3000, 200])[:, None, None]
    adapter = CellposeAdapter(trained, diameter=12, channels=(2, 3))
    sample = image.reshape(3, -1)[:, None, :]
    whole = adapter.prepare(image)[:, :32, :32]
    part = adapter.prepare(image[:, :32, :32], sample)
    assert np.abs(part - whole).max() < 0.05
    assert part.shape == whole.shape == (2, 32, 32)


def test_a_diameter_that_nobody_has_said_or_found_is_told(trained, caplog):
    images = open_images([IMAGE])
    adapter = CellposeAdapter(trained)
    adapter.check(images)
    which = "the model's own diam_labels" if MAJOR == 3 else "the images' own scale"
    assert caplog.messages[0].startswith(
        f"No diameter given: {OWN_SCALE} pixels are taken, {which}."
    )
    assert adapter.prepare(IMAGE[None]).shape[1:] == IMAGE.shape
    caplog.clear()
    CellposeAdapter(trained, diameter=12).check(images)
    settle(adapter, Input(scale=0.5)).check(images)  # as calibrate does
    assert not caplog.messages


def other_version() -> dict[str, torch.Tensor]:
    if MAJOR == 3:
        return {"W2": torch.zeros(1), "encoder.pos_embed": torch.zeros(1)}
    return {"downsample.down.res_down_0.proj.1.weight": torch.zeros(32, 2, 1, 1),
            "output.2.weight": torch.zeros(3, 32, 1, 1)}  # fmt: skip


def refused_files(trained: Path) -> dict[str, tuple[object, str]]:
    state = torch.load(trained)
    name = [key for key in state if "weight" in key][4]
    shorter = {key: tensor for key, tensor in state.items() if key != name}
    smaller = state | {name: state[name][:1]}
    newer = 4 if MAJOR == 3 else 3
    return {
        "a file of the other version": (other_version(), f"is a network of Cellpose {newer}, and"),
        "a state dict of SMP": ({"encoder.conv1.weight": torch.zeros(1)}, "is no weights file.*"
                                "its first tensors are encoder.conv1.weight"),
        "a wrapped state dict": ({"model": state}, "it holds a dict, no flat state dict"),
        "a list": ([1, 2], "it holds a list"),
        "a missing layer": (shorter, f"lacks 1 of its .* tensors .{name}"),
        "an added layer": (state | {"extra": torch.zeros(1)}, "none of its own .extra"),
        "another shape": (smaller, f"{name}.* shape"),
        "NaN": (state | {name: state[name] * torch.nan}, f"NaN or infinity in {name}"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", [
    "a file of the other version", "a state dict of SMP", "a wrapped state dict", "a list",
    "a missing layer", "an added layer", "another shape", "NaN",
])  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_in_one_sentence(kind, trained, tmp_path, capsys):
    content, message = refused_files(trained)[kind]
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ModelError, match=message):
        CellposeAdapter(tmp_path / "file.pt")
    out, images = tmp_path / "run", tmp_path / "images"
    images.mkdir()
    np.save(images / "x.npy", 1)
    shell = ["adapt", "--adapter", "cellpose", "--model", str(tmp_path / "file.pt")]
    assert main([*shell, "--images", str(images), "--out", str(out)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not out.exists()


def test_files_that_are_no_torch_files_are_refused(tmp_path):
    (tmp_path / "weights.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))  # StarDist's kind
    with pytest.raises(ModelError, match="is no weights file of a Cellpose network"):
        CellposeAdapter(tmp_path / "weights.h5")
    with pytest.raises(ModelError, match="is a folder: Cellpose keeps a network in one file"):
        CellposeAdapter(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing_of_the_kind", "there is no model 'nothing_of_the_kind'"),
        ("cpsam" if MAJOR == 3 else "nuclei", "is a network of Cellpose .* is installed"),
    ],
)
def test_names_that_do_not_fit_are_refused(name, message):
    with pytest.raises(ModelError, match=message):
        CellposeAdapter(name)


def test_a_zoo_network_that_cannot_be_downloaded_says_so(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(cellpose_models, "MODEL_DIR", tmp_path)
    monkeypatch.setattr(cellpose_models.utils, "download_url_to_file", offline)
    with pytest.raises(ModelError, match=r"cannot download .* \(no route to host\)"):
        CellposeAdapter(cellpose_models.MODEL_NAMES[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"diameter": 0}, "diameter=0 is not allowed: give the diameter of the cells in pixels"),
        ({"diameter": -3.0}, "diameter=-3.0 is not allowed"),
        ({"diameter": float("nan")}, "diameter=nan is not allowed"),
        ({"niter": 0}, "niter=0 is not allowed"),
        ({"bsize": 100}, "bsize=100 is not allowed"),
        ({"tile_overlap": 0.9}, "tile_overlap=0.9 is not allowed"),
        ({"max_size_fraction": 0}, "max_size_fraction=0 is not allowed"),
        ({"channels": [1]}, "channels=.1. is not allowed: give two numbers"),
        ({"channels": (1, -1)}, "give two numbers"),
        ({"flow_threshold": -1.0}, "flow_threshold=-1.0"),
        ({"cellprob_threshold": float("inf")}, "cellprob_threshold=inf"),
        ({"min_size": -5}, "min_size=-5"),
        ({"normalize": False, "invert": True}, "Cannot invert image without normalization"),
        ({"normalize": {"percentil": [1, 99]}}, "percentil"),
        (
            {"checkpoint": True} if MAJOR == 3 else {"channels": (0, 0)},
            f"is an option of Cellpose {4 if MAJOR == 3 else 3}",
        ),
    ],
)
def test_options_out_of_range_are_refused(options, message, trained):
    with pytest.raises(ConfigError, match=message):
        CellposeAdapter(trained, **options)


def test_images_with_too_many_channels_are_refused(trained):
    adapter = CellposeAdapter(trained, diameter=12)
    image = np.random.default_rng(0).random((4 if MAJOR == 4 else 3, 40, 40))
    message = "the image has 3 channels, and the network takes 2: give channels"
    if MAJOR == 4:
        message = "the image has 4 channels, and the network takes 3"
    with pytest.raises(ImageError, match=message):
        adapter.prepare(image)
    with pytest.raises(ImageError, match=message):
        adapter.segment(image, channel_axis=0)


@cellpose3
def test_a_channel_that_is_not_there_is_refused(trained):
    adapter = CellposeAdapter(trained, diameter=12, channels=(2, 3))
    with pytest.raises(ImageError, match=r"channels=\(2, 3\) does not fit an image with 2"):
        adapter.prepare(np.random.default_rng(0).random((2, 40, 40)))


def test_images_that_say_nothing_are_refused(trained):
    adapter = CellposeAdapter(trained, diameter=5000)
    with pytest.raises(ImageError, match="too small for cells of 5000"):
        adapter.prepare(IMAGE[None])
    with pytest.raises(ImageError, match="NaN or infinity"):
        adapter.segment(np.full((30, 30), np.nan))


def test_other_objects_are_refused():
    with pytest.raises(ModelError, match="a Linear is no name, file or CellposeModel"):
        CellposeAdapter(torch.nn.Linear(2, 2))


def test_the_shell_adapts_segments_and_evaluates(trained, tmp_path, capsys):
    import tifffile

    for k in range(4):
        image, labels = discs(k, (96, 101))
        for kind, pixels in (("images", image), ("masks", labels.astype(np.uint16))):
            (tmp_path / kind).mkdir(exist_ok=True)
            tifffile.imwrite(tmp_path / kind / f"{k}.tif", pixels)
    images, run = str(tmp_path / "images"), str(tmp_path / "run")
    words = ["--adapter", "cellpose", "--model", str(trained), "--diameter", "12"]
    few = ["--iterations", "2", "--batch_size", "2", "--crop", "64", "--views", "2"]
    few += ["--calibrate", "false"]  # takes its time
    assert main(["adapt", *words, *few, "--images", images, "--out", run, "--stop", "none"]) in (
        0,
        3,
    )
    assert f"Use it:  CellposeModel(pretrained_model='{run}/model'" in capsys.readouterr().out
    assert CellposeModel(gpu=False, pretrained_model=f"{run}/model", **BFLOAT16).net is not None
    out = tmp_path / "labels"
    assert main(["segment", "--model", run, "--images", images, "--out", str(out)]) == 0
    adapted = CellposeAdapter(f"{run}/model", diameter=12)
    for file in out.iterdir():
        pixels = tifffile.imread(tmp_path / "images" / file.name)
        np.testing.assert_array_equal(tifffile.imread(file), adapted.segment(pixels))
    masks = str(tmp_path / "masks")
    assert main(["evaluate", "--model", run, "--images", images, "--masks", masks]) == 0
    assert '"ap50"' in capsys.readouterr().out
    bad = ["--adapter", "cellpose", "--model", str(trained), "--diameter", "0"]
    assert main(["adapt", *bad, "--images", images, "--out", str(tmp_path / "other")]) == 2
    assert "--diameter 0.0 is not allowed" in capsys.readouterr().err


def test_the_registry_knows_it():
    assert load_adapter("cellpose") is CellposeAdapter


REAL = {
    "dsb2018/fluo256": {"diameter": 14},
    "dsb2018/fluo520": {"diameter": 28},
    "dsb2018/he": {"diameter": 21, "channels": (0, 0), "invert": True},
    "usiigaci_phase": {"diameter": 47},
}


@cellpose3
@needs_shared
@pytest.mark.parametrize("target", REAL)
def test_real_images_give_cellposes_masks_at_their_own_and_at_another_diameter(target):
    weights, options = SHARED / "models/cpnet_nuclei/weights.pt", dict(REAL[target])
    model = CellposeModel(gpu=False, pretrained_model=str(weights))
    pixels = open_images(SHARED / "data" / target / "images")[0].read()[:, :251, :201]
    for diameter in (options.pop("diameter"), 17.0, 12.5):
        adapter = CellposeAdapter(weights, diameter=diameter, **options)
        keywords = dict(options) | {"diameter": diameter}
        expected = masks_of_eval(model, pixels, channel_axis=0, **keywords)
        assert_same_masks(expected, Adapter.segment(adapter, pixels, channel_axis=0))
        assert_same_masks(expected, adapter.segment(pixels, channel_axis=0))


@cellpose3
@needs_shared
def test_the_unmodified_command_line_of_cellpose_gives_our_masks(tmp_path):
    import tifffile

    weights = SHARED / "models/cpnet_nuclei/weights.pt"
    adapter = CellposeAdapter(weights, diameter=14)
    images = [image.read() for image in open_images(SHARED / "data/dsb2018/fluo256/images")[:2]]
    run = SelfAdaptation(adapter, config(views=2, learning_rate=1e-4))
    run.step(torch.stack([torch.from_numpy(adapter.prepare(i))[:, :64, :64] for i in images]))
    adapted = adapter.with_model(run.student)
    adapted.save(tmp_path / "adapted")
    (tmp_path / "images").mkdir()
    for k, image in enumerate(images):
        tifffile.imwrite(tmp_path / "images" / f"{k}.tif", image[0])
    command = [
        sys.executable, "-m", "cellpose", "--pretrained_model", str(tmp_path / "adapted"),
        "--dir", str(tmp_path / "images"), "--diameter", "14", "--save_tif", "--no_npy",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    for k, image in enumerate(images):
        theirs = tifffile.imread(tmp_path / "images" / f"{k}_cp_masks.tif")
        assert_same_masks(theirs, adapted.segment(image, channel_axis=0))


def test_as_channels_first_is_public():
    assert as_channels_first(np.zeros((4, 5, 2)), -1).shape == (2, 4, 5)


@pytest.mark.skipif(MAJOR != 3, reason="the network of version 3")
@pytest.mark.parametrize("diameter", [0.5, 17.0, 34.0])
def test_dynamics_run_as_long_as_cells_are_large(trained, monkeypatch, diameter):
    adapter = CellposeAdapter(trained, diameter=diameter, flow_threshold=0)
    given = {}
    monkeypatch.setattr(
        "selfadapt_cellpose._adapter.dynamics.resize_and_compute_masks",
        lambda *_, **options: given.update(options) or np.zeros((40, 40), np.int32),
    )
    outputs = {"flow": torch.zeros(2, 40, 40), "cellprob": torch.zeros(1, 40, 40)}
    adapter.decode(outputs, (40, 40))
    assert given["niter"] == int(200 * diameter / adapter.diam_mean)
    assert given["flow_threshold"] == 0
