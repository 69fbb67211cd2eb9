from collections.abc import Callable
from typing import Any

import lightning
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from vision_ssm.data import seeded
from vision_ssm.errors import InputError
from vision_ssm.recipes import Augmentation, Distillation, Optimisation
from vision_ssm.tasks.distillation import Teacher, distillation_loss
from vision_ssm.tasks.evaluation import balanced_accuracy
from vision_ssm.tasks.nonfinite import RunningStatistics, first_in_forward, first_in_gradients
from vision_ssm.tasks.optimisation import LearningRate, make_optimizer
from vision_ssm.tasks.sharding import ModelAverage, local, shard

_STEP = 2  # keeps these draws apart from those of the data module


class ClassificationTask(lightning.LightningModule):
    """Trains an image classifier.

    Mixup and stochastic depth draw from generators seeded by (seed, epoch, batch, process), so a run that is stopped
    and resumed takes the same course as one that is not. If the model has a scalar `aux_loss` after a training
    forward, it is added to the loss.

    A step whose loss or gradient is not finite is skipped: weights, optimiser, average and batch norms stay as they
    are. With a loss scale (16-mixed) that holds for the loss alone, because the scale finds its way by gradients that
    overflow. `skipped` counts these steps of the epoch.

    Logged once per epoch: `train/loss`, `train/accuracy` (against the larger share of a mixed target),
    `val/loss`, `val/accuracy`, `val/balanced_accuracy` and, with more than five classes, `val/top5_accuracy`.

    Args:
        model: Maps (batch, 3, H, W) images to (batch, num_classes) logits.
        num_classes: Number of classes.
        augment: Only the mixing of images is done here.
        optim: Optimiser, schedule, loss and averaging. Its rates are taken as they are.
        epochs: Length of the schedule.
        seed: Decides all random draws of the training steps.
        teacher: Whose answers to learn too. A model with two classifiers (one that has timm's
            `set_distilled_training`) learns them with the second, any other with the only one.
        distill: How to learn them.
        max_skipped: How many steps in a row may be skipped before training stops.
    """

    train_sums: Tensor

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        *,
        augment: Augmentation | None = None,
        optim: Optimisation | None = None,
        epochs: int = 100,
        seed: int = 0,
        teacher: Teacher | None = None,
        distill: Distillation | None = None,
        max_skipped: int = 10,
    ) -> None:
        super().__init__()
        augment, self.optim = augment or Augmentation(), optim or Optimisation()
        self.epochs, self.seed = epochs, seed
        self.teacher, self.distill = teacher, distill or Distillation()
        self.model = model
        self.teacher_fingerprint = None if teacher is None else teacher.fingerprint()
        return_both: Callable[[bool], None] | None = getattr(model, "set_distilled_training", None)
        if teacher is not None and return_both is not None:
            return_both(True)
        self.ema = ModelAverage(model, self.optim.ema, use_warmup=self.optim.ema_warmup) if self.optim.ema else None
        if self.ema is not None:
            self.ema.requires_grad_(False)  # or several processes would wait for its gradients
        self.mixup = None
        if augment.mixup > 0 or augment.cutmix > 0:
            self.mixup = Mixup(
                augment.mixup,
                augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.mix_switch,
                label_smoothing=0.0,
                num_classes=num_classes,
            )
        self.loss: nn.Module
        if self.optim.binary_loss:
            self.loss = BinaryCrossEntropy(smoothing=self.optim.label_smoothing)
        else:
            self.loss = nn.CrossEntropyLoss(label_smoothing=self.optim.label_smoothing)
        self.max_skipped, self.skipped, self._skipped_in_a_row = max_skipped, 0, 0
        self._is_sharded = False
        self._finite: Tensor | None = None
        self._running = RunningStatistics(model)
        # Loss, right answers and images so far in the epoch; stored, so that a resumed epoch reports all of it.
        self.register_buffer("train_sums", torch.zeros(3))
        metrics: dict[str, Any] = {"confusion": MulticlassConfusionMatrix(num_classes)}
        if num_classes > 5:
            metrics["top5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
        self.val_metrics = MetricCollection(metrics, compute_groups=False)
        # NaN stays NaN ("disable" says that too, but forgets the weights in torchmetrics 1.9).
        self.val_loss = MeanMetric(nan_strategy=float("nan"))

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that validation and weights files use: the moving average if there is one."""
        return self.ema.module if self.ema is not None else self.model

    def forward(self, images: Tensor) -> Tensor:
        """(batch, classes) logits of the evaluated model."""
        return self.evaluated_model(images)

    def configure_model(self) -> None:
        """Divide model and average among the processes, if Lightning's strategy for that is used."""
        if self.device_mesh is None or self._is_sharded:
            return
        for model in [self.model] + ([] if self.ema is None else [self.ema.module]):
            shard(model, self.device_mesh["data_parallel"])
        self._is_sharded = True

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        if self._finite is None:  # the first batch of a step
            self._running.keep()
        loss, figures = self._forward_loss(batch, batch_idx)
        finite = loss.detach().isfinite()
        self._finite = finite if self._finite is None else self._finite & finite
        self._batch = batch, batch_idx
        self.train_sums += torch.where(figures.isfinite().all(), figures, 0)
        return loss

    def _forward_loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        images, targets = batch
        key = self.seed, _STEP, self.current_epoch, batch_idx, self.global_rank
        with seeded(*key, device=images.device):
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            output = self.model(images)
        logits, logits_dist = output if isinstance(output, tuple) else (output, output)
        loss = self.loss(logits, targets)
        if self.teacher is not None:
            loss = distillation_loss(loss, logits_dist, self.teacher(images), self.distill)
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        with torch.no_grad():
            right = (logits.argmax(1) == labels).sum()
            figures = torch.stack([loss.float() * len(labels), right, right.new_tensor(len(labels))])
        aux_loss = getattr(self.model, "aux_loss", None)
        return (loss if aux_loss is None else loss + aux_loss), figures

    def on_fit_start(self) -> None:
        """Bring the teacher to the student's device."""
        if self.teacher is not None:
            self.teacher.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the steps skipped, and the teacher's name; its weights stay where they are."""
        checkpoint["teacher"] = self.teacher_fingerprint
        checkpoint["skipped"] = self.skipped, self._skipped_in_a_row

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue with the same teacher only.

        Raises:
            InputError: The teacher has other weights.
        """
        if checkpoint.get("teacher") != self.teacher_fingerprint:
            raise InputError("cannot resume: the teacher's weights are not those the run was started with")
        self.skipped, self._skipped_in_a_row = checkpoint.get("skipped", (0, 0))
        if self.global_rank:  # the first process has the sums of all
            checkpoint["state_dict"]["train_sums"].zero_()

    def on_train_epoch_start(self) -> None:
        """Forget the last epoch's sums (not called when an epoch is resumed)."""
        self.train_sums.zero_()
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
        gradients = [local(p.grad) for p in self.model.parameters() if p.grad is not None]
        return bool(torch.nn.utils.get_total_norm(gradients).isfinite())

    def _skip(self) -> None:
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.max_skipped:
            raise InputError(
                f"training diverges: {self._skipped_in_a_row} steps in a row, up to step {self.global_step + 1}, "
                f"have no finite loss or gradient; the first value that is not finite is in {self._not_finite()}; "
                "try a lower --optim.lr, more --optim.warmup-epochs or --precision 32-true (the limit is --max-skipped)"
            )
        self._running.put_back()

    def _not_finite(self) -> str:
        # All processes search, because sharded layers need all of them, and tell each other: all say the same.
        batch, batch_idx = self._batch
        with self.trainer.precision_plugin.forward_context():
            found = [first_in_forward(self.model, lambda: self._forward_loss(batch, batch_idx))]
        if self.trainer.world_size > 1:
            mine, found = found[0], found * self.trainer.world_size
            torch.distributed.all_gather_object(found, mine)
        return next(filter(None, found), None) or first_in_gradients(self.model) or "the loss"

    def training_figures(self) -> dict[str, float]:
        """Mean loss and accuracy of the epoch so far."""
        loss, right, images = self.train_sums.tolist()
        return {"loss": loss / max(images, 1), "accuracy": right / max(images, 1)}

    def gather_sums(self) -> None:
        """Hand the sums of the epoch so far to the first of several processes; all have to call it."""
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(self.train_sums)
            if self.global_rank:
                self.train_sums.zero_()

    def on_validation_start(self) -> None:
        """Let several processes validate the same model: that with the first one's running statistics."""
        self.gather_sums()
        if self.trainer.world_size > 1:
            for buffer in (*self.model.buffers(), *self.evaluated_model.buffers()):
                torch.distributed.broadcast(buffer, 0)

    def on_validation_epoch_end(self) -> None:
        """Log the validation figures of the epoch."""
        values = self.val_metrics.compute()
        confusion = values["confusion"]
        figures = {
            "val/loss": self.val_loss.compute(),
            "val/accuracy": confusion.diagonal().sum() / confusion.sum(),
            "val/balanced_accuracy": torch.tensor(balanced_accuracy(confusion)),
        }
        if "top5" in values:
            figures["val/top5_accuracy"] = values["top5"]
        self.log_dict(figures, logger=False)  # the recorder tells trackers all figures at once
        self.val_metrics.reset()
        self.val_loss.reset()

    def on_train_epoch_end(self) -> None:
        """Log the epoch's training figures."""
        self.log_dict({f"train/{name}": value for name, value in self.training_figures().items()}, logger=False)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Collect the figures of one batch."""
        images, targets = batch
        logits = self(images).float()
        self.val_loss.update(nn.functional.cross_entropy(logits, targets), len(targets))
        self.val_metrics.update(logits, targets)

    def configure_optimizers(self) -> Any:
        """Timm's optimiser and its schedule, told of every step."""
        optimizer = make_optimizer(self.model, self.optim)
        steps = int(self.trainer.estimated_stepping_batches) // self.epochs
        self.learning_rate = LearningRate(optimizer, self.optim, self.epochs, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.learning_rate.scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Timm's schedules are told the number of steps taken."""
        self.learning_rate.set(self.global_step)
