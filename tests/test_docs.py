"""Every code block of README.md and docs/ is executed as it stands, page by page.

A page is executed from its top, in one namespace and in a folder of its own that holds what it
takes for granted (`docs_folder.py`). Runs are shorter than the pages say in one way: the defaults
of some settings (`SHORT`) are less here, unless a block says its own. A block
that cannot run here says why, in a comment above it; it is compiled all the same, and each flag in
it must exist. How many there are is written below.
"""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from selfadapt import Config
from selfadapt._cli import COMMANDS, NOT_TRUSTED, main

pytest.importorskip("cellpose.resnet_torch", reason="the pages are run with Cellpose 3")

import docs_folder  # noqa: E402

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+) -->\n)?^```(?P<kind>.*)\n(?P<text>(?s:.*?))^```$", re.M
)
NOT_RUN = {
    ("README.md", "installs packages"): 2,
    ("benchmarks.md", "needs data sets"): 2,
    ("cellpose.md", "installs packages"): 1,
    ("cellpose.md", "opens a window"): 1,
    ("index.md", "installs packages"): 1,
    ("many-gpus.md", "needs eight GPUs"): 1,
    ("many-gpus.md", "needs several machines"): 1,
    ("own-loop.md", "needs tensorboard"): 1,
    ("shell.md", "a synopsis"): 1,
    ("stardist.md", "installs packages"): 1,
    ("stardist.md", "needs TensorFlow"): 1,
}
SHORT = {"iterations": 2, "validate_every": 1, "crop": 64, "validation_images": 2}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str
    text: str
    reason: str | None = None

    def run(self, names: dict[str, object]) -> None:
        """Do what it says; what goes wrong is said with page and line."""
        if self.kind == "python":
            exec(self.compile(), names)
        elif self.kind == "bash":
            for command in self.commands():
                self._run_command(command)
        elif self.kind == "toml":
            tomllib.loads(self.text)
        else:
            assert self.kind == "text", f"{self.page}:{self.line} is of no kind that is known"

    def compile(self):
        return compile("\n" * self.line + self.text, self.page, "exec")

    def commands(self) -> list[str]:
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]

    def _run_command(self, command: str) -> None:
        words = shlex.split(command, comments=True)
        if words[0] == "selfadapt":
            code = main(words[1:])
            assert code in (0, NOT_TRUSTED), f"{self.page}:{self.line} {command}: {code}"
            return
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["bash", "-ec", command], env=os.environ | {"PATH": path}, check=True)

    def check(self) -> None:
        """What can be said of it without running it."""
        if self.kind == "python":
            self.compile()
            return
        assert self.kind == "bash", f"{self.page}:{self.line} would never have been run"
        for command in self.commands():
            subprocess.run(["bash", "-n", "-c", command], check=True)
            for name, rest in re.findall(r"selfadapt +(\w+)( [^&]*)?", command):
                assert set(_flags(rest)) <= known_flags(name, rest), command
            for script, rest in re.findall(r"python (\S+\.py)(.*)", command):
                source = (ROOT / script).read_text()
                assert all(f'"--{flag}"' in source for flag in _flags(rest)), command


def _flags(text: str) -> list[str]:
    return re.findall(r"--([\w-]+)", text)


def known_flags(command: str, words: str) -> set[str]:
    """The flags that a command has with the adapter that is named in `words`."""
    assert command in COMMANDS, f"selfadapt {command}"
    adapter = re.findall(r"--adapter \w+", words) or [""]
    told = io.StringIO()
    with redirect_stdout(told), pytest.raises(SystemExit):
        main([command, *adapter[0].split(), "--help"])
    return set(_flags(told.getvalue()))


def blocks(path: Path) -> list[Block]:
    text = path.read_text()
    found = [
        Block(
            path.name, text.count("\n", 0, m.start("text")), m["kind"], m["text"], m["reason"]
        )
        for m in FENCE.finditer(text)
    ]  # fmt: skip
    assert 2 * len(found) == len(re.findall("^ *(```|~~~)", text, re.M)), f"{path.name}: a fence"
    assert text.count("<!-- not run") == sum(block.reason is not None for block in found)
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("docs")
    docs_folder.fill(made)
    return made


@pytest.fixture
def short(monkeypatch):
    for name, value in SHORT.items():
        monkeypatch.setitem(Config.__init__.__kwdefaults__, name, value)


@pytest.fixture
def zoo(tmp_path_factory, monkeypatch):
    from cellpose import models

    made = tmp_path_factory.mktemp("zoo")
    docs_folder.fill_zoo(made)
    monkeypatch.setattr(models, "MODEL_DIR", made)


@pytest.fixture
def one_process(tmp_path):
    """A process group of one, for the page on many."""
    store = tmp_path / "store"
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.torch.jit")  # TorchScript is deprecated, as the page smp says
@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket")  # DDP, of what is slow
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_block_of_a_page_runs(path, folder, short, tmp_path, monkeypatch, request):
    extra = {"cellpose.md": "zoo", "many-gpus.md": "one_process"}.get(path.name)
    if extra is not None:
        request.getfixturevalue(extra)
    work = tmp_path / "work"
    shutil.copytree(folder, work)
    monkeypatch.chdir(work)
    names = docs_folder.names(path.name, work)
    for block in blocks(path):
        block.run(names) if block.reason is None else block.check()


def test_blocks_that_are_not_run_are_those_that_are_known():
    assert Counter(
        (block.page, block.reason) for path in PAGES for block in blocks(path) if block.reason
    ) == Counter(NOT_RUN)
