import functools
import signal
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from vision_ssm.data.dataset import Splits
from vision_ssm.data.sampling import (
    Collate,
    EpochSampler,
    Samples,
    TrainingSamples,
    Transform,
    collate_readable,
    loader_workers,
)
from vision_ssm.data.streams import ImageStream
from vision_ssm.errors import InputError
from vision_ssm.recipes import TrainConfig


class ImageData(lightning.LightningDataModule):
    """Training and validation batches whose content does not depend on workers or on interruptions.

    A batch is a dict, such as `image`, `id` and `label`. In a trainer of several processes (made with
    `use_distributed_sampler=False`) each gets its own part of the images, in validation too, where none is left out
    and none comes twice.

    A checkpoint taken anywhere in an epoch continues with the very next batch of that epoch; a stream is read from the
    beginning of a shard for that. Unreadable training images are replaced and collected in `unreadable`, id and
    reason; unreadable validation images are errors.

    Args:
        splits: The images.
        train_transform: Random change of a training sample.
        eval_transform: What validation samples go through.
        config: Batch size, gradient accumulation, seed, number of workers, and how many images may be unreadable.
        collate: Makes a batch of samples.
        eval_batch_size: Batch size of validation, if not that of training.

    Raises:
        InputError: A step takes more images than there are to train on.
    """

    def __init__(
        self,
        splits: Splits,
        train_transform: Transform,
        eval_transform: Transform,
        config: TrainConfig,
        collate: Collate = default_collate,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not epoch_images(len(splits.train), config.batch_size, config.grad_accum, config.processes):
            size = f"--batch-size {config.batch_size} times --grad-accum {config.grad_accum}"
            processes = f" times {config.processes} processes" if config.processes > 1 else ""
            raise InputError(f"{size}{processes} is larger than the {len(splits.train)} training images")
        self.splits, self.config, self.collate = splits, config, collate
        self.train_transform, self.eval_transform = train_transform, eval_transform
        self.batch_size, self.seed, self.eval_batch_size = config.batch_size, config.seed, eval_batch_size
        self.unreadable: dict[str, str] = {}
        self._batches_done = 0

    @property
    def images_per_epoch(self) -> int:
        """Training images per epoch of each process."""
        return epoch_images(len(self.splits.train), self.batch_size, self.config.grad_accum, self._place()["world"])

    @property
    def batches_per_epoch(self) -> int:
        """Training batches per epoch of each process."""
        return -(-self.images_per_epoch // self.batch_size)

    def _place(self) -> dict[str, int]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return dict(rank=rank, world=world)

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches, from where the loaded checkpoint stopped."""
        epoch, batch = divmod(self._batches_done, self.batches_per_epoch)
        images = self.splits.train
        start, used = batch * self.batch_size, self.images_per_epoch
        sampler = EpochSampler(images, self.seed, epoch, start, used, **self._place())
        data = TrainingSamples(images, self.train_transform, self.seed)
        return self._loader(data, sampler, functools.partial(collate_readable, self.collate))

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches, all of them, in order."""
        images = self.splits.val
        return self._loader(Samples(images, self.eval_transform), images.in_order(**self._place()), self.collate)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Take the ids of unreadable images from a training batch (Lightning calls this).

        Raises:
            InputError: There are too many of them.
        """
        for name, line in batch.pop("unreadable", {}).items():
            self.unreadable.setdefault(name, line)
            self._check_unreadable(line)
        return batch

    def gather(self) -> None:
        """Tell each of several processes what the others could not read and have read; all have to call it."""
        world = self._place()["world"]
        if world > 1:
            parts: list[Any] = [None] * world
            torch.distributed.all_gather_object(parts, (self.unreadable, self._shard_lengths))
            for unreadable, lengths in parts:
                self.unreadable |= unreadable
                self._shard_lengths.update(lengths)

    @property
    def _shard_lengths(self) -> dict[int, int]:
        return self.splits.train.lengths if isinstance(self.splits.train, ImageStream) else {}

    @property
    def _fingerprint(self) -> list[str]:
        return [self.splits.train.fingerprint, self.splits.val.fingerprint]

    def _check_unreadable(self, last: str) -> None:
        count, share = len(self.splits.train), self.config.max_unreadable
        allowed = max(1, int(share * count)) if share else 0
        if not allowed:
            raise InputError(f"{last}; to train without such images, allow some with --max-unreadable")
        if len(self.unreadable) > allowed:
            raise InputError(
                f"{len(self.unreadable)} of {count} training images cannot be read, --max-unreadable {share:g} "
                f"allows {allowed}; the last one: {last}"
            )

    def state_dict(self) -> dict[str, Any]:
        """How far training has come (Lightning stores it in the checkpoint)."""
        done = self.trainer.fit_loop.epoch_loop.total_batch_idx + 1 if self.trainer else self._batches_done
        return {
            "batches_done": done,
            "fingerprint": self._fingerprint,
            "unreadable": dict(self.unreadable),
            "shard_lengths": dict(self._shard_lengths),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the batches that the checkpoint has seen.

        Raises:
            InputError: The training images are not those of the checkpoint.
        """
        if state_dict["fingerprint"] != self._fingerprint:
            raise InputError("cannot resume: names, labels or file sizes of the images differ from those of the run")
        self._batches_done = state_dict["batches_done"]
        self.unreadable = dict(state_dict["unreadable"])
        self._shard_lengths.update(state_dict["shard_lengths"])

    def _loader(self, data: Dataset[Any], sampler: Any, collate: Any) -> DataLoader[Any]:
        evaluates, workers = isinstance(data, Samples), loader_workers(self.config.num_workers)
        return DataLoader(
            data,
            batch_size=(evaluates and self.eval_batch_size) or self.batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_signals,
            # Otherwise each iterator draws its seed from the global generator.
            generator=torch.Generator().manual_seed(self.seed),
        )


def epoch_images(images: int, batch_size: int, grad_accum: int, world: int) -> int:
    """Training images per epoch of each of several processes.

    They make whole steps and, where over 5 % would be left out, a smaller last one; with gradient accumulation whole
    steps only.
    """
    own, step = images // world, batch_size * grad_accum
    left = own % step // 2 * 2  # an even number, which mixup needs, as batch norms need more than one
    return own - own % step + (left if grad_accum == 1 and left > 0.05 * own else 0)


def _ignore_signals(worker: int) -> None:
    # They reach the whole process group; the trainer ends its workers itself, after saving.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
