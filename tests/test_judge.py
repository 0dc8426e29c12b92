"""What the judge sees and what it decides: each case has once been decided wrongly."""

import copy
import itertools
import math
import re

import numpy as np
import pytest
import torch
from helpers import (
    IMAGES,
    SHARED,
    SmallAdapter,
    config,
    discs,
    equal_states,
    needs_shared,
    run_that_improves,
)
from stardist.data import test_image_nuclei_2d as nuclei_2d

from selfadapt import (
    CheckpointError,
    ConfigError,
    ImageError,
    Judge,
    Look,
    Matches,
    Prediction,
    RunCancelledError,
    Thresholds,
    adapt,
    estimate_quality,
    match,
    open_images,
    prepare,
)
from selfadapt._judge import choose_windows
from selfadapt._look import IOUS, Views, views
from selfadapt._portfolio import spare
from selfadapt._quality import estimate
from selfadapt._signals import agreement, instances, places, pooled
from selfadapt._verdict import decide, objection, rise
from selfadapt_smp import SmpAdapter

RNG = np.random.default_rng


# --- signals -------------------------------------------------------------------------------------


def test_counts_by_place_add_up_to_the_matcher():
    for seed in range(5):
        first, second = discs(seed)[1], discs(seed + 1)[1]
        merged = np.where(RNG(seed).random(first.shape) < 0.5, first, second)
        for iou in IOUS:
            counts = agreement(first, [second, merged], iou)
            expected = match(first, second, (iou,))[0] + match(first, merged, (iou,))[0]
            assert pooled(counts) == expected
        assert instances(first).sum() == len(np.unique(first)) - 1
        for place in places(first):
            assert 0 <= place < 4


def test_an_instance_that_fills_the_image_counts():
    full = np.full((8, 8), 3, np.int32)
    assert instances(full).sum() == 1
    assert instances(np.zeros((8, 8), np.int32)).sum() == 0


class Pointwise(SmallAdapter):
    """Finds what is brighter than half; no place or direction matters."""

    def forward(self, model, images):
        return self.outputs.split(torch.cat([0 * images, 0 * images, images - 0.5], 1))


class Lopsided(SmallAdapter):
    """Finds the right half, whatever the image."""

    def forward(self, model, images):
        place = torch.linspace(-1, 1, images.shape[-1]).expand_as(images)
        return self.outputs.split(torch.cat([0 * images, 0 * images, place], 1))


def test_turned_copies_are_mapped_back_and_one_is_flipped():
    image = torch.from_numpy(discs(0)[0][None, :, :40] / 100)
    seen = views(Pointwise(), Pointwise().model, image, (64, 40))
    assert len(seen.turned) == 3
    for labels in seen.turned:
        np.testing.assert_array_equal(labels > 0, seen.labels > 0)
    seen = views(Lopsided(), Lopsided().model, image, (64, 40))
    halves = {(labels[:, 0].any(), labels[:, -1].any()) for labels in seen.turned}
    assert (True, False) in halves  # flipped columns: mapped back, the left half


def test_scaled_copies_lie_where_the_objects_are():
    image = torch.from_numpy(discs(3, (96, 128))[0][None] / 100)
    seen = views(Pointwise(), Pointwise().model, image, (96, 128))
    for labels in (*seen.scaled, *seen.faded):
        assert labels.shape == (96, 128)
    for labels in seen.scaled:
        overlap = ((labels > 0) & (seen.labels > 0)).sum() / (seen.labels > 0).sum()
        assert overlap > 0.85
    # at 0.7 of its contrast, less is brighter than half
    assert 0 < (seen.faded[0] > 0).sum() < (seen.labels > 0).sum()


# --- looks of label images made by hand ----------------------------------------------------------


def grid(count: int = 6, side: int = 12, step: int = 20, off: int = 4) -> np.ndarray:
    """`count` x `count` squares."""
    labels = np.zeros((count * step, count * step), np.int32)
    for number, (i, j) in enumerate(itertools.product(range(count), repeat=2), 1):
        labels[i * step + off : i * step + off + side, j * step + off : j * step + off + side] = (
            number
        )
    return labels


def without(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The label image with a share of its instances gone."""
    numbers = np.unique(labels[labels > 0])
    gone = RNG(seed).choice(numbers, round(share * len(numbers)), replace=False)
    return np.where(np.isin(labels, gone), 0, labels).astype(np.int32)


def seen_as(labels: np.ndarray, unstable: float = 0.0, seed: int = 0, turned: float = 0.0) -> Views:
    """A window whose copies lose a share of the instances."""
    lost = [without(labels, unstable, seed + k) for k in range(3)]
    plain = Prediction({}, None, labels)
    return Views(plain, [without(labels, turned, k) for k in range(3)], lost[:2], [labels])


def look_of(*windows: Views, first=None, **kwargs) -> Look:
    return Look.of(windows, first or windows, **kwargs)


WINDOWS = 4
SHAKY = [seen_as(grid(), 0.4, 10 * k) for k in range(WINDOWS)]
FIRST = look_of(*SHAKY)
STEADY = [seen_as(grid(), 0.05, 10 * k) for k in range(WINDOWS)]


def test_a_network_that_is_steadier_on_the_same_objects_is_kept():
    verdict = decide(FIRST, [FIRST, look_of(*STEADY, first=SHAKY)])
    assert (verdict.outcome, verdict.chosen) == ("improved", 1)
    assert "more stable" in verdict.reason
    assert verdict.quality.ap > estimate(FIRST).ap


@pytest.mark.parametrize(("images", "windows"), [(1, 4), (2, 6), (5, 10)])
def test_a_single_image_has_the_windows_that_are_needed(adapter, images, windows):
    judge = Judge(np.tile(discs(1, (60, 60))[0], (images, 2, 3)), side=40)
    judge.look(adapter, adapter.model)
    assert len(judge.windows) == windows


def test_the_same_network_is_no_improvement():
    verdict = decide(FIRST, [FIRST])
    assert (verdict.outcome, verdict.chosen) == ("initial kept", None)
    assert decide(FIRST, []).outcome == "initial kept"


DISC = np.zeros_like(grid())
DISC[40:80, 40:80] = 1


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([seen_as(DISC) for _ in range(WINDOWS)], "4 objects, too few"),
        ([*STEADY[1:], seen_as(0 * DISC)], "in 3 windows with objects, and 4 are needed"),
        ([STEADY[0], *[seen_as(0 * DISC)] * 3], "in 1 window with objects, and 4 are needed"),
        ([seen_as(without(grid(), 0.32, k)) for k in range(WINDOWS)], "misses 33% of the objects"),
        ([seen_as(grid(12, 6, 10, 2)) for _ in range(WINDOWS)], "misses 100% of the objects"),
        ([seen_as(grid(), 0.2, k) for k in range(WINDOWS)], "stability changes by"),
        ([seen_as(grid(), 0.05, k, turned=0.4) for k in range(WINDOWS)], "copies agree less"),
        ([seen_as(grid(), 0.6, k) for k in range(WINDOWS)], "is below 0.6"),
    ],
)
def test_each_veto_stands_alone(windows, message):
    first = [seen_as(grid(), 0.25, 10 * k) for k in range(WINDOWS)]
    look = look_of(*windows, first=first)
    wrong = objection(look_of(*first), look, Thresholds(rise=0.1))
    assert re.search(message, wrong or "nothing")
    assert decide(look_of(*first), [look], Thresholds(rise=0.1)).chosen is None


def test_size_and_what_is_added_are_vetoes_of_their_own():
    first = look_of(*[seen_as(grid(), 0.4, 10 * k) for k in range(WINDOWS)])
    steady = look_of(*STEADY, first=SHAKY)
    for change, message in (
        ({"size": 3 * steady.size}, "3 times as large"),
        ({"first": steady.first + np.array([0, 3, 0])}, "25% of what it finds was not"),
        ({"finite": False}, "not finite"),
    ):
        other = Look(**{**vars(steady), **change})
        assert message in (objection(first, other, Thresholds()) or "")


@pytest.mark.parametrize(
    "wrong", [{"added": 20}, {"added": -0.1}, {"added": math.nan}, {"missed": 1.1}, {"risk": 0}]
)
def test_limits_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="added from 0 to 1"):
        Thresholds(**wrong)


def test_what_is_not_finite_is_never_kept_and_throws_nothing_else_away():
    good = look_of(*STEADY, first=SHAKY)
    broken = look_of(*STEADY, first=SHAKY, finite=False)
    assert decide(FIRST, [good, broken]).chosen == 0
    assert decide(FIRST, [broken]).chosen is None


def test_more_candidates_must_rise_by_more():
    good = look_of(*[seen_as(grid(), 0.33, 3 + 10 * k) for k in range(WINDOWS)], first=SHAKY)
    asked = Thresholds(floor=0.4, rise=0.0, risk=0.4)
    gain, error = rise(FIRST, good)
    assert gain > 0
    assert error > 0
    assert objection(FIRST, good, asked, 1) is None
    assert "is needed" in (objection(FIRST, good, asked, 10**6) or "")


def test_a_gain_that_only_the_half_shows_that_chose_it_is_not_confirmed():
    asked = Thresholds(rise=0.0, risk=0.4, floor=0.4)
    steady = look_of(*STEADY, first=SHAKY)
    for half, outcome in ((0, "initial kept"), (1, "improved")):
        scaled = np.array(FIRST.scaled)
        scaled[:, half::2] = np.array(steady.scaled)[:, half::2]
        look = Look(**{**vars(steady), "scaled": scaled})
        assert objection(FIRST, look, asked) is None
        verdict = decide(FIRST, [look], asked)
        assert verdict.outcome == outcome
        assert ("the other half of the objects" in verdict.reason) == (half == 0)


def test_the_error_of_a_rise_is_that_of_a_slow_jackknife():
    look = look_of(*STEADY, first=SHAKY)
    n = len(look.count)
    alone = []
    for k in range(n):
        rest = [i for i in range(n) if i != k]
        alone.append(pooled(look.scaled[0][rest]).ap - pooled(FIRST.scaled[0][rest]).ap)
    expected = math.sqrt((n - 1) / n * sum((x - np.mean(alone)) ** 2 for x in alone))
    gain, error = rise(FIRST, look)
    assert gain == pytest.approx(look.stability - FIRST.stability)
    assert error == pytest.approx(expected)


def test_windows_that_lose_all_instances_count_as_disagreement():
    empty = seen_as(np.zeros_like(grid()))
    kept = look_of(*STEADY[:-1], empty, first=SHAKY)
    assert kept.stability > FIRST.stability  # of what is left
    assert rise(FIRST, kept)[0] < rise(FIRST, look_of(*STEADY, first=SHAKY))[0] - 0.2
    assert decide(FIRST, [kept]).chosen is None


def test_undefined_stays_undefined():
    empty = [seen_as(np.zeros_like(grid())) for _ in range(WINDOWS)]
    nothing = look_of(*empty)
    assert math.isnan(nothing.stability)
    assert math.isnan(nothing.agreement)
    assert math.isnan(estimate(nothing).ap)
    assert not estimate(nothing).trusted
    spurious = look_of(*[seen_as(DISC) for _ in range(WINDOWS)], first=empty)
    verdict = decide(nothing, [spurious])
    assert (verdict.outcome, verdict.chosen) == ("not to be trusted", None)


@pytest.mark.parametrize("lone", [0, 1])
def test_one_steady_thing_in_each_of_many_windows_is_not_taken_for_objects(lone):
    """Where the first network finds nothing, or next to nothing, to compare it with."""
    first = [seen_as(np.roll(DISC, 11 * k, 1) * (k < lone), 1.0) for k in range(12)]
    places = RNG(0).integers(-35, 35, (12, 2))
    spurious = [seen_as(np.roll(DISC, place, (0, 1))) for place in places]
    look = look_of(*spurious, first=first)
    assert estimate(look).trusted, "else nothing is asked here"
    verdict = decide(look_of(*first), [look])
    assert (verdict.outcome, verdict.chosen) == ("not to be trusted", None)
    assert "12 objects in 12 windows" in objection(look_of(*first), look, Thresholds())


def test_a_first_network_that_finds_nothing_may_be_replaced_by_one_that_can_be_trusted():
    empty = [seen_as(np.zeros_like(grid())) for _ in range(WINDOWS)]
    verdict = decide(look_of(*empty), [look_of(*STEADY, first=empty)])
    assert verdict.outcome == "improved"


def test_heads_that_allow_no_copy_are_judged_by_other_scales():
    windows = [Views(v.plain, [], v.scaled, v.faded) for v in STEADY]
    alone = look_of(*windows)
    assert math.isnan(alone.agreement)
    assert estimate(alone).trusted
    first = look_of(*[Views(v.plain, [], v.scaled, v.faded) for v in SHAKY])
    assert decide(first, [alone]).outcome == "improved"


@pytest.mark.parametrize("windows", [1, 4, 12])
def test_a_change_that_is_none_is_not_accepted(windows):
    """One object in fifty is stable or not by another throw of the same coin."""
    accepted = 0
    for trial in range(400):
        rng = RNG((windows, trial))
        objects = rng.poisson(4, windows * 4)
        stable = [rng.random(n) < 0.75 for n in objects]
        again = [np.where(rng.random(len(s)) < 0.02, rng.random(len(s)) < 0.75, s) for s in stable]
        looks = []
        for each in (stable, again):
            found = np.array([s.sum() for s in each])
            counts = np.stack([2 * found, 2 * (objects - found), 2 * (objects - found)], 1)
            same = np.stack([objects, 0 * objects, 0 * objects], 1)
            full, two = np.stack([same, same]), np.stack([counts, counts])
            looks.append(Look(full, two, full, same, objects, 100.0))
        accepted += decide(looks[0], looks[1:]).outcome == "improved"
    assert accepted <= 4


def test_looks_are_read_back_as_they_were_and_others_refused():
    again = Look.from_dict(FIRST.to_dict())
    for name, value in vars(FIRST).items():
        np.testing.assert_equal(getattr(again, name), value)
    for wrong in ({}, {**FIRST.to_dict(), "turned": [1, 2]}, {**FIRST.to_dict(), "size": None}):
        with pytest.raises(CheckpointError, match="looks of the run are damaged"):
            Look.from_dict(wrong)


# --- windows -------------------------------------------------------------------------------------


def test_windows_are_where_the_objects_are():
    labels = np.zeros((512, 768), np.int32)
    labels[:200, 600:] = grid(10, 12, 20)[:200, :168]
    (chosen,) = choose_windows((512, 768), 256, labels, 1)
    assert chosen == (slice(0, 256), slice(512, 768))
    assert choose_windows((512, 768), 256, None, 1) == [(slice(0, 256), slice(256, 512))]
    assert len(choose_windows((512, 768), 256, labels, 12)) == 6
    assert choose_windows((300, 200), 256, labels, 3) == [(slice(0, 300), slice(0, 200))]


def test_the_judge_sees_what_segment_sees(adapter):
    judge = Judge(IMAGES[:2], windows=2)
    judge.look(adapter, adapter.model)
    for (_, pixels, size), image in zip(judge.examples, IMAGES, strict=False):
        np.testing.assert_array_equal(
            views(adapter, adapter.model, pixels, size).labels, adapter.segment(image)
        )


def test_windows_of_a_slide_are_judged_as_segment_sees_them(adapter):
    """Cells at one end: by itself, the noise at the other would show objects."""
    slide = RNG(0).normal(0, 1, (2304, 256)).astype(np.float32)
    slide[:512] = np.block([[discs(400 + k, (128, 128))[0] for k in (j, j + 4)] for j in range(4)])
    windows = open_images(slide)[0].windows()
    judge = Judge(windows)
    judge.look(adapter, adapter.model)
    whole, found = prepare(adapter, slide[None], "slide"), adapter.segment(slide)
    assert (len(windows), len(judge.previews)) == (3, 9)
    for preview, (_, pixels, _) in zip(judge.previews, judge.examples, strict=True):
        place = preview.rows, preview.columns
        torch.testing.assert_close(pixels, whole[:, *place])
        assert (preview.before > 0).any() == (found[place] > 0).any() == (place[0].start < 512)
    assert adapter.segment(slide[-768:]).any()


def test_a_monitor_of_the_judge_measures_against_the_first_look(adapter):
    judge = Judge(IMAGES[:2])
    first = judge.look(adapter, adapter.model)
    assert first.figures == {"d_emb": 0.0, "fn_rate": 0.0}
    assert first.missed == 0
    changed = copy.deepcopy(adapter.model)
    with torch.no_grad():
        changed.up[1].bias[2] -= 2
    later = judge.look(adapter, changed)
    assert later.figures["fn_rate"] == pytest.approx(later.missed)
    assert later.row(first)["instances"] == later.count.sum() / first.count.sum()


def test_nan_in_a_buffer_is_seen(adapter):
    judge = Judge(IMAGES[:1])
    assert judge.look(adapter, adapter.model).finite
    broken = copy.deepcopy(adapter.model)
    broken.stem[1].running_var[0] = math.nan
    assert not judge.look(adapter, broken).finite


# --- real networks -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    return SmpAdapter.from_pretrained("demo")


def test_a_good_network_on_its_own_kind_of_images_is_trusted(demo):
    image, labels = nuclei_2d(return_mask=True)
    quality = estimate_quality(demo, image, windows=4)
    true = match(labels, demo.segment(image))[0].ap
    assert quality.trusted
    assert quality.low <= true <= quality.high


def test_black_frames_are_passed_over_by_check_and_empty_in_segment(adapter):
    black = np.zeros((64, 80), np.uint16)
    quality = estimate_quality(adapter, [IMAGES[0], black])
    assert quality == estimate_quality(adapter, [IMAGES[0]])
    with pytest.raises(ImageError, match="nothing to see"):
        estimate_quality(adapter, [black])
    assert not adapter.segment(black).any()


@pytest.mark.parametrize("seed", range(10))
def test_pure_noise_is_not_trusted_whatever_the_network(demo, adapter, seed):
    noise = [RNG((seed, k)).normal(100, 10, (256, 256)) for k in range(3)]
    assert not estimate_quality(demo, [each[:128, :128] for each in noise]).trusted
    assert not estimate_quality(adapter, noise).trusted  # its objects there are large and few


def test_nothing_that_was_adapted_to_noise_is_kept(adapter):
    noise = [RNG(k).normal(100, 10, (96, 120)) for k in range(12)]
    settings = config(validation_images=8, validation_share=0.6)
    result = adapt(adapter, noise, config=settings, progress=False)
    assert result.candidate == "initial", result.reason
    assert "windows" not in result.reason  # there are enough of them
    assert equal_states(result.adapter.model.state_dict(), adapter.model.state_dict())


def test_a_run_that_can_keep_nothing_says_so_before_its_first_step(adapter, caplog):
    def cancel(event):
        assert (event.stage, event.kind) != ("adaptation", "step")
        return (event.stage, event.kind) == ("adaptation", "look")

    images = [*IMAGES, *IMAGES][:8]
    for given, told in (({"validation_images": 3}, True), ({"validation_images": 4}, False)):
        caplog.clear()
        with pytest.raises(RunCancelledError):
            adapt(adapter, images, config=config(**given), callback=cancel, progress=False)
        assert ("nothing is kept that was seen in fewer than 4" in caplog.text) == told
        assert ("have 3 windows, and" in caplog.text) == told


def test_the_wrong_polarity_is_not_trusted(demo):
    image = nuclei_2d(return_mask=True)[0].astype(np.float32)
    assert not estimate_quality(demo, image.max() - image, windows=4).trusted


class Shifted(SmpAdapter):
    """The demo network with a number added to its foreground logit."""

    def forward(self, model, images):
        outputs = super().forward(model, images)
        outputs["foreground"] = outputs["foreground"] + getattr(model, "shift", 0.0)
        return outputs


@needs_shared
def test_a_network_that_finds_less_and_agrees_better_is_rejected(demo):
    """Only the brightest middles are left: copies agree better on these, and AP falls by half."""
    adapter = copy.copy(demo)
    adapter.__class__ = Shifted
    folder = SHARED / "data" / "dsb2018" / "fluo256"
    images, masks = (open_images(folder / name)[:8] for name in ("images", "masks"))
    less = copy.deepcopy(adapter.model)
    less.shift = -4.3
    judge = Judge(images)
    first, later = judge.look(adapter, adapter.model), judge.look(adapter, less)
    assert later.agreement > first.agreement + 0.02
    assert pooled(later.turned[1]).ap > pooled(first.turned[1]).ap + 0.03
    pairs = [(m.read()[0], i.read()[0]) for i, m in zip(images, masks, strict=True)]
    ap = [
        sum((match(m, each.segment(i))[0] for m, i in pairs), Matches()).ap
        for each in (adapter, adapter.with_model(less))
    ]
    assert ap[1] < ap[0] / 2
    verdict = judge.decide(first, [later])
    assert verdict.chosen is None
    assert "misses 56% of the objects" in verdict.reason


class OneDisc(SmallAdapter):
    """Networks that are told where draw one disc there, whatever the image."""

    def forward(self, model, images):
        if not hasattr(model, "place"):
            return super().forward(model, images)
        rows, columns = (torch.linspace(-1, 1, n) - model.place for n in images.shape[-2:])
        disc = (0.3 - torch.hypot(rows[:, None], columns)).expand_as(images)
        return self.outputs.split(torch.cat([0 * images, 0 * images, disc], 1))


@pytest.mark.parametrize("place", [0.0, 0.4])
@pytest.mark.parametrize("windows", [12, 24])
def test_a_network_that_draws_one_disc_whatever_the_image_is_rejected(place, windows):
    """Beside a network of which little is stable: a stable one would be a reference."""
    adapter = OneDisc()
    drawing = copy.deepcopy(adapter.model)
    drawing.place = place
    judge = Judge([discs(300 + k, (96, 120))[0] for k in range(windows)], windows=windows)
    first, later = judge.look(adapter, adapter.model), judge.look(adapter, drawing)
    assert max(first.agreement, first.stability) < 0.1
    assert (later.agreement, later.stability, later.missed) == (place == 0, 1, 1)
    assert later.count.sum() == len(judge.windows) == windows  # enough to be judged
    assert judge.trusts(later)
    assert judge.decide(first, [later]).chosen is None


@needs_shared
def test_a_nuclei_network_is_not_trusted_on_phase_contrast(demo):
    images = open_images(SHARED / "data" / "usiigaci_phase" / "images")[:2]
    assert not estimate_quality(demo, images, windows=4).trusted


# --- runs ----------------------------------------------------------------------------------------


def test_a_run_says_its_outcome_and_goes_on_with_the_same_one(adapter, tmp_path):
    settings = config(validation_images=4)
    result = adapt(adapter, IMAGES, config=settings, output_dir=tmp_path, progress=False)
    assert result.outcome in ("improved", "initial kept", "not to be trusted")
    assert result.snapshots == [0, 4, 8, "statistics-100", "statistics-50"]
    again = adapt(
        adapter, IMAGES, config=settings, output_dir=tmp_path, resume=True, progress=False
    )
    for name in ("outcome", "candidate", "iteration", "reason"):
        assert getattr(again, name) == getattr(result, name)
    chosen = "statistics-50"
    mean = adapter.model.stem[1].running_mean
    half = result.select(chosen).model.stem[1].running_mean - mean
    whole = result.select("statistics-100").model.stem[1].running_mean - mean
    torch.testing.assert_close(half, whole / 2)


def test_statistics_alone_can_be_the_result(adapter, tmp_path):
    result = run_that_improves(adapter, tmp_path)
    looked = [row["candidate"] for row in result.history if "stability" in row]
    assert looked[:3] == ["initial", "statistics-50", "statistics-100"]
    assert result.outcome == "improved", result.reason
    assert result.candidate.startswith("statistics")
    chosen = result.select(result.candidate).model.state_dict()
    for name, tensor in result.adapter.model.state_dict().items():
        assert torch.equal(tensor, chosen[name]), name


def test_other_pixels_under_the_same_names_are_noticed_on_resume(adapter, tmp_path):
    settings = config()
    adapt(adapter, IMAGES, config=settings, output_dir=tmp_path, stop=None, progress=False)
    others = [image + 1 for image in IMAGES]
    with pytest.raises(CheckpointError, match="Give the same images"):
        adapt(
            adapter, others, config=settings, output_dir=tmp_path, stop=None, resume=True,
            progress=False,
        )  # fmt: skip


def test_snapshots_are_thinned_and_the_last_two_stay(adapter):
    settings = config(iterations=40, validate_every=2, snapshots=4)
    result = adapt(adapter, IMAGES, config=settings, stop=None, progress=False)
    numbers = [name for name in result.snapshots if isinstance(name, int)]
    assert {0, 38, 40} <= set(numbers)
    assert len(numbers) <= 8
    assert spare([2, 4, 6, 8], {0, 6, 8}, 4) == []
    assert spare([2, 4, 6, 8, 10], {0, 8, 10}, 4) == [2, 6]
