from collections.abc import Callable
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler, TanhLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from vision_ssm.errors import InputError, nearest
from vision_ssm.recipes.config import OptimConfig, option


class LearningRate:
    """The learning rate as a function of the steps taken, by timm's schedules.

    Where warmup and cooldown do not fit into `epochs`, one epoch is left to the schedule; the cooldown gives way first,
    then the warmup. A warmup in steps gets at most half of all.

    Args:
        optimizer: Whose learning rates to set; they begin at those of step 0.
        optim: Which schedule. Its rates are taken as they are (see `OptimConfig.scaled`).
        steps: Steps per epoch.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, optim: OptimConfig, steps: int) -> None:
        self.optim, self.steps = optim, steps
        warmup = min(optim.warmup_epochs, optim.epochs - 1)
        self.warmup = warmup * steps  # in steps, as all that follows
        if optim.warmup_steps is not None:
            warmup, self.warmup = 0, min(optim.warmup_steps, optim.epochs * steps // 2)
        cooldown = min(optim.cooldown_epochs, optim.epochs - 1 - warmup)
        prefix = optim.warmup_prefix and optim.schedule != "multistep"  # whose milestones count from the start
        total = optim.epochs * steps if optim.steps is None else optim.steps
        length = total - cooldown * steps - (self.warmup if prefix else 0)
        common: dict[str, Any] = dict(
            warmup_t=self.warmup,
            warmup_lr_init=optim.lr / 100 if optim.warmup_lr is None else optim.warmup_lr,
            warmup_prefix=prefix,
            t_in_epochs=False,
        )
        self.scheduler: Scheduler
        if optim.schedule == "multistep":
            # timm looks one step ahead
            milestones = [epoch * steps + 1 for epoch in optim.milestones or ()]
            self.scheduler = MultiStepLRScheduler(optimizer, milestones, optim.decay_rate, **common)
        else:
            kind: Any = {"cosine": CosineLRScheduler, "tanh": TanhLRScheduler, "poly": PolyLRScheduler}[optim.schedule]
            power = dict(power=1.0) if optim.schedule == "poly" else {}
            # Of a single step timm says that it has no effect.
            self.scheduler = kind(optimizer, max(length, 2), lr_min=optim.min_lr, **power, **common)

    def set(self, step: int) -> None:
        """Set the rates for the step that follows `step` others."""
        by_epoch = self.optim.warmup_by_epoch if step < self.warmup else self.optim.decay_by_epoch
        self.scheduler.step_update(step - step % self.steps if by_epoch else step)


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Timm's optimizer, with weight decay only where it belongs.

    Raises:
        InputError: timm does not know it or cannot make it, or `optim` asks for the exemptions of the published
            training, and the model has no list of them.
    """
    if optim.optimizer not in list_optimizers():
        hint = nearest(optim.optimizer, list_optimizers(), "; timm.optim.list_optimizers() lists all")
        raise InputError(f"unknown --optimizer {optim.optimizer}{hint}")
    known = get_optimizer_info(optim.optimizer)  # timm ignores what an optimizer does not take
    for name, takes in (("eps", known.has_eps), ("betas", known.has_betas and known.num_betas == 2)):
        if getattr(optim, name) is not None and not takes:
            raise InputError(f"{optim.optimizer} does not take {option(name)}; use {option(name)} None")
    if optim.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise InputError(f"--layer-decay: {type(model).__name__} does not define the order of its layers")
    options: dict[str, Any] = dict(betas=optim.betas, eps=optim.eps, layer_decay=optim.layer_decay)
    options = {name: value for name, value in options.items() if value is not None}
    parameters = _published_groups(model, optim.weight_decay) if optim.published_decay else model
    try:
        return create_optimizer_v2(parameters, optim.optimizer, optim.lr, optim.weight_decay, **options)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise InputError(f"cannot make the optimizer {optim.optimizer}: {error}") from error


def _published_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    published: Callable[[], set[str]] | None = getattr(model, "published_no_weight_decay", None)
    if published is None:
        raise InputError(f"--published-decay: {type(model).__name__} does not list what the published training exempts")
    exempt = published()
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in exempt].append(parameter)
    return [{"params": groups[e], "weight_decay": decay} for e, decay in ((True, 0.0), (False, weight_decay))]
