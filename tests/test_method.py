"""The numerical parts of the method against slow, obvious twins."""

import copy

import numpy as np
import pytest
import torch
from helpers import SmallAdapter, SmallNet, config, equal_states
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from test_heads import centre_vectors

from selfadapt import (
    Binary,
    Categorical,
    OutputError,
    OutputSpec,
    Scalar,
    SelfAdaptation,
    Vector,
    adabn,
)
from selfadapt._augment import _refocus, augment, noise_level
from selfadapt._losses import l2_sp, masked_mean
from selfadapt._network import select_parameters
from selfadapt._reliability import RunningThreshold, group_quantiles
from selfadapt._run import learning_rate
from selfadapt._teacher import make_teacher, update_teacher
from selfadapt._tiles import pad_far_side
from selfadapt._views import mean_outputs, view_votes
from selfadapt.testing import example_labels


def test_l2_sp_and_its_gradient_equal_autograd_of_the_printed_formula():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (2, 1, 3, 3)]
    initial = [torch.randn(s, generator=generator) for s in shapes]
    weights = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    slow = sum(((w - w0) ** 2).sum() for w, w0 in zip(weights, initial, strict=True))
    expected = torch.autograd.grad(slow * 0.3, weights)
    fast = l2_sp(weights, initial)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(torch.autograd.grad(fast * 0.3, weights), expected)


def test_l2_sp_at_the_start_is_zero_with_zero_gradient():
    weight = torch.ones(4, requires_grad=True)
    loss = l2_sp([weight], [torch.ones(4)])
    assert loss.item() == 0
    assert torch.autograd.grad(loss, weight)[0].tolist() == [0, 0, 0, 0]


def test_frozen_parameters_are_left_out_of_l2_sp_and_optimiser():
    adapter = SmallAdapter()
    adapter.model.stem.requires_grad_(False)
    run = SelfAdaptation(adapter, config(l2sp=1.0, weight_decay=0.5, iterations=3))
    for _ in range(3):
        run.step(torch.rand(2, 1, 16, 16))
    frozen = {id(p) for p in run.initial.stem.parameters()}
    assert not frozen & {id(anchor) for anchor in run._anchors}
    assert len(run._anchors) == len(run.parameters()) == 4
    stems = zip(run.student.stem.parameters(), run.initial.stem.parameters(), strict=True)
    assert all(torch.equal(now, first) for now, first in stems)


def test_the_loss_is_eq_1_plus_eq_2_term_by_term():
    adapter = SmallAdapter()
    for dropout in (m for m in adapter.model.modules() if isinstance(m, torch.nn.Dropout2d)):
        dropout.p = 0.0
    settings = config(strength=0.0, l2sp=0.2, balance=0.7, keep_floor=0.0)
    run = SelfAdaptation(adapter, settings)
    with torch.no_grad():
        for parameter in run.student.parameters():
            parameter.add_(0.01)
    images = torch.rand(2, 1, 16, 16)
    loss, info = run.loss(images)
    spec = adapter.outputs
    raw = adapter.forward(run.student.eval(), images)
    votes = view_votes(lambda v: adapter.forward(run.teacher, v), images, spec, spec.symmetries)
    p = votes["cellprob"].mean(0)
    confidence = torch.maximum(p, 1 - p)
    m_p = torch.zeros_like(p)
    for decision in (p > 0.5, p <= 0.5):
        if decision.any():
            limit = np.quantile(1 - confidence[decision].numpy(force=True), 0.8, method="higher")
            m_p[decision & (1 - confidence <= float(limit))] = 1
    f, std = votes["flow"].mean(0), votes["flow"].std(0, correction=0)
    m_f = torch.zeros_like(f)
    for c in range(2):
        limit = np.quantile(std[:, c].numpy(force=True), 0.8, method="higher")
        m_f[:, c] = (std[:, c] <= float(limit)).float()
    q = raw["cellprob"].sigmoid()
    ce = -(p * q.log() + (1 - p) * (1 - q).log())
    pairs = zip(run.student.parameters(), run.initial.parameters(), strict=True)
    shift = sum(((w - w0) ** 2).sum() for w, w0 in pairs)
    expected = (ce * m_p).mean() + 0.7 * ((raw["flow"] - f) ** 2 * m_f).mean() + 0.2 * shift
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(info["kept_flow"], m_f.mean())
    torch.testing.assert_close(info["kept_cellprob"], m_p.mean())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.25, 0.8, 1.0]), st.integers(1, 4))
def test_group_quantiles_equal_numpy(seed, share, groups):
    rng = np.random.default_rng(seed)
    doubt = rng.random((2, 3, 7, 5)).astype(np.float32)
    doubt[doubt < 0.1] = -0.0
    group = rng.integers(0, groups + 1, doubt.shape)  # the last group may be empty
    got = group_quantiles(
        torch.from_numpy(doubt), torch.from_numpy(group), groups + 2, torch.tensor([share])
    )[0]
    for k in range(groups + 2):
        members = doubt[group == k]
        if members.size:
            assert got[k] == np.quantile(members, share, method="higher")
        else:
            assert got[k].isnan()


def test_masks_follow_a_running_percentile_with_a_floor():
    threshold = RunningThreshold(1, keep=0.8, floor=0.1, momentum=0.9, device=torch.device("cpu"))
    rng = np.random.default_rng(0)
    running = None
    for scale in (1.0, 1.0, 5.0, 0.1, 100.0):
        doubt = (scale * (1 + rng.random((2, 1, 20, 20)))).astype(np.float32)
        now = np.quantile(doubt, 0.8, method="higher")
        running = now if running is None else 0.9 * running + 0.1 * now
        floor = np.quantile(doubt, 0.1, method="higher")
        mask = threshold.update(torch.from_numpy(doubt), torch.zeros(doubt.shape, dtype=torch.long))
        np.testing.assert_array_equal(mask.numpy(), doubt <= np.float32(max(running, floor)))
    assert 0.1 <= mask.float().mean() < 0.2  # the running threshold alone would keep nothing


def test_a_class_that_appears_late_gets_its_own_threshold():
    threshold = RunningThreshold(2, keep=0.5, floor=0.0, momentum=0.9, device=torch.device("cpu"))
    doubt = torch.rand(1, 1, 8, 8)
    first = torch.zeros(1, 1, 8, 8, dtype=torch.long)
    threshold.update(doubt, first)
    assert threshold.threshold[1].isnan()
    seen = threshold.threshold[0].clone()
    threshold.update(doubt, first + 1)
    assert threshold.threshold[0] == seen
    assert not threshold.threshold[1].isnan()


def test_pseudo_labels_equal_a_loop_over_views_with_ground_truth_encoders():
    """A 'network' that knows the truth of each view: averaging must give the truth back.

    It fails if vectors are not turned with the image, or turned the wrong way.
    """
    labels = example_labels()[:48, :48].copy()
    spec = OutputSpec(flow=Vector(), p=Binary(logits=False), d=Scalar())

    def encode(view):
        return {
            "flow": centre_vectors(view),
            "p": (view > 0).astype(np.float32)[None],
            "d": ndimage.distance_transform_edt(view > 0).astype(np.float32)[None],
        }

    def network(views):
        truths = [encode(v[0].numpy().astype(np.int32)) for v in views]
        return {n: torch.from_numpy(np.stack([t[n] for t in truths])) for n in spec}

    image = torch.from_numpy(labels).float()[None, None]
    votes = view_votes(network, image, spec, spec.symmetries)
    slow = {name: [] for name in spec}
    for g in spec.symmetries:
        moved = encode(np.ascontiguousarray(g.move(torch.from_numpy(labels)).numpy()))
        for name, truth in moved.items():
            slow[name].append(spec[name].transform(g.inverse, torch.from_numpy(truth)))
    for name, truth in encode(labels).items():
        torch.testing.assert_close(votes[name][:, 0], torch.stack(slow[name]))
        label = spec[name].pseudo_label(votes[name], "soft")[0]
        torch.testing.assert_close(label, torch.from_numpy(truth), atol=1e-4, rtol=0)
        assert float(spec[name].doubt(votes[name])[0].max()) < 1e-3
    unturned = votes["flow"].clone()
    for v, g in enumerate(spec.symmetries):
        unturned[v, 0] = g.inverse.move(torch.from_numpy(encode(
            np.ascontiguousarray(g.move(torch.from_numpy(labels)).numpy()))["flow"]))  # fmt: skip
    assert float(spec["flow"].doubt(unturned)[0].max()) > 1  # what the test would see otherwise


def test_views_of_a_coarse_grid_sample_the_same_points():
    """A 'network' of grid 2 that reads off pixels: every view must read the same ones."""
    spec = OutputSpec(d=Scalar(grid=2))
    images = torch.rand(2, 1, 16, 16)
    votes = view_votes(lambda v: {"d": v[..., ::2, ::2]}, images, spec, spec.symmetries)
    assert len(votes["d"]) == 8
    for vote in votes["d"]:
        torch.testing.assert_close(vote, images[..., ::2, ::2])


def test_the_mean_over_views_of_odd_sides_moves_no_sampling_point():
    spec = OutputSpec(depth=Scalar(grid=(2, 3)))

    def sampled(image):
        padded = pad_far_side(image, (8, 12), "reflect")
        return {"depth": padded[:, ::2, ::3]}

    image = torch.rand(1, 7, 10)
    mean = mean_outputs(sampled, image, spec, "reflect")
    torch.testing.assert_close(mean, sampled(image))


def test_the_teacher_follows_the_closed_form():
    torch.manual_seed(0)
    student = SmallNet()
    teacher = make_teacher(student)
    weights = [p.detach().clone() for p in student.parameters()]
    expected = [w.double() for w in weights]
    for _ in range(20):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        student.stem[1].running_mean.add_(1)
        update_teacher(teacher, student, 0.9)
        expected = [
            0.9 * e + 0.1 * p.detach() for e, p in zip(expected, student.parameters(), strict=True)
        ]
    for got, want in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(teacher.stem[1].running_mean, student.stem[1].running_mean)
    assert not teacher.training


def test_the_teacher_of_a_run_moves_and_stays_in_eval_mode():
    run = SelfAdaptation(SmallAdapter(), config())
    run.step(torch.rand(2, 1, 32, 32))
    run.teacher.train()  # by a module that holds it, as a LightningModule would
    run.step(torch.rand(2, 1, 32, 32))
    assert not any(module.training for module in run.teacher.modules())
    for t, s, i in zip(
        run.teacher.parameters(), run.student.parameters(), run.initial.parameters(), strict=True
    ):
        assert not torch.equal(t, i)
        assert (t - i).norm() < (s - i).norm()


def test_master_weights_are_float32_and_move_under_bfloat16():
    adapter = SmallAdapter()
    adapter.model.to(torch.bfloat16)
    run = SelfAdaptation(adapter, config(precision="bfloat16"))
    run.step(torch.rand(2, 1, 16, 16))
    assert {p.dtype for m in (run.student, run.teacher) for p in m.parameters()} == {torch.float32}
    moved = zip(run.teacher.parameters(), run.initial.parameters(), strict=True)
    assert all(not torch.equal(t, i) for t, i in moved)
    assert adapter.model.stem[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("policy", ["auto", "source", "target", "batch"])
def test_batch_norm_policy(policy):
    run = SelfAdaptation(SmallAdapter(), config(batch_norm=policy))
    before = run.student.stem[1].running_mean.clone()
    run.step(torch.rand(2, 1, 32, 32) + 5)
    assert torch.equal(run.student.stem[1].running_mean, before) == (policy != "batch")
    assert torch.equal(run.teacher.stem[1].running_mean, run.student.stem[1].running_mean)
    assert run.student.bottleneck[2].training  # dropout stays on


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_batch_norm_of_torchscript_keeps_its_statistics_too():
    adapter = SmallAdapter()
    adapter.model = torch.jit.script(adapter.model)
    adapter.embedding_module = lambda model: None
    run = SelfAdaptation(adapter, config(batch_norm="source"))
    before = {name: t.clone() for name, t in run.student.named_buffers()}
    run.step(torch.rand(2, 1, 32, 32) + 5)
    assert len(before) == 3
    assert all(torch.equal(t, before[name]) for name, t in run.student.named_buffers())


def test_adabn_takes_the_mean_statistics_of_the_batches_and_nothing_else():
    adapter = SmallAdapter()
    before = {name: t.clone() for name, t in adapter.model.state_dict().items()}
    batches = [torch.rand(2, 1, 16, 16), 3 + 2 * torch.rand(2, 1, 16, 16)]
    measured = adabn(adapter, batches)
    assert not measured.training
    convolved = [adapter.model.stem[0](batch) for batch in batches]
    norm = measured.stem[1]
    mean = torch.stack([c.mean((0, 2, 3)) for c in convolved]).mean(0)
    variance = torch.stack([c.transpose(0, 1).flatten(1).var(1) for c in convolved]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.momentum == adapter.model.stem[1].momentum
    for name, tensor in measured.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(tensor, before[name])
    assert all(torch.equal(t, before[name]) for name, t in adapter.model.state_dict().items())
    halfway = adabn(adapter, batches, share=0.5).stem[1]
    torch.testing.assert_close(halfway.running_mean, (mean + before["stem.1.running_mean"]) / 2)
    torch.testing.assert_close(halfway.running_var, (variance + before["stem.1.running_var"]) / 2)
    run = SelfAdaptation(adapter, config())
    run.start_from(measured)
    for network in (run.student, run.teacher):
        assert equal_states(network.state_dict(), measured.state_dict())
    run.step(batches[0])
    assert torch.equal(run.teacher.stem[1].running_mean, norm.running_mean)
    assert torch.equal(run.initial.stem[1].running_mean, before["stem.1.running_mean"])


def test_augmentation_draws_per_sample_keeps_empty_channels_and_does_not_clamp():
    images = torch.rand(6, 1, 24, 24).repeat(1, 5, 1, 1) * 3 - 1
    images[:, 3] = 0
    images[:] = images[:1]
    out = augment(images, config(), torch.Generator().manual_seed(0))
    again = augment(images, config(), torch.Generator().manual_seed(0))
    assert out.shape == images.shape
    assert torch.equal(out, again)
    assert torch.equal(out[:, 3], torch.zeros_like(out[:, 3]))
    assert out[:, 0].mean((1, 2)).std() > 0.05
    assert out.min() < images.min()
    assert out.max() > images.max()
    assert torch.equal(augment(images, config(strength=0.0), torch.Generator()), images)


def test_augmentation_scales_with_the_images():
    images = torch.rand(4, 2, 16, 16)
    small = augment(images, config(), torch.Generator().manual_seed(1))
    large = augment(1000 * images, config(), torch.Generator().manual_seed(1))
    torch.testing.assert_close(large, 1000 * small, rtol=1e-3, atol=1e-2)


def test_refocusing_blurs_or_adds_what_blurring_would_take_away():
    images, amount = torch.rand(4, 2, 20, 20), torch.tensor([0.3, -0.9, 1.0, 0.0])
    out = _refocus(images, 2.0, amount)
    for b in range(4):
        sigma = 2 * abs(float(amount[b]))
        image = images[b].numpy()
        slow = ndimage.gaussian_filter(image, (0, sigma, sigma), mode="nearest", radius=(0, 4, 4))
        expected = slow if amount[b] >= 0 else 2 * image - slow
        np.testing.assert_allclose(out[b], expected, atol=1e-5)


def noisy(*sigmas):
    """Evenly curved images with Gaussian noise of known strength."""
    rows, columns = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    smooth = 0.01 * rows**2 - rows * columns / 20
    generator = torch.Generator().manual_seed(0)
    return torch.stack([smooth + s * torch.randn(128, 128, generator=generator) for s in sigmas])


def test_noise_level_sees_noise_and_nothing_smooth():
    levels = noise_level(noisy(0.0, 1.0, 5.0).view(1, 3, 128, 128)).flatten()
    torch.testing.assert_close(levels, torch.tensor([0.0, 1.0, 5.0]), rtol=0.05, atol=1e-4)


def test_augmented_images_have_as_much_noise_as_before_or_more():
    images = noisy(0.5, 1.0, 2.0, 4.0)[:, None]
    out = augment(images, config(brightness=0.0, noise=2.0), torch.Generator().manual_seed(1))
    rise = (noise_level(out) / noise_level(images)).flatten()
    assert rise.min() > 0.95
    assert 1.5 < rise.max() < 3.15
    kept = augment(images, config(brightness=0.0, noise=0.0), torch.Generator().manual_seed(1))
    rise = noise_level(kept) / noise_level(images)
    assert rise.min() > 0.95  # blurred, then as noisy again
    assert rise.max() < 2  # sharpened


def test_masked_mean_divides_by_all_pixels():
    mask = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert masked_mean(torch.full((4,), 8.0), mask).item() == 2


def test_within_objects_each_pixel_counts_by_its_probability():
    generator = torch.Generator().manual_seed(0)
    loss, mask, inside = (torch.rand(2, k, 3, 5, generator=generator) for k in (4, 4, 1))
    mask = (mask > 0.3).float()
    total = weight = 0.0
    for b in range(2):
        for y in range(3):
            for x in range(5):
                weight += float(inside[b, 0, y, x])
                for k in range(4):
                    kept = float(loss[b, k, y, x] * mask[b, k, y, x])
                    total += kept * float(inside[b, 0, y, x]) / 4
    assert masked_mean(loss, mask, inside).item() == pytest.approx(total / weight, rel=1e-5)
    assert masked_mean(loss, mask, torch.zeros_like(inside)).item() == 0


def test_a_head_within_another_learns_nothing_from_outside_its_objects():
    adapter = SmallAdapter()
    adapter.outputs = OutputSpec(flow=Vector(within="cellprob"), cellprob=Binary())
    with torch.no_grad():
        adapter.model.up[1].bias[2] = -100  # no object anywhere
    run = SelfAdaptation(adapter, config(views=2, device="cpu"))
    _, info = run.loss(torch.rand(2, 1, 32, 32))
    assert info["loss_flow"] == 0
    adapter.outputs = OutputSpec(flow=Vector(), cellprob=Binary())
    _, info = SelfAdaptation(adapter, config(views=2, device="cpu")).loss(torch.rand(2, 1, 32, 32))
    assert info["loss_flow"] > 0


@pytest.mark.parametrize(
    "heads",
    [
        {"d": Scalar(within="p")},
        {"d": Scalar(within="p"), "p": Scalar()},
        {"d": Scalar(within="p"), "p": Binary(2)},
        {"d": Scalar(within="p"), "p": Binary(grid=2)},
        {"d": Scalar(within="p"), "p": Categorical(3)},
    ],
)
def test_within_names_a_head_that_tells_objects_on_the_same_grid(heads):
    with pytest.raises(OutputError, match=r"'d' is within='p': it must be the name"):
        OutputSpec(**heads)


def test_a_head_within_classes_learns_from_where_the_background_is_not():
    adapter = SmallAdapter()
    losses = {}
    for background in (0, 1):
        adapter.model = SmallNet(channels=3)
        adapter.outputs = OutputSpec(
            classes=Categorical(2, background=background), distance=Scalar(within="classes")
        )
        with torch.no_grad():
            adapter.model.up[1].weight[:2] = 0
            adapter.model.up[1].bias[:2] = torch.tensor([100.0, -100.0])  # class 0 everywhere
        run = SelfAdaptation(adapter, config(views=2, device="cpu"))
        losses[background] = run.loss(torch.rand(2, 1, 32, 32))[1]["loss_distance"]
    assert losses[0] == 0
    assert losses[1] > 0


def test_inside_is_what_is_left_of_the_background():
    label = torch.rand(2, 3, 4, 5).softmax(1)
    torch.testing.assert_close(
        Categorical(3, background=1).inside(label), label[:, :1] + label[:, 2:]
    )
    with pytest.raises(OutputError, match="does not tell what is inside"):
        Categorical(3).inside(label)
    with pytest.raises(OutputError, match="background=3 is not allowed: it is a class from 0 to 2"):
        Categorical(3, background=3)


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    settings = config(iterations=100, warmup=0.1, learning_rate=1.0)
    rates = [learning_rate(i, settings) for i in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:], 0.5 * (1 + np.cos(np.pi * np.arange(90) / 90)))


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("norm", {"stem.1.weight", "stem.1.bias"}),
        ("^bottleneck", {"bottleneck.0.weight", "bottleneck.0.bias"}),
    ],
)
def test_trainable_selects_parameters(choice, names):
    assert set(select_parameters(SmallNet(), choice)) == names
    run = SelfAdaptation(SmallAdapter(), config(trainable=choice))
    run.step(torch.rand(2, 1, 16, 16))
    first = dict(run.initial.named_parameters())
    moved = {n for n, p in run.student.named_parameters() if not torch.equal(p, first[n])}
    assert moved == names


@pytest.mark.parametrize(
    "ablation",
    [{"mask": False}, {"views": 1}, {"l2sp": 0.0}, {"strength": 0.0}, {"targets": "hard"}],
)
def test_each_ablation_of_table_2_is_one_setting_and_changes_the_loss(ablation):
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))

    def two_losses(**changes):
        run = SelfAdaptation(SmallAdapter(), config(**changes))
        run.step(images)
        return float(run.loss(images)[1]["loss"])

    assert two_losses() == two_losses()
    assert two_losses() != two_losses(**ablation)


def test_without_masks_all_pixels_count():
    run = SelfAdaptation(SmallAdapter(), config(mask=False))
    assert float(run.loss(torch.rand(2, 1, 16, 16))[1]["kept"]) == 1


def test_gradient_clipping_bounds_the_step():
    run = SelfAdaptation(SmallAdapter(), config(gradient_clip=1e-3))
    run.step(torch.rand(2, 1, 16, 16))
    norms = torch.stack([p.grad.norm() for p in run.parameters()])
    assert float(norms.norm()) <= 1.001e-3


@pytest.mark.parametrize(("batch", "parts"), [(4, 4), (5, 3)])  # 2 + 2 + 1
def test_accumulated_parts_give_the_step_of_the_whole_batch(batch, parts):
    images = torch.rand(batch, 1, 16, 16)
    students, last = [], []
    for count in (1, parts):
        adapter = SmallAdapter()
        adapter.model.bottleneck[2].p = 0.0
        settings = config(batch_size=batch, accumulate=count, mask=False, strength=0, l2sp=0.1)
        run = SelfAdaptation(adapter, settings)
        run.step(images)
        last.append(run.step(images))  # by now the weights have moved, and L2-SP counts
        students.append([p.detach() for p in run.parameters()])
    torch.testing.assert_close(*last, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(*students, atol=1e-5, rtol=1e-3)


def test_the_method_runs_in_somebody_elses_loop_and_leaves_the_random_state_alone():
    run = SelfAdaptation(SmallAdapter(), config())
    optimizer = torch.optim.SGD(run.parameters(), 1e-2)
    teacher = copy.deepcopy(run.teacher)
    torch.manual_seed(7)
    loss, info = run.loss(torch.rand(2, 1, 32, 32))
    after = torch.rand(3)
    torch.manual_seed(7)
    torch.rand(2, 1, 32, 32)
    assert torch.equal(after, torch.rand(3))
    (2 * loss).backward()
    optimizer.step()
    run.update_teacher()
    assert not any(value.requires_grad for value in info.values())
    pairs = zip(run.teacher.parameters(), teacher.parameters(), strict=True)
    assert all(not torch.equal(now, before) for now, before in pairs)


def test_a_loop_of_ones_own_moves_the_teacher_as_often_as_said():
    run = SelfAdaptation(SmallAdapter(), config(ema_every=3))
    moved = []
    for _ in range(7):
        before = copy.deepcopy(run.teacher.state_dict())
        with torch.no_grad():  # an optimiser of one's own
            for parameter in run.parameters():
                parameter.add_(0.1)
        run.update_teacher()
        now = run.teacher.state_dict().values()
        pairs = zip(now, before.values(), strict=True)
        moved.append(any(not torch.equal(value, earlier) for value, earlier in pairs))
    assert moved == [False, False, True, False, False, True, False]
    assert run.iteration == 7


def test_categorical_doubt_is_grouped_by_the_winning_class():
    votes = torch.tensor([[0.2, 0.7, 0.1], [0.4, 0.5, 0.1]]).view(2, 1, 3, 1, 1)
    doubt, group = Categorical(3).doubt(votes)
    torch.testing.assert_close(doubt.flatten(), torch.tensor([0.4]))
    assert group.item() == 1


def test_the_teacher_sees_a_large_batch_in_parts_and_says_the_same(adapter, monkeypatch):
    run = SelfAdaptation(adapter, config())
    images = torch.rand(5, 1, 32, 32)
    whole = run._forward(run.teacher.eval(), images)
    monkeypatch.setattr("selfadapt._batch.CPU_PIXELS", 2 * 32 * 32)
    sizes = []
    run.teacher.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    torch.testing.assert_close(run._forward_teacher(images), whole)
    assert sizes == [2, 2, 1]
    sizes.clear()
    run.step(images)
    assert max(sizes) == 2
    assert sum(sizes) == 5 * 8
