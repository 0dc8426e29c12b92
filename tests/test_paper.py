"""`benchmarks/paper.py`, end to end on small files in the formats of LIVECell and TissueNet."""

import json
import shutil
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from scipy import ndimage
from skimage.measure import find_contours

pytest.importorskip("torch_em", reason="needs torch-em")
pytest.importorskip("z5py", reason="needs z5py")
pytest.importorskip("pycocotools", reason="needs pycocotools")
pytest.importorskip("cellpose", reason="needs cellpose")
if not version("cellpose").startswith("3."):
    pytest.skip("needs Cellpose 3", allow_module_level=True)

from cellpose.dynamics import labels_to_flows
from cellpose.resnet_torch import CPnet

from selfadapt import normalize_percentile, open_images
from selfadapt_cellpose import CellposeAdapter

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SPLITS = {"train": 3, "val": 2, "test": 2}
SIDE = 96


@pytest.fixture
def paper(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paper

    return paper


def cells(seed: int):
    """Cells on a jittered grid, and nuclei half as wide: an image and labels `[H, W]` of each."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    labels = np.zeros((2, SIDE, SIDE), np.int32)
    centres = np.stack(np.meshgrid(range(16, SIDE, 32), range(16, SIDE, 32)), -1).reshape(-1, 2)
    for number, centre in enumerate(centres, 1):
        y, x = centre + rng.integers(-3, 4, 2)
        distance = np.hypot(rows - y, columns - x)
        labels[0][distance < rng.uniform(9, 12)] = number
        labels[1][distance < rng.uniform(4.5, 6)] = number
    blurred = ndimage.gaussian_filter((labels > 0).astype(np.float32), (0, 1, 1)) * 100
    return (blurred + rng.normal(10, 3, blurred.shape)).clip(0).astype(np.float32), labels


def examples(split: str):
    first = 10 * list(SPLITS).index(split)
    return [cells(first + k) for k in range(SPLITS[split])]


def write_livecell(folder: Path) -> None:
    """TIFF files of 8 bits in two folders, and polygons in COCO's format for each split."""
    for split in SPLITS:
        kind = "test" if split == "test" else "train_val"
        images = folder / "images" / f"livecell_{kind}_images"
        images.mkdir(parents=True, exist_ok=True)
        content = {
            "info": {}, "licenses": [], "images": [], "annotations": [],
            "categories": [{"supercategory": "cell", "id": 1, "name": "cell"}],
        }  # fmt: skip
        for k, (pixels, labels) in enumerate(examples(split)):
            well = {"train": "A7", "val": "B7", "test": "C7"}[split]
            name = f"A172_Phase_{well}_1_0{k}d00h00m_1.tif"
            tifffile.imwrite(images / name, pixels[0].astype(np.uint8))
            content["images"].append({"id": k, "file_name": name, "height": SIDE, "width": SIDE})
            for number in range(1, labels[0].max() + 1):
                outline = find_contours(np.pad(labels[0] == number, 1), 0.5)[0] - 1 + 0.5
                content["annotations"].append({
                    "id": len(content["annotations"]) + 1, "image_id": k, "category_id": 1,
                    "area": float((labels[0] == number).sum()), "iscrowd": 0,
                    "segmentation": [outline[:, ::-1].ravel().tolist()],
                })  # fmt: skip
        (folder / f"{split}.json").write_text(json.dumps(content))


def write_tissuenet(folder: Path) -> None:
    """X: nuclei, then cells; y: cells, then nuclei; meta: a header and a row for each image."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "tissuenet_v1.1.zip", "w") as archive:
        for split in SPLITS:
            images, labels = (np.stack(each) for each in zip(*examples(split), strict=True))
            file = folder / f"tissuenet_v1.1_{split}.npz"
            header = ["filename", "experiment", "pixel_size", "specimen", "platform"]
            meta = [header, *(["", "", 0.5, "breast", "codex"] for _ in images)]
            np.savez(
                file, X=images[:, ::-1].transpose(0, 2, 3, 1), y=labels.transpose(0, 2, 3, 1),
                meta=np.array(meta, object),
            )  # fmt: skip
            archive.write(file, file.name)
            file.unlink()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_livecell(folder / "livecell")
    write_tissuenet(folder / "tissuenet")
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """A weights file that finds bright discs in the first channel, whatever is in the second."""
    torch.manual_seed(0)
    net = CPnet([2, 8, 16, 32], 3, sz=3).train()
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for step in range(60):
        pixels, labels = cells(100 + step)
        flows = labels_to_flows([labels[0]], device=torch.device("cpu"))[0][1:4]
        target = torch.from_numpy(flows[None].astype(np.float32))
        inputs = torch.from_numpy(pixels[None] / 100)
        inputs[:, 1] = torch.from_numpy(cells(1000 + step)[0][1]) / 100  # says nothing
        out = net(inputs)[0]
        loss = (out[:, :2] - 5 * target[:, 1:]).square().mean() / 2
        loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(out[:, 2], target[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.diam_mean.data.fill_(20.0)
    path = tmp_path_factory.mktemp("weights") / "discs"
    torch.save(net.state_dict(), path)
    return path


def run(paper, monkeypatch, capsys, *words: object) -> str:
    monkeypatch.setattr(sys, "argv", ["paper.py", *map(str, words)])
    paper.main()
    return capsys.readouterr().out


def rows_of(table: str) -> dict[tuple[str, str, str], list[str]]:
    """Cells of the printed table by data set, network and whose figures they are."""
    rows = [line.strip("| ").split("|") for line in table.splitlines() if line.startswith("| ")]
    return {tuple(map(str.strip, row[:3])): [*map(str.strip, row[3:])] for row in rows[1:]}


def test_table_from_files_in_the_formats_of_the_data_sets(
    paper, data, network, monkeypatch, capsys, tmp_path
):
    names = ("cyto2", "nuclei", "livecell", "tissuenet")
    files = {name: network.with_name(name) for name in names}
    for file in files.values():
        shutil.copy(network, file)
    short = ("--data", data, "--out", tmp_path, "--iterations", 2, "--looks", 2, "--seeds", 0)
    short = (*short, "--device", "cpu", "--models", *(f"{n}={f}" for n, f in files.items()))
    out = run(paper, monkeypatch, capsys, *short, "--settings", "paper")
    rows = rows_of(out)
    assert len(rows) == 2 * 5
    assert rows["LiveCell (cytoplasm)", str(files["livecell"]), "paper"] == [
        "3", ".695", ".704 ± .001", ".693 ± .004", "", ".705 ± .002"
    ]  # fmt: skip
    found = [row for (_, _, whose), row in rows.items() if whose == "paper's settings"]
    # wrong channels, labels or diameters would find nothing; "kept", the last, stays empty
    assert all(row[0] == "1" and len(row) == 6 and min(map(float, row[1:])) > 0.6 for row in found)

    cells = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [(cell["of"]["target"], cell["of"]["config"]["l2sp"]) for cell in cells] == [
        ("livecell", 1e-4), ("tissuenet-cells", 1e-4), ("tissuenet-nuclei", 1e-2),
        ("livecell", 1e-5), ("tissuenet-cells", 1e-2),
    ]  # fmt: skip
    assert all([look["iteration"] for look in cell["looks"]] == [0, 1, 2] for cell in cells)
    assert all(cell["looks"][2]["d_emb"] > cell["looks"][0]["d_emb"] == 0 for cell in cells)
    assert list(tmp_path.iterdir()) == [tmp_path / "cells.jsonl"]

    # the second time only what is new
    out = run(paper, monkeypatch, capsys, *short, "--targets", "tissuenet-nuclei")
    added = (tmp_path / "cells.jsonl").read_text().splitlines()[len(cells) :]
    assert [json.loads(line)["of"]["setting"] for line in added] == ["default"]
    again = rows_of(out)
    assert len(again) == 3
    ours = again["TissueNet (nuclei)", str(files["nuclei"]), "our defaults"]
    assert [bool(figure) for figure in ours] == [True, True, False, False, False, True, True]
    assert all(again[name] == row for name, row in rows.items() if name[0] == "TissueNet (nuclei)")


def test_channels_and_labels_of_tissuenet_are_not_swapped(paper, data, network):
    (pixels, labels), *_ = examples("train")
    for target, kind, most in (("tissuenet-cells", 0, 2), ("tissuenet-nuclei", 1, 1)):
        image, mask = paper.TARGETS[target].pairs(data, "train")[0]
        np.testing.assert_array_equal(mask.read()[0], labels[kind])
        opened = paper.load(target, data, None)
        radii = np.concatenate(
            [np.sqrt(np.bincount(each[kind].flat)[1:] / np.pi) for _, each in examples("train")]
        )
        assert opened.diameter == pytest.approx(2 * radii.mean(), rel=0.1)
        adapter = CellposeAdapter(
            str(network), diameter=20, channels=paper.TARGETS[target].channels
        )
        taken = adapter.prepare(image.read())
        expected = normalize_percentile(pixels[kind:])[:most]
        np.testing.assert_allclose(taken[:most], expected, atol=1e-4)
        assert most == 2 or not taken[1].any()


def test_scores_are_averaged_over_images_and_empty_ones_left_out(paper):
    one, three, none = np.zeros((3, 8, 8), np.int32)
    one[1:3, 1:3] = 1
    three[::3, ::2] = np.arange(12).reshape(3, 4)

    class FindsTheFirst:
        def segment(self, image, *, channel_axis):
            return one if image.any() else none

    pairs = open_images([one, 0 * one, 0 * one]), open_images([one, three, none])
    assert paper.image_mean(FindsTheFirst(), list(zip(*pairs, strict=True))) == 0.5


def test_limit_takes_images_from_all_over(paper):
    assert list(paper.spread(range(10), 4)) == [0, 3, 6, 9]
    assert paper.spread(range(10), 50) == paper.spread(range(10), None) == range(10)


def test_missing_tissuenet_is_one_sentence(paper, tmp_path):
    with pytest.raises(SystemExit, match=r"register at .*tissuenet_v1\.1\.zip"):
        paper.load("tissuenet-cells", tmp_path, None)


def test_networks_that_cellpose_3_does_not_list_are_fetched_all_the_same(
    paper, monkeypatch, tmp_path
):
    asked = []

    def no_internet(url, *_, **__):
        asked.append(url)
        raise OSError("no internet")

    monkeypatch.setattr("cellpose.models.MODEL_DIR", tmp_path)
    monkeypatch.setattr("cellpose.utils.download_url_to_file", no_internet)
    for name in ("cyto2", "livecell"):
        with pytest.raises(SystemExit, match=f"{name}.*no internet"):
            paper.weights(name)
    assert [Path(url).name for url in asked] == ["cyto2torch_0", "livecell"]
