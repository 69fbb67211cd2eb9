import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from vision_ssm.data.datasets import LabelledImages, Splits
from vision_ssm.data.seeding import seeded
from vision_ssm.errors import InputError

Transform = Callable[[Image.Image], Tensor]

# Keeps the draws for sample order, augmentation, training step, first weights and replacements apart.
_ORDER, _AUGMENT, _REPLACE = 0, 1, 4

# Draws in search of a readable image; if all fail, next to nothing can be read.
_TRIES = 20


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index) in an order that is a function of (seed, epoch) alone.

    Args:
        length: Number of samples.
        seed: Decides the orders.
        epoch: The first epoch to yield.
        start: How many samples to leave out at the beginning of that first epoch, because they have been used.
        used: How many samples an epoch uses, of each process; as many as there are by default.
        rank: Which of several processes this is.
        world: How many there are. Each gets as many samples, none of which another one gets.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        epoch: int = 0,
        start: int = 0,
        used: int | None = None,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.length, self.seed = length, seed
        self.rank, self.world = rank, world
        self.used = length // world if used is None else used
        self.epoch = self.first_epoch = epoch
        self.start = start

    def __len__(self) -> int:
        return self.used

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields (Lightning calls this)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        with seeded(self.seed, _ORDER, epoch):
            order = torch.randperm(self.length).tolist()
        start = self.start if epoch == self.first_epoch else 0
        return ((epoch, index) for index in order[self.rank :: self.world][start : self.used])


class TrainingSamples(Dataset[tuple[Tensor, int, dict[str, str]]]):
    """Images changed at random, as a function of (seed, epoch, index).

    Another image, drawn as a function of the same three, takes the place of one that cannot be read. The third
    part of a sample holds the names of those that could not be read, and why.

    Args:
        images: The images.
        transform: The random change; it draws from the global generators.
        seed: Decides what it draws.
    """

    def __init__(self, images: LabelledImages, transform: Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, dict[str, str]]:
        epoch, index = key
        unreadable: dict[str, str] = {}
        chosen, image = index, self._load(index, unreadable)
        if image is None:
            others = np.random.default_rng((self.seed, _REPLACE, epoch, index)).integers(len(self), size=_TRIES)
            for chosen in others.tolist():
                image = self._load(chosen, unreadable)
                if image is not None:
                    break
            else:
                line = next(iter(unreadable.values()))
                raise InputError(f"hardly any training image can be read; the first one: {line}")
        with seeded(self.seed, _AUGMENT, epoch, index):
            return self.transform(image), self.images.targets[chosen], unreadable

    def _load(self, index: int, unreadable: dict[str, str]) -> Image.Image | None:
        try:
            return self.images.load(index)
        except InputError as error:
            unreadable[self.images.names[index]] = error.line
            return None


class Samples(Dataset[tuple[Tensor, int]]):
    """Images under a transform that draws nothing.

    Args:
        images: The images.
        transform: What turns an image into a (3, H, W) tensor.
    """

    def __init__(self, images: LabelledImages, transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images.load(index)), self.images.targets[index]


class ImageData(lightning.LightningDataModule):
    """Training and validation batches whose content does not depend on workers or on interruptions.

    In a trainer of several processes (made with `use_distributed_sampler=False`) each gets its own part of the images,
    in validation too, where none is left out and none comes twice.

    A checkpoint taken anywhere in an epoch continues with the very next batch of that epoch. Unreadable training
    images are replaced and collected in `unreadable`, name and reason; unreadable validation images are errors.

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
        sampler = EpochSampler(len(self.splits.train), self.seed, epoch, start, used, rank=rank, world=world)
        data = TrainingSamples(self.splits.train, self.train_transform, self.seed)
        return self._loader(data, sampler=sampler, collate_fn=_collate_training)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches, all of them, in order."""
        rank, world = self._place()
        return self._loader(
            Samples(self.splits.val, self.eval_transform), sampler=range(rank, len(self.splits.val), world)
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

    def gather_unreadable(self) -> None:
        """Tell each of several processes what the others could not read; all have to call it."""
        world = self._place()[1]
        if world > 1:
            parts: list[Any] = [None] * world
            torch.distributed.all_gather_object(parts, self.unreadable)
            for part in parts:
                self.unreadable |= part

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


def find_unreadable(images: LabelledImages, workers: int = 0) -> dict[str, str]:
    """Names of the images that cannot be read, and why.

    Args:
        images: The images; each is read once.
        workers: Number of loading processes, used for more than a few images.
    """
    # Starting processes takes longer than reading a few images.
    loader = DataLoader(
        _Reasons(images), batch_size=None, num_workers=workers if len(images) > 256 else 0, generator=torch.Generator()
    )
    return {images.names[i]: line for i, line in enumerate(loader) if line}


class _Reasons(Dataset[str]):
    """For each image why it cannot be read, or nothing."""

    def __init__(self, images: LabelledImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> str:
        try:
            self.images.load(index)
        except InputError as error:
            return error.line
        return ""


def _collate_training(samples: Sequence[tuple[Tensor, int, dict[str, str]]]) -> tuple[Any, Any, dict[str, str]]:
    images, targets = default_collate([sample[:2] for sample in samples])
    return images, targets, {name: line for *_, unreadable in samples for name, line in unreadable.items()}


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the trainer ends its workers itself, after saving.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
