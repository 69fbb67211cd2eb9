import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vision_ssm.data.datasets import Images, LabelledImages
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
