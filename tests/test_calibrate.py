"""How images go in, found without labels; TTA; and that both are kept."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from helpers import discs
from skimage.transform import resize
from stardist.data import test_image_nuclei_2d as nuclei_2d

from selfadapt import (
    D4,
    Binary,
    Categorical,
    Config,
    ConfigError,
    ImageError,
    Input,
    Matches,
    adapt,
    calibrate,
    match,
    open_images,
    predict,
    prepare,
)
from selfadapt._calibrate import Calibration, search
from selfadapt._cli import main
from selfadapt._trials import FEWEST, Place, Trial, choose_places
from selfadapt._views import mean_outputs
from selfadapt_smp import SmpAdapter

QUICK = Config(
    iterations=2, batch_size=2, crop=64, views=2, validate_every=2, validation_images=2,
    candidates="default",
)  # fmt: skip


@pytest.fixture(scope="module")
def nuclei():
    """A part of a real image, half as large again, dark on bright; and its labels."""
    image, labels = (each[100:292, 100:292] for each in nuclei_2d(return_mask=True))
    large = resize(image, (288, 288), order=1, preserve_range=True)
    true = resize(labels, (288, 288), order=0, preserve_range=True, anti_aliasing=False)
    return (large.max() - large).astype(np.float32), true.astype(np.int32)


@pytest.fixture(scope="module")
def found(nuclei):
    return search(SmpAdapter.from_pretrained("demo"), nuclei[0])


def test_scale_and_polarity_are_found(found, nuclei):
    given = SmpAdapter.from_pretrained("demo")
    image, labels = nuclei
    before, after = (match(labels, a.segment(image))[0].ap for a in (given, found.adapter))
    assert found.found
    assert found.adapter.input.invert
    assert found.adapter.input.scale < 1
    assert after > 0.6 > 0.1 > before
    # every scale in both polarities, and the best of them
    assert {trial.input.invert for trial in found.trials} == {False, True}
    assert found.chosen.score == max(trial.score for trial in found.trials)
    assert 20 < found.chosen.diameter < 60
    assert "inverted" in str(found)


@pytest.fixture
def fewer_scales(monkeypatch):
    """A search of seconds."""
    monkeypatch.setattr("selfadapt._calibrate.SCALES", (0.455, 0.592, 0.769))
    monkeypatch.setattr("selfadapt._calibrate.WINDOWS", 1)


@pytest.mark.usefixtures("fewer_scales")
def test_the_given_adapter_stays_and_the_new_one_is_settled(nuclei):
    given = SmpAdapter.from_pretrained("demo")
    adapter = calibrate(given, nuclei[0], progress=False)
    assert given.input == Input()
    assert not given.settled
    assert adapter.model is given.model
    assert {"scale", "invert"} <= adapter.settled


@pytest.mark.usefixtures("fewer_scales")
def test_what_the_user_has_said_stays_and_a_warning_names_the_better_way(nuclei, caplog):
    given = SmpAdapter.from_pretrained("demo", scale=1.0, invert=False)
    adapter = calibrate(given, nuclei[0], progress=False)
    assert adapter.input == given.input
    assert "clearly better would be: scale 0." in caplog.text
    assert "inverted" in caplog.text


@pytest.mark.usefixtures("fewer_scales")
def test_only_what_is_open_is_found(nuclei):
    given = SmpAdapter.from_pretrained("demo", scale=0.5)
    adapter = calibrate(given, nuclei[0], progress=False)
    assert adapter.input.scale == 0.5
    assert adapter.input.invert


@pytest.mark.usefixtures("fewer_scales")
def test_auto_must_be_found_before_use(nuclei):
    adapter = SmpAdapter.from_pretrained("demo", scale="auto")
    with pytest.raises(ConfigError, match="scale must be found in the images first"):
        adapter.segment(nuclei[0])
    assert calibrate(adapter, nuclei[0], progress=False).segment(nuclei[0]).max() > 10


@pytest.mark.usefixtures("fewer_scales")
def test_of_too_many_channels_the_one_is_taken_that_shows_something(nuclei):
    rows = np.linspace(0, 1, nuclei[0].shape[0])[:, None] + np.zeros(nuclei[0].shape)
    image = np.stack([rows, rows.T, nuclei[0]]).astype(np.float32)
    with pytest.raises(ImageError, match="has 3 channel"):
        SmpAdapter.from_pretrained("demo").segment(image, channel_axis=0)
    adapter = SmpAdapter.from_pretrained("demo")
    adapter = calibrate(adapter, image, channel_axis=0, progress=False)
    assert adapter.input.channels == (2,)
    assert match(nuclei[1], adapter.segment(image, channel_axis=0))[0].ap > 0.6


@pytest.mark.usefixtures("fewer_scales")
def test_a_range_that_sparse_objects_spoil_is_found(nuclei):
    """Where they are not sparse, no other is tried."""
    negative, labels = nuclei
    image = negative.max() - negative
    plain = search(SmpAdapter.from_pretrained("demo"), image)
    assert {(t.input.low, t.input.high) for t in plain.trials} == {(1.0, 99.0)}
    size = (1400, 1400)
    sparse = np.random.default_rng(0).normal(np.median(image), 1, size).astype(np.float32)
    true = np.zeros(size, np.int32)
    sparse[300:588, 500:788], true[300:588, 500:788] = image, labels
    adapter = calibrate(SmpAdapter.from_pretrained("demo"), sparse, progress=False)
    assert adapter.input.high == 99.9
    before = adapter.with_input(replace(adapter.input, high=99.0))
    assert match(true, adapter.segment(sparse))[0].ap > match(true, before.segment(sparse))[0].ap


@pytest.mark.usefixtures("fewer_scales")
def test_where_nothing_is_found_everything_stays_and_that_is_said(nuclei, caplog):
    blind = SmpAdapter.from_pretrained("demo", threshold=1.0)
    result = search(blind, nuclei[0])
    assert not result.found
    assert result.adapter.input == Input()
    assert "nothing is found again at any scale" in caplog.text


def test_bad_input_is_refused_before_any_work(nuclei):
    adapter = SmpAdapter.from_pretrained("demo")
    with pytest.raises(ImageError, match="constant"):
        calibrate(adapter, np.ones((64, 64)))
    mute = copy.copy(adapter)
    mute.__class__ = type("Mute", (SmpAdapter,), {"can_decode": False})
    with pytest.raises(ConfigError, match="cannot decode"):
        calibrate(mute, nuclei[0])


# --- trials --------------------------------------------------------------------------------------


def trial(**changes):
    half = Matches(20, 10, 10)
    usual = {"turned": half, "scaled": half, "alike": half, "instances": 30, "area": 0.2}
    return Trial(**{"input": Input(), "diameter": 9.0, **usual, **changes})


def test_a_trial_is_better_if_more_is_found_again():
    better = Matches(30, 5, 5)
    for name in ("turned", "scaled", "alike"):
        assert trial(**{name: better}).score > trial().score
    assert trial(area=0.4).score > trial().score
    # scales count twice
    assert trial(scaled=better, alike=better).score > trial(turned=better).score
    # of equal agreement, that of more instances
    few = Matches(2, 1, 1)
    assert trial(turned=few, scaled=few, alike=few).score < trial().score
    assert trial(instances=FEWEST - 1).score == 0
    assert 0 <= trial().score <= 1


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((3, FEWEST - 1), f"at most {FEWEST - 1} objects are found in any way, too few to choose"),
        ((3, FEWEST), "nothing is found again at any scale"),
        ((0, 0), "nothing is found again at any scale"),
    ],
)
def test_too_few_objects_are_not_called_none(counts, words):
    trials = [trial(instances=n) for n in counts]
    nothing = Trial.nothing(Input())
    adapter = SmpAdapter.from_pretrained("demo")
    assert words in str(Calibration(adapter, trials, nothing, nothing, found=False))


@pytest.mark.parametrize("middle", [(0, 0), (20, 50), (39, 99)])
def test_windows_of_a_place_lie_inside_of_each_other_and_of_the_image(middle):
    image = np.zeros((1, 40, 100))
    place = Place("x", image, image, middle)
    last = None
    for side in (8, 24, 60, 400):
        rows, columns = place.cut(side)
        assert 0 <= rows.start < rows.stop <= 40
        assert 0 <= columns.start < columns.stop <= 100
        assert (rows.stop - rows.start, columns.stop - columns.start) == (
            min(side, 40),
            min(side, 100),
        )
        if last:
            assert rows.start <= last[0].start <= last[0].stop <= rows.stop
            assert columns.start <= last[1].start <= last[1].stop <= columns.stop
        last = rows, columns


def test_places_lie_where_there_is_something_and_in_all_images():
    image = np.random.default_rng(0).normal(0, 0.1, (600, 600))
    image[400:528, 64:192] += 50 * np.random.default_rng(1).random((128, 128))
    (row, column), *_ = (place.middle for place in choose_places(open_images([image])))
    assert 400 <= row <= 528
    assert 64 <= column <= 192
    many = choose_places(open_images([discs(k)[0] for k in range(20)]))
    assert len({place.name for place in many}) == len(many) > 5
    black = [np.zeros((64, 80))] * 30
    seen = choose_places(open_images([*black, discs(0)[0]]))
    assert {place.name for place in seen} == {"image 30"}
    with pytest.raises(ImageError, match="all images are constant"):
        choose_places(open_images([np.ones((9, 9))]))


# --- TTA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [Binary(2), Binary(logits=False), Categorical(3)])
def test_raw_is_the_way_back_from_values(head):
    raw = torch.randn(head.channels, 5, 4, generator=torch.Generator().manual_seed(0))
    values = head.values(raw if head.logits else raw.sigmoid())
    torch.testing.assert_close(head.values(head.raw(values)), values, atol=1e-5, rtol=0)


def test_tta_is_the_mean_over_all_flips_and_turns(nuclei):
    adapter = SmpAdapter.from_pretrained("demo", invert=True)
    image = prepare(adapter, nuclei[0][None, :90, :71], "x")
    spec, model = adapter.outputs, adapter.model.eval()

    def forward(pixels):
        return adapter.forward_tiled(model, pixels)

    with torch.no_grad():
        mean = mean_outputs(forward, image, spec, "symmetric")
        foreground = sum(
            g.inverse.move(forward(g.move(image).contiguous())["foreground"].sigmoid()) for g in D4
        )
    torch.testing.assert_close(
        mean["foreground"].sigmoid(), foreground / len(D4), atol=1e-5, rtol=0
    )
    with_tta = adapter.with_input(replace(adapter.input, tta=True))
    outputs = predict(with_tta, model, image).outputs
    torch.testing.assert_close(outputs["foreground"], mean["foreground"])
    turned = predict(with_tta, model, D4[1].move(image).contiguous()).outputs["foreground"]
    expected = D4[1].move(outputs["foreground"])
    torch.testing.assert_close(turned.sigmoid(), expected.sigmoid(), atol=1e-5, rtol=0)


# --- kept ----------------------------------------------------------------------------------------


def test_input_goes_into_a_file_and_back():
    for input in (Input(), Input(scale=0.5, channels=(2, 0), invert=True, tta=True)):
        assert Input.from_dict(json.loads(json.dumps(input.to_dict()))) == input
    with pytest.raises(ConfigError, match="does not say how images go in"):
        Input.from_dict({"size": 3})


@pytest.mark.usefixtures("fewer_scales")
def test_what_adapt_finds_is_kept_in_the_run_and_in_the_model(nuclei, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for k in range(3):
        tifffile.imwrite(images / f"{k}.tif", np.rot90(nuclei[0], k))
    run, words = tmp_path / "run", ["--adapter", "smp", "--model", "demo"]
    quick = ["--iterations", "2", "--batch_size", "2", "--crop", "64", "--validate_every", "2",
             "--candidates", "default", "--validation_images", "2"]  # fmt: skip
    main(["adapt", *words, "--images", str(images), "--out", str(run), *quick])
    assert "Input:   scale 0." in capsys.readouterr().out
    kept = json.loads((run / "input.json").read_text())
    assert kept["invert"]
    assert kept["scale"] < 1
    model = SmpAdapter.from_pretrained(str(run / "model"))
    assert (model.input.scale, model.input.invert) == (kept["scale"], True)
    # the run is as good as the model, and what is said now comes first
    for name, more in (("a", []), ("b", ["--invert", "false"])):
        main(["segment", "--model", str(run), "--images", str(images), "--out",
              str(tmp_path / name), *more])  # fmt: skip
    own, other = (tifffile.imread(tmp_path / name / "0.tif") for name in "ab")
    np.testing.assert_array_equal(own, model.segment(nuclei[0]))
    assert not np.array_equal(own, other)
    # a resumed run does not search again
    report = (run / "calibration.json").read_text()
    main(["adapt", *words, "--images", str(images), "--out", str(run), *quick, "--resume"])
    assert (run / "calibration.json").read_text() == report
    assert "How the images go in" in (run / "report.html").read_text()


@pytest.mark.usefixtures("fewer_scales")
def test_the_shell_finds_scale_and_polarity(nuclei, tmp_path, capsys):
    tifffile.imwrite(tmp_path / "a.tif", nuclei[0])
    words = ["--adapter", "smp", "--model", "demo", "--images", str(tmp_path / "a.tif")]
    found = tmp_path / "found.json"
    code = main(["calibrate", *words, "--json", str(found)])
    out = capsys.readouterr().out
    assert "Options: --scale 0." in out
    assert "--invert true" in out
    assert code in (0, 3)
    chosen = json.loads(found.read_text())["chosen"]["input"]
    auto = ["--scale", "auto", "--invert", "auto"]
    assert main(["segment", *words, "--out", str(tmp_path / "labels"), *auto]) == 0
    assert f"Input:   scale {chosen['scale']:.3g}" in capsys.readouterr().err
    adapter = SmpAdapter.from_pretrained("demo", scale=chosen["scale"], invert=chosen["invert"])
    labels = tifffile.imread(tmp_path / "labels" / "a.tif")
    np.testing.assert_array_equal(labels, adapter.segment(nuclei[0]))


def test_adapt_can_leave_the_input_alone(nuclei):
    adapter = SmpAdapter.from_pretrained("demo")
    result = adapt(adapter, nuclei[0], config=QUICK, calibrate=False, progress=False)
    assert result.input is None
    assert replace(result.adapter.input, tta=False) == Input()
