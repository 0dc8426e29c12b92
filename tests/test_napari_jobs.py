"""What the napari widget does in another thread, without napari."""

import logging
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import IMAGES, SmallAdapter, trained_adapter

from selfadapt import (
    ConfigError,
    Event,
    ImageError,
    Quality,
    RunCancelledError,
    SelfAdaptError,
    estimate_quality,
)
from selfadapt_napari import _jobs as jobs
from selfadapt_napari import _words as words
from selfadapt_napari._jobs import Choice
from selfadapt_napari._talk import Done, Failed, Talk, do
from selfadapt_napari._targets import Target, places_of, targets_of
from selfadapt_smp import SmpAdapter

QUICK = (
    "iterations=4 batch-size=2 crop=32 --views=2 validate_every=2 device=cpu candidates=default "
    "validation_images=2 calibrate=false"
)


def stack(*images):
    return Target("cells", [np.stack(images)], None, {})


def test_options_are_those_of_the_shell():
    opened = jobs.open_choice(Choice("smp", " demo ", f"{QUICK} scale=0.5"))
    assert opened.adapter.input.scale == 0.5
    assert "scale" in opened.adapter.settled
    assert (opened.config.iterations, opened.config.batch_size, opened.config.views) == (4, 2, 2)
    assert not opened.calibrate
    assert opened.origin == {
        "adapter": "smp",
        "options": {"scale": 0.5, "trust_torchscript": False},
    }
    assert jobs.open_choice(Choice("smp", "demo")).calibrate


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("", "", "no model is named"),
        ("no_such_model", "", "no_such_model"),
        ("demo", "diameter=22", "no option 'diameter'. The adapter has heads, .*iterations"),
        ("demo", "scale", "write name=value"),
        ("demo", "=3", "write name=value"),
        ("demo", "scale='1", "No closing quotation"),
        ("demo", "scale=large", "scale"),
        ("demo", "iterations=0", "iterations=0 is not allowed"),
        ("demo", "help=1", "no option 'help'"),
        ("demo", "config=x.yaml", "no option 'config'"),
    ],
)
def test_a_mistake_in_the_form_is_a_sentence(model, options, message):
    with pytest.raises(SelfAdaptError, match=message) as caught:
        jobs.open_choice(Choice("smp", model, options))
    assert "\n" not in str(caught.value)


def test_a_run_folder_is_a_model_whatever_adapter_is_chosen(tmp_path):
    opened = jobs.open_choice(Choice("smp", "demo", f"{QUICK} scale=0.7"))
    target = stack(*IMAGES[:3])
    result = jobs.run(opened, [target], str(tmp_path / "run"), Talk())
    again = jobs.open_choice(Choice("cellpose", str(tmp_path / "run")))
    assert isinstance(again.adapter, SmpAdapter)
    assert again.adapter.input == result.adapter.input
    assert again.adapter.input.scale == 0.7
    np.testing.assert_array_equal(
        again.adapter.segment(IMAGES[0]), result.adapter.segment(IMAGES[0])
    )


def test_every_plane_is_segmented_as_the_adapter_does(adapter):
    talk = Talk()
    target = stack(*IMAGES[:3])
    (made,) = jobs.segment({"after": adapter}, [target], talk)
    for labels, image in zip(made.labels, IMAGES, strict=False):
        np.testing.assert_array_equal(labels, adapter.segment(image))
    assert made.count == sum(labels.max() for labels in made.labels) > 0
    events = [said for said in talk.news() if isinstance(said, Event)]
    assert [(event.done, event.total) for event in events] == [(k, 3) for k in range(4)]
    assert talk.news() == []


def test_an_image_that_cannot_be_used_costs_no_other(adapter):
    broken = IMAGES[0].copy()
    broken[3, 4] = np.nan
    talk = Talk()
    (made,) = jobs.segment({"after": adapter}, [stack(IMAGES[1], broken)], talk)
    assert made.labels[0].any()
    assert not made.labels[1].any()
    assert [said for said in talk.news() if isinstance(said, str) and "cells, plane 1" in said]
    with pytest.raises(ImageError, match=r"cells, plane 0"):
        jobs.segment({"after": adapter}, [stack(broken)], talk)
    both = jobs.segment({"before": adapter, "after": adapter}, [stack(IMAGES[1], broken)], talk)
    assert [made.count for made in both] == [both[0].labels.max()] * 2


class FailingArray:
    """Pixels that cannot be read any more, as of a file that is gone."""

    shape, ndim, dtype = (40, 40), 2, np.dtype("u1")

    def __getitem__(self, index):
        raise RuntimeError("the disk is gone")


def test_whatever_fails_is_said_and_the_next_job_can_begin(adapter):
    talk = Talk()
    target = Target("cells", [FailingArray()], None, {})
    do(lambda talk: jobs.segment({"after": adapter}, [target], talk), talk)
    (ending,) = [said for said in talk.news() if isinstance(said, Failed)]
    assert isinstance(ending.error, RuntimeError)
    told = words.of_error(ending.error)
    assert told.startswith("This has failed")
    assert "RuntimeError: the disk is gone" in told
    do(lambda talk: 3, talk)
    assert talk.news() == [Done(3)]


def test_two_jobs_at_once_are_refused():
    first, second = Talk(), Talk()
    entered, leave = threading.Event(), threading.Event()

    def job(talk):
        entered.set()
        leave.wait(60)
        return "first"

    thread = threading.Thread(target=do, args=(job, first))
    thread.start()
    entered.wait(60)
    do(lambda talk: "second", second)
    leave.set()
    thread.join(60)
    (refused,) = second.news()
    assert "another run is at work" in str(refused.error)
    assert first.news() == [Done("first")]


def test_warnings_of_the_library_are_passed_on_during_the_job_only(caplog):
    talk = Talk()
    logger = logging.getLogger("selfadapt._adapter")
    with caplog.at_level(logging.INFO, "selfadapt"):  # as a user may set it
        do(lambda talk: logger.info("no warning"), talk)
    assert talk.news() == [Done(None)]
    do(lambda talk: logger.warning("Head %r is odd", "p"), talk)
    logger.warning("later")
    assert talk.news() == ["Head 'p' is odd", Done(None)]


@pytest.mark.parametrize(
    "job", [lambda network, *more: jobs.segment({"after": network}, *more), jobs.check]
)
def test_cancelling_ends_it_within_an_image(adapter, job):
    talk = Talk()
    seen = []

    class Watching(SmallAdapter):
        def __init__(self):
            self.model, self.outputs = adapter.model, adapter.outputs

        def forward(self, model, images):
            seen.append(1)
            talk.cancel()
            return super().forward(model, images)

    with pytest.raises(RunCancelledError):
        job(Watching(), [stack(*IMAGES[:4])], talk)
    assert len(seen) == 1


def test_what_another_wants_cancels_too():
    talk = Talk()
    assert not talk.say("go on")
    talk.asked_elsewhere = lambda: True
    assert talk.say("end")


def test_check_is_the_estimate_of_the_library(adapter):
    quality = jobs.check(adapter, [stack(*IMAGES[:3])], Talk())
    assert quality == estimate_quality(adapter, np.stack(IMAGES[:3]))


def test_names_of_planes_say_where_labels_belong():
    target = Target("cells", [np.zeros((2, 3, 8, 9))], None, {})
    places = places_of([target, Target("one", [np.zeros((8, 9))], None, {})])
    assert places["cells, plane 1, 2"] == (target, (1, 2))
    assert places["one"][1] == ()
    assert len(places) == 7


def layer(*shape, name="cells", rgb=False):
    """As much of one of napari's as is asked of it; at world coordinates other than its own."""
    data = np.random.default_rng(len(name)).integers(0, 255, shape, np.uint8)
    axes = len(shape) - rgb
    return SimpleNamespace(
        data=data, multiscale=False, rgb=rgb, name=name,
        scale=np.arange(2.0, 2 + axes), translate=np.arange(5.0, 5 + axes),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "axis", "rgb"),
    [
        ((6, 7), None, False),
        ((2, 3, 6, 7), None, False),
        ((6, 7, 3), None, True),
        ((2, 6, 7, 4), None, True),
        ((3, 6, 7), 0, False),
        ((3, 2, 6, 7), 0, False),
        ((2, 3, 6, 7), 1, False),
    ],
)
def test_planes_are_those_of_the_slow_twin(shape, axis, rgb):
    pixels = layer(*shape, rgb=rgb)
    (target,) = targets_of([pixels], channel_axis=axis)
    channels = np.moveaxis(pixels.data[..., :3], -1, 0) if rgb else pixels.data[None]
    if axis is not None:
        channels = np.moveaxis(pixels.data, axis, 0)
    labels = target.blank()
    planes = list(target.planes())
    assert len(planes) == np.prod(channels.shape[1:-2])
    for number, (index, image) in enumerate(planes, 1):
        where = np.unravel_index(number - 1, channels.shape[1:-2])
        expected = channels[(slice(None), *where)]
        np.testing.assert_array_equal(image.read(), expected)
        rows, columns = slice(1, 4), slice(2, 7)
        np.testing.assert_array_equal(image.read_window(rows, columns), expected[:, 1:4, 2:7])
        labels[index] = number
    flat = labels if axis is None else labels.take(0, axis)
    np.testing.assert_array_equal(flat[..., 0, 0].ravel(), np.arange(1, len(planes) + 1))


@pytest.mark.parametrize("axis", [0, 1])
def test_labels_of_channels_reach_from_the_first_to_the_last_of_them(axis):
    pixels = layer(4, 5, 6, 7)
    (target,) = targets_of([pixels], channel_axis=axis)
    count, scale, translate = pixels.data.shape[axis], pixels.scale, pixels.translate
    # a plane of napari's reaches half a step to both sides
    first, last = translate[axis] - scale[axis] / 2, translate[axis] + (count - 0.5) * scale[axis]
    thick, middle = target.placed["scale"], target.placed["translate"]
    assert middle[axis] - thick[axis] / 2 == first
    assert middle[axis] + thick[axis] / 2 == last
    assert np.delete(middle, axis).tolist() == np.delete(translate, axis).tolist()
    assert np.delete(thick, axis).tolist() == np.delete(scale, axis).tolist()


def test_layers_are_images_of_their_own_or_channels_of_one():
    first, second = layer(2, 6, 7, name="red"), layer(2, 6, 7, name="green")
    assert [target.name for target in targets_of([first, second])] == ["red", "green"]
    (both,) = targets_of([first, second], "channels")
    _, image = list(both.planes())[1]
    np.testing.assert_array_equal(image.read(), [first.data[1], second.data[1]])


@pytest.mark.parametrize(
    ("layers", "together", "axis", "message"),
    [
        ([], "images", None, "there is no image layer"),
        ([layer(6, 7), layer(6, 8)], "channels", None, "have one shape, and these have not"),
        ([layer(6, 7), layer(6, 7, 3, rgb=True)], "channels", None, "must not have channels"),
        ([layer(3, 6, 7)], "images", 1, "along axis 1: the last two axes are rows"),
        ([layer(3, 6, 7)], "images", -1, "along axis -1"),
    ],
)
def test_layers_that_do_not_fit_together_are_refused(layers, together, axis, message):
    with pytest.raises(ImageError, match=message):
        targets_of(layers, together, axis)


def test_words_are_sentences():
    assert words.of_error(ConfigError("scale is 3: give 2.")) == "Scale is 3: give 2."
    good, none = Quality(0.5, 0.2, 0.8), Quality(np.nan, np.nan, np.nan)
    assert words.of_quality(good).startswith(
        "Expected AP at an IoU of 0.5, estimated without labels: 0.50 (0.20 to 0.80). The network "
    )
    assert "Not to be trusted: the network finds nothing" in words.of_quality(none)


def test_a_verdict_is_told_with_reason_and_estimate():
    adapter = trained_adapter()
    opened = jobs.Opened(adapter, jobs.open_choice(Choice("smp", "demo", QUICK)).config, False, {})
    result = jobs.run(opened, [stack(*IMAGES[:4])], "", Talk())
    headline, reason, estimate, *more = words.of_result(result)
    assert headline.lower() == result.outcome
    assert reason.lower() == f"{result.reason.lower()}."
    assert str(result.quality) in estimate
    at = f", iteration {result.iteration}" * (result.iteration > 0)
    assert more == [f"Network: {result.candidate}{at}."]
