"""The method inside somebody's own training loop, with their optimiser and their loss.

python examples/own_loop.py
"""

import os

import torch
from stardist.data import test_image_nuclei_2d
from torch.utils.data import DataLoader

from selfadapt import Config, EmbeddingDrift, SelfAdaptation, predict, prepare
from selfadapt_smp import SmpAdapter

adapter = SmpAdapter.from_pretrained("demo")
image, _ = test_image_nuclei_2d(return_mask=True)
prepared = prepare(adapter, image[None], "nuclei")
crops = [prepared[:, y : y + 128, x : x + 128] for y in (0, 128, 256, 384) for x in (0, 128, 256)]
held_out = prepared[:, :, 384:]

run = SelfAdaptation(adapter, Config(l2sp=1e-3))
optimizer = torch.optim.SGD(run.parameters(), lr=1e-2, momentum=0.9)
drift = EmbeddingDrift(threshold=0.5)
for epoch in range(int(os.environ.get("EPOCHS", "5"))):
    for images in DataLoader(crops, batch_size=4, shuffle=True):
        loss, info = run.loss(images)
        my_loss = 0.01 * sum(p.abs().mean() for p in run.parameters())
        optimizer.zero_grad()
        (loss + my_loss).backward()
        optimizer.step()
        run.update_teacher()
    drift.reset()
    drift.update(predict(adapter, run.initial, held_out), predict(adapter, run.exported, held_out))
    print(f"epoch {epoch}: loss {info['loss']:.4f}, drift {drift.compute():.3f}")
    if drift.compute() > drift.threshold:
        break
