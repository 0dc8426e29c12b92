"""Sources of images, crops and tiles."""

import re
import tracemalloc
from functools import partial

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
import torch
import zarr
from helpers import SmallAdapter, config
from torch.utils.data import Dataset, IterableDataset

from selfadapt import (
    Binary,
    ImageError,
    Input,
    LazyImage,
    OutputSpec,
    Scalar,
    in_single,
    normalize_percentile,
    normalize_standard,
    open_images,
    prepare,
    to_gray,
)
from selfadapt._crops import Crops, evenly, hold_out
from selfadapt._masks import refuse_masks
from selfadapt._tiles import predict_tiled


def pixels(*shape, dtype=np.uint8):
    return np.random.default_rng(sum(shape)).integers(0, 200, shape).astype(dtype)


def read_all(source, **options):
    return [image.read() for image in open_images(source, **options)]


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.uint16, np.int16, np.uint32, np.float32, np.float64]
)
def test_tiff_of_any_depth(tmp_path, dtype):
    image = pixels(20, 30, dtype=dtype)
    tifffile.imwrite(tmp_path / "a.tif", image, compression="lzw")
    (got,) = read_all(tmp_path)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, image[None])


def test_a_folder_of_mixed_types_sizes_and_other_files(tmp_path):
    gray, colour = pixels(20, 30), pixels(10, 12, 3)
    iio.imwrite(tmp_path / "a.png", gray)
    iio.imwrite(tmp_path / "b.PNG", np.dstack([colour, np.full((10, 12), 255, np.uint8)]))
    iio.imwrite(tmp_path / "c.jpg", colour, quality=100)
    tifffile.imwrite(tmp_path / "d.tiff", colour, photometric="rgb")
    (tmp_path / "notes.txt").write_text("no image")
    found = open_images(tmp_path)
    assert [image.name for image in found] == ["a.png", "b.PNG", "c.jpg", "d.tiff"]
    read = [image.read() for image in found]
    np.testing.assert_array_equal(read[0], gray[None])
    np.testing.assert_array_equal(read[1], colour.transpose(2, 0, 1))  # without alpha
    assert read[2].shape == (3, 10, 12)
    np.testing.assert_array_equal(read[3], colour.transpose(2, 0, 1))


@pytest.mark.parametrize("axes", ["TCYX", "ZYX", "CYX", "YXS"])
def test_tiff_axes_are_honoured(tmp_path, axes):
    sizes = {"T": 2, "Z": 4, "C": 3, "Y": 20, "X": 24, "S": 3}
    image = pixels(*(sizes[a] for a in axes))
    options = {"photometric": "rgb"} if "S" in axes else {"photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "a.tif", image, metadata={"axes": axes}, **options)
    read = read_all(tmp_path / "a.tif")
    expected = {
        "TCYX": lambda: list(image),
        "ZYX": lambda: list(image[:, None]),
        "CYX": lambda: [image],
        "YXS": lambda: [image.transpose(2, 0, 1)],
    }[axes]()
    assert len(read) == len(expected)
    for got, want in zip(read, expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_arrays_stacks_and_channel_axis():
    stack = pixels(3, 20, 24)
    assert [i.shape for i in read_all(stack[0])] == [(1, 20, 24)]
    assert [i.shape for i in read_all(stack)] == [(1, 20, 24)] * 3
    assert [i.shape for i in read_all(stack, channel_axis=0)] == [(3, 20, 24)]
    assert [i.shape for i in read_all(pixels(2, 20, 24, 3), channel_axis=-1)] == [(3, 20, 24)] * 2
    mixed = [pixels(20, 24, 3), pixels(8, 9, 3)]
    assert [i.shape for i in read_all(mixed, channel_axis=2)] == [(3, 20, 24), (3, 8, 9)]
    assert [i.shape for i in read_all([torch.zeros(2, 8, 9)])] == [(2, 8, 9)]


def test_zarr_and_ome_zarr(tmp_path):
    data = pixels(2, 30, 40)
    plain = zarr.create_array(tmp_path / "plain.zarr", data=data)
    np.testing.assert_array_equal(np.concatenate(read_all(plain)), data)
    np.testing.assert_array_equal(np.concatenate(read_all(str(tmp_path / "plain.zarr"))), data)
    group = zarr.open_group(tmp_path / "ome.zarr", mode="w")
    group.create_array("0", data=data[None])
    group.attrs["ome"] = {
        "multiscales": [
            {"axes": [{"name": n} for n in "tcyx"], "datasets": [{"path": "0"}], "version": "0.5"}
        ]
    }
    (got,) = read_all(tmp_path / "ome.zarr")
    np.testing.assert_array_equal(got, data)
    with pytest.raises(ImageError, match="multiscales"):
        open_images(zarr.open_group(tmp_path / "empty.zarr", mode="w"))


class Pairs(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.full((1, 8, 9), float(index)), index


class Stream(IterableDataset):
    def __iter__(self):
        return iter([torch.zeros(1, 8, 9)])


def test_a_torch_dataset_is_read_item_by_item():
    assert [float(i.max()) for i in read_all(Pairs())] == [0, 1, 2]
    with pytest.raises(ImageError, match="__len__"):
        open_images(Stream())


def test_a_large_image_is_read_in_windows_only(tmp_path):
    large = pixels(2100, 4500)
    array = zarr.create_array(tmp_path / "a.zarr", data=large, chunks=(256, 256))
    tifffile.imwrite(tmp_path / "a.tif", large, tile=(256, 256))
    tifffile.imwrite(tmp_path / "strip.tif", large.astype(np.uint16), byteorder=">")
    for source in (array, tmp_path / "a.tif", tmp_path / "strip.tif"):
        (image,) = open_images(source)
        windows = image.windows()
        assert len(windows) == 3 * 5
        assert all(window.is_window for window in windows)
        read = [window.read()[0] for window in windows]
        assert max(max(r.shape) for r in read) <= 1024
        rows = [read[k : k + 5] for k in (0, 5, 10)]
        np.testing.assert_array_equal(np.block(rows), large)
        np.testing.assert_array_equal(image.read()[0], large)
        tracemalloc.start()
        assert image.read_window(slice(5), slice(9)).dtype.isnative
        assert tracemalloc.get_traced_memory()[1] < large.size // 4
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p, "no images in"),
        (lambda p: p / "absent", "no file or folder"),
        (lambda p: [], "no images in the list"),
        (lambda p: [np.zeros((4, 5, 3))], "say which axis holds the channels"),
        (lambda p: [np.zeros((2, 4, 5, 3))], "two axes, or three"),
        (lambda p: [np.array([["a"]])], "not numbers"),
        (lambda p: 3, "cannot be read from a int"),
    ],
)
def test_what_is_no_source_is_refused_in_one_sentence(tmp_path, make, message):
    with pytest.raises(ImageError, match=message):
        open_images(make(tmp_path))


@pytest.mark.parametrize("name", ["broken.tif", "broken.png", "broken.jpg", "image.czi"])
def test_unreadable_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is no image at all")
    with pytest.raises(ImageError, match=re.escape(name)):
        Crops(SmallAdapter(), open_images(tmp_path / name), config()).check()


def test_a_truncated_file_is_named_when_read(tmp_path):
    iio.imwrite(tmp_path / "a.png", pixels(64, 64))
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"a\.png"):
        Crops(SmallAdapter(), open_images(tmp_path), config()).check()


def broken(value):
    image = pixels(40, 40).astype(np.float32)
    image[3, 4] = value
    return image


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([broken(np.nan)], "image 0 contains NaN"),
        ([broken(np.inf)] * 2, "image 0 contains NaN or infinity"),
        ([np.full((40, 40), 7)], "image 0 is constant"),
        ([pixels(1, 40)], "image 0 is 1 x 40 pixels for the network.*2 x 2"),
        ([torch.rand(3, 40, 40)], "image 0 has 3 channel.*the network takes 1"),
        ([np.kron(np.eye(4, dtype=int), np.ones((9, 9), int))], "look like masks"),
    ],
)
def test_bad_images_are_refused_before_the_run(images, message):
    with pytest.raises(ImageError, match=message):
        Crops(SmallAdapter(), open_images(images), config()).check()


def test_images_with_nothing_to_see_are_left_out_and_named(caplog):
    images = open_images([pixels(40, 40), np.zeros((40, 40)), np.full((40, 40), 7)])
    crops = Crops(SmallAdapter(), images, config())
    crops.check()
    assert "image 1 is constant" in caplog.text
    assert "image 2 is constant" in caplog.text
    assert float(crops.batch(0).std()) > 0


def test_a_bad_image_beyond_those_that_are_checked_ends_no_run(caplog, monkeypatch):
    monkeypatch.setattr("selfadapt._crops.CHECKED", 1)
    images = open_images([pixels(40, 40), broken(np.nan), np.full((40, 40), 7), pixels(1, 40)])
    crops = Crops(SmallAdapter(), images, config())
    crops.check()
    first = [crops.batch(k) for k in range(12)]
    for number, complaint in ((1, "NaN"), (2, "is constant"), (3, "pixels for the network")):
        assert any(f"image {number}" in m and complaint in m for m in caplog.messages)
    assert len(caplog.messages) == 3  # each is named once
    again = Crops(SmallAdapter(), images, config())
    again.check()
    assert all(torch.equal(again.batch(k), first[k]) for k in range(12))


def test_windows_are_normalised_as_the_whole_image():
    large = np.random.default_rng(0).normal(100, 1, (2304, 300)).astype(np.float32)
    large[:200] += 1000 * np.random.default_rng(1).random((200, 300))  # cells in one corner
    whole = SmallAdapter().prepare(large[None])
    for window, rows in zip(open_images(large)[0].windows(), (0, 768, 1536), strict=True):
        got = prepare(SmallAdapter(), window.read(), str(window), window.whole())
        np.testing.assert_allclose(got[0], whole[0, rows : rows + 768], atol=0.02)


def test_images_of_different_channels_are_refused():
    adapter = SmallAdapter()
    adapter.channels = None
    images = open_images([torch.rand(1, 40, 40), torch.rand(2, 40, 40)])
    with pytest.raises(ImageError, match="image 0 has 1, image 1 has 2"):
        Crops(adapter, images, config()).check()


def test_photographs_are_no_masks():
    smooth = np.add.outer(np.arange(60), np.arange(50)).astype(np.uint8)
    refuse_masks(open_images([smooth]))
    refuse_masks(open_images([pixels(40, 40)]))
    labels = np.kron(np.eye(3, dtype=np.uint16), np.full((9, 9), 4, "u2"))
    refuse_masks(open_images([labels.astype(np.float32)]))
    with pytest.raises(ImageError, match="look like masks"):
        refuse_masks(open_images([labels]))


def test_crops_depend_on_seed_and_number_alone():
    images = open_images([pixels(50, 60), pixels(20, 90), pixels(33, 33)])
    crops = Crops(SmallAdapter(), images, config())
    batches = list(crops.batches(0, 4))
    fresh = Crops(SmallAdapter(), images, config())
    assert torch.equal(fresh.batch(3), batches[3])
    assert batches[0].shape == (2, 1, 32, 32)  # images smaller than the crop are mirrored
    assert not torch.equal(batches[0], batches[1])
    assert not torch.equal(Crops(SmallAdapter(), images, config(seed=1)).batch(3), batches[3])


def test_crop_side_is_rounded_up_to_what_the_network_takes():
    adapter = SmallAdapter()
    adapter.size_multiple = 32
    assert Crops(adapter, [], config(crop=40)).side == 64
    adapter.fixed_size = 256
    assert Crops(adapter, [], config(crop=40)).side == 256


def test_masks_that_cellpose_has_written_beside_the_images_are_left_out(tmp_path, caplog):
    for name in ("a", "a_cp_masks", "b", "c_cp_masks"):
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels(20, 30))
    assert [source.stem for source in open_images(tmp_path)] == ["a", "b", "c_cp_masks"]
    assert "a_cp_masks.tif was made of another image" in caplog.text


def test_blank_windows_of_a_large_image_are_passed_over(tmp_path):
    large = np.zeros((2100, 100), np.uint8)
    large[:900] = pixels(900, 100)
    windows = open_images(large)[0].windows()
    crops = Crops(SmallAdapter(), windows, config())
    crops.check()
    assert [crops._load(k) is None for k in range(3)] == [False, False, True]
    assert float(crops.batch(0).std()) > 0
    for seed in range(5):
        _, held_out = hold_out(windows, config(seed=seed))
        assert all(np.ptp(window.read()) > 0 for window in held_out)
    blank = open_images(np.zeros((2100, 100)))[0].windows()
    with pytest.raises(ImageError, match="constant"):
        Crops(SmallAdapter(), blank, config()).batch(0)
    with pytest.raises(ImageError, match="constant"):
        hold_out(blank, config())


@pytest.mark.parametrize(("count", "held"), [(1, 1), (2, 1), (5, 2), (14, 4), (20, 5), (100, 9)])
def test_hold_out_is_seeded_and_disjoint(count, held):
    images = open_images([pixels(9, 9)] * count)
    settings = config(validation_images=9)
    training, validation = hold_out(images, settings)
    assert len(validation) == held
    names = {i.name for i in training} & {i.name for i in validation}
    assert names == ({"image 0"} if count == 1 else set())
    assert hold_out(images, settings) == (training, validation)
    assert len(hold_out(images, config())[1]) == min(held, config().validation_images)


def test_normalisation_and_gray():
    image = np.stack([pixels(50, 60), np.zeros((50, 60), np.uint8)])
    out = normalize_percentile(image)
    np.testing.assert_allclose(np.percentile(out[0], (1, 99)), (0, 1), atol=1e-6)
    assert not out[1].any()
    spot = np.zeros((1, 50, 50))
    spot[0, 3, 3] = 5
    assert normalize_percentile(spot).max() == 1  # percentiles 1 and 99 coincide
    colour = pixels(3, 20, 30)
    gray = to_gray(colour)
    assert gray.shape == (1, 20, 30)
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    np.testing.assert_allclose(gray[0], luminance, rtol=1e-5)
    with pytest.raises(ImageError, match="2 channels"):
        to_gray(colour[:2])


@pytest.mark.parametrize("size", [(64, 64), (70, 133), (9, 200), (130, 31)])
@pytest.mark.parametrize("fixed", [True, False])
def test_tiles_of_a_pointwise_network_give_the_whole_image_back(size, fixed):
    image = torch.rand(1, *size)
    spec = OutputSpec(p=Binary(), d=Scalar(grid=2))
    seen = set()

    def network(tiles):
        seen.add(tuple(tiles.shape[-2:]))
        return {"p": tiles * 2, "d": tiles[..., ::2, ::2]}

    out = predict_tiled(network, image, spec, tile=64, multiples=(8, 8), fixed=fixed)
    torch.testing.assert_close(out["p"], image * 2)
    torch.testing.assert_close(out["d"], image[..., ::2, ::2])
    assert all(side % 8 == 0 and side <= 64 for tile in seen for side in tile)
    assert not fixed or seen == {(64, 64)}


@pytest.mark.parametrize("ratio", [2, 3, 4, 5, 6, 8])
def test_tiles_of_a_network_that_looks_around_give_what_the_whole_gives(ratio):
    """Whatever multiples it takes, a pixel comes from a tile that sees enough around it."""
    image, spec = torch.rand(1, 400, 270), OutputSpec(d=Scalar())

    def network(tiles):
        return {"d": torch.nn.functional.avg_pool2d(tiles, 9, 1, 4)}

    options = {"multiples": (128 // ratio,) * 2, "fixed": False}
    whole = predict_tiled(network, image, spec, tile=1024, **options)["d"][:, 4:-4, 4:-4]
    tiled = predict_tiled(network, image, spec, tile=128, **options)["d"][:, 4:-4, 4:-4]
    torch.testing.assert_close(tiled, whole, atol=1e-4, rtol=1e-4)


def test_segment_gives_the_size_of_the_image_and_agrees_with_itself(adapter):
    image = pixels(70, 91)
    labels = adapter.segment(image)
    assert labels.shape == image.shape
    np.testing.assert_array_equal(labels, adapter.segment(image[None], channel_axis=0))


def test_one_frame_of_a_stack_is_read_without_the_others(tmp_path):
    stack = pixels(60, 300, 300)
    tifffile.imwrite(tmp_path / "a.tif", stack, metadata={"axes": "TYX"})
    images = open_images(tmp_path)
    assert len(images) == 60
    tracemalloc.start()
    np.testing.assert_array_equal(images[7].read()[0], stack[7])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < stack.nbytes / 4


@pytest.mark.parametrize(
    ("name", "part", "stem"),
    [("cell 1.tif", "", "cell 1"), ("a.b.png", "T3 Z0", "a.b-T3-Z0"), ("image 4", "", "image 4")],
)
def test_names_of_results(name, part, stem):
    assert LazyImage(name, lambda: None, part).stem == stem


@pytest.mark.parametrize("axis", [3, -4])
def test_a_channel_axis_that_no_image_has_is_refused(axis):
    with pytest.raises(ImageError, match=f"channel_axis={axis}"):
        open_images(pixels(2, 20, 24, 3), channel_axis=axis)


def test_lists_and_folders_of_zarr_arrays_stay_lazy(tmp_path):
    data = pixels(30, 40)
    for name in ("a.zarr", "b.zarr"):
        zarr.create_array(tmp_path / name, data=data)
    arrays = [zarr.open(tmp_path / name) for name in ("a.zarr", "b.zarr")]
    for source in (arrays, tmp_path):
        read = read_all(source)
        assert len(read) == 2
        np.testing.assert_array_equal(read[1][0], data)


def test_the_side_respects_grids_that_the_network_does_not_mention():
    adapter = SmallAdapter()
    adapter.size_multiple = 3
    adapter.outputs = OutputSpec(d=Scalar(grid=2))
    assert adapter.side_multiple == 6
    assert Crops(adapter, [], config(crop=32)).side == 36


RAMP = np.random.default_rng(3).integers(0, 1000, (2, 30, 40))


@pytest.mark.parametrize(
    "stored",
    [
        RAMP + 10**9,
        RAMP.astype(np.uint64) + np.uint64(2**63),
        RAMP.astype(np.int64) - 2**62,
        RAMP + 1e12,
        RAMP * 1e-60,
        RAMP * 1e300,
        (RAMP - 500).astype(np.float32) * np.float32(6e35),
    ],
)
@pytest.mark.parametrize("how", [Input(), Input(invert=True), Input(gray=True, channels=(1,))])
def test_intensities_of_any_offset_keep_their_contrast(stored, how):
    adapter = SmallAdapter()
    adapter.input = how
    expected, found = adapter.prepare(RAMP.astype(np.float32)), adapter.prepare(stored)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    part = adapter.prepare(stored[:, :9], stored)
    np.testing.assert_allclose(part, expected[:, :9], atol=2e-6)
    np.testing.assert_allclose(normalize_standard(stored), normalize_standard(RAMP), atol=2e-6)


def test_padding_hides_no_offset():
    mosaic = RAMP + 1e9
    mosaic[:, :2, :3] = 0  # less than percentile 1, which would be 0 else
    found, wanted = (normalize_percentile(each)[:, 2:] for each in (mosaic, RAMP))
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.9999


def test_ordinary_intensities_are_taken_as_they_are():
    for stored in (RAMP.astype(np.uint16), RAMP - 100.5, RAMP.astype(np.float16)):
        part, whole = in_single(stored, stored)
        assert part is whole
        assert np.array_equal(part, stored.astype(np.float32))


def test_a_bad_image_costs_no_other(tmp_path, caplog):
    good = [pixels(40, 40) for _ in range(3)]
    for k, image in enumerate(good):
        tifffile.imwrite(tmp_path / f"{k}.tif", image)
    (tmp_path / "damaged.tif").write_bytes(b"II*\0no tiff")
    tifffile.imwrite(tmp_path / "nan.tif", broken(np.nan))
    tifffile.imwrite(tmp_path / "small.tif", pixels(1, 40))
    sources = open_images(tmp_path)
    assert len(sources) == 6
    for seed in range(5):
        training, held_out = hold_out(sources, config(seed=seed, validation_share=0.4))
        assert {source.stem for source in held_out} <= {"0", "1", "2", "small"}
        Crops(SmallAdapter(), training, config()).check()
    for name in ("damaged", "nan", "small"):
        assert name in caplog.text
    assert [source.stem for source in evenly(sources, 9)] == ["0", "1", "2", "small"]
    with pytest.raises(ImageError, match="damaged"):
        evenly(sources[3:4], 2)
    training, held_out = hold_out(open_images([good[0], broken(np.nan)]), config())
    assert training == held_out


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_throughout_is_no_black_frame(value):
    with pytest.raises(ImageError, match="NaN or infinity"):
        SmallAdapter().segment(np.full((40, 40), value))


@pytest.mark.parametrize("shape", [(0, 40), (40, 0)])
def test_an_image_without_pixels_is_named(shape):
    with pytest.raises(ImageError, match="there is no pixel in it"):
        SmallAdapter().segment(np.zeros(shape))


def test_of_images_of_different_kinds_the_usual_ones_are_looked_at(caplog):
    images = [pixels(40, 40), np.stack([pixels(40, 40)] * 3), pixels(40, 40)]
    sources = [LazyImage(str(k), partial(np.reshape, image, (-1, 40, 40)))
               for k, image in enumerate(images)]  # fmt: skip
    assert [source.name for source in evenly(sources, 3)] == ["0", "2"]
    assert "1 has 3 channel(s), most others have 1. Left out." in caplog.text
