"""The house as CONTRIBUTING.md draws it: a map that names each module, small files, no circles."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 350
"""Lines of a file."""
MODULES = {
    f"{file.parent.name}.{file.stem}": file
    for folder in ("selfadapt", "adapters/*", "plugins/*")
    for file in sorted(ROOT.glob(f"{folder}/*.py"))
}
"""Of all packages here, by the name with which others import them."""
MAP = ROOT / "CONTRIBUTING.md"


def test_the_map_names_each_module_and_no_other():
    if not MAP.exists():
        pytest.skip("not in a source distribution")
    text = MAP.read_text().split("## Where things are")[1].split("\n## ")[0]
    named = set(re.findall(r"`(_\w+)`", text))
    house = {name.partition(".")[2] for name in MODULES if name.startswith("selfadapt._")}
    house -= {"__init__", "__main__"}
    napari = {n.partition(".")[2] for n in MODULES if n.startswith("selfadapt_napari._")}
    assert house - named == set()
    assert named - house - napari == set()


def test_checks_in_other_environments_are_those_of_ci():
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("not in a source distribution")
    listed = [
        line for line in MAP.read_text().splitlines() if re.match(r"- .*: `.*pip install", line)
    ]
    assert len(listed) == 4
    for line in listed:
        what, tests = re.search(r"(-e '[^`]*)`", line), re.search(r"tests/\w+\.py", line)
        assert what[1] in script.read_text(), line
        assert tests is None or tests[0] in script.read_text(), line


def imported(name: str, within: dict[str, Path] = MODULES) -> set[str]:
    """Modules that one imports, in its functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(within[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by a relative name"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = parts & within.keys()
            found |= modules | ({str(node.module)} if parts - modules else set())
    found |= {f"{package}.__init__" for package in found}
    return (found & within.keys()) - {name}


def circle(within: dict[str, Path]) -> list[str] | None:
    """Modules that import each other, in their order; None if there are none."""
    try:
        TopologicalSorter({name: imported(name, within) for name in within}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def test_no_module_imports_one_that_imports_it():
    assert sum(len(imported(name)) for name in MODULES) > 2 * len(MODULES)
    assert circle(MODULES) is None


def test_a_circle_through_a_function_would_be_found(tmp_path):
    (tmp_path / "a.py").write_text("def late():\n    from box.b import x\n")
    (tmp_path / "b.py").write_text("import box.a\n")
    assert circle({f"box.{name}": tmp_path / f"{name}.py" for name in "ab"}) is not None


def test_types_are_imported_like_all_else():
    """Behind TYPE_CHECKING a circle would be out of sight."""
    assert not [name for name, file in MODULES.items() if "TYPE_CHECKING" in file.read_text()]


@pytest.mark.parametrize("folder", ["selfadapt", "adapters", "plugins", "benchmarks"])
def test_files_are_short_enough_to_be_read(folder):
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines())
        for file in (ROOT / folder).rglob("*.py")
    }
    assert lengths
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}


IMPORT = """
import time, torch, numpy, sys
before = time.process_time()
import selfadapt
print(time.process_time() - before, *sorted({name.partition(".")[0] for name in sys.modules}))
print(*sys.modules)
"""
LATE = {
    "bioio", "bioimageio", "cellpose", "csbdeep", "distributed", "h5py", "jsonargparse",
    "matplotlib", "napari", "pandas", "roifile", "segmentation_models_pytorch", "shtab", "stardist",
    "timm",
}  # fmt: skip
LATE_PARTS = {"scipy.ndimage", "scipy.optimize", "scipy.special", "skimage.transform"}


def test_the_import_takes_a_moment_once_torch_is_there():
    """In processor time: others at work on the machine make no difference."""
    told = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    seconds, *packages = told[0].split()
    assert {"selfadapt", "torch", "scipy"} <= set(packages)
    assert set(packages) & LATE == set()
    assert set(told[1].split()) & LATE_PARTS == set()
    assert float(seconds) < 1.5
