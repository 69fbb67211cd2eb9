import signal
from collections.abc import Callable, Iterator
from typing import Any

import lightning
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vision_ssm.data.datasets import LabelledImages, Splits
from vision_ssm.data.seeding import seeded
from vision_ssm.errors import InputError

Transform = Callable[[Image.Image], Tensor]

# Keeps the draws for sample order, augmentation and training step apart.
_ORDER, _AUGMENT = 0, 1


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index) in an order that is a function of (seed, epoch) alone.

    Args:
        length: Number of samples.
        seed: Decides the orders.
        epoch: The first epoch to yield.
        start: How many samples to leave out at the beginning of that first epoch, because they have been used.
        used: How many samples an epoch uses, a multiple of `world`; all of them by default.
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
        self.used = length if used is None else used
        self.rank, self.world = rank, world
        self.epoch = self.first_epoch = epoch
        self.start = start

    def __len__(self) -> int:
        return self.used // self.world

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields (Lightning calls this)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        with seeded(self.seed, _ORDER, epoch):
            order = torch.randperm(self.length).tolist()
        start = self.start if epoch == self.first_epoch else 0
        return ((epoch, index) for index in order[self.rank : self.used : self.world][start:])


class TrainingSamples(Dataset[tuple[Tensor, int]]):
    """Images changed at random, as a function of (seed, epoch, index).

    Args:
        images: The images.
        transform: The random change; it draws from the global generators.
        seed: Decides what it draws.
    """

    def __init__(self, images: LabelledImages, transform: Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        image = self.images.load(index)
        with seeded(self.seed, _AUGMENT, epoch, index):
            return self.transform(image), self.images.targets[index]


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

    A checkpoint taken anywhere in an epoch continues with the very next batch of that epoch.

    Args:
        splits: The images.
        train_transform: Random change of a training image.
        eval_transform: What validation images go through.
        batch_size: Images per batch.
        seed: Decides order and augmentation.
        workers: Number of loading processes.
        accumulate: Batches per step. Training leaves out the incomplete last step (other images each epoch).

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
    ) -> None:
        super().__init__()
        if batch_size * accumulate > len(splits.train):
            size = f"--batch-size {batch_size}" + (f" times --accumulate {accumulate}" if accumulate > 1 else "")
            raise InputError(f"{size} is larger than the {len(splits.train)} training images")
        self.splits = splits
        self.train_transform, self.eval_transform = train_transform, eval_transform
        self.batch_size, self.seed, self.workers, self.accumulate = batch_size, seed, workers, accumulate
        self._batches_done = 0

    @property
    def batches_per_epoch(self) -> int:
        """Training batches in one epoch of each process, a multiple of those in a step."""
        return len(self.splits.train) // (self.batch_size * self.accumulate * self._place()[1]) * self.accumulate

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches, from where the loaded checkpoint stopped."""
        epoch, batch = divmod(self._batches_done, self.batches_per_epoch)
        rank, world = self._place()
        start, used = batch * self.batch_size, self.batches_per_epoch * self.batch_size * world
        sampler = EpochSampler(len(self.splits.train), self.seed, epoch, start, used, rank=rank, world=world)
        data = TrainingSamples(self.splits.train, self.train_transform, self.seed)
        return self._loader(data, sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches, all of them, in order."""
        rank, world = self._place()
        return self._loader(
            Samples(self.splits.val, self.eval_transform), sampler=range(rank, len(self.splits.val), world)
        )

    def state_dict(self) -> dict[str, Any]:
        """How far training has come (Lightning stores it in the checkpoint)."""
        done = self.trainer.fit_loop.epoch_loop.total_batch_idx + 1 if self.trainer else self._batches_done
        return {"batches_done": done, "fingerprint": self.splits.train.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the batches that the checkpoint has seen.

        Raises:
            InputError: The training images are not those of the checkpoint.
        """
        if state_dict["fingerprint"] != self.splits.train.fingerprint():
            raise InputError("cannot resume: the training images are not those the run was started with")
        self._batches_done = state_dict["batches_done"]

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


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the trainer ends its workers itself, after saving.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
