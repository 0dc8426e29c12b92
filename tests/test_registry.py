"""Adapters come through entry points, a stranger's as ours."""

import sys

import pytest
from helpers import SmallAdapter

from selfadapt import AdapterNotFoundError, adapters, load_adapter
from selfadapt.testing import AdapterTests

PLUGIN = """
import numpy as np
import torch
from torch import nn
from selfadapt import Adapter, Binary, OutputSpec

class StrangersAdapter(Adapter):
    channels = 1

    def __init__(self, model):
        self.model = model
        self.outputs = OutputSpec(p=Binary())

    def forward(self, model, images):
        return {"p": model(images)}

    def embedding_module(self, model):
        return model[0]

    @classmethod
    def from_pretrained(cls, model, *, width: int = 4):
        torch.manual_seed(0)
        layers = nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 1)
        network = nn.Sequential(*layers)
        if model != "new":
            network.load_state_dict(torch.load(model))
        return cls(network)
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A third party's distribution on sys.path, as pip would lay it out."""

    def write(name, code, requires=()):
        (tmp_path / f"{name}_package.py").write_text(code)
        info = tmp_path / f"{name}_dist-1.0.dist-info"
        info.mkdir()
        metadata = [f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: 1.0", *requires]
        (info / "METADATA").write_text("\n".join(metadata) + "\n")
        entry = f"[selfadapt.adapters]\n{name} = {name}_package:StrangersAdapter\n"
        (info / "entry_points.txt").write_text(entry)
        return f"{name}_package"

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for module in [m for m in sys.modules if m.endswith("_package")]:
        del sys.modules[module]


def test_a_strangers_adapter_is_found_and_only_the_one_asked_for_is_loaded(plugin):
    plugin("first", PLUGIN)
    other = plugin("second", PLUGIN)
    assert load_adapter("first").__name__ == "StrangersAdapter"
    assert other not in sys.modules


def test_a_strangers_adapter_passes_the_conformance_suite(plugin, tmp_path_factory):
    plugin("stranger", PLUGIN)
    kind = load_adapter("stranger")

    class Suite(AdapterTests):
        def make_adapter(self):
            return kind.from_pretrained("new")

        def load(self, path):
            return kind.from_pretrained(str(path))

    suite = Suite()
    suite.test_outputs_fit_the_spec()
    suite.test_forward_uses_the_model_it_is_given()
    suite.test_prepare_gives_float32_of_the_right_channels()
    suite.test_the_embedding_is_there_and_depends_on_the_image()
    suite.test_adapting_leaves_the_given_model_alone()
    suite.test_what_is_saved_predicts_the_same_when_loaded(tmp_path_factory.mktemp("saved"))


def test_an_unknown_name_lists_what_is_installed(plugin):
    plugin("stranger", PLUGIN)
    message = "'nobody'; installed are: cellpose, smp, stardist, stranger"
    with pytest.raises(AdapterNotFoundError, match=message):
        load_adapter("nobody")


def test_a_missing_library_names_the_extra_that_brings_it(plugin):
    requires = ['Requires-Dist: absent-library>=2; extra == "torchy"', "Provides-Extra: torchy"]
    plugin("lacking", "import absent_library.core", requires)
    with pytest.raises(AdapterNotFoundError, match=r"pip install 'lacking-dist\[torchy\]'"):
        load_adapter("lacking")
    assert "pip install" in adapters()["lacking"]
    assert adapters()["smp"] is None


@pytest.mark.parametrize(
    ("code", "error"),
    [("import not_declared_anywhere", ModuleNotFoundError), ("1 / 0", ZeroDivisionError)],
)
def test_an_adapters_own_error_comes_through(plugin, code, error):
    plugin("broken", code)
    with pytest.raises(error):
        load_adapter("broken")
    assert error.__name__ in adapters()["broken"]


class TestSmallAdapter(AdapterTests):
    def make_adapter(self):
        return SmallAdapter()

    def load(self, path):
        import torch

        adapter = SmallAdapter(seed=1)
        adapter.model.load_state_dict(torch.load(path))
        return adapter


class IgnoresItsModel(SmallAdapter):
    def forward(self, model, images):
        return super().forward(self.model, images)


class TestTheSuiteFindsAnAdapterThatIgnoresTheModelItIsGiven(TestSmallAdapter):
    def make_adapter(self):
        return IgnoresItsModel()

    def test_forward_uses_the_model_it_is_given(self):
        with pytest.raises(AssertionError):
            super().test_forward_uses_the_model_it_is_given()

    def test_adapting_leaves_the_given_model_alone(self):
        with pytest.raises((AssertionError, RuntimeError)):
            super().test_adapting_leaves_the_given_model_alone()
