"""What a run did, as one HTML page: curves, image / before / after, which snapshot and why."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import yaml
from numpy.typing import NDArray
from skimage.segmentation import find_boundaries

from selfadapt._config import LOOPS
from selfadapt._disk import write_file
from selfadapt._errors import CheckpointError, ModelError, first_line, refuse_damage
from selfadapt._matching import match
from selfadapt._rundir import CALIBRATION, REPEATS, Row, RunDirectory
from selfadapt._tiles import resize_labels

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


def write_report(run: str | Path | RunDirectory, scores: Sequence[str] = ()) -> Path:
    """Draw `report.html` of a run folder, one self-contained file, and return its path.

    Args:
        run: the folder that `adapt(..., output_dir=...)` has written.
        scores: lines to print below the headline, e.g. scores where labels are at hand.

    Raises:
        CheckpointError: the folder holds no run.
        ModelError: matplotlib is not installed.
    """
    directory = run if isinstance(run, RunDirectory) else RunDirectory(run)
    config, history = directory.read_json("config.json"), directory.read_history()
    if not (directory.path / "result.json").exists():
        raise CheckpointError(f"run {str(directory.path)!r} is not finished: resume it first.")
    result = directory.read_json("result.json")
    if "outcome" not in result:
        raise CheckpointError(
            f"run {str(directory.path)!r} was made by an earlier version, which knows no verdict: "
            "its report cannot be drawn again."
        )
    with refuse_damage(directory.path):
        curves = _draw_curves(
            history, result["candidate"], result["iteration"], result["thresholds"]
        )
        has_input = (directory.path / CALIBRATION).exists()
        calibration = directory.read_json(CALIBRATION) if has_input else None
        rejected = result.get("rejected")
        second = "after" if rejected is None else "rejected"
        title = "after" if rejected is None else f"rejected: {rejected}"
        examples = [
            _draw_example(path, name, second, title)
            for path, name in zip(
                sorted((directory.path / "examples").glob("*-image.tif")),
                result["examples"],
                strict=True,
            )
        ]
        kept = result["candidate"], int(result["iteration"])
        rows = "".join(
            f"<tr{' class=chosen' if (row['candidate'], int(row['iteration'])) == kept else ''}>"
            f"<td>{html.escape(row['candidate'])}</td><td>{row['iteration']:.0f}</td>"
            + "".join(f"<td>{_figure(row.get(name))}</td>" for name in _TABLE)
            + "</tr>"
            for row in history
            if "d_emb" in row
        )
        page = _PAGE.format(
            outcome=html.escape(result["outcome"].capitalize()),
            reason=html.escape(result["reason"]),
            quality=html.escape(_quality(result["quality"])),
            scores="".join(f"<p class=score>{html.escape(line)}</p>" for line in scores),
            calibration="" if calibration is None else _draw_calibration(calibration),
            curves=curves,
            about=_about(directory),
            examples="".join(examples) or "<p>The adapter cannot decode instances.</p>",
            head="".join(
                f"<th>{html.escape(title)}</th>"
                for title in ("candidate", "steps", *_TABLE.values())
            ),
            rows=rows,
            settings=html.escape("\n".join(f"{name} = {value}" for name, value in config.items())),
        )
    target = directory.path / "report.html"
    write_file(target, page.encode(errors="backslashreplace"))  # of names that are not UTF-8
    return target


_TABLE = {
    "loss": "loss",
    "kept": "kept",
    "fn_rate": "FN rate",
    "d_emb": "D_emb",
    "agreement": "agreement",
    "stability": "stability",
    "instances": "instances / initial",
    "size": "size / initial",
}


def _quality(quality: Mapping[str, float | None]) -> str:
    ap, low, high = (quality[name] for name in ("ap50", "low", "high"))
    return "unknown" if ap is None else f"{ap:.2f} ({low:.2f} to {high:.2f})"


def _figure(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.3f}"


def _draw_curves(history: Sequence[Row], kept: str, chosen: float, own: Mapping[str, float]) -> str:
    """One line per loop; it begins at the initial network."""
    figure, axes = _figure_of(len(_CURVES), (20, 2.8))
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
    return _embed(figure, "loss, kept share, FN rate, drift and agreement over the iterations")


def _draw_calibration(calibration: Mapping[str, Any]) -> str:
    """Score over scale, a line per polarity and choice of channels; the chosen way is marked."""
    figure, axis = _figure_of(1, (9, 3))
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
    picture = _embed(figure, "score of each scale and polarity")
    words = html.escape(calibration["words"])
    return f"<h2>How the images go in</h2><p>{words[:1].upper()}{words[1:]}.</p>{picture}"


def _about(directory: RunDirectory) -> str:
    """Rows of a table: network, images, versions, and the command that repeats the run."""
    data = directory.read_json("data.json")
    rows = {"images": f"{len(data['images'])}, and {len(data['held_out'])} held out"}
    repeats = directory.path / REPEATS
    if repeats.exists():  # it was made by the shell
        try:
            told = yaml.safe_load(repeats.read_text())
        except yaml.YAMLError as error:
            raise CheckpointError(f"{repeats} is damaged: {first_line(error)}") from None
        rows["network"] = f"{told['model']}, adapter {told['adapter']}"
        rows["images"] = f"{told['images']}: {rows['images']}"
        rows["again"] = f"selfadapt adapt --config {repeats} --out ANOTHER_RUN"
    rows["checksum of the network"] = data["model"]
    rows["versions"] = ", ".join(f"{k} {v}" for k, v in data["versions"].items())
    rows["another snapshot"] = "result.select(iteration or name) in Python, of those in snapshots/"
    return "".join(
        f"<tr><th>{html.escape(name)}</th><td class=words>{html.escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )


def _draw_example(path: Path, name: str, second: str, second_title: str) -> str:
    """The image, and instances before and after, or of the network that was rejected."""
    image = tifffile.imread(path)
    image = image[None] if image.ndim == 2 else image
    files = [path.with_name(path.name.replace("image", which)) for which in ("before", second)]
    if not all(file.exists() for file in files):
        return ""
    before, after = (tifffile.imread(file) for file in files)
    same = match(before, after, (0.5,))[0]
    plain = _display(image)
    panels = [plain, _outline(plain, before, (1.0, 0.35, 0.2)), _outline(plain, after, _GREEN)]
    titles = [
        "image",
        f"before: {same.tp + same.fn} instances",
        f"{second_title}: {same.tp + same.fp} ({same.tp} the same, {same.fp} new, {same.fn} gone)",
    ]
    figure, axes = _figure_of(3, (14, 0.4 + 4.6 * image.shape[-2] / image.shape[-1]))
    for axis, panel, title in zip(axes, panels, titles, strict=True):
        axis.imshow(panel, interpolation="nearest")
        axis.set_title(title, fontsize=11)
        axis.axis("off")
    return f"<h3>{html.escape(name)}</h3>{_embed(figure, f'{name}: image, before, after')}"


_GREEN = (0.2, 0.9, 0.5)


def _display(image: NDArray[Any]) -> NDArray[np.float64]:
    """RGB in [0, 1] of a prepared image `[C, H, W]`."""
    channels = image[:3] if image.shape[0] >= 3 else image[:1].repeat(3, 0)
    low, high = np.percentile(channels, (0.5, 99.7))
    scaled: NDArray[np.float64] = np.clip((channels - low) / max(high - low, 1e-6), 0, 1) ** 0.7
    return scaled.transpose(1, 2, 0)


def _outline(
    image: NDArray[np.float64], labels: NDArray[Any], colour: tuple[float, float, float]
) -> NDArray[np.float64]:
    painted = image.copy()
    labels = resize_labels(labels, (image.shape[0], image.shape[1]))
    painted[find_boundaries(labels, mode="inner")] = colour
    return painted


def _embed(figure: Any, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _figure_of(columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A row of axes, without pyplot: the caller's backend and figures are left alone."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModelError(
            "the report needs matplotlib, which is not installed: pip install 'selfadapt[report]'"
        ) from None
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, columns)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>selfadapt run</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; color: #222 }}
img {{ max-width: 100% }} h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.15rem; margin-top: 2rem }} h3 {{ font-size: 1rem; margin: 1rem 0 0 }}
table {{ border-collapse: collapse }} td, th {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
.verdict {{ font-size: 1.3rem; font-weight: 600; margin: 0 }} .chosen {{ background: #e2f3ea; font-weight: 600 }} .score {{ font-size: 1.1rem; margin: .2rem 0 }} .words {{ text-align: left }}
pre {{ background: #f5f5f5; padding: .8rem; columns: 3 }}
</style></head><body>
<h1>selfadapt run</h1>
<p class=verdict>{outcome}</p>
<p>{reason}. Expected AP at an IoU of 0.5, without labels: {quality}.</p>
{scores}
{calibration}
<h2>Curves</h2>{curves}
<p>A line per way to adapt, the less promising of which end early. The vertical line marks the weights that were kept. FN rate and embedding drift compare with the initial model, without labels; an instance that
was wrong and is gone counts as missing, too.</p>
<h2>Images looked at</h2>
<p>Where the initial network is kept, the last picture shows the most promising one that was rejected. Instances are the same from an IoU of 0.5.</p>
{examples}
<h2>Candidates</h2><table><tr>{head}</tr>{rows}</table>
<h2>The run</h2><table>{about}</table>
<h2>Settings</h2><pre>{settings}</pre>
</body></html>
"""
