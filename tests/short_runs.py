"""Runs of a few seconds, and how they are interrupted."""

import signal

import vision_ssm.engine.fit as engine
from vision_ssm.engine.recorder import RunRecorder

# Of a run's configuration: a small model that torch computes alone.
SHORT = dict(
    model="test_convnext",
    img_size=32,
    epochs=2,
    batch_size=4,
    num_workers=0,
    device="cpu",
    lr=3e-3,
    warmup_epochs=0,
)

# Of a detector's.
DETECTOR = dict(
    model="vmamba_atto",
    model_args={"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    width=16,
    box_samples=32,
    short_sides=(64, 80),
    long_side=128,
    test_size=(96, 72),
    epochs=2,
    batch_size=2,
    num_workers=0,
    device="cpu",
    lr=2e-3,
    warmup_epochs=0,
)

# Of a segmenter's.
SEGMENTER = dict(
    model="vmamba_atto",
    model_args={"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    width=16,
    test_size=(96, 72),
    crop_size=64,
    epochs=2,
    batch_size=2,
    num_workers=0,
    device="cpu",
    lr=4e-3,
    warmup_epochs=0,
)

# Of Lightning's trainer, without a file or a word.
QUIET = dict(
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)


def interrupt(monkeypatch, epoch, batch):
    """Press Ctrl-C while a batch is trained on."""

    class Interrupted(RunRecorder):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch_, batch_idx):
            if (trainer.current_epoch, batch_idx) == (epoch, batch):
                signal.raise_signal(signal.SIGINT)
            super().on_train_batch_end(trainer, pl_module, outputs, batch_, batch_idx)

    monkeypatch.setattr(engine, "RunRecorder", Interrupted)
