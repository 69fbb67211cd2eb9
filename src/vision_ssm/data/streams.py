import hashlib
import io
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from vision_ssm.data.images import open_image
from vision_ssm.data.seeding import ORDER
from vision_ssm.errors import InputError

T = TypeVar("T")

# Images that are read before they are asked for.
_AHEAD = 256

# What a process reads of a shard: its number, and which of its images.
Part = tuple[int, slice]


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded image of a stream.

    Args:
        place: Number of its shard, and its number in there.
        id: What to call it.
        label: Index of its class.
        content: The bytes of its file.
    """

    place: tuple[int, int]
    id: str
    label: int
    content: bytes


class ImageStream:
    """Labeled images that can only be read shard by shard. Its keys are the encoded images themselves.

    `lengths` holds the number of images in each shard that has been read to its end, by the number of the shard.

    Args:
        shards: In a fixed order. Each has a `name`, and iterates over id, class and encoded image of its samples, in a
            fixed order.
        classes: Names of the classes.
        length: Number of images, where it is known.
        buffer: Number of images from which the next training image is drawn.
    """

    def __init__(
        self, shards: Sequence[Any], classes: tuple[str, ...], length: int | None = None, buffer: int = 1
    ) -> None:
        self.shards, self.classes, self.length, self.buffer = shards, classes, length, buffer
        self.max_pixels: int | None = None
        self.least_pixels: int | None = None
        self.lengths: dict[int, int] = {}

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the number of images in this stream is not known")
        return self.length

    @property
    def fingerprint(self) -> str:
        """A digest of classes, shards and length, which shows whether they changed between two runs."""
        names = [*self.classes, *(shard.name for shard in self.shards), str(self.length)]
        return hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()

    def counts(self) -> list[int] | None:
        """None: the number of images of each class is not known."""
        return None

    def sample(self, key: Encoded) -> dict[str, Any]:
        """One image as 8-bit RGB, with its id and label.

        Raises:
            InputError: The image cannot be read.
        """
        image = open_image(io.BytesIO(key.content), key.id, self.max_pixels, least_pixels=self.least_pixels)
        return {"image": image, "id": key.id, "label": key.label}

    def id(self, key: Encoded) -> str:
        """What to call an image."""
        return key.id

    def place(self, key: Encoded) -> tuple[int, ...]:
        """Whole numbers that identify an image, for seeds."""
        return key.place

    def substitutes(self, key: Encoded, batch: Sequence[Encoded], generator: np.random.Generator) -> Iterable[Encoded]:
        """Images of the batch to try in place of one that cannot be read."""
        return [batch[i] for i in generator.permutation(len(batch))]

    def in_order(self, rank: int = 0, world: int = 1) -> "InOrder":
        """The images of one of several processes, in order; over all processes every image once."""
        return InOrder(self, rank, world)

    def pick(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The samples of these numbers, counted over the whole stream, which is read as far as needed."""
        wanted = enumerate(itertools.islice(self.in_order(), max(numbers, default=-1) + 1))
        found = {number: self.sample(key) for number, key in wanted if number in numbers}
        return [found[number] for number in numbers]

    def check_ends(self) -> None:
        """Read the first image of the first and of the last shard.

        Raises:
            InputError: It cannot be read, or has a class that does not exist.
        """
        for shard in {0, len(self.shards) - 1}:
            next(iter(self.read((shard, slice(None)))), None)

    def read(self, part: Part) -> Iterator[Encoded]:
        """The images of a part of a shard.

        Raises:
            InputError: It cannot be read, has a class that does not exist, or is not what it was.
        """
        shard, which = part
        yield from itertools.islice(self._read(shard), which.start, which.stop, which.step)

    def _read(self, shard: int) -> Iterator[Encoded]:
        number = 0
        for name, label, content in self.shards[shard]:
            if not 0 <= label < len(self.classes):
                raise InputError(f"{name} has label {label}, but there are {len(self.classes)} classes")
            yield Encoded((shard, number), name, label, content)
            number += 1
        if self.lengths.setdefault(shard, number) != number:
            before = self.lengths[shard]
            raise InputError(f"{self.shards[shard].name} had {before} images before, and has {number} now")

    def order(self, seed: int, epoch: int, start: int, stop: int, rank: int = 0, world: int = 1) -> Iterator[Encoded]:
        """The training images of one of several processes, from `start` to `stop`; after the last come the first again.

        The order of the shards, and which process reads which, are functions of (seed, epoch). In a shard, each image
        is drawn from a buffer by a generator seeded by (seed, epoch, shard). Shards of known length before `start` are
        not read.

        Raises:
            InputError: There is nothing to read, or it cannot be read.
        """
        return read_ahead(itertools.islice(self._order(seed, epoch, start, rank, world), stop - start))

    def _order(self, seed: int, epoch: int, start: int, rank: int, world: int) -> Iterator[Encoded]:
        parts, first, skip = self._start(seed, epoch, start, rank, world)
        for part in itertools.islice(itertools.cycle(parts), first, None):
            for image in _shuffled(self.read(part), self.buffer, (seed, ORDER, epoch, 1 + part[0])):
                if skip:
                    skip -= 1
                else:
                    yield image
            self._require_images(parts)

    def _start(self, seed: int, epoch: int, start: int, rank: int, world: int) -> tuple[list[Part], int, int]:
        """The parts of a process, how many of them lie before `start`, and how many images of the next one."""
        order = np.random.default_rng((seed, ORDER, epoch)).permutation(len(self.shards))
        parts, first = share(order.tolist(), rank, world), 0
        self._require_images(parts)
        while (count := self._count(parts[first % len(parts)])) is not None and start >= count:
            first, start = first + 1, start - count
        return parts, first, start

    def _count(self, part: Part) -> int | None:
        length = self.lengths.get(part[0])
        return None if length is None else len(range(length)[part[1]])

    def _require_images(self, parts: Sequence[Part]) -> None:
        if all(self._count(part) == 0 for part in parts):
            raise InputError(f"{self.shards[parts[0][0]].name} holds no images for one of the processes")


@dataclass(frozen=True)
class InOrder:
    """Iterates over the images of one of several processes in the order of the stream."""

    stream: ImageStream
    rank: int
    world: int

    def __iter__(self) -> Iterator[Encoded]:
        return read_ahead(self._read())

    def _read(self) -> Iterator[Encoded]:
        for part in share(range(len(self.stream.shards)), self.rank, self.world):
            yield from self.stream.read(part)
        if self.world == 1 and not any(self.stream.lengths.values()):
            raise InputError(f"no images in {self.stream.shards[0].name} and the shards after it")


def share(shards: Sequence[int], rank: int, world: int) -> list[Part]:
    """What one of several processes reads: every world-th shard, or a part of one if there are fewer shards than that.

    Args:
        shards: Numbers of the shards, in order.
        rank: Which of the processes this is.
        world: Number of processes.
    """
    if world <= len(shards):
        return [(shard, slice(0, None, 1)) for shard in shards[rank::world]]
    place = rank % len(shards)
    readers = len(range(place, world, len(shards)))
    return [(shards[place], slice(rank // len(shards), None, readers))]


def read_ahead(items: Iterator[T], count: int = _AHEAD) -> Iterator[T]:
    """The same items, read by a thread before they are asked for.

    Args:
        items: They must not draw from global generators, which belong to the main thread.
        count: How many to have ready.
    """
    end: Any = object()
    thread = ThreadPoolExecutor(1)
    try:
        ready = deque(thread.submit(next, items, end) for _ in range(count))
        while (item := ready.popleft().result()) is not end:
            ready.append(thread.submit(next, items, end))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


def _shuffled(images: Iterator[Encoded], buffer: int, key: Sequence[int]) -> Iterator[Encoded]:
    generator = np.random.default_rng(key)
    waiting = list(itertools.islice(images, buffer))
    for image in images:
        chosen = int(generator.integers(buffer))
        yield waiting[chosen]
        waiting[chosen] = image
    for i in generator.permutation(len(waiting)):
        yield waiting[i]
