"""The method inside of Lightning's Trainer: its optimiser, checkpoints and logging.

    pip install lightning
    python examples/lightning_loop.py

One device: student and teacher are no parts of the module that Lightning could wrap for several.
"""

import os

import lightning
import torch
from stardist.data import test_image_nuclei_2d
from torch.utils.data import DataLoader, RandomSampler

from selfadapt import Config, EmbeddingDrift, SelfAdaptation, predict, prepare
from selfadapt_smp import SmpAdapter


class SelfAdaptModule(lightning.LightningModule):
    def __init__(self, adapter, config, held_out):
        super().__init__()
        self.run = SelfAdaptation(adapter, config)
        self.held_out = held_out
        self.drift = EmbeddingDrift(threshold=0.5)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.run.parameters(), lr=2e-5)

    def training_step(self, images):
        loss, info = self.run.loss(images)
        self.log_dict(info)
        return loss  # plus a loss of your own

    def optimizer_step(self, *args, **kwargs):  # not after each batch: some are accumulated
        super().optimizer_step(*args, **kwargs)
        self.run.update_teacher()

    def on_train_epoch_end(self):
        run = self.run
        self.drift.reset()
        for image in self.held_out:
            first, now = (
                predict(run.adapter, network, image) for network in (run.initial, run.exported)
            )
            self.drift.update(first, now)
        self.log("drift", self.drift.compute())
        print(f"epoch {self.current_epoch}: drift {self.drift.compute():.3f}")
        if self.drift.compute() > self.drift.threshold:
            self.trainer.should_stop = True

    # the student is in them, so that trainer.fit(..., ckpt_path=...) goes on where it was
    def on_save_checkpoint(self, checkpoint):
        checkpoint["selfadapt"] = self.run.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.run.load_state_dict(checkpoint["selfadapt"])


if __name__ == "__main__":
    adapter = SmpAdapter.from_pretrained("demo")
    image, _ = test_image_nuclei_2d(return_mask=True)
    prepared = prepare(adapter, image[None], "nuclei")
    crops = [prepared[:, y : y + 128, x : x + 128] for y in (0, 128, 256, 384) for x in (0, 128)]
    sampler = RandomSampler(crops, replacement=True, num_samples=2 * len(crops))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = SelfAdaptModule(adapter, Config(device=device), [prepared[:, :, 384:]])
    trainer = lightning.Trainer(
        max_epochs=int(os.environ.get("EPOCHS", "5")),
        limit_train_batches=int(os.environ.get("ITERATIONS", "100")),  # at most, of an epoch
        accelerator=device, devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(crops, batch_size=4, sampler=sampler))
    adapter.with_model(module.run.exported).save("adapted")
    print({name: round(float(value), 4) for name, value in trainer.logged_metrics.items()})
