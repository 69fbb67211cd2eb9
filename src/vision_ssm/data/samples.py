from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vision_ssm.data.datasets import LabelledImages
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
