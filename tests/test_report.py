"""The page of a run, as text: what it says and shows, and that its code does as it says."""

import html
import json
import os
import re
import shutil

import matplotlib.path
import numpy as np
import pytest
import tifffile
import torch
from helpers import IMAGES, config, discs, run_adapt, run_that_improves

from selfadapt import CheckpointError, adapt, match, predict, write_report
from selfadapt._before_after import MAX_SIDE, draw_example
from selfadapt._fates import FATES, fates, summed
from selfadapt._report import _OUTCOMES
from selfadapt._rundir import RunDirectory
from selfadapt._verdict import Outcome

PAIR = ("before", "after")


@pytest.fixture(scope="module")
def improved(adapter, tmp_path_factory):
    """A finished run, and its result."""
    return run_that_improves(adapter, tmp_path_factory.mktemp("runs") / "it's <b>this</b> run")


def drawn(folder, copy, **changes):
    """The page of a copy of a run, of which other things are told."""
    shutil.copytree(folder, copy)
    file = copy / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return write_report(copy).read_text()


def text_of(page):
    body = re.sub(r"<(style|script)[^>]*>.*?</\1>", "", page, flags=re.S)
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", body)).split())


def codes(page):
    return [html.unescape(code) for code in re.findall("<pre><code>(.*?)</code></pre>", page, re.S)]


def test_each_outcome_says_what_it_means_and_what_to_do(improved, tmp_path):
    assert set(_OUTCOMES) == set(Outcome.__args__)
    seen = set()
    for k, (outcome, (kind, meaning, advice)) in enumerate(_OUTCOMES.items()):
        page = drawn(improved.directory.path, tmp_path / str(k), outcome=outcome)
        said = text_of(page)
        where = [said.index(part) for part in (meaning, "What to do next", advice, "Expected AP")]
        assert where == sorted(where)
        assert f'<header class="verdict {kind}">\n<h1>{outcome.capitalize()}</h1>' in page
        seen |= {kind, meaning, advice}
    assert len(seen) == 3 * len(_OUTCOMES)


def test_an_improved_run_tells_quality_reason_and_what_was_kept(improved):
    said = text_of(write_report(improved.directory).read_text())
    quality = improved.quality
    assert improved.outcome == "improved"
    assert improved.reason[1:] in said
    assert f"{quality.ap:.2f} {quality.low:.2f} to {quality.high:.2f} in nine of ten cases" in said
    assert f"Kept {improved.candidate} before the first step" in said
    assert "The first network against the adapted one" in said


def test_unknown_quality_is_said_and_is_no_number(improved, tmp_path):
    unknown = {"ap50": None, "low": None, "high": None, "trusted": False}
    page = drawn(improved.directory.path, tmp_path / "run", quality=unknown)
    assert "Expected AP at an IoU of 0.5 unknown" in text_of(page)


def test_what_changed_is_counted_in_all_windows_and_the_most_changed_are_shown(adapter, tmp_path):
    images = [discs(400 + k, (96, 120))[0] for k in range(12)]
    settings = config(
        iterations=4, learning_rate=1e-2, validation_images=8, validation_share=0.6
    )  # fmt: skip
    run = adapt(
        adapter, images, config=settings, output_dir=tmp_path, stop=None, progress=False
    ).directory
    told, windows = run.read_json("result.json"), len(run.read_json("data.json")["held_out"])
    shown = [
        fates(*(tifffile.imread(tmp_path / "examples" / f"{k}-{when}.tif") for when in PAIR)).counts
        for k in range(4)
    ]
    share = [1 - counts["same"] / sum(counts.values()) for counts in shown]
    assert share == sorted(share, reverse=True)
    assert share[0] > share[-1]
    held_out = [name.partition(" float32")[0] for name in run.read_json("data.json")["held_out"]]
    assert told["examples"][0].startswith(held_out[-2])  # not the first windows, then
    pooled = summed(shown)
    assert all(told["changes"][fate] >= pooled[fate] for fate in FATES)
    assert told["changes"]["windows"] == windows == 7
    assert told["changes"]["same"] > pooled["same"]
    said = text_of(write_report(run).read_text())
    legend = " ".join(f"{told['changes'][f]} {'the ' * (f == 'same')}{f}" for f in FATES)
    assert "in all 7 windows of held-out images; the 4 that changed most" in said
    assert legend in said


def test_a_run_that_has_counted_nothing_counts_what_is_shown(improved, tmp_path):
    page = drawn(improved.directory.path, tmp_path / "run", changes=None)
    assert "objects in the 4 windows below" in text_of(page)


def test_the_code_that_repeats_a_run_of_python_repeats_it(adapter, tmp_path):
    first = run_adapt(adapter, tmp_path / "a 'run'")
    again, another = (
        next(code for code in codes(write_report(first.directory).read_text()) if part in code)
        for part in ("-again", "select")
    )
    exec(again, names := {"adapter": adapter, "images": IMAGES})
    assert names["result"].directory.path == tmp_path / "a 'run'-again"
    assert names["result"].history == first.history
    before = (tmp_path / "a 'run'" / "history.csv").read_text()
    names |= {"image": IMAGES[0]}
    exec(another.replace("another_model", str(tmp_path / "other")), names)
    assert (tmp_path / "a 'run'" / "history.csv").read_text() == before
    initial = RunDirectory(first.directory.path).load_snapshot(0)
    saved = torch.load(tmp_path / "other")
    assert all(torch.equal(saved[name], tensor) for name, tensor in initial.items())
    assert np.array_equal(names["labels"], adapter.segment(IMAGES[0]))


def test_a_criterion_of_ones_own_is_named_and_calibration_told(adapter, tmp_path):
    def tired(run, info):
        return True

    result = run_adapt(adapter, tmp_path, stop=tired, calibrate=False)
    again = codes(write_report(result.directory).read_text())[-1]
    compile(again, "again", "exec")
    assert re.search(r"stop=stop,  # your own: .*tired,\n", again)
    assert "calibrate=False" in again


def about(folder):
    """The table of what the run was."""
    [table] = re.findall('<table class="about">(.*?)</table>', write_report(folder).read_text())
    rows = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', table)
    return {name: html.unescape(value) for name, value in rows}


def test_it_says_when_and_of_which_images(adapter, improved, tmp_path):
    shutil.copytree(improved.directory.path, tmp_path / "many")
    os.utime(tmp_path / "many" / "result.json", (1e9, 1e9))
    told = about(tmp_path / "many")
    assert told["finished"] == "2001-09-09 01:46 UTC"
    seen = improved.directory.read_json("data.json")
    names = {
        key: [each.split(" float32")[0] for each in seen[key]] for key in ("images", "held_out")
    }
    assert names["images"][0].startswith("image ")
    assert told["images"] == f"5: {', '.join(names['images'])}"
    assert told["held out"] == f"7: {', '.join(names['held_out'][:5])} and 2 more"
    (tmp_path / "my (1) images").mkdir()
    for k, image in enumerate(IMAGES):
        tifffile.imwrite(tmp_path / "my (1) images" / f"cell {k} (64, 80) uint8.tif", image)
    adapt(
        adapter, tmp_path / "my (1) images", config=config(iterations=1), stop=None,
        output_dir=tmp_path / "few", progress=False,
    )  # fmt: skip
    told = about(tmp_path / "few")
    name = r"cell \d \(64, 80\) uint8\.tif"  # as if it had a checksum
    assert re.fullmatch(f"4: {name}, {name}, {name}, {name}", told["images"])
    assert re.fullmatch(f"2: {name}, {name}", told["held out"])


def test_a_finished_run_that_is_opened_again_keeps_its_date(adapter, tmp_path):
    run_adapt(adapter, tmp_path)
    os.utime(tmp_path / "result.json", (1e9, 1e9))
    run_adapt(adapter, tmp_path, resume=True)
    assert about(tmp_path)["finished"] == "2001-09-09 01:46 UTC"
    (tmp_path / "result.json").write_text("{}")
    run_adapt(adapter, tmp_path, resume=True)
    assert json.loads((tmp_path / "result.json").read_text())["outcome"]


def test_what_speaks_against_each_candidate_is_in_the_table(improved):
    page = write_report(improved.directory).read_text()
    rows = [text_of(row) for row in re.findall("<tr.*?</tr>", page, re.S)]
    kept = next(row for row in rows if row.startswith(f"{improved.candidate} 0"))
    assert kept.endswith(f"nothing {improved.candidate}")
    assert f"<tr class=chosen><td>{improved.candidate}</td>" in page


def test_the_page_loads_nothing(improved):
    page = write_report(improved.directory).read_text()
    addresses = re.findall(r"(?:src|href|url|action|srcset)\s*[=(]\s*[\"']?([^\"' >)]+)", page)
    assert addresses
    assert all(each.startswith(("data:image/", "#")) for each in addresses)
    assert "default-src 'none'; img-src data:" in page


def test_hostile_names_stay_text_wherever_they_stand(improved, tmp_path):
    evil = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>"
    copy = tmp_path / "run"
    shutil.copytree(improved.directory.path, copy)
    (copy / "run.yaml").write_text(json.dumps(dict.fromkeys(("model", "adapter", "images"), evil)))
    (copy / "command.txt").write_text(evil)
    shutil.copy(copy / "snapshots" / "000000.safetensors", copy / "snapshots" / "&<i>.safetensors")
    data = json.loads((copy / "data.json").read_text())
    (copy / "data.json").write_text(json.dumps(data | {"model": evil, "versions": {evil: evil}}))
    told = {"examples": [evil] * 4, "reason": evil, "rejected": evil, "candidate": evil}
    page = drawn(copy, tmp_path / f"b{evil.replace('/', '')}", **told)
    assert "<script>" not in page
    assert "<img src" not in page
    assert "<i>" not in page
    assert html.escape(evil) in page


@pytest.mark.parametrize(
    "what", [{"outcome": "splendid"}, {"quality": {}}, {"changes": {"same": 1}}]
)
def test_a_damaged_result_is_named(improved, tmp_path, what):
    with pytest.raises(ValueError, match="is damaged"):
        drawn(improved.directory.path, tmp_path / "run", **what)


def test_large_windows_make_no_large_page(tmp_path):
    """Noise, in colour, and thousands of cells: nothing compresses worse."""
    rng = np.random.default_rng(0)
    side = 2048
    tifffile.imwrite(
        tmp_path / "0-image.tif",
        rng.random((3, side, side), np.float32),
        photometric="minisblack",
    )
    rows, columns = np.mgrid[:side, :side]
    labels = (rows // 20 * (side // 20 + 1) + columns // 20 + 1).astype(np.int32)
    labels[(rows % 20 < 3) | (columns % 20 < 3)] = 0
    tifffile.imwrite(tmp_path / "0-before.tif", labels)
    tifffile.imwrite(tmp_path / "0-after.tif", np.roll(labels, 5, 0))
    drawn = draw_example(tmp_path / "0-image.tif", "noise", 1, "after", "After")
    assert f'viewBox="0 0 {MAX_SIDE} {MAX_SIDE}"' in drawn.figure
    assert len(drawn.figure) < 2_500_000
    assert sum(drawn.counts.values()) > 10_000  # counted as they are, not as they are drawn


def test_outlines_of_a_fate_cover_its_instances(tmp_path):
    _, before = discs(3)
    after = np.where(before == before.max(), 0, before)
    for name, array in (("image", before.astype(np.float32)), ("before", before), ("after", after)):
        tifffile.imwrite(tmp_path / f"0-{name}.tif", array)
    drawn = draw_example(tmp_path / "0-image.tif", "discs", 1, "after", "After")
    counts = match(before, after)[0]
    assert (drawn.counts["same"], drawn.counts["lost"]) == (counts.tp, counts.fn) != (0, 0)
    paths = re.findall(r'<path class="fate (\w+)" d="([^"]*)"', drawn.figure)
    assert [fate for fate, _ in paths] == ["same", "lost", "same"]
    lost = dict(paths)["lost"]
    assert lost.count("M") == 1
    corners = [np.array([int(n) for n in re.match(r"M(\d+) (\d+)", lost).groups()])]
    for way, step in re.findall(r"([hv])(-?\d+)", lost):
        corners.append(corners[-1] + int(step) * np.array([way == "h", way == "v"]))
    rows, columns = np.indices(before.shape)
    middles = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], 1)
    filled = matplotlib.path.Path(np.array(corners)).contains_points(middles)
    assert np.array_equal(filled.reshape(before.shape), before == before.max())


@pytest.mark.parametrize("name", ["command.txt", "examples/0-image.tif", "history.csv"])
def test_what_links_lead_to_does_not_come_into_the_page(improved, tmp_path, name):
    copy = tmp_path / "run"
    shutil.copytree(improved.directory.path, copy)
    (tmp_path / "secret").write_text("secret")
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="is a link"):
        write_report(copy)


def test_a_file_of_settings_that_would_fill_memory_is_refused(improved, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(improved.directory.path, copy)
    (copy / "adapter.json").write_text('{"adapter": "smp", "options": {}}')
    (copy / "run.yaml").write_text("a: &a [x, x]\nmodel: m\nadapter: smp\nimages: [*a, *a]\n")
    with pytest.raises(CheckpointError, match="aliases"):
        write_report(copy)


def test_the_snapshot_that_is_suggested_is_the_one_in_the_pictures(adapter, tmp_path):
    result = adapt(
        adapter, IMAGES, config=config(validate_every=2), output_dir=tmp_path / "run",
        progress=False,
    )  # fmt: skip
    told = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result.outcome != "improved"
    shown = told["rejected_snapshot"]
    page = write_report(tmp_path / "run").read_text()
    assert f"result.select({shown!r})" in html.unescape(page)
    assert f"Rejected: {told['rejected']}" in page
    names = sorted((tmp_path / "run" / "examples").glob("*-rejected.tif"))
    network = result.select(shown)
    for file in names:
        pixels = tifffile.imread(file.with_name(file.name.replace("rejected", "image")))
        pixels = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[None])
        found = predict(network, network.model, pixels, tuple(pixels.shape[1:])).instances
        np.testing.assert_array_equal(found, tifffile.imread(file))
    assert names
