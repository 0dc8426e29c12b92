"""`segment_large`: block by block as in one piece, and never more of an image than a block."""

import json
import os
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr
from helpers import SmallAdapter
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from torch import nn

from selfadapt import (
    Adapter,
    Binary,
    CheckpointError,
    ConfigError,
    ImageError,
    Input,
    LazyImage,
    ModelError,
    OutputError,
    OutputSpec,
    is_constant,
    match,
    open_images,
    segment_large,
)
from selfadapt._block_job import Job
from selfadapt._blocks import add_objects, blocks_of, keep_own
from selfadapt._cli import main

BLOCKS = {"block": 64, "overlap": 32, "progress": False}


class Bright(nn.Module):
    """A network that finds what is brighter than the middle; on a grid of 2, of four pixels."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(20.0))
        self.blur = nn.AvgPool2d(grid) if grid > 1 else nn.AvgPool2d(3, 1, 1)

    def forward(self, images):
        return self.gain * (self.blur(images) - 0.5)


class BrightAdapter(Adapter):
    channels = 1

    def __init__(self, grid: int = 1, fixed_size: int | None = None, **input) -> None:
        self.model = Bright(grid)
        self.outputs = OutputSpec(foreground=Binary(grid=(grid, grid)))
        self.fixed_size = fixed_size
        self.input = Input(**input)

    def forward(self, model, images):
        return {"foreground": model(images)}

    def embedding_module(self, model):
        return model.blur

    def decode(self, outputs, size):
        return ndimage.label(outputs["foreground"][0].numpy() > 0)[0].astype(np.int32)


def crowd(size: tuple[int, int], seed: int = 0, radius: tuple[float, float] = (5, 9)):
    """Separate bright discs all over an image, many of them on seams, brighter to the right."""
    rng = np.random.default_rng(seed)
    image = np.zeros(size)
    rows, columns = np.mgrid[: size[0], : size[1]]
    for y in range(0, size[0], 24):
        for x in range(0, size[1], 24):
            cy, cx = y + rng.uniform(-2, 2), x + rng.uniform(-2, 2)
            r = rng.uniform(*radius)
            image[(rows - cy) ** 2 + (columns - cx) ** 2 < r * r] = 100
    return (ndimage.gaussian_filter(image, 1) * (1 + columns / 4000)).astype(np.float32)


def read(path: Path) -> np.ndarray:
    return open_images(path, labels=True)[0].read()[0]


def test_no_object_is_cut_lost_or_doubled_at_a_seam(adapter, tmp_path):
    image = crowd((250, 330))
    whole = adapter.segment(image)
    count = segment_large(adapter, image, tmp_path / "labels.zarr", **BLOCKS)
    labels = read(tmp_path / "labels.zarr")
    assert count == whole.max() > 100
    assert np.unique(labels).tolist() == list(range(count + 1))
    assert match(whole, labels, [1.0])[0].tp == count  # pixel for pixel


ADAPTERS = {
    "scale 0.5": BrightAdapter(scale=0.5),
    "scale 1.7": BrightAdapter(scale=1.7),
    "grid 2": BrightAdapter(grid=2),
    "scale 0.5, grid 2": BrightAdapter(grid=2, scale=0.5),
    "fixed size": BrightAdapter(fixed_size=48),
    "TTA": BrightAdapter(tta=True),
    "TTA, grid 2": BrightAdapter(grid=2, tta=True),
    "inverted": BrightAdapter(invert=True),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_blocks_find_what_one_piece_does_whatever_the_adapter(name, tmp_path):
    adapter, image = ADAPTERS[name], crowd((152, 204))
    image = -image if name == "inverted" else image
    whole = adapter.segment(image)
    count = segment_large(adapter, image, tmp_path / "labels.zarr", **BLOCKS)
    assert count == whole.max() >= 60
    assert match(whole, read(tmp_path / "labels.zarr"), [0.85])[0].tp == count


def test_a_block_is_normalised_as_the_whole_image(tmp_path):
    image = crowd((128, 256))
    image[:, 128:] *= 0.3  # by itself, this half would be as bright as the other
    adapter = BrightAdapter()
    whole = adapter.segment(image)
    assert adapter.segment(image[:, 140:]).max() > whole[:, 140:].max() == 0
    segment_large(adapter, image, tmp_path / "labels.zarr", **BLOCKS)
    assert match(whole, read(tmp_path / "labels.zarr"), [1.0])[0].ap == 1


def joined(blocks, views, size):
    """Labels of an image, and their number, of what each block sees."""
    target, count = np.zeros(size, np.int32), 0
    for block, view in zip(blocks, views, strict=True):
        own, _ = keep_own(view, block, size)
        count = add_objects(target, block, own, count)
    return target, count


@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(20, 90), st.integers(20, 90)),
    block=st.integers(16, 60),
    step=st.tuples(st.sampled_from([1, 2, 8]), st.sampled_from([1, 3])),
)
def test_objects_that_all_blocks_see_alike_come_together_as_they_were(seed, size, block, step):
    rng = np.random.default_rng(seed)
    truth = np.zeros(size, np.int32)
    for number in range(1, 30):  # touching and overlapping, up to 11 pixels
        y, x = rng.integers(0, size[0]), rng.integers(0, size[1])
        h, w = rng.integers(1, 12, 2)
        truth[y : y + h, x : x + w] = number
    blocks = blocks_of(size, block, 20, step)
    labels, count = joined(blocks, [truth[b.window] for b in blocks], size)
    assert count == len(np.unique(truth[truth > 0]))
    assert match(truth, labels, [1.0])[0].tp == count


@pytest.mark.parametrize(("left_sees", "right_sees"), [(2, -2), (-2, 2), (0, 0), (-1, 0)])
def test_an_object_that_two_blocks_see_at_other_places_is_there_once(left_sees, right_sees):
    size = (40, 128)
    blocks = blocks_of(size, 64, 32, (1, 1))
    views = []
    for block, shift in zip(blocks, (left_sees, right_sees), strict=True):
        view = np.zeros(size, np.int32)
        view[10:20, 59 + shift : 69 + shift] = 7  # around the seam at 64
        views.append(view[block.window])
    labels, count = joined(blocks, views, size)
    assert count == 1
    assert (labels > 0).sum() == 100


def test_an_object_larger_than_the_overlap_is_told_of(adapter, tmp_path, caplog):
    image = crowd((100, 200), radius=(4, 6))
    segment_large(adapter, image, tmp_path / "fits.zarr", **BLOCKS)
    assert "may be cut" not in caplog.text
    image[40:60, 20:180] = 100
    segment_large(adapter, image, tmp_path / "labels.zarr", **BLOCKS)
    assert "object(s) reach the end of what their block sees" in caplog.text


def watched(image, *, stop_after: int | None = None):
    """An image that is read in windows, the windows read, and whether it breaks off at one."""
    windows: list[tuple[slice, slice]] = []

    def read_window(rows, columns):
        if stop_after is not None and len(windows) > stop_after:
            raise KeyboardInterrupt
        windows.append((rows, columns))
        return image[None, rows, columns]

    return LazyImage(
        "watched", lambda: image[None], size=image.shape, read_window=read_window
    ), windows


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize("kind", ["zarr", "tif"])
def test_resumed_between_blocks_it_ends_with_the_same_bytes(adapter, tmp_path, kind):
    image, (through, broken) = (
        crowd((130, 200)),
        (tmp_path / f"{name}.{kind}" for name in ("a", "b")),
    )
    segment_large(adapter, watched(image)[0], through, **BLOCKS)
    with pytest.raises(KeyboardInterrupt):
        segment_large(adapter, watched(image, stop_after=5)[0], broken, **BLOCKS)
    assert not broken.exists()
    with pytest.raises(CheckpointError, match=r"was begun: go on with it \(resume=True"):
        segment_large(adapter, image, broken, **BLOCKS)
    with pytest.raises(CheckpointError, match="overlap = 32, not 30: give the same"):
        segment_large(adapter, image, broken, **BLOCKS | {"overlap": 30}, resume=True)
    with pytest.raises(CheckpointError, match=r"image = .* not "):
        segment_large(adapter, image + 1, broken, **BLOCKS, resume=True)
    with pytest.raises(CheckpointError, match="model = "):
        segment_large(SmallAdapter(1), image, broken, **BLOCKS, resume=True)
    lazy, windows = watched(image)
    segment_large(adapter, lazy, broken, **BLOCKS, resume=True)
    assert len(windows) == 1 + 12 - 5  # once for the checksum, and the blocks that were missing
    assert contents(broken) == contents(through)
    assert sorted(p.name for p in tmp_path.iterdir()) == [through.name, broken.name]


def test_what_is_written_is_ome_zarr_or_a_tiled_bigtiff_with_the_same_labels(adapter, tmp_path):
    image = crowd((130, 600))
    told = {"made": "by a test"}
    count = segment_large(adapter, image, tmp_path / "l.ome.zarr", **BLOCKS, notes=told)
    segment_large(adapter, image, tmp_path / "l.tif", **BLOCKS, notes=told)
    group = zarr.open_group(tmp_path / "l.ome.zarr", mode="r")
    assert group.attrs["ome"]["version"] == "0.5"
    assert group.attrs["selfadapt"]["made"] == "by a test"
    assert group["0"].metadata.dimension_names == ("y", "x")
    with tifffile.TiffFile(tmp_path / "l.tif") as tiff:
        page = tiff.pages.first
        assert tiff.is_bigtiff
        assert page.is_tiled
        assert (page.dtype, page.shape) == (np.uint16, image.shape)
        assert json.loads(page.description)["made"] == "by a test"
    labels = read(tmp_path / "l.tif")
    assert labels.max() == count
    np.testing.assert_array_equal(labels, read(tmp_path / "l.ome.zarr"))


def test_memory_does_not_grow_with_the_image_and_blank_blocks_are_empty(tmp_path):
    corner = crowd((300, 300)) + 1
    largest = 0

    def read_window(rows, columns):
        nonlocal largest
        pixels = np.zeros((1, rows.stop - rows.start, columns.stop - columns.start), np.float32)
        largest = max(largest, pixels.size)
        part = corner[rows, columns]
        pixels[0, : part.shape[0], : part.shape[1]] = part
        return pixels

    def read_all():
        raise AssertionError("the whole image is read")

    lazy = LazyImage("slide", read_all, size=(20_000, 4_000), read_window=read_window)
    adapter, sides = BrightAdapter(low=0, high=100), {"block": 1000, "overlap": 100}
    tracemalloc.start()
    count = segment_large(adapter, lazy, tmp_path / "l.zarr", **sides, progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 13 * 13
    assert largest <= 2048**2  # for the checksum; a block sees less
    assert peak < 20_000 * 4_000  # bytes: a quarter of what the labels alone would take
    labels = read(tmp_path / "l.zarr")
    assert is_constant(labels[400:])


@pytest.fixture(scope="module")
def client():
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None)
    with cluster, distributed.Client(cluster) as client:
        yield client


def test_two_workers_of_dask_give_the_same_bytes_as_none(adapter, client, tmp_path):
    image, log = crowd((130, 330)), tmp_path / "readers"
    segment_large(adapter, image, tmp_path / "alone.zarr", **BLOCKS)

    def read_window(rows, columns):
        with log.open("a") as file:
            print(os.getpid(), file=file)
        return image[None, rows, columns]

    lazy = LazyImage("image", lambda: image[None], "", image.shape, read_window)
    segment_large(adapter, lazy, tmp_path / "both.zarr", **BLOCKS, client=client)
    assert contents(tmp_path / "both.zarr") == contents(tmp_path / "alone.zarr")
    first, *others = map(int, log.read_text().split())
    assert first == os.getpid()  # the checksum
    assert set(others) == set(client.run(os.getpid).values())  # both, and only they
    assert len(others) == 18


def test_what_fails_on_a_worker_is_a_sentence_and_what_is_done_is_kept(adapter, client, tmp_path):
    image = crowd((130, 200))

    def with_nan(rows, columns):
        pixels = image[None, rows, columns].copy()
        pixels[:, 120 - rows.start :, 190 - columns.start :] = np.nan
        return pixels

    lazy = LazyImage("image", lambda: image[None], "", image.shape, with_nan)
    with pytest.raises(ImageError, match=r"^image block2,3 contains NaN"):
        segment_large(adapter, lazy, tmp_path / "l.zarr", **BLOCKS, client=client)
    assert list((tmp_path / "l.zarr.blocks").glob("block*.npz"))

    def read_window(rows, columns):
        if rows.stop < 130:
            raise RuntimeError("the disk of this worker is gone")
        return image[None, rows, columns]

    lazy = LazyImage("image", lambda: image[None], "", image.shape, read_window)
    with pytest.raises(OutputError, match=r"fails at block.* disk of this worker is gone"):
        segment_large(adapter, lazy, tmp_path / "m.zarr", **BLOCKS, client=client)
    adapter.hook = threading.Lock()  # cannot be pickled
    try:
        with pytest.raises(ConfigError, match="cannot be sent to other processes"):
            segment_large(adapter, image, tmp_path / "n.zarr", **BLOCKS, client=client)
    finally:
        del adapter.hook


class Mute(BrightAdapter):
    can_decode = False


@pytest.mark.parametrize(
    ("error", "said", "given"),
    [
        (ConfigError, "block=8 is not allowed: give pixels, 16 or more", {"block": 8}),
        (ConfigError, "overlap=-1 is not allowed", {"overlap": -1}),
        (ConfigError, "block=1.5 is not allowed", {"block": 1.5}),
        (ConfigError, "must end in .zarr, .tif or .tiff", {"out": "labels.png"}),
        (ConfigError, "exists already", {"out": "there.tif"}),
        (ConfigError, "give a distributed.Client", {"client": 3}),
        (ImageError, "there are 2 images", {"image": np.zeros((2, 30, 30))}),
        (ImageError, "cannot be read in windows", {"image": LazyImage("x", lambda: None)}),
        (ModelError, "cannot decode", {"adapter": Mute()}),
    ],
)
def test_what_cannot_be_done_is_refused_before_work(tmp_path, error, said, given):
    (tmp_path / "there.tif").touch()
    image, windows = watched(crowd((64, 64)))
    call = {"adapter": BrightAdapter(), "image": image, "out": "labels.zarr"} | given
    call["out"] = tmp_path / call["out"]
    with pytest.raises(error, match=said):
        segment_large(**call)
    assert not windows
    assert [path.name for path in tmp_path.iterdir()] == ["there.tif"]


def test_one_block_without_overlap_is_what_segment_does(tmp_path):
    adapter, image = BrightAdapter(low=0, high=100), crowd((64, 64))
    segment_large(adapter, image, tmp_path / "a.tif", block=64, overlap=0, progress=False)
    counts = match(adapter.segment(image), tifffile.imread(tmp_path / "a.tif"), (1.0,))[0]
    assert (counts.fp, counts.fn) == (0, 0)
    assert counts.tp > 3
    with torch.no_grad():
        adapter.model.gain.fill_(torch.nan)
    for job in (adapter.segment, lambda i: segment_large(adapter, i, tmp_path / "b.tif", **BLOCKS)):
        with pytest.raises(OutputError, match="the network gives NaN or infinity"):
            job(image)


def test_without_distributed_a_sentence_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)  # as if not installed
    with pytest.raises(ConfigError, match=r"pip install 'selfadapt\[dask\]'"):
        segment_large(BrightAdapter(), np.eye(64), tmp_path / "l.zarr", client="tcp://x:1")


def test_one_process_works_on_a_file_at_a_time(adapter, tmp_path):
    image, out = crowd((64, 64)), tmp_path / "l.zarr"

    def read_window(rows, columns):
        if (out.parent / "l.zarr.blocks").exists():
            with pytest.raises(CheckpointError, match="another process is at work"):
                segment_large(adapter, image, out, **BLOCKS)
        return image[None, rows, columns]

    lazy = LazyImage("image", lambda: image[None], "", image.shape, read_window)
    segment_large(adapter, lazy, out, **BLOCKS)


def test_an_output_that_is_not_finite_is_named_with_its_block(tmp_path):
    adapter = BrightAdapter()
    with torch.no_grad():
        adapter.model.gain.fill_(torch.inf)
    job = Job(adapter, watched(crowd((64, 64)))[0], crowd((64, 64))[None])
    with pytest.raises(OutputError, match="watched block0,0: the network gives NaN or infinity"):
        job(blocks_of((64, 64), 64, 0, (1, 1))[0])


def test_the_shell_segments_a_large_image_by_blocks_and_goes_on_with_it(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    slide = np.zeros((300, 60_000), np.uint16)  # more than 2**24 pixels
    slide[:, :300] = crowd((300, 300)) * 20 + np.random.default_rng(0).integers(0, 9, 300)
    file, out = tmp_path / "images" / "slide.tif", tmp_path / "out"
    tifffile.imwrite(file, slide, tile=(256, 256), compression="zlib")
    words = ["segment", "--adapter", "smp", "--model", "demo", "--images", str(file.parent)]
    words += ["--out", str(out)]
    assert main(words) == 0
    with tifffile.TiffFile(out / "slide.tif") as tiff:
        assert tiff.is_bigtiff  # by blocks
        labels = tiff.asarray()
    assert labels.shape == slide.shape
    assert labels[:, :300].max() > 20
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    before = (out / "slide.tif").stat()
    assert main([*words, "--resume"]) == 0
    assert (out / "slide.tif").stat().st_mtime_ns == before.st_mtime_ns
    assert main([*words[:-1], str(tmp_path / "zarr"), "--format", "ome-zarr"]) == 0
    np.testing.assert_array_equal(read(tmp_path / "zarr" / "slide.ome.zarr"), labels)
    slide[0, 0] = 1
    tifffile.imwrite(file, slide, tile=(256, 256), compression="zlib")
    assert main([*words, "--resume"]) == 2
    assert "is not what" in capsys.readouterr().err
