"""For the report: how to choose another snapshot of a run, and what repeats the run."""

import html
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from selfadapt._config import Config
from selfadapt._errors import CheckpointError, ConfigError
from selfadapt._rundir import CALIBRATION, COMMAND, ORIGIN, REPEATS, RunDirectory
from selfadapt._settings_file import read_settings


def another(directory: RunDirectory, config: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """In words and code, how to take another snapshot than the one that was kept."""
    there = directory.snapshots()
    other = _suggested(there, result)
    names = ", ".join(f"<code>{html.escape(str(name))}</code>" for name in there)
    said = (
        f"<p>Kept with the run: {names}. A number is the step of the default loop, 0 the model "
        "that was given; the table above says what each has achieved.</p>"
    )
    run = shlex.quote(str(directory.path))
    if (directory.path / ORIGIN).exists():  # which says how the network is opened
        quoted = shlex.quote(str(other))
        code = [
            f"selfadapt segment --model {run} --snapshot {quoted} --images IMAGES --out LABELS",
            f"selfadapt select  --model {run} --snapshot {quoted} --out MODEL",
        ]
        return (
            f"{said}<p>Segment with it (<code>evaluate</code> and <code>check</code> alike), or "
            f"save it as a model of its own:</p>{_code(code)}"
        )
    code = [
        *_call(directory, config, str(directory.path), resume=True),
        f"other = result.select({other!r})",
        "labels = other.segment(image)",
        'other.save("another_model")',
    ]
    return f"{said}<p>In Python; the run is opened, not made again:</p>{_code(code)}"


def _suggested(there: list[int | str], result: Mapping[str, Any]) -> int | str:
    """One for the example: what the pictures show as rejected, or else the initial network."""
    rejected: int | str | None = result.get("rejected_snapshot")
    return rejected if rejected is not None and rejected in there else there[0]


def repeat(directory: RunDirectory, config: Mapping[str, Any]) -> str:
    """In words and code, what would make the same run again."""
    run = directory.path
    if (directory.path / REPEATS).exists():
        words = ["selfadapt", "adapt", "--config", str(run / REPEATS), "--out", f"{run}-again"]
        began = ""
        if (run / COMMAND).exists():
            began = f"<p>It was started as:</p>{_code([(run / COMMAND).read_text('utf-8')])}"
        return (
            f"<p>With all settings as they were, into a new folder:</p>{_code([shlex.join(words)])}"
            f"{began}{_network(directory)}"
        )
    if (directory.path / ORIGIN).exists():
        return "<p>It was started in another program, such as napari, on images that it held.</p>"
    code = _call(directory, config, f"{run}-again", resume=False)
    said = (
        "With all settings as they were, on the same images and adapter (and "
        "<code>validation</code> and <code>channel_axis</code>, if you gave them):"
    )
    return f"<p>{said}</p>{_code(code)}"


def _call(
    directory: RunDirectory, config: Mapping[str, Any], out: str, *, resume: bool
) -> list[str]:
    """Lines of Python that make the run, or open it."""
    data = directory.read_json("data.json")
    usual = Config().to_dict()
    changed = [f"{k}={v!r}" for k, v in config.items() if k not in usual or usual[k] != v]
    options = ", ".join(f"{name} = {value}" for name, value in data["options"].items())
    stop = str(data["stop"])
    monitors = [name for name in ("EmbeddingDrift", "FalseNegativeRate") if f"{name}(" in stop]
    if not monitors and stop not in ("'auto'", "None"):
        stop = f"stop,  # your own: {stop}"
    names = ["Config"] * bool(changed) + monitors + ["adapt"]
    return [
        f"from selfadapt import {', '.join(names)}",
        "",
        *([f"# adapter: {options}"] if options else []),
        "result = adapt(",
        "    adapter,",
        f"    images,  # {len(data['images'])}, and {len(data['held_out'])} held out",
        *([f"    config=Config({', '.join(changed)}),"] if changed else []),
        *([] if stop == "'auto'" else [f"    stop={stop},"]),
        *([] if (directory.path / CALIBRATION).exists() else ["    calibrate=False,"]),
        f"    output_dir={out!r},",
        *(["    resume=True,"] if resume else []),
        ")",
    ]


def _network(directory: RunDirectory) -> str:
    """The network and the images, as the file says that repeats the run."""
    try:
        told = read_settings(str(directory.path / REPEATS))
    except ConfigError as error:
        raise CheckpointError(f"run {str(directory.path)!r} is damaged: {error}") from None
    network = html.escape(f"{told['model']} (adapter {told['adapter']})")
    images = html.escape(str(told["images"]))
    return f"<p>Network: <code>{network}</code>. Images: <code>{images}</code>.</p>"


def _code(lines: Sequence[str]) -> str:
    text = "\n".join(lines)
    return f"<pre><code>{html.escape(text)}</code></pre>"
