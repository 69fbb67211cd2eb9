import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vision_ssm.data.dataset import Images, Sample
from vision_ssm.data.seeding import AUGMENT, REPLACE, restored_generators, seed_generators
from vision_ssm.data.streams import ImageStream
from vision_ssm.errors import InputError

Transform = Callable[[Sample], Sample]
"""From a sample with a PIL image to one with a tensor."""


Collate = Callable[[list[Sample]], dict[str, Any]]


def collate_readable(collate: Collate, samples: list[Sample]) -> dict[str, Any]:
    """A batch of the samples that have an image, and what could not be read as `unreadable`."""
    unreadable = {name: line for sample in samples for name, line in sample.pop("unreadable", {}).items()}
    readable = [sample for sample in samples if sample]
    return {**(collate(readable) if readable else {"id": []}), "unreadable": unreadable}


class EpochSampler(Sampler[tuple[int, Any]]):
    """Yields (epoch, key) in an order that is a function of (seed, epoch) alone.

    The images of a stream are read here, in the process that trains, and go to the workers as they are encoded. So
    their order does not depend on the number of workers.

    Args:
        images: The images.
        seed: Decides the orders.
        epoch: The first epoch to yield.
        start: Number of samples to skip at the beginning of that first epoch, because they have been used.
        used: Number of samples that each process uses in an epoch; by default as many as there are.
        rank: Which of several processes this is.
        world: Number of processes. Each gets as many samples; those of a data set are given to one process only.
    """

    def __init__(
        self,
        images: Images,
        seed: int,
        epoch: int = 0,
        start: int = 0,
        used: int | None = None,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.images, self.seed, self.rank, self.world = images, seed, rank, world
        self.used = len(images) // world if used is None else used
        self.epoch = self.first_epoch = epoch
        self.start = start

    def __len__(self) -> int:
        return self.used

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields (Lightning calls this)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        epoch = self.epoch
        start = self.start if epoch == self.first_epoch else 0
        keys = self.images.order(self.seed, epoch, start, self.used, self.rank, self.world)
        return ((epoch, key) for key in keys)


class TrainingSamples(Dataset[Sample]):
    """Images changed at random, as a function of (seed, epoch, image).

    Another image, drawn as a function of the same three, takes the place of one that cannot be read. A sample's
    `unreadable` maps the ids of those that could not be read to the reasons.

    Args:
        images: The images.
        transform: The random change; it draws from the global generators.
        seed: Decides what it draws.
    """

    def __init__(self, images: Images, transform: Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitems__(self, keys: Sequence[tuple[int, Any]]) -> list[Sample]:
        """The samples of a batch (torch's loader calls this)."""
        batch = [key for _, key in keys]
        with restored_generators():  # once per batch: it takes longer than seeding
            return [self._sample(epoch, key, batch) for epoch, key in keys]

    def _sample(self, epoch: int, key: Any, batch: Sequence[Any]) -> Sample:
        unreadable: dict[str, str] = {}
        place = self.images.place(key)
        sample = self._read(key, unreadable)
        if sample is None:
            generator = np.random.default_rng((self.seed, REPLACE, epoch, *place))
            others = (self._read(other, unreadable) for other in self.images.substitutes(key, batch, generator))
            sample = next((other for other in others if other is not None), None)
        if sample is None:
            raise InputError(f"hardly any training image can be read; the first one: {next(iter(unreadable.values()))}")
        seed_generators(self.seed, AUGMENT, epoch, *place)
        return {**self.transform(sample), "unreadable": unreadable}

    def _read(self, key: Any, unreadable: dict[str, str]) -> Sample | None:
        try:
            return self.images.sample(key)
        except InputError as error:
            unreadable[self.images.id(key)] = error.line
            return None


class Samples(Dataset[Sample]):
    """Images under a transform that draws nothing, by their keys.

    Args:
        images: The images.
        transform: The transform.
        tolerant: Return a sample with nothing but `unreadable`, id and reason, for an image that cannot be read.
    """

    def __init__(self, images: Images, transform: Transform, *, tolerant: bool = False) -> None:
        self.images, self.transform, self.tolerant = images, transform, tolerant

    def __getitem__(self, key: Any) -> Sample:
        try:
            return self.transform(self.images.sample(key))
        except InputError as error:
            if not self.tolerant:
                raise
            return {"unreadable": {self.images.id(key): error.line}}


def find_unreadable(images: Images, workers: int | None = None) -> dict[str, str]:
    """Ids of the images that cannot be read, and why.

    Args:
        images: The images; each is read once.
        workers: Number of loading processes, used for more than a few images.
    """
    # Starting processes takes longer than reading a few images.
    count = loader_workers(workers) if isinstance(images, ImageStream) or len(images) > 256 else 0
    keys: Any = images.in_order()
    data = Samples(images, _leave_out, tolerant=True)
    loader = DataLoader(data, batch_size=None, sampler=keys, num_workers=count, generator=torch.Generator())
    return {name: line for sample in loader for name, line in sample.get("unreadable", {}).items()}


def _leave_out(sample: Sample) -> Sample:
    return {}


def loader_workers(workers: int | None) -> int:
    """Number of loading processes: as asked, or all cores but one, at most eight."""
    return min(8, max(1, (os.cpu_count() or 2) - 1)) if workers is None else workers
