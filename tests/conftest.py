"""Settings of all tests."""

import pytest
import torch
from helpers import trained_adapter

collect_ignore = ["stardist_references/make.py"]  # a script that needs TensorFlow


def pytest_configure() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def adapter():
    """A small network that finds discs. Tests must not change it; adapting does not."""
    return trained_adapter()
