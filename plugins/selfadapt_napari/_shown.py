"""Labels layers: those of networks, and previews while a run is at work. In the window's thread."""

from collections.abc import Sequence
from typing import Any

from napari.utils.colormaps import DirectLabelColormap

from selfadapt import Preview
from selfadapt_napari._jobs import Made
from selfadapt_napari._targets import Index, Labels, Target, places_of

OUTLINES = DirectLabelColormap(color_dict={None: "yellow", 0: "transparent"})


class Shown:
    """What the widget adds to the layers of a viewer."""

    def __init__(self, viewer: Any) -> None:
        self._viewer = viewer
        self._places: dict[str, tuple[Target, Index]] = {}
        self._previews: dict[str, Any] = {}

    def targets(self, targets: Sequence[Target]) -> None:
        """On which images a job begins."""
        self._places = places_of(targets)

    def labels(self, made: Sequence[Made]) -> None:
        """Add what networks have found."""
        for each in made:
            layer = self._add(each.labels, f"{each.target.name} {each.network}", each.target)
            if each.network == "before":  # outlines, so that "after" is seen within
                layer.contour = 1
                layer.colormap = OUTLINES

    def previews(self, previews: Sequence[Preview]) -> None:
        """Show in the images what the network that was looked at finds."""
        for preview in previews:
            target, index = self._places[preview.source]
            if preview.after is None:
                continue
            if target.name not in self._previews:
                name = f"{target.name} preview"
                self._previews[target.name] = self._add(target.blank(), name, target)
            layer = self._previews[target.name]
            layer.data[(*index, preview.rows, preview.columns)] = preview.after
        for layer in self._previews.values():
            if layer in self._viewer.layers:  # a user may have deleted it
                layer.refresh()

    def remove_previews(self) -> None:
        """The job has ended."""
        for layer in self._previews.values():
            if layer in self._viewer.layers:
                self._viewer.layers.remove(layer)
        self._previews = {}

    def _add(self, labels: Labels, name: str, target: Target) -> Any:
        """Add labels; what is selected stays so."""
        layers = self._viewer.layers
        selected, active = set(layers.selection), layers.selection.active
        layer = self._viewer.add_labels(labels, name=name, **target.placed)
        layers.selection = {other for other in selected if other in layers}
        layers.selection.active = active if active in layers else None
        return layer
