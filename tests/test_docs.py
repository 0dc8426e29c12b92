"""Every code block of README.md and docs/ is executed as it stands, page by page.

A page is executed from its top, in one namespace and in a folder of its own that holds what it
takes for granted (`docs_folder.py`). Runs are shorter than the pages say in one way: the defaults
of some settings (`SHORT`) are less here, unless a block says its own. A block
that cannot run here says why, in a comment above it; it is compiled all the same, and each flag in
it must exist. How many there are is written below.
"""

import gc
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
from importlib.abc import MetaPathFinder
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml
from filelock import FileLock

import selfadapt
from selfadapt import Config
from selfadapt._cli import COMMANDS, NOT_TRUSTED, main

pytest.importorskip("cellpose.resnet_torch", reason="the pages are run with Cellpose 3")

import docs_folder

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"
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
    ("napari.md", "installs packages"): 1,
    ("own-loop.md", "needs mlflow"): 1,
    ("own-loop.md", "needs wandb"): 1,
    ("shell.md", "a synopsis"): 1,
    ("shell.md", "writes to the home folder"): 1,
    ("stardist.md", "installs packages"): 1,
    ("stardist.md", "needs TensorFlow"): 2,
}
NOT_OF_A_MODEL = ("demo", "report", "adapters", "completion")
SHORT = {
    "iterations": 2, "validate_every": 1, "crop": 64, "validation_images": 2,
    "candidates": "default,tta",
}  # fmt: skip


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
                flags = {flag.replace("-", "_") for flag in _flags(rest)}
                assert flags <= known_flags(name, rest), command
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
    return {flag.replace("-", "_") for flag in _flags(told.getvalue())}


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
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # bioimageio.core
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
    gc.collect()  # while the warnings above are ignored


def test_blocks_that_are_not_run_are_those_that_are_known():
    assert Counter(
        (block.page, block.reason) for path in PAGES for block in blocks(path) if block.reason
    ) == Counter(NOT_RUN)


def test_flags_that_are_named_in_the_text_exist():
    known = {
        flag
        for command in COMMANDS
        for adapter in ("--adapter cellpose", "--adapter smp", "--adapter stardist")
        for flag in known_flags(command, "" if command in NOT_OF_A_MODEL else adapter)
    }
    for path in (page for page in PAGES if page.name != "benchmarks.md"):  # of our scripts
        for code in re.findall("`([^`\n]+)`", FENCE.sub("", path.read_text())):
            if re.match(r"(--|selfadapt )", code):  # not of another program
                flags = {flag.replace("-", "_") for flag in _flags(code)}
                assert flags <= known, f"{path.name}: {code}"


MODEL = "--adapter smp --model my_unet --heads foreground,distance"
RUN = f"{MODEL} --images my_images --out run --iterations 1 --candidates default --calibrate false"
PROVOKED = {
    "there is no file": f"check {MODEL} --images nowhere",
    "no images in": f"check {MODEL} --images my_models",
    "cells_masks.tif and": f"check {MODEL} --images their_masks",
    "all images are constant": f"check {MODEL} --images black",
    "'my_unet' does not say": "check --adapter smp --model my_unet --images my_images",
    "the network gives 2": "check --adapter smp --model my_unet --heads foreground "
    "--images my_images",
    "'weights.pt' is no folder": "check --adapter smp --model weights.pt --images my_images",
    "there is no adapter": "check --adapter other --model my_unet --images my_images",
    "--adapter is missing": "check --model my_unet --images my_images",
    "… knows no --divice": f"check {MODEL} --images my_images --divice cuda",
    "--device 'cuda:99'": f"check {MODEL} --images my_images --device cuda:99",
    "--batch-size 0": f"adapt {MODEL} --images my_images --out new --batch_size 0",
    "'my_images' holds": f"adapt {MODEL} --images my_images --out my_images",
    "--tau is": f"adapt {MODEL} --images my_images --out new --tau 0.3",
    "--trainable 'decodr' selects": (
        f"adapt {MODEL} --images my_images --out new --trainable decodr"
    ),
    "EmbeddingDrift needs": "adapt --adapter smp --model weights.pt --heads foreground --activated "
    "true --trust_torchscript true --images my_images --out new --stop embedding --calibrate false",
    "adapter 'cellpose' needs": "check --adapter cellpose --model cyto3 --images my_images",
    "'cpsam' is": "check --adapter cellpose --model cpsam --images my_images",
    "there is no model 'cyto9'": "check --adapter cellpose --model cyto9 --images my_images",
    "…a.tif has 3 channel(s)": "check --adapter smp --model demo --images rgb",
    "a.tif of shape (96, 96, 5)": "check --adapter smp --model demo --images five",
    "'run' holds another run": f"adapt {RUN}",
    "'run' holds a run with": f"adapt {RUN} --resume --learning_rate 1",
    "another process": f"adapt {RUN} --resume",
    "'nowhere' is no run": "report nowhere",
    "there is no mask for": f"evaluate {MODEL} --images my_images --masks black",
    "cells.tif has several masks": f"evaluate {MODEL} --images my_images --masks two_each",
}
"""By how it begins: the command that ends with a message of docs/troubleshooting.md."""


def messages() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    tables = re.findall("<!-- messages -->(.*?)<!-- end -->", text, re.S)
    return [cell for table in tables for cell in re.findall(r"^\| `(.+?)` \|", table, re.M)]


@pytest.fixture
def troubled(folder, tmp_path, monkeypatch):
    """A folder in which much is wrong."""
    work = tmp_path / "work"
    shutil.copytree(folder, work)
    monkeypatch.chdir(work)
    pixels = tifffile.imread("my_images/cells.tif")
    for name, image, kind in (
        ("black", 0 * pixels, "minisblack"),
        ("rgb", np.stack([pixels] * 3, -1), "rgb"),
        ("five", np.stack([pixels] * 5, -1), "minisblack"),
    ):
        Path(name).mkdir()
        tifffile.imwrite(f"{name}/a.tif", image, photometric=kind)
    shutil.copytree("their_masks", "two_each")
    shutil.copy("their_masks/cells_masks.tif", "two_each/cells_cp_masks.tif")


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run, made by the shell."""
    made = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["adapt", *RUN.replace("--out run", f"--out {made}/run").split()]) != 2
    return made / "run"


class WithoutCellpose(MetaPathFinder):
    """Imports go on as if Cellpose were not installed."""

    def find_spec(self, name, path, target=None):
        if name == "cellpose":
            raise ModuleNotFoundError(name=name)


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("begins", PROVOKED)
def test_troubleshooting_has_what_is_really_said(begins, troubled, finished, monkeypatch, capsys):
    [message] = [each for each in messages() if each.startswith(begins)]
    lock = FileLock("nowhere.lock")
    if "run" in PROVOKED[begins].split():
        shutil.copytree(finished, "run")
    if begins == "another process":
        lock = FileLock("run/.lock")
    if begins == "adapter 'cellpose' needs":
        monkeypatch.setattr(sys, "meta_path", [WithoutCellpose(), *sys.meta_path])
        for name in [name for name in sys.modules if re.match("(selfadapt_)?cellpose", name)]:
            monkeypatch.delitem(sys.modules, name)
    with lock:
        assert main(PROVOKED[begins].split()) == 2
    said = capsys.readouterr().err.splitlines()[-1].removeprefix("selfadapt: ")
    assert re.fullmatch(re.escape(message).replace("…", ".*"), said), said


def test_reasons_in_troubleshooting_are_those_of_the_judge():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    table = text.split("| reason |")[1].split("\n\n")[0]
    reasons = re.findall(r"^\| (its? .*?|flipped .*?|\.\.\. of .*?) \|", table, re.M)
    assert len(reasons) == 8
    judge = re.sub(r'"\s+f?"', "", (ROOT / "selfadapt" / "_verdict.py").read_text())
    for part in re.split(r"\.\.\.|; ", "; ".join(reasons)):
        assert part.strip(" ,") in judge


def test_each_message_of_troubleshooting_is_provoked():
    assert len(messages()) == len(PROVOKED)


AT = "https://github.com/OWNER/NAME"


@pytest.fixture
def released(tmp_path):
    """README and pyproject.toml as a release has them, version 1.2.3 of OWNER/NAME."""
    if not WORKFLOW.exists():
        pytest.skip("not in a source distribution")
    workflow = yaml.safe_load(WORKFLOW.read_text())
    [step] = [s for s in workflow["jobs"]["build"]["steps"] if "README" in s.get("name", "")]
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    told = {"GITHUB_REPOSITORY": "OWNER/NAME", "GITHUB_REF_NAME": "v1.2.3"}
    subprocess.run(["bash", "-ec", step["run"]], cwd=tmp_path, env=os.environ | told, check=True)
    return tmp_path


def leads_to(link):
    """What of the repository a link shows ("raw" or "blob", at the tag), which must be there."""
    kind, path = re.fullmatch(rf"{AT}/(raw|blob)/v1\.2\.3/([^#]*).*", link).groups()
    assert (ROOT / path).exists(), link
    return kind


def test_a_release_has_no_relative_links_in_its_readme(released):
    links = re.findall(r"(!?)\[[^]]*\]\(([^)]*)\)", (released / "README.md").read_text())
    assert all(link.startswith("https://") for _, link in links)
    for image, link in links:
        assert not link.startswith(AT) or (leads_to(link) == "raw") == bool(image)
    assert sum(bool(image) for image, _ in links) == 1


def test_a_release_says_where_its_project_lives(released):
    before, after = (
        tomllib.loads((folder / "pyproject.toml").read_text()) for folder in (ROOT, released)
    )
    urls = after["project"].pop("urls")
    assert after == before
    assert (urls.pop("Source"), urls.pop("Issues")) == (AT, f"{AT}/issues")
    assert list(urls) == ["Documentation", "Changelog"]  # as the package index knows them
    assert all(leads_to(link) == "blob" for link in urls.values())


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"] == selfadapt.__version__
