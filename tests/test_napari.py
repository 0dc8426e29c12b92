"""The dock widget in the real napari, on the real demo network.

The canvas needs a display with OpenGL; without a screen:

    xvfb-run -a env QT_QPA_PLATFORM=xcb LIBGL_ALWAYS_SOFTWARE=1 pytest tests/test_napari.py
"""

import os
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from stardist import data
from test_napari_jobs import QUICK

from selfadapt import estimate_quality
from selfadapt_napari._talk import BUSY
from selfadapt_napari._targets import targets_of
from selfadapt_smp import SmpAdapter

NO_CANVAS = os.environ.get("QT_QPA_PLATFORM", "").startswith(("offscreen", "minimal"))
NO_SCREEN = sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)
if NO_CANVAS or NO_SCREEN:
    pytest.skip(
        "napari's canvas needs a display with OpenGL: xvfb-run -a env QT_QPA_PLATFORM=xcb "
        "LIBGL_ALWAYS_SOFTWARE=1 pytest tests/test_napari.py",
        allow_module_level=True,
    )
os.environ.setdefault("NAPARI_CONFIG", "")  # settings of whoever runs this stay as they are
with warnings.catch_warnings():
    # they describe their models to pydantic by means that it deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    pytest.importorskip("napari")
    from napari import Viewer
    from napari.utils.notifications import notification_manager
    from npe2 import PluginManifest
    from qtpy.QtWidgets import QApplication

IMAGE = data.test_image_nuclei_2d()[:160, 200:380]
DEMO = SmpAdapter.from_pretrained("demo")


def wait(until, seconds=120):
    """Let Qt work until something holds."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it takes too long"
        QApplication.instance().processEvents()
        time.sleep(0.005)


def finish(widget):
    wait(lambda: not widget.busy)
    return widget.text.toPlainText()


@pytest.fixture
def viewer():
    shown = Viewer(show=False)
    yield shown
    with_window = hasattr(shown.window, "_qt_window")
    if with_window:
        shown.close()
    QApplication.instance().processEvents()
    wait(lambda: not BUSY.locked())


@pytest.fixture
def widget(viewer):
    """As the menu opens it, with the demo network chosen and a layer selected."""
    viewer.add_image(IMAGE, name="cells", scale=(0.5, 0.25), translate=(7, 3), units="um")
    _, opened = viewer.window.add_plugin_dock_widget("selfadapt", "Adapt a segmentation model")
    finish(opened)
    opened.form.adapter.setCurrentIndex(opened.form.adapter.findData("smp"))
    opened.form.model.line.setText("demo")
    opened.form.options.setText(QUICK)
    return opened


def test_the_manifest_names_the_widget():
    manifest = PluginManifest.from_distribution("selfadapt")
    manifest.validate_imports()
    (contributed,) = manifest.contributions.widgets
    assert contributed.display_name == "Adapt a segmentation model"


def test_segment_adds_labels_where_the_layer_lies_and_keeps_the_selection(viewer, widget):
    other = viewer.add_image(IMAGE[::-1], name="other")
    viewer.layers.selection = {viewer.layers["cells"], other}
    widget.segment_button.click()
    assert widget.busy
    assert not widget.segment_button.isEnabled()
    told = finish(widget)
    labels = viewer.layers["cells segmented"]
    np.testing.assert_array_equal(labels.data, DEMO.segment(IMAGE))
    image = viewer.layers["cells"]
    np.testing.assert_array_equal(labels.scale, image.scale)
    np.testing.assert_array_equal(labels.translate, image.translate)
    assert labels.units == image.units
    np.testing.assert_allclose(labels.extent.world, image.extent.world)
    assert viewer.layers.selection == {image, other}
    count = labels.data.max() + viewer.layers["other segmented"].data.max()
    assert f"Segmented: {count} objects." in told


def test_check_says_the_estimate_in_words(widget):
    widget.check_button.click()
    told = finish(widget)
    quality = estimate_quality(DEMO, IMAGE)
    assert f"estimated without labels: {quality}." in told
    assert quality.verdict[1:] in told


def test_adapt_shows_previews_then_before_and_after_and_the_verdict(viewer, widget):
    shown, bars = [], []
    viewer.layers.events.inserted.connect(lambda event: shown.append(event.value.name))
    previews = []

    def ended():
        bars.append(widget.bar.text())
        previews.extend(layer.data.copy() for layer in viewer.layers if "preview" in layer.name)
        return not widget.busy

    widget.adapt_button.click()
    wait(ended)
    assert shown == ["cells preview", "cells before", "cells after"]
    initial = DEMO.segment(IMAGE)
    there = [each > 0 for each in previews if each.any()]
    assert there
    assert (there[0] & (initial > 0)).sum() > 0.5 * (there[0] | (initial > 0)).sum()
    assert any("adaptation, default" in bar for bar in bars)
    layers = viewer.layers
    assert [layer.name for layer in layers] == ["cells", "cells before", "cells after"]
    np.testing.assert_array_equal(layers["cells before"].data, initial)
    assert (layers["cells before"].contour, layers["cells after"].contour) == (1, 0)
    after = widget.result.adapter.segment(IMAGE)
    np.testing.assert_array_equal(layers["cells after"].data, after)
    np.testing.assert_array_equal(layers["cells after"].scale, layers["cells"].scale)
    told = widget.text.toPlainText()
    assert told.startswith(widget.result.outcome.capitalize())
    assert widget.result.reason[1:] in told
    assert f"labels: {widget.result.quality}." in told
    assert f"After: {after.max()} objects." in told


def test_the_adapted_network_can_be_asked_and_saved(viewer, widget, tmp_path):
    assert not widget.save_button.isEnabled()
    assert not widget.adapted.isEnabled()
    widget.form.options.setText(f"{QUICK} scale=0.6")
    widget.adapt()
    finish(widget)
    widget.form.options.setText("")
    widget.adapted.setChecked(True)
    widget.segment()
    finish(widget)
    found = widget.result.adapter.segment(IMAGE)
    np.testing.assert_array_equal(viewer.layers["cells adapted"].data, found)
    assert (found != DEMO.segment(IMAGE)).any()
    assert widget.save_button.isEnabled()
    widget.save(str(tmp_path / "adapted"))
    assert "Saved: " in widget.text.toPlainText()
    again = SmpAdapter.from_pretrained(str(tmp_path / "adapted"))
    np.testing.assert_array_equal(again.segment(IMAGE), found)
    (tmp_path / "file").touch()
    widget.save(str(tmp_path / "file" / "inside"))
    assert "Not a directory" in widget.text.toPlainText() or "file" in notified()


def notified():
    return notification_manager.records[-1].message


def test_cancel_keeps_the_best_so_far(viewer, widget):
    widget.form.options.setText(f"{QUICK} iterations=5000 validate_every=5000")
    widget.adapt()
    wait(lambda: "adaptation, default" in widget.bar.text())
    widget.cancel_button.click()
    assert not widget.cancel_button.isEnabled()
    told = finish(widget)
    assert "Cancelled; " in told
    assert widget.result.candidate == "initial"
    np.testing.assert_array_equal(viewer.layers["cells after"].data, DEMO.segment(IMAGE))


def test_cancel_at_once_has_nothing_to_show(viewer, widget):
    widget.check()
    widget.cancel()
    assert "Cancelled: there is nothing to show yet." in finish(widget)
    widget.adapt()
    widget.cancel()
    assert "Cancelled: there is nothing to show yet." in finish(widget)
    assert [layer.name for layer in viewer.layers] == ["cells"]


@pytest.mark.parametrize("button", ["segment_button", "check_button", "adapt_button"])
def test_an_error_is_a_sentence_and_a_notification_and_the_widget_goes_on(viewer, widget, button):
    widget.form.model.line.setText("no such model")
    getattr(widget, button).click()
    told = finish(widget)
    assert "no such model" in told
    assert notified() in told
    assert len(viewer.layers) == 1
    widget.form.model.line.setText("demo")
    widget.segment()
    assert "objects" in finish(widget)


def test_without_a_selected_image_layer_it_says_what_to_do(viewer, widget):
    viewer.layers.selection = {viewer.add_labels(np.zeros((4, 4), int))}
    widget.segment()
    assert not widget.busy
    assert "select its layer" in widget.text.toPlainText()
    widget.form.which.setCurrentIndex(widget.form.which.findData("all"))
    widget.segment()
    assert "objects" in finish(widget)


def test_closing_the_dock_during_a_run_ends_it(viewer, widget):
    widget.form.options.setText(f"{QUICK} iterations=100000 validate_every=100000")
    widget.adapt()
    wait(lambda: "adaptation, default" in widget.bar.text())
    viewer.window.remove_dock_widget(widget)
    wait(lambda: not BUSY.locked(), 30)
    finish(widget)
    assert [layer.name for layer in viewer.layers] == ["cells"]


def test_closing_the_viewer_during_a_run_ends_it(viewer, widget):
    widget.form.options.setText(f"{QUICK} iterations=100000 validate_every=100000")
    widget.adapt()
    wait(lambda: "adaptation, default" in widget.bar.text())
    viewer.close()
    wait(lambda: not BUSY.locked(), 30)


def test_layers_may_be_deleted_during_a_run(viewer, widget):
    widget.adapt()
    wait(lambda: "cells preview" in viewer.layers)
    viewer.layers.clear()
    told = finish(widget)
    assert "objects" in told
    assert [layer.name for layer in viewer.layers] == ["cells before", "cells after"]


def test_a_second_widget_is_refused_while_a_run_is_at_work(viewer, widget):
    widget.form.options.setText(f"{QUICK} iterations=100000 validate_every=100000")
    widget.adapt()
    wait(lambda: "adaptation, default" in widget.bar.text())
    widget.check()  # as a script might
    other = type(widget)(viewer)
    finish(other)
    other.form.adapter.setCurrentIndex(other.form.adapter.findData("smp"))
    other.form.model.line.setText("demo")
    other.segment()
    assert "Another run is at work" in finish(other)
    widget.cancel()
    finish(widget)
    other.close()


def test_adapters_that_lack_something_are_shown_with_the_command(widget):
    missing = "adapter 'absent' needs absent, which is not installed: pip install 'x[absent]'"
    widget.form.list_adapters({"absent": missing, "smp": None})
    combo = widget.form.adapter
    assert [combo.itemData(k) for k in range(2)] == ["smp", "absent"]
    assert "pip install 'x[absent]'" in combo.itemText(1)
    assert not combo.model().item(1).isEnabled()
    assert combo.currentData() == "smp"
    assert "min_distance" in widget.form.options.toolTip()


def test_a_run_folder_is_kept_and_is_a_model(viewer, widget, tmp_path):
    widget.form.folder.line.setText(str(tmp_path / "run"))
    widget.adapt()
    finish(widget)
    assert (tmp_path / "run" / "result.json").exists()
    after = viewer.layers["cells after"].data
    widget.form.model.line.setText(str(tmp_path / "run"))
    widget.form.options.setText("")
    widget.segment()
    finish(widget)
    np.testing.assert_array_equal(viewer.layers["cells segmented"].data, after)


def test_colour_images_are_one_image_without_their_opacity(viewer, widget):
    rgba = np.stack([IMAGE, IMAGE, IMAGE, np.full_like(IMAGE, 9)], -1)
    colour = np.clip(rgba.astype(float) / 20, 0, 255).astype(np.uint8)
    layer = viewer.add_image(colour, name="colour", rgb=True, scale=(2, 3))
    viewer.layers.selection = {layer}
    widget.form.options.setText("gray=true")
    widget.segment()
    finish(widget)
    labels = viewer.layers["colour segmented"]
    gray = SmpAdapter.from_pretrained("demo", gray=True)
    expected = gray.segment(colour[..., :3], channel_axis=-1)
    np.testing.assert_array_equal(labels.data, expected)
    assert labels.data.any()
    np.testing.assert_array_equal(labels.scale, (2, 3))


def test_every_plane_of_a_stack_is_an_image(viewer, widget):
    planes = np.stack([IMAGE[:96, :96], IMAGE[-96:, -96:]])[:, None]
    layer = viewer.add_image(planes, name="stack", scale=(5, 4, 2, 1), translate=(1, 2, 3, 4))
    viewer.layers.selection = {layer}
    widget.adapt()
    finish(widget)
    labels = viewer.layers["stack before"]
    assert labels.data.shape == planes.shape
    for k in range(2):
        np.testing.assert_array_equal(labels.data[k, 0], DEMO.segment(planes[k, 0]))
    np.testing.assert_array_equal(labels.scale, layer.scale)
    np.testing.assert_array_equal(labels.translate, layer.translate)


def test_channels_of_a_layer_are_one_image_and_its_labels_are_seen_on_each(viewer, widget):
    channels = np.stack([np.zeros_like(IMAGE), IMAGE, np.zeros_like(IMAGE)])
    layer = viewer.add_image(
        np.stack([channels, channels[::-1]]),
        name="both",
        scale=(1, 4, 2, 1),
        translate=(0, 9, 0, 0),
    )
    (target,) = targets_of([layer], channel_axis=1)
    image = next(image for _, image in target.planes())
    np.testing.assert_array_equal(image.read(), channels)
    np.testing.assert_array_equal(
        image.read_window(slice(3, 9), slice(2, 5)), channels[:, 3:9, 2:5]
    )
    labels = target.blank()
    labels[:, 0, 20, 30] = 7
    shown = viewer.add_labels(labels, **target.placed)
    for channel in range(3):
        where = layer.data_to_world((1, channel, 20, 30))
        viewer.dims.set_point((0, 1), where[:2])
        assert shown.get_value(where, world=True) == 7
    viewer.layers.selection = {layer}
    widget.form.channel_axis.setValue(2)
    widget.segment()
    assert "no channels along axis 2" in widget.text.toPlainText()


def test_layers_can_be_channels_of_one_image(viewer, widget):
    first = viewer.layers["cells"]
    second = viewer.add_image(IMAGE[::-1], name="membranes")
    (target,) = targets_of([first, second], "channels")
    ((index, image),) = target.planes()
    assert index == ()
    assert target.name == "cells + membranes"
    np.testing.assert_array_equal(image.read(), np.stack([IMAGE, IMAGE[::-1]]))
    np.testing.assert_array_equal(target.placed["scale"], first.scale)
    viewer.add_image(IMAGE[:50], name="small")
    viewer.layers.selection = set(viewer.layers)
    widget.form.together.setCurrentIndex(widget.form.together.findData("channels"))
    widget.segment()
    assert "small [50, 180]" in widget.text.toPlainText()


def test_of_several_resolutions_the_finest_is_segmented(viewer, widget):
    layer = viewer.add_image([IMAGE, IMAGE[::2, ::2]], name="pyramid", multiscale=True)
    viewer.layers.selection = {layer}
    widget.segment()
    finish(widget)
    np.testing.assert_array_equal(viewer.layers["pyramid segmented"].data, DEMO.segment(IMAGE))


@pytest.mark.parametrize("refused", ["preview", "after"])
def test_a_viewer_that_refuses_a_layer_does_not_end_the_widget(viewer, widget, refused):
    def refuse(event):
        if refused in event.value.name:
            raise OSError("no more layers")

    viewer.layers.events.inserted.connect(refuse)
    widget.adapt()
    told = finish(widget)
    assert told.startswith(widget.result.outcome.capitalize())
    assert "no more layers" in told
    assert "cells before" in viewer.layers
    assert widget.adapt_button.isEnabled()


PROGRAM = """
import sys, time
import napari
viewer = napari.Viewer(show=False)
from qtpy.QtWidgets import QApplication
_, widget = viewer.window.add_plugin_dock_widget("selfadapt")
while widget.busy:
    QApplication.instance().processEvents()
    time.sleep(0.01)
assert "torchvision" in sys.modules and widget.form.adapter.findData("smp") >= 0
viewer.close()
print("survived")
"""


def test_in_a_process_of_its_own_the_widget_opens_after_the_window():
    """Not so without `_load_triton`, where Mesa has loaded another LLVM (selfadapt_napari)."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["survived"]), done.stderr[-2000:]
