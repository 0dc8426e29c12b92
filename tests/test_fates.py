"""What became of each instance, against a slow twin."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfadapt import ImageError, match
from selfadapt._fates import fates, summed


def slow_fates(before, after):
    """The same by sets of pixels, one sentence of the definition after the other."""

    def objects(labels):
        values = np.unique(labels[labels > 0])
        return [set(map(tuple, np.argwhere(labels == value))) for value in values]

    old, new = objects(before), objects(after)
    pieces = [[b for b in new if 2 * len(a & b) > len(b)] for a in old]
    parts = [[a for a in old if 2 * len(a & b) > len(a)] for b in new]
    split, merged = ([len(each) > 1 for each in many] for many in (pieces, parts))
    same = [(i, j) for i, a in enumerate(old) for j, b in enumerate(new)
            if 2 * len(a & b) > len(a | b)]  # fmt: skip

    def of(k, own, others, pairs):
        if own[k]:
            return "own"
        if others:
            return "others"
        return "same" if k in pairs else "rest"

    first = [of(i, split, any(a in many for many in parts if len(many) > 1), {i for i, _ in same})
             for i, a in enumerate(old)]  # fmt: skip
    last = [of(j, merged, any(b in many for many in pieces if len(many) > 1), {j for _, j in same})
            for j, b in enumerate(new)]  # fmt: skip
    names = {"own": "split", "others": "merged", "same": "same", "rest": "lost"}
    later = {"own": "merged", "others": "split", "same": "same", "rest": "gained"}
    return [names[each] for each in first], [later[each] for each in last], sum(split), sum(merged)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 10**6), st.integers(0, 6), st.integers(0, 6))
def test_random_labels_meet_the_fates_of_the_slow_twin(seed, few, many):
    rng = np.random.default_rng(seed)
    before = np.kron(rng.integers(0, few + 1, (3, 4)), np.ones((3, 3), int))
    after = np.roll(np.kron(rng.integers(0, many + 1, (3, 4)), np.ones((3, 3), int)), 1, 0)
    after = np.where(rng.random(after.shape) < 0.5, before, after) * 3
    got = fates(before, after, 0.5 + 1e-9)  # above a half there is no choice of pairs
    first, last, split, merged = slow_fates(before, after)
    assert (got.before, got.after) == (first, last)
    assert (got.counts["split"], got.counts["merged"]) == (split, merged)
    assert got.counts["lost"] == first.count("lost")
    assert got.counts["gained"] == last.count("gained")
    assert got.counts["same"] == first.count("same") == last.count("same")


def test_each_fate_has_its_example():
    before = np.array([[1, 1, 0, 2, 2, 2, 2, 0, 3, 3, 4, 4, 0, 6]])
    after = np.array([[9, 9, 0, 1, 1, 2, 2, 0, 5, 5, 5, 5, 7, 0]])
    told = fates(before, after)
    assert told.before == ["same", "split", "merged", "merged", "lost"]
    assert told.after == ["split", "split", "merged", "gained", "same"]
    assert told.counts == {"same": 1, "gained": 1, "lost": 1, "split": 1, "merged": 1}


def test_half_of_an_object_within_another_is_no_part_of_it():
    # both of after lie by exactly half in the one of before
    told = fates([[0, 1, 1, 0]], [[5, 5, 7, 7]])
    assert told.counts["split"] == 0
    assert told.counts["same"] + told.counts["lost"] == 1


def test_back_and_forth_lost_is_gained_and_split_is_merged():
    rng = np.random.default_rng(1)
    before, after = (np.kron(rng.integers(0, 40, (9, 9)), np.ones((4, 4), int)) for _ in range(2))
    there, back = fates(before, after).counts, fates(after, before).counts
    turned = {"same": "same", "gained": "lost", "lost": "gained",
              "split": "merged", "merged": "split"}  # fmt: skip
    assert there == {fate: back[turned[fate]] for fate in there}


def test_without_splits_and_mergers_the_counts_are_those_of_the_matcher():
    before = np.array([[1, 1, 0, 2, 2, 0, 3]])
    after = np.array([[1, 1, 0, 0, 2, 2, 0]])
    counts, told = match(before, after)[0], fates(before, after).counts
    assert (told["same"], told["gained"], told["lost"]) == (counts.tp, counts.fp, counts.fn)


def test_nothing_meets_no_fate_and_counts_add_up():
    empty = np.zeros((3, 3), int)
    assert fates(empty, empty).before == fates(empty, empty).after == []
    one = fates(empty, empty + 1).counts
    assert summed([one, one, fates(empty, empty).counts])["gained"] == 2
    assert set(summed([]).values()) == {0}


def test_images_of_two_sizes_are_refused():
    with pytest.raises(ImageError, match="cannot be compared"):
        fates(np.zeros((2, 2), int), np.zeros((2, 3), int))
