"""The dock widget. All that touches the viewer is done here, in the thread of the window."""

import html
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from napari.qt.threading import create_worker
from napari.utils.notifications import notification_manager, show_error, show_info
from qtpy.QtCore import QEvent, QTimer
from qtpy.QtWidgets import (
    QCheckBox,
    QFileDialog,
    QHBoxLayout,
    QProgressBar,
    QPushButton,
    QTextBrowser,
    QVBoxLayout,
    QWidget,
)

from selfadapt import (
    AdaptationResult,
    Adapter,
    Event,
    Quality,
    RunCancelledError,
    SelfAdaptError,
    adapters,
)
from selfadapt._errors import sentence
from selfadapt_napari import _jobs as jobs
from selfadapt_napari import _words as words
from selfadapt_napari._form import NO_AXIS, Form
from selfadapt_napari._jobs import Made
from selfadapt_napari._shown import Shown
from selfadapt_napari._talk import BUSY, Done, Failed, Said, Talk, do
from selfadapt_napari._targets import Target, targets_of

EVERY = 100
"""Milliseconds between two looks at what the run has said."""


class AdaptWidget(QWidget):
    """Choose a network and layers, segment, check, adapt and save.

    Args:
        napari_viewer: napari's, whose layers are the images.
    """

    def __init__(self, napari_viewer: "Any") -> None:
        super().__init__()
        self.viewer = napari_viewer
        self.shown = Shown(napari_viewer)
        self.result: AdaptationResult | None = None
        """What the last run has ended with."""
        self._talk: Talk | None = None
        self._then: Callable[[Any], None] = lambda _: None
        self._lines: list[str] = []
        closed = self._closed = threading.Event()
        self.destroyed.connect(lambda *_: closed.set())
        self._timer = QTimer(self)
        self._timer.setInterval(EVERY)
        self._timer.timeout.connect(self._listen)
        self._lay_out()
        alone = threading.Lock()  # also while another widget's run is at work
        self._start("Looking for adapters.", lambda _: adapters(), self._list_adapters, lock=alone)

    def _lay_out(self) -> None:
        self.form = Form()
        self.segment_button = QPushButton("Segment")
        self.check_button = QPushButton("Check")
        self.adapt_button = QPushButton("Adapt")
        self.cancel_button = QPushButton("Cancel")
        self.save_button = QPushButton("Save network …")
        self.adapted = QCheckBox("Segment and check with the adapted network")
        self.bar = QProgressBar()
        self.text = QTextBrowser()
        told = {
            self.segment_button: ("What the network finds, as labels layers.", self.segment),
            self.check_button: ("How good that is, estimated without labels.", self.check),
            self.adapt_button: ("Adapt the network to the images, without labels.", self.adapt),
            self.cancel_button: ("End what is being done; the best so far is kept.", self.cancel),
            self.save_button: ("The adapted network, in its own format.", self._ask_save),
        }
        for button, (tip, action) in told.items():
            button.setToolTip(tip)
            button.clicked.connect(partial(_without_argument, action))
        buttons = QHBoxLayout()
        for button in list(told)[:4]:
            buttons.addWidget(button)
        column = QVBoxLayout(self)
        column.addWidget(self.form)
        column.addWidget(self.adapted)
        column.addLayout(buttons)
        column.addWidget(self.bar)
        column.addWidget(self.text)
        column.addWidget(self.save_button)

    @property
    def busy(self) -> bool:
        """Whether something is being done."""
        return self._talk is not None

    def segment(self) -> None:
        """Add labels layers with what the network finds."""
        name, opened = self._network()

        def job(targets: list[Target], talk: Talk) -> list[Made]:
            return jobs.segment({name: opened()}, targets, talk)

        self._start_on_layers("Segmenting.", job, self._show_labels)

    def check(self) -> None:
        """Say which AP is to be expected."""
        _, opened = self._network()

        def job(targets: list[Target], talk: Talk) -> Quality:
            return jobs.check(opened(), targets, talk)

        def then(quality: Quality) -> None:
            self._say(words.of_quality(quality))

        self._start_on_layers("Checking.", job, then)

    def _network(self) -> tuple[str, Callable[[], Adapter]]:
        """What the labels of the network that is meant are called, and how it is opened."""
        if self.result is not None and self.adapted.isChecked():
            adapter = self.result.adapter
            return "adapted", lambda: adapter
        choice = self.form.choice
        return "segmented", lambda: jobs.open_choice(choice).adapter

    def adapt(self) -> None:
        """Adapt the network; then add labels layers of before and after."""
        choice, folder = self.form.choice, self.form.folder.line.text()

        def job(targets: list[Target], talk: Talk) -> Any:
            opened = jobs.open_choice(choice)
            return opened.adapter, jobs.run(opened, targets, folder, talk), targets

        self._start_on_layers("Adapting.", job, self._show_result)

    def cancel(self) -> None:
        """End what is being done, at its next step."""
        if self._talk is not None:
            self._talk.cancel()
            self.cancel_button.setEnabled(False)
            self._say("Cancelling: what is being done just now is done first.")

    def save(self, path: str) -> None:
        """Write the adapted network in the format of its family."""
        assert self.result is not None
        try:
            self.result.adapter.save(path)
            usage = self.result.adapter.usage(Path(path))
        except Exception as error:  # of the family's own code, too
            self._show_error(error)
            return
        self._say(f"Saved: {path}", *([f"Use it: {usage}"] if usage else []))

    def _ask_save(self) -> None:
        path, _ = QFileDialog.getSaveFileName(self, "Save the network", "adapted")
        if path:
            self.save(path)

    # one job at a time, in another thread

    def _start_on_layers(
        self, what: str, job: Callable[[list[Target], Talk], Any], then: Callable[[Any], None]
    ) -> None:
        if self.busy:
            return
        form = self.form
        axis = form.channel_axis.value()
        try:
            targets = targets_of(
                form.layers(self.viewer),
                form.together.currentData(),
                None if axis == NO_AXIS else axis,
            )
        except SelfAdaptError as error:
            self._say(clear=True)
            self._show_error(error)
            return
        self.shown.targets(targets)
        self._start(what, partial(job, targets), then)

    def _start(
        self,
        what: str,
        job: Callable[[Talk], Any],
        then: Callable[[Any], None],
        *,
        clear: bool = True,
        lock: threading.Lock = BUSY,
    ) -> None:
        """Do a job in another thread, and something with its result in this one."""
        if self.busy:
            return
        self._talk, self._then = Talk(), then
        self._say(what, clear=clear)
        worker = create_worker(do, job, self._talk, lock)
        closed = self._closed
        self._talk.asked_elsewhere = lambda: closed.is_set() or worker.abort_requested
        self._allow()
        self.bar.setRange(0, 0)
        self._timer.start()
        worker.start()

    def _listen(self) -> None:
        """Show what the run has said."""
        if self._talk is None:
            return
        news = self._talk.news()
        try:
            self._show(news)
        except Exception as error:  # of the viewer; the run's ending is heard all the same
            self._show_error(error)
        for said in news:
            if isinstance(said, Done | Failed):
                self._end(said)

    def _show(self, news: Sequence[Said]) -> None:
        """Of many steps the last, of many looks the last, and all that is in words."""
        for said in news:
            if isinstance(said, str):
                self._say(sentence(said))
        events = [said for said in news if isinstance(said, Event)]
        if events:
            self.bar.setRange(0, events[-1].total)
            self.bar.setValue(events[-1].done)
            self.bar.setFormat(words.of_event(events[-1]))
        looks = [event for event in events if event.previews]
        if looks:
            self.shown.previews(looks[-1].previews)

    def _end(self, ending: Done | Failed) -> None:
        self._timer.stop()
        then, talk, self._talk = self._then, self._talk, None
        if talk is None or talk.asked_elsewhere():  # the window is closing: nobody is to be told
            return
        self.bar.setRange(0, 1)
        self.bar.setValue(0)
        self.shown.remove_previews()
        self._allow()
        if isinstance(ending, Done):
            try:
                then(ending.result)
            except Exception as error:  # of the viewer
                self._show_error(error)
        elif isinstance(ending.error, RunCancelledError):
            self._say("Cancelled: there is nothing to show yet.")
        else:
            self._show_error(ending.error)

    def _allow(self) -> None:
        """Only what makes sense now can be pressed."""
        running = self.busy
        self.form.setEnabled(not running)
        for button in (self.segment_button, self.check_button, self.adapt_button):
            button.setEnabled(not running)
        self.cancel_button.setEnabled(running)
        self.bar.setVisible(running)
        for widget in (self.save_button, self.adapted):
            widget.setEnabled(not running and self.result is not None)

    def event(self, event: QEvent) -> bool:
        """Closing the dock takes the widget out of it: what it has begun ends then."""
        left = event.type() == QEvent.Type.ParentChange and self.parent() is None
        if left and self._talk is not None:
            self._talk.cancel()
            self._then = lambda _: None
        return bool(super().event(event))

    # what is shown

    def _list_adapters(self, found: dict[str, str | None]) -> None:
        self.form.list_adapters(found)
        self._say("Choose a network and images.", clear=True)

    def _show_result(self, ended: tuple[Adapter, AdaptationResult, list[Target]]) -> None:
        before, self.result, targets = ended
        self._allow()
        headline, *told = words.of_result(self.result)
        del self._lines[0]  # "Adapting."; warnings stay
        self._say(*told, headline=headline)
        show_info(f"selfadapt: {headline}")
        networks = {"before": before, "after": self.result.adapter}
        if before.can_decode:
            job = partial(jobs.segment, networks, targets)
            self._start("Segmenting before and after.", job, self._show_labels, clear=False)

    def _show_labels(self, made: list[Made]) -> None:
        self.shown.labels(made)
        for network in dict.fromkeys(each.network for each in made):
            count = sum(each.count for each in made if each.network == network)
            self._say(f"{network.capitalize()}: {count} objects.")

    def _say(self, *told: str, headline: str = "", clear: bool = False) -> None:
        """Write paragraphs; below a headline they are what comes first."""
        lines = [html.escape(each) for each in told]
        if headline:
            self._lines = [f"<b>{html.escape(headline)}</b>", *lines, *self._lines]
        else:
            self._lines = [*([] if clear else self._lines), *lines]
        self.text.setHtml("".join(f"<p>{line}</p>" for line in self._lines))

    def _show_error(self, error: Exception) -> None:
        self._say(words.of_error(error))
        if isinstance(error, SelfAdaptError):
            show_error(words.of_error(error))
        else:
            notification_manager.receive_error(type(error), error, error.__traceback__)


def _without_argument(action: Callable[[], None], *_: object) -> None:
    """What Qt says of a click is of no interest."""
    action()
