"""The picture of docs/napari.md: the widget after a run.

    python benchmarks/napari_screenshot.py docs/images/napari.png

The real napari, the bundled demo network, and a part of the demo's image that is made hard by scale
and noise only (no negative). Without a screen: `xvfb-run -a -s "-screen 0 1400x1000x24" env
QT_QPA_PLATFORM=xcb LIBGL_ALWAYS_SOFTWARE=1 python ...`.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from napari import Viewer
from PIL import Image
from qtpy.QtWidgets import QApplication

from selfadapt._demo import demo_image

SIZE = 1280, 860
"""Of the window, in pixels."""
COLOURS = 200
"""Of the picture, which makes it small."""


def wait(until: Callable[[], bool]) -> None:
    """Let Qt work until something holds."""
    while not until():
        QApplication.instance().processEvents()
        time.sleep(0.01)


def main(path: Path) -> None:
    """Run what a user would, and take the picture."""
    negative, _ = demo_image()
    image = (negative.max() - negative)[:300, 200:540]
    viewer = Viewer(show=True)
    viewer.window.resize(*SIZE)
    viewer.add_image(image, name="nuclei", contrast_limits=(0, float(np.percentile(image, 99.8))))
    _, widget = viewer.window.add_plugin_dock_widget("selfadapt")
    wait(lambda: not widget.busy)
    form = widget.form
    form.adapter.setCurrentIndex(form.adapter.findData("smp"))
    form.model.line.setText("demo")
    form.options.setText("iterations=40 candidates=default,batch,teacher")
    widget.adapt()
    wait(lambda: not widget.busy)
    viewer.layers["nuclei after"].opacity = 0.5
    viewer.reset_view(margin=0)
    end = time.monotonic() + 10  # napari's notification fades
    wait(lambda: time.monotonic() > end)
    taken = Image.fromarray(viewer.screenshot(canvas_only=False, flash=False)[..., :3])
    taken.quantize(COLOURS).save(path, optimize=True)
    print(widget.text.toPlainText())
    viewer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
