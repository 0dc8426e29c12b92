"""The one matcher against StarDist's and Cellpose's."""

import tracemalloc

import cellpose.metrics
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stardist.data import test_image_nuclei_2d as nuclei_2d
from stardist.matching import matching

from selfadapt import ImageError, Matches, match
from selfadapt._matching import ranked

IOUS = (0.1, 0.5, 0.75, 0.95)


def relabelled(labels):
    """Consecutive numbers; 0 stays background where there is none, too."""
    numbers = np.unique(np.append(labels.ravel(), 0), return_inverse=True)[1]
    return numbers[:-1].reshape(labels.shape).astype(np.int32)


def assert_equal_to_others(reference, predicted):
    ours = match(reference, predicted, IOUS)
    with np.errstate(invalid="ignore"):  # theirs divides 0 by 0 where neither has background
        ap, tp, fp, fn = cellpose.metrics.average_precision(
            [relabelled(reference)], [relabelled(predicted)], threshold=list(IOUS)
        )
    for k, counts in enumerate(ours):
        theirs = matching(reference, predicted, IOUS[k])
        assert (counts.tp, counts.fp, counts.fn) == (theirs.tp, theirs.fp, theirs.fn)
        assert (counts.tp, counts.fp, counts.fn) == (tp[0, k], fp[0, k], fn[0, k])
        if counts.tp + counts.fp + counts.fn:
            np.testing.assert_allclose(counts.ap, theirs.accuracy)
            np.testing.assert_allclose(counts.ap, ap[0, k], rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 9))
@example(437, 12, 1)  # no background in the reference
@example(199546, 7, 1)  # nor in the prediction
def test_random_labels_match_as_in_stardist_and_cellpose(seed, count, block):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, count + 1, (6, 7))
    reference = np.kron(coarse, np.ones((block, block), int)).astype(np.int32)
    predicted = np.roll(reference, rng.integers(0, block, 2), (0, 1))
    predicted[rng.random(predicted.shape) < 0.1] = rng.integers(0, count + 2)
    assert_equal_to_others(reference, predicted)


@pytest.mark.parametrize("shift", [0, 1, 4, 9])
def test_real_labels_match_as_in_stardist_and_cellpose(shift):
    _, labels = nuclei_2d(return_mask=True)
    labels = labels.astype(np.int32)
    assert_equal_to_others(labels, np.roll(labels, shift, 0))


def test_labels_need_not_be_consecutive_and_counts_add_up():
    first = match(np.array([[7, 7, 0, 300]]), np.array([[2, 2, 9, 0]]))[0]
    assert first == Matches(tp=1, fp=1, fn=1)
    assert (first + first).ap == first.ap == 1 / 3
    assert first.fn_rate == first.precision == first.recall == 0.5


def test_thousands_of_instances_are_compared_in_little_memory():
    """One pair of rivals among them: a table of all against all would take 512 MB."""
    side = 90
    labels = np.kron(np.arange(1, side**2 + 1).reshape(side, side), np.ones((4, 4), int))
    other = labels.copy()
    other[:2, :4], other[2:4, :4] = side**2 + 1, side**2 + 2  # both halves of the first one
    tracemalloc.start()
    counts = match(labels, other, np.arange(0.1, 1, 0.1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts[0] == counts[4] == Matches(side**2, 1, 0)
    assert counts[5] == Matches(side**2 - 1, 2, 1)
    assert peak < 50e6


def test_scores_of_nothing_are_nan():
    empty = match(np.zeros((3, 3), int), np.zeros((3, 3), int))[0]
    assert np.isnan([empty.ap, empty.precision, empty.recall, empty.fn_rate]).all()


@pytest.mark.parametrize(
    ("reference", "predicted", "message"),
    [
        (np.zeros((3, 4), int), np.zeros((4, 3), int), r"\(3, 4\) and \(4, 3\)"),
        (np.zeros((3, 4)), np.zeros((3, 4), int), "float64"),
        (np.zeros(4, int), np.zeros(4, int), "label image"),
        (np.full((2, 2), -1), np.zeros((2, 2), int), "label image"),
    ],
)
def test_what_is_no_pair_of_label_images_is_refused(reference, predicted, message):
    with pytest.raises(ImageError, match=message):
        match(reference, predicted)


@pytest.mark.parametrize("kind", ["i1", "u1", "i4", "u4", "i8", "u8"])
def test_label_numbers_of_any_integer_type_stay_apart(kind):
    top = np.iinfo(kind).max
    labels = np.array([[0, top, top - 1, 1, 2]], kind)
    assert match(labels, np.array([[0, 1, 2, 3, 4]])) == [Matches(4, 0, 0)]
    assert ranked(labels)[0].tolist() == [[0, 4, 3, 1, 2]]
