import functools
import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssm.recipes.config import LossConfig

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]


class Teacher:
    """A trained classifier whose outputs a student learns.

    It is no module, so that neither the student's checkpoints nor its optimizer see it.

    Args:
        model: The network.
        name: timm's name of it.
        own: Channel means and standard deviations with which its inputs are normalized.
        student: Those of the student, whose inputs it is given.
    """

    def __init__(self, model: nn.Module, name: str, own: Statistics, student: Statistics) -> None:
        self.model, self.name = model.eval().requires_grad_(False), name
        (own_mean, own_std), (mean, std) = (torch.tensor(values)[..., None, None] for values in (own, student))
        self._scale, self._shift = std / own_std, (mean - own_mean) / own_std

    def to(self, device: torch.device) -> None:
        """Move it."""
        self.model.to(device)
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(batch, classes) logits in float32 of images that are normalized as the student's."""
        images = images.float() * self._scale + self._shift
        with torch.autocast(images.device.type, enabled=False):
            return self.model(images)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of model and weights, which shows whether a run is resumed with another teacher."""
        digest = hashlib.sha256(self.name.encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def distillation_loss(logits: Tensor, teacher_logits: Tensor, config: LossConfig) -> Tensor:
    """The loss of a student's outputs beside a teacher's, as in DeiT; without its weight alpha.

    Args:
        logits: (batch, classes) outputs of the student.
        teacher_logits: (batch, classes) outputs of the teacher.
        config: Hard or soft distillation, and its temperature.
    """
    if config.distill_type == "hard":
        return F.cross_entropy(logits, teacher_logits.argmax(1))
    mine, theirs = (F.log_softmax(x.float() / config.distill_tau, dim=1) for x in (logits, teacher_logits))
    # A mean over all logits, as in GroupMamba's training, not over the batch.
    return F.kl_div(mine, theirs, reduction="sum", log_target=True) * config.distill_tau**2 / logits.numel()
