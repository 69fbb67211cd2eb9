"""What the whole trainer costs beside forward pass, backward pass and step of the optimizer, alternating with these.

python benchmarks/trainer.py --csv trainer.csv
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import timm
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from rich.console import Console
from torch import nn

from vision_ssm import recipes
from vision_ssm.data import ImageDataset, Splits
from vision_ssm.data.module import ImageData
from vision_ssm.engine.fit import make_trainer, quiet_lightning
from vision_ssm.engine.module import TrainingModule
from vision_ssm.engine.optimization import make_optimizer
from vision_ssm.engine.progress import TrainingProgress
from vision_ssm.engine.recorder import RunRecorder
from vision_ssm.engine.run_folder import RunFolder
from vision_ssm.tasks.classification import Classification, ClassifierSpec

CLASSES = 10
WARM_UP = 2  # steps that are not counted


class BareSteps(Callback):
    """Takes a bare step of a model of its own after each step of the trainer, and times both.

    Args:
        model: The model of the bare steps.
        config: How they are made.
    """

    def __init__(self, model: nn.Module, config: recipes.ClassificationConfig) -> None:
        self.model, self.clip = model, config.clip_grad
        self.optimizer = make_optimizer(model, config)
        self.loss = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.trainer_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self.since = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self.since = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop the clock of the trainer while the same batch is trained on barely."""
        begin = time.perf_counter()
        self.trainer_seconds.append(begin - self.since)
        loss = self.loss(self.model(batch["image"]), batch["label"])
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.since = time.perf_counter()
        self.bare_seconds.append(self.since - begin)


def measure(name: str, size: int, batch: int, steps: int, workers: int) -> dict[str, Any]:
    """Train one epoch of photographs in memory, in our trainer and barely."""
    changes = dict(mixup=0.0, cutmix=0.0, ema_decay=None, drop_path_rate=0.0)
    config = recipes.scratch(model=name, img_size=size, batch_size=batch, num_workers=workers, epochs=1, **changes)
    count = batch * (steps + WARM_UP)
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (size, size, 3), np.uint8)) for _ in range(count)]
    classes = tuple(map(str, range(CLASSES)))
    labels = {"label": np.arange(count) % CLASSES}
    images = ImageDataset(pictures.__getitem__, list(map(str, range(count))), labels, classes)
    spec = ClassifierSpec.from_config(config, classes)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES)
    task = Classification(model, spec, config)
    splits = Splits(images, images.subset([0]))
    data = ImageData(splits, task.train_transform, task.eval_transform, config)
    bare = BareSteps(copy.deepcopy(model).train(), config)
    with tempfile.TemporaryDirectory() as place, quiet_lightning():
        folder = RunFolder(Path(place))
        recorder = RunRecorder(folder, threading.Event())
        callbacks = [recorder, TrainingProgress(Console(quiet=True), recorder), bare]
        make_trainer(config, torch.device("cpu"), folder, callbacks).fit(TrainingModule(task, config), data)
    whole, plain = (statistics.median(times[WARM_UP:]) for times in (bare.trainer_seconds, bare.bare_seconds))
    row = dict(model=name, size=size, batch=batch, steps=steps, workers=workers)
    return row | dict(bare_ms=plain * 1e3, trainer_ms=whole * 1e3, overhead=whole / plain - 1)


def main() -> int:
    """Run the command line."""
    parser = common.Parser("What the trainer costs beside the bare training step.", seconds=None)
    parser.add_argument("--models", nargs="+", metavar="NAME", default=["vmamba_tiny"], help="timm names")
    parser.add_argument("--size", type=common.count, default=224, metavar="N", help="pixels")
    parser.add_argument("--batch", type=common.count, default=8, metavar="N", help="images in a step")
    parser.add_argument("--steps", type=common.count, default=20, metavar="N", help="steps that are timed")
    parser.add_argument("--workers", type=int, choices=(0, 1, 2), default=0, help="processes that load images")
    options = parser.parse_args()
    if options.quick:
        options.models, options.size, options.batch, options.steps = ["vmamba_atto"], 32, 2, 3
    unknown = [name for name in options.models if not timm.is_model(name)]
    if unknown:
        parser.error(f"timm knows no model named {', '.join(unknown)}")
    torch.set_num_threads(options.threads)
    common.console().print(common.machine_line())
    rows = [measure(name, options.size, options.batch, options.steps, options.workers) for name in options.models]
    columns = [("model", "{model}"), (">size", "{size}"), (">batch", "{batch}"), (">bare ms", "{bare_ms:.1f}")]
    columns += [(">trainer ms", "{trainer_ms:.1f}"), (">overhead", "{overhead:.1%}")]
    notes = [
        f"medians of {options.steps} steps each, in turns. bare: forward, backward, clipping, AdamW. trainer: the same "
        "and random crops, RandAugment, metrics, schedule, callbacks; without the end of the epoch.",
    ]
    common.show("The trainer beside the bare step", rows, columns, notes)
    if options.csv:
        common.write_csv(options.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
