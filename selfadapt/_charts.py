"""The charts of a report, by matplotlib: curves of a run, and what calibration has tried."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from selfadapt._config import LOOPS
from selfadapt._errors import ModelError
from selfadapt._rundir import Row

_CURVES = (
    ("loss", "loss, Eq. 1 + Eq. 2"),
    ("kept", "share of pixels kept as reliable"),
    ("fn_rate", "FN rate, Eq. 3"),
    ("d_emb", "embedding drift, Eq. 4"),
    ("agreement", "agreement of flipped and turned copies"),
    ("stability", "stability under other scales"),
)
_COLOURS = dict(zip(LOOPS, ("#0b6e99", "#b8860b", "#4b8b3b", "#8b3b6e"), strict=True))
_PAPER = {"fn_rate": 0.05, "d_emb": 0.5}
"""The paper's thresholds, drawn for orientation where the run stopped by something else."""


def draw_curves(history: Sequence[Row], kept: str, chosen: float, own: Mapping[str, float]) -> str:
    """One line per loop; it begins at the initial network."""
    figure, axes = figure_of(len(_CURVES), (20, 2.8))
    for axis, (name, title) in zip(axes, _CURVES, strict=True):
        drawn = False
        for way, colour in _COLOURS.items():
            points = [
                (row["iteration"], row[name])
                for row in history
                if name in row and row["candidate"] in ("initial", way)
            ]
            ours = any(row["candidate"] == way for row in history)
            if ours and points and not all(math.isnan(y) for _, y in points):
                drawn = True
                axis.plot(*zip(*points, strict=True), color=colour, label=way, markersize=3,
                          linewidth=2.2 if kept.startswith(way) else 1.2,
                          marker="o" if name not in ("loss", "kept") else None)  # fmt: skip
        if not drawn:
            axis.text(0.5, 0.5, "not available", transform=axis.transAxes, ha="center")
        elif name == "stability":
            axis.legend(frameon=False, fontsize=8)
        if name in _PAPER:
            limit = own.get(name, _PAPER[name])
            label = f"stop above {limit:g}" if name in own else f"paper's threshold {limit:g}"
            axis.axhline(limit, color="#b03a2e", linestyle="--", linewidth=1, label=label)
            axis.legend(frameon=False, fontsize=8)
        if name != "loss":
            axis.set_ylim(bottom=0, top=1 if name == "kept" else None)
        axis.axvline(chosen, color="#555", linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("iteration", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    return embed(figure, "loss, kept share, FN rate, drift and agreement over the iterations")


def draw_calibration(calibration: Mapping[str, Any]) -> str:
    """Score over scale, a line per polarity and choice of channels; the chosen way is marked."""
    figure, axis = figure_of(1, (9, 3))
    ways: dict[str, list[tuple[float, float]]] = {}
    for trial in calibration["trials"]:
        way = trial["input"]
        channels = "gray, " * way["gray"]
        if way["channels"] is not None:
            channels = f"channel {', '.join(map(str, way['channels']))}, "
        name = f"{channels}{'inverted' if way['invert'] else 'as it is'}"
        ways.setdefault(name, []).append((way["scale"], trial["score"]))
    for name, points in ways.items():
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    chosen = calibration["chosen"]
    axis.plot(chosen["input"]["scale"], chosen["score"], "*", color="#222", markersize=13)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("scale: pixels of the network per pixel of the image", fontsize=9)
    axis.set_title("how far the same things are found again", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    picture = embed(figure, "score of each scale and polarity")
    words = html.escape(calibration["words"])
    return f"<h2>How the images go in</h2><p>{words[:1].upper()}{words[1:]}.</p>{picture}"


def embed(figure: Any, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def figure_of(columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A row of axes, without pyplot: the caller's backend and figures are left alone."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModelError(
            "the report needs matplotlib, which is not installed: pip install 'selfadapt[report]'"
        ) from None
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, columns)
