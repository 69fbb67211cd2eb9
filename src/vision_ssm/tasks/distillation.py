import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssm.errors import InputError
from vision_ssm.recipes import Distillation
from vision_ssm.tasks.run_folder import weights_file
from vision_ssm.tasks.spec import ModelSpec, check_takes, create_model, default_cfg, load_weights, read_spec


class Teacher:
    """A trained classifier whose answers a student learns.

    It is no module, so that neither the student's checkpoints nor its optimiser see it.

    Args:
        model: The network.
        spec: What its inputs and outputs mean.
        student: What the inputs of the student mean, which the teacher is given.
    """

    def __init__(self, model: nn.Module, spec: ModelSpec, student: ModelSpec) -> None:
        self.model = model.eval().requires_grad_(False)
        self.spec = spec
        self._scale = self._shift = None
        if (spec.mean, spec.std) != (student.mean, student.std):
            mean, std, own_mean, own_std = (
                torch.tensor(values).view(3, 1, 1) for values in (student.mean, student.std, spec.mean, spec.std)
            )
            self._scale, self._shift = std / own_std, (mean - own_mean) / own_std

    def to(self, device: torch.device) -> None:
        """Move it."""
        self.model.to(device)
        if self._scale is not None and self._shift is not None:
            self._scale, self._shift = self._scale.to(device), self._shift.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(batch, classes) logits in float32 of images that are normalised as the student's."""
        images = images.float()
        if self._scale is not None and self._shift is not None:
            images = images * self._scale + self._shift
        with torch.autocast(images.device.type, enabled=False):
            return self.model(images)

    def fingerprint(self) -> str:
        """A digest of model and weights, to notice that a run is resumed with another teacher."""
        digest = hashlib.sha256(self.spec.model.encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def load_teacher(name: str, student: ModelSpec) -> Teacher:
    """The teacher of that name for a student.

    Args:
        name: timm's name of a model with published weights, the folder of a run, or a weights file of one.
        student: The student's inputs and classes.

    Raises:
        InputError: There is none, its weights cannot be had, or it has other classes or takes other images.
    """
    try:
        if Path(name).exists():
            return _from_run(weights_file(Path(name)), student)
        return _from_timm(name, student)
    except InputError as error:
        raise InputError(f"--distill.teacher: {error.line}") from error


def _from_run(path: Path, student: ModelSpec) -> Teacher:
    spec = read_spec(path)
    if spec.classes != student.classes:
        raise InputError(f"{path} knows {_few(spec.classes)}, but the images are of {_few(student.classes)}")
    model = spec.create()
    load_weights(model, path)
    check_takes(model, spec.model, student.image_size)
    return Teacher(model, spec, student)


def _from_timm(name: str, student: ModelSpec) -> Teacher:
    known = default_cfg(name)
    if known.num_classes != len(student.classes):
        raise InputError(
            f"{name} knows {known.num_classes} classes, but the images are of {len(student.classes)}; "
            "train one on them and name its folder, or None for no teacher"
        )
    model = create_model(name, {}, known.num_classes, pretrained=True)
    check_takes(model, name, student.image_size)
    spec = ModelSpec(
        model=name,
        classes=student.classes,
        image_size=known.input_size[-1],
        mean=tuple(known.mean),
        std=tuple(known.std),
        interpolation=known.interpolation,
        crop=known.crop_pct,
    )
    return Teacher(model, spec, student)


def distillation_loss(base: Tensor, logits: Tensor, teacher_logits: Tensor, distill: Distillation) -> Tensor:
    """Mix the loss of the targets with that of the teacher, as DeiT does.

    Args:
        base: () loss of the targets.
        logits: (batch, classes) what the student answers to the teacher.
        teacher_logits: (batch, classes) what the teacher says.
        distill: How to mix, and what to learn.
    """
    if distill.soft:
        mine, theirs = (F.log_softmax(x.float() / distill.tau, dim=1) for x in (logits, teacher_logits))
        # A mean over all logits, as in GroupMamba's training, not over the batch.
        loss = F.kl_div(mine, theirs, reduction="sum", log_target=True) * distill.tau**2 / logits.numel()
    else:
        loss = F.cross_entropy(logits, teacher_logits.argmax(1))
    return (1 - distill.alpha) * base + distill.alpha * loss


def _few(classes: tuple[str, ...]) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"
