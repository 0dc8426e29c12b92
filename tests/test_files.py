"""Files that people have: read right, or named in a sentence."""

import json
import os
import pickle
import shutil
import struct
import tempfile
import time
import zlib
from contextlib import suppress
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image, ImageCms
from scipy.ndimage import gaussian_filter

from selfadapt import ImageError, open_images
from selfadapt._masks import made_of, pair

RNG = np.random.default_rng(0)
FIVE = RNG.integers(0, 4000, (5, 64, 48)).astype(np.uint16)


def read(path, **options):
    return [image.read() for image in open_images(path, **options)]


def same(found, expected):
    return len(found) == len(expected) and all(map(np.array_equal, found, expected))


# --- series, scenes, pyramids --------------------------------------------------------------------


def test_a_pyramid_is_one_image_read_lazily_at_full_resolution(tmp_path, monkeypatch):
    base = RNG.integers(0, 4000, (2304, 2100)).astype(np.uint16)
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tiff:
        tiff.write(base, subifds=2, tile=(256, 256), metadata={"axes": "YX"})
        tiff.write(base[::2, ::2], subfiletype=1, tile=(256, 256))
        tiff.write(base[::4, ::4], subfiletype=1, tile=(256, 256))
    (image,) = open_images(tmp_path)
    assert image.size == base.shape
    assert np.array_equal(image.read()[0], base)
    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", None)  # all of it is never decoded
    window = image.read_window(slice(250, 700), slice(1000, 1100))
    assert np.array_equal(window[0], base[250:700, 1000:1100])


def appended(path):
    for index, frame in enumerate(FIVE):
        tifffile.imwrite(path, frame, append=index > 0)


def positions(path):
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for frame in FIVE:
            tiff.write(frame, metadata={"axes": "YX"})


def plain_pages(path):
    with tifffile.TiffWriter(path) as tiff:
        for frame in FIVE:
            tiff.write(frame, metadata=None)


def thumbnail_first(path):
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(FIVE[0, ::4, ::4], metadata=None)
        for frame in FIVE:
            tiff.write(frame, metadata=None)


def thumbnail_last(path):
    with tifffile.TiffWriter(path) as tiff:
        for frame in FIVE:
            tiff.write(frame, metadata=None)
        preview = np.repeat((FIVE[0, ::2, ::2, None] // 16).astype(np.uint8), 3, -1)
        tiff.write(preview, photometric="rgb", metadata=None)


@pytest.mark.parametrize(
    "write", [appended, positions, plain_pages, thumbnail_first, thumbnail_last]
)
def test_every_series_of_a_tiff_is_an_image_and_thumbnails_are_not(tmp_path, caplog, write):
    write(tmp_path / "a.tif")
    assert same(read(tmp_path), FIVE[:, None])
    stems = [image.stem for image in open_images(tmp_path)]
    assert len(set(stems)) == 5
    left_out = "small copies (thumbnails)" in caplog.text
    assert left_out == ("thumbnail" in write.__name__)


def one_of_several(path, frame, t, count):
    """A file of an OME-TIFF of several, each of which describes all."""
    uuid = "urn:uuid:{}0000000-0000-0000-0000-000000000000"
    data = "".join(
        f'<TiffData FirstT="{k}" IFD="0" PlaneCount="1"><UUID FileName="t{k}.ome.tif">'
        f"{uuid.format(k)}</UUID></TiffData>"
        for k in range(count)
    )
    height, width = frame.shape
    description = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        f'UUID="{uuid.format(t)}"><Image ID="Image:0"><Pixels ID="Pixels:0" Type="uint16" '
        f'DimensionOrder="XYZCT" SizeX="{width}" SizeY="{height}" SizeZ="1" SizeC="1" '
        f'SizeT="{count}"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>{data}</Pixels></Image>'
        "</OME>"
    )
    tifffile.imwrite(path, frame, description=description, metadata=None)


def test_files_that_describe_one_image_together_are_not_read_twice(tmp_path):
    for t in range(3):
        one_of_several(tmp_path / f"t{t}.ome.tif", FIVE[t], t, 3)
    assert same(read(tmp_path), FIVE[:3, None])
    assert same(read(tmp_path / "t1.ome.tif"), FIVE[1:2, None])
    (tmp_path / "t1.ome.tif").unlink()
    first, lost, *_ = open_images(tmp_path)
    assert np.array_equal(first.read()[0], FIVE[0])
    with pytest.raises(ImageError, match="one of them is missing"):
        lost.read()


def test_a_damaged_page_costs_no_other(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", FIVE, compression="zlib", photometric="minisblack")
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        at = tiff.pages[2].dataoffsets[0]
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[at : at + 40] = bytes(40)
    (tmp_path / "a.tif").write_bytes(content)
    images = open_images(tmp_path)
    for k in (0, 1, 3, 4):
        assert np.array_equal(images[k].read()[0], FIVE[k])
    with pytest.raises(ImageError, match=r"a\.tif cannot be read"):
        images[2].read()


@pytest.mark.parametrize("side", [64, 2304])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_a_field_of_half_the_size_is_no_level_of_a_pyramid_unless_it_shows_it(
    tmp_path, caplog, side, factor
):
    large = gaussian_filter(np.random.default_rng(0).random((side, side)), factor) * 2**16
    large = large.astype(np.uint16)
    level, other = large[::factor, ::factor], large.T[1::factor, ::factor]
    for second, expected in ((level, [large[None]]), (other, [large[None], other[None]])):
        with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
            tiff.write(large, metadata=None)
            tiff.write(second, metadata=None)
        assert same(read(tmp_path), expected)
    assert caplog.text.count("1 of 2 series are left out as small copies") == 1


def test_stacks_of_half_the_size_are_no_levels_either(tmp_path):
    half = RNG.integers(0, 4000, (5, 32, 24)).astype(np.uint16)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for frames in (FIVE, half):
            tiff.write(frames, metadata=None, photometric="minisblack")
    assert same(read(tmp_path), [*FIVE[:, None], *half[:, None]])


def test_fields_of_another_size_are_no_thumbnails_and_a_name_alone_says_nothing(tmp_path, caplog):
    smooth = gaussian_filter(RNG.random((4, 64, 64)), (0, 4, 4)).astype(np.float32)
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as tiff:
        tiff.write(smooth[0], metadata={"axes": "YX", "Name": "Overview 1"})
        for field in smooth[1:, ::2, ::2]:
            tiff.write(field, metadata={"axes": "YX"})
    assert len(open_images(tmp_path)) == 4
    assert not caplog.text
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as tiff:
        tiff.write(smooth[0], metadata={"axes": "YX"})
        tiff.write(smooth[0, ::2, ::2], metadata={"axes": "YX"})  # a copy
        tiff.write(smooth[2, ::2, ::3], metadata={"axes": "YX", "Name": "label"})
    assert len(open_images(tmp_path)) == 1
    assert "2 of 3 series are left out" in caplog.text


def test_a_transparency_mask_is_no_image(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(FIVE[0], metadata=None)
        tiff.write(FIVE[0] > 9, subfiletype=4, metadata=None)
    assert same(read(tmp_path), [FIVE[0][None]])


@pytest.mark.filterwarnings("ignore:.*stored as RGB:DeprecationWarning")
@pytest.mark.parametrize("count", [3, 4])
def test_three_or_four_planes_that_tifffile_calls_colour(tmp_path, caplog, count):
    tifffile.imwrite(tmp_path / "a.tif", FIVE[:count])
    assert same(read(tmp_path / "a.tif"), [FIVE[:count]])  # nothing is lost
    masks = open_images(tmp_path / "a.tif", labels=True)
    assert same([mask.read() for mask in masks], FIVE[:count, None])
    tifffile.imwrite(tmp_path / "a.tif", FIVE[:count].astype(np.uint8))
    assert len(read(tmp_path / "a.tif")[0]) == 3
    assert ("is taken for alpha" in caplog.text) == (count == 4)


@pytest.mark.parametrize("shape", [(64, 70, 5), (200, 90, 8)])
def test_many_channels_behind_are_no_stack_of_strips(shape):
    with pytest.raises(ImageError, match="say channel_axis=-1"):
        open_images(np.zeros(shape, np.uint8))
    assert len(open_images(np.zeros((10, 200, 16)))) == 10


def test_axes_that_xarray_names_are_taken(tmp_path):
    for names, expected in (("cyx", 1), ("zyx", 2)):
        store = zarr.create_array(
            tmp_path / f"{names}.zarr", data=np.zeros((2, 40, 50), np.uint8), zarr_format=2
        )
        store.attrs["_ARRAY_DIMENSIONS"] = list(names)
        assert len(open_images(tmp_path / f"{names}.zarr")) == expected
    turned = zarr.create_array(
        tmp_path / "t.zarr", data=np.zeros((40, 50), np.uint8), zarr_format=2
    )
    turned.attrs["_ARRAY_DIMENSIONS"] = ["x", "y"]
    assert open_images(tmp_path / "t.zarr")[0].read().shape == (1, 50, 40)


def test_one_damaged_image_of_a_collection_costs_no_other(tmp_path):
    root = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    root.attrs["bioformats2raw.layout"] = 3
    for k in range(3):
        child = root.create_group(str(k))
        child.create_array("0", data=np.full((40, 50), k, np.uint8))
        sets = [] if k == 1 else [{"path": "0"}]
        child.attrs["multiscales"] = [{"axes": ["y", "x"], "datasets": sets}]
    images = open_images(tmp_path / "a.zarr")
    assert [image.stem for image in images] == ["a.zarr-0", "a.zarr-1", "a.zarr-2"]
    assert images[2].read().max() == 2
    with pytest.raises(ImageError, match=r"a\.zarr 1 cannot be read"):
        images[1].read()


def test_a_shorter_acquisition_is_a_thumbnail_and_a_longer_one_is_not(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(FIVE[0], metadata=None)
        for frame in FIVE[1:, ::2, ::2]:
            tiff.write(frame, metadata=None)
    assert len(open_images(tmp_path)) == 5


@pytest.mark.parametrize(
    ("axes", "images"),
    [
        ([{"name": "lambda", "type": "channel"}, {"name": "y"}, {"name": "x"}], 1),
        ([{"name": "cycle"}, {"name": "y"}, {"name": "x"}], 2),
        ([{"name": "c"}, {"name": "row"}, {"name": "col"}], 1),
    ],
)
def test_axes_of_ome_zarr_go_by_name_and_type(tmp_path, axes, images):
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    group.create_array("0", data=FIVE[:2])
    group.attrs["multiscales"] = [{"axes": axes, "datasets": [{"path": "0"}]}]
    expected = [FIVE[:2]] if images == 1 else FIVE[:2, None]
    assert same(read(tmp_path / "a.zarr"), expected)


def test_a_zarr_array_that_names_its_axes_is_taken_at_its_word(tmp_path):
    names = {"dimension_names": ("y", "x", "c")}
    zarr.create_array(tmp_path / "a.zarr", data=np.moveaxis(FIVE[:2], 0, -1), **names)
    assert same(read(tmp_path / "a.zarr"), [FIVE[:2]])


def test_alpha_may_come_before_what_is_measured(tmp_path):
    five = RNG.integers(0, 255, (20, 30, 5)).astype(np.uint8)
    extra = {"photometric": "rgb", "extrasamples": ["unassalpha", "unspecified"]}
    tifffile.imwrite(tmp_path / "a.tif", five, **extra)
    assert same(read(tmp_path), [np.moveaxis(five[..., [0, 1, 2, 4]], -1, 0)])


def test_what_is_made_of_zarr_images_is_left_out(tmp_path):
    for name in ("a.zarr", "a_masks.zarr", "b.ome.zarr"):
        zarr.create_array(tmp_path / name, data=FIVE[0])
    for name in ("a_cp_masks.tif", "b.ome_labels.tif", "b_labels.tif"):
        tifffile.imwrite(tmp_path / name, FIVE[0])
    assert [image.name for image in open_images(tmp_path)] == ["a.zarr", "b.ome.zarr"]


def test_pages_of_other_shapes_are_images_too(tmp_path, caplog):
    shapes = (FIVE[0], FIVE[1, :40, :45], FIVE[2, :, :30])
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for frame in shapes:
            tiff.write(frame, metadata=None)
    assert same(read(tmp_path), [frame[None] for frame in shapes])
    assert not caplog.text


@pytest.mark.parametrize(
    ("axes", "shape"), [("TZCYX", (2, 3, 2, 9, 8)), ("ZYX", (4, 9, 8)), ("CYXS", (2, 9, 8, 3))]
)
def test_every_axis_is_accounted_for(tmp_path, axes, shape):
    pixels = RNG.integers(0, 200, shape).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels, ome=True, metadata={"axes": axes})
    if axes == "CYXS":
        expected = [np.moveaxis(pixels, -1, 1).reshape(6, 9, 8)]
    else:
        expected = list(pixels.reshape(-1, 2, 9, 8) if "C" in axes else pixels[:, None])
    assert same(read(tmp_path), expected)


def test_columns_before_rows_are_turned(tmp_path):
    store = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    store.create_array("0", data=FIVE[0].T)
    axes = [{"name": "x"}, {"name": "y"}]
    store.attrs["multiscales"] = [{"axes": axes, "datasets": [{"path": "0"}]}]
    assert same(read(tmp_path / "a.zarr"), [FIVE[:1]])


def image_group(parent, path, pixels):
    group = parent.create_group(path)
    group.create_array("0", data=pixels)
    scales = [{"axes": [{"name": "y"}, {"name": "x"}], "datasets": [{"path": "0"}]}]
    group.attrs["multiscales"] = scales


def test_plates_and_collections_of_ome_zarr_give_all_their_images(tmp_path):
    plate = zarr.open_group(tmp_path / "plate.zarr", mode="w", zarr_format=2)
    plate.attrs["plate"] = {"wells": [{"path": "A/1"}, {"path": "B/2"}]}
    for k, well in enumerate(("A/1", "B/2")):
        group = plate.create_group(well)
        group.attrs["well"] = {"images": [{"path": "0"}, {"path": "1"}]}
        for field in range(2):
            image_group(group, str(field), FIVE[2 * k + field])
    assert same(read(tmp_path / "plate.zarr"), FIVE[:4, None])
    shutil.rmtree(tmp_path / "plate.zarr" / "B" / "2" / "1")
    lost = open_images(tmp_path / "plate.zarr")[3]
    with pytest.raises(ImageError, match=r"B-2-1 cannot be read as an image: there is no '1'\.$"):
        lost.read()
    stems = [image.stem for image in open_images(tmp_path / "plate.zarr")]
    assert stems[0] == "plate.zarr-A-1-0"
    assert len(set(stems)) == 4
    several = zarr.open_group(tmp_path / "several.zarr", mode="w", zarr_format=2)
    several.attrs["bioformats2raw.layout"] = 3
    for k in range(3):
        image_group(several, str(k), FIVE[k])
    assert same(read(tmp_path / "several.zarr"), FIVE[:3, None])


@pytest.mark.filterwarnings("ignore")
def test_what_a_microscope_writes_is_read_by_bioio(tmp_path):
    pytest.importorskip("bioio_czi")
    from pylibCZIrw import czi

    pixels = RNG.integers(0, 4000, (2, 3, 40, 30)).astype(np.uint16)
    with czi.create_czi(str(tmp_path / "a.czi")) as file:
        for c, t in np.ndindex(2, 3):
            file.write(data=pixels[c, t, ..., None], plane={"C": c, "T": t, "Z": 0})
    assert same(read(tmp_path), np.moveaxis(pixels, 1, 0))
    (tmp_path / "a.czi").write_bytes(b"no czi")
    with pytest.raises(ImageError, match=r"a\.czi cannot be read"):
        read(tmp_path)


# --- alpha, palettes, depth ----------------------------------------------------------------------

RGBA = RNG.integers(0, 255, (20, 30, 4)).astype(np.uint8)
COLOUR = np.moveaxis(RGBA[..., :3], -1, 0)


def test_alpha_is_no_measurement_in_any_format(tmp_path):
    for extra in ("unassalpha", "assocalpha"):
        tifffile.imwrite(tmp_path / "a.tif", RGBA, photometric="rgb", extrasamples=[extra])
        assert same(read(tmp_path / "a.tif"), [COLOUR])
    planar = {"photometric": "rgb", "planarconfig": "separate", "extrasamples": ["unassalpha"]}
    tifffile.imwrite(tmp_path / "p.tif", np.moveaxis(RGBA, -1, 0), **planar)
    assert same(read(tmp_path / "p.tif"), [COLOUR])
    gray = {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unassalpha"]}
    tifffile.imwrite(tmp_path / "g.tif", RGBA[..., :2], **gray)
    assert same(read(tmp_path / "g.tif"), [COLOUR[:1]])
    for mode, bands, expected in (("RGBA", RGBA, COLOUR), ("LA", RGBA[..., :2], COLOUR[:1])):
        Image.fromarray(bands, mode).save(tmp_path / f"{mode}.png")
        assert same(read(tmp_path / f"{mode}.png"), [expected])
    measured = {"photometric": "rgb", "extrasamples": ["unspecified"]}
    tifffile.imwrite(tmp_path / "m.tif", RGBA, **measured)
    assert same(read(tmp_path / "m.tif"), [np.moveaxis(RGBA, -1, 0)])


def test_a_large_image_with_alpha_is_read_in_windows_without_it(tmp_path):
    wide = RNG.integers(0, 255, (2000, 2200, 4)).astype(np.uint8)
    options = {"photometric": "rgb", "extrasamples": ["unassalpha"], "tile": (256, 256)}
    tifffile.imwrite(tmp_path / "a.tif", wide, **options)
    (image,) = open_images(tmp_path)
    window = image.read_window(slice(900, 1300), slice(10, 20))
    assert np.array_equal(window, np.moveaxis(wide[900:1300, 10:20, :3], -1, 0))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_png_keeps_its_depth(tmp_path, channels, kind):
    pixels = RNG.integers(0, np.iinfo(kind).max, (7, 9, channels)).astype(kind)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(np.squeeze(pixels)))
    (found,) = read(tmp_path)
    assert found.dtype.itemsize == np.dtype(kind).itemsize
    shown = pixels[..., :-1] if channels in (2, 4) else pixels
    assert np.array_equal(found, np.moveaxis(shown, -1, 0))


def test_palettes_are_looked_up_unless_they_tint_or_number(tmp_path):
    indices = RNG.integers(0, 256, (20, 30)).astype(np.uint8)
    colours = RNG.integers(0, 256, (3, 256)).astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "c.tif", indices, photometric="palette", colormap=colours)
    expected = (colours // 257).astype(np.uint8)[:, indices]
    assert same(read(tmp_path / "c.tif"), [expected])
    assert same(read(tmp_path / "c.tif", labels=True), [indices[None]])
    green = np.zeros((3, 256), np.uint16)
    green[1] = np.arange(256) * 257
    tifffile.imwrite(tmp_path / "t.tif", indices, photometric="palette", colormap=green)
    assert same(read(tmp_path / "t.tif"), [indices[None]])
    picture = Image.fromarray(indices, "P")
    picture.putpalette((colours // 257).astype(np.uint8).T.tobytes())
    picture.save(tmp_path / "p.png")
    assert same(read(tmp_path / "p.png"), [expected])
    assert same(read(tmp_path / "p.png", labels=True), [indices[None]])


def test_files_that_count_from_white_are_turned_over(tmp_path):
    pixels = RNG.integers(0, 2**16, (20, 30)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="miniswhite")
    assert same(read(tmp_path / "a.tif"), [65535 - pixels[None]])
    other = {"photometric": "miniswhite", "software": "a scanner"}
    tifffile.imwrite(tmp_path / "b.tif", pixels > 9000, **other)
    assert same(read(tmp_path / "b.tif"), [pixels[None] <= 9000])
    assert same(read(tmp_path / "b.tif", labels=True), [pixels[None] > 9000])
    tifffile.imwrite(tmp_path / "c.tif", pixels > 9000)
    assert same(read(tmp_path / "c.tif"), [pixels[None] > 9000])


@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_what_counts_from_white_below_0_too_is_turned_over(tmp_path, kind):
    pixels = RNG.integers(-2000, 2000, (20, 30)).astype(kind)
    pixels[0, 0] = np.iinfo(np.int16).min
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="miniswhite")
    assert same(read(tmp_path), [(-1 if kind is np.int16 else 0) - pixels[None]])


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_a_palette_of_grays_is_one_channel_of_these(tmp_path, kind):
    grays = RNG.permutation(256).astype(np.uint8)
    stretched = np.clip(5 * np.arange(256), 0, 255).astype(np.uint8)  # for the eye: no value goes
    for colours in (grays, np.sort(grays)[::-1], stretched):
        picture = Image.fromarray(RGBA[..., 0]).convert("P")
        picture.putpalette(np.repeat(colours, 3).tobytes())
        picture.save(tmp_path / f"a.{kind}")
        meant = np.arange(256, dtype=np.uint8) if colours is stretched else colours
        assert same(read(tmp_path), [meant[RGBA[None, ..., 0]]])


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_colours_that_are_not_red_green_and_blue_become_so(tmp_path, mode, planes):
    picture = Image.fromarray(RGBA[..., :3])
    if mode == "LAB":
        profiles = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
        picture = ImageCms.applyTransform(picture, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    else:
        picture = picture.convert(mode)
    picture.save(tmp_path / "a.tif")
    if planes:
        stored = np.stack([tifffile.imread(tmp_path / "a.tif")] * 2)
        with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
            photometric = tiff.pages[0].photometric
        tifffile.imwrite(tmp_path / "a.tif", stored, photometric=photometric)
    for found in read(tmp_path):
        assert np.abs(found.astype(int) - COLOUR)[:, 2:].mean() < 8
        assert np.array_equal(np.moveaxis(found, 0, -1), picture.convert("RGB"))
    (image, *_) = open_images(tmp_path)
    assert np.array_equal(image.read_window(slice(3, 9), slice(4, 9)), found[:, 3:9, 4:9])


def test_only_colours_that_no_decoder_has_converted_are(tmp_path):
    colour = np.kron(RNG.integers(0, 256, (4, 5, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    picture = Image.fromarray(colour)
    tifffile.imwrite(tmp_path / "a.tif", colour, photometric="rgb", compression="jpeg")
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert tiff.pages[0].photometric == tifffile.PHOTOMETRIC.YCBCR
    coded = np.asarray(picture.convert("YCbCr"))
    tifffile.imwrite(tmp_path / "b.tif", coded, photometric="rgb", compression=33003, tile=(32, 32))
    for found in read(tmp_path):  # the latter is Aperio's, whose number alone says so
        assert np.abs(np.moveaxis(found, 0, -1).astype(int) - colour).mean() < 8


def test_colours_that_cannot_be_converted_are_named(tmp_path):
    deep = RGBA.astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="separated")
    with pytest.raises(ImageError, match=r"a\.tif holds CMYK as 4 x uint16.*save it as RGB"):
        read(tmp_path)


def test_channels_behind_the_pixels_are_asked_for(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(FIVE[:2], 0, -1))
    with pytest.raises(ImageError, match="say channel_axis=-1"):
        read(tmp_path / "a.tif")
    assert same(read(tmp_path / "a.tif", channel_axis=-1), [FIVE[:2]])


# --- what lies beside images ---------------------------------------------------------------------


def test_what_lies_beside_images_is_left_out(tmp_path, caplog):
    for name in ("a.tif", "b.tif", "c_1.tif"):
        tifffile.imwrite(tmp_path / name, FIVE[0])
    outputs = [
        "a_cp_masks.tif", "a_flows.tif", "a_dP.tif", "a_cp_outlines.png", "a.labels.tif",
        "b-mask.png", "b_Simple Segmentation.tif", "b_Probabilities.tif", "c_1_overlay.png",
        "c_1 label.tif",
    ]  # fmt: skip
    for name in outputs:
        write = (
            tifffile.imwrite if name.endswith("tif") else lambda f, a: Image.fromarray(a).save(f)
        )
        write(tmp_path / name, FIVE[1])
    for name in (
        ".a.tif",
        "._b.tif",
        ".DS_Store",
        "Thumbs.db",
        "desktop.ini",
        "a_seg.npy",
        "log.txt",
    ):
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "folder.tif").mkdir()
    (tmp_path / "gone.tif").symlink_to(tmp_path / "nowhere")
    (tmp_path / "m.nd2").write_bytes(b"x")
    assert [image.name for image in open_images(tmp_path)] == ["a.tif", "b.tif", "c_1.tif"]
    for name in [*outputs, "folder.tif", "gone.tif", "m.nd2"]:
        assert name in caplog.text
    assert ".DS_Store" not in caplog.text
    assert "pip install 'selfadapt[nd2]'" in caplog.text


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("cell1.tif", False), ("cell_2.tif", False), ("cell_mask.tif", True),
        ("cell_masks_2.tif", True), ("cellmask.tif", False), ("mask.tif", False),
        ("Mask of cell.tif", True), ("Count Masks of cell.tif", True), ("cell_map.tif", False),
        ("Outlines of cell.tif", True), ("mask_cell.tif", True), ("labels-cell.tif", True),
        ("cell_outlines_cp_masks.png", True), ("cell_cp_output_cp_masks.png", True),
        ("cell_pred_mask.tif", True), ("cell_GT_mask.tif", True), ("cell_prob_map.tif", True),
        ("cell_instanseg_prediction.tif", True), ("cell_seg_overlay.png", True),
        ("cell_flow.tif", True), ("cell_label_free.tif", False), ("cell_object.tif", False),
        ("label-free cell.tif", False), ("masks cell1 free.tif", False),
        ("other_mask.tif", False), ("cell_cp_masks_edited.tif", True), ("cell_masks_v2.tif", True),
        ("cell_cp_masks_ch0.tif", True), ("Drawing of cell.tif", True), ("LblImg_cell.tif", True),
        ("cell-cellpose.tif", True), ("cell_v2.tif", False), ("cell_gt37.tif", False),
    ],
)  # fmt: skip
def test_names_of_what_is_made_of_images(name, made):
    assert (name in made_of(["cell.png", "cell1.tif", name])) == made


@pytest.mark.parametrize(
    ("image", "mask"),
    [("000_img.tif", "000_masks.tif"), ("img_0.tif", "mask_0.tif"), ("raw-7.tif", "7_seg.tif"),
     ("Image 3.tif", "GT 3.tif"), ("a_0_raw.tif", "a_0_mask.tif"), ("img1.tif", "mask1.tif"),
     ("img1.tif", "img1_cp_masks.tif"), ("im12.tif", "im12_mask.tif"),
     ("img1a.tif", "img1a_gt.tif")],
)  # fmt: skip
def test_names_that_say_image_pair_with_those_that_say_mask(tmp_path, image, mask):
    for name, value in ((image, 1), (mask, 2)):
        tifffile.imwrite(tmp_path / name, np.full((40, 50), value))
    images, masks = open_images(tmp_path), open_images(tmp_path, labels=True)
    assert [each.name for each in images] == [image]
    (paired,) = pair(images, masks, one_folder=True)
    assert paired.read().min() == 2


def test_two_masks_of_one_image_are_named_and_case_tells_files_apart(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    for folder in (images, masks):
        folder.mkdir()
        for k, name in enumerate(("A.tif", "a.tif", "b.tif")):
            tifffile.imwrite(folder / name, np.full((40, 50), k, np.uint8))
    paired = pair(open_images(images), open_images(masks, labels=True), one_folder=False)
    assert [mask.read().max() for mask in paired] == [0, 1, 2]
    (masks / "b.tif").rename(masks / "b_masks.tif")
    tifffile.imwrite(masks / "b_cp_masks.tif", np.zeros((40, 50), np.uint8))
    with pytest.raises(ImageError, match=r"b\.tif has several masks, b_cp_masks\.tif and b_masks"):
        pair(open_images(images), open_images(masks, labels=True), one_folder=False)


# --- bad files among good ones -------------------------------------------------------------------


def test_what_a_file_is_does_not_depend_on_its_name(tmp_path):
    tifffile.imwrite(tmp_path / "a.png", FIVE, photometric="minisblack")
    (tmp_path / "b.tif").write_bytes(imagecodecs.png_encode(FIVE[0]))
    (tmp_path / "c.bmp").write_bytes(imagecodecs.jpeg_encode(RGBA[..., :3].copy()))
    *images, photograph = read(tmp_path)
    assert same(images, [*FIVE[:, None], FIVE[:1]])
    assert photograph.shape == (3, 20, 30)


def test_of_a_film_no_frame_is_lost_without_a_word(tmp_path):
    first, *others = (Image.fromarray(frame) for frame in RGBA[..., :3].reshape(3, 20, 30))
    first.save(tmp_path / "a.png", save_all=True, append_images=others)
    with pytest.raises(ImageError, match=r"a\.png is a film of 3 frames"):
        read(tmp_path)


def test_what_is_no_image_is_named_in_the_same_words_each_time(tmp_path):
    for name in ("a.png", "b.jpg", "c.bmp"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ImageError, match=rf"^{name} cannot be read as an image: it is damaged"):
            read(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs the rights of POSIX")
def test_a_folder_that_may_not_be_looked_into_costs_no_image(caplog):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tifffile.imwrite(folder / "a.tif", FIVE[0])
        (folder / "b.zarr").mkdir(mode=0)
        folder.chmod(0o755)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)  # who may not do everything
            assert same(read(folder), [FIVE[:1]])
            assert "b.zarr is a folder: left out" in caplog.text
            for path in (folder / "b.zarr", folder / "b.zarr" / "c.tif"):
                with pytest.raises(ImageError, match=r"b\.zarr.*Permission denied"):
                    read(path)
        finally:
            os.seteuid(user)
            (folder / "b.zarr").chmod(0o755)


def compressed(path):
    tifffile.imwrite(path, FIVE, compression="zlib", photometric="minisblack")


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("write", [appended, positions, plain_pages, compressed])
def test_a_file_that_is_cut_off_is_named_and_costs_no_other(tmp_path, write, share, capfd):
    write(tmp_path / "a.tif")
    whole = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(whole[: int(share * len(whole))])
    tifffile.imwrite(tmp_path / "b.tif", FIVE[0])
    *damaged, last = open_images(tmp_path)
    with pytest.raises(ImageError, match=r"a\.tif (is cut off|cannot be read)"):
        [image.read() for image in damaged]
    assert np.array_equal(last.read()[0], FIVE[0])
    with pytest.raises(ImageError, match=r"a\.tif (is cut off|cannot be read)"):
        read([tmp_path / "a.tif"])
    assert "Traceback" not in capfd.readouterr().err


def test_declared_sizes_are_bounded(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 80), np.uint8), rowsperstrip=8)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tiff:
        tiff.pages[0].tags["ImageLength"].overwrite(10_747_968)
    with pytest.raises(ImageError, match=r"a\.tif (has 3?.* bytes and declares|is cut off)"):
        read(tmp_path / "a.tif")
    store = zarr.open_array(tmp_path / "b.zarr", mode="w", shape=(9, 9), dtype="u1", zarr_format=2)
    for shape in (
        [10**9, 10**9],
        [10**12, 2, 2],
    ):
        told = json.loads((tmp_path / "b.zarr" / ".zarray").read_text())
        told |= {"shape": shape, "chunks": [64] * len(shape)}
        (tmp_path / "b.zarr" / ".zarray").write_text(json.dumps(told))
        with pytest.raises(ImageError, match="more than can be"):
            open_images(tmp_path / "b.zarr")
    assert store.shape == (9, 9)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_png_bomb_is_refused(tmp_path):
    header = struct.pack(">IIBBBBB", 10**5, 10**5, 16, 2, 0, 0, 0)
    packed = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    (tmp_path / "a.png").write_bytes(packed)
    with pytest.raises(ImageError, match=r"a\.png cannot be read.*exceeds limit"):
        read(tmp_path)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("kind", ["|u1", "|O"])
def test_a_zarr_array_runs_no_code(tmp_path, kind):
    marker, folder = tmp_path / "ran", tmp_path / "a.zarr"
    folder.mkdir()
    filters = None if kind == "|u1" else [{"id": "vlen-utf8"}]
    told = {
        "zarr_format": 2, "shape": [4, 4], "chunks": [4, 4], "dtype": kind, "fill_value": 0,
        "compressor": {"id": "pickle", "protocol": 5}, "filters": filters, "order": "C",
    }  # fmt: skip
    (folder / ".zarray").write_text(json.dumps(told))
    (folder / "0.0").write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(ImageError, match=r"a\.zarr"):
        read(folder)
    assert not marker.exists()


@pytest.mark.parametrize("path", ["../b.zarr", "/etc", "x/../../b.zarr", 7])
def test_a_zarr_group_leads_nowhere_else(tmp_path, path):
    zarr.open_array(tmp_path / "b.zarr", mode="w", shape=(9, 9), dtype="u1")
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    group.attrs["multiscales"] = [{"datasets": [{"path": path}]}]
    with pytest.raises(ImageError, match=r"a\.zarr names .*no path inside"):
        open_images(tmp_path / "a.zarr")


def test_listing_many_planes_takes_no_time(tmp_path):
    zarr.open_array(tmp_path / "a.zarr", mode="w", shape=(10**5, 8, 8), dtype="u1")
    began = time.process_time()
    assert len(open_images(tmp_path / "a.zarr")) == 10**5
    assert time.process_time() - began < 10


# --- masks ---------------------------------------------------------------------------------------


def lists(tmp_path, images, masks, one_folder=False):
    for folder, names in (("images", images), ("masks", masks)):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name, frames in names.items():
            tifffile.imwrite(tmp_path / folder / name, FIVE[:frames], photometric="minisblack")
    sources = open_images(tmp_path / "images")
    labels = open_images(tmp_path / ("images" if one_folder else "masks"), labels=True)
    return pair(sources, labels, one_folder=one_folder)


@pytest.mark.parametrize(
    ("images", "masks", "expected"),
    [
        ({"a.tif": 1, "b.tif": 1}, {"b.tif": 1, "a.tif": 1}, ["a.tif Q0", "b.tif Q0"]),
        ({"a.tif": 3}, {"truth.tif": 3}, [f"truth.tif Q{k}" for k in range(3)]),
        ({"a.tif": 2, "b.tif": 1}, {"a_masks.tif": 2, "b.label.tif": 1},
         ["a_masks.tif Q0", "a_masks.tif Q1", "b.label.tif Q0"]),
        ({"a.tif": 1, "b.tif": 1}, {"all.tif": 2}, ["all.tif Q0", "all.tif Q1"]),
        ({"a.ome.tif": 1}, {"a.tif": 1, "z.tif": 1}, ["a.tif Q0"]),
        ({"a.tif": 1, "a_1.tif": 1}, {"a_masks.tif": 1, "a_1_masks.tif": 1},
         ["a_masks.tif Q0", "a_1_masks.tif Q0"]),
        ({"a.tif": 1}, {"a_1_masks.tif": 1, "z.tif": 1}, ["a_1_masks.tif Q0"]),
    ],
)  # fmt: skip
def test_images_and_masks_pair_by_name_and_place(tmp_path, images, masks, expected):
    assert list(map(str, lists(tmp_path, images, masks))) == expected


def test_masks_beside_their_images_are_found(tmp_path):
    files = {"a.tif": 1, "a_cp_masks.tif": 1, "b.tif": 2, "b_seg.tif": 2, "b_flows.tif": 2}
    paired = lists(tmp_path, files, {}, one_folder=True)
    assert list(map(str, paired)) == ["a_cp_masks.tif Q0", "b_seg.tif Q0", "b_seg.tif Q1"]


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        ({"a.tif": 1, "b.tif": 1}, {"a.tif": 1}, r"no mask for b\.tif \(1 missing\)"),
        ({"a.tif": 3}, {"a.tif": 2}, r"a\.tif holds 3 image\(s\), and a\.tif 2 mask"),
        ({"a.tif": 3}, {"b.tif": 2}, r"a\.tif holds 3 image\(s\), and b\.tif 2 mask"),
        (
            {"A.tif": 1, "a.tif": 1},
            {"a.tif": 1},
            r"A\.tif and a\.tif would have the same mask, a\.",
        ),
        ({"8.tif": 1, "9.tif": 1, "10.tif": 1}, {"all.tif": 3}, "write the numbers with as many"),
    ],
)
def test_masks_that_do_not_pair_are_named(tmp_path, images, masks, message):
    with pytest.raises(ImageError, match=message):
        lists(tmp_path, images, masks)[0].read()


def planes(path, axes, shape=(2, 3)):
    """Planes of so many times and depths, each of a value of its own, in a file of these axes."""
    pixels = np.arange(6, dtype=np.uint16).reshape(*shape, 1, 1) * np.ones((8, 8), np.uint16)
    if axes == "ZTYX":
        pixels = pixels.swapaxes(0, 1)
    named = {} if "Q" in axes else {"ome": True, "metadata": {"axes": axes}}
    tifffile.imwrite(path, pixels, photometric="minisblack", **named)
    return open_images(path)


@pytest.mark.parametrize(
    ("images", "masks"), [("TZYX", "ZTYX"), ("ZTYX", "TZYX"), ("TZYX", "QQYX")]
)
def test_masks_pair_by_time_and_depth_in_whatever_order_these_lie(tmp_path, images, masks):
    sources, labels = planes(tmp_path / "a.tif", images), planes(tmp_path / "b.tif", masks)
    paired = pair(sources, labels, one_folder=True)
    assert same([mask.read() for mask in paired], [image.read() for image in sources])
    assert len(paired) == 6


def test_masks_of_other_times_and_depths_are_refused(tmp_path):
    images, masks = planes(tmp_path / "a.tif", "TZYX"), planes(tmp_path / "b.tif", "TZYX", (3, 2))
    with pytest.raises(ImageError, match="not of the same places, such as T1 Z2 and T2 Z1"):
        pair(images, masks, one_folder=True)[0].read()
    flat = open_images(np.zeros((6, 8, 8)))  # of axes without a name, order is all that is known
    assert pair(images, flat, one_folder=True) == flat


def test_a_thumbnail_between_series_changes_no_pair(tmp_path):
    fields = FIVE[0], FIVE[1, :40, :45]
    for name, frames in (("a", [fields[0], fields[0][::2, ::2], fields[1]]), ("b", fields)):
        with tifffile.TiffWriter(tmp_path / f"{name}.tif") as tiff:
            for frame in frames:
                tiff.write(frame, metadata=None)
    images, masks = (open_images(tmp_path / f"{name}.tif") for name in "ab")
    assert [image.part for image in images] == ["series0", "series2"]
    assert pair(images, masks, one_folder=True) == masks


def test_labels_of_ome_zarr_are_found_by_their_group(tmp_path):
    root = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    labels = root.create_group("labels")
    labels.attrs["labels"] = ["cells"]
    image_group(labels, "cells", FIVE[0])
    assert same(read(tmp_path / "a.zarr" / "labels", labels=True), [FIVE[:1]])


def test_a_damaged_zarr_store_is_named(tmp_path):
    whole = tmp_path / "whole.zarr"
    group = zarr.open_group(whole, mode="w", zarr_format=2)
    image_group(group, "0", FIVE[0])
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    rng = np.random.default_rng(1)
    for attempt in range(60):
        damaged = tmp_path / f"{attempt}.zarr"
        shutil.copytree(whole, damaged)
        victim = damaged / files[rng.integers(len(files))]
        content = bytearray(victim.read_bytes())
        content[rng.integers(len(content))] = rng.integers(256)
        victim.write_bytes(bytes(content[: rng.integers(len(content))] if attempt % 2 else content))
        with suppress(ImageError):  # and nothing else
            read(damaged / "0")
