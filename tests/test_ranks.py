"""Two processes are as good as one with the joint batch."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import SmallAdapter, equal_states
from ranks_at_work import steps, whole, without_dropout

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]


def torchrun(*words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, "--standalone", *map(str, words)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    done = torchrun(Path(__file__).with_name("ranks_at_work.py"), folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def told(root):
    return [torch.load(root / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def trained(told):
    """What the processes have adapted: training it again may give other bits."""
    adapter = without_dropout(SmallAdapter())
    adapter.model.load_state_dict(told[0]["model"])
    adapter.model.eval()
    return adapter


def apart(first, second):
    pairs = zip(first.values(), second.values(), strict=True)
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)


def test_twenty_steps_are_those_of_one_process_with_the_joint_batch(told):
    expected = steps()
    for each in told:
        assert apart(each["steps"]["student"], expected["student"]) < 1e-5
        assert apart(each["steps"]["teacher"], expected["teacher"]) < 1e-5
        assert each["steps"]["info"] == pytest.approx(expected["info"], rel=1e-4, abs=1e-6)
        for name, threshold in expected["thresholds"].items():
            torch.testing.assert_close(each["steps"]["thresholds"][name], threshold, equal_nan=True)


@pytest.mark.parametrize("what", ["steps", "batch"])
def test_all_processes_end_with_the_same_bits(told, what):
    first, second = (each[what] for each in told)
    assert equal_states(first["student"], second["student"])
    assert equal_states(first["teacher"], second["teacher"])


def test_the_first_process_waits_for_the_others(told):
    assert all(each["waited"] for each in told)


def test_statistics_are_those_of_all_slices(told):
    assert equal_states(told[0]["statistics"], told[1]["statistics"])


def test_a_run_is_that_of_one_process(trained, told, root, tmp_path):
    expected = whole(trained, tmp_path / "one")
    for each in copy.deepcopy(told):
        found = each["whole"]
        assert (found["reason"], found["iteration"]) == (expected["reason"], expected["iteration"])
        assert apart(found["weights"], expected["weights"]) < 1e-5
        for ours, theirs in zip(found["history"], expected["history"], strict=True):
            assert ours.pop("candidate") == theirs["candidate"]
            numbers = {name: value for name, value in theirs.items() if name != "candidate"}
            assert ours == pytest.approx(numbers, rel=1e-3, abs=1e-5, nan_ok=True)
    names = {path.name for path in (root / "whole").iterdir()}
    assert names == {path.name for path in (tmp_path / "one").iterdir()}
    assert told[0]["temporary"] == told[1]["temporary"] == expected["reason"]


def test_the_first_process_is_asked_and_all_are_cancelled(trained, told, root):
    for each in told:
        assert each["cancelled"]["reason"].startswith("cancelled")
    assert told[0]["asked"] > 0
    assert told[1]["asked"] == 0
    # and one process goes on with what two have begun
    whole_again = whole(trained, root / "cancelled", resume=True)
    assert whole_again["reason"] == told[0]["whole"]["reason"]
    assert apart(whole_again["weights"], told[0]["whole"]["weights"]) < 1e-5


def test_what_is_wrong_is_said_by_all(told):
    for each in told:
        assert "holds other files" in each["foreign"]
        assert each["uneven"] == (
            "batch_size=3 cannot be shared by 2 processes: give a multiple of their number."
        )
        assert each["early"] == each["uneven"]


def test_other_commands_work_in_one_process():
    done = torchrun("-m", "selfadapt", "segment", "--help")
    assert "segment works in one process: start it without torchrun." in done.stderr
