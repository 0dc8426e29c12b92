"""Several ways to adapt under one judge: the course of a run, killed, resumed and broken."""

import copy

import numpy as np
import pytest
import torch
from helpers import IMAGES, config, equal_states, run_adapt

from selfadapt import (
    CheckpointError,
    ConfigError,
    Crops,
    EmbeddingDrift,
    Input,
    Judge,
    Look,
    SelfAdaptation,
    adapt,
    open_images,
)
from selfadapt._candidates import loops
from selfadapt._verdict import decide

EVERY = {"candidates": "auto", "iterations": 16, "validation_images": 4}


class KilledError(Exception):
    """In place of kill -9."""


@pytest.mark.parametrize("looks", [2, 4, 6, 9])
def test_a_run_of_several_ways_goes_on_where_it_was_killed(adapter, tmp_path, monkeypatch, looks):
    """Killed at a look, and resumed: the same rows and the same choice as uninterrupted."""
    settings = config(**EVERY)
    whole = adapt(adapter, IMAGES, config=settings, output_dir=tmp_path / "a", progress=False)
    ways = [row["candidate"] for row in whole.history if "stability" in row]
    assert {"default", "batch", "gentle", "bold", "teacher"} <= set(ways)
    look, count = Judge.look, []

    def killed(self, *args):
        count.append(1)
        if len(count) > looks:
            raise KilledError
        return look(self, *args)

    monkeypatch.setattr(Judge, "look", killed)
    with pytest.raises(KilledError):
        adapt(adapter, IMAGES, config=settings, output_dir=tmp_path / "b", progress=False)
    monkeypatch.undo()
    told = []
    again = adapt(
        adapter, IMAGES, config=settings, output_dir=tmp_path / "b", resume=True, progress=False,
        callback=told.append,
    )  # fmt: skip
    last = [event for event in told if event.stage == "adaptation"][-1]
    assert last.done == last.total
    np.testing.assert_equal(again.history, whole.history)
    assert (again.candidate, again.iteration) == (whole.candidate, whole.iteration)
    assert again.snapshots == whole.snapshots
    assert equal_states(whole.adapter.model.state_dict(), again.adapter.model.state_dict())


def test_the_less_promising_half_of_the_ways_ends_early(adapter):
    result = adapt(adapter, IMAGES, config=config(**EVERY), progress=False)
    last = {row["candidate"]: row["iteration"] for row in result.history}
    ends = sorted(last[name] for name in ("default", "batch", "gentle", "bold"))
    assert ends == [4, 4, 8, 16]


def test_one_way_by_name_is_the_only_one(adapter):
    result = adapt(adapter, IMAGES, config=config(candidates="bold"), progress=False)
    ways = {row["candidate"] for row in result.history}
    assert ways == {"initial", "statistics-50", "statistics-100", "bold"}
    assert "bold-8" in result.snapshots
    assert equal_states(result.select(0).model.state_dict(), adapter.model.state_dict())
    with pytest.raises(ConfigError, match="candidates='bald' is not allowed"):
        config(candidates="bald")


def test_ways_differ_as_their_names_say(adapter):
    ways = loops(config(candidates="auto", learning_rate=1e-3), adapter.model)
    assert ways["batch"].batch_norm == "batch"
    assert ways["gentle"].learning_rate < 1e-3 < ways["bold"].learning_rate
    assert ways["default"] == config(candidates="auto", learning_rate=1e-3)
    plain = torch.nn.Conv2d(1, 1, 1)
    assert "batch" not in loops(config(candidates="auto"), plain)


def test_a_way_that_breaks_leaves_the_others(adapter, monkeypatch):
    """Broken in the second stage: on resume it has still won the first."""
    step = SelfAdaptation.step

    def breaks(self, images):
        info = step(self, images)
        if self.config.learning_rate > 3e-3 and self.iteration > 2:
            info["loss"] = info["loss"] * float("nan")
        return info

    monkeypatch.setattr(SelfAdaptation, "step", breaks)
    result = adapt(adapter, IMAGES, config=config(**EVERY), progress=False)
    assert "bold: loss, weights or predictions are not finite any more after iteration 4" in (
        result.reason
    )
    last = {row["candidate"]: row["iteration"] for row in result.history}
    assert max(last[name] for name in ("default", "batch", "gentle")) == 16


@pytest.mark.parametrize("head", ["flow", "cellprob"])
def test_a_way_whose_masks_keep_nothing_of_one_head_ends_and_names_it(adapter, monkeypatch, head):
    """In the mean over the heads it would not show."""
    step = SelfAdaptation.step

    def masked(self, images):
        info = step(self, images)
        if self.iteration > 2:
            info[f"kept_{head}"] = info[f"kept_{head}"] * 0
        return info

    monkeypatch.setattr(SelfAdaptation, "step", masked)
    told = f"the masks keep no pixel of head '{head}' any more after iteration 4"
    result = adapt(adapter, IMAGES, config=config(candidates="bold"), progress=False)
    assert f"bold: {told}; " in result.reason
    rows = [row for row in result.history if row["candidate"] == "bold"]
    assert rows[-1]["iteration"] == 4
    assert rows[-1]["kept"] > 0
    result = adapt(adapter, IMAGES, config=config(), stop=None, progress=False)
    assert (result.iteration, result.reason) == (0, f"{told}; the initial weights are kept")


def test_all_looks_count_as_tries_even_if_their_weights_are_gone():
    counts = np.array([[6, 3, 3]] * 16)
    better = np.array([[8, 1, 1]] * 8 + [[6, 3, 3]] * 4 + [[7, 2, 2]] * 4)
    many = np.full(16, 9)

    def look(scaled):
        both = np.stack([scaled, scaled])
        found = np.array([[9, 0, 0]] * 16)
        return Look(np.stack([found, found]), both, np.stack([found, found]), found, many, 50.0)

    first, later = look(counts), look(better)
    assert decide(first, [later], tried=1).outcome == "improved"
    assert decide(first, [later], tried=10**9).chosen is None


def test_of_the_good_looks_of_one_loop_the_latest_is_kept():
    def look(hits):
        scaled = np.array([[hits, 10 - hits, 10 - hits]] * 16)
        both = np.stack([scaled, scaled])
        found = np.array([[10, 0, 0]] * 16)
        return Look(np.stack([found] * 2), both, np.stack([found] * 2), found, np.full(16, 9), 50.0)

    first, early, late, collapsed = look(7), look(9), look(8), look(2)
    assert decide(first, [early, late]).chosen == 0
    assert decide(first, [early, late], loops=["a", "a"]).chosen == 1
    assert decide(first, [early, late], loops=["a", "b"]).chosen == 0
    assert decide(first, [early, collapsed], loops=["a", "a"]).chosen == 0


def test_resuming_with_another_input_is_refused(adapter, tmp_path):
    run_adapt(adapter, tmp_path)
    other = adapter.with_model(adapter.model)
    other.input = Input(low=2.0)
    with pytest.raises(CheckpointError, match="holds a run with input"):
        run_adapt(other, tmp_path, resume=True)


def test_a_later_network_that_the_judge_does_not_prefer_is_not_called_improved(adapter):
    result = adapt(adapter, IMAGES, config=config(learning_rate=1e-7), stop=None, progress=False)
    assert result.iteration == 8
    assert result.outcome in ("not judged better", "not to be trusted")


def test_a_monitor_chooses_among_the_snapshots_that_are_left(adapter):
    settings = config(iterations=40, validate_every=2, snapshots=3)
    result = adapt(adapter, IMAGES, config=settings, stop=None, progress=False)
    drifts = [row["d_emb"] for row in result.history if "d_emb" in row]
    for threshold in drifts[1:]:
        assert result.select(EmbeddingDrift(threshold + 1e-9)) is not None


def test_blank_windows_of_a_slide_are_no_held_out_images(adapter):
    slide = np.zeros((2304, 2304), np.float32)
    slide[1400:, 1400:] = np.tile(IMAGES[0], (15, 12))[:904, :904]
    result = adapt(
        adapter, IMAGES, validation=[slide], config=config(iterations=4), stop=None, progress=False
    )
    assert result.iteration == 4


def test_an_image_of_other_channels_beyond_the_checked_is_left_out(adapter, monkeypatch, caplog):
    monkeypatch.setattr("selfadapt._crops.CHECKED", 4)
    adapter = copy.copy(adapter)
    adapter.channels = None
    images = [*(image[None] for image in IMAGES[:5]), np.stack([IMAGES[5]] * 2)]
    crops = Crops(adapter, open_images(images, channel_axis=0), config())
    crops.check()
    for k in range(12):
        assert crops.batch(k).shape[1] == 1
    assert "has 2 channel(s)" in caplog.text
