"""The examples run as they stand, the scripts for a shorter time."""

import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "accelerate_loop.py": ("accelerate",),
    "ignite_loop.py": ("ignite",),
    "instanseg_unet.py": ("instanseg", "seaborn", "edt"),
    "lightning_loop.py": ("lightning",),
    "unetr_decoder.py": ("torch_em",),
}
"""Packages without which an example is not run."""


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example_runs(name, tmp_path):
    for package in NEEDS.get(name, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    environment = os.environ | {"ITERATIONS": "2", "EPOCHS": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], cwd=tmp_path, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout


def text_of(notebook) -> list[str]:
    """What its cells print, line by line, without numbers, which differ between machines."""
    printed = [
        line
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        for line in output.get("text", "").splitlines()
    ]
    return [re.sub(r"[\d.]+", "#", line) for line in printed if not line.startswith("no candidate")]


def test_the_notebook_runs_from_top_to_bottom_and_says_what_is_stored_in_it(monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # as it was made: CONTRIBUTING.md
    stored = nbformat.read(EXAMPLES / "first_hour.ipynb", as_version=4)
    counts = [cell.execution_count for cell in stored.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "its outputs are stale: make them anew"
    run = NotebookClient(copy.deepcopy(stored), timeout=600).execute()
    assert text_of(run) == text_of(stored)
    pictures = [str(cell.outputs).count("image/png") for cell in run.cells if "outputs" in cell]
    assert sum(pictures) == 3
