import hashlib
import io
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from vision_ssm.data.images import open_image
from vision_ssm.data.seeding import ORDER
from vision_ssm.errors import InputError

T = TypeVar("T")

# Images that are read before they are asked for.
_AHEAD = 256

# What a process reads of a shard: its number, and which of its images.
Part = tuple[int, slice]


class Shard(Protocol):
    """A part of a stream that is read from its beginning on, and always in the same order."""

    @property
    def name(self) -> str:
        """What to call it."""

    def __iter__(self) -> Iterator[tuple[str, int, bytes]]:
        """Name, class and encoded image of each sample."""


@dataclass(frozen=True, slots=True)
class StreamedImage:
    """An encoded image of a stream.

    Args:
        place: Number of its shard, and its number in there.
        name: What to call it.
        target: Index of its class.
        content: The bytes of its file.
    """

    place: tuple[int, int]
    name: str
    target: int
    content: bytes

    def load(self) -> Image.Image:
        """The image as 8-bit RGB.

        Raises:
            InputError: It cannot be read.
        """
        return open_image(io.BytesIO(self.content), self.name)


class ImageStream:
    """Labelled images that can only be read shard by shard.

    `lengths` holds the number of images in each shard that has been read to its end, by the number of the shard.

    Args:
        shards: In a fixed order.
        classes: Names of the classes.
        length: Number of images, where it is known.
        buffer: How many images wait in training, among which the next one is drawn.
    """

    def __init__(
        self, shards: Sequence[Shard], classes: tuple[str, ...], length: int | None = None, buffer: int = 1
    ) -> None:
        self.shards, self.classes, self.length, self.buffer = shards, classes, length, buffer
        self.lengths: dict[int, int] = {}

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the number of images in this stream is not known")
        return self.length

    def counts(self) -> None:
        """Unknown: the number of images of each class."""

    def load(self, key: StreamedImage) -> Image.Image:
        """One of the images as 8-bit RGB.

        Raises:
            InputError: It cannot be read.
        """
        return key.load()

    def target(self, key: StreamedImage) -> int:
        """Index of its class."""
        return key.target

    def name(self, key: StreamedImage) -> str:
        """What to call it."""
        return key.name

    def fingerprint(self) -> str:
        """A digest of classes, shards and length, to notice that they changed between two runs."""
        names = [*self.classes, *(shard.name for shard in self.shards), str(self.length)]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    def in_order(self, rank: int = 0, world: int = 1) -> "InOrder":
        """The images of one of several processes, in order; over all processes every image once."""
        return InOrder(self, rank, world)

    def pick(self, numbers: Sequence[int]) -> list[Image.Image]:
        """The images of these numbers, counted over the whole stream, which is read as far as needed."""
        found: dict[int, Image.Image] = {}
        for number, image in enumerate(self.in_order()):
            if number in numbers:
                found[number] = image.load()
            if len(found) == len(set(numbers)):
                break
        return [found[number] for number in numbers]

    def check_ends(self) -> None:
        """Read the first image of the first and of the last shard.

        Raises:
            InputError: It cannot be read, or has a class that does not exist.
        """
        for shard in {0, len(self.shards) - 1}:
            next(iter(self._read(shard)), None)

    def read(self, part: Part) -> Iterator[StreamedImage]:
        """The images of a part of a shard.

        Raises:
            InputError: It cannot be read, has a class that does not exist, or is not what it was.
        """
        shard, which = part
        yield from itertools.islice(self._read(shard), which.start, which.stop, which.step)

    def _read(self, shard: int) -> Iterator[StreamedImage]:
        number = 0
        for name, target, content in self.shards[shard]:
            if not 0 <= target < len(self.classes):
                raise InputError(f"{name} is of class {target}, and there are {len(self.classes)} (--data.classes)")
            yield StreamedImage((shard, number), name, target, content)
            number += 1
        if self.lengths.setdefault(shard, number) != number:
            before = self.lengths[shard]
            raise InputError(f"{self.shards[shard].name} had {before} images before, and has {number} now")

    def training_images(
        self, seed: int, epoch: int, used: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[StreamedImage]:
        """The images that one of several processes trains on in an epoch; after the last come the first again.

        The order of the shards is a function of (seed, epoch), and so is which process reads which. In a shard, each
        image is drawn from a buffer by a generator seeded by (seed, epoch, shard).

        Args:
            seed: Decides the orders.
            epoch: So does the epoch.
            used: How many images to leave out at the beginning; shards of known length are not read for that.
            rank: Which of several processes this is.
            world: How many there are.

        Raises:
            InputError: There is nothing to read, or it cannot be read.
        """
        parts = self._parts(seed, epoch, rank, world)
        start, used = self._start(parts, used)
        for part in itertools.islice(itertools.cycle(parts), start, None):
            for image in _shuffled(self.read(part), self.buffer, (seed, ORDER, epoch, 1 + part[0])):
                if used:
                    used -= 1
                else:
                    yield image
            self._require_images(parts)

    def resume_point(self, seed: int, epoch: int, used: int, rank: int = 0, world: int = 1) -> tuple[str, int]:
        """Where reading begins to go on after `used` images: a shard, and how many of its images are left out."""
        parts = self._parts(seed, epoch, rank, world)
        start, rest = self._start(parts, used)
        return self.shards[parts[start % len(parts)][0]].name, rest

    def _parts(self, seed: int, epoch: int, rank: int, world: int) -> list[Part]:
        order = np.random.default_rng((seed, ORDER, epoch)).permutation(len(self.shards))
        return share(order.tolist(), rank, world)

    def _start(self, parts: Sequence[Part], used: int) -> tuple[int, int]:
        """How many parts are used up with `used` images, and how many images of the next one."""
        self._require_images(parts)
        start = 0
        while (count := self._count(parts[start % len(parts)])) is not None and used >= count:
            start, used = start + 1, used - count
        return start, used

    def _count(self, part: Part) -> int | None:
        length = self.lengths.get(part[0])
        return None if length is None else len(range(length)[part[1]])

    def _require_images(self, parts: Sequence[Part]) -> None:
        if all(self._count(part) == 0 for part in parts):
            raise InputError(f"{self.shards[parts[0][0]].name} holds no images for one of the processes")


class InOrder:
    """Yields the images of one of several processes in the order of the stream.

    Args:
        stream: The stream.
        rank: Which of several processes this is.
        world: How many there are.
    """

    def __init__(self, stream: ImageStream, rank: int, world: int) -> None:
        self.stream, self.rank, self.world = stream, rank, world

    def __iter__(self) -> Iterator[StreamedImage]:
        return read_ahead(self._read())

    def _read(self) -> Iterator[StreamedImage]:
        for part in share(range(len(self.stream.shards)), self.rank, self.world):
            yield from self.stream.read(part)
        if self.world == 1 and not any(self.stream.lengths.values()):
            raise InputError(f"no images in {self.stream.shards[0].name} and the shards after it")


def share(shards: Sequence[int], rank: int, world: int) -> list[Part]:
    """What one of several processes reads: every world-th shard, or a part of one if there are fewer shards than that.

    Args:
        shards: Numbers of the shards, in order.
        rank: Which of the processes this is.
        world: How many there are.
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


def _shuffled(images: Iterator[StreamedImage], buffer: int, key: Sequence[int]) -> Iterator[StreamedImage]:
    generator = np.random.default_rng(key)
    waiting: list[StreamedImage] = []
    for image in images:
        if len(waiting) == buffer:
            chosen = int(generator.integers(buffer))
            yield waiting[chosen]
            waiting[chosen] = image
        else:
            waiting.append(image)
    for i in generator.permutation(len(waiting)):
        yield waiting[i]
