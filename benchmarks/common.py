"""What several benchmarks share: the shell, scores, and what a criterion keeps."""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfadapt import Adapter, Matches, Monitor, match
from selfadapt._cli import NOT_TRUSTED


def shell(*words: str) -> str:
    """What `selfadapt WORDS` prints, run by this Python; a verdict of no trust is no failure."""
    command = [sys.executable, "-c", "import selfadapt._cli as c; raise SystemExit(c.main())"]
    done = subprocess.run([*command, *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != NOT_TRUSTED:
        done.check_returncode()
    return done.stdout


def score(adapter: Adapter, pairs: Sequence[tuple[Any, Any]]) -> Matches:
    """Counts at IoU 0.5, pooled over pairs of image `[C, H, W]` and labels."""
    counts = (match(labels, adapter.segment(image, channel_axis=0))[0] for image, labels in pairs)
    return sum(counts, Matches())


@dataclass(frozen=True)
class Agreement:
    """The default criterion before there was a judge, for the cells that were recorded with it.

    A run went through to its end; then the look was kept at which instances in an image and in
    three flipped or turned copies of it agreed best, if they did so better than at first.

    Args:
        threshold: by how much, at least.
        iou: IoU from which two instances are the same.
    """

    threshold: float = 0.06
    iou: float = 0.7

    @property
    def name(self) -> str:
        """Of the figure in a look: AP of the instances in the copies against those in the image."""
        return f"agreement_{self.iou}"

    def choose(self, looks: Sequence[dict[str, Any]]) -> int:
        """Iteration of the look to keep."""
        best = max(looks, key=lambda look: look[self.name])
        rise = best[self.name] - looks[0][self.name]
        return int(best["iteration"]) if rise >= self.threshold else 0


def kept(looks: Sequence[dict[str, Any]], stop: Monitor | Agreement) -> dict[str, Any]:
    """The look that a criterion keeps."""
    chosen = stop.choose(looks)
    return next(look for look in looks if look["iteration"] == chosen)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def results(doc: str | None) -> argparse.ArgumentParser:
    """The parser of a script that adds lines to a file, and makes tables of all of them."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--shared", type=Path, help="the data; without, only tables are made")
    parser.add_argument("--networks", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path, help="folder whose evidence.md gets the tables")
    return parser


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What is there of such a file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add_line(path: Path, facts: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        print(json.dumps(facts), file=file)


def fill(docs: Path | None, tables: Mapping[str, str], name: str = "evidence.md") -> None:
    """Write tables into a page of the docs, if their folder is given."""
    if docs:
        page = docs / name
        page.write_text(filled(page.read_text(), tables))


def filled(text: str, tables: Mapping[str, str]) -> str:
    """A page with its tables made anew, each between `<!-- NAME -->` and `<!-- end -->`."""
    for name, made in tables.items():
        place = re.compile(f"(<!-- {name} -->).*?(<!-- end -->)", re.DOTALL)
        text, places = place.subn(lambda at, made=made: f"{at[1]}\n\n{made}\n\n{at[2]}", text)
        if places != 1:
            raise SystemExit(f"the page has {places} places for the table {name!r}: one is needed.")
    return text
