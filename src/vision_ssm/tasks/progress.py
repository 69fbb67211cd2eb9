import math
import time
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress(Callback):
    """A bar over the whole run with loss, accuracy, images per second and time left, and a line per epoch.

    Args:
        console: Where to print.
        uneven: The classes differ in size, so show balanced accuracy too.
    """

    def __init__(self, console: Console, *, uneven: bool = False) -> None:
        self.console, self.uneven = console, uneven
        self.bar: Progress | None = None
        self.task: Any = None
        self._since, self._images, self._validation = 0.0, 0, ""

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
        self._since, self._images = time.monotonic(), 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Restart the clock of the epoch."""
        self._since, self._images = time.monotonic(), 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the bar; the figures are means over the epoch so far."""
        self._images += len(batch[1])
        if self.bar is None:
            return
        self.bar.advance(self.task)
        # Reading the figures waits for an accelerator, so not at every step.
        if self.console.is_terminal and (batch_idx % 20 == 0 or trainer.num_training_batches < 100):
            now = pl_module.training_figures()
            speed = self._images / max(time.monotonic() - self._since, 1e-9)
            figures = f"loss {now['loss']:.3f}  accuracy {now['accuracy']:.1%}  {speed:,.0f} images/s"
            self.bar.update(
                self.task, epoch=f"{trainer.current_epoch + 1}/{trainer.max_epochs}", figures=figures + self._validation
            )

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Note when training stopped for validation."""
        self._trained = time.monotonic() - self._since

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
            f"  {self._images / max(self._trained, 1e-9):,.0f} images/s{skipped}",
            highlight=False,
            soft_wrap=True,
        )

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Remove the bar."""
        self.on_train_end(trainer, pl_module)
