from typing import Any

import lightning
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vision_ssm.data import seeded
from vision_ssm.engine.nonfinite import RunningStatistics, first_in_forward, first_in_gradients
from vision_ssm.engine.optimization import LearningRate, make_optimizer
from vision_ssm.engine.task import Batch, Task
from vision_ssm.errors import InputError
from vision_ssm.recipes.config import OptimConfig

_STEP = 2  # keeps these draws apart from those of the data module


class TrainingModule(lightning.LightningModule):
    """Trains any task.

    All draws of a training step are seeded by (seed, epoch, batch, process), so a run that is stopped and resumed
    takes the same course as one that is not.

    A step whose loss or gradient is not finite is skipped: weights, optimizer, average and batch norms stay as they
    are. With a loss scale (16-mixed) that holds for the loss alone, because the scale finds its way by gradients that
    overflow. `skipped` counts these steps of the epoch.

    The metrics of the task's evaluation are logged under `val/`; `epoch_means` has those of training.

    Args:
        task: What to train.
        optim: Optimizer, schedule and averaging. Its learning rates are taken as they are.
        seed: Decides all random draws of the training steps.
    """

    def __init__(self, task: Task, optim: OptimConfig, seed: int = 0) -> None:
        super().__init__()
        self.task, self.optim, self.seed = task, optim, seed
        self.model = task.model
        self.ema = ModelEmaV3(self.model, optim.ema_decay, use_warmup=optim.ema_warmup) if optim.ema_decay else None
        if self.ema is not None:
            self.ema.requires_grad_(False)  # or several processes would wait for its gradients
        self.skipped = self._skipped_in_a_row = 0
        self._finite: Tensor | None = None
        self._running = RunningStatistics(self.model)
        # Sums over the images of the epoch so far and, last, their number; checkpoints hold them.
        self._names: list[str] = []
        self._sums = torch.zeros(1)
        self.val_metrics = task.metrics()

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that validation and weights files use: the moving average if there is one."""
        return self.ema.module if self.ema is not None else self.model

    def on_fit_start(self) -> None:
        """Bring what is no part of the model to its device."""
        self.task.start(self.device)
        self._sums = self._sums.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        if self._finite is None:  # the first batch of a step
            self._running.keep()
        loss, metrics = self._forward(batch, batch_idx)
        finite = loss.detach().isfinite()
        self._finite = finite if self._finite is None else self._finite & finite
        self._batch = batch, batch_idx
        self._names, count = list(metrics), len(batch["id"])
        sums = torch.stack([value.detach().float() * count for value in metrics.values()] + [loss.new_tensor(count)])
        previous = self._sums if len(self._sums) == len(sums) else torch.zeros_like(sums)
        self._sums = previous + torch.where(sums.isfinite().all(), sums, 0)
        return loss

    def _forward(self, batch: Batch, batch_idx: int) -> tuple[Tensor, dict[str, Tensor]]:
        with seeded(self.seed, _STEP, self.current_epoch, batch_idx, self.global_rank, device=self.device):
            losses, metrics = self.task.training_step(self.model, batch)
        loss = torch.stack(list(losses.values())).sum() if len(losses) > 1 else next(iter(losses.values()))
        parts = {f"loss_{name}": value for name, value in losses.items()} if len(losses) > 1 else {}
        return loss, {"loss": loss, **parts, **metrics}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the steps skipped, the sums of the epoch, and what the task wants to be the same when resumed."""
        checkpoint["constants"] = self.task.constants()
        checkpoint["skipped"] = self.skipped, self._skipped_in_a_row
        checkpoint["sums"] = self._names, self._sums

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue with the same constants only.

        Raises:
            InputError: The task has others.
        """
        constants = self.task.constants()
        if changed := [name for name, value in constants.items() if checkpoint["constants"].get(name) != value]:
            raise InputError(f"cannot resume: {' and '.join(changed)} changed since the run was started")
        self.skipped, self._skipped_in_a_row = checkpoint["skipped"]
        self._names, self._sums = checkpoint["sums"]
        if self.global_rank:  # the first process has the sums of all
            self._sums = torch.zeros_like(self._sums)

    def on_train_epoch_start(self) -> None:
        """Reset the sums of the epoch (not called when an epoch is resumed)."""
        self._sums = torch.zeros_like(self._sums)
        self.skipped = 0

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Take the step, if loss and gradient are finite, then update the moving average.

        Raises:
            InputError: Too many steps in a row are not finite.
        """
        loss = optimizer_closure()
        finite = self._is_finite()
        self._finite = None
        if not self.trainer.strategy.reduce_boolean_decision(finite):
            self._skip()
            optimizer.zero_grad()
            return
        self._skipped_in_a_row = 0
        super().optimizer_step(epoch, batch_idx, optimizer, lambda: loss)
        if self.ema is not None:
            # Without a step number timm's average begins with the first weights, as the published ones do.
            self.ema.update(self.model, step=self.global_step if self.optim.ema_warmup else None)

    def _is_finite(self) -> bool:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if not self._finite or (scaler is not None and scaler.get_scale() >= 1):
            return bool(self._finite)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return bool(torch.nn.utils.get_total_norm(gradients).isfinite())

    def _skip(self) -> None:
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.optim.max_skipped:
            raise InputError(
                f"training diverges: {self._skipped_in_a_row} steps in a row, up to step {self.global_step + 1}, "
                f"have no finite loss or gradient; the first non-finite value is in {self._not_finite()}; "
                "try a lower --lr, more --warmup-epochs or --precision 32-true (the limit is --max-skipped)"
            )
        self._running.put_back()

    def _not_finite(self) -> str:
        with self.trainer.precision_plugin.forward_context():
            found = first_in_forward(self.model, lambda: self._forward(*self._batch))
        return found or first_in_gradients(self.model) or "the loss"

    def epoch_means(self) -> dict[str, float]:
        """Means of losses and metrics over the images of the epoch so far."""
        *sums, images = self._sums.tolist()
        return {name: value / max(images, 1) for name, value in zip(self._names, sums, strict=True)}

    def gather_sums(self) -> None:
        """Add up the sums of all processes in the first one; all have to call it."""
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(self._sums)
            if self.global_rank:
                self._sums.zero_()

    def on_validation_start(self) -> None:
        """Let several processes validate the same model: that with the first one's running statistics."""
        self.gather_sums()
        if self.trainer.world_size > 1:
            for buffer in (*self.model.buffers(), *self.evaluated_model.buffers()):
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the metrics with one batch."""
        self.task.evaluation_step(self.evaluated_model, batch, self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the epoch."""
        evaluation = self.task.evaluation(self.val_metrics.compute(), [])
        self.log_dict({f"val/{name}": value for name, value in evaluation.metrics().items()}, logger=False)
        self.val_metrics.reset()

    def configure_optimizers(self) -> Any:
        """Timm's optimizer and its schedule, which is set at every step."""
        optimizer = make_optimizer(self.model, self.optim)
        steps = int(self.trainer.estimated_stepping_batches) // self.optim.epochs
        self.learning_rate = LearningRate(optimizer, self.optim, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.learning_rate.scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Set the learning rate for the next step."""
        self.learning_rate.set(self.global_step)
