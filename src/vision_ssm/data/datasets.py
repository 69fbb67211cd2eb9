import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image

from vision_ssm.data.images import open_image
from vision_ssm.data.streams import ImageStream
from vision_ssm.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
_VALIDATION_NAMES = ("val", "valid", "validation", "test")


class Stored(Protocol):
    """An encoded image that lies in something else than a file of its own."""

    def open(self) -> BinaryIO:
        """Its bytes."""


@dataclass(frozen=True)
class LabelledImages:
    """Images in a fixed order, each with a class.

    Args:
        images: What to load: a path, something that can be opened, or a ready image.
        targets: Index of each image's class.
        classes: Names of the classes.
        names: What to call each image in messages and pictures.
    """

    images: Sequence[Path | Stored | Image.Image]
    targets: Sequence[int]
    classes: tuple[str, ...]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        """Image number `index` as 8-bit RGB.

        Raises:
            InputError: It cannot be read.
        """
        item = self.images[index]
        if isinstance(item, Image.Image):
            return item
        if isinstance(item, Path):
            return open_image(item)
        try:
            file = item.open()
        except (OSError, ValueError, TypeError, KeyError, AssertionError) as error:
            raise InputError(f"cannot read image {self.names[index]}: {error or type(error).__name__}") from error
        return open_image(file, self.names[index])

    def target(self, index: int) -> int:
        """Class of image number `index`."""
        return self.targets[index]

    def name(self, index: int) -> str:
        """Name of image number `index`."""
        return self.names[index]

    def in_order(self, rank: int = 0, world: int = 1) -> range:
        """Numbers of the images of one of several processes, in order; over all processes every image once."""
        return range(rank, len(self), world)

    def pick(self, numbers: Sequence[int]) -> list[Image.Image]:
        """The images of these numbers."""
        return [self.load(number) for number in numbers]

    def counts(self) -> list[int]:
        """Number of images of each class."""
        return np.bincount(np.asarray(self.targets, dtype=np.int64), minlength=len(self.classes)).tolist()

    def subset(self, indices: Sequence[int]) -> "LabelledImages":
        """The images at `indices`, in that order."""
        return LabelledImages(
            images=[self.images[i] for i in indices],
            targets=[self.targets[i] for i in indices],
            classes=self.classes,
            names=[self.names[i] for i in indices],
        )

    def fingerprint(self) -> str:
        """A digest of names, classes and order, to notice that a folder changed between two runs."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for name, target in zip(self.names, self.targets, strict=True):
            digest.update(f"\n{target} {name}".encode())
        return digest.hexdigest()


Images = LabelledImages | ImageStream
"""Labelled images, read by keys: numbers, or what a stream yields."""


@dataclass(frozen=True)
class Splits:
    """Training and validation images over the same classes."""

    train: Images
    val: Images


def load_digits() -> Splits:
    """scikit-learn's 1,797 handwritten digits (8 by 8, grey), split 80 to 20 with the same share of each digit."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits = load()
    images = [Image.fromarray(np.round(d * (255 / 16)).astype(np.uint8)).convert("RGB") for d in digits.images]
    everything = LabelledImages(
        images=images,
        targets=digits.target.tolist(),
        classes=tuple(str(name) for name in digits.target_names),
        names=[f"digit {i}" for i in range(len(images))],
    )
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=digits.target)
    return Splits(everything.subset(sorted(train.tolist())), everything.subset(sorted(test.tolist())))


def load_folder(root: Path, val: Path | None = None, val_fraction: float | None = None, *, seed: int = 0) -> Splits:
    """Image folders with one sub-folder per class.

    Args:
        root: The training images; or a folder that holds `train` and perhaps `val`, `valid`, `validation` or `test`.
        val: The validation images. Not needed where `root` holds them.
        val_fraction: Share of the training images to hold out, in every class (0.1 where there is no `val`).
        seed: Decides which images are held out.

    Raises:
        InputError: A folder is missing or empty, there is only one class, a class has no images, or `val` has a
            class that `root` lacks.
    """
    _require_folder(root)
    if (root / "train").is_dir():
        if val is None and val_fraction is None:
            val = next((root / name for name in _VALIDATION_NAMES if (root / name).is_dir()), None)
        root = root / "train"
    if val is not None and val_fraction is not None:
        raise InputError("give either --data.val or --data.val-fraction, not both")
    train = read_folder(root)
    if len(train.classes) < 2:
        raise InputError(f"{root} holds one class only ({train.classes[0]}); at least two are needed")
    if val is not None:
        return Splits(train, read_folder(val, train.classes))
    return hold_out(train, 0.1 if val_fraction is None else val_fraction, seed)


def read_folder(root: Path, classes: tuple[str, ...] | None = None) -> LabelledImages:
    """All images below `root`, one sub-folder per class.

    Args:
        root: The folder.
        classes: The classes that are allowed, in order; otherwise the sub-folders' names, sorted.

    Raises:
        InputError: No such folder, no images in it or in one of its classes, or a class not in `classes`.
    """
    _require_folder(root)
    found = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
    if not found:
        raise InputError(f"{root} holds no class folders; expected one sub-folder of images per class")
    if classes is not None and (unknown := sorted(set(found) - set(classes))):
        raise InputError(f"{root} has classes that the training data lacks: {shorten(unknown)}")
    index = {name: i for i, name in enumerate(classes or found)}
    images: list[Path] = []
    targets: list[int] = []
    empty: list[str] = []
    for name in found:
        files = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        images += files
        targets += [index[name]] * len(files)
        if not files:
            empty.append(name)
    if not images:
        raise InputError(f"{root} holds no images in its sub-folders (looked for {' '.join(EXTENSIONS)})")
    if empty and classes is None:
        raise InputError(f"no images in {root} for {shorten(empty)}; remove the folder or fill it")
    names = [str(p.relative_to(root)) for p in images]
    return LabelledImages(images, targets, classes or tuple(found), names)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The image files among `paths`, and those anywhere below its folders.

    Raises:
        InputError: A path does not exist, or there is no image at all.
    """
    images: list[Path] = []
    for path in paths:
        if path.is_dir():
            images += sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        elif path.exists():
            images.append(path)
        else:
            raise InputError(f"no such file or folder: {path}")
    if not images:
        raise InputError(f"no images in {shorten([str(p) for p in paths])}")
    return images


def shorten(names: Sequence[str], most: int = 5) -> str:
    """`names` with commas, the first `most` of them and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _require_folder(path: Path) -> None:
    if not path.exists():
        raise InputError(f"no such folder: {path}")
    if not path.is_dir():
        raise InputError(f"{path} is not a folder")


def hold_out(images: LabelledImages, fraction: float, seed: int) -> Splits:
    """Split images in two, in every class at random with the same share.

    Args:
        images: All of them.
        fraction: Share for validation.
        seed: Decides which.

    Raises:
        InputError: The share is none, or there are too few images.
    """
    if not 0 < fraction < 1:
        raise InputError(f"--data.val-fraction must lie between 0 and 1, both excluded, got {fraction}")
    # scikit-learn's stratified split refuses classes of one image and may leave small ones out of validation.
    order = np.random.default_rng(seed).permutation(len(images))
    targets = np.asarray(images.targets)[order]
    held: list[int] = []
    for target, count in enumerate(images.counts()):
        share = min(count - 1, max(1, round(fraction * count)))
        held += order[targets == target][:share].tolist()
    if not held:
        raise InputError("too few images to hold any out; give a validation folder with --data.val")
    train = sorted(set(range(len(images))) - set(held))
    return Splits(images.subset(train), images.subset(sorted(held)))
