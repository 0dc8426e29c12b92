"""What single small breaks of the code went unnoticed by (tests/campaigns/mutants.py)."""

import inspect
import re
from ast import literal_eval
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import numpy as np
import pytest
import torch
from helpers import IMAGES, SmallAdapter, config, discs, trained_adapter
from torch import nn

import selfadapt
from selfadapt import (
    Binary,
    Categorical,
    Config,
    ConfigError,
    ImageError,
    Judge,
    ModelError,
    OutputSpec,
    Scalar,
    SelfAdaptation,
    adapt,
    estimate_quality,
)
from selfadapt._candidates import loops
from selfadapt._cli import main
from selfadapt._look import copies, views
from selfadapt._network import pick_device
from selfadapt._normalize import resize_image
from selfadapt._predict import predict
from selfadapt._signals import instances
from selfadapt._symmetry import D4
from selfadapt._trials import _busiest, _sample
from selfadapt_smp._names import parse_heads
from selfadapt_stardist import StardistAdapter
from selfadapt_stardist._network import Architecture, StarDist2D


def test_one_window_is_enough_for_an_estimate(adapter):
    assert estimate_quality(adapter, IMAGES, windows=1) is not None
    with pytest.raises(ConfigError, match="windows=0"):
        estimate_quality(adapter, IMAGES, windows=0)


def test_the_quality_of_masks_is_not_asked_for(adapter):
    with pytest.raises(ImageError, match="look like masks"):
        estimate_quality(adapter, [discs(k)[1] for k in range(2)])


def test_images_must_be_named(tmp_path, capsys):
    words = ["--adapter", "smp", "--model", "demo", "--out", str(tmp_path / "out")]
    assert main(["segment", *words]) == 2
    assert "--images is missing" in capsys.readouterr().err


def test_target_statistics_are_all_of_the_images(adapter, tmp_path):
    result = adapt(adapter, IMAGES, config=config(batch_norm="target"), stop=None, progress=False)
    mean = result.adapter.model.stem[1].running_mean
    assert torch.equal(mean, result.select("statistics-100").model.stem[1].running_mean)
    assert not torch.equal(mean, result.select("statistics-50").model.stem[1].running_mean)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_memory_format_is_the_adapters(wanted):
    adapter = SmallAdapter()
    adapter.channels_last = wanted
    run = SelfAdaptation(adapter, config())
    for network in (run.student, run.teacher, run.initial):
        weight = network.bottleneck[0].weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == wanted


def test_a_step_leaves_no_hooks():
    run = SelfAdaptation(SmallAdapter(), config(batch_norm="batch"))
    run.step(torch.rand(2, 1, 32, 32))
    assert not any(module._forward_pre_hooks for module in run.student.modules())


def test_the_strengths_of_the_loops():
    ways = loops(Config(learning_rate=1e-3), SmallAdapter().model)
    rates = {name: way.learning_rate for name, way in ways.items()}
    assert rates == {"default": 1e-3, "batch": 1e-3, "gentle": 2.5e-4, "bold": 4e-3}


@pytest.mark.parametrize("name", ["weight_decay", "balance", "l2sp", "strength", "noise", "seed"])
def test_settings_that_may_be_0_and_not_less(name):
    Config(**{name: 0})
    with pytest.raises(ConfigError, match=f"{name}=-1 .*0 or more"):
        Config(**{name: -1})


@pytest.mark.parametrize("count", [1, 2, 8])
def test_as_many_views_as_asked_for(count):
    class Counting(SmallAdapter):
        seen = 0

        def forward(self, model, images):
            self.seen += 0 if model.training else len(images)
            return super().forward(model, images)

    adapter = Counting()
    SelfAdaptation(adapter, config(views=count)).loss(torch.rand(2, 1, 32, 32))
    assert adapter.seen == 2 * count


def test_hard_labels_of_classes_are_one_hot():
    votes = torch.rand(4, 2, 3, 5, 6).softmax(2)
    hard = Categorical(3).pseudo_label(votes, "hard")
    assert torch.equal(hard.sum(1), torch.ones(2, 5, 6))
    assert torch.equal(hard.argmax(1), votes.mean(0).argmax(1))


def test_the_last_activation_of_stardists_u_net_is_its_own():
    network = StarDist2D(
        Architecture(unet_n_depth=1, unet_n_filter_base=2, unet_last_activation="tanh")
    )
    kinds = [module for module in network.modules() if isinstance(module, nn.Tanh)]
    assert len(kinds) == 1
    order = [module for module in network.modules() if isinstance(module, nn.Tanh | nn.Conv2d)]
    after = order[order.index(kinds[0]) + 1 :]
    assert after[0].out_channels == 128  # the features come next


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="device='cuda' cannot be used here"):
        pick_device("cuda")


def test_a_device_without_values_is_none():
    with pytest.raises(ConfigError, match="device='meta' cannot be used here"):
        pick_device("meta")


def test_heads_give_logits_unless_said():
    assert parse_heads("foreground")["foreground"].logits
    assert not parse_heads("foreground", activated=True)["foreground"].logits


def test_the_teacher_is_kept_where_only_one_step_was_made():
    run = SelfAdaptation(trained_adapter(), config(ema_decay=0.9))
    before = run.teacher.stem[0].weight.clone()
    run.step(torch.from_numpy(np.stack([IMAGES[0][None, :32, :32]] * 2)))
    expected = 0.9 * before + 0.1 * run.student.stem[0].weight
    torch.testing.assert_close(run.teacher.stem[0].weight, expected.detach())


def test_what_the_docs_say_of_defaults_is_so():
    text = (Path(__file__).parents[1] / "docs" / "settings.md").read_text()
    told = dict(re.findall(r"[`,] ?(\w+)=([^`,\s]+)", text.partition("What stands behind")[2]))
    known = {field.name: field.default for field in fields(Config)}
    assert {"crop", "iterations", "learning_rate", "views", "batch_size"} <= told.keys()
    for name, value in told.items():
        if name in known and value != '"default"':  # the other way, beside the default
            assert literal_eval(value) == known[name]
    looks = re.search(r"at most (\d+) windows of (\d+) pixels", text)
    judge = inspect.signature(Judge).parameters
    assert looks.groups() == (str(judge["windows"].default), str(judge["side"].default))


def test_cellposes_adapt_has_the_defaults_of_ours():
    cellpose = pytest.importorskip("selfadapt_cellpose")
    ours = inspect.signature(selfadapt.adapt).parameters
    theirs = inspect.signature(cellpose.adapt).parameters
    shared = (ours.keys() & theirs.keys()) - {"images"}
    assert {"stop", "resume", "progress"} <= shared
    for name in shared:
        assert theirs[name].default == ours[name].default


def test_values_cannot_be_changed():
    for info in iter_modules(selfadapt.__path__):
        module = import_module(f"selfadapt.{info.name}")
        kinds = [kind for kind in vars(module).values() if isinstance(kind, type)]
        for kind in filter(is_dataclass, kinds):
            assert kind.__dataclass_params__.frozen, kind


def test_settings_are_the_default_ones_unless_given():
    with pytest.raises(ImageError, match="no images"):
        adapt(SmallAdapter(), [])


def test_each_copy_is_another_one():
    assert len(set(copies(D4))) == len(copies(D4)) == 3
    assert all(copies([D4[0], g]) == [g] for g in D4[1:])


def test_quarters_are_of_one_size():
    assert instances(np.arange(1, 17).reshape(4, 4)).tolist() == [4, 4, 4, 4]


def test_instances_of_a_scaled_copy_have_its_size():
    class Checking(SmallAdapter):
        sizes = ()

        def decode(self, outputs, size):
            assert outputs["cellprob"].shape[1:] == size
            self.sizes += (size,)
            return super().decode(outputs, size)

    adapter = Checking()
    views(adapter, adapter.model, torch.rand(1, 40, 80), (40, 80))
    assert adapter.sizes[-3:] == ((31, 62), (52, 104), (40, 80))


def test_tokens_are_averaged_over_their_number():
    class Tokens(nn.Module):
        def forward(self, images):
            return images[:, 0]  # [B, N, D]

    adapter = SmallAdapter()
    adapter.model.tokens = Tokens()
    adapter.embedding_module = lambda model: model.tokens
    adapter.model.register_forward_pre_hook(lambda model, args: (model.tokens(args[0]), None)[1])
    image = torch.rand(1, 20, 30)
    torch.testing.assert_close(predict(adapter, adapter.model, image).embedding, image[0].mean(0))


def test_the_grid_of_all_heads_keeps_its_sides_apart():
    assert OutputSpec(a=Binary(grid=(2, 4)), b=Scalar(grid=(3, 1))).grid == (6, 4)


def test_scale_is_looked_for_in_a_bounded_sample_and_where_objects_are():
    assert 2**15 < _sample(np.zeros((2, 700, 900), np.uint8))[0].size <= 2**16
    image = np.full((1, 1000, 1000), 100, np.float32)
    image[0, 600:720, 300:430] = 0  # 1.6 % of it
    ((row, column),) = _busiest(image, 1)
    assert 500 < row < 820
    assert 200 < column < 530


def test_an_object_in_the_last_row_is_found_where_padding_lies_behind_it():
    adapter = StardistAdapter(StarDist2D(Architecture(unet_n_depth=3, unet_n_filter_base=2)))
    height, width = 8 * 5 - 3, 8 * 5
    for row, found in ((0, 0), (1, 0), (2, 1), (height - 1, 1)):
        prob = torch.full((1, height, width), -20.0)
        prob[0, row, 20] = 20
        dist = torch.full((32, height, width), 6.0)
        labels = adapter.decode({"prob": prob, "dist": dist}, (height, width))
        assert labels.max() == found


def test_images_are_smoothed_before_they_get_smaller():
    noise = np.random.default_rng(0).normal(size=(1, 200, 200))
    assert resize_image(noise, (50, 50)).std() < 0.3
    assert resize_image(noise, (400, 400)).std() > 0.5


class TestCellpose:
    def test_small_diameters(self):
        check = pytest.importorskip("selfadapt_cellpose._options").check_options
        check(0.5, None, 0.4, 0.0, 15)
        with pytest.raises(ConfigError, match="diameter=0 "):
            check(0, None, 0.4, 0.0, 15)

    def test_other_networks(self):
        check = pytest.importorskip("selfadapt_cellpose._networks").check_network
        with pytest.raises(ModelError, match="a Conv2d is neither"):
            check(nn.Conv2d(1, 1, 1))

    def test_thin_images_are_squared_and_others_are_not(self):
        squared = pytest.importorskip("selfadapt_cellpose._normalize").squared
        least = np.random.default_rng(0).random((1, 16, 40))
        assert squared(least) is least
        assert min(squared(least[:, :15]).shape[1:]) >= 16

    def test_pixels_below_0_keep_their_contrast(self):
        transforms = pytest.importorskip("cellpose.transforms")
        from selfadapt_cellpose._normalize import normalize_part

        image = np.random.default_rng(0).uniform(-6, 4, (60, 70, 1)).astype(np.float32)
        given = {"invert": False, "normalize": True}
        ours = normalize_part(image, image, given)
        np.testing.assert_allclose(ours, transforms.normalize_img(image, **given), atol=1e-5)
