"""The adapters of the examples pass the conformance suites that are shipped."""

import importlib.util
import inspect
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from stardist.data import test_image_nuclei_2d as nuclei
from test_heads import centre_vectors

from selfadapt import Adapter, Config, SelfAdaptation
from selfadapt.testing import AdapterTests, HeadTests

EXAMPLES = Path(__file__).parents[1] / "examples"
MESMER = Path(__file__).parent / "mesmer_references" / "outputs.npz"
"""What deepcell-toolbox makes of images and of maps; written by `make.py` beside it."""
NEEDS = {
    "mesmer_like": (),
    "unetr_decoder": ("torch_em",),
    "torchvision_semantic": (),
    "instanseg_unet": ("instanseg", "seaborn", "edt"),
    "own_model": (),
}
"""Examples with an adapter, and the packages without which they are not run."""


@cache
def example(name):
    for package in NEEDS[name]:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loaded(adapter, path):
    adapter.model.load_state_dict(torch.load(path))
    return adapter


@cache
def trained_mesmer():
    module = example("mesmer_like")
    adapter = module.MesmerLikeAdapter(module.MesmerLike())
    image, labels, _, _ = module.cells()
    module.train(adapter, image, labels, steps=25)
    return adapter


class TestMesmerLike(AdapterTests):
    """Trained for seconds, on the images of its training."""

    channel_axis = 0

    @property
    def images(self):
        return [example("mesmer_like").cells()[0]]

    def make_adapter(self):
        return trained_mesmer()

    def load(self, path):
        module = example("mesmer_like")
        return loaded(module.MesmerLikeAdapter(module.MesmerLike()), path)

    @pytest.mark.parametrize("compartment", ["cell", "nucleus"])
    def test_the_watershed_is_deepcells_to_the_pixel(self, compartment):
        stored = np.load(MESMER)
        distance, interior = (
            torch.from_numpy(stored[f"{compartment}_{of}"] / np.float32(255))
            for of in ("distance", "interior")
        )
        outputs = {
            f"{compartment}_distance": distance[None],
            f"{compartment}_classes": torch.stack([0 * interior, interior, 1 - interior]),
        }
        adapter = example("mesmer_like").MesmerLikeAdapter(None, compartment)
        labels = adapter.decode(outputs, tuple(distance.shape))
        assert labels.max() > 50
        np.testing.assert_array_equal(labels, stored[f"{compartment}_labels"])

    def test_images_are_normalised_as_deepcell_does(self):
        stored = np.load(MESMER)
        prepared = self.make_adapter().prepare(stored["image"])
        np.testing.assert_allclose(prepared, stored["prepared"], atol=1e-3)  # kept as float16

    def test_a_missing_membrane_image_stays_dark(self):
        image = self.make_image()
        image[1] = 0
        assert not self.make_adapter().prepare(image)[1].any()


class TestUnetrDecoder(AdapterTests):
    def make_adapter(self):
        torch.manual_seed(0)
        module = example("unetr_decoder")
        return module.UnetrAdapter(module.network())

    def load(self, path):
        return loaded(self.make_adapter(), path)

    def test_the_decoder_alone_adapts_and_holds_less(self):
        module, adapter = example("unetr_decoder"), self.make_adapter()
        moved = moved_by_two_steps(adapter, module.DECODER)
        assert "out_conv.weight" in moved
        assert not any(name.startswith("encoder.") for name in moved)
        assert held_share(module, adapter, module.DECODER) < 0.9


class TestUnetrWithLora(AdapterTests):
    def make_adapter(self):
        adapter = TestUnetrDecoder().make_adapter()
        example("unetr_decoder").add_lora(adapter.model)
        return adapter

    def load(self, path):
        return loaded(self.make_adapter(), path)

    def test_it_gives_the_same_before_it_learns(self):
        image = 255 * torch.rand(1, 1, 128, 128)
        without, with_lora = TestUnetrDecoder().make_adapter(), self.make_adapter()
        with torch.no_grad():
            first, now = (a.forward(a.model.eval(), image) for a in (without, with_lora))
        for name in first:
            assert torch.equal(first[name], now[name]), name

    def test_of_the_encoder_only_lora_adapts(self):
        module, adapter = example("unetr_decoder"), self.make_adapter()
        moved = moved_by_two_steps(adapter, module.LORA)
        assert "out_conv.weight" in moved
        expected = {
            f"encoder.blocks.{k}.attn.qkv.{layer}.weight"
            for k in range(len(adapter.model.encoder.blocks))
            for layer in ("down", "up")
        }
        assert {name for name in moved if name.startswith("encoder.")} == expected
        assert held_share(module, adapter, module.LORA) < 0.95


def held_share(module, adapter, trainable):
    """Of the memory that a step holds when everything adapts."""
    some, everything = (
        module.held(adapter, Config(trainable=chosen, views=1, batch_size=1))
        for chosen in (trainable, "all")
    )
    return some / everything


def moved_by_two_steps(adapter, trainable):
    """Names of the weights and buffers of which a bit has changed."""
    run = SelfAdaptation(adapter, Config(trainable=trainable, views=1, batch_size=1, warmup=0))
    for _ in range(2):  # at the first, LoRA's first layer has no gradient: the other one is zero
        run.step(255 * torch.rand(1, 1, 128, 128))
    first = run.initial.state_dict()
    return {name for name, now in run.student.state_dict().items() if not now.equal(first[name])}


class TestTorchvisionSemantic(AdapterTests):
    def make_adapter(self):
        torch.manual_seed(0)
        module = example("torchvision_semantic")
        return module.SemanticAdapter(module.network())

    def load(self, path):
        return loaded(self.make_adapter(), path)

    def test_classes_have_the_size_of_the_image(self):
        classes = self.make_adapter().classes(self.make_image()[0])
        assert classes.shape == self.make_image().shape[1:]
        assert set(np.unique(classes)) <= {0, 1, 2}


class TestInstanSegUnet(AdapterTests):
    def make_adapter(self):
        torch.manual_seed(0)
        module = example("instanseg_unet")
        return module.InstanSegAdapter(module.network())

    def load(self, path):
        return loaded(self.make_adapter(), path)

    def test_the_classifier_of_the_instances_stays_as_it_is(self):
        run = SelfAdaptation(self.make_adapter(), Config(views=1, batch_size=1, warmup=0))
        run.step(torch.rand(1, 1, 32, 32))
        first = run.initial.pixel_classifier.state_dict()
        for name, now in run.student.pixel_classifier.state_dict().items():
            assert torch.equal(now, first[name]), name


class TestOffsets(HeadTests):
    @property
    def head(self):
        return example("instanseg_unet").Offsets()

    def encode(self, labels):
        return centre_vectors(labels)[[1, 0]]

    def test_raw_leads_back(self):
        raw = torch.randn(1, 2, 4, 4)
        torch.testing.assert_close(self.head.raw(self.head.values(raw)), raw)


class TestOwnModel(AdapterTests):
    """The bundled network, as if it were somebody's own."""

    channel_axis = 0

    @property
    def images(self):
        return [nuclei(return_mask=False)[None]]

    def make_adapter(self):
        module = example("own_model")
        return module.MyAdapter(module.smp.from_pretrained(module.DEMO_MODEL))

    def load(self, path):
        return loaded(self.make_adapter(), path)


@pytest.mark.parametrize("name", NEEDS)
def test_an_adapter_is_short(name):
    module = example(name)
    (adapter,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Adapter) and value is not Adapter
    )
    lines = len(inspect.getsource(adapter).splitlines())
    assert lines < (25 if name == "own_model" else 60)
