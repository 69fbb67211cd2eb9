import hashlib
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from vision_ssm.data.module import ImageData
from vision_ssm.engine.files import atomic_write, write_csv, write_text
from vision_ssm.engine.module import TrainingModule
from vision_ssm.engine.run_folder import RunFolder, rank
from vision_ssm.engine.weights import save_weights
from vision_ssm.errors import InputError

_DIGEST = 32  # bytes of a digest

# What a recorder counts in each epoch, and keeps in checkpoints.
_COUNTED = ("images", "seconds", "steps", "waited")


class Stopped(Exception):
    """Training was stopped on request, after its state was saved."""


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C (or SIGTERM) into a request to stop; the second one interrupts at once."""
    stop = threading.Event()

    def request(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, and never runs code from one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint`, replacing `path` only once it is on disk."""
        with atomic_write(Path(path)) as file:
            torch.save(checkpoint, file)
            file.write(_digest(file, file.tell()))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read tensors and plain values only.

        Raises:
            InputError: The file is damaged, or holds anything else.
        """
        try:
            with Path(path).open("rb") as file:
                file.seek(-_DIGEST, os.SEEK_END)
                if file.read() != _digest(file, file.tell() - _DIGEST):
                    raise ValueError("its digest differs")
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise InputError(f"cannot resume: {path} is damaged or was not written by a run") from error


class RunRecorder(Checkpoint):
    """Keeps a run folder up to date: metrics, best and last weights, state to resume from. Writes to loggers.

    The first of several processes writes; all stop together when one of them is asked to.

    Args:
        folder: The run folder.
        stop: Once set, the state is saved after the current step and `Stopped` is raised.
        save_minutes: How often to save the state inside long epochs.
    """

    def __init__(self, folder: RunFolder, stop: threading.Event, *, save_minutes: float = 10.0) -> None:
        self.folder, self.stop, self.save_seconds = folder, stop, 60 * save_minutes
        self.history: list[dict[str, Any]] = []
        self.images = self.steps = 0
        self.seconds = self.waited = 0.0
        self._since = self._saved = self._ready = 0.0

    @property
    def state_key(self) -> str:
        """The name under which the checkpoint keeps this callback's state."""
        return "run_recorder"

    def state_dict(self) -> dict[str, Any]:
        """The table of metrics, and what of the current epoch has been counted."""
        return {"history": self.history} | {name: getattr(self, name) for name in _COUNTED}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a stored table."""
        self.history = list(state_dict["history"])
        for name in _COUNTED:
            setattr(self, name, state_dict[name])

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clocks."""
        if threading.current_thread() is threading.main_thread():
            # In place of Lightning's handler, which interrupts several processes at different steps.
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
        self._since = self._saved = self._ready = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Restart the epoch's clocks."""
        self._since = self._ready = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count the time since the last step was over: Lightning only fetched the batch in it."""
        self.steps += 1
        self.waited += time.monotonic() - self._ready

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count images; save inside the epoch if asked to stop or if it takes long."""
        now = time.monotonic()
        self.images += len(batch["id"]) * trainer.world_size
        self.seconds, self._since = self.seconds + now - self._since, now
        self._ready = now
        if batch_idx + 1 == trainer.num_training_batches:
            return  # the end of the epoch follows and saves
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # checkpoints hold no gradients
        if _any(trainer, self.stop.is_set() or now - self._saved > self.save_seconds):
            self._save(trainer, pl_module)
            if _any(trainer, self.stop.is_set()):
                raise Stopped
        self._ready = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Add a row of metrics and save."""
        values = {name.replace("/", "_"): float(value) for name, value in trainer.callback_metrics.items()}
        row: dict[str, Any] = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "lr": max(group["lr"] for group in trainer.optimizers[0].param_groups),
        }
        row |= {f"train_{name}": value for name, value in pl_module.epoch_means().items()}
        row |= {name: value for name, value in values.items() if name.startswith("val_")}
        row |= {"skipped_steps": pl_module.skipped}
        row |= {"images_per_second": round(self.images_per_second, 1), "data_wait_ms": round(self.data_wait_ms, 2)}
        for logger in trainer.loggers:
            logger.log_metrics({name: value for name, value in row.items() if name != "epoch"}, step=row["epoch"])
            logger.save()
        monitor = pl_module.task.monitor
        best = max((rank(r, monitor) for r in self.history), default=None)
        self.history.append(row)
        self.images, self.seconds, self.steps, self.waited = 0, 0.0, 0, 0.0
        if trainer.is_global_zero and (best is None or rank(row, monitor) > best):
            _save_weights(self.folder.best, pl_module)
        self._save(trainer, pl_module)
        if _any(trainer, self.stop.is_set()) and trainer.max_epochs != trainer.current_epoch + 1:
            raise Stopped

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave the list of unreadable images, which may be the reason."""
        if trainer.is_global_zero:
            self._write_unreadable(trainer.datamodule)

    @property
    def images_per_second(self) -> float:
        """Speed of training in the epoch so far."""
        return self.images / max(self.seconds, 1e-9)

    @property
    def data_wait_ms(self) -> float:
        """Mean time that a step of the epoch waited for its batch."""
        return 1000 * self.waited / max(self.steps, 1)

    def write_metrics(self) -> None:
        """Write the table of metrics as CSV."""
        write_csv(self.folder.metrics, self.history)

    def _write_unreadable(self, data: ImageData) -> None:
        if data.unreadable:
            lines = (f"{name}\t{why}\n" for name, why in sorted(data.unreadable.items()))
            write_text(self.folder.unreadable, "".join(lines))

    def _save(self, trainer: Trainer, module: TrainingModule) -> None:
        module.gather_sums()
        trainer.datamodule.gather()
        # Weights first: a run that is killed after its last state was saved has no step left that would write them.
        if trainer.is_global_zero:
            _save_weights(self.folder.last, module)
        trainer.save_checkpoint(self.folder.state)
        if trainer.is_global_zero:
            self.write_metrics()
            self._write_unreadable(trainer.datamodule)
        self._saved = time.monotonic()


def _digest(file: BinaryIO, size: int) -> bytes:
    """The SHA-256 digest of the first bytes of a file, which stands at their end afterwards."""
    digest, left = hashlib.sha256(), size
    file.seek(0)
    while left and (block := file.read(min(left, 2**20))):
        digest.update(block)
        left -= len(block)
    return digest.digest()


def _save_weights(path: Path, module: TrainingModule) -> None:
    save_weights(path, module.evaluated_model.state_dict(), module.task.name, module.task.spec)


def _any(trainer: Trainer, decision: bool) -> bool:
    """Whether one of the processes says so; all have to ask."""
    return trainer.strategy.reduce_boolean_decision(decision, all=False)
