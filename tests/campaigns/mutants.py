"""Single small breaks of the code, and whether the tests notice each.

    python tests/campaigns/mutants.py coverage [TEST ...] # which tests run which lines: all tests,
                                                          # or these, beside what is known
    python tests/campaigns/mutants.py draw --count 160    # choose breaks, with a fixed seed
    python tests/campaigns/mutants.py run [--only NAME ...]  # hours; resumable; docs/trust.md

The breaks are in mutants.json: a file, a line of it and what it becomes, so that they outlive
changes elsewhere; one whose line is gone is said to be stale. Each is tried in a copy of the code,
by those tests only that run its line, fastest first, in a process that is forked when everything
but the code itself has been imported. "equivalent" names a break that no test can see, and why.
"""

import argparse
import ast
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
MUTANTS, RESULTS = HERE / "mutants.json", HERE / "mutants_results.jsonl"
CODE = ("selfadapt", "adapters/selfadapt_cellpose", "adapters/selfadapt_smp",
        "adapters/selfadapt_stardist", "plugins/selfadapt_napari")  # fmt: skip
LEFT_OUT = (
    "_demo.py",
    "_report.py",
    "_charts.py",
    "_before_after.py",
    "_again.py",
    "_form.py",
    "_shown.py",
    "_widget.py",
    "testing.py",
    "__init__.py",
    "__main__.py",
)
"""What is looked at by eye, needs napari, runs in other processes only, or is a test itself."""
PATIENCE = 3
"""Tests that take so many times as long as without the break hang: that is noticed, too."""
PRELOADED = (
    "torch", "torchvision", "segmentation_models_pytorch", "cellpose.models", "stardist.nms",
    "stardist.matching", "skimage.segmentation", "skimage.transform", "zarr", "tifffile",
    "imagecodecs", "jsonargparse", "matplotlib.figure", "hypothesis", "pytest", "h5py",
)  # fmt: skip


# --- drawing -------------------------------------------------------------------------------------

COMPARED = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
COMPUTED = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "/", ast.Mod: "*",
    ast.Pow: "*", ast.BitAnd: "|", ast.BitOr: "&",
}  # fmt: skip


def breaks(tree: ast.Module, source: str) -> Iterator[tuple[int, str, str]]:
    """Line (from 1), what it is, and what it becomes; breaks that stay within one line."""
    lines = source.splitlines()
    annotations = {
        id(child)
        for node in ast.walk(tree)
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if part is not None
        for child in ast.walk(part)
    }

    def swapped(node: Any, new: str) -> tuple[int, str, str]:
        row, line = node.lineno, lines[node.lineno - 1].encode()
        changed = line[: node.col_offset] + new.encode() + line[node.end_col_offset :]
        return row, line.decode(), changed.decode()

    for node in ast.walk(tree):
        if id(node) in annotations or getattr(node, "lineno", 0) != getattr(node, "end_lineno", 1):
            continue
        text = ast.get_source_segment(source, node) or ""
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left = ast.get_source_segment(source, node.left)
            right = ast.get_source_segment(source, node.comparators[0])
            yield swapped(node, f"{left} {COMPARED[type(node.ops[0])]} {right}")
        elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
            left = ast.get_source_segment(source, node.left)
            right = ast.get_source_segment(source, node.right)
            if '"' not in text and "'" not in text:
                yield swapped(node, f"({left} {COMPUTED[type(node.op)]} {right})")
        elif isinstance(node, ast.BoolOp):
            first, other = (" and ", " or ")[:: 1 if isinstance(node.op, ast.And) else -1]
            yield swapped(node, text.replace(first, other))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield swapped(node, f"({ast.get_source_segment(source, node.operand)})")
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            value = node.value
            new = repr(not value) if type(value) is bool else repr(value * 2 if value else 1)
            yield swapped(node, new)
        elif isinstance(node, ast.IfExp):
            parts = [ast.get_source_segment(source, n) for n in (node.orelse, node.test, node.body)]
            yield swapped(node, "{} if {} else {}".format(*parts))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield swapped(node, "pass")


def draw(count: int, seed: int) -> None:
    """Add breaks until there are so many, to the file with the fewest first, each line once."""
    rng = random.Random(seed)
    told = json.loads(MUTANTS.read_text()) if MUTANTS.exists() else []
    taken = {(each["file"], each["old"]) for each in told}
    by_file: dict[str, list[tuple[int, str, str]]] = {}
    for folder in CODE:
        for path in sorted((ROOT / folder).glob("*.py")):
            if path.name in LEFT_OUT:
                continue
            source = path.read_text()
            name = str(path.relative_to(ROOT))
            found = [
                (row, old, new)
                for row, old, new in breaks(ast.parse(source), source)
                if old != new
                and source.splitlines().count(old) == 1
                and not any(word in old for word in ("logger", 'f"', "raise ", '"""'))
            ]
            by_file[name] = rng.sample(found, len(found))
    while len(told) < count and any(by_file.values()):
        tried = Counter(each["file"] for each in told)
        name = min((name for name in by_file if by_file[name]), key=lambda name: tried[name])
        _, old, new = by_file[name].pop()
        if (name, old) not in taken:
            taken.add((name, old))
            told.append({"file": name, "old": old, "new": new})
    MUTANTS.write_text(json.dumps(told, indent=1) + "\n")
    print(f"{len(told)} breaks in {MUTANTS.name}")


# --- which tests ---------------------------------------------------------------------------------

DATA = Path(tempfile.gettempdir()) / "selfadapt-mutants.coverage"


def cover(tests: list[str]) -> None:
    """Run tests once, and note which of them runs which line, and how long each takes."""
    traced = [f"--cov={Path(folder).name}" for folder in CODE]
    options = ["--cov-context=test", "--cov-report=", "--durations=0", "-vv", "-q"]
    options += ["--cov-append", *tests] if tests else []
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *traced, *options]
    where = os.environ | {"COVERAGE_FILE": str(DATA)}
    done = subprocess.run(command, cwd=ROOT, env=where, capture_output=True, text=True, check=False)
    with DATA.with_suffix(".log").open("a" if tests else "w") as log:
        log.write(done.stdout)
    print(done.stdout[-400:])


ELSEWHERE = {"selfadapt/_ranks.py": ["tests/test_ranks.py"]}
"""Tests that run a file in processes of their own, which coverage does not see."""


@cache
def durations() -> dict[str, float]:
    """Seconds of each test."""
    seconds: dict[str, float] = {}
    for line in DATA.with_suffix(".log").read_text().splitlines():
        words = line.split()
        if len(words) >= 3 and words[0].endswith("s") and words[1] in ("call", "setup"):
            name = " ".join(words[2:])
            seconds[name] = seconds.get(name, 0) + float(words[0][:-1])
    return seconds


@cache
def failed_before() -> set[str]:
    """Tests that fail without a break: they notice nothing."""
    lines = DATA.with_suffix(".log").read_text().splitlines()
    return {line.partition(" ")[2].partition(" - ")[0] for line in lines if line[:6] == "FAILED"}


def tests_of(file: str, row: int) -> list[str]:
    """Tests that run a line, the fastest first; at import, all of its file."""
    with sqlite3.connect(DATA) as database:
        rows = database.execute(
            "select distinct context.context, line_bits.numbits from line_bits "
            "join context on context.id = line_bits.context_id "
            "join file on file.id = line_bits.file_id where file.path like ?",
            (f"%{file}",),
        ).fetchall()
    hit = {
        context.partition("|")[0]
        for context, bits in rows
        if context and row // 8 < len(bits) and bits[row // 8] & (1 << row % 8)
    }
    known, defined = durations(), ELSEWHERE.get(file, [])
    if not hit:
        hit = {context.partition("|")[0] for context, _ in rows if context}
        # asks of definitions without running a line
        defined = [*defined, "tests/test_small_breaks.py"]
    hit -= failed_before()
    return [*defined, *sorted(hit, key=lambda name: known.get(name, 0.0))]


# --- running -------------------------------------------------------------------------------------


def lines_of(file: str) -> list[str]:
    """The code as it is."""
    return (ROOT / file).read_text().splitlines()


def is_stale(mutant: dict[str, Any]) -> bool:
    """Whether its line is gone, whatever became of the break before."""
    return lines_of(mutant["file"]).count(mutant["old"]) != 1


def try_out(mutant: dict[str, Any]) -> dict[str, Any]:
    """Break a copy of the code and run the tests that run its line."""
    source = lines_of(mutant["file"])
    row = source.index(mutant["old"])
    names = tests_of(mutant["file"], row + 1)
    if not names:
        return {"outcome": "survived", "tests": 0}
    with tempfile.TemporaryDirectory() as folder:
        for part in ("selfadapt", "adapters", "plugins"):
            shutil.copytree(ROOT / part, Path(folder) / part)
        for part in ("tests", "benchmarks", "docs", "examples", "pyproject.toml"):
            (Path(folder) / part).symlink_to(ROOT / part)
        source[row] = mutant["new"]
        (Path(folder) / mutant["file"]).write_text("\n".join(source) + "\n")
        began = time.time()
        log = Path(folder) / "log"
        pid = os.fork()
        if not pid:
            _run_tests(Path(folder), names, log)
        expected = sum(durations().get(name, 0.0) for name in names)
        code = _wait(pid, 60 + PATIENCE * expected)
        told = log.read_text().splitlines() if log.exists() else []
    failed = next(
        (line.split(" - ")[0] for line in told if line.startswith(("FAILED", "ERROR"))), ""
    )
    if code not in (0, 99) and not failed:
        raise SystemExit(f"the tests could not be run ({code}): {told[-5:]}")
    outcome = "survived" if code == 0 else "noticed"
    return {"outcome": outcome, "by": failed.partition(" ")[2] or f"exit {code}",
            "tests": len(names), "seconds": round(time.time() - began)}  # fmt: skip


def _run_tests(folder: Path, names: list[str], log: Path) -> None:
    """In the forked process."""
    import pytest

    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1), os.dup2(out, 2)
    os.chdir(folder)
    code = [str(folder), str(folder / "adapters"), str(folder / "plugins")]
    sys.path[:0] = [*code, str(folder / "tests")]
    os.environ["PYTHONPATH"] = os.pathsep.join(code)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    # what was imported before the fork cannot be rewritten
    quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-p", "no:cacheprovider"]
    options = [*quiet, "-x", "-q", "--tb=no", "-rfE", "--rootdir", str(folder)]
    try:
        os._exit(int(pytest.main([*options, *names])))
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(98)


def _wait(pid: int, seconds: float) -> int:
    """The exit code; 99 where it takes longer."""
    until = time.time() + seconds
    while time.time() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 99


def run(only: list[str], again: bool) -> None:
    """Try every break that was not tried yet, and sum up."""
    for name in PRELOADED:
        __import__(name)
    told = json.loads(MUTANTS.read_text())
    done = {}
    if RESULTS.exists():
        done = {(r["file"], r["old"]): r for r in map(json.loads, RESULTS.read_text().splitlines())}
    stale = [mutant for mutant in told if is_stale(mutant)]
    for mutant in stale:
        print(f"stale: {mutant['file']}\n  {mutant['old']}", flush=True)
    for mutant in told:
        if "equivalent" in mutant or mutant in stale:
            continue
        key = mutant["file"], mutant["old"]
        before = done.get(key)
        retried = again and before is not None and before["outcome"] != "noticed"
        left_out = only and not any(name in mutant["file"] for name in only)
        if left_out or (before is not None and not retried):
            continue
        done[key] = mutant | try_out(mutant)
        with RESULTS.open("a") as file:
            file.write(json.dumps(done[key]) + "\n")
        if done[key]["outcome"] != "noticed":
            print(f"{done[key]['outcome']}: {mutant['file']}\n  {mutant['old']}\n  {mutant['new']}",
                  flush=True)  # fmt: skip
    counted = [
        done[m["file"], m["old"]]["outcome"]
        for m in told
        if (m["file"], m["old"]) in done and "equivalent" not in m and m not in stale
    ]
    noticed = counted.count("noticed")
    print(f"{noticed} of {len(counted)} noticed; {len(stale)} stale; "
          f"{sum('equivalent' in m for m in told)} equivalent")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["coverage", "draw", "run"])
    parser.add_argument("tests", nargs="*", help="tests to take the coverage of")
    parser.add_argument("--count", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="parts of files' names")
    parser.add_argument("--again", action="store_true", help="try survivors once more")
    args = parser.parse_args()
    if args.command == "coverage":
        cover(args.tests)
    elif args.command == "draw":
        draw(args.count, args.seed)
    else:
        run(args.only, args.again)


if __name__ == "__main__":
    main()
