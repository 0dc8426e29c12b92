"""Settings of all tests."""

import gc
import os

import pytest
import torch
from helpers import trained_adapter
from hypothesis import settings

# scripts: those that need other libraries, and those that take a night
collect_ignore = ["stardist_references/make.py", "mesmer_references/make.py", "campaigns"]

# The same examples at every run, so that what fails is what was changed. New ones are drawn at a
# night's length (SELFADAPT_EXAMPLES, test_hostile.py).
settings.register_profile("same", derandomize=True)
if "SELFADAPT_EXAMPLES" not in os.environ:
    settings.load_profile("same")


def pytest_configure() -> None:
    threads = os.environ.get(
        "SELFADAPT_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    )
    torch.set_num_threads(int(threads))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # of the programs that tests start
        os.environ[name] = threads


def pytest_collection_finish() -> None:
    """What has been imported stays: no collection of garbage need look through it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """At the end all of it goes: some libraries count what is left."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def adapter():
    """A small network that finds discs. Tests must not change it; adapting does not."""
    return trained_adapter()
