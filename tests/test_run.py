"""Runs: adapt, resume, stopping, do no harm, snapshots."""

import copy
import gc
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from helpers import IMAGES, SmallAdapter, config, discs, equal_states, run_adapt, trained_adapter
from safetensors.torch import load_file, save_file
from torch import nn

from selfadapt import (
    CheckpointError,
    Config,
    ConfigError,
    EmbeddingDrift,
    FalseNegativeRate,
    ImageError,
    Judge,
    ModelError,
    OutputError,
    OutputSpec,
    Prediction,
    SelfAdaptation,
    Vector,
    adapt,
    predict,
    prepare,
    write_report,
)
from selfadapt._disk import write_file
from selfadapt._lazy import LazyImage
from selfadapt._rundir import RunDirectory


def batches(count):
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(2, 1, 32, 32, generator=generator) for _ in range(count)]


def test_adapt_changes_a_copy_and_fills_the_folder(adapter, tmp_path):
    before = {n: t.clone() for n, t in adapter.model.state_dict().items()}
    result = run_adapt(adapter, tmp_path / "run")
    assert equal_states(before, adapter.model.state_dict())
    assert not equal_states(before, result.adapter.model.state_dict())
    assert result.iteration == 8
    assert result.snapshots == [0, 4, 8]
    names = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert names == {
        "config.json", "data.json", "history.csv", "looks.json", "pixels.json", "checkpoints",
        "snapshots", "examples", "model", "result.json", "input.json",
    }  # fmt: skip
    looked = [row for row in result.history if "d_emb" in row]
    assert [row["iteration"] for row in looked] == [0, 4, 8]
    for figure in ("fn_rate", "d_emb", "agreement", "stability", "instances", "size"):
        assert all(np.isfinite(row[figure]) for row in looked)
    assert looked[0]["d_emb"] == looked[0]["fn_rate"] == 0
    report = write_report(tmp_path / "run").read_text()
    assert report.count('<figure class="example"') == 2  # held-out images
    assert report.count('<img class="chart"') == 6  # curves
    reference = SmallAdapter()
    reference.model.load_state_dict(torch.load(tmp_path / "run" / "model"))
    np.testing.assert_array_equal(
        reference.with_model(reference.model.eval()).segment(IMAGES[0]),
        result.adapter.segment(IMAGES[0]),
    )


def test_without_a_folder_snapshots_can_be_selected_all_the_same(adapter):
    result = run_adapt(adapter, None, config=config(export="teacher"))  # drifts steadily
    first, last = result.select(0), result.select(8)
    assert equal_states(adapter.model.state_dict(), first.model.state_dict())
    assert equal_states(result.adapter.model.state_dict(), last.model.state_dict())
    at_four = next(row for row in result.history if row["iteration"] == 4)["d_emb"]
    chosen = result.select(EmbeddingDrift(at_four * 1.0001))
    assert equal_states(chosen.model.state_dict(), result.select(4).model.state_dict())
    with pytest.raises(CheckpointError, match=r"no snapshot 5; there are 0, 4, 8."):
        result.select(5)


def test_the_exported_weights_are_those_that_config_names(adapter):
    student = run_adapt(adapter, None, config=config(export="student"))
    teacher = run_adapt(adapter, None, config=config(export="teacher"))
    run = SelfAdaptation(adapter, config())
    assert run.exported is run.student
    start = torch.nn.utils.parameters_to_vector(adapter.model.parameters())
    far, near = (
        (torch.nn.utils.parameters_to_vector(r.adapter.model.parameters()) - start).norm().item()
        for r in (student, teacher)
    )
    assert far > near > 0


def test_the_state_resumes_bit_for_bit(adapter):
    data = batches(8)
    whole = SelfAdaptation(adapter, config())
    infos = [whole.step(batch) for batch in data]
    half = SelfAdaptation(adapter, config())
    for batch in data[:4]:
        half.step(batch)
    resumed = SelfAdaptation(adapter, config())
    resumed.load_state_dict(half.state_dict())
    for batch, info in zip(data[4:], infos[4:], strict=True):
        assert torch.equal(resumed.step(batch)["loss"], info["loss"])
    for name in ("student", "teacher"):
        assert equal_states(whole.state_dict()[name], resumed.state_dict()[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["config"].update(views=3), "setting views was 3, now it is 8"),
        (lambda s: s["model"].update({"stem.0.bias": "(8,) 0"}), "initial model's stem.0.bias"),
        (lambda s: s["model"].update({"extra": "(8,) 0"}), "initial model's extra"),
        (lambda s: s.update(outputs="OutputSpec(x)"), "heads"),
        (lambda s: s.pop("student"), "no state of a SelfAdaptation: student missing"),
    ],
)
def test_a_state_of_another_run_is_refused_by_name(adapter, change, message):
    run = SelfAdaptation(adapter, config())
    state = run.state_dict()
    state = {**state, "config": dict(state["config"]), "model": dict(state["model"])}
    change(state)
    with pytest.raises(CheckpointError, match=message):
        run.load_state_dict(state)


def plain(value):
    """A copy of a state with arrays in place of its tensors."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value.numpy().copy() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(optimizer=None),
        lambda s: s["optimizer"].pop("state"),
        lambda s: s["optimizer"].update(param_groups=[]),
        lambda s: s["optimizer"]["param_groups"][0].update(params=[0]),
        lambda s: s.update(generator=None),
        lambda s: s.update(generator=s["generator"][:7]),
        lambda s: s.update(generator=torch.zeros_like(s["generator"])),
        lambda s: s.update(view_generator=s["view_generator"].float()),
        lambda s: s["thresholds"].pop("cellprob"),
        lambda s: s["thresholds"].update(cellprob=0.5),
        lambda s: s["thresholds"].update(cellprob=torch.zeros(7)),
        lambda s: s.update(thresholds=None),
        lambda s: s.update(iteration="four"),
        lambda s: s.update(iteration=-4),
        lambda s: s["optimizer"]["param_groups"][0].pop("lr"),
        lambda s: s["optimizer"]["param_groups"][0].update(betas=None),
        lambda s: s["optimizer"]["param_groups"][0].update(eps="1"),
        lambda s: s["optimizer"]["state"][0]["exp_avg"].fill_(np.nan),
        lambda s: s["optimizer"]["state"][0].pop("exp_avg_sq"),
        lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(7)),
    ],
)
def test_a_damaged_state_is_refused_and_nothing_is_changed(adapter, change):
    run, other = SelfAdaptation(adapter, config()), SelfAdaptation(adapter, config())
    for batch in batches(2):
        run.step(batch)
    other.step(batches(3)[2])
    state, before = copy.deepcopy(other.state_dict()), plain(run.state_dict())
    change(state)
    with pytest.raises(CheckpointError, match=r"^the saved .*(damaged|other tensors)"):
        run.load_state_dict(state)
    np.testing.assert_equal(plain(run.state_dict()), before)


SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
from helpers import IMAGES, config, trained_adapter
from selfadapt import adapt
adapt(trained_adapter(), IMAGES, config=config(iterations=200, validate_every=4), stop=None,
      output_dir={out!r}, resume=True, progress=False)
"""


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(adapter, tmp_path):
    """kill -9 in the middle, then resume: the same bits as an uninterrupted run."""
    out = tmp_path / "killed"
    script = SCRIPT.format(tests=str(Path(__file__).parent), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "default.pt").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "result.json").exists()
    settings = config(iterations=200, validate_every=4)
    resumed = adapt(
        adapter, IMAGES, config=settings, stop=None, output_dir=out, resume=True, progress=False
    )
    whole = adapt(adapter, IMAGES, config=settings, stop=None, progress=False)
    assert equal_states(whole.adapter.model.state_dict(), resumed.adapter.model.state_dict())
    assert (out / "result.json").exists()
    np.testing.assert_equal(resumed.history, whole.history)


def test_resuming_a_finished_run_gives_its_result_again(adapter, tmp_path):
    first = run_adapt(adapter, tmp_path)
    again = run_adapt(adapter, tmp_path, resume=True)
    assert again.reason == first.reason
    assert equal_states(first.adapter.model.state_dict(), again.adapter.model.state_dict())


@pytest.mark.parametrize(
    ("prepare_folder", "changes", "message"),
    [
        (lambda p: p.write_text("x"), {}, "is a file"),
        (lambda p: (p.mkdir(), (p / "data.txt").write_text("x")), {}, "holds other files"),
        (lambda p: (p.mkdir(), (p / "config.json").write_text("{}")), {}, "holds another run"),
        (
            lambda p: (p.mkdir(), (p / "config.json").write_text('{"iterations": 3}')),
            {"resume": True},
            "with iterations = 3, not 8",
        ),
        (
            lambda p: (p.mkdir(), (p / "config.json").write_text("{")),
            {"resume": True},
            "is damaged",
        ),
    ],
)
def test_a_folder_that_holds_something_else_is_refused(
    adapter, tmp_path, prepare_folder, changes, message
):
    prepare_folder(tmp_path / "run")
    with pytest.raises(CheckpointError, match=message):
        run_adapt(adapter, tmp_path / "run", **changes)


@pytest.mark.parametrize("content", [b"garbage", b""])
def test_a_damaged_checkpoint_is_refused(adapter, tmp_path, content):
    run_adapt(adapter, tmp_path)
    (tmp_path / "checkpoints" / "default.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        run_adapt(adapter, tmp_path, resume=True)


def test_a_checkpoint_of_another_model_is_refused(adapter, tmp_path):
    run_adapt(adapter, tmp_path)
    with pytest.raises(CheckpointError, match="a run with model = "):
        run_adapt(SmallAdapter(seed=3), tmp_path, resume=True)


def test_bad_images_leave_no_folder(adapter, tmp_path):
    with pytest.raises(ImageError):
        adapt(adapter, [np.zeros((40, 40))], output_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_criterion_that_trips_at_once_returns_the_initial_weights(adapter):
    result = run_adapt(adapter, None, stop=EmbeddingDrift(1e-9))
    assert result.iteration == 0
    assert "the initial weights are kept" in result.reason
    assert equal_states(adapter.model.state_dict(), result.adapter.model.state_dict())


def test_a_criterion_that_trips_later_keeps_the_snapshot_before(adapter):
    settings = config(iterations=12, export="teacher")  # drifts steadily
    free = run_adapt(adapter, None, config=settings)
    drift = {row["iteration"]: row["d_emb"] for row in free.history if "d_emb" in row}
    assert drift[4] < drift[8]
    between = EmbeddingDrift((drift[4] + drift[8]) / 2)
    result = run_adapt(adapter, None, config=settings, stop=between)
    assert result.iteration == 4
    assert result.history[-1]["iteration"] == 8
    assert "EmbeddingDrift" in result.reason
    assert equal_states(free.select(4).model.state_dict(), result.adapter.model.state_dict())


def test_any_callable_may_stop(adapter):
    seen = []

    def stop(run, info):
        seen.append((run.iteration, info["instances"]))
        return run.iteration == 8

    result = run_adapt(adapter, None, config=config(iterations=100), stop=stop)
    assert [at for at, _ in seen] == [4, 8]
    assert result.iteration == 4


def test_a_loss_that_is_not_finite_returns_the_initial_weights(adapter):
    result = run_adapt(adapter, None, config=config(learning_rate=1e30, warmup=0.0))
    assert result.iteration == 0
    assert "not finite" in result.reason
    once = run_adapt(NoDecode(), None, config=config(iterations=1, learning_rate=1e30, warmup=0.0))
    assert once.iteration == 0
    assert equal_states(adapter.model.state_dict(), result.adapter.model.state_dict())


class Forgetful(SmallAdapter):
    """Finds nothing with any network but the one it was given: all instances are lost."""

    def forward(self, model, images):
        outputs = super().forward(model, images)
        same = torch.equal(model.up[1].bias, self.model.up[1].bias)
        return outputs if same else outputs | {"cellprob": outputs["cellprob"] - 1e3}


def test_a_collapse_returns_the_initial_weights(adapter):
    forgetful = Forgetful()
    forgetful.model = adapter.model
    result = adapt(
        forgetful, IMAGES[:1], config=config(validation_images=1), stop=None, progress=False
    )
    assert result.iteration == 0
    assert "no instance is left" in result.reason


def looks(*values, name="agreement"):
    return [{"iteration": 4 * k, name: value} for k, value in enumerate(values)]


def test_what_monitors_choose_of_a_history():
    assert EmbeddingDrift(0.5).choose(looks(0.0, 0.4, 0.6, 0.3, name="d_emb")) == 4
    assert EmbeddingDrift(0.5).choose(looks(0.0, 0.6, name="d_emb")) == 0


class NoDecode(SmallAdapter):
    decode = SmallAdapter.__mro__[1].decode


def test_without_decode_the_fn_rate_cannot_stop_and_drift_can():
    with pytest.raises(ModelError, match="cannot decode instances"):
        adapt(NoDecode(), IMAGES, config=config(), stop=FalseNegativeRate(), progress=False)
    result = adapt(NoDecode(), IMAGES, config=config(), stop=EmbeddingDrift(2.1), progress=False)
    assert result.iteration == 8
    by_default = adapt(NoDecode(), IMAGES, config=config(), progress=False)
    assert "no criterion tripped" in by_default.reason
    with pytest.raises(ModelError, match="cannot decode"):
        result.adapter.segment(IMAGES[0])


class NoBottleneck(SmallAdapter):
    def embedding_module(self, model):
        return None


def test_without_a_bottleneck_drift_cannot_stop(adapter):
    blind = NoBottleneck()
    blind.model = adapter.model
    with pytest.raises(ConfigError, match="NoBottleneck names none"):
        adapt(blind, IMAGES, config=config(), stop=EmbeddingDrift(), progress=False)
    result = adapt(blind, IMAGES, config=config(), stop=FalseNegativeRate(1.1), progress=False)
    assert np.isnan(result.history[-1]["d_emb"])


class TwoScales(nn.Module):
    """Sees what was learnt, and then the images as they are, with the same layer."""

    def __init__(self):
        super().__init__()
        self.learnt, self.shared = nn.Conv2d(1, 3, 1), nn.ReLU()

    def forward(self, images):
        return self.shared(self.learnt(images)) + self.shared(images)


def test_a_bottleneck_that_runs_twice_moves_if_one_of_the_two_does():
    adapter = SmallAdapter()
    adapter.model = TwoScales()
    adapter.embedding_module = lambda model: model.shared
    SelfAdaptation(adapter, config()).refuse_blind(EmbeddingDrift(), batches(1)[0])
    adapter.embedding_module = lambda model: model.early
    adapter.model.early = nn.Identity()
    adapter.model.register_forward_pre_hook(lambda model, given: (model.early(given[0]), None)[1])
    with pytest.raises(ConfigError, match="would see nothing"):
        SelfAdaptation(adapter, config()).refuse_blind(EmbeddingDrift(), batches(1)[0])


def test_without_initial_instances_the_fn_rate_says_so():
    adapter = SmallAdapter()
    with torch.no_grad():
        adapter.model.up[1].bias[2] = -100
    with pytest.raises(ConfigError, match="finds no instance"):
        adapt(adapter, IMAGES, config=config(), stop=FalseNegativeRate(), progress=False)


class WrongSpec(SmallAdapter):
    def forward(self, model, images):
        return OutputSpec(flow=Vector()).split(model(images))


def test_a_spec_that_does_not_fit_the_network_is_refused_before_the_run(tmp_path):
    with pytest.raises(OutputError, match="gives 3 channels, the heads ask for 2"):
        adapt(WrongSpec(), IMAGES, config=config(), output_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_validation_images_may_be_given_and_sizes_may_differ(adapter):
    held_out = [discs(7, (40, 200))[0], discs(8, (90, 33))[0]]
    result = adapt(
        adapter, IMAGES, validation=held_out, config=config(validation_size=64), stop=None,
        progress=False,
    )  # fmt: skip
    assert np.isfinite(result.history[-1]["stability"])


def test_fit_and_iterate_in_somebody_elses_code(adapter):
    run = SelfAdaptation(adapter, config(iterations=100))
    history = run.fit(batches(20), judge=Judge(IMAGES[:2]), stop=lambda r, i: r.iteration == 6)
    assert len(history) == run.iteration == 6
    assert ["d_emb" in row for row in history] == [False, False, False, True, False, False]
    for info in run.iterate(batches(20)):
        assert bool(info["loss"].isfinite())
        if run.iteration == 9:
            break
    assert run.iteration == 9


def test_fit_says_if_it_ended_before_the_first_look(adapter, caplog):
    run = SelfAdaptation(adapter, config(iterations=100, validate_every=4))
    judge = Judge(IMAGES[:2])
    run.fit(batches(3), judge=judge)
    assert "ended at iteration 3, before a look" in caplog.text
    caplog.clear()
    run.fit(batches(1), judge=judge)
    run.fit(batches(5), judge=judge)  # the look is not at its end
    assert not caplog.text


def test_monitors_by_hand(adapter):
    run = SelfAdaptation(adapter, config(learning_rate=1e-2))
    run.fit(batches(8))
    drift, missed = EmbeddingDrift(), FalseNegativeRate()
    for image in IMAGES[:2]:
        prepared = prepare(adapter, image[None], "image")
        first = predict(adapter, run.initial, prepared)
        now = predict(adapter, run.student, prepared)
        drift.update(first, now)
        missed.update(first, now)
    assert 0 < drift.compute() <= 2
    assert 0 <= missed.compute() <= 1
    drift.reset()
    assert np.isnan(drift.compute())


def test_drift_is_eq_4():
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=9), rng.normal(size=9)) for _ in range(5)]
    for unit_norm in (True, False):
        drift = EmbeddingDrift(unit_norm=unit_norm)
        expected = []
        for a, b in pairs:
            drift.update(*(Prediction({}, torch.from_numpy(e), None) for e in (a, b)))
            norms = (np.linalg.norm(a), np.linalg.norm(b)) if unit_norm else (1, 1)
            expected.append(np.linalg.norm(a / norms[0] - b / norms[1]))
        np.testing.assert_allclose(drift.compute(), np.mean(expected))


def test_the_embedding_is_the_mean_of_the_hooked_layer(adapter):
    image = prepare(adapter, IMAGES[0][None], "image")
    features = adapter.model.stem(image[None])
    features = adapter.model.bottleneck.eval()(features)
    got = predict(adapter, adapter.model, image).embedding
    torch.testing.assert_close(got, features.mean((0, 2, 3)).detach())


def test_what_was_rejected_is_shown(adapter, tmp_path):
    result = adapt(
        adapter, IMAGES, config=config(candidates="default,gentle"), output_dir=tmp_path,
        progress=False,
    )  # fmt: skip
    assert result.outcome == "initial kept"
    told = RunDirectory(tmp_path).read_json("result.json")["rejected"]
    assert told in {row["candidate"] for row in result.history} - {"initial"}
    rejected = tifffile.imread(tmp_path / "examples" / "0-rejected.tif")
    networks = [result.select(name) for name in result.snapshots if name != 0]
    pixels = torch.from_numpy(tifffile.imread(tmp_path / "examples" / "0-image.tif"))[None]
    found = [predict(each, each.model, pixels.reshape(1, *pixels.shape[-2:])).instances
             for each in networks]  # fmt: skip
    assert any(np.array_equal(rejected, each) for each in found)
    page = write_report(tmp_path).read_text()
    assert "The run" in page
    assert "4, and 2 held out" in page
    assert f"Rejected: {told}" in page
    kept = run_adapt(adapter, tmp_path / "other")  # another criterion has kept a later one
    assert kept.iteration > 0
    assert not list((tmp_path / "other" / "examples").glob("*rejected*"))


def test_examples_in_the_folder_are_label_images(adapter, tmp_path):
    run_adapt(adapter, tmp_path)
    before = tifffile.imread(tmp_path / "examples" / "0-before.tif")
    image = tifffile.imread(tmp_path / "examples" / "0-image.tif")
    assert before.dtype == np.int32
    assert before.shape == image.shape[-2:]
    assert len(RunDirectory(tmp_path).read_json("result.json")["examples"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 0}, "iterations=0"),
        ({"views": 9}, "views=9.*between 1 and 8"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0.*above 0"),
        ({"keep_regression": 1.5}, "keep_regression=1.5.*between 0 and 1"),
        ({"batch_norm": "train"}, "batch_norm='train'.*'auto' or 'source' or 'target' or 'batch'"),
        ({"contrast": 1.0}, "contrast=1.0"),
        ({"ema_decay": 1.0}, "the teacher never moves"),
        ({"trainable": "("}, "no regular expression"),
        ({"gradient_clip": 0.0}, "gradient_clip=0.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"learning_rate": float("inf")}, "learning_rate=inf.*finite float"),
        ({"iterations": 2.5}, "iterations=2.5.*finite int"),
        ({"batch_size": "8"}, "batch_size='8'.*finite int"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        Config(**changes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 32, 32), "square crops"),
        ((2, 1, 32, 40), "square crops"),
        ((0, 1, 32, 32), "square crops"),
        ((2, 3, 32, 32), "3 channels, the network takes 1"),
        ((2, 1, 33, 33), "33 pixels were given; the network takes a multiple of 2"),
    ],
)
def test_batches_of_the_wrong_shape_are_refused(shape, message):
    with pytest.raises(ImageError, match=message):
        SelfAdaptation(SmallAdapter(), config()).loss(torch.rand(shape))


def test_settings_that_select_nothing_are_refused(adapter):
    with pytest.raises(ConfigError, match=r"selects no parameter.*stem\.0\.weight"):
        SelfAdaptation(adapter, config(trainable="decoder"))
    with pytest.raises(ConfigError, match="device='nonsense' is not allowed"):
        SelfAdaptation(adapter, config(device="nonsense"))
    with pytest.raises(ConfigError, match="threshold=0"):
        EmbeddingDrift(0)
    with pytest.raises(ConfigError, match="iou=2"):
        FalseNegativeRate(iou=2)
    with pytest.raises(ConfigError, match="resume=True needs output_dir"):
        adapt(adapter, IMAGES, config=config(), resume=True)


def test_resuming_with_another_criterion_is_refused(adapter, tmp_path):
    run_adapt(adapter, tmp_path, stop=EmbeddingDrift(1e-9))
    for other in (None, EmbeddingDrift(1e-8), lambda run, info: False):
        with pytest.raises(CheckpointError, match="a run with stop = "):
            run_adapt(adapter, tmp_path, stop=other, resume=True)


def test_resuming_on_other_images_is_refused(adapter, tmp_path):
    run_adapt(adapter, tmp_path)
    with pytest.raises(CheckpointError, match="Give the same images"):
        adapt(adapter, IMAGES[:5], config=config(), output_dir=tmp_path, resume=True, stop=None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("history.csv", "iteration,loss\nx,y\n"),
        ("history.csv", "iteration,loss\n4,1\n"),
        ("data.json", "[1]"),
        ("config.json", "[1]"),
    ],
)
def test_damaged_files_of_a_run_are_named(adapter, tmp_path, name, content):
    run_adapt(adapter, tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=name):
        run_adapt(adapter, tmp_path, resume=True)


def test_foreign_checkpoints_and_damaged_snapshots_are_refused(adapter, tmp_path):
    result = run_adapt(adapter, tmp_path)
    (tmp_path / "snapshots" / "000004.safetensors").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match=r"000004\.safetensors is damaged"):
        result.select(4)
    for foreign in ([1, 2], {"weights": torch.zeros(2)}):
        torch.save(foreign, tmp_path / "checkpoints" / "default.pt")
        with pytest.raises(CheckpointError, match=r"it holds a list|no state of a SelfAdapt"):
            run_adapt(adapter, tmp_path, resume=True)


def test_a_folder_that_was_killed_while_it_was_made_can_be_used(adapter, tmp_path):
    (tmp_path / "config.json.partial").write_text("{")
    assert run_adapt(adapter, tmp_path).iteration == 8


def test_a_monitor_that_nothing_measures_is_refused(adapter):
    run = SelfAdaptation(adapter, config())
    with pytest.raises(ConfigError, match="would never stop"):
        run.fit(batches(2), stop=EmbeddingDrift())
    with pytest.raises(ConfigError, match="would never stop"):
        run.fit(batches(2), stop=FalseNegativeRate(iou=0.9), judge=Judge(IMAGES[:1]))
    blind = NoBottleneck()
    blind.model = adapter.model
    result = adapt(blind, IMAGES, config=config(), stop=None, progress=False)
    for wrong in ({"stop": "fn"}, {"config": {}}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}(=| is a)"):
            adapt(adapter, IMAGES, **wrong)
    with pytest.raises(ConfigError, match="give an Adapter"):
        adapt("my_unet", IMAGES)
    for unmeasured in (EmbeddingDrift(unit_norm=False), FalseNegativeRate(iou=0.95)):
        with pytest.raises(ConfigError, match="was not measured"):
            result.select(unmeasured)
    with pytest.raises(ConfigError, match="give Judge"):
        run.fit(batches(2), judge=[torch.zeros(1, 32, 32)])
    with pytest.raises(ImageError, match=r"give image\[None\]"):
        prepare(adapter, IMAGES[0], "nuclei")
    with pytest.raises(ImageError, match="no images"):
        Judge([])


class Named(EmbeddingDrift):
    name = "mine"


def test_a_monitor_of_ones_own_stops_beside_the_papers(adapter):
    result = run_adapt(adapter, None, stop=Named(1e-9))
    assert result.iteration == 0
    assert {"mine", "d_emb", "fn_rate"} <= result.history[-1].keys()


def test_two_runs_do_not_share_a_folder(adapter, tmp_path):
    first = RunDirectory(tmp_path / "run")
    first.start(config(), {}, resume=False)
    second = RunDirectory(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another process is at work"):
        second.start(config(), {}, resume=True)
    first.release()
    with pytest.raises(CheckpointError, match="holds another run"):  # it came in between
        second.start(config(), {}, resume=False)
    second.release()
    second.start(config(), {}, resume=True)
    second.release()


@pytest.mark.parametrize(
    "name", ["history.csv", "report.html.partial", "snapshots/000000.safetensors"]
)
def test_links_do_not_lead_out_of_the_folder_of_a_run(adapter, tmp_path, name):
    run_adapt(adapter, tmp_path / "run")
    (tmp_path / "mine").write_text("keep me")
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="is a link: a run has plain files"):
        run_adapt(adapter, tmp_path / "run", resume=True)
    write_file(tmp_path / "run" / name, b"new")
    assert (tmp_path / "mine").read_text() == "keep me"
    assert (tmp_path / "run" / name).read_bytes() == b"new"


def test_a_link_in_the_place_of_an_unfinished_file_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("keep me")
    (tmp_path / "a.partial").symlink_to(tmp_path / "mine")
    write_file(tmp_path / "a", b"new")
    assert (tmp_path / "mine").read_text() == "keep me"
    assert (tmp_path / "a").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "mine"]


def test_a_file_is_flushed_before_it_takes_its_name(tmp_path, monkeypatch):
    order = []
    replace, fsync = os.replace, os.fsync

    def flushed(handle):
        order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def renamed(source, target):
        order.append(f"{Path(source).name} -> {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    write_file(tmp_path / "a", b"1")
    assert order == ["a.partial", "a.partial -> a", tmp_path.name]
    directory = RunDirectory(tmp_path)
    for content in ("one", "two"):
        order.clear()
        with directory.replacing("model") as partial:
            partial.mkdir()
            (partial / "weights").write_text(content)
    assert order == ["weights", "model.partial", "model -> model.old", "model.partial -> model",
                     tmp_path.name]  # fmt: skip
    assert (tmp_path / "model" / "weights").read_text() == "two"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "model"]


def test_what_cannot_be_written_is_said_and_leaves_what_was_there(tmp_path):
    write_file(tmp_path / "a", b"old")
    with pytest.raises(CheckpointError, match=r"'.*b/c' cannot be written \(No such file"):
        write_file(tmp_path / "b" / "c", b"new")
    directory = RunDirectory(tmp_path)
    with pytest.raises(KeyError), directory.replacing("a"):  # a bug is no full disk
        raise KeyError
    assert (tmp_path / "a").read_bytes() == b"old"


def test_nan_in_a_snapshot_is_never_exported(adapter, tmp_path):
    run_adapt(adapter, tmp_path)
    file = tmp_path / "snapshots" / "000008.safetensors"
    tensors = load_file(file)
    tensors["stem.0.weight"][0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"000008.safetensors is damaged: it holds NaN"):
        run_adapt(adapter, tmp_path, resume=True)


def test_what_a_run_began_with_is_recorded_and_asked_for_again(adapter, tmp_path):
    class Other(SmallAdapter):
        def __init__(self, model, threshold):
            super().__init__()
            self.model, self.threshold = model, threshold

    first = Other(adapter.model, threshold=0.5)
    run_adapt(first, tmp_path)
    told = json.loads((tmp_path / "data.json").read_text())
    assert told["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert told["options"]["threshold"] == "0.5"
    changed = [image + (k == 3) for k, image in enumerate(IMAGES)]  # the same names
    options = {"config": config(), "output_dir": tmp_path, "stop": None, "progress": False}
    with pytest.raises(CheckpointError, match=r"with (images|held_out) = .*image 3"):
        adapt(first, changed, resume=True, **options)
    with pytest.raises(CheckpointError, match=r'with options: threshold = "0.5", not "0.7"'):
        run_adapt(Other(adapter.model, threshold=0.7), tmp_path, resume=True)
    (tmp_path / "data.json").write_text(json.dumps(told | {"format": 1}))
    with pytest.raises(CheckpointError, match="with format = 1, not 3"):
        run_adapt(first, tmp_path, resume=True)


def test_an_image_that_vanishes_ends_the_run_which_can_go_on(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("selfadapt._crops.CACHE_BYTES", 0)
    (tmp_path / "images").mkdir()
    for k, image in enumerate(IMAGES):
        tifffile.imwrite(tmp_path / "images" / f"{k}.tif", image)

    def go(folder, stop, **options):
        return adapt(adapter, tmp_path / "images", config=config(), output_dir=folder, stop=stop,
                     progress=False, **options)  # fmt: skip

    def vanish(run, info):
        for file in (tmp_path / "images").glob("*.tif"):
            file.rename(file.with_suffix(".kept"))
        return False

    def nothing(run, info):
        return False

    vanish.__qualname__ = nothing.__qualname__ = "stop"
    expected = go(tmp_path / "a", nothing)
    with pytest.raises(ImageError, match="It was used before: put it back"):
        go(tmp_path / "b", vanish)
    for file in (tmp_path / "images").iterdir():
        file.rename(file.with_suffix(".tif"))
    result = go(tmp_path / "b", nothing, resume=True)
    assert equal_states(expected.adapter.model.state_dict(), result.adapter.model.state_dict())


def test_a_late_image_that_was_changed_meanwhile_ends_the_run(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("selfadapt._crops.CHECKED", 1)  # the others are read when they are drawn
    (tmp_path / "images").mkdir()
    for k, image in enumerate(IMAGES):
        tifffile.imwrite(tmp_path / "images" / f"{k}.tif", image)

    kills = [4, 8]

    def stop(run, info):
        if kills[:1] == [run.iteration]:
            kills.pop(0)
            raise InterruptedError

    go = partial(
        adapt, adapter, tmp_path / "images", validation=IMAGES[0], config=config(),
        output_dir=tmp_path / "run", stop=stop, progress=False,
    )  # fmt: skip
    with pytest.raises(InterruptedError):
        go()
    used = json.loads((tmp_path / "run" / "pixels.json").read_text())["used"]
    assert len(used) > 1
    for key in used.keys() - {"0"}:  # which the check of a resumed run sees
        tifffile.imwrite(tmp_path / "images" / f"{key}.tif", IMAGES[int(key)] + 1)
    with pytest.raises(ImageError, match=r"tif has other pixels than before\. It was used before"):
        go(resume=True)
    for key in used:
        tifffile.imwrite(tmp_path / "images" / f"{key}.tif", IMAGES[int(key)])
    with pytest.raises(InterruptedError):
        go(resume=True)


class AnyChannels(SmallAdapter):
    """Does not say how many channels its network takes."""

    channels = None


def test_held_out_images_that_the_network_fails_on_are_named(adapter):
    own = AnyChannels().with_model(adapter.model)
    colour = np.stack([IMAGES[0]] * 3)
    with pytest.raises(OutputError, match=r"image 0: the network fails on .* 3 channel\(s\), 64 x"):
        adapt(own, IMAGES, validation=[colour], channel_axis=0, config=config(), progress=False)
    with pytest.raises(OutputError, match="the network fails on an image of 3 channel"):
        own.segment(colour, channel_axis=0)


def test_memory_is_flat_over_many_runs(adapter, tmp_path):
    def used():
        gc.collect()
        tensors = (t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))
        return sum(t.numel() for t in tensors)

    held = []
    for _ in range(30 if "SELFADAPT_EXAMPLES" in os.environ else 4):
        adapt(adapter, IMAGES[:2], config=config(iterations=2), stop=None, progress=False)
        held.append(used())
    assert max(held[2:]) <= held[1]


@pytest.mark.parametrize("place", range(4))
def test_an_image_of_other_channels_costs_no_other_wherever_it_lies(place, caplog):
    images = IMAGES[:3]
    images.insert(place, np.stack([IMAGES[3]] * 3))
    sources = [LazyImage(f"{k}", partial(np.reshape, image, (-1, *image.shape[-2:])))
               for k, image in enumerate(images)]  # fmt: skip
    small = config(iterations=1, validate_every=1, validation_images=1)
    result = adapt(trained_adapter(), sources, config=small, progress=False)
    assert result.outcome
    assert sum(f"{place} has 3 channel(s)" in text for text in caplog.messages) == 1


def test_no_decode_meets_what_is_not_finite():
    class Strict(SmallAdapter):
        def decode(self, outputs, size):
            assert all(output.isfinite().all() for output in outputs.values())
            return super().decode(outputs, size)

    adapter = Strict()
    with torch.no_grad():
        adapter.model.up[1].bias[2] = torch.nan
    with pytest.raises(OutputError, match="NaN or infin"):
        adapter.segment(IMAGES[0])
    look = Judge(IMAGES[:1]).look(adapter, adapter.model)
    assert not look.finite
    assert look.count.sum() == 0
