"""The shell as a user meets it: results, files, and one line for each mistake."""

import dataclasses
import html
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Literal

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
import yaml
from helpers import discs, equal_states
from safetensors.torch import load_file

from selfadapt import ConfigError, ImageError, Input, LazyImage, match, open_images
from selfadapt._cli import COMMANDS, main
from selfadapt._demo import run_demo
from selfadapt._labels import FORMATS, read_note
from selfadapt._masks import refuse_photographs
from selfadapt._settings_file import DEEPEST, read_settings
from selfadapt._shell_images import _matches
from selfadapt._shell_run import _criterion
from selfadapt._wording import kinds_of
from selfadapt_smp import SmpAdapter

QUICK = [
    "--iterations", "4", "--batch_size", "2", "--crop", "64", "--views", "2",
    "--validate_every", "2", "--device", "cpu", "--candidates", "default", "--calibrate", "false",
]  # fmt: skip
DEMO = ["--adapter", "smp", "--model", "demo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images and masks of discs, in mixed formats."""
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    for k in range(4):
        image, labels = discs(k, (96, 120))
        image = np.clip(image + 20, 0, 255)
        if k % 2:
            iio.imwrite(root / "images" / f"cell_{k}.png", image.astype(np.uint8))
        else:
            tifffile.imwrite(root / "images" / f"cell_{k}.tif", (image * 99).astype(np.uint16))
        iio.imwrite(root / "masks" / f"cell_{k}.png", labels.astype(np.uint16))
    return root


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A finished run of the bundled network."""
    out = tmp_path_factory.mktemp("runs") / "run"
    images = str(folder / "images")
    assert main(["adapt", *DEMO, "--images", images, "--out", str(out), *QUICK]) in (0, 3)
    return out


def test_adapt_leaves_model_report_and_the_file_that_repeats_it(run, folder, tmp_path, capsys):
    for name in ("model", "report.html", "run.yaml", "history.csv", "result.json"):
        assert (run / name).exists()
    again = tmp_path / "again"
    assert main(["adapt", "--config", str(run / "run.yaml"), "--out", str(again)]) in (0, 3)
    assert "Verdict: " in capsys.readouterr().out
    assert (again / "history.csv").read_text() == (run / "history.csv").read_text()
    first, second = (SmpAdapter.from_pretrained(str(r / "model")) for r in (run, again))
    image, _ = discs(0, (96, 120))
    np.testing.assert_array_equal(first.segment(image), second.segment(image))


def test_the_exit_code_and_the_last_line_of_adapt_are_its_verdict(run, folder, tmp_path, capsys):
    noise = tmp_path / "noise"
    noise.mkdir()
    for k in range(3):
        pixels = np.random.default_rng(k).normal(99, 9, (64, 80))
        tifffile.imwrite(noise / f"{k}.tif", pixels.astype(np.uint16))
    for images, out, trusted in ((folder / "images", run, True), (noise, tmp_path / "run", False)):
        words = ["--images", str(images), "--out", str(out), "--resume", *QUICK]
        code = main(["adapt", *DEMO, *words])
        outcome = json.loads((out / "result.json").read_text())["outcome"]
        assert (outcome != "not to be trusted") == (code == 0) == trusted
        assert code in (0, 3)
        assert capsys.readouterr().out.splitlines()[-1].startswith(f"Verdict: {outcome}. ")


def test_segment_and_evaluate_agree_on_a_run(run, folder, tmp_path, capsys):
    images, masks = str(folder / "images"), str(folder / "masks")
    out, scores = tmp_path / "labels", tmp_path / "scores.json"
    assert main(["segment", "--model", str(run), "--images", images, "--out", str(out)]) == 0
    files = sorted(out.iterdir())
    assert [f.name for f in files] == [f"cell_{k}.tif" for k in range(4)]
    capsys.readouterr()
    words = ["--model", str(run), "--images", images, "--masks", masks, "--json", str(scores)]
    assert main(["evaluate", *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(scores.read_text())
    counts = [
        match(iio.imread(folder / "masks" / f"{f.stem}.png"), tifffile.imread(f))[0] for f in files
    ]
    pooled = sum(counts[1:], counts[0])
    assert report["ap50"] == round(pooled.ap, 4)
    assert report["ap50_image_mean"] == round(float(np.nanmean([c.ap for c in counts])), 4)
    assert report["precision50"] == round(pooled.precision, 4)
    assert list(report["ap"]) == [str(round(0.5 + 0.05 * k, 2)) for k in range(10)]
    assert report["ap"]["0.5"] == report["ap50"]
    assert (report["images"], report["instances"]) == (4, pooled.tp + pooled.fn)


def test_tta_is_a_flag_of_what_segments(run, folder, tmp_path, capsys):
    images, found = str(folder / "images"), {}
    for said in ("true", "false"):
        out = tmp_path / said
        words = ["--model", str(run), "--images", images, "--out", str(out), "--tta", said]
        assert main(["segment", *words]) == 0
        found[said] = tifffile.imread(out / "cell_0.tif")
    adapter = SmpAdapter.from_pretrained(str(run / "model"))
    saved = Input.from_dict(json.loads((run / "input.json").read_text()))
    adapter = adapter.with_input(dataclasses.replace(saved, tta=True))
    image = iio.imread(next((folder / "images").glob("cell_0*")))
    np.testing.assert_array_equal(found["true"], adapter.segment(image))
    assert (found["true"] != found["false"]).any()


def test_options_of_the_adapter_are_flags(folder, capsys):
    words = ["--images", str(folder / "images"), "--masks", str(folder / "masks")]
    assert main(["evaluate", *DEMO, *words, "--min_size", "100000"]) == 0
    assert json.loads(capsys.readouterr().out)["recall50"] == 0


def test_resume_of_a_finished_run_changes_nothing(run, folder):
    before = (run / "history.csv").read_text()
    images = str(folder / "images")
    words = ["adapt", *DEMO, "--images", images, "--out", str(run), *QUICK, "--resume"]
    assert main(words) == 0
    assert (run / "history.csv").read_text() == before


def test_report_is_drawn_again(run, capsys):
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert page.count("data:image/png") == 2  # held-out images
    assert page.count("data:image/svg+xml") == 6  # curves
    assert "views = 2" in page


def test_another_snapshot_segments_and_is_saved_as_a_model(run, folder, tmp_path, capsys):
    images, image = str(folder / "images"), tifffile.imread(folder / "images" / "cell_0.tif")
    found = {}
    for name in ("0", "2", "4"):
        out, model = tmp_path / f"labels-{name}", tmp_path / f"model-{name}"
        chosen = ["--model", str(run), "--snapshot", name]
        assert main(["segment", *chosen, "--images", images, "--out", str(out)]) == 0
        assert main(["select", *chosen, "--out", str(model)]) == 0
        said = capsys.readouterr().out
        assert str(model) in said
        again = shlex.split(said.partition("Shell:")[2])
        saved = SmpAdapter.from_pretrained(str(model))
        weights = load_file(run / "snapshots" / f"{int(name):06d}.safetensors")
        assert equal_states(saved.model.state_dict(), weights)
        found[name] = tifffile.imread(out / "cell_0.tif")
        np.testing.assert_array_equal(saved.segment(image), found[name])
        mine = tmp_path / f"mine-{name}"  # and as the last line says
        assert main([*again[1:], "--images", images, "--out", str(mine)]) == 0
        np.testing.assert_array_equal(tifffile.imread(mine / "cell_0.tif"), found[name])
    initial = SmpAdapter.from_pretrained("demo")
    np.testing.assert_array_equal(initial.segment(image), found["0"])
    assert not equal_states(initial.model.state_dict(), weights)


def test_flips_and_turns_of_what_was_kept_are_not_those_of_another_snapshot(run, folder, tmp_path):
    copy, images = tmp_path / "copy", str(folder / "images" / "cell_0.tif")
    shutil.copytree(run, copy)
    for name, change in {"result": {"candidate": "initial+tta"}, "input": {"tta": True}}.items():
        file = copy / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    means = {}
    for name, words in {"kept": [], "other": ["--snapshot", "2"]}.items():
        out = tmp_path / name
        assert main(["segment", "--model", str(copy), *words, "--images", images,
                     "--out", str(out)]) == 0  # fmt: skip
        note = read_note(out / "cell_0.tif", FORMATS["tiff"])
        means[name] = note["input"]["tta"]
    assert means == {"kept": True, "other": False}


def test_a_run_remembers_how_it_was_started_and_says_so(run, folder, tmp_path):
    out = tmp_path / "it's a run"
    words = [*DEMO, "--images", str(folder / "images"), "--out", str(out), *QUICK]
    assert main(["adapt", *words, "--resume"]) in (0, 3)  # which is no part of what is repeated
    began = (out / "command.txt").read_text()
    assert shlex.split(began) == ["selfadapt", "adapt", *words]
    assert "resume" not in read_settings(str(out / "run.yaml"))
    assert main(["adapt", *words[:-2], "--calibrate=false", "--resume"]) in (0, 3)
    assert (out / "command.txt").read_text() == began
    codes = re.findall("<pre><code>(.*?)</code>", (out / "report.html").read_text(), re.S)
    commands = [shlex.split(html.unescape(line)) for code in codes for line in code.splitlines()]
    assert shlex.split(began) in commands
    again = [each for each in commands if "--config" in each]
    assert again == [["selfadapt", "adapt", "--config", str(out / "run.yaml"), "--out",
                      f"{out}-again"]]  # fmt: skip
    assert main(again[0][1:]) in (0, 3)
    assert (tmp_path / "it's a run-again" / "history.csv").read_text() == (
        out / "history.csv"
    ).read_text()
    select = next(each for each in commands if each[1] == "select")
    assert main([str(tmp_path / "m") if word == "MODEL" else word for word in select[1:]]) == 0


def test_adapters_lists_what_is_installed(capsys):
    assert main(["adapters"]) == 0
    assert "smp          ready" in capsys.readouterr().out


@pytest.mark.parametrize("command", list(COMMANDS))
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "usage: selfadapt" in capsys.readouterr().out


def test_help_shows_the_adapters_options_and_the_settings(capsys):
    with pytest.raises(SystemExit):
        main(["adapt", "--adapter", "smp", "--help"])
    shown = capsys.readouterr().out
    assert "--heads" in shown
    words = " ".join(shown.split())
    assert "LEARNING_RATE peak learning rate of AdamW (a number, default: 0.0002)" in words
    assert "as found in them (a number or auto)" in words
    assert "--mask {true,false}" in shown
    assert not re.search(r"--\w*_|null|type:|str \||True|Literal", shown)


def test_the_demo_prints_scores_and_writes_its_report(tmp_path, capsys):
    run_demo(tmp_path / "demo", iterations=2)
    out = capsys.readouterr().out
    for stage in ("As it is   AP 0.0", "Calibrated AP 0.7", "Adapted    AP 0.", "Verdict  "):
        assert stage in out
    assert "inverted" in out
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "Calibrated AP 0.7" in page
    assert page.count("<img") >= 3  # calibration, curves, examples
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2
    captured = capsys.readouterr()
    assert "give another folder, --out DIR" in captured.err
    assert not captured.out
    assert main(["demo", "--out", str(tmp_path / "demo"), "--resume"]) == 2
    assert "iterations" in capsys.readouterr().err  # goes on with the same settings only


def test_a_run_made_from_python_says_how_to_open_it(tmp_path, capsys):
    (tmp_path / "history.csv").write_text("iteration\n")
    assert main(["segment", "--model", str(tmp_path), "--images", "i", "--out", "o"]) == 2
    assert "is a run made from Python" in capsys.readouterr().err


def test_help_of_all(capsys):
    assert main(["--help"]) == 0
    assert "evaluate" in capsys.readouterr().out


def bad(root, name, **files):
    """A folder of files with the given contents."""
    folder = root / name
    folder.mkdir()
    for file, content in files.items():
        path = folder / file.replace("_", ".")
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            tifffile.imwrite(path, content)
    return str(folder)


NOISE = np.random.default_rng(0).integers(0, 255, (80, 80)).astype(np.uint8)
NAN = np.where(NOISE == 7, np.nan, NOISE).astype(np.float32)

PLACES = ("empty", "one", "done", "unfinished", "twins", "small")
MISTAKES = [
    ("no images", lambda p: [*DEMO, "--images", bad(p, "d")], "no images in"),
    ("no folder", lambda p: [*DEMO, "--images", "absent"], "no file or folder 'absent'"),
    ("unreadable", lambda p: [*DEMO, "--images", bad(p, "d", a_png=b"x")], "a.png cannot be read"),
    (
        "channels",
        lambda p: [*DEMO, "--images", bad(p, "d", a_tif=np.dstack([NOISE] * 3))],
        "a.tif has 3 channel(s), prepared 3, but the network takes 1",
    ),
    ("nan", lambda p: [*DEMO, "--images", bad(p, "d", a_tif=NAN)], "a.tif contains NaN"),
    ("constant", lambda p: [*DEMO, "--images", bad(p, "d", a_tif=NOISE * 0)], "a.tif is constant"),
    ("small", lambda p: [*DEMO, "--images", bad(p, "d", a_tif=NOISE[:20])], "at least 32 x 32"),
    (
        "masks",
        lambda p: [*DEMO, "--images", bad(p, "d", a_tif=discs(0)[1].astype(np.uint16))],
        "look like masks",
    ),
    (
        "spec",
        lambda p: [*DEMO, "--images", bad(p, "d", a_tif=NOISE), "--heads", "foreground"],
        "the network gives 2 channels, the heads ask for 1 (foreground 1)",
    ),
    (
        "decode",
        lambda p: [*DEMO, "--images", bad(p, "d", a_tif=NOISE), "--heads", "distance,boundary",
                   "--stop", "fn"],
        "cannot decode instances",
    ),
    ("setting", lambda p: [*DEMO, "--images", bad(p, "d", a_tif=NOISE), "--views", "0"],
     "--views 0 is not allowed: it must be between 1 and 8, such as --views 4"),
    ("type", lambda p: [*DEMO, "--images", bad(p, "d", a_tif=NOISE), "--views", "x"], "views"),
    ("option", lambda p: [*DEMO, "--images", bad(p, "d", a_tif=NOISE), "--nonse", "1"], "nonse"),
    ("adapter", lambda p: ["--adapter", "none", "--model", "m", "--images", "i"], "installed are"),
    ("no adapter", lambda p: ["--model", "demo", "--images", "i"], "give --adapter, too"),
    ("model", lambda p: ["--adapter", "smp", "--model", "x", "--images", "i"], "no model 'x'"),
    ("config", lambda p: ["--config", str(p / "absent.yaml")], "absent.yaml"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, words, message):
    out = tmp_path / "out"
    code = main(["adapt", *QUICK, *words(tmp_path), "--out", str(out)])
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "checkpoints" / "default.pt").write_bytes(b"garbage"), "damaged"),
        (lambda run: (run / "config.json").write_text("{}"), "holds a run of another version"),
    ],
)
def test_resuming_a_damaged_run_is_a_mistake(run, folder, tmp_path, capsys, change, message):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    change(copy)
    words = ["--images", str(folder / "images"), "--out", str(copy), *QUICK, "--resume"]
    assert main(["adapt", *DEMO, *words]) == 2
    assert message in capsys.readouterr().err


def test_another_run_in_the_folder_is_a_mistake(run, folder, capsys):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    words = ["--images", str(folder / "images"), "--out", str(run), *QUICK]
    assert main(["adapt", *DEMO, *words]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", *DEMO, "--images", "{images}", "--masks", "{empty}"], "no images in"),
        (
            ["evaluate", *DEMO, "--images", "{images}", "--masks", "{one}"],
            "there is no mask for cell_0.tif",
        ),
        (["segment", *DEMO, "--images", "{images}", "--out", "{done}"], "exists already"),
        (["report", "{empty}"], "is no run"),
        (["select", *DEMO, "--snapshot", "2", "--out", "{new}"], "--snapshot 2 needs --model RUN"),
        (
            ["select", "--model", "{run}", "--snapshot", "3", "--out", "{new}"],
            "there is no snapshot",
        ),
        (["select", "--model", "{run}", "--snapshot", "x", "--out", "{new}"], "no snapshot x"),
        (["select", "--model", "{run}", "--out", "{empty}"], "exists already"),
        (
            ["segment", "--model", "{unfinished}", "--images", "{images}", "--out", "x"],
            "not finished",
        ),
        (["nonsense"], "there is no command 'nonsense'"),
        (["segment", *DEMO, "--images", "{masks}", "--out", "x"], "look like masks"),
        (["segment", *DEMO, "--images", "{twins}", "--out", "x"], "would both be called"),
        (["segment", *DEMO, "--images", "{images}", "--out", "{one}/other.tif"], "other.tif"),
        (
            ["evaluate", *DEMO, "--images", "{images}", "--masks", "{masks}", "--json", "no/x"],
            "no/x",
        ),
        (
            ["evaluate", *DEMO, "--images", "{images}", "--masks", "{small}"],
            "the mask of cell_0.tif",
        ),
        (["report", "{unfinished}"], "is no run"),
    ],
)
def test_mistakes_of_the_other_commands(run, folder, tmp_path, capsys, words, message):
    places = {name: tmp_path / name for name in PLACES}
    for place in places.values():
        place.mkdir()
    tifffile.imwrite(places["one"] / "other.tif", discs(0)[1].astype(np.uint16))
    tifffile.imwrite(places["done"] / "cell_0.tif", NOISE)
    iio.imwrite(places["twins"] / "a.png", NOISE)
    tifffile.imwrite(places["twins"] / "a.tif", NOISE)
    for k in range(4):
        tifffile.imwrite(places["small"] / f"cell_{k}.tif", discs(0)[1].astype(np.uint16))
    (places["unfinished"] / "adapter.json").write_text('{"adapter": "smp", "options": {}}')
    places |= {"images": folder / "images", "masks": folder / "masks"}
    places |= {"run": run, "new": tmp_path / "new"}
    assert main([word.format(**places) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == error.count("selfadapt: ")


def test_the_installed_command_exits_with_2_and_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "selfadapt"]
    done = subprocess.run(
        [*command, "adapt", *DEMO, "--images", str(tmp_path), "--out", str(tmp_path / "o")],
        capture_output=True, text=True, env=os.environ, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("selfadapt: no images in")
    assert done.stderr.count("\n") == 1


def test_a_large_image_is_segmented_as_one(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    large = np.random.default_rng(0).integers(0, 255, (64, 2100)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "images" / "large 1.tif", large)
    words = ["--images", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    assert main(["segment", *DEMO, *words]) == 0
    assert tifffile.imread(tmp_path / "out" / "large 1.tif").shape == (64, 2100)


def test_runs_of_before_are_refused_in_a_sentence(run, folder, tmp_path, capsys):
    old = tmp_path / "old"
    shutil.copytree(run, old)
    result = json.loads((old / "result.json").read_text())
    del result["outcome"]
    (old / "result.json").write_text(json.dumps(result))
    assert main(["report", str(old)]) == 2
    assert "made by an earlier version" in capsys.readouterr().err
    settings = json.loads((old / "config.json").read_text())
    del settings["snapshots"]
    (old / "config.json").write_text(json.dumps(settings))
    words = ["--images", str(folder / "images"), "--out", str(old), "--resume", *QUICK]
    assert main(["adapt", *DEMO, *words]) == 2
    assert "another version, which knows no snapshots" in capsys.readouterr().err
    origin = {"adapter": "smp", "options": {"gray": "inverted"}}
    (old / "adapter.json").write_text(json.dumps(origin))
    out = str(tmp_path / "labels")
    assert main(["segment", "--model", str(old), "--images", words[1], "--out", out]) == 2
    assert "--gray true, --invert true" in capsys.readouterr().err


def test_check_prints_an_estimate_and_a_verdict(folder, tmp_path, capsys):
    images, file = str(folder / "images"), tmp_path / "quality.json"
    code = main(["check", *DEMO, "--images", images, "--windows", "2", "--json", str(file)])
    written = json.loads(file.read_text())
    assert code == (0 if written["trusted"] else 3)
    assert set(written) == {"ap50", "low", "high", "trusted"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("Quality: expected AP at an IoU of 0.5")
    assert lines[-1].startswith("Verdict: ")
    noise = tmp_path / "noise"
    noise.mkdir()
    tifffile.imwrite(noise / "a.tif", np.random.default_rng(0).normal(100, 10, (256, 256)))
    assert main(["check", *DEMO, "--images", str(noise)]) == 3
    assert "Verdict: not to be trusted" in capsys.readouterr().out


def segment(images, out, *words):
    return main(["segment", *DEMO, "--images", str(images), "--out", str(out), *words])


def test_one_bad_image_costs_no_other_and_is_named(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for k in range(4):
        image, labels = discs(k, (64, 64))
        tifffile.imwrite(
            tmp_path / "images" / f"{k}.tif", np.zeros_like(image) if k == 1 else image
        )
        tifffile.imwrite(tmp_path / "masks" / f"{k}.tif", labels.astype(np.uint16))
    (tmp_path / "images" / "2.tif").write_bytes(b"II*\0damaged")
    assert segment(tmp_path / "images", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert "3 label image(s)" in captured.out
    assert "1 of 4 image(s) could not be used: 2.tif" in captured.err
    found = {k: tifffile.imread(tmp_path / "out" / f"{k}.tif") for k in (0, 1, 3)}
    assert found[1].max() == 0  # the black one
    assert found[0].max() > 0
    words = ["--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]
    assert main(["evaluate", *DEMO, *words]) == 2
    scores = json.loads(capsys.readouterr().out)
    assert scores["left_out"] == ["2.tif"]
    truth = sum(int(discs(k, (64, 64))[1].max()) for k in (0, 1, 3))
    assert (scores["images"], scores["instances"]) == (3, truth)  # those of the black one, too


def test_each_image_that_could_not_be_used_is_named(tmp_path, capsys):
    for name in "abc":
        (tmp_path / f"{name}.tif").write_bytes(b"II*\0damaged")
    assert segment(tmp_path, tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "3 of 3 image(s) could not be used" in told
    for name in "abc":
        assert told.count(f"{name}.tif") == 1


MASK = discs(0, (64, 64))[1]


@pytest.mark.parametrize(
    ("mask", "wrong"),
    [
        (MASK[None], None),
        (MASK[None].astype(np.float32), None),
        (np.stack([MASK] * 3), None),
        (np.stack([MASK, MASK, MASK.T]), "has 3 channels, not one"),
        (MASK[None] / 2, "whole numbers"),
        (np.where(MASK[None] == 1, np.inf, MASK), "got float64.*whole numbers"),
        (MASK[None] * 1e20, "got float64.*whole numbers"),
        (MASK[None].astype(int) - 1, "none of them negative"),
    ],
)
def test_masks_may_be_saved_as_colour_or_floats_and_no_more(mask, wrong):
    source = LazyImage("m", lambda: mask)
    if wrong is None:
        assert _matches(source, source, MASK)[0].ap == 1
    else:
        with pytest.raises(ImageError, match=wrong):
            _matches(source, source, MASK)


def test_who_decides_is_the_judge_unless_said():
    assert _criterion("auto", None) == "auto"
    assert _criterion("none", None) is None
    assert _criterion("fn", 0.2).threshold == 0.2


def test_segment_goes_on_where_it_was_and_with_the_same_model_only(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for k in range(3):
        tifffile.imwrite(tmp_path / "images" / f"{k}.tif", discs(k, (64, 64))[0])
    out = tmp_path / "out"
    assert segment(tmp_path / "images", out) == 0
    (out / "1.tif").unlink()
    before = (out / "0.tif").stat().st_mtime_ns
    assert segment(tmp_path / "images", out) == 2
    assert "exists already: give a new folder, or --resume" in capsys.readouterr().err
    assert segment(tmp_path / "images", out, "--resume", "--min_size", "40") == 2
    assert "made by another model or with other options" in capsys.readouterr().err
    assert segment(tmp_path / "images", out, "--resume") == 0
    assert (out / "1.tif").exists()
    assert (out / "0.tif").stat().st_mtime_ns == before
    tifffile.imwrite(tmp_path / "images" / "0.tif", discs(9, (64, 64))[0])
    (out / "2.tif").unlink()
    assert segment(tmp_path / "images", out, "--resume") == 2
    captured = capsys.readouterr()
    assert "0.tif is not what" in captured.err
    assert "2 label image(s)" in captured.out
    assert (out / "2.tif").exists()
    assert (out / "0.tif").stat().st_mtime_ns == before


def test_labels_do_not_come_to_lie_among_the_images(tmp_path, capsys):
    tifffile.imwrite(tmp_path / "a.tif", NOISE)
    assert segment(tmp_path, tmp_path) == 2
    assert "--out is the folder of the images" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]


def test_a_folder_of_one_image_and_its_mask_is_not_the_image_itself(tmp_path, capsys):
    image, labels = discs(0, (64, 64))
    tifffile.imwrite(tmp_path / "x.tif", image)
    words = ["evaluate", *DEMO, "--images", str(tmp_path), "--masks", str(tmp_path)]
    assert main(words) == 2
    assert "is the image itself" in capsys.readouterr().err
    tifffile.imwrite(tmp_path / "x_masks.tif", labels.astype(np.uint16))
    assert main(words) == 0


@pytest.mark.parametrize("command", ["segment", "adapt"])
def test_an_empty_out_is_not_this_folder(tmp_path, capsys, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tifffile.imwrite(tmp_path / "a.tif", NOISE)
    assert main([command, *DEMO, "--images", str(tmp_path), "--out", ""]) == 2
    assert "--out is empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]


def test_a_run_that_is_asked_to_end_leaves_no_temporary_folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "tmp").mkdir()
    for k in range(3):
        tifffile.imwrite(tmp_path / "images" / f"{k}.tif", discs(k, (64, 64))[0])
    words = ["adapt", *DEMO, "--images", str(tmp_path / "images"), "--calibrate", "false"]
    command = [sys.executable, "-m", "selfadapt"]
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"}
    run = tmp_path / "run"
    process = subprocess.Popen(
        [*command, *words, "--out", str(run), "--batch_size", "2", "--crop", "32"],
        env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 120
    while not (run / "checkpoints").exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said.endswith("selfadapt: interrupted; `adapt` goes on with --resume.\n")
    assert not list((tmp_path / "tmp").iterdir())
    assert not list(run.rglob("*.partial"))


def test_the_version_is_that_of_the_package_and_signals_are_as_before(capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    assert main(["adapters"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    capsys.readouterr()
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"selfadapt {version('selfadapt')}\n"
    monkeypatch.setattr(sys, "argv", ["selfadapt", "--version"])  # as it is when installed
    assert main() == 0
    assert capsys.readouterr().out.startswith("selfadapt ")


@pytest.mark.parametrize("flag", ["--channel-axis=9", "--channel_axis=9"])
def test_flags_may_have_hyphens(flag, tmp_path, capsys):
    words = ["--adapter", "smp", "--model", "demo", "--out", str(tmp_path / "a-b--c")]
    assert main(["segment", *words, "--images", str(tmp_path), flag]) == 2
    assert "--channel-axis 9 is no axis" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--batch-size abc", "--batch-size 'abc' is not allowed: it takes a whole number, such as"),
        ("--learning-rate fast", "--learning-rate 'fast' is not allowed: it takes a number,"),
        ("--mask=maybe", "--mask 'maybe' is not allowed: it takes true or false, such as --mask t"),
        ("--normalize percntile", "--normalize 'percntile' is not allowed: it takes percentile, s"),
        (
            "--scale big",
            "--scale 'big' is not allowed: it takes a number or auto, such as --scale auto",
        ),
        ("--gray old", "--gray 'old' is not allowed: it takes true or false, such as --gray true"),
        (
            "--device foo",
            "--device 'foo' is not allowed: it must be auto or a device of torch, such",
        ),
        ("--lerning-rate 3", "knows no --lerning-rate: did you mean --learning-rate? (see:"),
        ("--foo 3", "knows no --foo (see:"),
        ("more", "'more' is one word too many (see:"),
        ("--images", "--images takes a value: give one after it (see:"),
        ("--out", "--out takes a value"),
        ("--model", "--model takes a value"),
        ("--adapter", "--adapter takes a value"),
        ("--config", "--config takes a value"),
    ],
)
def test_what_is_wrong_with_a_flag_is_said_without_the_parsers_jargon(
    words, told, capsys, tmp_path
):
    base = ["adapt", "--adapter", "smp", "--model", "demo", "--images", "i", "--out", str(tmp_path)]
    assert main([*base, *words.split()]) == 2
    line = capsys.readouterr().err
    assert told in line
    assert "adapt --help" in line or "takes a value" in told
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "--batch-size 0",
            "--batch-size 0 is not allowed: it must be above 0, such as --batch-size 4",
        ),
        ("--seed=-1", "--seed -1 is not allowed: it must be 0 or more, such as --seed 0"),
        ("--warmup 2", "--warmup 2.0 is not allowed: it must be between 0 and 1, such as --warmup"),
        ("--candidates foo", "--candidates 'foo' is not allowed: it must be \"auto\", or some of"),
        (
            "--accumulate 9",
            "is not allowed: it must be at most --batch-size, such as --accumulate 1",
        ),
        (
            "--gradient-clip -1",
            "--gradient-clip -1.0 is not allowed: it must be above 0, or null (s",
        ),
        ("--stop fn --tau 0", "--tau 0.0 is not allowed: it must be above 0"),
        ("--trainable xyz", "--trainable 'xyz' selects no parameter of the network; its first are"),
        ("--trainable [", "--trainable '[' is no regular expression"),
        (
            "--scale 0",
            "--scale 0.0 is not allowed: it must lie between 0.01 and 100, such as --scale",
        ),
        ("--threshold 2", "--threshold 2.0 is not allowed: it must be from 0 to 1"),
        ("--channel-axis 9", "--channel-axis 9 is no axis"),
        ("--device meta", "--device 'meta' cannot be used here: Tensor.item() cannot"),
    ],
)
def test_what_is_out_of_range_is_said_with_its_flag_and_before_any_work(
    words, told, folder, capsys, tmp_path
):
    out = tmp_path / "out"
    base = ["adapt", *DEMO, "--images", str(folder / "images"), "--out", str(out)]
    assert main([*base, *words.split()]) == 2
    line = capsys.readouterr().err
    assert line.startswith("selfadapt: --")
    assert told in line
    assert line.count("\n") == 1  # and no progress bar
    assert "\r" not in line
    assert not out.exists()


def test_what_other_commands_refuse_is_said_with_its_flag(folder, capsys, tmp_path):
    base = [*DEMO, "--images", str(folder / "images")]
    for command, words, told in (
        ("check", ["--windows", "0"], "--windows 0 is not allowed: it must be 1 or more, such as"),
        ("segment", ["--out", str(tmp_path / "o"), "--format", "png"],
         "--format 'png' is not allowed: it is one of tiff, ome-zarr, geojson, roi, such as --f"),
    ):  # fmt: skip
        assert main([command, *base, *words]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_python_in_a_message_becomes_flags_where_the_command_has_them():
    parser = COMMANDS["adapt"].parser(DEMO)
    assert parser.in_flags("a.tif: say channel_axis=-1.") == "a.tif: say --channel-axis -1."
    for said in ("/data/exp seed=1: no such folder.", "EmbeddingDrift(seed=5) would see nothing."):
        assert parser.in_flags(said) == said
    for text in (
        "holds another run: resume it (resume=True, --resume).",  # said already
        "the teacher's iou=2 is not allowed: it must be above 0.",  # no flag
        "outputs=(1, 2) has n_rays = 3.",
        "'model=demo' is not there",
        "seed=1.tif is not an image",
        "/data/seed=1 is empty",
        "seed = 1, not 2",
    ):
        assert parser.in_flags(text) == text
    assert parser.in_flags("images='it=1' is one.") == "--images 'it=1' is one."
    told = parser.in_flags("gray=None is not allowed: it must be True or False.")
    assert told == (
        "--gray null is not allowed: it must be true or false, such as --gray true "
        "(see: selfadapt adapt --help)"
    )


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (float | Literal["auto"] | None, ["a number", "auto"]),
        (Literal["soft", "hard"], ["soft, hard"]),
        (Sequence[int] | None, ["a list such as [2, 3]"]),
        (tuple[int, int], ["a list such as [2, 3]"]),
        (bool | dict[str, Any], ["true or false", "names and values such as {name: 1}"]),
        (None, []),
    ],
)
def test_types_are_told_in_words(kind, words):
    assert kinds_of(kind) == words


def test_what_is_missing_is_said_with_what_it_is(capsys):
    assert main(["segment", "--adapter", "smp", "--model", "demo"]) == 2
    told = capsys.readouterr().err
    assert "--images is missing: folder, file or zarr; --out is missing: folder to write to" in told
    assert main(["report"]) == 2
    assert "RUN is missing: RUN folder (see: selfadapt report --help)" in capsys.readouterr().err
    assert main(["segment", "--adapter", "smp", "--model", "demo", "--images", "i", "--out", "o",
                 "--batch_size", "4"]) == 2  # fmt: skip
    assert "knows no --batch-size: it is a setting of `selfadapt adapt`" in capsys.readouterr().err


def test_a_config_file_is_told_of_in_the_same_words(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("batch_size: abc\n")
    words = ["--adapter", "smp", "--model", "demo", "--images", "i", "--out", "o"]
    assert main(["adapt", *words, "--config", str(tmp_path / "c.yaml")]) == 2
    assert "--batch-size 'abc' is not allowed: it takes a whole" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("bach_size: 4\n")
    assert main(["adapt", *words, "--config", str(tmp_path / "c.yaml")]) == 2
    assert "bach" in capsys.readouterr().err


def test_settings_may_be_many_but_not_deep_and_no_aliases(tmp_path):
    file = tmp_path / "c.yaml"
    many = {f"name{k}": [k, {"a": k}] for k in range(20)}
    file.write_text(yaml.safe_dump(many))
    assert read_settings(str(file)) == many
    file.write_text(f"deep: {'[' * (DEEPEST - 1)}{']' * (DEEPEST - 1)}\n")  # and its own level
    assert read_settings(str(file))
    for text in (f"deep: {'[' * DEEPEST}{']' * DEEPEST}\n", "a: &a [1]\nb: *a\n"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="aliases, or is nested too deep"):
            read_settings(str(file))
    file.write_text("- a\n")
    with pytest.raises(ConfigError, match="must hold 'name: value' lines"):
        read_settings(str(file))


@pytest.mark.parametrize("offset", [0, 200])
def test_images_are_no_masks(folder, tmp_path, capsys, offset):
    raw = tmp_path / "raw"
    raw.mkdir()
    for k in range(2):
        image = np.random.default_rng(k).poisson(offset + 40 * (discs(k)[1] > 0)).astype(np.uint16)
        tifffile.imwrite(raw / f"cell_{k}.tif", image)
    (tmp_path / "images").mkdir()
    for k in range(2):
        tifffile.imwrite(tmp_path / "images" / f"cell_{k}.tif", discs(k)[0])
    words = ["evaluate", *DEMO, "--images", str(tmp_path / "images"), "--masks", str(raw)]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "cell_0.tif and the others of --masks look like images: give label images" in told


@pytest.mark.parametrize("kind", [bool, np.uint8, np.float32])
def test_masks_that_do_not_tell_objects_apart_are_said(tmp_path, caplog, kind):
    labels = discs(0)[1]
    for name, mask in (("a", labels > 0), ("b", labels)):
        tifffile.imwrite(tmp_path / f"{name}.tif", mask.astype(kind), photometric="minisblack")
        refuse_photographs(open_images(tmp_path, labels=True)[-1:])
    said = ["a.tif and the others of --masks have one number for all objects", "b.tif"]
    assert said[0] in caplog.text
    assert (said[1] in caplog.text) == (kind is bool)


def test_masks_of_tiny_objects_that_touch_are_masks(tmp_path):
    labels = np.kron(np.arange(1, 401).reshape(20, 20), np.ones((2, 2), int)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", labels)
    refuse_photographs(open_images(tmp_path, labels=True))


@pytest.mark.parametrize("command", ["segment", "evaluate", "adapt"])
def test_a_name_that_is_none_is_a_mistake(tmp_path, capsys, command):
    (tmp_path / "c.yaml").write_text(
        'images: "a\\0b"\nmasks: m\n' if command == "evaluate" else 'images: "a\\0b"\n'
    )
    out = [] if command == "evaluate" else ["--out", str(tmp_path / "out")]
    assert main([command, *DEMO, *out, "--config", str(tmp_path / "c.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
