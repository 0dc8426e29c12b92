"""`benchmarks/evidence.py`, its baselines and tables, on small networks and hand-made cells."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import IMAGES, SmallAdapter, config, discs, trained_adapter

from selfadapt import Binary, OutputSpec, Thresholds, _quality, open_images
from selfadapt._predict import raw_outputs

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def tables():
    import evidence_tables

    return evidence_tables


@pytest.fixture
def baselines():
    import baselines

    return baselines


class ForegroundAdapter(SmallAdapter):
    def __init__(self):
        super().__init__()
        self.model.up[1] = torch.nn.Conv2d(16, 1, 3, padding=1)
        self.outputs = OutputSpec(cellprob=Binary())


def test_tta_is_the_mean_probability_over_flips_and_turns(baselines):
    adapter = ForegroundAdapter()
    adapter.model.eval()
    image = torch.rand(1, 32, 32)
    averaged = raw_outputs(baselines.tta(adapter), adapter.model, image)["cellprob"]
    views = []
    with torch.no_grad():
        for turn in range(4):
            for flip in (False, True):
                view = torch.rot90(image, turn, (1, 2))
                view = view.flip(2) if flip else view
                out = adapter.model(view[None])[0].sigmoid()
                out = out.flip(2) if flip else out
                views.append(torch.rot90(out, -turn, (1, 2)))
    torch.testing.assert_close(averaged.sigmoid(), torch.stack(views).mean(0))


def test_tent_lowers_the_entropy_by_scale_and_shift_alone(baselines):
    adapter = ForegroundAdapter()
    images = torch.rand(4, 1, 32, 32)
    settings = config(learning_rate=1e-2)
    tuned = baselines.tent(adapter, [images] * 20, settings).model
    before = adapter.model.state_dict()
    changed = {n for n, t in tuned.state_dict().items() if not torch.equal(t, before[n])}
    parameters = {n for n in changed if "running" not in n and "num_batches" not in n}
    assert parameters == {"stem.1.weight", "stem.1.bias"}

    def entropy(model):
        torch.manual_seed(0)  # of dropout
        p = model.train()(images).sigmoid().detach()
        return float(-(p * p.log() + (1 - p) * (1 - p).log()).mean())

    assert entropy(tuned) < entropy(adapter.model)


@pytest.fixture(scope="module")
def small_adapter():
    return trained_adapter()


@pytest.fixture
def small_task(small_adapter, monkeypatch):
    from pairs import Task

    monkeypatch.setattr("selfadapt._candidates.STATISTICS_BATCHES", 2)
    image, labels = discs(200)
    test = [(image[None], labels)]
    return Task(small_adapter, open_images(IMAGES[:4]), open_images(IMAGES[4:]), test)


@pytest.mark.parametrize("policy", ["auto", "target", "source"])
def test_a_trajectory_has_figures_and_scores_of_both_networks(small_task, policy):
    from evidence import trajectory

    rows = trajectory(small_task, config(batch_norm=policy))
    assert [row["iteration"] for row in rows] == [0, 4, 8]
    first = rows[0]["student"]
    assert first == rows[0]["teacher"]
    assert first["d_emb"] == first["fn_rate"] == 0
    assert policy == "auto" or first["target_statistics"] == (policy == "target")
    for row in rows[1:]:
        assert row["student"]["d_emb"] != row["teacher"]["d_emb"] > 0
        for network in ("student", "teacher"):
            figures = ("fn_rate", "agreement", "ap", "precision", "recall")
            assert all(0 <= row[network][name] <= 1 for name in figures)


def test_statistics_are_looked_at_by_their_share(small_task):
    from evidence import statistics

    rows = statistics(small_task, config())
    assert [row["share"] for row in rows] == [0, 0.5, 1]
    assert 0 == rows[0]["network"]["d_emb"] < rows[1]["network"]["d_emb"]


def test_a_source_network_of_smp_is_like_the_bundled_one(tmp_path):
    from sources import FAMILIES, Domain, train

    from selfadapt_smp import DEMO_MODEL

    image, labels = discs(0, (160, 160))
    network = train("smp", [Domain("fluo520", [(image[None], labels)])], 0, steps=1, first=1)
    FAMILIES["smp"].save(network, tmp_path / "network")
    new, bundled = (
        json.loads((folder / "selfadapt.json").read_text())
        for folder in (tmp_path / "network", DEMO_MODEL)
    )
    for name in ("heads", "normalize", "threshold", "min_size", "min_distance", "smoothing"):
        assert new[name] == bundled[name]
    opened, demo = (FAMILIES["smp"].load(folder) for folder in (tmp_path / "network", DEMO_MODEL))
    shapes = [{n: t.shape for n, t in each.state_dict().items()} for each in (opened, demo)]
    assert shapes[0] == shapes[1]


def test_the_distance_of_smp_rises_to_one_in_each_object():
    from sources import FAMILIES

    labels = np.zeros((16, 16), np.int32)
    labels[1:6, 1:6], labels[8:15, 8:15] = 1, 2
    foreground, distance = FAMILIES["smp"].targets(labels)
    np.testing.assert_array_equal(foreground, labels > 0)
    np.testing.assert_allclose(distance[3, 1:6], [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3])
    assert distance[11, 11] == 1
    assert not distance[labels == 0].any()


def test_objects_of_every_domain_are_made_bright():
    from sources import DOMAINS, bright

    gray = np.array([[[10.0, 30.0]]])
    dark = {name for name in DOMAINS if bright(gray, name)[0, 0, 0] == 20}
    assert dark == {"he", "rbc", "axons", "chloroplasts"}
    assert bright(np.ones((3, 4, 5)), "fluo520").shape == (1, 4, 5)


def test_the_page_has_the_tables_of_the_committed_cells():
    from evidence_report import read, renewed

    page = (BENCHMARKS.parent / "docs" / "evidence.md").read_text()
    assert renewed(page, read(BENCHMARKS / "results" / "evidence.jsonl")) == page


def test_the_page_has_the_judges_tables_of_the_committed_looks():
    from common import filled
    from judge import made

    page = (BENCHMARKS.parent / "docs" / "evidence.md").read_text()
    results = BENCHMARKS / "results"
    assert filled(page, made(results / "judge.jsonl", results / "anchors.jsonl")) == page


def test_the_shipped_constants_are_those_of_the_committed_looks_or_safer():
    from judge import constants
    from judge_rules import read

    chosen = constants(read(BENCHMARKS / "results" / "judge.jsonl"))
    for name in ("WEIGHTS", "OFFSET", "SPREAD", "TRUSTED"):
        assert getattr(_quality, name) == chosen[name], name
    shipped = Thresholds()
    safer = {name: getattr(shipped, name) for name in ("risk", "missed", "added")}
    assert replace(chosen["Thresholds"], **safer) == shipped
    for name, value in safer.items():
        assert value <= getattr(chosen["Thresholds"], name), name


def look(ap: float, agreement: float, d_emb: float = 0.0):
    agreements = {f"agreement_{iou}": agreement for iou in (0.5, 0.6, 0.7, 0.8)}
    return {"ap": ap, **agreements, "d_emb": d_emb, "fn_rate": 0.0}


def cell(pair: str, *teacher, student=None, seed=0, setting="default"):
    """Looks of a run at every 50th step."""
    rows = [
        {"iteration": 50 * k, "teacher": t, "student": s}
        for k, (t, s) in enumerate(zip(teacher, student or teacher, strict=True))
    ]
    return {"pair": pair, "setting": setting, "seed": seed, "rows": rows}


def cells_of(tmp_path, *cells):
    from evidence_cells import read

    file = tmp_path / "cells.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in cells))
    return read(file)


def line(table: str, start: str) -> list[str]:
    row = next(row for row in table.splitlines() if row.startswith(f"| {start} |"))
    return [figure.strip() for figure in row.strip("|").split("|")]


def test_table_of_stops(tables, tmp_path):
    gains = [look(0.5, 0.5), look(0.6, 0.6, 0.4), look(0.4, 0.7, 0.6), look(0.7, 0.65, 0.4)]
    blind = [look(0.5, 0.5, math.nan), look(0.6, 0.51, math.nan)]
    cells = cells_of(
        tmp_path,
        cell("smp to he", *gains),
        cell("smp to he", *[look(each["ap"], 0.5, each["d_emb"]) for each in gains], seed=1),
        cell("broad to he", *blind),
    )
    table = tables.stops(cells, "teacher")
    # base; kept by agreement: the third look, and the first; D_emb: before the third; last; best
    assert line(table, "smp to he")[2:] == [
        "2", "0.500", "0.450 ± 0.071", "0.600 ± 0.000", "0.700 ± 0.000", "0.700 ± 0.000",
        "0.700 ± 0.000",
    ]  # fmt: skip
    assert line(table, "broad to he")[3:] == ["0.500", "0.500", "", "0.600", "0.600", "0.600"]
    assert line(table, "**largest relative loss, all pairs**")[4:6] == ["-10.0%", "+20.0%"]


def test_other_criteria_see_runs_with_trained_statistics(tables, tmp_path):
    taken = [look(0.2, 0.2) | {"target_statistics": 1.0}, look(0.8, 0.8)]
    trained = [look(0.2, 0.2), look(0.4, 0.4)]
    cells = cells_of(
        tmp_path,
        cell("smp to photons", *taken),
        cell("smp to photons", *trained, setting="batch norm of the source"),
        cell("smp to he", *trained),
    )
    table = tables.stops(cells, "student")
    assert line(table, "smp to photons")[3:] == [
        "0.200", "0.800", "0.400", "0.400", "0.400", "0.800"
    ]  # fmt: skip


def test_baselines_are_compared_on_the_pairs_that_they_have(tables, tmp_path):
    def alone(pair: str, *ap: float):
        rows = [{"iteration": k, "network": {"ap": value}} for k, value in enumerate(ap)]
        return {"pair": pair, "setting": "TTA alone", "seed": 0, "rows": rows}

    helped = [look(0.4, 0.4), look(0.8, 0.8)]
    cells = cells_of(
        tmp_path,
        cell("smp to photons", *helped),
        cell("smp to he", look(0.5, 0.5), look(0.4, 0.5)),
        cell("stardist to he", *helped),
        alone("smp to photons", 0.4, 0.6),
        alone("smp to he", 0.5, 0.55),
    )
    table = tables.compared(cells)
    assert line(table, "stardist to he")[1:] == ["0.400", "0.800", "", "", "", ""]
    mean = "**mean relative gain, shifted pairs, each at most +100 %**"
    assert line(table, mean)[3:] == ["+30.0%", "", "", ""]
    assert line(table, "**the default's on the same pairs**")[3:] == ["+50.0%", "", "", ""]
    ends = "**pairs on which it ends higher / lower than the default**"
    assert line(table, ends)[3] == "1 / 1 of 2"


def test_options_are_chosen_on_other_pairs_or_targets(tables, tmp_path):
    """The student gains more, and harms H&E: it is chosen where all of H&E is left out."""
    helped = [look(0.5, 0.5), look(0.6, 0.7)], [look(0.5, 0.5), look(0.8, 0.7)]
    harmed = [look(0.5, 0.5), look(0.5, 0.51)], [look(0.5, 0.5), look(0.4, 0.7)]
    cells = cells_of(
        tmp_path,
        *(cell(f"{n} to photons", *helped[0], student=helped[1]) for n in ("smp", "stardist")),
        *(cell(f"{n} to he", *harmed[0], student=harmed[1]) for n in ("smp", "cellpose")),
    )
    table = tables.left_out(cells)
    assert [each.split(",")[0] for each in line(table, "smp to photons")[1:]] == [
        "teacher", "+20.0%", "teacher", "+20.0%"
    ]  # fmt: skip
    assert [each.split(",")[0] for each in line(table, "cellpose to he")[1:]] == [
        "teacher", "+0.0%", "student", "-20.0%"
    ]  # fmt: skip
    assert line(table, "**largest loss**")[2::2] == ["+0.0%", "-20.0%"]
    assert "| **nothing left out: teacher, " in table


@pytest.mark.parametrize("kind", ["flow", "rays"])
def test_the_literal_step_that_ours_is_timed_against_ends_at_our_weights(kind):
    from step_peers import Literal

    from selfadapt import SelfAdaptation
    from selfadapt_stardist import Architecture, StarDist2D, StardistAdapter

    torch.manual_seed(0)
    adapter = trained_adapter()
    adapter.model.bottleneck[2].p = 0.0  # what is drawn at random differs: dropout, augmentation
    if kind == "rays":
        small = Architecture(n_rays=8, grid=(2, 2), unet_n_depth=2, unet_n_filter_base=8)
        adapter = StardistAdapter(StarDist2D(small))
    settings = config(strength=0)
    run, literal = SelfAdaptation(adapter, settings), Literal(adapter, settings)
    for _ in range(3):
        images = torch.rand(2, adapter.channels or 1, 32, 32)
        loss = float(run.step(images)["loss"])
        assert literal(images)["loss"] == pytest.approx(loss, rel=1e-4)
    for ours, theirs in ((run.student, literal.student), (run.teacher, literal.teacher)):
        for name, weight in ours.named_parameters():
            torch.testing.assert_close(weight, theirs.get_parameter(name), rtol=0, atol=2e-4)
            assert kind == "rays" or not torch.equal(weight, adapter.model.get_parameter(name))


def test_the_step_of_torch_em_is_one_of_its_trainer():
    pytest.importorskip("torch_em")
    from step_peers import TorchEm

    adapter = trained_adapter()
    step = TorchEm(adapter, config(views=2))
    before = [weight.clone() for weight in adapter.model.parameters()]
    for _ in range(2):
        step(torch.rand(2, 1, 32, 32))
    assert step.trainer.iteration == 2
    for network in (step.trainer.model, step.trainer.teacher):
        assert not all(map(torch.equal, network.parameters(), before))
    assert all(map(torch.equal, adapter.model.parameters(), before))
