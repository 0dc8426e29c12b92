"""What a run did, as one HTML page: curves, image / before / after, which snapshot and why."""

import html
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import yaml

from selfadapt._before_after import draw_example
from selfadapt._charts import draw_calibration, draw_curves
from selfadapt._disk import write_file
from selfadapt._errors import CheckpointError, first_line, refuse_damage
from selfadapt._rundir import CALIBRATION, REPEATS, RunDirectory


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
        curves = draw_curves(
            history, result["candidate"], result["iteration"], result["thresholds"]
        )
        has_input = (directory.path / CALIBRATION).exists()
        calibration = directory.read_json(CALIBRATION) if has_input else None
        rejected = result.get("rejected")
        second = "after" if rejected is None else "rejected"
        title = "after" if rejected is None else f"rejected: {rejected}"
        examples = [
            draw_example(path, name, second, title)
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
        page = (
            (files("selfadapt") / "_page" / "report.html")
            .read_text()
            .format(
                outcome=html.escape(result["outcome"].capitalize()),
                reason=html.escape(result["reason"]),
                quality=html.escape(_quality(result["quality"])),
                scores="".join(f"<p class=score>{html.escape(line)}</p>" for line in scores),
                calibration="" if calibration is None else draw_calibration(calibration),
                curves=curves,
                about=_about(directory),
                examples="".join(examples) or "<p>The adapter cannot decode instances.</p>",
                head="".join(
                    f"<th>{html.escape(title)}</th>"
                    for title in ("candidate", "steps", *_TABLE.values())
                ),
                rows=rows,
                settings=html.escape(
                    "\n".join(f"{name} = {value}" for name, value in config.items())
                ),
            )
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
