"""The method inside of a loop of Hugging Face's accelerate, on one device or several.

    pip install accelerate
    python examples/accelerate_loop.py
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/accelerate_loop.py

The student is not handed to `prepare`, which would wrap it: gradients are averaged by hand instead.
"""

import os

import torch
from accelerate import Accelerator
from stardist.data import test_image_nuclei_2d
from torch.utils.data import DataLoader, RandomSampler

from selfadapt import Config, EmbeddingDrift, SelfAdaptation, predict, prepare
from selfadapt_smp import SmpAdapter

if __name__ == "__main__":
    accelerator = Accelerator()  # mixed_precision="bf16", or Config(precision="bfloat16")
    adapter = SmpAdapter.from_pretrained("demo")
    image, _ = test_image_nuclei_2d(return_mask=True)
    prepared = prepare(adapter, image[None], "nuclei")
    crops = [prepared[:, y : y + 128, x : x + 128] for y in (0, 128, 256, 384) for x in (0, 128)]
    held_out = prepared[:, :, 384:]
    epochs, batches = int(os.environ.get("EPOCHS", "5")), int(os.environ.get("ITERATIONS", "8"))

    run = SelfAdaptation(adapter, Config(device=str(accelerator.device)))
    optimizer = torch.optim.AdamW(run.parameters(), lr=2e-5)
    sampler = RandomSampler(crops, replacement=True, num_samples=4 * batches)
    loader = DataLoader(crops, batch_size=4, sampler=sampler)
    optimizer, loader = accelerator.prepare(optimizer, loader)
    accelerator.register_for_checkpointing(run)  # save_state and load_state keep it
    drift = EmbeddingDrift(threshold=0.5)
    for epoch in range(epochs):
        for images in loader:
            with accelerator.autocast():
                loss, info = run.loss(images)  # plus a loss of your own
            optimizer.zero_grad()
            accelerator.backward(loss)
            for parameter in run.parameters():
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
            optimizer.step()
            run.update_teacher()
        drift.reset()
        drift.update(
            predict(adapter, run.initial, held_out), predict(adapter, run.exported, held_out)
        )
        accelerator.print(f"epoch {epoch}: loss {info['loss']:.4f}, drift {drift.compute():.3f}")
        if drift.compute() > drift.threshold:
            break
    weights = torch.cat([parameter.detach().flatten() for parameter in run.parameters()])
    everyone = accelerator.gather(weights[None])
    apart = float((everyone - everyone[:1]).abs().max())
    accelerator.print(f"{accelerator.num_processes} process(es), students differ by {apart}")
    accelerator.save_state("checkpoint")
    if accelerator.is_main_process:
        adapter.with_model(run.exported).save("adapted")
    accelerator.end_training()
