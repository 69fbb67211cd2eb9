import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from vision_ssm.data.datasets import Images, LabelledImages, Splits
from vision_ssm.data.seeding import AUGMENT, ORDER, REPLACE, seeded
from vision_ssm.data.streams import ImageStream, StreamedImage, read_ahead
from vision_ssm.errors import InputError

Transform = Callable[[Image.Image], Tensor]

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
        with seeded(self.seed, ORDER, epoch):
            order = torch.randperm(self.length).tolist()
        start = self.start if epoch == self.first_epoch else 0
        return ((epoch, index) for index in order[self.rank :: self.world][start : self.used])


class StreamSampler(EpochSampler):
    """Yields (epoch, image) of a stream, as `EpochSampler` yields (epoch, index).

    The images are read here, in the process that trains, and go to the workers as they are encoded. So their order
    does not depend on the number of workers.

    Args:
        stream: The images.
        seed: Decides the orders.
        options: Those of `EpochSampler`.
    """

    def __init__(self, stream: ImageStream, seed: int, *options: Any, **named: Any) -> None:
        super().__init__(len(stream), seed, *options, **named)
        self.stream = stream

    def __iter__(self) -> Iterator[tuple[int, StreamedImage]]:  # type: ignore[override]
        epoch = self.epoch
        start = self.start if epoch == self.first_epoch else 0
        images = self.stream.training_images(self.seed, epoch, start, self.rank, self.world)
        return ((epoch, image) for image in read_ahead(itertools.islice(images, self.used - start)))


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
            others = np.random.default_rng((self.seed, REPLACE, epoch, index)).integers(len(self), size=_TRIES)
            for chosen in others.tolist():
                image = self._load(chosen, unreadable)
                if image is not None:
                    break
            else:
                line = next(iter(unreadable.values()))
                raise InputError(f"hardly any training image can be read; the first one: {line}")
        with seeded(self.seed, AUGMENT, epoch, index):
            return self.transform(image), self.images.targets[chosen], unreadable

    def _load(self, index: int, unreadable: dict[str, str]) -> Image.Image | None:
        try:
            return self.images.load(index)
        except InputError as error:
            unreadable[self.images.names[index]] = error.line
            return None


class StreamTrainingSamples(Dataset[tuple[Tensor, int, dict[str, str]]]):
    """Images of a stream changed at random, as a function of (seed, epoch, place of the image).

    Another image of the batch, drawn as a function of the same three, takes the place of one that cannot be read.

    Args:
        transform: The random change; it draws from the global generators.
        seed: Decides what it draws.
    """

    def __init__(self, transform: Transform, seed: int) -> None:
        self.transform, self.seed = transform, seed

    def __getitems__(self, keys: Sequence[tuple[int, StreamedImage]]) -> list[tuple[Tensor, int, dict[str, str]]]:
        """The samples of a batch (torch's loader calls this in place of `__getitem__`)."""
        samples: dict[int, tuple[Tensor, int, dict[str, str]]] = {}
        unreadable: dict[int, dict[str, str]] = {}
        for i, (epoch, image) in enumerate(keys):
            try:
                samples[i] = self._change(image, epoch, image.place), image.target, {}
            except InputError as error:
                unreadable[i] = {image.name: error.line}
        if not samples:
            line = next(iter(unreadable[0].values()))
            raise InputError(f"no image of a whole batch can be read; the first one: {line}")
        readable = list(samples)
        for i, reason in unreadable.items():
            epoch, image = keys[i]
            chosen = np.random.default_rng((self.seed, REPLACE, epoch, *image.place)).integers(len(readable))
            other = keys[readable[chosen]][1]
            samples[i] = self._change(other, epoch, image.place), other.target, reason
        return [samples[i] for i in range(len(keys))]

    def _change(self, image: StreamedImage, epoch: int, place: tuple[int, int]) -> Tensor:
        loaded = image.load()
        with seeded(self.seed, AUGMENT, epoch, *place):
            return self.transform(loaded)


class Samples(Dataset[tuple[Tensor, int]]):
    """Images under a transform that draws nothing, by their keys.

    Args:
        images: The images.
        transform: What turns an image into a (3, H, W) tensor.
    """

    def __init__(self, images: Images, transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, key: Any) -> tuple[Tensor, int]:
        return self.transform(self.images.load(key)), self.images.target(key)


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


def find_unreadable(images: Images, workers: int = 0) -> dict[str, str]:
    """Names of the images that cannot be read, and why.

    Args:
        images: The images; each is read once.
        workers: Number of loading processes, used for more than a few images.
    """
    # Starting processes takes longer than reading a few images.
    count = workers if isinstance(images, ImageStream) or len(images) > 256 else 0
    keys = images.in_order()
    loader = DataLoader(_Reasons(images), batch_size=None, sampler=keys, num_workers=count, generator=torch.Generator())
    return {name: line for name, line in loader if line}


class _Reasons(Dataset[tuple[str, str]]):
    """The name of each image, and why it cannot be read, or nothing."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, key: Any) -> tuple[str, str]:
        name = self.images.name(key)
        try:
            self.images.load(key)
        except InputError as error:
            return name, error.line
        return name, ""


def _collate_training(samples: Sequence[tuple[Tensor, int, dict[str, str]]]) -> tuple[Any, Any, dict[str, str]]:
    images, targets = default_collate([sample[:2] for sample in samples])
    return images, targets, {name: line for *_, unreadable in samples for name, line in unreadable.items()}


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the trainer ends its workers itself, after saving.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
