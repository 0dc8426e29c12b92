"""Tab completion, in the shells that are installed."""

import shutil
import subprocess
from contextlib import redirect_stdout

import pytest

from selfadapt._cli import COMMANDS, main

IN_BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_shtab_selfadapt
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Of each shell, as a user writes them."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        with (folder / shell).open("w") as file, redirect_stdout(file):
            assert main(["completion", shell]) == 0
    return folder


def completed(scripts, *words):
    """What bash offers for the last of the words."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    command = ["bash", "--norc", "-c", IN_BASH, "bash", str(scripts / "bash"), *words]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=scripts)
    assert not ran.stderr
    return ran.stdout.split()


def test_every_command_is_completed(scripts):
    assert completed(scripts, "selfadapt", "") == list(COMMANDS)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("adapt", "--batch"), ["--batch-size", "--batch-norm"]),  # as typed, of the settings
        (("segment", "--gra"), ["--gray"]),  # of an adapter
        (("adapt", "--stop", ""), ["auto", "embedding", "fn", "none"]),
        (("check", "--tta", ""), ["true", "false"]),
        (("segment", "--format", "g"), ["geojson"]),
        (("segment", "--adapter", "s"), ["smp", "stardist"]),
        (("adapt", "--scale", ""), ["auto"]),
        (("segment", "--normalize", ""), ["true", "false", "percentile", "standard", "none"]),
        (("adapt", "--resume", "--calib"), ["--calibrate"]),  # --resume takes no value
        (("completion", "z"), ["zsh"]),
        (("report", "zs"), ["zsh"]),  # a folder: here, one of the scripts
        (("adapt", "--model", "fi"), ["fish"]),
        (("calibrate", "--tta"), []),  # of other commands only
    ],
)
def test_flags_and_their_values_are_completed(scripts, words, offered):
    assert completed(scripts, "selfadapt", *words) == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_understand_their_script(scripts, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", str(scripts / shell)], check=True)


def test_fish_completes_values(scripts):
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    asked = f"source {scripts / 'fish'}; complete -C 'selfadapt adapt --stop '"
    ran = subprocess.run(["fish", "-c", asked], capture_output=True, text=True, check=True)
    offered = [line.partition("\t")[0] for line in ran.stdout.splitlines()]
    assert offered == ["auto", "embedding", "fn", "none"]


def test_another_shell_is_refused(capsys):
    assert main(["completion", "ksh"]) == 2
    assert "'ksh' is not allowed: it is one of bash, " in capsys.readouterr().err
