"""What a user fills in: the form at the top of the widget."""

from pathlib import Path
from typing import Any

from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QComboBox,
    QFileDialog,
    QFormLayout,
    QHBoxLayout,
    QLineEdit,
    QMenu,
    QSpinBox,
    QToolButton,
    QWidget,
)

from selfadapt_napari._jobs import SETTINGS, Choice, options_of

NO_AXIS = -1


class PathField(QWidget):
    """A line for a name or path, with a button that lists files and folders."""

    def __init__(self, hint: str, *, files: bool) -> None:
        super().__init__()
        self.line = QLineEdit()
        self.line.setPlaceholderText(hint)
        button = QToolButton()
        button.setText("…")
        button.setToolTip("Browse")
        menu = QMenu(button)
        if files:
            menu.addAction("File …", self._ask_file)
        menu.addAction("Folder …", self._ask_folder)
        button.setMenu(menu)
        button.setPopupMode(QToolButton.ToolButtonPopupMode.InstantPopup)
        row = QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(self.line)
        row.addWidget(button)

    def _ask_file(self) -> None:
        self._take(QFileDialog.getOpenFileName(self, "Model", self._folder())[0])

    def _ask_folder(self) -> None:
        self._take(QFileDialog.getExistingDirectory(self, "Folder", self._folder()))

    def _folder(self) -> str:
        return str(Path(self.line.text()).parent) if self.line.text() else ""

    def _take(self, path: str) -> None:
        if path:
            self.line.setText(path)


class Form(QWidget):
    """Network and images."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = QComboBox()
        narrow = QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon
        self.adapter.setSizeAdjustPolicy(narrow)  # what is missing is a long sentence
        self.adapter.currentIndexChanged.connect(self._hint)
        self.model = PathField("name, file, folder or RUN folder", files=True)
        self.options = QLineEdit()
        self.options.setPlaceholderText("none needed; such as iterations=400")
        self.which = QComboBox()
        self.which.addItem("selected image layers", "selected")
        self.which.addItem("all image layers", "all")
        self.together = QComboBox()
        self.together.addItem("images of their own", "images")
        self.together.addItem("channels of one image", "channels")
        self.channel_axis = QSpinBox()
        self.channel_axis.setRange(NO_AXIS, 9)
        self.channel_axis.setValue(NO_AXIS)
        self.channel_axis.setSpecialValueText("none")
        self.channel_axis.setToolTip(
            "Axis, counted from 0, along which one layer holds channels. None: all axes but the "
            "last two are those of a stack. Colour images (RGB) need none."
        )
        self.folder = PathField("none: nothing is kept on disk", files=False)
        self.folder.setToolTip("The RUN folder: snapshots, and the model to use later.")
        rows = QFormLayout(self)
        rows.setContentsMargins(0, 0, 0, 0)
        for label, field in {
            "Adapter": self.adapter,
            "Model": self.model,
            "Options": self.options,
            "Images": self.which,
            "Layers are": self.together,
            "Channel axis": self.channel_axis,
            "RUN folder": self.folder,
        }.items():
            rows.addRow(label, field)

    def list_adapters(self, found: dict[str, str | None]) -> None:
        """Show which adapters there are, and what is missing for others."""
        self.adapter.clear()
        for name, missing in sorted(found.items(), key=lambda item: (item[1] is not None, item[0])):
            self.adapter.addItem(name if missing is None else f"{name}: {missing}", name)
            self.adapter.setItemData(self.adapter.count() - 1, missing, Qt.ItemDataRole.ToolTipRole)
            self.adapter.model().item(self.adapter.count() - 1).setEnabled(missing is None)

    def _hint(self) -> None:
        """Say which options the adapter has."""
        item = self.adapter.model().item(self.adapter.currentIndex())
        names = options_of(item.data(Qt.ItemDataRole.UserRole)) if item and item.isEnabled() else []
        self.options.setToolTip(
            f"name=value, with a space between two. Of the adapter: {', '.join(names) or 'none'}. "
            f"Of a run: calibrate, {', '.join(SETTINGS)}."
        )

    @property
    def choice(self) -> Choice:
        """The network."""
        adapter = self.adapter.currentData() or ""
        return Choice(adapter, self.model.line.text(), self.options.text())

    def layers(self, viewer: Any) -> list[Any]:
        """The image layers that are meant."""
        from napari.layers import Image

        images = [layer for layer in viewer.layers if isinstance(layer, Image)]
        if self.which.currentData() == "all":
            return images
        return [layer for layer in images if layer in viewer.layers.selection]
