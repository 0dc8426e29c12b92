"""The charts of a report, SVG by matplotlib: curves of a run, and what calibration has tried."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from selfadapt._config import LOOPS
from selfadapt._errors import ModelError
from selfadapt._rundir import Row

CURVES = {
    "stability": "Stability under other scales",
    "agreement": "Agreement of flipped and turned copies",
    "fn_rate": "FN rate (Eq. 3)",
    "d_emb": "Embedding drift (Eq. 4)",
    "loss": "Loss (Eq. 1 + Eq. 2)",
    "kept": "Share of pixels kept as reliable",
}
COLOURS = dict(zip(LOOPS, ("#0072b2", "#d55e00", "#009e73", "#aa5c8f"), strict=True))
"""Of Okabe and Ito, which colour-blind readers tell apart."""
_INK = "#4a5260"
_PAPER = {"fn_rate": 0.05, "d_emb": 0.5}
"""The paper's thresholds, drawn for orientation where the run stopped by something else."""


def draw_curves(history: Sequence[Row], kept: str, chosen: float, own: Mapping[str, float]) -> str:
    """One chart per figure, one line per loop; it begins at the initial network.

    Args:
        history: rows of the run.
        kept: candidate that was kept, whose line is drawn heavier.
        chosen: iteration of its weights.
        own: thresholds that the run stopped by.
    """
    charts = ""
    for name, title in CURVES.items():
        figure, axis = _figure((3.6, 2.1))
        last = []
        for way, colour in COLOURS.items():
            points = [
                (row["iteration"], row[name])
                for row in history
                if name in row and row["candidate"] in ("initial", way)
            ]
            ours = any(row["candidate"] == way for row in history)
            if ours and points and not all(math.isnan(y) for _, y in points):
                dense = name in ("loss", "kept") and len(points) > 1
                axis.plot(*zip(*points, strict=True), color=colour, markersize=3,
                          linewidth=2.4 if kept.startswith(way) else 1.2,
                          marker=None if dense else "o")  # fmt: skip
                last.append(f"{way} {points[-1][1]:.3g}")
        words = f"{title}: at the end {', '.join(last)}"
        if not last:
            words = f"{title}: not available"
            axis.text(0.5, 0.5, "not available", transform=axis.transAxes, ha="center")
        if name in _PAPER:
            limit = own.get(name, _PAPER[name])
            label = f"stop above {limit:g}" if name in own else f"paper's threshold {limit:g}"
            axis.axhline(limit, color="#b3472b", linestyle="--", linewidth=1, label=label)
            axis.legend(frameon=False, fontsize=8)
        if name != "loss":
            axis.set_ylim(bottom=0, top=1 if name == "kept" else None)
        axis.axvline(chosen, color=_INK, linewidth=1, linestyle=":")
        axis.set_xlabel("steps")
        charts += f"<figure>{_embed(figure, words)}<figcaption>{title}</figcaption></figure>"
    ways = [way for way in COLOURS if any(row["candidate"] == way for row in history)]
    lines = "".join(
        f'<li><i style="background:{COLOURS[way]}"></i>{html.escape(way)}</li>' for way in ways
    )
    return f'<ul class="key">{lines}</ul><div class="charts">{charts}</div>'


def draw_calibration(calibration: Mapping[str, Any]) -> str:
    """Score over scale, a line per polarity and choice of channels; the chosen way is marked."""
    figure, axis = _figure((7.2, 2.6))
    ways: dict[str, list[tuple[float, float]]] = {}
    for trial in calibration["trials"]:
        way = trial["input"]
        channels = "gray, " * way["gray"]
        if way["channels"] is not None:
            channels = f"channel {', '.join(map(str, way['channels']))}, "
        name = f"{channels}{'inverted' if way['invert'] else 'as it is'}"
        ways.setdefault(name, []).append((way["scale"], trial["score"]))
    colours = [*COLOURS.values(), "#56b4e9", "#e69f00", "#7a7a7a"]
    for k, (name, points) in enumerate(ways.items()):
        axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3,
                  color=colours[k % len(colours)], linewidth=1.6, label=name)  # fmt: skip
    chosen = calibration["chosen"]
    best = chosen["input"]["scale"], chosen["score"]
    axis.plot(*best, "*", color=_INK, markersize=13)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("scale: pixels of the network per pixel of the image")
    axis.set_ylabel("found again")
    axis.legend(frameon=False, fontsize=8)
    words = (
        f"score over scale of {', '.join(ways)}; chosen: scale {best[0]:.3g}, score {best[1]:.2f}"
    )
    return _embed(figure, words)


def _embed(figure: Any, alt: str) -> str:
    """The chart as a picture without background, whose writing is light on a dark page."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "selfadapt"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().replace("</style>", _DARK + "</style>", 1).encode()
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    return f'<img class="chart" alt="{html.escape(alt)}" src="{source}">'


_DARK = (
    "@media (prefers-color-scheme: dark) {text {fill: #c9d0da !important} "
    f'[style*="stroke: {_INK}"] {{stroke: #9aa4b2 !important}}}}'
)


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    """One axis, without pyplot: the caller's backend and figures are left alone."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModelError(
            "the report needs matplotlib, which is not installed: pip install 'selfadapt[report]'"
        ) from None
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_INK)
    axis.tick_params(colors=_INK, labelsize=8)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set(color=_INK, fontsize=8)
    return figure, axis
