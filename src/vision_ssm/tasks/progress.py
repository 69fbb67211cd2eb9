import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vision_ssm.tasks.recorder import RunRecorder


class TrainingProgress(Callback):
    """A bar over the whole run with loss, accuracy, images per second and time left, and a line per epoch.

    Each unreadable training image is named once, and counted at the end of the epoch.

    Args:
        console: Where to print.
        recorder: Counts images and times.
        uneven: The classes differ in size, so show balanced accuracy too.
    """

    def __init__(self, console: Console, recorder: RunRecorder, *, uneven: bool = False) -> None:
        self.console, self.recorder, self.uneven = console, recorder, uneven
        self.bar: Progress | None = None
        self.task: Any = None
        self._validation = ""
        self._named = self._counted = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Show the bar."""
        total = int(trainer.num_training_batches) * int(trainer.max_epochs or 1)
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
            transient=True,
        )
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        self.task = self.bar.add_task("train", total=total, completed=done, epoch=trainer.current_epoch + 1, figures="")
        self.bar.start()
        self._named = self._counted = len(trainer.datamodule.unreadable)
        if point := trainer.datamodule.resume_point():
            self.console.print(
                f"Note   resumed inside epoch {trainer.current_epoch + 1}: reading begins with {point[0]}, of which "
                f"{point[1]:,} images were used before and are left out",
                highlight=False,
                soft_wrap=True,
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the bar; the figures are means over the epoch so far."""
        for line in list(trainer.datamodule.unreadable.values())[self._named :]:
            self.console.print(f"{line}; another image takes its place", highlight=False, soft_wrap=True)
        self._named = len(trainer.datamodule.unreadable)
        if self.bar is None:
            return
        self.bar.advance(self.task)
        # Reading the figures waits for an accelerator, so not at every step.
        if self.console.is_terminal and (batch_idx % 20 == 0 or trainer.num_training_batches < 100):
            now = pl_module.training_figures()
            figures = f"loss {now['loss']:.3f}  accuracy {now['accuracy']:.1%}  {self._speed()}"
            self.bar.update(
                self.task, epoch=f"{trainer.current_epoch + 1}/{trainer.max_epochs}", figures=figures + self._validation
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Print the epoch's line."""
        now, figures = pl_module.training_figures(), trainer.callback_metrics
        accuracy = float(figures["val/accuracy"])
        width = int(math.log10(trainer.max_epochs or 1)) + 1
        balanced = f" balanced {float(figures['val/balanced_accuracy']):6.1%}" if self.uneven else ""
        skipped = f"  {pl_module.skipped} steps skipped, not finite" if pl_module.skipped else ""
        self._validation = f"  val {accuracy:.1%}"
        self.console.print(
            f"{trainer.current_epoch + 1:>{width}}/{trainer.max_epochs}"
            f"  train loss {now['loss']:.3f} acc {now['accuracy']:6.1%}"
            f"  val loss {float(figures['val/loss']):.3f} acc {accuracy:6.1%}{balanced}"
            f"  {self._speed()}{skipped}",
            highlight=False,
            soft_wrap=True,
        )
        unreadable, images = len(trainer.datamodule.unreadable), len(trainer.datamodule.splits.train)
        if unreadable > self._counted:
            where = self.recorder.folder.unreadable
            self.console.print(
                f"{unreadable:,} of {images:,} training images cannot be read, see {where}",
                highlight=False,
                soft_wrap=True,
            )
        self._counted = unreadable

    def _speed(self) -> str:
        """Images per second, and how long a step waits for them."""
        return f"{self.recorder.images_per_second:,.0f} images/s  data wait {self.recorder.data_wait_ms:,.1f} ms"

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Remove the bar."""
        self.on_train_end(trainer, pl_module)
