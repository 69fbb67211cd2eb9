import dataclasses
import difflib
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console
from timm.layers import convert_sync_batchnorm
from timm.optim import get_optimizer_info, list_optimizers

from vision_ssm.data import Images, ImageStream, load_splits, seeded
from vision_ssm.data.module import ImageData
from vision_ssm.errors import InputError, ProcessLostError
from vision_ssm.recipes import FolderConfig, Optimisation, TimmConfig, TrainConfig, to_dict
from vision_ssm.tasks.classification import ClassificationTask
from vision_ssm.tasks.classifier import check_readable, evaluate, find_device, load_classifier, loader_workers
from vision_ssm.tasks.distillation import load_teacher
from vision_ssm.tasks.evaluation import Evaluation
from vision_ssm.tasks.files import write_json
from vision_ssm.tasks.optimisation import make_optimizer
from vision_ssm.tasks.pictures import draw_confusion, draw_curves, draw_predictions
from vision_ssm.tasks.processes import lost_another, process_rank, strategy_for
from vision_ssm.tasks.progress import TrainingProgress
from vision_ssm.tasks.recorder import RunRecorder, SafeCheckpointIO, stop_on_signals
from vision_ssm.tasks.report import how_many, is_uneven, report_data, report_evaluation
from vision_ssm.tasks.run_folder import RunFolder, weights_file
from vision_ssm.tasks.sharding import SHARDABLE_OPTIMIZERS, check_shardable
from vision_ssm.tasks.spec import ModelSpec, check_takes, create_from_file, create_model, read_spec, spec_for
from vision_ssm.tasks.trackers import check_tracker, make_loggers

_WEIGHTS = 3  # keeps the draws of the first weights apart from those of data and steps

# Those of timm's that are functions of the step alone (not of the validation accuracy).
_SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly")

# True of Lightning's own loaders and modules, but not of these: the sampler resumes inside an epoch, the moving average
# is in evaluation mode on purpose, and what is logged is the same in all processes. The others are between Lightning
# and torch, or of speed alone.
_EXPECTED = (
    ".*ended before the epoch ended and your dataloader is not resumable.*",
    ".*does not have many workers.*",
    ".*in eval mode at the start of training.*",
    ".*sync_dist=True.*",
    ".*smaller than the logging interval.*",
    ".*LeafSpec.*is deprecated.*",
    ".*`broadcast_buffers` is deprecated.*",
    ".*Grad strides do not match bucket view strides.*",
)


def train(
    config: TrainConfig,
    folder: RunFolder,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Evaluation:
    """Train a classifier and leave a folder with configuration, weights, metrics and pictures.

    Nothing is written, or removed, before configuration, data and model are known to be good. Where the
    configuration asks for several processes, Lightning starts them with this process's command, unless torchrun or
    SLURM has; the first of them writes and reports.

    Args:
        config: What to train and how.
        folder: Where to write.
        resume: Continue the run in `folder` at the batch where its state was saved.
        overwrite: Replace the run in `folder`.
        console: Where to report progress; nowhere by default.

    Returns:
        How the best weights do on the validation images.

    Raises:
        InputError: Something in the configuration or the data cannot be used.
        Stopped: Ctrl-C or SIGTERM came; the state has been saved.
        OSError: A file could not be written.
    """
    check(config)
    rank = process_rank(config)
    console = console if console is not None and rank == 0 else Console(quiet=True)
    if resume:
        folder.check_resumable(config)
    elif rank == 0:
        folder.check_free(overwrite=overwrite)
    device = find_device(config.device)
    if device.type == "cpu" and config.sync_batchnorm:
        raise InputError("--sync-batchnorm needs GPUs")
    spec = spec_for(config, ())
    train_transform = _train_transform(spec, config)
    splits = load_splits(config)
    report_data(splits, console)
    if config.images_per_step > len(splits.train) and config.processes > 1:
        raise InputError(
            f"{config.processes} processes times --batch-size {config.batch_size} times --accumulate "
            f"{config.accumulate} is larger than the {len(splits.train)} training images"
        )
    spec = dataclasses.replace(spec, classes=splits.train.classes)
    data = ImageData(
        splits,
        train_transform,
        spec.eval_transform(),
        config.batch_size,
        config.seed,
        loader_workers(config.workers),
        config.accumulate,
        _max_unreadable(config),
    )
    teacher = load_teacher(config.distill.teacher, spec) if config.distill.teacher else None
    model = _first_model(config, spec, resume=resume)
    check_takes(model, spec.model, spec.image_size)
    if config.fsdp:
        check_shardable(model, spec.model)
    if config.sync_batchnorm:
        model = convert_sync_batchnorm(model)
    optim = config.optim.for_batch(config.images_per_step)
    make_optimizer(model, optim)  # Lightning makes another one, but only once the folder has been cleared
    parameters = sum(p.numel() for p in model.parameters())
    size = f"{spec.image_size}×{spec.image_size}"
    console.print(f"Model  {spec.model}, {parameters / 1e6:.2f} M parameters, {size} input, {device}", highlight=False)
    steps = len(splits.train) // config.images_per_step
    console.print(
        f"Steps  {steps:,} an epoch, of {config.images_per_step} images; highest learning rate {optim.lr:g}",
        highlight=False,
    )
    if teacher is not None:
        console.print(f"       learns from {config.distill.teacher}", highlight=False, soft_wrap=True)
    if resume and folder.results.is_file():
        done = f"{config.epochs} of {config.epochs} epochs trained"
        console.print(f"Note   this run was complete: {done}", highlight=False)
    elif optim.warmup_epochs >= config.epochs:
        console.print(
            f"Note   --optim.warmup-epochs {optim.warmup_epochs} must be below --epochs {config.epochs}; taken as "
            f"{config.epochs - 1}",
            highlight=False,
            soft_wrap=True,
        )
    steps *= config.epochs
    if optim.ema and not optim.ema_warmup and steps * (1 - optim.ema) < 3:  # over 5 % of the first weights
        console.print(
            f"Note   {steps} steps are few for --optim.ema {optim.ema}: the average keeps much of the first weights; "
            "add --optim.ema-warmup, or --optim.ema None",
            highlight=False,
        )
    if not resume:
        if isinstance(splits.train, ImageStream):
            splits.train.check_ends()
        with console.status(f"reading {how_many(splits.val)} validation images once"):
            check_readable(splits.val, config.workers)
    task = ClassificationTask(
        model,
        len(spec.classes),
        augment=config.augment,
        optim=optim,
        epochs=config.epochs,
        seed=config.seed,
        teacher=teacher,
        distill=config.distill,
        max_skipped=config.max_skipped,
    )
    with stop_on_signals() as stop, quiet_lightning():
        recorder = RunRecorder(folder, spec, stop)
        progress = TrainingProgress(console, recorder, uneven=is_uneven(splits.train))
        trainer = make_trainer(config, device, folder, [recorder, progress])
        if not resume and rank == 0:
            folder.clear()
            folder.write_config(config)
            write_json(folder.model, to_dict(spec))
        trainer.loggers = make_loggers(config.tracker, folder) if rank == 0 else []
        try:
            trainer.fit(task, data, ckpt_path=str(folder.state) if resume else None)
        except SystemExit:  # Lightning's answer to a second Ctrl-C
            raise KeyboardInterrupt from None
        except RuntimeError as error:
            if lost_another(error):
                raise ProcessLostError(
                    "another process of this run has ended before; its own message says why"
                ) from error
            raise
    classifier = load_classifier(folder.best, str(trainer.strategy.root_device), config.precision)
    evaluation = evaluate(classifier, splits.val, config.batch_size, config.workers, console=console)
    if rank == 0:
        finish(folder, recorder, evaluation, splits.val, console)
    if not math.isfinite(evaluation.loss):
        raise InputError(f"no weights of this run give a finite loss; see {folder.metrics}, and try a lower --optim.lr")
    return evaluation


def check(config: TrainConfig) -> None:
    """Refuse values that cannot work.

    Raises:
        InputError: Naming the option.
    """
    optim, augment = config.optim, config.augment
    positive: dict[str, Any] = {
        "epochs": config.epochs,
        "batch-size": config.batch_size,
        "accumulate": config.accumulate,
        "max-skipped": config.max_skipped,
        "devices": config.devices,
        "nodes": config.nodes,
        "optim.lr": optim.lr,
        "optim.lr-batch": optim.lr_batch,
        "optim.eps": optim.eps,
        "distill.tau": config.distill.tau,
        "image-size": config.image_size,
        "optim.layer-decay": optim.layer_decay,
        "optim.clip-grad": optim.clip_grad,
    }
    if isinstance(config, TimmConfig):
        positive |= {"data.samples": config.data.samples, "data.shuffle": config.data.shuffle}
    for name, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name} must be positive{' and finite' if value > 0 else ''}, got {value}")
    if not 0 <= _max_unreadable(config) <= 1:
        raise InputError(f"--data.max-unreadable must lie between 0 and 1, got {_max_unreadable(config)}")
    not_negative: dict[str, Any] = {
        "optim.min-lr": optim.min_lr,
        "optim.warmup-lr": optim.warmup_lr,
        "optim.weight-decay": optim.weight_decay,
        "optim.warmup-epochs": optim.warmup_epochs,
        "optim.cooldown-epochs": optim.cooldown_epochs,
        "augment.mixup": augment.mixup,
        "augment.cutmix": augment.cutmix,
        "augment.color-jitter": augment.color_jitter,
        "workers": config.workers,
        "seed": config.seed,
    }
    for name, value in not_negative.items():
        if value is not None and not 0 <= value < math.inf:
            raise InputError(f"--{name} must be 0 or more{' and finite' if value > 0 else ''}, got {value}")
    shares: dict[str, Any] = {
        "augment.hflip": augment.hflip,
        "augment.vflip": augment.vflip,
        "augment.erase": augment.erase,
        "augment.mix-prob": augment.mix_prob,
        "augment.mix-switch": augment.mix_switch,
        "optim.label-smoothing": optim.label_smoothing,
        "optim.ema": optim.ema,
        "distill.alpha": config.distill.alpha,
        "drop-path": config.drop_path,
        "crop": config.crop,
    }
    for name, value in shares.items():
        if value is not None and not 0 <= value <= 1:
            raise InputError(f"--{name} must lie between 0 and 1, got {value}")
    for name, value in (("optim.ema", optim.ema), ("drop-path", config.drop_path)):
        if value == 1:
            raise InputError(f"--{name} must be below 1, got {value}")
    if optim.layer_decay is not None and optim.layer_decay > 1:
        raise InputError(f"--optim.layer-decay must be at most 1, got {optim.layer_decay}")
    for name, (low, high) in (("augment.scale", augment.scale), ("augment.ratio", augment.ratio)):
        if not 0 < low <= high:
            raise InputError(f"--{name} takes a smallest and a largest value, both positive, got {low} {high}")
    if config.crop == 0:
        raise InputError("--crop must be positive, got 0")
    _check_optimizer(optim)
    if config.fsdp:
        _check_fsdp(config)
    check_tracker(config.tracker)
    if (augment.mixup or augment.cutmix) and config.batch_size % 2:
        raise InputError(f"mixup and CutMix pair images, so --batch-size must be even, not {config.batch_size}")


def _check_fsdp(config: TrainConfig) -> None:
    if config.processes == 1:
        raise InputError("--fsdp divides the weights among several devices, say how many with --devices")
    if config.precision == "16-mixed":
        raise InputError("--fsdp goes with --precision 32-true, bf16-mixed or bf16-true, not 16-mixed")
    if config.optim.optimizer not in SHARDABLE_OPTIMIZERS:
        raise InputError(
            f"--fsdp goes with --optim.optimizer {', '.join(SHARDABLE_OPTIMIZERS)}, not {config.optim.optimizer}"
        )


def _check_optimizer(optim: Optimisation) -> None:
    if optim.optimizer not in list_optimizers():
        near = difflib.get_close_matches(optim.optimizer, list_optimizers())
        hint = f"did you mean {' or '.join(near)}?" if near else "sgd, adamw, lamb and lion are some"
        raise InputError(
            f"--optim.optimizer {optim.optimizer} is none of those that timm.optim.list_optimizers() names; {hint}"
        )
    if optim.schedule not in _SCHEDULES:
        raise InputError(f"--optim.schedule must be one of {', '.join(_SCHEDULES)}, not {optim.schedule}")
    known = get_optimizer_info(optim.optimizer)
    if optim.eps is not None and not known.has_eps:
        raise InputError(f"{optim.optimizer} has no eps; say --optim.eps None")
    if optim.betas is not None and not (known.has_betas and known.num_betas == 2):
        raise InputError(f"{optim.optimizer} has no two betas; say --optim.betas None")
    if optim.betas is not None and not all(0 <= beta < 1 for beta in optim.betas):
        raise InputError(f"--optim.betas takes two values from 0 to below 1, got {optim.betas[0]} {optim.betas[1]}")
    for name, rate in (("min-lr", optim.min_lr), ("warmup-lr", optim.warmup_lr)):
        if rate is not None and rate > optim.lr:
            raise InputError(f"--optim.{name} must not exceed --optim.lr {optim.lr}, got {rate}")
    if optim.published_decay and optim.layer_decay is not None:
        raise InputError("--optim.published-decay goes with --optim.layer-decay None only")


def make_trainer(
    config: TrainConfig, device: torch.device, folder: RunFolder, callbacks: list[Any]
) -> lightning.Trainer:
    """Lightning's trainer with nothing printed and checkpoints written safely.

    Raises:
        InputError: The device cannot compute in the precision asked for, or there are fewer.
    """
    if config.devices > 1 and device.index is not None:
        raise InputError(f"--device {device} is one; with --devices {config.devices} say --device {device.type}")
    try:
        return lightning.Trainer(
            accelerator={"cuda": "gpu"}.get(device.type, device.type),
            devices=config.devices if device.index is None or device.type == "cpu" else [device.index],
            num_nodes=config.nodes,
            strategy=strategy_for(config),
            precision=config.precision,
            max_epochs=config.epochs,
            gradient_clip_val=config.optim.clip_grad,
            accumulate_grad_batches=config.accumulate,
            callbacks=callbacks,
            plugins=[SafeCheckpointIO()],
            default_root_dir=folder.path,
            logger=False,  # added later: some write at once
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the data module divides the images itself
            inference_mode=not config.fsdp,  # what is gathered in it, training could not use
        )
    except (ValueError, lightning.fabric.utilities.exceptions.MisconfigurationException) as error:
        raise InputError(f"cannot train on {device} in {config.precision}: {error}") from error


def finish(folder: RunFolder, recorder: RunRecorder, evaluation: Evaluation, images: Images, console: Console) -> None:
    """Write results and pictures and print where they are."""
    recorder.write_metrics()
    best = recorder.best_row()
    last = recorder.history[-1]
    values = {"best_epoch": best["epoch"], **evaluation.summary(), "last_epoch_accuracy": last["val_accuracy"]}
    write_json(folder.results, {**values, "per_class": evaluation.per_class()})
    curves, confusion, predictions = folder.pictures
    draw_curves(recorder.history, curves)
    draw_confusion(evaluation, confusion)
    draw_predictions(evaluation, images, predictions)
    console.print()
    report_evaluation(evaluation, console, title=f"Best epoch, {best['epoch']} of {last['epoch']}")
    console.print(f"Last epoch: accuracy {last['val_accuracy']:.2%}", highlight=False)
    for what, path in (
        ("Curves", curves),
        ("Confusion", confusion),
        ("Predictions", predictions),
        ("Weights", folder.best),
    ):
        console.print(f"{what:<12} {path}", highlight=False, soft_wrap=True)


def _train_transform(spec: ModelSpec, config: TrainConfig) -> Callable[[Any], torch.Tensor]:
    policy = config.augment.auto_augment
    try:
        return spec.train_transform(config.augment)
    except (AssertionError, ValueError, TypeError, KeyError, IndexError) as error:
        if policy is None:
            raise InputError(f"cannot make the augmentation: {error}") from error
        raise InputError(
            f"--augment.auto-augment {policy} is no policy of timm's ({error}); they are original, originalr, v0, v0r, "
            "3a, and such as rand-m9-mstd0.5-inc1 or augmix-m3-w3"
        ) from error


def _max_unreadable(config: TrainConfig) -> float:
    if not isinstance(config, FolderConfig | TimmConfig) or config.data.strict:
        return 0.0
    return config.data.max_unreadable


def _first_model(config: TrainConfig, spec: ModelSpec, *, resume: bool) -> torch.nn.Module:
    count = len(spec.classes)
    with seeded(config.seed, _WEIGHTS):
        if isinstance(config.pretrained, Path) and not resume:
            path = config.pretrained
            if path.is_dir():
                path = weights_file(path)
                if (other := read_spec(path).model) != spec.model:
                    raise InputError(f"{config.pretrained} is a run of {other}, not {spec.model}; say --model {other}")
            return create_from_file(spec.model, spec.model_args, count, path, spec.classes)
        return create_model(spec.model, spec.model_args, count, pretrained=bool(config.pretrained) and not resume)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's tips and the warnings that do not apply off the terminal, and only those."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _EXPECTED:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
