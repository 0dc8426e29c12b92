"""The run: one stateful object around the pure parts of the method."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from selfadapt import _ranks as ranks
from selfadapt._adapter import Adapter
from selfadapt._augment import augment
from selfadapt._batch import checked, in_parts
from selfadapt._batch_norm import set_training, single_values_frozen
from selfadapt._config import Config
from selfadapt._errors import CheckpointError, ConfigError, ModelError, first_line
from selfadapt._judge import Judge
from selfadapt._losses import l2_sp, masked_mean
from selfadapt._monitors import EmbeddingDrift, Monitor
from selfadapt._network import (
    check_network,
    copy_network,
    fingerprint,
    frozen_parts,
    pick_device,
    refuse_wrapped,
    seeded,
    select_parameters,
)
from selfadapt._predict import learns_before_bottleneck
from selfadapt._pseudo_labels import labels_and_masks, make_thresholds
from selfadapt._schedule import learning_rate
from selfadapt._state import refuse_damaged_optimizer, refuse_other_state
from selfadapt._teacher import make_teacher, update_teacher
from selfadapt._views import drawn, view_votes

logger = logging.getLogger(__name__)
Info = dict[str, float]
Stop = Callable[["SelfAdaptation", Mapping[str, float]], bool]


class SelfAdaptation:
    """A student, its teacher and the initial network, and one step of the method at a time.

    In your own loop, with your own optimiser over `run.parameters()`:

        run = SelfAdaptation(adapter, Config())
        for images in loader:
            loss, info = run.loss(images)
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            run.update_teacher()

    or with AdamW, warm-up and cosine as in the paper: `step`, `iterate` or `fit`.

    Args:
        adapter: the model. Its network stays as it is; student, teacher and initial are copies.
        config: all settings.

    Attributes:
        student: the network that is trained.
        teacher: the moving average of the student, always in eval mode.
        initial: the network before adaptation, frozen.
        iteration: number of optimiser steps, as `step` and `update_teacher` count them.
    """

    def __init__(self, adapter: Adapter, config: Config | None = None) -> None:
        self.adapter = adapter
        self.config = config = config or Config()
        self.device = pick_device(config.device)
        check_network(getattr(adapter, "model", None))
        self.initial = copy_network(adapter.model, self.device, frozen=True)
        self.student = copy_network(adapter.model, self.device)
        if adapter.channels_last and self.device.type == "cpu":  # not measured on other devices
            for network in (self.initial, self.student):
                network.to(memory_format=torch.channels_last)
        names = select_parameters(self.student, config.trainable)
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(name in names)
        self._frozen = frozen_parts(self.student)
        self.teacher = make_teacher(self.student)
        start = dict(self.initial.named_parameters())
        self._fingerprint = fingerprint(self.initial)
        self._anchors = [start[name] for name in names]
        self.iteration = 0
        self.symmetries = adapter.outputs.symmetries
        self.thresholds = make_thresholds(adapter.outputs, config, self.device)
        self.optimizer = torch.optim.AdamW(
            self.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self._generator = torch.Generator(self.device).manual_seed(config.seed)
        self._view_generator = torch.Generator().manual_seed(config.seed)

    def start_from(self, model: nn.Module) -> None:
        """Give student and teacher other weights or statistics, such as those of `adabn`.

        The run is still anchored to, and compared with, the initial network.
        """
        self.student.load_state_dict(model.state_dict())
        self.teacher.load_state_dict(model.state_dict())

    def parameters(self) -> list[nn.Parameter]:
        """The student's parameters that adapt, for an optimiser of your own."""
        return [p for p in self.student.parameters() if p.requires_grad]

    @property
    def exported(self) -> nn.Module:
        """The network that is monitored and returned, as `config.export` says."""
        return self.student if self.config.export == "student" else self.teacher

    @property
    def look_due(self) -> bool:
        """Whether this iteration is a validation point: every `validate_every`, and the last."""
        last = self.iteration == self.config.iterations
        return last or self.iteration % self.config.validate_every == 0

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch, Eq. 1 + Eq. 2; no backward, no optimiser.

        Args:
            images: prepared crops, float `[B, C, S, S]`, square, S as the network takes it.

        Returns:
            The loss, and detached figures: `loss`, `loss_<head>` (unweighted), `l2sp` (the sum
            of Eq. 2 without lambda), `kept` and `kept_<head>` (share of reliable pixels).

        Raises:
            ImageError: the batch has the wrong shape.
            OutputError: the network's output does not fit the heads.
            ModelError: the outputs have no gradient.
        """
        refuse_wrapped(self.student, "the run calls it by itself; give `run.student.module`")
        images = checked(images, self.adapter, self.device)
        labels, masks = self._pseudo_labels(images)
        # dropout and the like draw from a stream of their own: a resumed run repeats it, and the
        # caller's random state is untouched
        seed = int(torch.randint(2**31, (), generator=self._view_generator)) + ranks.rank()
        with seeded(seed, self.device):
            set_training(self.student, self._frozen, self.config.batch_norm)
            with single_values_frozen(self.student):
                raw = self._forward(self.student, augment(images, self.config, self._generator))
        total = images.new_zeros(())
        info = {}
        for name, head in self.adapter.outputs.items():
            inside = None
            if head.within is not None:
                inside = self.adapter.outputs[head.within].inside(labels[head.within])
            term = masked_mean(head.loss(raw[name], labels[name]), masks[name], inside)
            total = total + head.coefficient(self.config) * term
            info[f"loss_{name}"] = term.detach()
            info[f"kept_{name}"] = masks[name].float().mean()
        if torch.is_grad_enabled() and not total.requires_grad:
            raise ModelError(
                "the outputs have no gradient, so nothing can be learned: let `forward` neither "
                "detach them nor run under torch.no_grad()."
            )
        info["kept"] = torch.stack([info[f"kept_{name}"] for name in labels]).mean()
        if self.config.l2sp:
            shift = l2_sp(self.parameters(), self._anchors)
            total = total + self.config.l2sp * shift
            info["l2sp"] = shift.detach()
        info["loss"] = total.detach()
        return total, info

    def step(self, images: Tensor) -> dict[str, Tensor]:
        """One iteration: loss, backward, AdamW with warm-up and cosine, teacher update.

        Where `torch.distributed` is at work, `images` are this rank's slice of the batch, of the
        same size on all ranks, and all end with the same weights.
        """
        rate = learning_rate(self.iteration, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        images = checked(images, self.adapter, self.device)
        info: dict[str, Tensor] = {}
        for part in images.chunk(self.config.accumulate):
            share = len(part) / len(images)
            loss, figures = self.loss(part)
            (share * loss).backward()
            for name, value in figures.items():
                info[name] = info[name] + share * value if name in info else share * value
        ranks.average_gradients(self.parameters())
        if ranks.count() > 1:
            ranks.average(info.values())
            if self.config.batch_norm == "batch":  # each rank has seen its slice
                ranks.average(b for b in self.student.buffers() if b.is_floating_point())
        if self.config.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        self.update_teacher()
        return info

    def refuse_blind(self, stop: EmbeddingDrift, images: Tensor) -> None:
        """Raise ConfigError where the drift of the bottleneck would be 0, whatever is learnt.

        Args:
            stop: the criterion.
            images: any batch that `loss` would take.
        """
        there = self.adapter.embedding_module(self.student) is not None
        if there and self.config.batch_norm == "batch":
            return
        images = checked(images, self.adapter, self.device)
        if not learns_before_bottleneck(self.adapter, self.student, images[:1]):
            why = "no parameter before the bottleneck adapts" if there else "no bottleneck is named"
            raise ConfigError(
                f"{stop!r} would see nothing: {why} "
                f"(trainable={self.config.trainable!r}). Let `embedding_module` name a later "
                "layer, or stop otherwise (FalseNegativeRate, or None for all iterations)."
            )

    def update_teacher(self) -> None:
        """What follows an optimiser step: the iteration is counted, and the teacher moves.

        It moves towards the student by the exponential moving average, at every
        `config.ema_every`-th iteration. `step` does this by itself; in a loop of your own, call it
        once after each step of your optimiser.
        """
        self.iteration += 1
        if self.iteration % self.config.ema_every == 0:
            update_teacher(self.teacher, self.student, self.config.ema_decay)

    def iterate(
        self, batches: Iterable[Tensor], judge: Judge | None = None
    ) -> Iterator[dict[str, Any]]:
        """Step through `batches` until `config.iterations`; `break` is early stopping.

        Yields the figures of each step. Every `config.validate_every` steps, and at the last, what
        `judge` measures is among them, unless the loss is not finite any more. The judge's first
        look is that at the initial network.
        """
        first = judge.look(self.adapter, self.initial) if judge else None
        for images in batches:
            if self.iteration >= self.config.iterations:
                return
            info: dict[str, Any] = dict(self.step(images))
            if judge and first and self.look_due and bool(info["loss"].isfinite()):
                info.update(judge.look(self.adapter, self.exported).row(first))
            yield info

    def fit(
        self, batches: Iterable[Tensor], *, stop: Stop | None = None, judge: Judge | None = None
    ) -> list[Info]:
        """Step through `batches` until `stop(run, info)` is true; return the figures of all steps.

        Monitors such as `EmbeddingDrift()` look at what `judge` has measured.

        Raises:
            ConfigError: `stop` is a monitor that `judge` does not measure, or that sees nothing.
        """
        if judge is not None and not isinstance(judge, Judge):
            raise ConfigError(f"judge is a {type(judge).__name__}: give Judge(images).")
        measured = [monitor.measure for monitor in judge.monitors] if judge else []
        if isinstance(stop, Monitor) and stop.measure not in measured:
            raise ConfigError(
                f"{stop!r} would never stop: give judge=Judge(images, monitors=[...]) that "
                "measures it."
            )
        history, looked = [], False
        if isinstance(stop, EmbeddingDrift):
            batches = iter(batches)
            begin = list(islice(batches, 1))
            for images in begin:
                self.refuse_blind(stop, images)
            batches = chain(begin, batches)
        for info in self.iterate(batches, judge):
            history.append({name: float(value) for name, value in info.items()})
            looked |= self.look_due
            if stop is not None and stop(self, history[-1]):
                break
        if judge is not None and not looked:
            logger.warning(
                "fit ended at iteration %d, before a look (one every %d): give more batches, or a "
                "smaller validate_every.",
                self.iteration,
                self.config.validate_every,
            )
        return history

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on bit for bit, but the initial weights.

        As with torch's own state dicts, the tensors are those of the run: save or copy them
        before the next step.
        """
        return {
            "config": self.config.to_dict(),
            "outputs": repr(self.adapter.outputs),
            "model": self._fingerprint,
            "iteration": self.iteration,
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "thresholds": {name: t.threshold for name, t in self.thresholds.items()},
            "generator": self._generator.get_state(),
            "view_generator": self._view_generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of a run with the same settings, heads and initial weights.

        Raises:
            CheckpointError: something differs; the message names it, and nothing is changed.
        """
        refuse_other_state(state, self.state_dict())
        try:
            refuse_damaged_optimizer(self.parameters(), state["optimizer"])
            thresholds = {
                name: state["thresholds"][name].to(self.device) for name in self.thresholds
            }
            generator = torch.Generator(self.device).set_state(state["generator"].cpu())
            view_generator = torch.Generator().set_state(state["view_generator"].cpu())
            iteration = int(state["iteration"])
            if iteration < 0:
                raise ValueError(f"its iteration is {iteration}")
        except Exception as error:
            raise CheckpointError(f"the saved run is damaged: {first_line(error)}") from None
        # from here on nothing can fail
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, threshold in thresholds.items():
            self.thresholds[name].threshold = threshold
        self._generator, self._view_generator = generator, view_generator
        self.iteration = iteration

    def _forward(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        # in single precision a caller's own autocast holds
        half = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            outputs = self.adapter.forward(model, images.clone())  # some work in place
        self.adapter.outputs.check(outputs, (images.shape[-2], images.shape[-1]))
        return {name: output.float() for name, output in outputs.items()}

    def _forward_teacher(self, images: Tensor) -> dict[str, Tensor]:
        return in_parts(lambda part: self._forward(self.teacher, part), images)

    @torch.no_grad()
    def _pseudo_labels(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Labels and reliability masks of the teacher, by head."""
        self.teacher.eval()  # a module of the caller's that holds it may have been set to train
        votes = view_votes(
            self._forward_teacher,
            images,
            self.adapter.outputs,
            drawn(self.symmetries, self.config.views, self._view_generator),
        )
        return labels_and_masks(votes, self.adapter.outputs, self.thresholds, self.config)
