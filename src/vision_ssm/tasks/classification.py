from collections.abc import Callable
from typing import Any

import lightning
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from vision_ssm.data import seeded
from vision_ssm.errors import InputError
from vision_ssm.recipes import Augmentation, Distillation, Optimisation
from vision_ssm.tasks.distillation import Teacher, distillation_loss
from vision_ssm.tasks.evaluation import balanced_accuracy
from vision_ssm.tasks.optimisation import LearningRate, make_optimizer

_STEP = 2  # keeps these draws apart from those of the data module


class ClassificationTask(lightning.LightningModule):
    """Trains an image classifier.

    Mixup and stochastic depth draw from generators seeded by (seed, epoch, batch), so a run that is stopped and
    resumed takes the same course as one that is not. If the model has a scalar `aux_loss` after a training
    forward, it is added to the loss.

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
        self.ema = ModelEmaV3(model, self.optim.ema, use_warmup=self.optim.ema_warmup) if self.optim.ema else None
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
        # Loss, right answers and images so far in the epoch; stored, so that a resumed epoch reports all of it.
        self.register_buffer("train_sums", torch.zeros(3))
        metrics: dict[str, Any] = {"confusion": MulticlassConfusionMatrix(num_classes)}
        if num_classes > 5:
            metrics["top5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
        self.val_metrics = MetricCollection(metrics, compute_groups=False)
        self.val_loss = MeanMetric()

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that validation and weights files use: the moving average if there is one."""
        return self.ema.module if self.ema is not None else self.model

    def forward(self, images: Tensor) -> Tensor:
        """(batch, classes) logits of the evaluated model."""
        return self.evaluated_model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        images, targets = batch
        with seeded(self.seed, _STEP, self.current_epoch, batch_idx, device=images.device):
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
            self.train_sums += torch.stack([loss.float() * len(labels), right, right.new_tensor(len(labels))])
        aux_loss = getattr(self.model, "aux_loss", None)
        return loss if aux_loss is None else loss + aux_loss

    def on_fit_start(self) -> None:
        """Bring the teacher to the student's device."""
        if self.teacher is not None:
            self.teacher.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the teacher; its weights stay where they are."""
        checkpoint["teacher"] = self.teacher_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue with the same teacher only.

        Raises:
            InputError: The teacher has other weights.
        """
        if checkpoint.get("teacher") != self.teacher_fingerprint:
            raise InputError("cannot resume: the teacher's weights are not those the run was started with")

    def on_train_epoch_start(self) -> None:
        """Forget the last epoch's sums (not called when an epoch is resumed)."""
        self.train_sums.zero_()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step, then update the moving average."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            # Without a step number timm's average begins with the first weights, as the published ones do.
            self.ema.update(self.model, step=self.global_step if self.optim.ema_warmup else None)

    def training_figures(self) -> dict[str, float]:
        """Mean loss and accuracy of the epoch so far."""
        loss, right, images = self.train_sums.tolist()
        return {"loss": loss / max(images, 1), "accuracy": right / max(images, 1)}

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
        self.log_dict(figures)
        self.val_metrics.reset()
        self.val_loss.reset()

    def on_train_epoch_end(self) -> None:
        """Log the epoch's training figures."""
        self.log_dict({f"train/{name}": value for name, value in self.training_figures().items()})

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
