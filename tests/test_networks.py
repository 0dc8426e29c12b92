"""Networks of every kind that people have: they work, or a sentence says why not."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import IMAGES, SmallAdapter, SmallNet, config, equal_states, run_adapt, trained_adapter
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from selfadapt import (
    ConfigError,
    EmbeddingDrift,
    ImageError,
    Judge,
    ModelError,
    OutputError,
    SelfAdaptation,
    adabn,
    adapt,
)
from selfadapt._batch_norm import batch_norms


@pytest.mark.filterwarnings("ignore:.*deprecated in favor:FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, spectral_norm, parametrizations.weight_norm])
def test_reparametrised_networks_adapt_and_stay_as_they_are(tmp_path, norm):
    adapter = SmallAdapter()
    norm(adapter.model.up[1])
    adapter.model(torch.zeros(1, 1, 32, 32))  # the old kinds now hold a tensor that was computed
    before = {name: t.clone() for name, t in adapter.model.state_dict().items()}
    result = run_adapt(adapter, tmp_path)
    assert equal_states(before, adapter.model.state_dict())
    adapted = result.adapter.model.state_dict()
    assert before.keys() == adapted.keys()
    assert not equal_states(before, adapted)


def test_compiled_networks_adapt_as_others_do(tmp_path, caplog):
    expected = run_adapt(SmallAdapter(), tmp_path / "plain").adapter.model.state_dict()
    assert "compile" not in caplog.text
    wrapped = SmallAdapter()
    wrapped.model = torch.compile(wrapped.model, backend="eager")
    found = run_adapt(wrapped, tmp_path / "wrapped").adapter.model
    assert equal_states(expected, found._orig_mod.state_dict())
    assert "compile" not in caplog.text
    in_place = SmallAdapter()
    in_place.model.compile(backend="eager")
    found = run_adapt(in_place, tmp_path / "in place").adapter.model
    assert equal_states(expected, found.state_dict())
    assert "works with plain copies" in caplog.text  # which torch makes of it


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_segment_and_adapt(tmp_path, kind):
    adapter = trained_adapter()
    expected = adapter.segment(IMAGES[0])
    adapter.model.to(kind)
    found = adapter.segment(IMAGES[0])
    assert (found > 0).sum() == pytest.approx((expected > 0).sum(), rel=0.05)
    result = run_adapt(adapter, tmp_path)
    assert all(t.dtype != kind for t in result.adapter.model.state_dict().values())


def test_torchs_default_precision_does_not_matter():
    runs = []
    for kind in (torch.float32, torch.float64):
        adapter = SmallAdapter()
        torch.set_default_dtype(kind)
        try:
            run = SelfAdaptation(adapter, config())
            run.fit(torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(k),
                               dtype=torch.float32) for k in range(3))  # fmt: skip
        finally:
            torch.set_default_dtype(torch.float32)
        runs.append(run.student.state_dict())
    assert equal_states(*runs)


def test_inference_mode_around_it_does_not_matter(tmp_path):
    expected = run_adapt(SmallAdapter(), tmp_path / "a")
    with torch.inference_mode():
        adapter = SmallAdapter()
        result = run_adapt(adapter, tmp_path / "b")
    assert equal_states(expected.adapter.model.state_dict(), result.adapter.model.state_dict())


def test_a_network_that_works_in_place_leaves_images_alone(tmp_path):
    class InPlace(SmallAdapter):
        def prepare(self, image, whole=None):
            return image  # as with normalize="none"

        def forward(self, model, images):
            images.mul_(0.5)
            return super().forward(model, images)

    images = [image.copy() for image in IMAGES]
    InPlace().segment(images[0])
    run_adapt(InPlace(), tmp_path)
    assert all(np.array_equal(*pair) for pair in zip(images, IMAGES, strict=True))
    batch = torch.rand(2, 1, 32, 32)
    given = batch.clone()
    SelfAdaptation(InPlace(), config(strength=0)).step(batch)
    assert torch.equal(batch, given)


def test_statistics_of_instance_norm_are_frozen_as_those_of_batch_norm():
    adapter = SmallAdapter()
    adapter.model.stem[1] = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    run = SelfAdaptation(adapter, config(batch_norm="source"))
    run.step(torch.rand(2, 1, 32, 32))
    assert torch.equal(run.student.stem[1].running_mean, torch.zeros(8))


class Pooled(SmallNet):
    """With batch norm behind global pooling, as in DeepLab: one value per channel and crop."""

    def __init__(self):
        super().__init__()
        self.pooled = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        )

    def forward(self, images):
        low = self.bottleneck(self.stem(images))
        return self.up(low + self.pooled(low))


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 1},
        {"batch_size": 1, "batch_norm": "batch"},
        {"batch_size": 3, "accumulate": 2, "batch_norm": "batch"},  # the last part has one crop
        {"batch_size": 1, "batch_norm": "target"},
    ],
)
def test_one_value_per_channel_keeps_its_statistics(tmp_path, changes):
    adapter = SmallAdapter()
    adapter.model = Pooled()
    adapter.model.pooled[2].running_mean.fill_(0.25)
    result = run_adapt(adapter, tmp_path, config=config(**changes))
    mean = result.adapter.model.pooled[2].running_mean
    if changes["batch_size"] == 1:
        assert torch.equal(mean, torch.full((16,), 0.25))
    assert not any(module._forward_pre_hooks for module in result.adapter.model.modules())


def test_adabn_of_one_crop_a_batch_measures_with_the_trained_statistics_where_it_must():
    adapter = SmallAdapter()
    adapter.model = Pooled()
    adapter.model.pooled[2].running_mean.fill_(0.25)
    measured = adabn(adapter, [torch.rand(1, 1, 32, 32) for _ in range(2)])
    assert torch.equal(measured.pooled[2].running_mean, torch.full((16,), 0.25))
    assert not torch.equal(measured.stem[1].running_mean, adapter.model.stem[1].running_mean)


class WithState(SmallNet):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


def spoiled():
    network = SmallNet()
    network.stem[1].running_var[0] = torch.nan
    return network


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (None, "model is missing: set `self.model`"),
        ("net.pt", "model is str"),
        (nn.DataParallel(SmallNet()), "wrapped in DataParallel: give.*model.module"),
        (nn.Sequential(nn.LazyConv2d(3, 3)), "lazy layers"),
        (nn.ReLU(), "no parameters"),
        (WithState(), "extra state"),
        (spoiled(), "NaN or infinit"),
    ],
)
def test_networks_that_cannot_be_used_are_refused(tmp_path, network, message):
    adapter = SmallAdapter()
    adapter.model = network
    with pytest.raises(ModelError, match=message):
        run_adapt(adapter, tmp_path / "run")
    with pytest.raises((ModelError, OutputError), match=message):
        adapter.segment(IMAGES[0])
    assert not (tmp_path / "run").exists()


def damaged(kind):
    class Damaged(SmallAdapter):
        def forward(self, model, images):
            outputs = super().forward(model, images)
            if kind == "no gradient":
                return {name: output.detach() for name, output in outputs.items()}
            if kind == "NaN":
                return {name: output * torch.nan for name, output in outputs.items()}
            return {"tensor": model(images), "nothing": None, "lists": {"flow": [1]}}[kind]

    return Damaged()


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("tensor", OutputError, "forward gives a Tensor: it must give tensors"),
        ("nothing", OutputError, "forward gives a NoneType"),
        ("lists", OutputError, "forward gives a dict"),
        ("NaN", OutputError, "NaN or infinity for held-out images"),
        ("no gradient", ModelError, "no gradient"),
    ],
)
def test_outputs_that_cannot_be_used_are_named(tmp_path, kind, error, message):
    with pytest.raises(error, match=message):
        run_adapt(damaged(kind), tmp_path / "run")


def test_nan_is_no_empty_label_image():
    with pytest.raises(OutputError, match="NaN or infinity for the image"):
        damaged("NaN").segment(IMAGES[0])


@pytest.mark.parametrize("raises", [False, True])
def test_adapt_leaves_everything_else_untouched(tmp_path, raises):
    class Failing(SmallAdapter):
        calls = 0

        def forward(self, model, images):
            self.calls += 1
            if raises and self.calls > 20:
                raise KeyError("a bug of one's own")
            return super().forward(model, images)

    adapter = Failing()
    adapter.model.train()
    adapter.model.stem[1].eval()  # each layer in a mode of its own
    adapter.model.stem[0].weight.requires_grad_(False)
    weights = {name: t.clone() for name, t in adapter.model.state_dict().items()}
    modes = [module.training for module in adapter.model.modules()]
    flags = [p.requires_grad for p in adapter.model.parameters()]
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    try:
        adapt(adapter, IMAGES, config=config(), stop=None, output_dir=tmp_path, progress=False)
    except KeyError:
        assert raises
    assert equal_states(weights, adapter.model.state_dict())
    assert modes == [module.training for module in adapter.model.modules()]
    assert flags == [p.requires_grad for p in adapter.model.parameters()]
    assert all(p.grad is None for p in adapter.model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert torch.is_grad_enabled()


def test_parts_that_do_not_adapt_stay_in_eval_mode():
    run = SelfAdaptation(SmallAdapter(), config(trainable="^up", batch_norm="source"))
    run.loss(torch.rand(2, 1, 32, 32))
    assert not any(part.training for part in run.student.bottleneck.modules())
    assert run.student.up.training
    trained = SelfAdaptation(SmallAdapter(), config(batch_norm="source"))
    trained.loss(torch.rand(2, 1, 32, 32))
    assert trained.student.bottleneck[2].training


def test_batch_statistics_are_taken_in_frozen_parts_too_where_that_is_asked_for():
    run = SelfAdaptation(SmallAdapter(), config(trainable="^up", batch_norm="batch"))
    layers = batch_norms(run.student)
    before = [layer.running_mean.clone() for layer in layers]
    run.loss(5 + torch.rand(2, 1, 32, 32))
    assert layers
    assert not any(torch.equal(b, n.running_mean) for b, n in zip(before, layers, strict=True))


def test_drift_of_a_bottleneck_that_nothing_moves_is_refused(adapter):
    blind = {"stop": EmbeddingDrift(), "progress": False}
    with pytest.raises(ConfigError, match=r"before the bottleneck adapts \(trainable="):
        adapt(adapter, IMAGES, config=config(trainable="^up"), **blind)
    moved = config(trainable="^up", batch_norm="batch")
    assert adapt(adapter, IMAGES, config=moved, **blind).history[-1]["d_emb"] > 0
    other = adapt(adapter, IMAGES, config=config(trainable="^up"), stop=None, progress=False)
    assert other.history[-1]["d_emb"] == 0


def test_a_loop_is_told_that_the_drift_sees_nothing_before_its_first_step(adapter):
    run = SelfAdaptation(adapter, config(trainable="^up"))
    judge = Judge(IMAGES[:2], monitors=[EmbeddingDrift()])
    with pytest.raises(ConfigError, match=r"before the bottleneck adapts \(trainable="):
        run.fit([torch.rand(2, 1, 32, 32)] * 3, stop=EmbeddingDrift(), judge=judge)
    assert run.iteration == 0
    steps = run.fit((torch.rand(2, 1, 32, 32) for _ in range(3)), judge=judge)
    assert len(steps) == 3, "the batch that was looked at is learnt from, too"


@pytest.mark.parametrize("place", ["step", "loss"])
def test_a_student_in_a_wrapper_is_refused(adapter, place):
    run = SelfAdaptation(adapter, config())
    run.student = nn.DataParallel(run.student)
    with pytest.raises(ModelError, match="wrapped in DataParallel: the run calls it by itself"):
        getattr(run, place)(torch.rand(2, 1, 32, 32))


class Lingering(nn.Dropout):
    """Long enough for another thread to seed the generator that all of them draw from."""

    def forward(self, images):
        time.sleep(0.1)
        return super().forward(images)


def test_two_threads_draw_what_each_draws_alone():
    adapter = SmallAdapter()
    adapter.model.bottleneck.append(Lingering())
    batch = torch.rand(2, 1, 32, 32)

    def runs():
        return [SelfAdaptation(adapter, config(seed=seed)) for seed in (0, 1)]

    def losses(run):
        return [run.loss(batch)[0].item() for _ in range(3)]

    alone = [losses(run) for run in runs()]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(losses, runs())) == alone


def test_a_callers_own_autocast_holds():
    kinds = []

    class Watching(SmallAdapter):
        def forward(self, model, images):
            outputs = super().forward(model, images)
            kinds.append(outputs["flow"].dtype)
            return outputs

    batch = torch.rand(2, 1, 32, 32)
    SelfAdaptation(Watching(), config()).loss(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = SelfAdaptation(Watching(), config()).loss(batch)
    SelfAdaptation(Watching(), config(precision="bfloat16")).loss(batch)
    assert kinds == [torch.float32] * 2 + [torch.bfloat16] * 4
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.bool])
def test_batches_of_integers_are_refused(kind):
    run = SelfAdaptation(SmallAdapter(), config())
    with pytest.raises(ImageError, match="crops of prepared images are floats"):
        run.loss(torch.ones(2, 1, 32, 32, dtype=kind))
