import signal
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from vision_ssm.data.datasets import Splits
from vision_ssm.data.samples import (
    EpochSampler,
    Samples,
    StreamSampler,
    StreamTrainingSamples,
    TrainingSamples,
    Transform,
)
from vision_ssm.data.streams import ImageStream
from vision_ssm.errors import InputError


class ImageData(lightning.LightningDataModule):
    """Training and validation batches whose content does not depend on workers or on interruptions.

    In a trainer of several processes (made with `use_distributed_sampler=False`) each gets its own part of the images,
    in validation too, where none is left out and none comes twice.

    A checkpoint taken anywhere in an epoch continues with the very next batch of that epoch; a stream is read from the
    beginning of a shard for that. Unreadable training images are replaced and collected in `unreadable`, name and
    reason; unreadable validation images are errors.

    Args:
        splits: The images.
        train_transform: Random change of a training image.
        eval_transform: What validation images go through.
        batch_size: Images per batch.
        seed: Decides order and augmentation.
        workers: Number of loading processes.
        accumulate: Batches per step. Training leaves out the incomplete last step (other images each epoch).
        max_unreadable: Largest share of the training images that may be unreadable; one may be, unless it is 0.

    Raises:
        InputError: A step takes more images than there are to train on.
    """

    def __init__(
        self,
        splits: Splits,
        train_transform: Transform,
        eval_transform: Transform,
        batch_size: int,
        seed: int,
        workers: int,
        accumulate: int = 1,
        max_unreadable: float = 0.01,
    ) -> None:
        super().__init__()
        if batch_size * accumulate > len(splits.train):
            size = f"--batch-size {batch_size}" + (f" times --accumulate {accumulate}" if accumulate > 1 else "")
            raise InputError(f"{size} is larger than the {len(splits.train)} training images")
        self.splits = splits
        self.train_transform, self.eval_transform = train_transform, eval_transform
        self.batch_size, self.seed, self.workers, self.accumulate = batch_size, seed, workers, accumulate
        self.max_unreadable = max_unreadable
        self.unreadable: dict[str, str] = {}
        self._batches_done = 0

    @property
    def batches_per_epoch(self) -> int:
        """Training batches in one epoch, of each process; a multiple of those in a step."""
        images = len(self.splits.train) // self._place()[1]
        return images // (self.batch_size * self.accumulate) * self.accumulate

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches, from where the loaded checkpoint stopped."""
        epoch, batch = divmod(self._batches_done, self.batches_per_epoch)
        rank, world = self._place()
        start, used = batch * self.batch_size, self.batches_per_epoch * self.batch_size
        images, place = self.splits.train, dict(rank=rank, world=world)
        data: Dataset[Any]
        if isinstance(images, ImageStream):
            sampler: EpochSampler = StreamSampler(images, self.seed, epoch, start, used, **place)
            data = StreamTrainingSamples(self.train_transform, self.seed)
        else:
            sampler = EpochSampler(len(images), self.seed, epoch, start, used, **place)
            data = TrainingSamples(images, self.train_transform, self.seed)
        return self._loader(data, sampler=sampler, collate_fn=_collate_training)

    def resume_point(self) -> tuple[str, int] | None:
        """Where a stream is read from to resume inside an epoch: a shard, and how many of its images are left out."""
        epoch, batch = divmod(self._batches_done, self.batches_per_epoch)
        if not batch or not isinstance(self.splits.train, ImageStream):
            return None
        return self.splits.train.resume_point(self.seed, epoch, batch * self.batch_size, *self._place())

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches, all of them, in order."""
        rank, world = self._place()
        return self._loader(
            Samples(self.splits.val, self.eval_transform), sampler=self.splits.val.in_order(rank, world)
        )

    def on_before_batch_transfer(self, batch: Sequence[Any], dataloader_idx: int) -> Sequence[Any]:
        """Take from a training batch the names of unreadable images (Lightning calls this).

        Raises:
            InputError: There are more of them than may be.
        """
        images, targets, *unreadable = batch
        for name, line in (pair for each in unreadable for pair in each.items()):
            self.unreadable.setdefault(name, line)
            self._check_unreadable(line)
        return images, targets

    def gather(self) -> None:
        """Tell each of several processes what the others could not read and have read; all have to call it."""
        world = self._place()[1]
        if world > 1:
            parts: list[Any] = [None] * world
            torch.distributed.all_gather_object(parts, (self.unreadable, self._shard_lengths))
            for unreadable, lengths in parts:
                self.unreadable |= unreadable
                self._shard_lengths.update(lengths)

    @property
    def _shard_lengths(self) -> dict[int, int]:
        return self.splits.train.lengths if isinstance(self.splits.train, ImageStream) else {}

    def _check_unreadable(self, last: str) -> None:
        count, share = len(self.splits.train), self.max_unreadable
        allowed = max(1, int(share * count)) if share else 0
        if not allowed:
            raise InputError(f"{last}; to train without such images, allow some with --data.max-unreadable")
        if len(self.unreadable) > allowed:
            raise InputError(
                f"{len(self.unreadable)} of {count} training images cannot be read, --data.max-unreadable {share:g} "
                f"allows {allowed}; the last one: {last}"
            )

    def state_dict(self) -> dict[str, Any]:
        """How far training has come (Lightning stores it in the checkpoint)."""
        done = self.trainer.fit_loop.epoch_loop.total_batch_idx + 1 if self.trainer else self._batches_done
        return {
            "batches_done": done,
            "fingerprint": self.splits.train.fingerprint(),
            "unreadable": dict(self.unreadable),
            "shard_lengths": dict(self._shard_lengths),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the batches that the checkpoint has seen.

        Raises:
            InputError: The training images are not those of the checkpoint.
        """
        if state_dict["fingerprint"] != self.splits.train.fingerprint():
            raise InputError("cannot resume: the training images are not those the run was started with")
        self._batches_done = state_dict["batches_done"]
        self.unreadable = dict(state_dict.get("unreadable", {}))
        self._shard_lengths.update(state_dict.get("shard_lengths", {}))

    def _loader(self, data: Dataset[Any], **options: Any) -> DataLoader[Any]:
        return DataLoader(
            data,
            batch_size=self.batch_size,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_interrupt,
            # Otherwise each iterator draws its seed from the global generator.
            generator=torch.Generator().manual_seed(self.seed),
            **options,
        )


def _collate_training(samples: Sequence[tuple[Tensor, int, dict[str, str]]]) -> tuple[Any, Any, dict[str, str]]:
    images, targets = default_collate([sample[:2] for sample in samples])
    return images, targets, {name: line for *_, unreadable in samples for name, line in unreadable.items()}


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the trainer ends its workers itself, after saving.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
