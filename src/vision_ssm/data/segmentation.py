"""Images with masks of labels, one file beside the other, checked before anything is computed with them."""

import functools
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vision_ssm.data.dataset import ImageDataset, Splits, Strings, hold_out
from vision_ssm.data.images import image_sizes, in_threads
from vision_ssm.data.sources import EXTENSIONS, file_below, file_size
from vision_ssm.errors import InputError, shorten
from vision_ssm.recipes.config import MaskDataConfig

_TRAIN, _VAL = ("train", "training"), ("val", "valid", "validation", "test", "testing")
_IMAGES = ("images", "image", "imgs", "img", "JPEGImages")
_MASKS = ("masks", "mask", "annotations", "labels", "SegmentationClass")
_MASK_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff", ".gif", ".pgm", ".ppm")
_SUFFIX = re.compile(r"[_-](masks?|labels?|gt|seg|L)$")  # of the names of masks, as some programs write them
_LISTED = 20  # bad files in one message
_MOST = 1000  # classes that are not named
_VOID = 255  # does not count in most data sets


@dataclass(frozen=True)
class MaskFormat:
    """What the pixels of masks mean.

    Args:
        labels: Of each class, its number in the files, or its color as one number (256 * (256 * R + G) + B).
        ignored: Numbers or colors of pixels that do not count.
        colored: Whether masks are color images.
    """

    labels: tuple[int, ...]
    ignored: tuple[int, ...] = ()
    colored: bool = False

    def read(self, file: Path) -> np.ndarray:
        """A mask as (H, W) int16 indices of classes, -1 where a pixel does not count.

        Raises:
            InputError: The file cannot be read, or holds other labels.
        """
        values = read_mask(file, colored=self.colored)
        last = len(self._table) - 1  # of no label, as is -1
        found = self._table[values.astype(np.intp).clip(-1, last)]
        if not found.all():
            hint = "a line with a color and no name" if self.colored else "--ignore-labels"
            unknown = self.shown(np.unique(values[found == 0]).tolist())
            raise InputError(f"mask {file} holds unknown {unknown}; {hint} ignores some")
        return found - np.int16(2)

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """For each label 2 + index of the class, 1 where it is ignored, or 0."""
        table = np.zeros(max(*self.labels, *self.ignored) + 2, np.int16)  # colors touch few of its pages
        table[list(self.ignored)] = 1
        table[list(self.labels)] = np.arange(len(self.labels)) + 2
        return table

    def write(self, classes: np.ndarray) -> Image.Image:
        """The image of a mask, from (H, W) indices of classes: 8 bits where they suffice, or else 16."""
        labels = np.arange(len(self.labels)) if self.colored else np.array(self.labels)
        return Image.fromarray(labels[classes].astype(np.uint8 if labels.max() < 256 else np.uint16))

    def shown(self, labels: Sequence[int]) -> str:
        """Labels or colors, for messages."""
        colors = [f"{label >> 16} {label >> 8 & 255} {label & 255}" for label in labels]
        return f"colors {shorten(colors, separator=', ')}" if self.colored else f"labels {shorten([*map(str, labels)])}"


class Masks:
    """Masks as a target of `ImageDataset`: (H, W) int16, by the number of the image.

    Args:
        root: The folder of the files.
        files: Their names.
        format: What their pixels mean.
        pixels: (images, classes) number of pixels.
    """

    def __init__(self, root: Path, files: Strings, format: MaskFormat, pixels: np.ndarray) -> None:
        self.root, self.files, self.format, self.pixels = root, files, format, pixels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        """The mask of a number; of an array of numbers, the pixels of each class, which tell masks apart."""
        return self.pixels[index] if isinstance(index, np.ndarray) else self.format.read(self.root / self.files[index])


def load_masks(config: MaskDataConfig, seed: int = 0) -> Splits:
    """Load the training and validation images of a folder of images and masks.

    In the path of an image, images (image, imgs, img, JPEGImages) gives way to masks (mask, annotations, labels,
    SegmentationClass) for the path of its mask, whose name is the same but for the extension, and perhaps an ending
    such as _mask. Splits are train or training, and val, valid, validation or test: a folder in images or around it.
    Where there are none, a share of the images is held out for validation.

    Masks hold one label per pixel (8 or 16 bits, gray or with a palette, whose numbers count), or are color images,
    for which the file of class names lists the colors. Classes are the labels that file names, in order and without
    those that are ignored; without a file, the labels that occur.

    The targets of an image are `original_size` (height and width) and `mask` (H, W) int16, index of the class or
    -1.

    ==================================================  ==================================================
    image without mask, mask without image              refused
    two images or two masks of one name                 refused
    image or mask that cannot be read                   refused
    mask of another size                                refused
    label that is not named, color that is not listed   refused
    mask with only ignored pixels                       refused, but not by `read_masks`
    ==================================================  ==================================================

    Args:
        config: Which images.
        seed: Decides which are held out, where there is no validation split.

    Raises:
        InputError: There are no such files, or something is refused; lists up to 20 of them.
    """
    if not config.data:
        raise InputError("no images given; use --data PATH, a folder with images and masks")
    root = _folder(config.data)
    train = _find(root, (config.train_split,)) if config.train_split else _find(root, _TRAIN) or _find(root)
    if train is None:
        raise InputError(_nothing(root, config.train_split or "train"))
    names = (config.val_split,) if config.val_split else _VAL
    val = None
    if config.val_data is not None:
        val = _find(_folder(config.val_data), names) or _find(Path(config.val_data))
    elif config.val_fraction is None:
        val = _find(root, names)
    if val is None and (config.val_data is not None or config.val_split):
        raise InputError(f"{config.val_data or root} holds no images and masks of {' or '.join(names)}")
    given = config.class_map or next((file for file in (root / "classes.txt",) if file.is_file()), None)
    named = None if given is None else _read_classes(given)
    parts = [_pair(*place) for place in ((train,) if val is None else (train, val))]
    format, classes = _format(named, config.ignore_labels, parts)
    first, *others = _read(parts, format, classes)
    splits = Splits(first, *others) if others else hold_out(first, config.val_fraction or 0.1, seed)
    for images in (splits.train, splits.val):
        images.max_pixels = config.max_pixels
    return splits


def read_masks(path: Path, format: MaskFormat, classes: tuple[str, ...]) -> ImageDataset:
    """Read the validation images of a folder (see `load_masks`), or those of a folder of images alone.

    Args:
        path: The folder.
        format: What the pixels of masks mean.
        classes: Names of the classes.

    Raises:
        InputError: As for `load_masks`.
    """
    place = _find(_folder(path), _VAL) or _find(path)
    if place is None:
        raise InputError(_nothing(path, "val"))
    (images,) = _read([_pair(*place)], format, classes, allow_void=True)
    return images


def mask_beside(image: Path) -> Path | None:
    """The mask of an image in a folder of images, where there is one."""
    folder = _masks_of(image.parent)
    names = [f"{image.stem}{ending}" for ending in _MASK_EXTENSIONS]
    return next((folder / name for name in names if (folder / name).is_file()), None) if folder else None


def class_colors(config: MaskDataConfig) -> tuple[str, ...] | None:
    """The colors of the classes, such as #ff8800, where their file lists some."""
    file = config.class_map or Path(config.data) / "classes.txt"
    named = _read_classes(file) if file.is_file() else []
    return tuple(f"#{color:06x}" for color, name in named if name) if named and named[0][0] is not None else None


def read_mask(file: Path, *, colored: bool = False) -> np.ndarray:
    """The labels of a mask as they stand in its file, (H, W); colors as one number.

    Raises:
        InputError: It cannot be read, or is a color image where numbers are wanted.
    """
    try:
        with Image.open(file) as image:
            image.load()
            if colored:
                parts = np.asarray(image.convert("RGB"), np.int32)  # (H, W, 3)
                return (parts[..., 0] << 16) + (parts[..., 1] << 8) + parts[..., 2]
            values = np.asarray(image.convert("L") if image.mode == "LA" else image)
    except Exception as error:  # decoders raise anything
        raise InputError(f"cannot read mask {file}: {error or type(error).__name__}") from error
    if values.ndim == 3 and values.shape[2] >= 3 and (values[..., :3] == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim != 2 or values.dtype.kind not in "uib":
        what = "a color image; list its colors in a file of classes, R G B NAME" if values.ndim == 3 else image.mode
        raise InputError(f"mask {file} is {what}")
    return values.astype(np.int32) if values.dtype != np.uint8 else values


@dataclass(frozen=True)
class _Pairs:
    """Images and masks of the same names, and what is wrong with them."""

    images: Path
    masks: Path
    names: list[tuple[str, str]]
    problems: list[str]

    def paths(self) -> list[tuple[Path, Path]]:
        return [(self.images / image, self.masks / mask) for image, mask in self.names]


def _read(
    parts: Sequence[_Pairs], format: MaskFormat, classes: tuple[str, ...], *, allow_void: bool = False
) -> list[ImageDataset]:
    """The data sets of several folders; what is wrong in any of them is one error."""
    problems, sets = [], []
    for part in parts:
        checked = in_threads(functools.partial(_check, format, allow_void), part.paths())
        problems += part.problems + [entry for entry in checked if isinstance(entry, str)]
        good = [entry for entry in checked if not isinstance(entry, str)]
        pixels = np.array([counts for _, counts in good], np.int64).reshape(-1, len(classes))
        masks = Masks(part.masks, Strings(mask for _, mask in part.names), format, pixels)
        targets = {"original_size": np.array([size for size, _ in good], np.int64).reshape(-1, 2), "mask": masks}
        ids = Strings(image for image, _ in part.names)
        sizes = np.array([file_size(str(image)) for image, _ in part.paths()])
        sets.append(ImageDataset(functools.partial(file_below, part.images, ids), ids, targets, classes, sizes=sizes))
    if problems:
        raise InputError(f"bad images or masks: {shorten(problems, _LISTED, '; ')}")
    return sets


def _check(format: MaskFormat, allow_void: bool, pair: tuple[Path, Path]) -> tuple[tuple[int, ...], np.ndarray] | str:
    """The size of an image and the number of pixels of each class, or what is wrong."""
    try:
        sizes = image_sizes(pair[0])
        mask = format.read(pair[1])
    except InputError as error:
        return error.line
    if mask.shape not in sizes:
        height, width = sizes[0]
        return f"mask {pair[1]} has {mask.shape[1]}x{mask.shape[0]} pixels, its image {width}x{height}"
    counts = np.bincount(mask.ravel() + 1, minlength=len(format.labels) + 1)[1:]
    return (mask.shape, counts) if counts.any() or allow_void else f"mask {pair[1]} has only ignored pixels"


def _format(
    named: list[tuple[int | None, str]] | None, ignored: tuple[int, ...], parts: Sequence[_Pairs]
) -> tuple[MaskFormat, tuple[str, ...]]:
    """What the pixels mean, and the names of the classes."""
    if named is not None and named[0][0] is not None and any(_is_colored(mask) for mask in _some_masks(parts)):
        colors, others = (tuple(color or 0 for color, name in named if bool(name) == kept) for kept in (True, False))
        return MaskFormat(colors, others, colored=True), tuple(name for _, name in named if name)
    if named is not None:
        names = tuple(name for _, name in named if name)
        ignored = _with_void(ignored, len(names))
        labels = tuple(label for label in range(len(names) + len(ignored)) if label not in ignored)[: len(names)]
        if not ignored and len(found := _found(parts)) == len(names):  # such as 0 and 255
            labels = tuple(sorted(found))
        return MaskFormat(labels, ignored), names
    ignored, found = _with_void(ignored, 0), _found(parts)
    classes = sorted(found - set(ignored))
    if len(classes) > _MOST:
        raise InputError(f"the masks hold {len(classes):,} labels up to {classes[-1]:,}; name the classes: --class-map")
    if len(classes) < 2:
        hint = "; --ignore-labels without numbers ignores none" if found & set(ignored) else ""
        raise InputError(f"the masks hold {len(classes)} label that is not ignored; at least two are needed{hint}")
    return MaskFormat(tuple(classes), ignored), tuple(map(str, classes))


def _with_void(ignored: tuple[int, ...], classes: int) -> tuple[int, ...]:
    """The labels that do not count with 255, unless none are ignored, or there are so many classes that it is one."""
    extra = ignored and _VOID not in ignored and classes + len(ignored) <= _VOID
    return (*ignored, _VOID) if extra else ignored


def _found(parts: Sequence[_Pairs]) -> set[int]:
    """All labels that the masks hold."""
    return set().union(*in_threads(_labels, [mask for part in parts for _, mask in part.paths()]))


def _some_masks(parts: Sequence[_Pairs]) -> list[Path]:
    return [mask for part in parts for _, mask in part.paths()[:4]]


def _is_colored(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            return image.mode in ("RGB", "RGBA")
    except Exception:  # said later
        return False


def _labels(file: Path) -> set[int]:
    try:
        values = read_mask(file)
    except InputError:  # said later
        return set()
    small = values.dtype == np.uint8  # counting is faster then
    return set((np.flatnonzero(np.bincount(values.ravel())) if small else np.unique(values)).tolist())


def _read_classes(file: Path) -> list[tuple[int | None, str]]:
    """Color, if there is one, and name of each line."""
    if not file.is_file():
        raise InputError(f"no such file of class names: {file}")
    lines = [line.strip() for line in file.read_text("utf-8", errors="surrogateescape").splitlines() if line.strip()]
    entries: list[tuple[int | None, str]] = []
    for line in lines:
        match = re.fullmatch(r"(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})(?:[\s,]+(.+))?", line)
        if match and max(map(int, match.groups()[:3])) < 256:
            r, g, b = map(int, match.groups()[:3])
            entries.append(((r << 16) + (g << 8) + b, match[4] or ""))
        else:
            entries.append((None, line))
    names = [name for _, name in entries if name]
    colors = [color for color, _ in entries]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if len(names) < 2 or twice or (None in colors) == any(color is not None for color in colors):
        problem = f"names {shorten(twice)} twice" if twice else "must name at least two classes, one per line"
        problem = "has colors in some lines only" if len(names) >= 2 and not twice else problem
        raise InputError(f"{file} {problem}")
    if len(set(colors)) < len(colors) and None not in colors:
        raise InputError(f"{file} lists a color twice")
    return entries


def _nothing(root: Path, split: str) -> str:
    return f"{root} holds no images and masks; looked for images/{split} and masks/{split}, or images and masks"


def _folder(path: str | Path) -> Path:
    if not Path(path).is_dir():
        raise InputError(f"no such folder: {path}")
    return Path(path)


def _find(root: Path, splits: Sequence[str] = ("",)) -> tuple[Path, Path] | None:
    """The folders of images and masks of the first split that there is, or of no split."""
    for split in splits:
        for name in _IMAGES:
            for images in (root / name / split, root / split / name):
                if images.is_dir() and (masks := _masks_of(images)) is not None:
                    return images, masks
    if splits == ("",) and (masks := _masks_of(root)) is not None:
        return root, masks
    return None


def _masks_of(images: Path) -> Path | None:
    """The folder beside a folder of images that holds their masks."""
    parts = images.absolute().parts
    for place in range(len(parts) - 1, max(-1, len(parts) - 4), -1):
        if parts[place] in _IMAGES:
            options = (Path(*parts[:place], name, *parts[place + 1 :]) for name in _MASKS)
            return next((folder for folder in options if folder.is_dir()), None)
    return None


def _pair(images: Path, masks: Path) -> _Pairs:
    problems: list[str] = []
    pictures = _by_stem(images, EXTENSIONS, problems)
    labels = _by_stem(masks, _MASK_EXTENSIONS, problems)
    bare = {_SUFFIX.sub("", stem): name for stem, name in labels.items() if stem not in pictures}
    labels = {stem: labels.get(stem) or bare[stem] for stem in pictures if stem in labels or stem in bare}
    used = set(labels.values())
    problems += [f"no mask for image {images / name}" for stem, name in pictures.items() if stem not in labels]
    problems += [f"no image for mask {masks / name}" for name in bare.values() if name not in used]
    names = [(name, labels[stem]) for stem, name in pictures.items() if stem in labels]
    if not names:
        raise InputError(f"no image in {images} has a mask of its name in {masks}, {', '.join(_MASK_EXTENSIONS)}")
    return _Pairs(images, masks, names, problems)


def _by_stem(folder: Path, extensions: Sequence[str], problems: list[str]) -> dict[str, str]:
    """Names of the files of some kinds below a folder, by their names without extension."""
    found: dict[str, str] = {}
    for path, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for file in sorted(files):
            name = os.path.relpath(os.path.join(path, file), folder)
            stem, extension = os.path.splitext(name)
            if extension.lower() in extensions and not file.startswith("."):
                if stem in found:
                    problems.append(f"{folder / found[stem]} and {folder / name} have the same name")
                found.setdefault(stem, name)
    return found
