"""Whether a trained network is what its adapter says: true words pass, false ones are named."""

import copy
from functools import cache
from inspect import signature

import numpy as np
import pytest
import torch
from helpers import SHARED, SmallAdapter, discs, needs_shared
from stardist.data import test_image_nuclei_2d as nuclei
from test_heads import centre_vectors
from torch import nn
from torch.nn import functional

from selfadapt import (
    Adapter,
    Binary,
    ImageError,
    ModelError,
    OutputError,
    OutputSpec,
    Rays,
    Scalar,
    Vector,
    check_adapter,
)
from selfadapt._diagnosis import _gap
from selfadapt.testing import AdapterTests
from selfadapt_smp import SmpAdapter

DISCS = [discs(k, (96, 96))[0] for k in range(3)]
NUCLEI = nuclei(return_mask=False)


class Plain(Adapter):
    channels = 1

    def __init__(self, model, **heads):
        self.model, self.outputs = model, OutputSpec(**heads)

    def forward(self, model, images):
        return self.outputs.split(model(images))

    def embedding_module(self, model):
        return None


class Gradient(nn.Module):
    """Brightness, and (dy, dx) of it; or (dx, dy)."""

    def __init__(self, first=2):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.axes = first, 5 - first

    def forward(self, x):
        slopes = [x.roll(-1, axis) - x.roll(1, axis) for axis in self.axes]
        return self.gain * torch.cat([*slopes, x - 0.5], 1)


def test_what_is_true_passes():
    found = check_adapter(Plain(Gradient(), flow=Vector(), p=Binary()), DISCS)
    assert found.findings == []
    assert found.heads.keys() == {"flow", "p"}
    flow = found.heads["flow"]
    assert flow.disagreement < 1e-3 < 1 < min(flow.otherwise.values())
    assert flow.low < 0 < flow.high
    assert found.prepared[0] < 0.1 < 0.9 < found.prepared[1]
    assert "flow: values from -" in str(found)
    assert "Not known: whether images were normalised like this" in str(found)
    remembering = nn.Sequential(Gradient(), nn.BatchNorm2d(3, affine=False))
    assert check_adapter(Plain(remembering, flow=Vector(), p=Binary()), DISCS).unknown == ()


def test_vectors_with_x_first_are_named():
    (finding,) = check_adapter(Plain(Gradient(3), flow=Vector(), p=Binary()), DISCS).findings
    assert finding.startswith("head 'flow'")
    assert finding.endswith("if x comes before y.")


def test_vectors_that_are_none_are_named():
    class Heights(Gradient):
        def forward(self, x):
            return self.gain * torch.cat([x, x**2, x - 0.5], 1)

    (finding,) = check_adapter(Plain(Heights(), flow=Vector(), p=Binary()), DISCS).findings
    assert finding.endswith("if they do not turn with the image.")


class Shifts(nn.Module):
    """What lies three pixels to the right, below, to the left and above: four exact rays."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.gain * torch.cat([x.roll(-3, 3), x.roll(-3, 2), x.roll(3, 3), x.roll(3, 2)], 1)


@pytest.mark.parametrize("row_first", [False, True])
def test_rays_of_another_order_are_named(row_first):
    noise = [np.random.default_rng(k).random((64, 64)) for k in range(2)]
    found = check_adapter(Plain(Shifts(), rays=Rays(4, row_first=row_first)), noise)
    assert len(found.findings) == row_first
    if row_first:
        assert found.findings[0].endswith("if row_first=False.")


def test_channels_that_are_others_altogether_are_named():
    noise = [np.random.default_rng(0).random((64, 64))]
    (finding,) = check_adapter(Plain(Shifts(), height=Scalar(4)), noise).findings
    assert "its channels are others than declared, or nothing is found" in finding


class Place(nn.Module):
    """Says where it is, whatever it sees."""

    def __init__(self, side):
        super().__init__()
        self.place = nn.Parameter(torch.rand(1, 1, side, side))

    def forward(self, x):
        return 0 * x + self.place


def test_disagreement_is_that_of_a_slow_twin():
    torch.manual_seed(0)
    adapter = Plain(Place(32), d=Scalar())
    adapter.fixed_size = 32
    own = adapter.model.place[0, 0].detach().numpy()
    turned = [np.rot90(each, k) for each in (own, own.T) for k in range(4)][1:]
    square = np.mean([((each - own) ** 2).mean() for each in turned])
    found = check_adapter(adapter, DISCS).heads["d"].disagreement
    assert found == pytest.approx(np.sqrt(square / own.var()), rel=1e-4)


def test_a_gap_is_that_of_the_channel_at_the_upper_quartile():
    layer = nn.BatchNorm2d(9)
    with torch.no_grad():
        values = torch.tensor([-1.0, 1.0]).repeat(9, 500)
        layer.running_mean.copy_(torch.tensor([3.0, 0, 8, 1, 5, 2, 7, 4, 6]))
        layer.running_var.copy_(1 / torch.tensor([1.0, 2, 1 / 3, 4, 5, 1 / 6, 7, 8, 9]))
    scaled = layer.running_mean / (layer.running_var + layer.eps).sqrt()
    shift, factor = _gap(layer, values)
    assert shift == pytest.approx(float(scaled.sort().values[6]))
    assert factor == pytest.approx(7, rel=1e-2)


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.gain * x


def test_one_value_everywhere_is_named():
    (finding,) = check_adapter(Plain(Gain(), p=Binary()), DISCS).findings
    assert "one value everywhere" in finding


def test_where_a_head_was_not_trained_it_does_not_count():
    """Noise of its own outside of the objects, which no view has in common."""

    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, x):
            inside = (x > x.mean()).float()
            noise = 9 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
            return self.gain * torch.cat(
                [99 * (inside - 0.5), inside * x + (1 - inside) * noise], 1
            )

    told = Plain(Outside(), p=Binary(), d=Scalar(within="p"))
    assert check_adapter(told, DISCS).heads["d"].disagreement < 0.01
    untold = Plain(Outside(), p=Binary(), d=Scalar())
    assert check_adapter(untold, DISCS).heads["d"].disagreement > 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, []),
        ({"activated": True}, ["declared to give probabilities"]),
        ({"normalize": "none"}, ["it would fit better if they were from 0 to 1"]),
    ],
)
def test_the_bundled_network(options, words):
    adapter = SmpAdapter.from_pretrained("demo", **options)
    before = {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}
    adapter.model.train()
    found = check_adapter(adapter, NUCLEI)
    assert bool(found.findings) == bool(words)
    assert all(any(word in finding for finding in found.findings) for word in words)
    assert adapter.model.training
    for name, tensor in adapter.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


class Skip(Gain):
    """Takes multiples of 4, as a U-Net with two poolings does."""

    def forward(self, x):
        return self.gain + x + functional.interpolate(functional.avg_pool2d(x, 4), scale_factor=4)


def test_multiples_that_the_network_does_not_take_are_named():
    adapter = Plain(Skip(), p=Binary())
    for multiple in (1, 2):
        adapter.size_multiple = multiple
        with pytest.raises(OutputError, match=f"padded to multiples of size_multiple={multiple}: "):
            check_adapter(adapter, DISCS)
    adapter.size_multiple = 4
    assert check_adapter(adapter, DISCS).heads["p"].disagreement < 1e-3


def test_images_without_anything_in_them_are_refused(adapter):
    with pytest.raises(ImageError, match="constant"):
        check_adapter(adapter, np.zeros((64, 64)))


@needs_shared
def test_cellposes_own_network_is_what_our_adapter_says():
    cellpose = pytest.importorskip("selfadapt_cellpose")
    pytest.importorskip("cellpose.resnet_torch")
    weights = SHARED / "models/cpnet_nuclei/weights.pt"
    images = SHARED / "data/dsb2018/fluo256/images"
    found = check_adapter(cellpose.CellposeAdapter(weights, diameter=14), images)
    assert found.findings == []
    assert found.heads["flow"].otherwise["x comes before y"] > 1


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        ("decode", lambda *_: {}["nope"], "`decode` of Broken fails: KeyError: 'nope'"),
        ("decode", lambda *_: torch.zeros(9, 9), "`decode` of Broken gives a Tensor"),
        ("decode", lambda *_: np.zeros((1, 9, 9), np.int32), r"gives a ndarray .int32 .1, 9, 9"),
        ("decode", lambda *_: np.zeros((9, 9), bool), "gives a ndarray .bool"),
        ("embedding_module", lambda _, model: model.nothing, "`embedding_module` of Broken fails"),
        ("embedding_module", lambda *_: "encoder", "`embedding_module` of Broken gives a str"),
    ],
)
def test_what_an_adapter_gets_wrong_is_named(name, broken, message):
    kind = type("Broken", (Plain,), {"decode": lambda *_: np.zeros((9, 9), np.int32), name: broken})
    adapter = kind(Gradient(), flow=Vector(), p=Binary())
    with pytest.raises((ModelError, OutputError), match=message):
        check_adapter(adapter, DISCS)


def test_a_forgotten_model_is_named():
    with pytest.raises(ModelError, match="the adapter's model is missing"):
        check_adapter(Plain(None, p=Binary()), DISCS)


@cache
def trained_vectors():
    """Knows, after seconds, where the centres of discs are, and where there are discs."""
    network = SmallAdapter().model
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for step in range(150):
        image, labels = discs(step)
        centres, inside = torch.from_numpy(centre_vectors(labels)), torch.from_numpy(labels > 0)
        out = network(torch.from_numpy(SmallAdapter().prepare(image[None]))[None])[0]
        loss = functional.binary_cross_entropy_with_logits(out[2], inside.float())
        loss = loss + functional.mse_loss(out[:2], centres)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


class TestTrainedVectors(AdapterTests):
    adapter = SmallAdapter
    images = (discs(900)[0], discs(901)[0])

    def make_adapter(self):
        return self.adapter().with_model(trained_vectors())

    def load(self, path):
        network = copy.deepcopy(trained_vectors())
        network.load_state_dict(torch.load(path))
        return self.adapter().with_model(network)


class Swapped(SmallAdapter):
    """Declares (dx, dy) to be (dy, dx)."""

    def forward(self, model, images):
        return self.outputs.split(model(images)[:, [1, 0, 2]])


def test_swapped_channels_fail_one_law_of_the_suite_and_it_is_that_one(tmp_path):
    suite, failed = TestTrainedVectors(), {}
    suite.adapter = Swapped
    for name in dir(suite):
        if name.startswith("test_"):
            law = getattr(suite, name)
            try:
                law(**{"tmp_path": tmp_path} if "tmp_path" in signature(law).parameters else {})
            except AssertionError as error:
                failed[name] = str(error)
    assert list(failed) == ["test_a_trained_network_is_what_the_adapter_says"]
    assert "Finding: head 'flow'" in failed.popitem()[1]
