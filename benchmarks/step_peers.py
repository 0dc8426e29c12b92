"""One step as others take it, for `step.py`: torch-em's trainer, and the paper word by word."""

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from selfadapt import D4, Adapter, Classification, Config, Head, Symmetry
from selfadapt._schedule import learning_rate


class OneTensor(nn.Module):
    """A network whose outputs are one tensor, as torch-em wants it."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.network, self._forward = copy.deepcopy(adapter.model), adapter.forward
        self.network.requires_grad_(True)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat(list(self._forward(self.network, images).values()), 1)


class TurnedLabeler:
    """Pseudo labels for torch-em: the mean over views, mapped back one by one."""

    confidence_threshold = None

    def __init__(self, adapter: Adapter, symmetries: Sequence[Symmetry]) -> None:
        self._heads = list(adapter.outputs.items())
        self._steps = [adapter.outputs.step(name) for name, _ in self._heads]
        self._grid, self._symmetries = adapter.outputs.grid, symmetries

    def __call__(self, teacher: nn.Module, images: Tensor) -> tuple[Tensor, None]:
        total = 0.0
        for g in self._symmetries:
            parts = teacher(g.move(images, self._grid)).split(
                [h.channels for _, h in self._heads], 1
            )
            back = [
                head.transform(g.inverse, part, step)
                for (_, head), part, step in zip(self._heads, parts, self._steps, strict=True)
            ]
            total = total + torch.cat(back, 1)
        return total / len(self._symmetries), None


class TorchEm:
    """A step of torch-em's own `MeanTeacherTrainer`, without its logger.

    It has no strong augmentation (its loaders do that), no running percentile, no anchor to the
    initial weights, no policy for batch norm, and a squared error for every output.
    """

    def __init__(self, adapter: Adapter, config: Config) -> None:
        from torch_em.self_training import DefaultSelfTrainingLoss, MeanTeacherTrainer

        network = OneTensor(adapter)
        self._batches: list[tuple[Tensor, Tensor]] = []
        loss = DefaultSelfTrainingLoss(nn.MSELoss())
        self.trainer: Any = MeanTeacherTrainer(
            model=network,
            unsupervised_train_loader=self._batches,
            unsupervised_val_loader=self._batches,
            unsupervised_loss=loss,
            unsupervised_loss_and_metric=loss,
            pseudo_labeler=TurnedLabeler(adapter, _views(adapter, config)),
            momentum=config.ema_decay,
            name="step",
            optimizer=torch.optim.AdamW(
                network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
            ),
            device=next(network.parameters()).device,
            mixed_precision=False,
            logger=None,
        )
        self.trainer.logger, self.trainer.max_iteration = None, 10**9  # what `fit` would set
        self._progress = tqdm(disable=True)

    def __call__(self, images: Tensor) -> None:
        self._batches[:] = [(images, images)]
        trainer = self.trainer
        trainer._train_epoch_impl(self._progress, contextlib.nullcontext, trainer._backprop)


class Literal:
    """The paper's equations as one would write them down: views, images and weights in loops."""

    def __init__(self, adapter: Adapter, config: Config) -> None:
        self._adapter, self._config = adapter, config
        self.student = copy.deepcopy(adapter.model).requires_grad_(True)
        self.teacher = copy.deepcopy(adapter.model).requires_grad_(False)
        self._initial = copy.deepcopy(adapter.model).requires_grad_(False)
        self._optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self._thresholds: dict[tuple[str, int], float] = {}
        self._iteration = 0

    def __call__(self, images: Tensor) -> dict[str, float]:
        config, spec, forward = self._config, self._adapter.outputs, self._adapter.forward
        votes: dict[str, list[Tensor]] = {name: [] for name in spec}
        self.teacher.eval()
        for g in _views(self._adapter, config):
            with torch.no_grad():
                for name, raw in forward(self.teacher, g.move(images, spec.grid)).items():
                    values = spec[name].values(raw)
                    votes[name].append(spec[name].transform(g.inverse, values, spec.step(name)))
        self.student.eval()
        outputs = forward(self.student, torch.stack([self._augment(each) for each in images]))
        loss = torch.zeros((), device=images.device)
        for name, raw in outputs.items():
            head, stacked = spec[name], torch.stack(votes[name])
            label = head.pseudo_label(stacked, config.targets)
            mask = self._mask(name, head, stacked)
            loss = loss + head.coefficient(config) * (head.loss(raw, label) * mask).mean()
        for weight, start in zip(
            self.student.parameters(), self._initial.parameters(), strict=True
        ):
            loss = loss + config.l2sp * ((weight - start) ** 2).sum()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._iteration, config)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._iteration += 1
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                old.copy_(config.ema_decay * old + (1 - config.ema_decay) * new)
        return {"loss": loss.item()}

    def _augment(self, image: Tensor) -> Tensor:
        """Contrast, intensity, blur, noise of one image `[C, H, W]`."""
        strength = self._config.strength
        if not strength:
            return image
        one, two, three, four = (float(each) for each in torch.rand(4))
        image = gaussian_blur(image, 5, max(1e-3, strength * self._config.blur * one))
        mean = image.mean((1, 2), keepdim=True)
        image = (image - mean) * (1 + strength * self._config.contrast * (2 * two - 1)) + mean
        image = image + strength * self._config.brightness * image.std() * (2 * three - 1)
        return image + strength * self._config.noise * four * torch.randn_like(image)

    def _mask(self, name: str, head: Head, votes: Tensor) -> Tensor:
        """Reliable pixels: below a running percentile, of each class or channel."""
        config = self._config
        if isinstance(head, Classification):
            doubt, group = head.doubt(votes)
        else:
            doubt = votes.std(0, unbiased=False)
            group = torch.arange(doubt.shape[1], device=doubt.device)[None, :, None, None]
            group = group.expand_as(doubt)
        mask = torch.zeros_like(doubt, dtype=torch.bool)
        for number in range(head.groups):
            members = doubt[group == number].cpu().numpy()
            if not len(members):
                continue
            now, floor = (
                float(np.quantile(members, share, method="higher"))
                for share in (head.kept_share(config), config.keep_floor)
            )
            old = self._thresholds.get((name, number), now)
            running = config.mask_momentum * old + (1 - config.mask_momentum) * now
            self._thresholds[name, number] = running
            mask |= (group == number) & (doubt <= max(running, floor))
        return mask


def _views(adapter: Adapter, config: Config) -> Sequence[Symmetry]:
    return [g for g in D4 if g in adapter.outputs.symmetries][: config.views]
