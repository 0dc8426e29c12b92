"""Conformance suites for authors of heads and adapters: subclass them in your own tests.

    from selfadapt.testing import AdapterTests, HeadTests

    class TestMyHead(HeadTests):
        head = MyHead()
        def encode(self, labels): ...       # ground truth, [channels, H, W]

    class TestMyAdapter(AdapterTests):
        def make_adapter(self): ...         # with a small network
        def load(self, path): ...           # what `adapter.save(path)` wrote

pytest then runs every law below against them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfadapt._adapter import Adapter
from selfadapt._config import Config
from selfadapt._crops import crop_side
from selfadapt._diagnosis import check_adapter
from selfadapt._heads import Head
from selfadapt._predict import predict
from selfadapt._run import SelfAdaptation
from selfadapt._spec import OutputSpec
from selfadapt._symmetry import D4, Symmetry

__all__ = ["AdapterTests", "HeadTests", "example_labels"]


def example_labels(grid: tuple[int, int] = (1, 1)) -> NDArray[np.int32]:
    """A non-square label image of asymmetric objects, `[48, 64]`.

    The pixels beyond the last point of the grid are background, as they leave the lattice when
    the image is flipped.
    """
    labels = np.zeros((48, 64), np.int32)
    rows, columns = np.mgrid[:48, :64]
    for number, (y, x, height, width) in enumerate(
        [(12, 14, 9, 6), (30, 20, 6, 11), (16, 44, 10, 8), (36, 50, 7, 9), (5, 30, 8, 5)], 1
    ):
        inside = ((rows - y) / height) ** 2 + ((columns - x) / width) ** 2 < 1
        inside &= (rows - y) + 0.5 * (columns - x) < 0.7 * height  # breaks every symmetry
        labels[inside & (labels == 0)] = number
    labels[48 - grid[0] + 1 :] = 0
    labels[:, 64 - grid[1] + 1 :] = 0
    return labels


class HeadTests:
    """The laws of a head. Set `head`, and override `encode` (and `tolerance` where it is coarse).

    A head may pass the group law with its channels in the wrong order; the encoder law finds it.
    """

    head: Head
    tolerance: float = 1e-4
    """Largest difference of an encoded value, in its own unit."""

    def encode(self, labels: NDArray[np.int32]) -> Tensor | NDArray[np.float32]:
        """The head's ground truth of label image `[H, W]`: `[channels, H / grid, W / grid]`."""
        raise NotImplementedError("override encode: the ground truth of a label image")

    @pytest.mark.parametrize("second", D4, ids=str)
    @pytest.mark.parametrize("first", D4, ids=str)
    def test_group_law(self, first: Symmetry, second: Symmetry) -> None:
        """act(g @ h) is act(h), then act(g)."""
        head = self.head
        product = second @ first
        if not {first, second, product} <= set(head.symmetries):
            pytest.skip("not all of these are symmetries of this head")
        field = torch.rand(2, head.channels, 12, 8, generator=torch.Generator().manual_seed(0))
        expected = head.transform(second, head.transform(first, field))
        torch.testing.assert_close(head.transform(product, field), expected)

    @pytest.mark.parametrize("g", D4, ids=str)
    def test_encoder_law(self, g: Symmetry) -> None:
        """Encoding the moved labels gives the moved and mixed encoding."""
        head = self.head
        if g not in head.symmetries:
            pytest.skip("no symmetry of this head")
        labels = example_labels(head.grid)
        moved = g.move(torch.from_numpy(labels), head.grid).numpy()
        got = torch.as_tensor(self.encode(np.ascontiguousarray(moved)))
        expected = head.transform(g, torch.as_tensor(self.encode(labels)))
        assert got.shape == expected.shape
        assert float((got - expected).abs().max()) <= self.tolerance

    def test_symmetries_form_a_group(self) -> None:
        """The identity is there, and with two symmetries their product."""
        symmetries = set(self.head.symmetries)
        assert Symmetry() in symmetries
        assert all(g @ h in symmetries for g in symmetries for h in symmetries)

    def test_agreeing_votes_are_their_own_pseudo_label_without_doubt_about_spread(self) -> None:
        """Equal views change nothing, and give shapes that fit together."""
        head = self.head
        votes = head.values(self._raw()).expand(4, -1, -1, -1, -1)
        label = head.pseudo_label(votes, "soft")
        torch.testing.assert_close(label, votes[0])
        doubt, group = head.doubt(votes)
        assert doubt.shape == group.shape == head.loss(self._raw(), label).shape
        assert not group.is_floating_point()
        assert int(group.min()) >= 0
        assert int(group.max()) < head.groups

    def test_the_loss_has_a_gradient_and_falls_along_it(self) -> None:
        """A small step against the gradient lowers the loss."""
        raw = self._raw().requires_grad_()
        target = self.head.values(self._raw(seed=1))
        loss = self.head.loss(raw, target).mean()
        (gradient,) = torch.autograd.grad(loss, raw)
        lower = self.head.loss(raw - 0.1 * gradient, target).mean()
        assert bool(gradient.any())
        assert bool(lower < loss)

    def _raw(self, seed: int = 0) -> Tensor:
        """Raw output inside (0, 1), a legal value for logits and probabilities alike."""
        generator = torch.Generator().manual_seed(seed)
        raw = 0.1 + 0.8 * torch.rand(2, self.head.channels, 6, 10, generator=generator)
        is_softmax = getattr(self.head, "logits", True) is False and self.head.channels > 1
        return raw / raw.sum(1, keepdim=True) if is_softmax else raw


class AdapterTests:
    """The contract of an adapter. Override `make_adapter`, `load` and, where needed, the rest."""

    image_shape: tuple[int, int, int] | None = None
    """Shape `[C, H, W]` of a test image, no multiple of what the network takes. By default it is
    70 x 91 pixels, with the channels that the adapter takes."""
    images: Any = None
    """Images on which the network of `make_adapter` works: set them if it is a trained one."""
    channel_axis: int | None = None
    """Of these images: see `open_images`."""

    def make_adapter(self) -> Adapter:
        """An adapter around a small network."""
        raise NotImplementedError("override make_adapter")

    def load(self, path: Path) -> Adapter:
        """Open what `make_adapter().save(path)` has written."""
        raise NotImplementedError("override load")

    def make_image(self) -> NDArray[np.float32]:
        """A test image `[C, H, W]`."""
        shape = self.image_shape or (self.make_adapter().channels or 1, 70, 91)
        rng = np.random.default_rng(0)
        rows, columns = np.mgrid[: shape[1], : shape[2]] / 9
        image = np.sin(rows) * np.cos(columns) + rng.normal(0, 0.1, shape)
        return np.asarray(image, np.float32)

    def test_outputs_fit_the_spec(self) -> None:
        """forward gives each head with its channels and grid."""
        adapter = self.make_adapter()
        assert isinstance(adapter.outputs, OutputSpec)
        images = self._batch(adapter)
        with torch.no_grad():
            outputs = adapter.forward(adapter.model.eval(), images)
        adapter.outputs.check(outputs, (images.shape[-2], images.shape[-1]))

    def test_forward_uses_the_model_it_is_given(self) -> None:
        """Student and teacher share the adapter, so forward must not use its own model."""
        adapter = self.make_adapter()
        adapter.model.eval()
        images = self._batch(adapter)
        run = SelfAdaptation(adapter, self._config())
        with torch.no_grad():
            before = adapter.forward(run.student.eval(), images)
            for parameter in run.student.parameters():
                parameter.mul_(1.5)
            after = adapter.forward(run.student, images)
        assert any(not torch.equal(before[name], after[name]) for name in before)

    def test_a_trained_network_is_what_the_adapter_says(self) -> None:
        """Views agree as the heads are declared (skipped where `images` are not set)."""
        if self.images is None:
            pytest.skip("set `images`, on which the network of make_adapter works")
        found = check_adapter(self.make_adapter(), self.images, channel_axis=self.channel_axis)
        assert not found.findings, str(found)

    def test_prepare_gives_float32_of_the_right_channels(self) -> None:
        """prepare keeps [C, H, W] and gives the channels that the network takes."""
        adapter = self.make_adapter()
        prepared = adapter.prepare(self.make_image())
        assert prepared.dtype == np.float32
        assert prepared.ndim == 3
        assert adapter.channels in (None, prepared.shape[0])

    def test_the_embedding_is_there_and_depends_on_the_image(self) -> None:
        """The bottleneck is neither constant nor random (skipped where it is declared absent)."""
        adapter = self.make_adapter()
        if adapter.embedding_module(adapter.model) is None:
            pytest.skip("the adapter says that it has no bottleneck")
        image = torch.from_numpy(adapter.prepare(self.make_image()))
        first, again = (predict(adapter, adapter.model, image).embedding for _ in range(2))
        other = predict(adapter, adapter.model, -image).embedding
        assert first is not None
        assert again is not None
        assert other is not None
        torch.testing.assert_close(first, again)
        assert float((first - other).abs().max()) > 0

    def test_segment_gives_instances_at_the_size_of_the_image(self) -> None:
        """Any size goes in and comes out (skipped where there is no decode)."""
        adapter = self.make_adapter()
        if not adapter.can_decode:
            pytest.skip("the adapter says that it cannot decode")
        image = self.make_image()
        labels = adapter.segment(image, channel_axis=0)
        assert labels.shape == image.shape[1:]
        assert labels.dtype == np.int32

    def test_adapting_leaves_the_given_model_alone(self) -> None:
        """Two steps move student and teacher, and no bit of the adapter's model."""
        adapter = self.make_adapter()
        before = {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}
        run = SelfAdaptation(adapter, self._config())
        for _ in range(2):
            info = run.step(self._batch(adapter))
            assert bool(info["loss"].isfinite())
        for name, tensor in adapter.model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        for model in (run.student, run.teacher):
            moved = zip(model.parameters(), run.initial.parameters(), strict=True)
            assert any(not torch.equal(now, first) for now, first in moved)

    def test_what_is_saved_predicts_the_same_when_loaded(self, tmp_path: Path) -> None:
        """save, then load: equal outputs, bit for bit."""
        adapter = self.make_adapter()
        adapter.save(tmp_path / "model")
        loaded = self.load(tmp_path / "model")
        images = self._batch(adapter)
        with torch.no_grad():
            before = adapter.forward(adapter.model.eval(), images)
            after = loaded.forward(loaded.model.eval(), images)
        for name in adapter.outputs:
            assert torch.equal(before[name], after[name]), name

    def _config(self) -> Config:
        return Config(iterations=4, batch_size=2, crop=32, views=2, learning_rate=1e-3, warmup=0)

    def _batch(self, adapter: Adapter) -> Tensor:
        image = torch.from_numpy(adapter.prepare(self.make_image()))
        side = crop_side(adapter, self._config())
        repeats = [-(-side // size) for size in image.shape[-2:]]
        image = image.tile(1, *repeats)[:, :side, :side]
        return torch.stack([image, image.flip(-1)])
