"""The method inside of an Engine of PyTorch-Ignite: its events, its checkpoints.

    pip install pytorch-ignite
    python examples/ignite_loop.py

The learning rate is small, as AdamW's first steps are as large as that, with no warm-up here.
"""

import os

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from stardist.data import test_image_nuclei_2d
from torch.utils.data import DataLoader

from selfadapt import Config, EmbeddingDrift, SelfAdaptation, predict, prepare
from selfadapt_smp import SmpAdapter

if __name__ == "__main__":
    adapter = SmpAdapter.from_pretrained("demo")
    image, _ = test_image_nuclei_2d(return_mask=True)
    prepared = prepare(adapter, image[None], "nuclei")
    crops = [prepared[:, y : y + 128, x : x + 128] for y in (0, 128, 256, 384) for x in (0, 128)]
    held_out = prepared[:, :, 384:]

    run = SelfAdaptation(adapter, Config())
    optimizer = torch.optim.AdamW(run.parameters(), lr=2e-5)
    drift = EmbeddingDrift(threshold=0.5)

    def update(engine, images):
        loss, info = run.loss(images)
        optimizer.zero_grad()
        loss.backward()  # plus a loss of your own
        optimizer.step()
        run.update_teacher()
        return {name: float(value) for name, value in info.items()}

    trainer = Engine(update)

    @trainer.on(Events.EPOCH_COMPLETED)
    def look(engine):
        drift.reset()
        drift.update(
            predict(adapter, run.initial, held_out), predict(adapter, run.exported, held_out)
        )
        loss = engine.state.output["loss"]
        print(f"epoch {engine.state.epoch}: loss {loss:.4f}, drift {drift.compute():.3f}")
        if drift.compute() > drift.threshold:
            engine.terminate()

    # a run has a state like a network's; `Checkpoint.load_objects` brings it back
    to_save = {"run": run, "optimizer": optimizer, "trainer": trainer}
    saver = Checkpoint(to_save, DiskSaver("checkpoints", require_empty=False), n_saved=1)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
    trainer.run(
        DataLoader(crops, batch_size=4, shuffle=True), max_epochs=int(os.environ.get("EPOCHS", "5"))
    )
    adapter.with_model(run.exported).save("adapted")
