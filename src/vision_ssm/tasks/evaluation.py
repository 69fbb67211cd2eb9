from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader


@dataclass(frozen=True)
class Evaluation:
    """How a classifier does on labelled images.

    Args:
        classes: Names of the classes.
        probabilities: (images, classes) float32 on the CPU.
        targets: (images,) true classes.
    """

    classes: tuple[str, ...]
    probabilities: Tensor
    targets: Tensor

    @property
    def predictions(self) -> Tensor:
        """(images,) most probable classes."""
        return self.probabilities.argmax(1)

    @property
    def confusion(self) -> Tensor:
        """(classes, classes) counts: row is the true class, column the predicted one."""
        n = len(self.classes)
        return torch.bincount(self.targets * n + self.predictions, minlength=n * n).view(n, n)

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        picked = self.probabilities.gather(1, self.targets[:, None])
        return float(-picked.clamp_min(1e-12).log().mean())

    @property
    def accuracy(self) -> float:
        """Share of images whose most probable class is right."""
        return self.top(1)

    @property
    def balanced_accuracy(self) -> float:
        """Mean over the classes that occur of the share found."""
        return balanced_accuracy(self.confusion)

    def top(self, k: int) -> float:
        """Share of images whose class is among the `k` most probable."""
        best = self.probabilities.topk(min(k, len(self.classes)), dim=1).indices
        return float((best == self.targets[:, None]).any(1).float().mean())

    def per_class(self) -> list[dict[str, Any]]:
        """For each class its name, images, recall and precision (None where there is nothing to divide by)."""
        confusion = self.confusion
        rows: list[dict[str, Any]] = []
        for i, name in enumerate(self.classes):
            hit, true, said = int(confusion[i, i]), int(confusion[i].sum()), int(confusion[:, i].sum())
            recall, precision = hit / true if true else None, hit / said if said else None
            rows.append({"class": name, "images": true, "recall": recall, "precision": precision})
        return rows

    def summary(self) -> dict[str, Any]:
        """The figures as plain numbers; top-5 only where there are more than five classes."""
        values: dict[str, Any] = {"images": len(self.targets), "loss": self.loss, "accuracy": self.accuracy}
        if len(self.classes) > 5:
            values["top5_accuracy"] = self.top(5)
        values["balanced_accuracy"] = self.balanced_accuracy
        return values


def balanced_accuracy(confusion: Tensor) -> float:
    """Mean recall over the classes that occur.

    Args:
        confusion: (classes, classes) counts, a row for each true class.
    """
    support = confusion.sum(1)
    occurs = support > 0
    return float((confusion.diagonal()[occurs] / support[occurs]).mean()) if occurs.any() else float("nan")


@torch.inference_mode()
def predict(
    model: nn.Module,
    batches: DataLoader[Any],
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a classifier over batches of (images, targets).

    Args:
        model: The classifier; it is moved to `device` and put in evaluation mode.
        batches: The data.
        device: Where to compute.
        dtype: Autocast to this type.

    Returns:
        (images, classes) probabilities and (images,) targets, on the CPU.
    """
    model = model.to(device).eval()
    probabilities, targets = [], []
    for images, labels in batches:
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            logits = model(images.to(device, non_blocking=True))
        probabilities.append(F.softmax(logits.float(), dim=1).cpu())
        targets.append(labels)
    return torch.cat(probabilities), torch.cat(targets)
