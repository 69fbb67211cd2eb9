import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from vision_ssm.engine.recorder import RunRecorder


class TrainingProgress(Callback):
    """A bar over the whole run with the means of the epoch, images per second and time left, and a line per epoch.

    Each unreadable training image is named once, and counted at the end of the epoch.

    Args:
        console: Where to print.
        recorder: Counts images and times.
    """

    def __init__(self, console: Console, recorder: RunRecorder) -> None:
        self.console, self.recorder = console, recorder
        self.bar: Progress | None = None
        self._row: Any = None
        self._validation = ""
        self._named = self._counted = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Show the bar."""
        total = int(trainer.num_training_batches) * int(trainer.max_epochs or 1)
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=12, table_column=Column(min_width=4)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(min_width=5)),
            TextColumn("left {task.fields[metrics]}", table_column=Column(no_wrap=True, ratio=1)),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        epoch = trainer.current_epoch + 1
        self._row = self.bar.add_task("train", total=total, completed=done, epoch=epoch, metrics="")
        self.bar.start()
        self._named = self._counted = len(trainer.datamodule.unreadable)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the bar."""
        for line in list(trainer.datamodule.unreadable.values())[self._named :]:
            self.console.out(f"{line}; another image takes its place", highlight=False)
        self._named = len(trainer.datamodule.unreadable)
        if self.bar is None:
            return
        self.bar.advance(self._row)
        # Reading the means waits for an accelerator, so not at every step.
        if self.console.is_terminal and (batch_idx % 20 == 0 or trainer.num_training_batches < 100):
            shown = f"{_shown(pl_module.epoch_means(), pl_module.task.epoch_metrics)} {self._rate()}"
            epoch = f"{trainer.current_epoch + 1}/{trainer.max_epochs}"
            self.bar.update(self._row, epoch=epoch, metrics=shown + self._validation)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Print the epoch's line."""
        names = pl_module.task.epoch_metrics
        values = {
            name.removeprefix("val/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        width = int(math.log10(trainer.max_epochs or 1)) + 1
        skipped = f"  {pl_module.skipped} steps skipped, not finite" if pl_module.skipped else ""
        self._validation = f"  val {_shown(values, (pl_module.task.monitor,))}"
        self.console.out(
            f"{trainer.current_epoch + 1:>{width}}/{trainer.max_epochs}"
            f"  train {_shown(pl_module.epoch_means(), names)}  val {_shown(values, names)}  {self._speed()}{skipped}",
            highlight=False,
        )
        unreadable, images = len(trainer.datamodule.unreadable), len(trainer.datamodule.splits.train)
        if unreadable > self._counted:
            where = self.recorder.folder.unreadable
            self.console.out(
                f"{unreadable:,} of {images:,} training images cannot be read, see {where}", highlight=False
            )
        self._counted = unreadable

    def _speed(self) -> str:
        """Images per second, and how long a step waits for them."""
        return f"{self._rate()}  data wait {self.recorder.data_wait_ms:,.1f} ms"

    def _rate(self) -> str:
        rate = self.recorder.images_per_second
        return f"{rate:,.{0 if rate >= 10 else 1}f} images/s"

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Remove the bar."""
        self.on_train_end(trainer, pl_module)


def _shown(values: Mapping[str, float], names: tuple[str, ...]) -> str:
    parts = [
        f"{name} {values[name]:.3f}" if name.startswith("loss") else f"{name.replace('_', ' ')} {values[name]:6.1%}"
        for name in names
        if name in values
    ]
    return " ".join(parts)
