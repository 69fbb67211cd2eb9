import importlib.metadata
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from timm.layers import convert_sync_batchnorm

from vision_ssm.data import ImageStream, Splits
from vision_ssm.data.dataset import how_many
from vision_ssm.data.module import ImageData, epoch_images
from vision_ssm.engine.devices import find_device
from vision_ssm.engine.evaluate import check_readable, evaluate
from vision_ssm.engine.files import write_json
from vision_ssm.engine.loggers import check_logger, make_loggers
from vision_ssm.engine.module import TrainingModule
from vision_ssm.engine.optimization import make_optimizer
from vision_ssm.engine.plots import draw_curves
from vision_ssm.engine.processes import environment_of, lost_another, process_rank
from vision_ssm.engine.progress import TrainingProgress
from vision_ssm.engine.recorder import RunRecorder, SafeCheckpointIO, stop_on_signals
from vision_ssm.engine.run_folder import RunFolder, rank
from vision_ssm.engine.task import Evaluation, Task
from vision_ssm.errors import InputError
from vision_ssm.recipes import TrainConfig, to_dict

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

_VERSIONS = ("vision-ssm", "torch", "timm", "lightning")


def fit(
    task_type: type[Task],
    config: TrainConfig,
    folder: RunFolder,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    about: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Train and leave a folder with configuration, weights, metrics and plots.

    Nothing is written, or removed, before configuration, data and model are known to be good. Where the
    configuration asks for several processes, Lightning starts them with this process's command, unless torchrun or
    SLURM has; rank 0 writes and reports.

    Args:
        task_type: The task.
        config: Its configuration.
        folder: Where to write.
        resume: Continue the run in `folder` at the batch where its state was saved.
        overwrite: Replace the run in `folder`.
        console: Where to report progress; nowhere by default.
        about: What `config.json` holds besides, such as the command.

    Returns:
        How the best weights do on the validation images.

    Raises:
        InputError: Something in the configuration or the data cannot be used.
        Stopped: Ctrl-C or SIGTERM came; the state has been saved.
        OSError: A file could not be written.
    """
    rank_here = process_rank(config)
    console = console if console is not None and rank_here == 0 else Console(quiet=True)
    if resume:
        folder.check_resumable(config)
    elif rank_here == 0:
        folder.check_free(overwrite=overwrite)
    check_logger(config.logger)
    device = find_device(config.device)
    if device.type == "cpu" and config.sync_batchnorm:
        raise InputError("--sync-batchnorm needs GPUs")
    with console.status("reading the data"):
        splits = task_type.load_data(config)
    task = task_type.from_config(config, splits, resume=resume)
    if config.sync_batchnorm:
        task.model = convert_sync_batchnorm(task.model)
    transforms = task.train_transform, task.eval_transform
    data = ImageData(splits, *transforms, config, task.collate, task.eval_batch_size)
    images = epoch_images(len(splits.train), config.batch_size, config.grad_accum, config.processes)
    steps = -(-images * config.processes // config.images_per_step)
    if config.steps is not None:
        config = replace(config, epochs=-(-config.steps // steps))
    optim = config.scaled(config.images_per_step)
    make_optimizer(task.model, optim)  # Lightning makes another one, but only once the folder has been cleared
    task.describe(splits, console)
    where = f"on {device}; highest learning rate {optim.lr:g}"
    lines = [f"Steps  {steps:,} per epoch of {config.images_per_step} images {where}"]
    for line in lines + _notes(config, steps, complete=resume and folder.results.is_file()):
        console.out(line, highlight=False)
    if not resume:
        if isinstance(splits.train, ImageStream):
            splits.train.check_ends()
        with console.status(f"reading {how_many(splits.val)} validation images once"):
            check_readable(splits.val, config.num_workers)
    module = TrainingModule(task, optim, config.seed)
    with stop_on_signals() as stop, quiet_lightning():
        recorder = RunRecorder(folder, stop)
        trainer = make_trainer(config, device, folder, [recorder, TrainingProgress(console, recorder)])
        with folder.lock() if rank_here == 0 else nullcontext():
            if rank_here == 0:
                versions = {name: importlib.metadata.version(name) for name in _VERSIONS}
                chosen = {**to_dict(config), "monitor": task.monitor}
                record = {"task": config.task, **(about or {}), "versions": versions}
                record = {**(json.loads(folder.config.read_text()) if resume else record), "config": chosen}
                files = {folder.config: record, folder.model: {"task": task.name, **to_dict(task.spec)}}
                # When resumed, too: the data may have moved. By then it is known to be the same.
                write = LambdaCallback(on_train_start=lambda *_: list(map(write_json, files, files.values())))
                trainer.callbacks.append(write)
                if not resume:
                    folder.clear()
            trainer.loggers = make_loggers(config.logger, folder) if rank_here == 0 else []
            _fit(trainer, module, data, folder.state if resume else None)
    best = task_type.load(folder.best, str(trainer.strategy.root_device), config.precision, optimized=False)
    evaluation = evaluate(best, splits.val, task.eval_batch_size or config.batch_size, config.num_workers, console)
    if rank_here == 0:
        _finish(folder, recorder, evaluation, splits, task.monitor, console)
    if not math.isfinite(evaluation.metrics().get("loss", 0.0)):
        raise InputError(f"no weights of this run give a finite loss; see {folder.metrics}, and try a lower --lr")
    return evaluation


def _fit(trainer: lightning.Trainer, module: TrainingModule, data: ImageData, state: Path | None) -> None:
    try:
        trainer.fit(module, data, ckpt_path=state and str(state))
    except SystemExit:  # Lightning's answer to a second Ctrl-C
        raise KeyboardInterrupt from None
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            raise InputError(f"--batch-size {data.batch_size} is too small for batch norms") from error
        raise
    except RuntimeError as error:
        if lost_another(error):
            raise InputError("another process of this run has stopped; its own message says why") from error
        raise


def make_trainer(
    config: TrainConfig, device: torch.device, folder: RunFolder, callbacks: list[Any]
) -> lightning.Trainer:
    """Lightning's trainer with nothing printed and checkpoints written safely.

    Raises:
        InputError: The device cannot compute in the precision asked for, or there are fewer.
    """
    if config.devices > 1 and device.index is not None:
        raise InputError(f"--device {device} is one; with --devices {config.devices} use --device {device.type}")
    try:
        return lightning.Trainer(
            accelerator={"cuda": "gpu"}.get(device.type, device.type),
            devices=config.devices if device.index is None or device.type == "cpu" else [device.index],
            num_nodes=config.num_nodes,
            # Buffers differ between processes during an epoch (see `TrainingModule.on_validation_start`).
            strategy=DDPStrategy(broadcast_buffers=False) if config.processes > 1 else "auto",
            precision=config.precision,
            max_epochs=config.epochs,
            gradient_clip_val=config.clip_grad,
            accumulate_grad_batches=config.grad_accum,
            callbacks=callbacks,
            plugins=[SafeCheckpointIO(), environment_of(config)],
            default_root_dir=folder.path,
            logger=False,  # added later: some write at once
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the data module divides the images itself
        )
    except (ValueError, MisconfigurationException) as error:
        raise InputError(f"cannot train on {device} in {config.precision}: {error}") from error


def _notes(config: TrainConfig, steps: int, *, complete: bool) -> list[str]:
    """What a user should know before the run; `steps` are those of an epoch."""
    epochs, warmup, decay = config.epochs, config.warmup_epochs, config.ema_decay
    lines = []
    if complete:
        lines += [f"Note   this run was complete: {epochs} of {epochs} epochs trained"]
    elif warmup >= epochs:
        lines += [f"Note   the warmup of {warmup} epochs is shortened to {epochs - 1}, because --epochs is {epochs}"]
    if decay and not config.ema_warmup and steps * epochs * (1 - decay) < 3:  # over 5 % of the first weights
        few = f"{steps * epochs} steps are few for --ema-decay {decay}: the average keeps much of the first weights"
        lines += [f"Note   {few}; add --ema-warmup, or --ema-decay None"]
    return lines


def _finish(
    folder: RunFolder, recorder: RunRecorder, evaluation: Evaluation, splits: Splits, monitor: str, console: Console
) -> None:
    """Write results and plots and print where they are."""
    recorder.write_metrics()
    best = max(recorder.history, key=lambda row: rank(row, monitor))
    last = recorder.history[-1]
    values = {"best_epoch": best["epoch"], **evaluation.metrics(), f"last_epoch_{monitor}": last[f"val_{monitor}"]}
    write_json(folder.results, {**values, **evaluation.details()})
    draw_curves(recorder.history, best, monitor, folder.curves)
    plots = {"Curves": folder.curves, **evaluation.draw(splits.val, folder.path)}
    console.print()
    evaluation.report(console, title=f"Best epoch, {best['epoch']} of {last['epoch']}")
    console.print(f"Last epoch: {monitor.replace('_', ' ')} {last[f'val_{monitor}']:.2%}", highlight=False)
    for what, path in {**plots, "Weights": folder.best}.items():
        console.out(f"{what:<12} {path}", highlight=False)


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
