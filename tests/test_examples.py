"""The examples run as they stand, for a shorter time."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
