import contextlib
import functools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vision_ssm.data.dataset import ImageDataset, Images, Splits, Strings, hold_out, load_digits
from vision_ssm.data.shards import read_shards
from vision_ssm.data.streams import ImageStream
from vision_ssm.data.tables import find_split, read_table
from vision_ssm.data.tars import TarReader, list_members
from vision_ssm.errors import InputError, shorten
from vision_ssm.recipes.config import ClassDataConfig

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
_TRAIN = ("train", "training")
_VAL = ("val", "valid", "validation", "test", "testing", "eval", "evaluation")

Names = tuple[str, ...]


def load_splits(config: ClassDataConfig, seed: int = 0) -> Splits:
    """The training and validation images of a configuration.

    Args:
        config: Which images.
        seed: Decides which images are held out, where there is no validation split.

    Raises:
        InputError: They are missing or cannot be used.
    """
    kind = find_format(config.data) if config.data_format == "auto" else config.data_format
    splits = load_digits() if kind == "digits" else _load_splits(kind, config, seed)
    for images in (splits.train, splits.val):
        images.max_pixels = config.max_pixels
    return splits


def _load_splits(kind: str, config: ClassDataConfig, seed: int) -> Splits:
    train, val = _load(kind, config)
    if len(train.classes) < 2:
        raise InputError(f"the training images have one class only ({train.classes[0]}); at least two are needed")
    if isinstance(train, ImageStream):
        train.length = config.train_num_samples or train.length
        if not train.length:
            raise InputError("the training stream does not know its length; give it with --train-num-samples")
    if val is None:
        if isinstance(train, ImageStream):
            raise InputError("no share of a stream can be held out; name validation images with --val-data")
        return hold_out(train, config.val_fraction or 0.1, seed)
    if val.classes != train.classes:
        raise InputError("the validation images have other classes than the training images")
    return Splits(train, val)


def _load(kind: str, config: ClassDataConfig) -> tuple[Images, Images | None]:
    find, read = _FORMATS[kind]
    names: Names = (config.train_split,) if config.train_split else _TRAIN
    place = find(config.data, names)
    if place is None and config.train_split:
        raise InputError(f"{config.data} has no split {config.train_split}")
    classes = _class_names(config)
    train = read(config.data if place is None else place, config, classes)
    names = (config.val_split,) if config.val_split else _VAL
    if config.val_data is not None:
        found = find(config.val_data, names) or config.val_data
    else:
        found = None if config.val_fraction or place is None else find(config.data, names)
        found = None if found == place else found  # a pattern names the training images only
        if found is None and config.val_split and not config.val_fraction:
            raise InputError(f"{config.data} has no split {config.val_split}")
    return train, None if found is None else read(found, config, classes or train.classes)


def read_images(path: Path, classes: Names | None = None) -> ImageDataset:
    """The images of class folders, or of a tar file of class folders.

    Args:
        path: The folder or tar file.
        classes: The classes that are allowed, in order; by default all that there are, sorted.

    Raises:
        InputError: There are no images, or some of another class.
    """
    return read_tars(path, classes) if path.is_file() else read_folder(path, classes)


def find_format(data: str) -> str:
    """The format of what `--data` names, found by looking at it.

    Raises:
        InputError: There is nothing of that name.
    """
    if not data:
        raise InputError("which images? give --data PATH (vision-ssm train classify --help lists what it can be)")
    if data == "digits" or data.startswith(("hfds/", "hfids/")):
        return data.partition("/")[0]
    path = Path(data)
    if "://" in data or (".tar" in data and not path.exists()):
        return "wds"
    if not path.exists():
        raise InputError(f"no such file or folder: {path}")
    split = _find_place(data, _TRAIN)
    places = [path] if split is None else [path, split]
    tars = [path] if path.is_file() else sorted(tar for place in places for tar in place.glob("*.tar"))
    if not tars:
        return "folder"
    first = (member.suffix.lower() for _, (member, _) in zip(range(8), list_members(tars[0], PurePosixPath())))  # noqa: B905
    return "wds" if {".cls", ".json"} & set(first) else "tar"


def read_folder(root: Path, classes: Names | None = None) -> ImageDataset:
    """All images below `root`, one sub-folder per class.

    Args:
        root: The folder.
        classes: The classes that are allowed, in order; by default the sub-folders' names, sorted.

    Raises:
        InputError: No such folder, no images in it or in one of its classes, or a class not in `classes`.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder" if root.exists() else f"no such folder: {root}")
    found = _class_folders(root)
    if not found:
        raise InputError(f"{root} holds no class folders; expected one sub-folder of images per class")
    index = _index(found, classes, root)
    files: list[str] = []
    labels: list[int] = []
    skipped: Counter[str] = Counter()
    others = {os.path.realpath(place) for place in (root, *root.absolute().parents, *(root / name for name in found))}
    base = os.path.join(root, "")
    for name in found:
        inside = sorted(_walk(base + name, skipped, others - {os.path.realpath(base + name)}))
        files += inside
        labels += [index[name]] * len(inside)
    if not files:
        raise InputError(f"{root} holds no images in its sub-folders (looked for {' '.join(EXTENSIONS)})")
    if classes is None and (empty := [found[i] for i in sorted({*range(len(found))} - {*labels})]):
        raise InputError(f"no images in {root} for {shorten(empty)}; remove the folder or fill it")
    ids, sizes = Strings(file[len(base) :] for file in files), np.array([*map(file_size, files)])
    counted = shorten([f"{count:,} {extension}" for extension, count in skipped.most_common()])
    notes = [f"files that are not images, skipped: {counted}"] if skipped else []
    read = functools.partial(file_below, root, ids)
    return ImageDataset(read, ids, {"label": np.array(labels)}, tuple(index), sizes=sizes, notes=notes)


def read_tars(root: Path, classes: Names | None = None) -> ImageDataset:
    """The images in a tar file, or in all tar files of a folder; tar files may hold tar files.

    The class of an image is the name of the folder or, where it lies in none, of the tar file that it lies in.

    Args:
        root: The tar file or the folder.
        classes: The classes that are allowed, in order; by default all that there are, sorted.

    Raises:
        InputError: There are no tar files or no images in them, they are damaged or compressed, or hold a class not
            in `classes`.
    """
    tars = [root] if root.is_file() else sorted(root.glob("*.tar"))
    if not tars:
        raise InputError(f"{root} holds no .tar files")
    found = sorted(
        (place.parent.name, str(place), member)
        for tar in tars
        for place, member in list_members(tar, PurePosixPath() if root.is_file() else PurePosixPath(tar.stem))
        if place.suffix.lower() in EXTENSIONS
    )
    if not found:
        raise InputError(f"{root} holds no images (looked for {' '.join(EXTENSIONS)} in {len(tars)} tar files)")
    names = sorted({label for label, *_ in found})
    if "" in names:
        raise InputError(f"{root} has images outside of class folders, so their class is unknown")
    index = _index(names, classes, root)
    labels = np.array([index[label] for label, *_ in found])
    ids = Strings(name for _, name, _ in found)
    return ImageDataset(TarReader([member for *_, member in found]), ids, {"label": labels}, tuple(index))


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The image files among `paths`, and those anywhere below its folders.

    Raises:
        InputError: A path does not exist, or there is no image at all.
    """
    images: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"no such file or folder: {path}")
        images += sorted(map(Path, _walk(path))) if path.is_dir() else [path]
    if not images:
        raise InputError(f"no images in {shorten([str(p) for p in paths])}")
    return images


def file_below(root: Path, names: Strings, number: int) -> Path:
    """The path of one of some names in a folder."""
    return root / names[number]


def _class_folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def _walk(folder: str | Path, skipped: Counter[str] | None = None, others: Collection[str] = ()) -> Iterator[str]:
    """The image files below a folder, links followed but those to others; counts other files by their extensions."""
    seen = set(others)
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith((".", "__"))]
        for name in () if real in seen else names:
            if name.startswith("."):  # hidden, or what macOS leaves: ._image.jpg
                continue
            if name.lower().endswith(EXTENSIONS):
                yield os.path.join(place, name)
            elif skipped is not None:
                skipped[os.path.splitext(name)[1].lower() or "no extension"] += 1
        seen.add(real)


def file_size(file: str) -> int:
    """Bytes of a file; -1 where there is none."""
    with contextlib.suppress(OSError):  # a link to nothing
        return os.path.getsize(file)
    return -1


def _index(found: Sequence[str], classes: Names | None, root: Path) -> dict[str, int]:
    if classes is not None and (unknown := sorted(set(found) - set(classes))):
        raise InputError(f"{root} has classes that are not among the {len(classes)} expected: {shorten(unknown)}")
    return {name: i for i, name in enumerate(classes or found)}


def _find_place(data: str, names: Names) -> Path | None:
    """The folder or tar file of a split: named as one in any case, and a folder of tar files or class folders."""
    root = Path(data)
    if not root.exists():
        raise InputError(f"no such file or folder: {root}")
    places = {place.name.lower(): place for place in sorted(root.iterdir())} if root.is_dir() else {}
    splits = {name: places[name] for name in _either(_TRAIN + _VAL + names) if name in places}
    splits = {name: p for name, p in splits.items() if p.is_file() or _class_folders(p) or any(p.glob("*.tar"))}
    others = [p for name, p in places.items() if name not in splits and p.is_dir() and not name.startswith(".")]
    if len(splits) == 1 and any(name.lower().endswith(EXTENSIONS) for p in others for name in os.listdir(p)):
        return None  # these are classes, whatever one of them is called
    return next((splits[name] for name in _either(names) if name in splits), None)


def _either(names: Names) -> Names:
    return tuple(f"{name.lower()}{end}" for name in names for end in ("", ".tar"))


def _find_shards(data: str, names: Names) -> list[str] | None:
    """The shards of a split: those of a pattern, those that `_info.json` lists, or those named as the split is."""
    if ".tar" in data:
        return _existing(expand_braces(data))
    root = Path(data)
    info = next((path for name in ("_info.json", "info.json") if (path := root / name).is_file()), None)
    try:
        splits = {k: v["filenames"] for k, v in json.loads(info.read_text())["splits"].items()} if info else {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{info} does not list the shards of splits: {type(error).__name__}: {error}") from error
    for name in names:
        if ".tar" in name:
            return _existing([str(root / file) for file in expand_braces(name)])
        if name in splits:
            return _existing([str(root / file) for file in splits[name]])
    found = next((tars for name in names if (tars := sorted(root.glob(f"{name}*.tar")))), None)
    return [str(path) for path in found] if found else None


def _existing(shards: list[str]) -> list[str]:
    if missing := [shard for shard in shards if "://" not in shard and not Path(shard).is_file()]:
        raise InputError(f"no such shards: {shorten(missing)}")
    return shards


def expand_braces(pattern: str) -> list[str]:
    """The names that `a-{00..12}.tar` or `{a,b}.tar` stand for."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = numbers.groups()
        options = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    else:
        options = match[1].split(",")
    rests = expand_braces(pattern[match.end() :])
    return [f"{pattern[: match.start()]}{option}{rest}" for option in options for rest in rests]


def _class_names(config: ClassDataConfig) -> Names | None:
    if config.class_map is None:
        return config.num_classes and tuple(map(str, range(config.num_classes)))  # type: ignore[return-value]
    if not config.class_map.is_file():
        raise InputError(f"no such file of class names: {config.class_map}")
    lines = config.class_map.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    names = tuple(name for line in lines if (name := line.strip()))
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"{config.class_map} must name at least two classes, one per line and none twice")
    return names


def _read_shards(shards: Any, config: ClassDataConfig, classes: Names | None) -> Images:
    if isinstance(shards, str):
        raise InputError(f"{shards} has no shards of a training split; name them with --train-split")
    if classes is None:
        raise InputError("shards do not name their classes; give --num-classes or --class-map")
    return read_shards(shards, config, classes)


# How images of a format are found and read: the place of a split, by its possible names, in what --data names, or None
# if it has no splits; and the images of such a place.
_FORMATS: dict[str, tuple[Callable[[str, Names], Any], Callable[[Any, ClassDataConfig, Names | None], Images]]] = {
    "folder": (_find_place, lambda place, config, classes: read_folder(Path(place), classes)),
    "tar": (_find_place, lambda place, config, classes: read_tars(Path(place), classes)),
    "wds": (_find_shards, _read_shards),
    "hfds": (find_split, read_table),
    "hfids": (find_split, read_table),
}
