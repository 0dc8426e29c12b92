"""What a run did, as one HTML page: verdict, before and after, what was tried, and what comes next.

`_page/` holds the page, its style and its script; names and words of a run are escaped.
"""

import base64
import hashlib
import html
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from selfadapt._again import another, repeat
from selfadapt._before_after import Example, draw_example
from selfadapt._charts import draw_calibration, draw_curves
from selfadapt._disk import write_file
from selfadapt._ending import Seen
from selfadapt._errors import CheckpointError, refuse_damage, sentence
from selfadapt._fates import FATES, summed
from selfadapt._quality import Quality
from selfadapt._rundir import CALIBRATION, Row, RunDirectory
from selfadapt._verdict import Thresholds, objection, unconfirmed

_OUTCOMES = {
    "improved": (
        "improved",
        "The adapted model does better on your images than the one you gave, as far as can be told "
        "without labels.",
        "Compare before and after below. If you agree, use the model in the folder of the run.",
    ),
    "initial kept": (
        "kept",
        "Nothing that was tried is surely better, so the model that you gave stays as it was.",
        "Use it as it is, with the images going in as found here. If the rejected network looks "
        "better to you in the pictures below, you can choose it.",
    ),
    "not to be trusted": (
        "untrusted",
        "This model does not work on these images.",
        "Do not use its results. Look at the pictures: are objects dark where the model wants "
        "them bright, or far too large or small for it? If so, say scale and polarity and run "
        "again; if not, take another model, or label some images and train.",
    ),
    "not judged better": (
        "doubtful",
        "The criterion that you chose has kept a later network, which the judge does not find "
        "better than the one you gave.",
        "Compare before and after below. If in doubt, go back to snapshot 0, the model that you "
        "gave.",
    ),
}
"""Of each outcome: its kind for the style sheet, what it means, and what to do."""
_NAMED = 5
"""So many images are named."""
_MARK = re.compile(r" \S+ \([\d, ]+\) [0-9a-f]{8}$")
"""What `checksum` has added to a name."""
_TABLE = {
    "stability": "stability",
    "agreement": "agreement",
    "fn_rate": "FN rate",
    "d_emb": "drift",
    "instances": "instances / initial",
    "added": "added",
    "size": "size / initial",
}


def write_report(run: str | Path | RunDirectory, scores: Sequence[str] = ()) -> Path:
    """Draw `report.html` of a run folder, one self-contained file, and return its path.

    It loads nothing from elsewhere; where scripts are off it shows the same, side by side.

    Args:
        run: the folder that `adapt(..., output_dir=...)` has written.
        scores: lines to print below the headline, e.g. scores where labels are at hand.

    Raises:
        CheckpointError: the folder holds no run.
        ModelError: matplotlib is not installed.
    """
    directory = run if isinstance(run, RunDirectory) else RunDirectory(run)
    directory.refuse_links()  # what they lead to would stand in the page
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
        kind, meaning, advice = _OUTCOMES[result["outcome"]]
        examples = _examples(directory, result)
        script = _part("viewer.js")
        page = _filled(
            "report.html",
            style=_part("style.css"),
            script=script,
            script_hash=_hash(f"\n{script}"),
            kind=kind,
            outcome=html.escape(result["outcome"].capitalize()),
            meaning=meaning,
            reason=html.escape(sentence(result["reason"])),
            next=advice,
            scores=_listed(scores),
            facts=_facts(directory, result),
            before_after=_before_after(examples, result),
            calibration=_calibration(directory),
            curves=draw_curves(
                history, result["candidate"], result["iteration"], result["thresholds"]
            ),
            head=_cells("th", ["candidate", "steps", *_TABLE.values()])
            + "<th class=words>what speaks against it</th><th class=words>snapshot</th>",
            rows=_rows(directory, history, result),
            another=another(directory, config, result),
            again=repeat(directory, config),
            about=_about(directory),
            settings=html.escape("\n".join(f"{name} = {value}" for name, value in config.items())),
        )
    target = directory.path / "report.html"
    write_file(target, page.encode(errors="backslashreplace"))  # of names that are not UTF-8
    return target


def _part(name: str) -> str:
    return (files("selfadapt") / "_page" / name).read_text("utf-8")


def _filled(name: str, **parts: str) -> str:
    """A part of the page, with HTML for its placeholders."""
    return Template(_part(name)).substitute(parts)


def _hash(script: str) -> str:
    """By which a browser runs this script and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _listed(scores: Sequence[str]) -> str:
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in scores)
    return f'<ul class="scores">{lines}</ul>' if lines else ""


def _cells(kind: str, texts: Sequence[str]) -> str:
    return "".join(f"<{kind}>{html.escape(text)}</{kind}>" for text in texts)


def _facts(directory: RunDirectory, result: Mapping[str, Any]) -> str:
    data = directory.read_json("data.json")
    estimate = Quality.from_dict(result["quality"])
    quality = "<strong>unknown</strong><small>the network finds nothing, or cannot say</small>"
    if not math.isnan(estimate.ap):
        ap, low, high = estimate.ap, estimate.low, estimate.high
        quality = (
            f"<strong>{ap:.2f}</strong>"
            f'<div class="range" role="img" aria-label="{low:.2f} to {high:.2f}">'
            f'<i style="left:{low:.0%};right:{1 - high:.0%}"></i><b style="left:{ap:.0%}"></b>'
            "</div>"
            f"<small>{low:.2f} to {high:.2f} in nine of ten cases, estimated without labels</small>"
        )
    steps = int(result["iteration"])
    facts = {
        "Expected AP at an IoU of 0.5": quality,
        "Kept": f"<strong>{html.escape(result['candidate'])}</strong>"
        f"<small>{f'after {steps} steps' if steps else 'before the first step'}</small>",
        "Images": f"<strong>{len(data['images'])}</strong>"
        f"<small>and {len(data['held_out'])} held out to look at</small>",
    }
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())


def _examples(directory: RunDirectory, result: Mapping[str, Any]) -> list[Example]:
    second, title = _compared(result)
    images = sorted((directory.path / "examples").glob("*-image.tif"))
    pairs = enumerate(zip(images, result["examples"], strict=True), 1)
    drawn = [draw_example(path, name, k, second, title) for k, (path, name) in pairs]
    return [example for example in drawn if example is not None]


def _compared(result: Mapping[str, Any]) -> tuple[str, str]:
    """What the pictures show beside "before": its files, and what it is called."""
    rejected = result.get("rejected")
    if rejected is None or result["candidate"] != "initial":
        return "after", "After"
    snapshot = result.get("rejected_snapshot")  # runs of before do not tell
    which = "" if snapshot in (None, rejected) else f", snapshot {snapshot}"
    return "rejected", f"Rejected: {rejected}{which}"


def _before_after(examples: Sequence[Example], result: Mapping[str, Any]) -> str:
    if not examples:
        words = "The adapter cannot decode instances."
        return f"<section><h2>Before and after</h2><p>{words}</p></section>"
    counts = summed(each.counts for each in examples)
    where = f"in the {len(examples)} windows below" if len(examples) > 1 else "in the window below"
    if changes := result.get("changes"):  # older runs have counted nothing
        counts = {fate: int(changes[fate]) for fate in FATES}
        windows = int(changes["windows"])
        where = f"in all {windows} windows of held-out images"
        if windows == 1:
            where = "in the one window of held-out images"
        if windows > len(examples):
            where += f"; the {len(examples)} that changed most are shown"
    legend = "".join(
        f'<li data-fate="{fate}"><svg viewBox="0 0 42 21" aria-hidden="true">'
        f'<path class="fate {fate}" d="M5 10.5h32"/></svg><span><b>{counts[fate]}</b> '
        f"{'the ' * (fate == 'same')}{fate}</span></li>"
        for fate in FATES
    )
    second, title = _compared(result)
    words = "The first network against the adapted one"
    if second == "rejected":
        words = "What you keep, against the most promising network that was rejected"
    return _filled(
        "before_after.html",
        words=words,
        where=where,
        legend=legend,
        title=html.escape(title.partition(":")[0]),
        examples="".join(each.figure for each in examples),
    )


def _calibration(directory: RunDirectory) -> str:
    if not (directory.path / CALIBRATION).exists():
        return ""
    calibration = directory.read_json(CALIBRATION)
    words = html.escape(sentence(calibration["words"]))
    return _filled("calibration.html", words=words, chart=draw_calibration(calibration))


def _rows(directory: RunDirectory, history: Sequence[Row], result: Mapping[str, Any]) -> str:
    """A row of the table for each look."""
    looks = [Seen.from_dict(each) for each in directory.read_json("looks.json")["looks"]]
    seen = {(each.name, each.iteration): each for each in looks}
    first = looks[0].look
    kept, there = (result["candidate"], int(result["iteration"])), set(directory.snapshots())
    rows = ""
    for row in history:
        if "d_emb" not in row:
            continue
        name, steps = row["candidate"], int(row["iteration"])
        told = seen.get((name, steps))
        snapshot, against = "", ""
        if told is not None:
            snapshot = str(told.snapshot) if told.snapshot in there else "not kept"
            if name != "initial" and len(first.count):
                wrong = objection(first, told.look, Thresholds(), len(looks) - 1)
                against = wrong or unconfirmed(first, told.look) or "nothing"
        rows += (
            f"<tr{' class=chosen' if (name, steps) == kept else ''}>"
            + _cells("td", [name, str(steps), *(_figure(row.get(each)) for each in _TABLE)])
            + f'<td class="words against">{html.escape(against)}</td>'
            f"<td class=snapshot>{html.escape(snapshot)}</td></tr>"
        )
    return rows


def _figure(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _about(directory: RunDirectory) -> str:
    """Rows of a table: when, folder, network, images, versions."""
    data = directory.read_json("data.json")
    # of the file, not in it: a run that is repeated writes the same bytes
    ended = datetime.fromtimestamp((directory.path / "result.json").stat().st_mtime, UTC)
    rows = {
        "finished": f"{ended:%Y-%m-%d %H:%M} UTC",
        "folder": str(directory.path),
        "model": str(directory.model),
        "images": _named(data["images"]),
        "held out": _named(data["held_out"]),
        "checksum of the network": data["model"],
        "versions": ", ".join(f"{k} {v}" for k, v in data["versions"].items()),
    }
    return "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>'
        for name, value in rows.items()
    )


def _named(fingerprints: Sequence[str]) -> str:
    """How many images, and the names of the first."""
    names = [_MARK.sub("", each) for each in fingerprints[:_NAMED]]
    more = len(fingerprints) - len(names)
    return f"{len(fingerprints)}: {', '.join(names)}" + f" and {more} more" * bool(more)
