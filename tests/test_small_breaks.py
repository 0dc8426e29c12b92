"""What single small breaks of the code went unnoticed by (tests/campaigns/mutants.py)."""

import numpy as np
import pytest
import torch
from helpers import IMAGES, SmallAdapter, config, discs, trained_adapter
from torch import nn

from selfadapt import (
    Categorical,
    Config,
    ConfigError,
    ImageError,
    SelfAdaptation,
    adapt,
    estimate_quality,
)
from selfadapt._candidates import loops
from selfadapt._cli import main
from selfadapt._network import pick_device
from selfadapt_smp._names import parse_heads
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
    assert "arguments are required: images" in capsys.readouterr().err


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
    with pytest.raises(ConfigError, match="device 'cuda' cannot be used here"):
        pick_device("cuda")


def test_heads_give_logits_unless_said():
    assert parse_heads("foreground")["foreground"].logits
    assert not parse_heads("foreground", activated=True)["foreground"].logits


def test_the_teacher_is_kept_where_only_one_step_was_made():
    run = SelfAdaptation(trained_adapter(), config(ema_decay=0.9))
    before = run.teacher.stem[0].weight.clone()
    run.step(torch.from_numpy(np.stack([IMAGES[0][None, :32, :32]] * 2)))
    expected = 0.9 * before + 0.1 * run.student.stem[0].weight
    torch.testing.assert_close(run.teacher.stem[0].weight, expected.detach())
