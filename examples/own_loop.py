"""The method inside somebody's own training loop, with their optimiser and a supervised loss.

    python examples/own_loop.py

One crop has a mask, as drawn by hand; the others go without. Both losses train the same student.
"""

import os

import torch
from stardist.data import test_image_nuclei_2d
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader

from selfadapt import Config, EmbeddingDrift, SelfAdaptation, predict, prepare
from selfadapt_smp import SmpAdapter

adapter = SmpAdapter.from_pretrained("demo")
image, masks = test_image_nuclei_2d(return_mask=True)
prepared = prepare(adapter, image[None], "nuclei")
labelled = prepared[None, :, :128, :128]
mask = torch.from_numpy(masks[None, None, :128, :128] > 0).float()
corners = [(y, x) for y in (0, 128, 256, 384) for x in (0, 128, 256)][1:]
crops = [prepared[:, y : y + 128, x : x + 128] for y, x in corners]
held_out = prepared[:, :, 384:]

run = SelfAdaptation(adapter, Config(l2sp=1e-3))
optimizer = torch.optim.SGD(run.parameters(), lr=1e-3, momentum=0.9)
drift = EmbeddingDrift(threshold=0.5)
for epoch in range(int(os.environ.get("EPOCHS", "5"))):
    for images in DataLoader(crops, batch_size=4, shuffle=True):
        loss, info = run.loss(images)  # also sets the layers of the student to train as they must
        foreground = adapter.forward(run.student, labelled)["foreground"]
        supervised = binary_cross_entropy_with_logits(foreground, mask)
        optimizer.zero_grad()
        (loss + supervised).backward()
        optimizer.step()
        run.update_teacher()
    drift.reset()
    drift.update(predict(adapter, run.initial, held_out), predict(adapter, run.exported, held_out))
    print(
        f"epoch {epoch}: loss {info['loss']:.4f}, supervised {float(supervised.detach()):.4f}, "
        f"drift {drift.compute():.3f}"
    )
    if drift.compute() > drift.threshold:
        break
    adapter.with_model(run.exported).save("adapted")  # the last below the threshold
