"""Adapt the decoder of a UNETR as micro-SAM uses it; its image encoder stays as it is.

    python examples/unetr_decoder.py

Architecture, targets, loss and watershed are those of micro-SAM, from torch-em: foreground and the
distances to centre and boundary. Its encoder is the SAM vision transformer of timm, but a small
one, for tiles of 128 pixels instead of 1024, and trained with the decoder for a minute, on half of
a real image of the package stardist. Weights of SAM or micro-SAM were not run. The other half, with
another contrast, blurred and noisy, plays the new microscope.

With WAY=lora, layers of low rank adapt in the encoder, too. At the end it says what a step of each
way costs; COST_STEPS=0 leaves that out.
"""

import copy
import os
import statistics
import time

import numpy as np
import torch
from scipy import ndimage
from stardist.data import test_image_nuclei_2d
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn
from torch_em.loss import DiceBasedDistanceLoss
from torch_em.model import UNETR
from torch_em.transform.label import PerObjectDistanceTransform
from torch_em.util.segmentation import watershed_from_center_and_boundary_distances

from selfadapt import Adapter, Binary, Config, OutputSpec, Scalar, SelfAdaptation, adapt, match
from selfadapt import normalize_percentile as percentiles

DECODER = r"^(?!encoder\.)"
"""Of the parameters' names: all but those of the encoder."""
LORA = r"^(?!encoder\.)|\.qkv\.(down|up)\."
"""The same, and those of `LoRA`."""


class LoRA(nn.Module):
    """A linear layer that stays as it is, plus one of low rank, which starts at zero."""

    def __init__(self, linear, rank=4):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, tokens):
        return self.linear(tokens) + self.up(self.down(tokens))


def add_lora(model, rank=4):
    """Put one around the queries, keys and values of each block of the encoder."""
    for block in model.encoder.blocks:
        block.attn.qkv = LoRA(block.attn.qkv, rank)
    return model


class UnetrAdapter(Adapter):
    channels = 1
    outputs = OutputSpec(
        foreground=Binary(logits=False),
        centre=Scalar(within="foreground"),  # as it was trained
        boundary=Scalar(within="foreground"),
    )

    def __init__(self, model):
        self.model = model
        self.fixed_size = model.encoder.img_size
        # they refuse crops that the augmentation has made too dark
        model.perform_range_checks = False

    def forward(self, model, images):
        return self.outputs.split(model(images.clamp(0, 255).expand(-1, 3, -1, -1)))

    def embedding_module(self, model):
        return model.base  # follows the encoder, and moves where that is frozen

    def normalise(self, image, whole):
        return 255 * percentiles(image, self.input.low, self.input.high, whole).clip(0, 1)

    def decode(self, outputs, size):
        foreground, centre, boundary = (outputs[name][0].numpy() for name in self.outputs)
        return watershed_from_center_and_boundary_distances(
            centre, boundary, foreground, distance_smoothing=1.0, min_size=15
        ).astype(np.int32)


def network():
    """micro-SAM's layout in small; `embed_dim=768, depth=12, img_size=1024` is that of vit_b."""
    side = 128
    encoder = VisionTransformerSAM(
        img_size=side, embed_dim=96, depth=4, num_heads=4, neck_chans=64, use_rel_pos=True,
        window_size=0, num_classes=0, global_pool="",
    )  # fmt: skip
    encoder.img_size = side
    return UNETR(
        side, encoder=encoder, embed_dim=64, out_channels=3, final_activation="Sigmoid",
        use_sam_stats=True, use_skip_connection=False, initial_features=8,
    )  # fmt: skip


def nuclei():
    """Image and labels of one microscope, and of one with another contrast, blur and noise."""
    image, labels = test_image_nuclei_2d(return_mask=True)
    image, labels = (image / image.max()).astype(np.float32), labels.astype(np.int32)
    rng = np.random.default_rng(0)
    new = ndimage.gaussian_filter(image[:, 256:], 1) ** 0.7 + rng.normal(0, 0.03, (512, 256))
    return image[:, :256], labels[:, :256], new.astype(np.float32), labels[:, 256:]


def train(adapter, image, labels, steps):
    """On random crops, flipped and turned, by torch-em's loss."""
    torch.manual_seed(0)
    targets = PerObjectDistanceTransform()(labels)
    everything = torch.from_numpy(np.concatenate([adapter.prepare(image[None]), targets]))
    loss_of = DiceBasedDistanceLoss(mask_distances_in_bg=True)
    optimizer = torch.optim.AdamW(adapter.model.parameters(), 1e-3)
    adapter.model.train()
    for _ in range(steps):
        batch = []
        for _ in range(4):
            y, x = (int(torch.randint(n - 127, ())) for n in everything.shape[1:])
            crop = everything[:, y : y + 128, x : x + 128].rot90(int(torch.randint(4, ())), (1, 2))
            batch.append(crop.flip(1) if torch.rand(()) < 0.5 else crop)
        batch = torch.stack(batch)
        outputs = torch.cat(list(adapter.forward(adapter.model, batch[:, :1]).values()), 1)
        loss = loss_of(outputs, batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapter.model.eval()


def held(adapter, config):
    """Bytes that training holds: for backward, gradients, and AdamW's two averages."""
    run = SelfAdaptation(adapter, config)
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run.loss(batch_of(adapter, config).to(run.device))
    return sum(storages.values()) + 3 * sum(4 * p.numel() for p in run.parameters())


def batch_of(adapter, config):
    return 255 * torch.rand(config.batch_size, 1, adapter.fixed_size, adapter.fixed_size)


def seconds(ways, steps):
    """Processor time of each step of each way; they take turns, so that all meet the same load."""
    runs = {way: SelfAdaptation(*settings) for way, settings in ways.items()}
    times = {way: [] for way in ways}
    for step in range(steps + 1):  # the first warms up
        for way, run in runs.items():
            batch = batch_of(run.adapter, run.config)
            start = time.process_time()
            run.step(batch)
            if step:
                times[way].append(time.process_time() - start)
    return times


def compare(adapter, with_lora, steps):
    """Lines of a table: what a step of each way costs, as a share of adapting everything."""
    ways = {
        "everything": (adapter, Config(batch_size=4)),
        "the decoder": (adapter, Config(batch_size=4, trainable=DECODER)),
        "LoRA and decoder": (with_lora, Config(batch_size=4, trainable=LORA)),
    }
    times, memory = seconds(ways, steps), {way: held(*ways[way]) for way in ways}
    everything = times["everything"]
    for way, of_steps in times.items():
        shares = [one / first for one, first in zip(of_steps, everything, strict=True)]
        low, _, high = statistics.quantiles(shares, n=4) if steps > 1 else 3 * shares
        yield (
            f"| {way} | {statistics.median(shares):.2f} ({low:.2f} to {high:.2f}) | "
            f"{memory[way] / memory['everything']:.2f} |"
        )
    encoder = sum(p.numel() for p in adapter.model.encoder.parameters())
    parameters = sum(p.numel() for p in adapter.model.parameters())
    yield (
        f"{parameters:,} parameters, {encoder:,} of them the encoder's; {steps} steps of "
        f"{statistics.median(everything):.2f} s on {torch.get_num_threads()} thread(s)"
    )


if __name__ == "__main__":
    iterations = int(os.environ.get("ITERATIONS", "100"))
    old, labels, new, truth = nuclei()
    adapter = UnetrAdapter(network())
    train(adapter, old, labels, steps=5 * iterations)
    with_lora = UnetrAdapter(add_lora(copy.deepcopy(adapter.model)))  # gives the same, so far
    way = os.environ.get("WAY", "decoder")
    start, trainable = (with_lora, LORA) if way == "lora" else (adapter, DECODER)
    looks = min(iterations, 12)  # few where it runs for a moment only
    config = Config(
        iterations=iterations, trainable=trainable, candidates="default", validation_images=looks
    )
    # the scale is known: no calibration
    result = adapt(start, new, config=config, calibrate=False)
    print(result.reason)
    result.adapter.save("adapted.pt")
    for when, one in (("before", adapter), ("after", result.adapter)):
        found = one.segment(new)
        print(f"{when}: AP at IoU 0.5 {match(truth, found)[0].ap:.2f}, {found.max()} nuclei")
    if steps := int(os.environ.get("COST_STEPS", "10")):
        print(*compare(adapter, with_lora, steps), sep="\n")
