"""Settings of all tests."""

import os

import pytest
import torch
from helpers import trained_adapter

# scripts: one that needs TensorFlow, and those that take a night
collect_ignore = ["stardist_references/make.py", "campaigns"]


def pytest_configure() -> None:
    torch.set_num_threads(int(os.environ.get("SELFADAPT_THREADS", "2")))


@pytest.fixture(scope="session")
def adapter():
    """A small network that finds discs. Tests must not change it; adapting does not."""
    return trained_adapter()
