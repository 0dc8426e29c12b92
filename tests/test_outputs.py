"""What `segment` and `evaluate` write: read back, it is what was found."""

import csv
import json
import sys
import zipfile
from collections import Counter

import numpy as np
import pytest
import roifile
import tifffile
import zarr
from helpers import discs
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from skimage.draw import polygon

from selfadapt import open_images
from selfadapt._cli import main
from selfadapt._label_files import TILE, create_ome_zarr, write_tiled_tiff
from selfadapt._labels import FORMATS, read_note, write_labels
from selfadapt._outlines import area, outlines

DEMO = ["--adapter", "smp", "--model", "demo"]
NOTE = {"model": "µ 1", "input": {"scale": 1.5}}


def shapes() -> np.ndarray:
    """All that is awkward about the form of instances, one beside the other."""
    labels = np.zeros((40, 60), np.int32)
    labels[0, 0] = 1  # one pixel, in the corner
    labels[39, 59] = 2
    labels[0:9, 10:20] = 3  # with a hole, in which lies another one
    labels[2:7, 12:18] = 0
    labels[4, 14] = 4
    labels[12:14, 0:4] = 5  # three parts, two of which touch by a corner
    labels[14, 4] = 5
    labels[16, 0] = 5
    labels[12:17, 10:15] = 6  # holes that touch by a corner
    labels[13, 11] = labels[14, 12] = 0
    labels[12:15, 20:23] = 7  # a bay that ends at a corner of a hole's
    labels[12, 20] = labels[13, 21] = 0
    labels[20:30, 20:30] = 8  # beside each other, without a gap
    labels[20:30, 30:41] = 9
    labels[31, 5:50] = 10  # one pixel high
    labels[33:40:2, 0:8:2] = labels[34:40:2, 1:8:2] = 11  # a chessboard
    return labels


def filled(rings, size) -> np.ndarray:
    """The pixels whose centres lie within an odd number of rings of (x, y)."""
    inside = np.zeros(size, bool)
    for ring in rings:
        x, y = np.asarray(ring, float).T - 0.5  # the centre of the first pixel is (0, 0) there
        inside[polygon(y, x, size)] ^= True
    return inside


def from_geojson(file, size) -> np.ndarray:
    content = json.loads(file.read_text())
    assert content["type"] == "FeatureCollection"
    labels = np.zeros(size, np.int32)
    for feature in content["features"]:
        geometry, properties = feature["geometry"], feature["properties"]
        assert feature["type"] == "Feature"
        assert (properties["objectType"], properties["isLocked"]) == ("detection", False)
        parts = geometry["coordinates"]
        if geometry["type"] == "Polygon":
            parts = [parts]
        else:
            assert (geometry["type"], len(parts) > 1) == ("MultiPolygon", True)
        for rings in parts:
            assert all(ring[0] == ring[-1] for ring in rings)
            part = filled(rings, size)
            assert not labels[part].any()
            labels[part] = int(properties["name"])
    return labels


def from_rois(file, size) -> np.ndarray:
    labels = np.zeros(size, np.int32)
    with zipfile.ZipFile(file) as packed:
        assert packed.testzip() is None
        names = packed.namelist()
    rois = roifile.roiread(file)
    assert names == [f"{roi.name}.roi" for roi in rois]
    for roi in rois:
        rings = roi.coordinates(multi=True)
        corners = np.concatenate(rings)
        assert (roi.left, roi.top) == tuple(corners.min(0))
        inside = filled(rings, size)
        assert not labels[inside].any()
        labels[inside] = int(roi.name)
    return labels


def from_zarr(folder, size) -> np.ndarray:
    (image,) = open_images(folder, labels=True)
    return image.read()[0]


READ = {
    "tiff": lambda file, size: tifffile.imread(file),
    "ome-zarr": from_zarr,
    "geojson": from_geojson,
    "roi": from_rois,
}


def large_numbers() -> np.ndarray:
    labels = shapes()
    labels[labels == 5], labels[labels == 3] = 65536, 2**31 - 1
    return labels


LABELS = {
    "shapes": shapes(),
    "large numbers": large_numbers(),
    "none": np.zeros((33, 47), np.int32),
    "one for all": np.full((33, 47), 1, np.int32),
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_read_back_is_what_was_written(name, labels, tmp_path):
    kind = FORMATS[name]
    file = tmp_path / f"a{kind.suffix}"
    write_labels(file, kind, labels, NOTE)
    np.testing.assert_array_equal(READ[name](file, labels.shape), labels)
    assert read_note(file, kind) == NOTE
    assert [path.name for path in tmp_path.iterdir()] == [file.name]  # nothing is left beside it


@pytest.mark.parametrize(("count", "kind"), [(2**16 - 1, np.uint16), (2**16, np.int32)])
def test_a_tiled_tiff_has_the_smallest_type_that_holds_its_labels(count, kind, tmp_path):
    size = TILE + 3, 2 * TILE + 5
    labels = create_ome_zarr(tmp_path / "a.ome.zarr", size, "a", {})
    numbers = np.random.default_rng(0).integers(0, count, size, np.int32, endpoint=True)
    numbers[0, 0] = count
    labels[:] = numbers
    write_tiled_tiff(tmp_path / "a.tif", labels, count, NOTE)
    found = tifffile.imread(tmp_path / "a.tif")
    np.testing.assert_array_equal(found, numbers)
    assert found.dtype == kind


@pytest.mark.parametrize("name", ["geojson", "roi", "tiff"])
def test_the_same_labels_are_the_same_bytes(name, tmp_path):
    for file in ("a", "b"):
        write_labels(tmp_path / file, FORMATS[name], shapes(), NOTE)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@given(
    arrays(np.int32, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 3))
)
def test_outlines_fill_their_pixels_and_no_ring_touches_itself(labels):
    found = np.zeros_like(labels)
    for label, parts in outlines(labels):
        rings = [ring for part in parts for ring in part]
        assert sum(map(area, rings)) == (labels == label).sum()
        for outer, *holes in parts:
            assert area(outer) > 0
            assert all(area(hole) < 0 for hole in holes)
            assert filled([outer, *holes], labels.shape).sum() == sum(map(area, [outer, *holes]))
        for ring in rings:
            assert max(Counter(map(tuple, ring.tolist())).values()) == 1
            steps = np.roll(ring, -1, 0) - ring
            assert ((steps == 0).sum(1) == 1).all()  # along rows and columns, each a real step
            assert ((steps[:, 0] == 0) != (np.roll(steps, 1, 0)[:, 0] == 0)).all()  # to corners
        found[filled(rings, labels.shape)] = label
    np.testing.assert_array_equal(found, labels)


def test_parts_hang_together_by_their_edges():
    found = dict(outlines(shapes()))
    parts = {label: len(each) for label, each in found.items()}
    assert parts == {1: 1, 2: 1, 3: 1, 4: 1, 5: 3, 6: 1, 7: 1, 8: 1, 9: 1, 10: 1, 11: 28}
    holes = {label: [len(part) - 1 for part in each] for label, each in found.items()}
    assert (holes[3], holes[6], holes[7]) == ([1], [2], [1])


def test_rois_are_traced_or_composite_as_imagej_reads_them(tmp_path):
    write_labels(tmp_path / "a.zip", FORMATS["roi"], shapes(), NOTE)
    for roi in roifile.roiread(tmp_path / "a.zip"):
        if roi.name in ("3", "5", "6", "7", "11"):
            assert (roi.roitype, roi.composite) == (roifile.ROI_TYPE.RECT, True)
        else:
            assert (roi.roitype, roi.composite) == (roifile.ROI_TYPE.TRACED, False)


@pytest.mark.parametrize("side", [40_000, 70_000])
def test_rois_of_wide_images_keep_their_place(side, tmp_path):
    labels = np.zeros((4, side), np.int32)
    labels[1:3, -5:-1] = 1
    labels[0, ::1000] = 2
    write_labels(tmp_path / "a.zip", FORMATS["roi"], labels, NOTE)
    one, two = roifile.roiread(tmp_path / "a.zip")
    assert one.coordinates().max(0).tolist() == [side - 1, 3]
    assert max(ring.max() for ring in two.coordinates(multi=True)) == side - 999


def test_ome_zarr_says_that_it_is_a_label_image(tmp_path):
    labels = np.zeros((30, 1500), np.int32)
    labels[3, 1400] = 70_000
    for value, dtype in ((labels, np.int32), (shapes(), np.uint16)):
        folder = tmp_path / f"{dtype.__name__}.ome.zarr"
        write_labels(folder, FORMATS["ome-zarr"], value, NOTE)
        group = zarr.open_group(folder, mode="r", zarr_format=3)
        ome = group.attrs["ome"]
        assert (ome["version"], ome["image-label"]) == ("0.5", {})
        (scales,) = ome["multiscales"]
        assert scales["axes"] == [{"name": n, "type": "space"} for n in "yx"]
        (level,) = scales["datasets"]
        assert level["coordinateTransformations"] == [{"type": "scale", "scale": [1, 1]}]
        array = group[level["path"]]
        assert array.metadata.dimension_names == ("y", "x")
        assert (array.dtype, array.shape) == (dtype, value.shape)
        assert max(array.chunks) <= 1024


def segment(images, out, *words):
    return main(["segment", *DEMO, "--images", str(images), "--out", str(out), *words])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for k in range(2):
        tifffile.imwrite(folder / f"cell {k}.tif", discs(k, (64, 72))[0])
    tifffile.imwrite(folder / "empty.tif", np.zeros((64, 72), np.uint8))
    return folder


@pytest.fixture(scope="module")
def found(images, tmp_path_factory):
    """Labels by the name of the image, from the TIFF files."""
    out = tmp_path_factory.mktemp("found")
    assert segment(images, out) == 0
    return {path.stem: tifffile.imread(path) for path in out.iterdir()}


@pytest.mark.parametrize("name", FORMATS)
def test_segment_writes_each_format(name, images, found, tmp_path, capsys):
    assert segment(images, tmp_path / "out", "--format", name) == 0
    assert "3 label image(s)" in capsys.readouterr().out
    suffix = FORMATS[name].suffix
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{s}{suffix}" for s in found}
    for stem, labels in found.items():
        file = tmp_path / "out" / f"{stem}{suffix}"
        np.testing.assert_array_equal(READ[name](file, labels.shape), labels)
    assert found["cell 0"].max() > 1
    assert found["empty"].max() == 0


def test_formats_lie_beside_each_other(images, tmp_path):
    for name in FORMATS:
        assert segment(images, tmp_path / "out", "--format", name) == 0
    assert len(list((tmp_path / "out").iterdir())) == 3 * len(FORMATS)


def times(path):
    return {each: each.stat().st_mtime_ns for each in [path, *path.rglob("*")]}


def remove(path):
    for each in sorted(path.rglob("*"), reverse=True):
        each.rmdir() if each.is_dir() else each.unlink()
    path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_goes_on_with_the_same_model_and_pixels_only(name, images, tmp_path, capsys):
    folder, out, suffix = tmp_path / "images", tmp_path / "out", FORMATS[name].suffix
    folder.mkdir()
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    words = ["--format", name]
    assert segment(folder, out, *words) == 0
    remove(out / f"cell 1{suffix}")
    before = times(out / f"cell 0{suffix}")
    assert segment(folder, out, *words) == 2
    assert "exists already: give a new folder, or --resume" in capsys.readouterr().err
    assert segment(folder, out, *words, "--resume", "--min_size", "40") == 2
    assert "made by another model or with other options" in capsys.readouterr().err
    assert not (out / f"cell 1{suffix}").exists()
    assert segment(folder, out, *words, "--resume") == 0
    assert (out / f"cell 1{suffix}").exists()
    tifffile.imwrite(folder / "cell 0.tif", discs(9, (64, 72))[0])
    assert segment(folder, out, *words, "--resume") == 2
    assert "cell 0.tif is not what" in capsys.readouterr().err
    assert times(out / f"cell 0{suffix}") == before


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("content", [b"", b"[]", b'{"selfadapt": 3}', None])
def test_what_others_have_made_is_not_gone_on_with(name, content, images, tmp_path, capsys):
    file = tmp_path / f"empty{FORMATS[name].suffix}"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    assert segment(images, tmp_path, "--format", name, "--resume") == 2
    assert "made by another model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_missing_roifile_is_said_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "roifile", None)  # Python's own way to say it is not there
    assert segment(tmp_path / "absent", tmp_path / "out", "--format", "roi") == 2
    said = capsys.readouterr().err
    assert said == "selfadapt: --format roi needs roifile: pip install 'selfadapt[roi]'\n"
    assert not (tmp_path / "out").exists()
    assert segment(tmp_path / "absent", tmp_path / "out", "--format", "geojson") == 2
    assert "no file or folder" in capsys.readouterr().err


def test_an_unknown_format_is_a_mistake(tmp_path, capsys):
    assert segment(tmp_path, tmp_path / "out", "--format", "svg") == 2
    said = capsys.readouterr().err
    assert "ome-zarr" in said
    assert said.count("\n") == 1


def test_ome_zarr_labels_serve_as_masks(images, found, tmp_path, capsys):
    assert segment(images, tmp_path / "out", "--format", "ome-zarr") == 0
    capsys.readouterr()
    words = ["--images", str(images), "--masks", str(tmp_path / "out")]
    assert main(["evaluate", *DEMO, *words]) == 0
    scores = json.loads(capsys.readouterr().out)
    total = sum(len(np.unique(labels)) - 1 for labels in found.values())
    assert (scores["ap50"], scores["images"], scores["instances"]) == (1.0, 3, total)


@pytest.fixture
def hand_counted(images, found, tmp_path):
    """Images and masks of which each count is known, and how many are found in the first two."""
    folder, masks = tmp_path / "images", tmp_path / "masks"
    folder.mkdir()
    masks.mkdir()
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "damaged.tif").write_bytes(b"II*\0damaged")
    first = found["cell 0"].copy()
    background = np.argwhere(first == 0)
    first[first == 1] = 0  # found, and not in the mask
    first[tuple(background[0])] = 900  # in the mask, and not found
    of_masks = {
        "cell 0": first,
        "cell 1": np.zeros_like(first),
        "damaged": first,
        "empty": np.zeros_like(first),
    }
    for stem, labels in of_masks.items():
        tifffile.imwrite(masks / f"{stem}.tif", labels)
    counts = [len(np.unique(found[f"cell {k}"])) - 1 for k in range(2)]
    return folder, masks, *counts


def test_the_table_counts_as_by_hand(hand_counted, tmp_path, capsys):
    folder, masks, first, second = hand_counted
    file = tmp_path / "table.csv"
    words = ["--images", str(folder), "--masks", str(masks), "--table", str(file)]
    assert main(["evaluate", *DEMO, *words]) == 2
    captured = capsys.readouterr()
    assert "1 of 4 image(s) could not be used: damaged.tif" in captured.err
    scores = json.loads(captured.out)
    assert set(scores) == {
        "ap50", "ap50_image_mean", "ap", "precision50", "recall50", "images", "instances",
        "left_out",
    }  # fmt: skip
    with file.open(newline="", encoding="utf-8") as text:
        table = {row.pop("image"): row for row in csv.DictReader(text)}
    assert list(table) == ["cell 0.tif", "cell 1.tif", "damaged.tif", "empty.tif"]
    tp = first - 1
    ap, each = tp / (tp + 2), tp / first
    assert table["cell 0.tif"] == {
        "ap50": f"{round(ap, 4)}", "precision50": f"{round(each, 4)}",
        "recall50": f"{round(each, 4)}", "f1_50": f"{round(each, 4)}",
        "tp50": f"{tp}", "fp50": "1", "fn50": "1", "ap_mean": f"{round(ap, 4)}",
        "instances": f"{first}", "found": f"{first}", "left_out": "",
    }  # fmt: skip
    assert table["cell 1.tif"] == {
        "ap50": "0.0", "precision50": "0.0", "recall50": "", "f1_50": "0.0",
        "tp50": "0", "fp50": f"{second}", "fn50": "0", "ap_mean": "0.0",
        "instances": "0", "found": f"{second}", "left_out": "",
    }  # fmt: skip
    counts = ("tp50", "fp50", "fn50", "instances", "found")
    assert table["empty.tif"] == dict.fromkeys(table["empty.tif"], "") | dict.fromkeys(counts, "0")
    left_out = table["damaged.tif"]
    assert left_out.pop("left_out").startswith("damaged.tif holds no image")
    assert set(left_out.values()) == {""}
    pooled = [sum(int(row[key] or 0) for row in table.values()) for key in counts[:3]]
    assert scores["ap50"] == round(pooled[0] / sum(pooled), 4)


def test_the_mean_ap_of_the_table_is_over_all_thresholds(images, found, tmp_path):
    (tmp_path / "masks").mkdir()
    for stem, labels in found.items():
        shifted = np.roll(labels, 1, 0)
        tifffile.imwrite(tmp_path / "masks" / f"{stem}.tif", shifted)
    words = ["--images", str(images), "--masks", str(tmp_path / "masks"), "--json"]
    files = tmp_path / "scores.json", tmp_path / "table.csv"
    one = tmp_path / "one"
    one.mkdir()
    (one / "cell 0.tif").write_bytes((images / "cell 0.tif").read_bytes())
    words[1] = str(one)
    assert main(["evaluate", *DEMO, *words, str(files[0]), "--table", str(files[1])]) == 0
    scores = json.loads(files[0].read_text())
    (row,) = csv.DictReader(files[1].read_text().splitlines())
    assert float(row["ap50"]) == scores["ap50"]
    mean = sum(scores["ap"].values()) / 10
    assert mean < scores["ap50"]
    assert float(row["ap_mean"]) == pytest.approx(mean, abs=1e-4)


def test_of_images_that_are_all_bad_the_table_says_why(hand_counted, tmp_path):
    folder, masks, *_ = hand_counted
    file = tmp_path / "table.csv"
    words = ["--images", str(folder), "--masks", str(masks), "--table", str(file)]
    for path in masks.iterdir():
        tifffile.imwrite(path, np.ones((5, 5), np.uint8))
    assert main(["evaluate", *DEMO, *words]) == 2
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["left_out"][:7] for row in rows] == ["the mas", "the mas", "damaged", "the mas"]


@pytest.mark.parametrize("flag", ["--table", "--json"])
def test_a_place_for_scores_is_looked_at_before_work_and_no_folder_is_lost(
    flag, images, found, tmp_path, capsys
):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("kept")
    words = ["evaluate", *DEMO, "--images", str(images), "--masks", str(kept)]
    for stem, labels in found.items():
        tifffile.imwrite(kept / f"{stem}.tif", labels)
    for path, message in ((kept, "is a folder"), (kept / "no" / "x", "there is no folder for")):
        assert main([*words, flag, str(path)]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert not captured.out
    assert (kept / "file").read_text() == "kept"
    assert main([*words, "--table", str(kept / "x"), "--json", str(kept / "x")]) == 2
    assert "are one file" in capsys.readouterr().err
