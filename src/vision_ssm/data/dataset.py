import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from vision_ssm.data.images import open_image
from vision_ssm.data.seeding import ORDER, seeded
from vision_ssm.data.streams import ImageStream
from vision_ssm.errors import InputError

Sample = dict[str, Any]
"""An image, its id and its targets, such as `label`."""

# Draws in search of a readable image; if all fail, next to nothing can be read.
_TRIES = 20

# Images up to which equal ones are looked for.
_MANY = 100_000


class Strings(Sequence[str]):
    """Many strings in two arrays, which forked processes share: reading a Python object would copy it.

    Args:
        strings: The strings; names of files that are not UTF-8 survive.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])


class Ragged:
    """Arrays of different lengths in two arrays, which forked processes share.

    Args:
        values: (total, ...) all of them, one after the other.
        lengths: (count,) the length of each.
    """

    def __init__(self, values: np.ndarray, lengths: np.ndarray | Sequence[int]) -> None:
        self.values, self.ends = values, np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        """The array of a number, or a `Ragged` of the arrays of several numbers."""
        if not isinstance(index, np.ndarray):
            return self.values[self.ends[index] : self.ends[index + 1]]
        parts = [self.values[:0], *(self[number] for number in index.tolist())]
        return Ragged(np.concatenate(parts), np.diff(self.ends)[index])

    def tobytes(self) -> bytes:
        """All bytes, for digests."""
        return self.ends.tobytes() + self.values.tobytes()


class ImageDataset:
    """Images with targets that can be read in any order.

    Its keys are the numbers from 0 to its length.

    Args:
        read: Returns the path, the opened file or the image of a number.
        ids: What to call each image in messages and plots.
        targets: What a sample holds besides: for each name an array or a `Ragged`, such as `label` for the index of the
            class, or `labels` and others for several objects. Where `original_size` is among them, (images, 2) heights
            and widths, images of other sizes are errors.
        classes: Names of the classes.
        index: Which of these images to take, in this order; all by default.
        sizes: Bytes of each image's file, where they are known.
        notes: What a user should know of how the images were found.

    Attributes:
        max_pixels: The largest number of pixels to decode, if not Pillow's limit.
        least_pixels: The least number of pixels to which large JPEG files may be reduced in decoding.
        grouped: Batch size for which the order puts images of one orientation, wide or tall by `original_size`, into
            a batch.
        category_ids: Number of each class in the files that declare them, where it has one.
    """

    max_pixels: int | None = None
    least_pixels: int | None = None
    grouped: int | None = None
    category_ids: tuple[int, ...] = ()

    def __init__(
        self,
        read: Callable[[int], Path | BinaryIO | Image.Image],
        ids: Sequence[str],
        targets: Mapping[str, Any],
        classes: tuple[str, ...],
        index: np.ndarray | None = None,
        sizes: np.ndarray | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.read, self.ids, self.targets, self.classes = read, ids, targets, classes
        self.sizes, self.notes = sizes, notes
        self.index = np.arange(len(ids)) if index is None else index

    def __len__(self) -> int:
        return len(self.index)

    def sample(self, key: int) -> Sample:
        """One image as 8-bit RGB, with its id and targets.

        Raises:
            InputError: The image cannot be read, or its size is not the one that is known.
        """
        number, name = int(self.index[key]), self.id(key)
        targets = {what: values[number] for what, values in self.targets.items()}
        try:
            image = self.read(number)
        except Exception as error:  # readers raise anything
            raise InputError(f"cannot read image {name}: {error or type(error).__name__}") from error
        if not isinstance(image, Image.Image):
            image = open_image(image, name, self.max_pixels, targets.get("original_size"), self.least_pixels)
        return {
            "image": image,
            "id": name,
            **{k: v.item() if isinstance(v, np.generic) else v for k, v in targets.items()},
        }

    def id(self, key: int) -> str:
        """What to call an image."""
        return self.ids[int(self.index[key])]

    def place(self, key: int) -> tuple[int, ...]:
        """Whole numbers that identify an image, for seeds."""
        return (key,)

    def substitutes(self, key: int, batch: Sequence[int], generator: np.random.Generator) -> Iterable[int]:
        """Keys of images to try in place of one that cannot be read."""
        return generator.integers(len(self), size=_TRIES).tolist()

    def order(self, seed: int, epoch: int, start: int, stop: int, rank: int = 0, world: int = 1) -> Iterator[int]:
        """The training keys of one of several processes, from `start` to `stop`, as a function of (seed, epoch)."""
        with seeded(seed, ORDER, epoch):
            order = torch.randperm(len(self))[rank::world].numpy()
        if self.grouped:
            height, width = self.targets["original_size"][self.index[order]].T
            order = order[_batches_of_one_kind(width >= height, self.grouped)]
        return iter(order[start:stop].tolist())

    def in_order(self, rank: int = 0, world: int = 1) -> range:
        """The keys of one of several processes, in order; over all processes each key once."""
        return range(rank, len(self), world)

    def pick(self, numbers: Sequence[int]) -> list[Sample]:
        """The samples of these numbers."""
        return [self.sample(number) for number in numbers]

    def labels(self) -> np.ndarray:
        """(images,) indices of the classes."""
        return self.targets["label"][self.index]

    def counts(self) -> list[int] | None:
        """Number of images of each class; of objects without crowds, or of pixels, where images hold several."""
        if "mask" in self.targets:
            return self.targets["mask"].pixels[self.index].sum(0).tolist()
        if "labels" in self.targets:
            crowd = self.targets["crowd"][self.index].values
            labels = self.targets["labels"][self.index].values[~crowd]
        else:
            labels = self.labels()
        return np.bincount(labels, minlength=len(self.classes)).tolist()

    def subset(self, keys: Sequence[int]) -> "ImageDataset":
        """The images of these keys, in this order."""
        index = self.index[np.asarray(keys, np.int64)]
        images = ImageDataset(self.read, self.ids, self.targets, self.classes, index, self.sizes, self.notes)
        images.category_ids = self.category_ids
        return images

    def spread(self, count: int) -> "ImageDataset":
        """At most so many of the images, spread evenly over all."""
        count = min(count, len(self))
        return self.subset([number * len(self) // count for number in range(count)])

    def with_labels(self, labels: np.ndarray, classes: tuple[str, ...]) -> "ImageDataset":
        """The same images under other classes.

        Args:
            labels: New index of each old class.
            classes: Names of the new classes.
        """
        targets = {**self.targets, "label": labels[self.targets["label"]]}
        return ImageDataset(self.read, self.ids, targets, classes, self.index, self.sizes, self.notes)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of ids, targets, sizes, classes and order, which shows whether the data changed between two runs."""
        digest = hashlib.sha256(os.fsencode("\n".join(self.classes)))
        for values in (*self.targets.values(), *(() if self.sizes is None else (self.sizes,))):
            digest.update(values[self.index].tobytes())
        for number in self.index.tolist():
            digest.update(os.fsencode(self.ids[number]) + b"\n")
        return digest.hexdigest()


def _batches_of_one_kind(kind: np.ndarray, batch_size: int) -> np.ndarray:
    """The places of `kind` (bool) in full batches of one kind, by where their last one stands; then what is left."""
    batches, left = [], []
    for places in (np.flatnonzero(kind), np.flatnonzero(~kind)):
        full = len(places) // batch_size * batch_size
        batches.append(places[:full].reshape(-1, batch_size))
        left.append(places[full:])
    ordered = np.concatenate(batches)
    return np.concatenate([ordered[np.argsort(ordered[:, -1])].ravel(), *left])


Images = ImageDataset | ImageStream
"""Images with targets, read by keys: numbers, or what a stream yields."""


@dataclass(frozen=True)
class Splits:
    """Training and validation images over the same classes."""

    train: Images
    val: Images


def how_many(images: Images) -> str:
    """How many images there are, for people; of some streams nobody knows."""
    return "an unknown number of" if isinstance(images, ImageStream) and images.length is None else f"{len(images):,}"


def equal_images(one: ImageDataset, other: ImageDataset) -> list[tuple[str, str]] | None:
    """Ids of images of two data sets whose files have equal bytes; None where there are too many to look."""
    if one.sizes is None or other.sizes is None:
        return []
    if len(one) + len(other) > _MANY:
        return None
    shared = np.intersect1d(one.sizes[one.index], other.sizes[other.index])
    digests: list[dict[bytes, str]] = [{}, {}]
    for images, found in zip((one, other), digests, strict=True):
        for key in np.flatnonzero(np.isin(images.sizes[images.index], shared)).tolist():  # type: ignore[index]
            file = images.read(int(images.index[key]))
            with contextlib.suppress(OSError):
                content = file.read_bytes() if isinstance(file, Path) else file.read()  # type: ignore[union-attr]
                found[hashlib.sha256(content).digest()] = images.id(key)
    return [(digests[0][digest], digests[1][digest]) for digest in digests[0].keys() & digests[1].keys()]


def load_digits() -> Splits:
    """scikit-learn's 1,797 handwritten digits (8 by 8, gray), split 80 to 20 with the same share of each digit."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits = load()
    images = [Image.fromarray(np.round(d * (255 / 16)).astype(np.uint8)).convert("RGB") for d in digits.images]
    names = [f"digit {i}" for i in range(len(images))]
    classes = tuple(str(name) for name in digits.target_names)
    everything = ImageDataset(images.__getitem__, names, {"label": digits.target.astype(np.int64)}, classes)
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=digits.target)
    return Splits(everything.subset(sorted(train.tolist())), everything.subset(sorted(test.tolist())))


def hold_out(images: ImageDataset, fraction: float, seed: int) -> Splits:
    """Split images in two at random, with the same share of every class, where each image has one.

    Args:
        images: All images.
        fraction: Share for validation.
        seed: Decides which.

    Raises:
        InputError: There are too few images.
    """
    # scikit-learn's stratified split refuses classes of one image and may leave small ones out of validation.
    order = np.random.default_rng(seed).permutation(len(images))
    labels = images.labels()[order] if "label" in images.targets else np.zeros(len(images), np.int64)
    held: list[int] = []
    for label, count in enumerate(np.bincount(labels).tolist()):
        share = min(count - 1, max(1, round(fraction * count)))
        held += order[labels == label][:share].tolist()
    if not held:
        raise InputError("too few images to hold any out for validation; give validation images with --val-data")
    train = np.setdiff1d(np.arange(len(images)), held)
    return Splits(images.subset(train.tolist()), images.subset(sorted(held)))
