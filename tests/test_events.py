"""What a run tells a callback, and how that cancels it."""

import threading

import numpy as np
import pytest
import torch
from helpers import IMAGES, config, discs, equal_states

from selfadapt import (
    ConfigError,
    EmbeddingDrift,
    Event,
    RunCancelledError,
    adapt,
    calibrate,
    estimate_quality,
)
from selfadapt._events import Teller
from selfadapt_smp import SmpAdapter


def run(adapter, callback, **options):
    given = {"config": config(candidates="default,gentle,teacher"), "progress": False} | options
    return adapt(adapter, IMAGES[:4], callback=callback, **given)


def test_every_stage_step_and_look_is_told_and_nothing_else_changes(adapter):
    events = []
    told = run(adapter, events.append)
    untold = run(adapter, None)
    assert equal_states(told.adapter.model.state_dict(), untold.adapter.model.state_dict())
    assert (told.outcome, told.reason) == (untold.outcome, untold.reason)
    steps = [event for event in events if event.kind == "step"]
    assert [(e.candidate, e.iteration) for e in steps[:4]] == [("default", k) for k in range(1, 5)]
    assert [event.done for event in steps] == list(range(1, steps[0].total + 1))
    assert all(isinstance(event.figures["loss"], torch.Tensor) for event in steps)
    assert [event.kind for event in events if event.done == 0] == ["stage", *["look"] * 3]
    looks = [event for event in events if event.kind == "look"]
    rows = [row for row in told.history if "agreement" in row]
    assert [(e.candidate, e.iteration) for e in looks] == [
        (row["candidate"], row["iteration"]) for row in rows
    ]
    for event, row in zip(looks, rows, strict=True):
        assert event.figures.items() <= row.items()
    first, last = looks[0].previews, looks[-1].previews
    assert len(first) == len(last) > 0
    np.testing.assert_array_equal(first[0].before, first[0].after)
    np.testing.assert_array_equal(first[0].before, last[0].before)
    assert first[0].after.shape == first[0].pixels.shape[1:]


def test_every_window_of_a_check_is_told_and_nothing_else_changes(adapter, capfd):
    events = []
    told = estimate_quality(adapter, IMAGES[:3], progress=False, callback=events.append)
    assert capfd.readouterr().err == ""
    assert told == estimate_quality(adapter, IMAGES[:3])
    assert "window/s" in capfd.readouterr().err  # the bar
    assert {event.stage for event in events} == {"check"}
    assert [(e.kind, e.done, e.total) for e in events] == [
        ("stage", 0, 3), ("step", 1, 3), ("step", 2, 3), ("step", 3, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("stop", ["auto", None, EmbeddingDrift(2.0)])
@pytest.mark.parametrize(("kind", "at"), [("step", 6), ("look", 4)])
def test_a_cancelled_run_gives_the_best_so_far_and_can_go_on(adapter, tmp_path, stop, kind, at):
    def cancel(event):
        return event.kind == kind and event.iteration == at and event.candidate == "default"

    folder = tmp_path / "run"
    result = run(adapter, cancel, stop=stop, output_dir=folder)
    assert result.reason.startswith("cancelled")
    assert result.iteration in (0, 4)
    assert (result.iteration == 4) or stop == "auto"
    assert (folder / "model").exists()
    assert max(row["iteration"] for row in result.history) == 4
    resumed = run(adapter, None, stop=stop, output_dir=folder, resume=True)
    whole = run(adapter, None, stop=stop)
    assert equal_states(resumed.adapter.model.state_dict(), whole.adapter.model.state_dict())
    assert resumed.reason == whole.reason


def test_cancelling_before_the_first_look_writes_nothing(adapter, tmp_path):
    with pytest.raises(RunCancelledError, match="before there was anything"):
        run(adapter, lambda event: True, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_callback_is_no_criterion(adapter):
    """What a function returns that was not meant to cancel does not."""
    result = run(adapter, lambda event: 1)
    assert not result.reason.startswith("cancelled")
    with pytest.raises(ConfigError, match="a function of one Event"):
        run(adapter, "tqdm")


@pytest.mark.parametrize(
    ("job", "stage"), [(calibrate, "calibration"), (estimate_quality, "check")]
)
def test_calibration_and_check_tell_of_each_step_and_can_be_cancelled(job, stage):
    adapter = SmpAdapter.from_pretrained("demo")
    events = []

    def cancel(event):
        events.append(event)
        return event.done == 2

    with pytest.raises(RunCancelledError):
        job(adapter, IMAGES[:3], callback=cancel, progress=False)
    assert [(event.kind, event.done) for event in events] == [
        ("stage", 0),
        ("step", 1),
        ("step", 2),
    ]
    assert {(event.stage, event.iteration) for event in events} == {(stage, 0)}


def test_in_a_worker_thread_it_is_the_same(adapter):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(adapter, lambda event: None)))
    thread.start()
    thread.join()
    here = run(adapter, None)
    assert equal_states(found[0].adapter.model.state_dict(), here.adapter.model.state_dict())


def test_an_error_of_the_callback_ends_the_run_which_can_go_on(adapter, tmp_path):
    def broken(event):
        if event.iteration == 5:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(adapter, broken, output_dir=tmp_path)
    result = run(adapter, None, output_dir=tmp_path, resume=True)
    assert result.reason == run(adapter, None).reason


def test_the_bar_is_drawn_once_a_minute_where_there_is_no_terminal(adapter, capfd):
    adapt(adapter, IMAGES[:4], config=config(), progress=True)
    assert capfd.readouterr().err.count("it/s") <= 2


@pytest.mark.parametrize("size", [(90, 110), (300, 2100)])
def test_previews_say_where_they_lie_in_the_image_also_in_windows_of_a_large_one(adapter, size):
    image, _ = discs(7, size)
    seen = []

    def cancel(event):
        seen.extend(event.previews)
        return bool(seen)

    images = [discs(8)[0], image]
    small = config(validation_images=4, validation_size=64)
    with pytest.raises(RunCancelledError):
        adapt(adapter, images, validation=images[1:], config=small, callback=cancel, progress=False)
    assert len(seen) > 1
    assert size[1] < 2048 or max(preview.columns.stop for preview in seen) > 1050
    for preview in seen:
        there = image[preview.rows, preview.columns]
        assert preview.source == "image 0"
        assert preview.after.shape == there.shape
        assert np.corrcoef(preview.pixels[0].flatten(), there.flatten())[0, 1] > 0.9999


def test_the_bar_stands_at_the_last_step_and_shows_the_last_look():
    with Teller(progress=True) as tell:
        tell(Event("stage", "adaptation", 0, 4))
        tell(Event("look", "adaptation", 1, 4, figures={"d_emb": 0.25, "loss": 1.0}))
        tell(Event("step", "adaptation", 3, 4, figures={"d_emb": 9.0}))
        assert tell._bar.n == 3
        assert tell._bar.postfix == "d_emb=0.25"
    assert tell._bar is None
