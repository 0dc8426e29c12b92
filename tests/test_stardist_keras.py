"""Against StarDist and TensorFlow themselves, where they are installed (CI has an environment)."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # loaded after TensorFlow, the triton in it crashes
from csbdeep.utils import normalize
from stardist.data import test_image_nuclei_2d as nuclei
from stardist.geometry import star_dist
from stardist.utils import edt_prob
from torch.nn import functional

from selfadapt import match, predict
from selfadapt_stardist import Architecture, StarDist2D, StardistAdapter

pytestmark = [
    pytest.mark.skipif(find_spec("tensorflow") is None, reason="needs tensorflow"),
    pytest.mark.filterwarnings("ignore"),  # TensorFlow's and Keras's own
]

SMALL = {"unet_n_filter_base": 4, "net_conv_after_unet": 8, "n_rays": 8}
CONFIGS = {
    "grid 1": {},
    "grid 2": {"grid": (2, 2), "n_rays": 32},
    "grid 4, two channels": {"grid": (4, 4), "n_channel_in": 2},
    "unequal grid, three channels, classes": {"grid": (2, 1), "n_channel_in": 3, "n_classes": 2},
    "unequal grid, four channels": {"grid": (4, 2), "n_channel_in": 4},
    "depth 2, one class": {"unet_n_depth": 2, "n_classes": 1},
    "depth 1, no features": {"unet_n_depth": 1, "net_conv_after_unet": 0},
    "no features, classes": {"unet_n_depth": 2, "net_conv_after_unet": 0, "n_classes": 2},
    "one convolution": {"unet_n_conv_per_depth": 1, "grid": (2, 2)},
    "three convolutions": {"unet_n_conv_per_depth": 3, "unet_n_depth": 2},
    "batch norm, dropout": {"unet_batch_norm": True, "unet_dropout": 0.2, "unet_n_depth": 2},
    "kernel, pool, expansion": {
        "unet_kernel_size": (3, 5), "unet_pool": (2, 4), "unet_n_depth": 2, "unet_expansion": 1.5,
    },
    "activations": {"unet_activation": "elu", "unet_last_activation": "tanh", "unet_prefix": "u_"},
    "newer activations": {"unet_activation": "gelu", "unet_last_activation": "swish"},
    "softsign": {"unet_activation": "softsign", "unet_n_depth": 1},
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def official(request, tmp_path_factory):
    """An official model with random weights, in its folder, with thresholds that find something."""
    from stardist.models import Config2D
    from stardist.models import StarDist2D as Official

    folder = tmp_path_factory.mktemp("models")
    config = Config2D(**(SMALL | CONFIGS[request.param]))
    model = Official(config, name="model", basedir=str(folder))
    rng = np.random.default_rng(0)
    weights = []
    for variable in model.keras_model.weights:
        shape = tuple(variable.shape)
        spread = (2 / np.prod(shape[:-1])) ** 0.5 if len(shape) == 4 else 0.1
        value = rng.normal(0, spread, shape)
        weights.append(abs(value) + 0.5 if "variance" in variable.name else value)
    model.keras_model.set_weights(weights)
    dist = model.keras_model.get_layer("dist")
    dist.set_weights([dist.get_weights()[0], dist.get_weights()[1] + 6])
    model.keras_model.save_weights(str(folder / "model" / "weights_best.h5"))
    prob = model.predict(image_for(model))[0]
    thresholds = {"prob": float(np.quantile(prob, 0.7)), "nms": 0.35}
    (folder / "model" / "thresholds.json").write_text(json.dumps(thresholds))
    return Official(None, name="model", basedir=str(folder))


def image_for(model, rows=131, columns=118):
    """A cut of a real image, normalised, [H, W, C]; its sides are no multiples of a power of 2."""
    whole = nuclei() / np.percentile(nuclei(), 99.8)
    channels = range(model.config.n_channel_in)
    cuts = [whole[70 * k : 70 * k + rows, 90 : 90 + columns] for k in channels]
    return np.stack(cuts, -1).astype(np.float32)


def test_outputs_are_those_of_keras(official):
    adapter, image = StardistAdapter(official.logdir), image_for(official)
    outputs = predict(adapter, adapter.model, torch.from_numpy(image.transpose(2, 0, 1))).outputs
    theirs = official.predict(image)
    ours = [outputs["prob"].sigmoid()[0], outputs["dist"].clamp(min=1e-3).permute(1, 2, 0)]
    if "prob_class" in outputs:
        ours.append(outputs["prob_class"].softmax(0).permute(1, 2, 0))
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        np.testing.assert_allclose(mine, other, atol=1e-5, rtol=1e-6)


def test_the_same_outputs_give_the_same_instances(official):
    image = image_for(official)
    prob, dist = official.predict(image)[:2]
    adapter = StardistAdapter(official.logdir)
    adapter.outputs["prob"].logits = False  # Keras gives probabilities
    outputs = {
        "prob": torch.from_numpy(prob)[None],
        "dist": torch.from_numpy(dist).permute(2, 0, 1),
    }
    ours = adapter.decode(outputs, image.shape[:2])
    theirs, _ = official.predict_instances(image)
    assert theirs.max() > 3
    np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network that was trained for a moment on real nuclei, saved for StarDist."""
    path = tmp_path_factory.mktemp("trained") / "model"
    image, labels = nuclei(return_mask=True)
    image = normalize(image, 1, 99.8)
    torch.manual_seed(0)
    small = {"unet_n_filter_base": 8, "unet_n_depth": 2, "net_conv_after_unet": 16}
    network = StarDist2D(Architecture(n_rays=16, grid=(2, 2), **small))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    rng = np.random.default_rng(0)
    for _ in range(150):
        y, x = rng.integers(0, 512 - 128, 2)
        window = np.s_[y : y + 128, x : x + 128]
        prob, dist = network(torch.from_numpy(image[window].copy())[None, None])
        truth = torch.from_numpy(edt_prob(labels[window][::2, ::2]))[None, None]
        rays = torch.from_numpy(star_dist(labels[window].astype(np.int32), 16, grid=(2, 2)))
        off = (truth * (dist - rays.permute(2, 0, 1)[None]).abs()).mean() / truth.mean()
        outside = ((1 - truth) * dist.abs()).mean()
        loss = functional.binary_cross_entropy_with_logits(prob, truth) + 0.2 * off + 0.01 * outside
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    probable = network.eval()(torch.from_numpy(image)[None, None])[0].detach().sigmoid()
    StardistAdapter(network, prob_thresh=float(probable.quantile(0.9))).save(path)
    return path


@pytest.mark.parametrize("scale", [1, 0.7, 1.6])
@pytest.mark.parametrize("size", [(512, 512), (301, 257)])
def test_instances_are_those_of_predict_instances(trained, scale, size):
    from stardist.models import StarDist2D as Official

    official = Official(None, name="model", basedir=str(trained.parent))
    image = nuclei()[: size[0], : size[1]]
    theirs, _ = official.predict_instances(normalize(image, 1, 99.8), scale=scale)
    assert theirs.max() > 20
    exact = match(theirs, StardistAdapter(trained, scale=scale).segment(image), [0.99])[0]
    # rounding may change which of two candidates, all but equally probable, suppresses the other
    assert exact.fp + exact.fn <= 0.02 * theirs.max()


def test_the_unmodified_stardist_loads_what_is_saved_and_predicts_the_same(official, tmp_path):
    from stardist.models import StarDist2D as Official

    adapter = StardistAdapter(official.logdir)
    adapter.save(tmp_path / "unchanged")
    with torch.no_grad():
        for parameter in adapter.model.parameters():
            parameter.mul_(1.01)
    adapter.save(tmp_path / "changed")
    image = image_for(official)
    unchanged = Official(None, name="unchanged", basedir=str(tmp_path))
    assert unchanged.thresholds == official.thresholds
    assert vars(unchanged.config) == vars(official.config)
    for mine, other in zip(unchanged.predict(image), official.predict(image), strict=True):
        np.testing.assert_array_equal(mine, other)
    changed = Official(None, name="changed", basedir=str(tmp_path))
    outputs = predict(adapter, adapter.model, torch.from_numpy(image.transpose(2, 0, 1))).outputs
    prob, dist = changed.predict(image)[:2]
    np.testing.assert_allclose(outputs["prob"].sigmoid()[0], prob, atol=1e-5)
    np.testing.assert_allclose(
        outputs["dist"].clamp(min=1e-3).permute(1, 2, 0), dist, atol=1e-5, rtol=1e-6
    )


def test_a_network_that_was_built_here_opens_in_stardist(tmp_path):
    from stardist.models import StarDist2D as Official

    torch.manual_seed(0)
    made = StarDist2D(Architecture(**SMALL, grid=(2, 2), n_classes=2))
    adapter = StardistAdapter(made)
    adapter.save(tmp_path / "made")
    theirs = Official(None, name="made", basedir=str(tmp_path))
    image = image_for(theirs)
    outputs = predict(adapter, made, torch.from_numpy(image.transpose(2, 0, 1))).outputs
    np.testing.assert_allclose(outputs["prob"].sigmoid()[0], theirs.predict(image)[0], atol=1e-5)


PAGE = Path(__file__).parents[1] / "docs" / "stardist.md"


@pytest.fixture
def blocks(trained, tmp_path, monkeypatch):
    """The blocks of the page that need TensorFlow, by language; here is what they start from."""
    shutil.copytree(trained, tmp_path / "run" / "model")
    monkeypatch.chdir(tmp_path)
    found = re.findall(r"^<!-- not run: needs TensorFlow -->\n```(\w+)\n(.*?)^```$",
                       PAGE.read_text(), re.M | re.S)  # fmt: skip
    assert [language for language, _ in found] == ["python", "bash"]
    return dict(found)


def test_the_page_segments_with_stardist_itself(blocks, trained):
    exec(blocks["python"], names := {"image": nuclei()})
    assert names["labels"].max() > 20
    exact = match(names["labels"], StardistAdapter(trained).segment(nuclei()), [0.99])[0]
    assert exact.fp + exact.fn <= 0.02 * names["labels"].max()


@pytest.mark.skipif(find_spec("tf_keras") is None, reason="needs tf_keras")
def test_the_command_of_the_page_exports_a_saved_folder_for_fiji(blocks, trained, tmp_path):
    import tensorflow as tf

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-ec", blocks["bash"]], env=os.environ | {"PATH": path}, check=True)
    with zipfile.ZipFile(tmp_path / "run" / "model" / "TF_SavedModel.zip") as packed:
        packed.extractall(tmp_path / "opened")
    opened = tf.saved_model.load(str(tmp_path / "opened"))
    image = normalize(nuclei(), 1, 99.8)[:160, :192].astype(np.float32)
    given = tf.constant(image[None, ..., None])
    theirs = opened.signatures["serving_default"](given)["output"].numpy()[0]
    adapter = StardistAdapter(trained)
    ours = predict(adapter, adapter.model, torch.from_numpy(image)[None]).outputs
    assert theirs.shape == (160, 192, 17)  # as Fiji asks for: one output, at the image's size
    prob, dist = ours["prob"].sigmoid()[0], ours["dist"].permute(1, 2, 0)
    np.testing.assert_allclose(theirs[::2, ::2, 0], prob, atol=1e-5)
    np.testing.assert_allclose(theirs[::2, ::2, 1:], dist, atol=1e-4)


def test_with_keras_3_stardist_refuses_to_export(trained):
    """When it does no more, docs/stardist.md can do without Keras 2."""
    from stardist.models import StarDist2D as Official

    with pytest.raises(NotImplementedError, match="no longer supported with Keras 3"):
        Official(None, name="model", basedir=str(trained.parent)).export_TF()
