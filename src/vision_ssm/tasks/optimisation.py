from collections.abc import Callable
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from vision_ssm.errors import InputError
from vision_ssm.recipes import Optimisation


class LearningRate:
    """The learning rate as a function of the steps taken, by timm's schedules.

    Args:
        optimizer: Whose rates to set; they begin at those of step 0.
        optim: Which schedule. Its rates are taken as they are (see `Optimisation.for_batch`).
        epochs: Length of the run, warm-up and cool-down included. Where they do not fit in, one epoch is left to the
            schedule, the cool-down gives way first, then the warm-up.
        steps: Steps per epoch.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, optim: Optimisation, epochs: int, steps: int) -> None:
        self.optim, self.steps = optim, steps
        self.warmup = min(optim.warmup_epochs, epochs - 1)
        cooldown = min(optim.cooldown_epochs, epochs - 1 - self.warmup)
        self.scheduler: Scheduler = create_scheduler_v2(
            optimizer,
            sched=optim.schedule,
            num_epochs=epochs - cooldown - (self.warmup if optim.warmup_first else 0),
            min_lr=optim.min_lr,
            warmup_lr=optim.lr / 100 if optim.warmup_lr is None else optim.warmup_lr,
            warmup_epochs=self.warmup,
            warmup_prefix=optim.warmup_first,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )[0]

    def set(self, step: int) -> None:
        """Set the rates for the step that follows `step` others."""
        by_epoch = self.optim.warmup_by_epoch if step < self.warmup * self.steps else self.optim.decay_by_epoch
        self.scheduler.step_update(step - step % self.steps if by_epoch else step)


def make_optimizer(model: nn.Module, optim: Optimisation) -> torch.optim.Optimizer:
    """Timm's optimiser, with weight decay only where it belongs.

    Raises:
        InputError: timm cannot make it, or `optim` asks for what the published training exempts, and the model has no
            list of it.
    """
    options: dict[str, Any] = dict(betas=optim.betas, eps=optim.eps)
    parameters = _published_groups(model, optim.weight_decay) if optim.published_decay else model
    try:
        return create_optimizer_v2(
            parameters,
            opt=optim.optimizer,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            layer_decay=optim.layer_decay,
            **{name: value for name, value in options.items() if value is not None},
        )
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise InputError(f"cannot make the optimiser {optim.optimizer}: {error}") from error


def _published_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    published: Callable[[], set[str]] | None = getattr(model, "published_no_weight_decay", None)
    if published is None:
        raise InputError(
            f"--optim.published-decay: {type(model).__name__} does not say what its published training exempts"
        )
    spared = published()
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in spared].append(parameter)
    return [
        {"params": groups[True], "weight_decay": 0.0},
        {"params": groups[False], "weight_decay": weight_decay},
    ]
