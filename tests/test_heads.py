"""Heads and symmetries: the conformance suite on ours and on users' heads, and against twins."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from stardist.geometry import star_dist

from selfadapt import (
    D4,
    Binary,
    Categorical,
    Classification,
    OutputError,
    OutputSpec,
    Rays,
    Regression,
    Scalar,
    Symmetry,
    Vector,
)
from selfadapt.testing import HeadTests, example_labels


def centre_vectors(labels: np.ndarray) -> np.ndarray:
    """(dy, dx) from each object pixel to its object's centre."""
    flow = np.zeros((2, *labels.shape), np.float32)
    for number in np.unique(labels[labels > 0]):
        where = np.nonzero(labels == number)
        for axis in (0, 1):
            flow[axis][where] = where[axis].mean() - where[axis]
    return flow


def sampled(field: np.ndarray, head) -> np.ndarray:
    return np.ascontiguousarray(field[:, :: head.grid[0], :: head.grid[1]])


class TestBinary(HeadTests):
    head = Binary()

    def encode(self, labels):
        return sampled((labels > 0).astype(np.float32)[None], self.head)


class TestBinaryProbabilityGrid2(TestBinary):
    head = Binary(logits=False, grid=2)


class TestCategorical(HeadTests):
    head = Categorical(3)

    def encode(self, labels):
        edge = ndimage.grey_erosion(labels, 3, mode="nearest") != labels
        kind = np.where(labels == 0, 0, np.where(edge, 2, 1))
        return np.stack([kind == k for k in range(3)]).astype(np.float32)


class TestCategoricalProbability(TestCategorical):
    head = Categorical(3, logits=False)


class TestScalar(HeadTests):
    head = Scalar()

    def encode(self, labels):
        return ndimage.distance_transform_edt(labels > 0).astype(np.float32)[None]


class TestVector(HeadTests):
    head = Vector()

    def encode(self, labels):
        return sampled(centre_vectors(labels), self.head)


class TestVectorGrid2(TestVector):
    head = Vector(grid=2)


class TestVectorGrid4(TestVector):
    head = Vector(grid=4, joint=True)


class TestVectorUnequalGrid(TestVector):
    head = Vector(grid=(2, 1))


class TestRays8(HeadTests):
    head = Rays(8)
    tolerance = 1e-3

    def encode(self, labels):
        dist = star_dist(labels, self.head.channels, grid=self.head.grid)
        return np.ascontiguousarray(dist.transpose(2, 0, 1))


class TestRays32Grid2(TestRays8):
    head = Rays(32, grid=2)


class TestRays32Grid4(TestRays8):
    head = Rays(32, grid=4)


class TestRays26(TestRays8):
    """Four symmetries, as Rays(30) has. Of 30 rays, those at 30 degrees step exactly half a pixel
    in StarDist's encoder, whose rounding then depends on the direction."""

    head = Rays(26)


class TestRaysRowFirst(TestRays8):
    head = Rays(16, row_first=True)

    def encode(self, labels):
        """The convention of ports: ray k points to row cos, column sin."""
        dist = star_dist(labels, 16)  # ours: ray k at row sin, column cos
        return np.ascontiguousarray(dist.transpose(2, 0, 1)[(4 - np.arange(16)) % 16])


class SymmetricTensor(Regression):
    """A user's head: a symmetric 2 x 2 tensor, channels (yy, yx, xx)."""

    channels = 3

    def act(self, g, field):
        m = field.new_tensor(g.matrix)
        tensor = field[..., [0, 1, 1, 2], :, :].unflatten(-3, (2, 2))
        turned = torch.einsum("ij,...jkhw,lk->...ilhw", m, tensor, m)
        return turned.flatten(-4, -3)[..., [0, 1, 3], :, :]


class TestUsersSymmetricTensor(HeadTests):
    head = SymmetricTensor()

    def encode(self, labels):
        y, x = centre_vectors(labels)
        return np.stack([y * y, y * x, x * x])


class Affinities(Binary):
    """A user's head: is the neighbour up, down, left, right in the same object?"""

    offsets: ClassVar = [(-1, 0), (1, 0), (0, -1), (0, 1)]

    def __init__(self):
        super().__init__(4)

    def act(self, g, field):
        (yy, yx), (xy, xx) = g.inverse.matrix
        sources = [(yy * y + yx * x, xy * y + xx * x) for y, x in self.offsets]
        return field[..., [self.offsets.index(source) for source in sources], :, :]


class TestUsersAffinities(HeadTests):
    head = Affinities()

    def encode(self, labels):
        padded = np.pad(labels, 1)
        shifted = [
            padded[1 + y : y + 1 + labels.shape[0], 1 + x : x + 1 + labels.shape[1]]
            for y, x in Affinities.offsets
        ]
        return np.stack([(labels > 0) & (labels == other) for other in shifted]).astype(np.float32)


class Swapped(Vector):
    """A wrong head: its channels are (dx, dy), its act is that of (dy, dx)."""


class TestTheEncoderLawFindsSwappedChannels(TestVector):
    head = Swapped()

    def encode(self, labels):
        return centre_vectors(labels)[::-1].copy()

    @pytest.mark.parametrize("g", [g for g in D4 if g.transposes or g.flip], ids=str)
    def test_encoder_law(self, g):
        if g.matrix[0][0] == g.matrix[1][1] and g.matrix[0][1] == g.matrix[1][0]:
            pytest.skip("this symmetry treats rows and columns alike")
        with pytest.raises(AssertionError):
            super().test_encoder_law(g)


@given(st.sampled_from(D4), st.sampled_from(D4), st.sampled_from([1, 2, 4]))
def test_moving_pixels_obeys_the_group_law_on_every_lattice(g, h, step):
    pixels = torch.arange(8 * 12).reshape(8, 12)
    steps = (step, step)
    assert torch.equal(g.move(h.move(pixels, steps), steps), (g @ h).move(pixels, steps))
    assert torch.equal(g.inverse.move(g.move(pixels, steps), steps), pixels)


@pytest.mark.parametrize("g", D4, ids=str)
@pytest.mark.parametrize("step", [2, 4])
def test_moving_maps_lattice_points_onto_lattice_points(g, step):
    on_lattice = torch.zeros(8, 16)
    on_lattice[::step, ::step] = 1
    moved = g.move(on_lattice, (step, step))
    expected = torch.zeros_like(moved)
    expected[::step, ::step] = 1
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("turns", range(4))
def test_turns_are_those_of_torch_and_flips_those_of_the_columns(turns):
    pixels = torch.arange(15).reshape(3, 5)
    assert torch.equal(Symmetry(turns).move(pixels), pixels.rot90(turns, (-2, -1)))
    flipped = Symmetry(turns, flip=True).move(pixels)
    assert torch.equal(flipped, pixels.flip(-1).rot90(turns, (-2, -1)))


@pytest.mark.parametrize(("rays", "count"), [(32, 8), (30, 4), (31, 2), (5, 2)])
def test_rays_name_the_symmetries_that_they_represent(rays, count):
    assert len(Rays(rays).symmetries) == count


def test_rays_refuse_a_symmetry_that_they_cannot_express():
    with pytest.raises(OutputError, match="30 rays cannot express"):
        Rays(30).act(Symmetry(1), torch.zeros(30, 2, 2))


def test_the_spec_intersects_symmetries_and_joins_grids():
    spec = OutputSpec(dist=Rays(30, grid=2), prob=Binary(grid=2), flow=Vector())
    assert len(spec.symmetries) == 4
    assert spec.grid == (2, 2)
    assert spec.step("flow") == (2, 2)
    assert spec.step("dist") == (1, 1)


def test_a_spec_that_does_not_fit_names_both_sides():
    spec = OutputSpec(flow=Vector(), cellprob=Binary())
    with pytest.raises(OutputError, match=r"gives 4 channels, the heads ask for 3 \(flow 2"):
        spec.split(torch.zeros(1, 4, 8, 8))
    with pytest.raises(OutputError, match=r"\['flow', 'p'\], the spec names \['cellprob', 'flow'"):
        spec.check({"flow": torch.zeros(1, 2, 8, 8), "p": torch.zeros(1, 1, 8, 8)}, (8, 8))
    outputs = {"flow": torch.zeros(1, 2, 8, 8), "cellprob": torch.zeros(1, 1, 4, 4)}
    with pytest.raises(OutputError, match=r"'cellprob'.*Binary.*\[1, 8, 8\].*\[1, 4, 4\]"):
        spec.check(outputs, (8, 8))


@pytest.mark.parametrize(
    "make", [lambda: Binary(0), lambda: Rays(2), lambda: Vector(grid=0), OutputSpec]
)
def test_heads_refuse_impossible_shapes(make):
    with pytest.raises(OutputError):
        make()


def test_losses_equal_those_of_torch():
    raw, other = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    p = other.softmax(1)
    categorical = torch.nn.functional.cross_entropy(raw, p, reduction="none")
    torch.testing.assert_close(Categorical(3).loss(raw, p)[:, 0], categorical)
    torch.testing.assert_close(
        Binary(3, logits=False).loss(raw.sigmoid(), p), Binary(3).loss(raw, p), atol=1e-5, rtol=1e-4
    )


def test_hard_targets_are_decisions():
    votes = torch.tensor([0.9, 0.2, 0.4]).view(1, 1, 3, 1, 1)
    assert Binary(3).pseudo_label(votes, "hard").flatten().tolist() == [1, 0, 0]
    assert Categorical(3).pseudo_label(votes, "hard").flatten().tolist() == [1, 0, 0]
    assert isinstance(Binary(), Classification)


def test_example_labels_have_no_symmetry_of_their_own():
    labels = torch.from_numpy(example_labels())
    square = labels[:48, :48]
    assert all(not torch.equal(g.move(square), square) for g in D4[1:])
