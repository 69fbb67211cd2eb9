"""Images with objects: data sets in COCO's format, checked before anything is computed with them."""

import functools
import gc
import glob
import itertools
import json
import marshal
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vision_ssm.data.dataset import ImageDataset, Ragged, Splits, Strings, hold_out
from vision_ssm.data.images import image_sizes, in_threads
from vision_ssm.data.rle import Rle, decode_masks, to_rle
from vision_ssm.data.sources import file_below, file_size
from vision_ssm.errors import InputError, shorten
from vision_ssm.recipes.config import DataConfig

_TRAIN, _VAL = ("train",), ("val", "valid", "test")
_LOOKED_FOR = "annotations/instances_{name}*.json and {name}/_annotations.coco.json"
_LISTED = 20  # bad entries in one message
_LARGEST = 1_000_000  # side of an image in pixels
_MEASURED = 20_000  # images whose sizes are looked up beforehand
_PROBED = 100  # images that are looked for in a folder to tell whether it holds them
_SMALLEST = 32  # side in pixels below which published trainings leave out an image

Report = Callable[[str], None]


def load_coco(config: DataConfig, seed: int = 0, *, filter_empty: bool = False) -> Splits:
    """Load the training and validation images of a data set in COCO's format.

    What `data` may be:

    - a folder with annotations/instances_train*.json and instances_val*.json, as COCO has it;
    - a folder with train/_annotations.coco.json and valid/ or val/ beside it, as Roboflow writes it;
    - a folder with one .json file, or that file itself; a share of its images is held out for validation.

    `val_data` is such a folder or file, too. The images lie in the folder of the .json file or in the one above it:
    there in a folder named as the split is or begins (train2017, train), in images/ and that, in images/, or without a
    folder; the names in the file may have folders. Splits are train, and val, valid or test, if the configuration names
    none.

    The targets of an image with n objects are `original_size` (height and width), `boxes` (n, 4) float32 x1 y1 x2 y2
    in pixels, `labels` (n,) int64, `crowd` (n,) bool, `area` (n,) float64 in pixels and, where every object of the
    file has an outline, `masks`, for `outlines`. Classes are the categories in the order of their ids.

    What is wrong is put right, which `ImageDataset.notes` says with a count, or refused:

    ==============================================================  =============================================
    box without width or height                                     left out
    box that reaches over the edge by more than a pixel             clipped
    area that is no positive number                                 that of the box
    polygon of fewer than three points                              left out; if all of an object are, the object
    no outline, where other objects of the file have one            all masks are left out
    no annotations for an image                                     kept (see `filter_empty`)
    not JSON; no list of images, annotations or categories          refused
    field that is missing or of another type                        refused
    id of an image, annotation or category that comes twice         refused
    two categories of one name                                      refused
    annotation of an unknown image or category                      refused
    box that is not four finite numbers, or outside of the image    refused
    polygon of an odd number of numbers, or not finite, or far off  refused
    run lengths that do not decode or are of another size           refused
    file of an image that is missing, image of another size         refused
    no object at all                                                refused
    ==============================================================  =============================================

    Sizes of images are compared as a viewer shows them, with the EXIF orientation, and only where that swaps the sides
    of the one in the file, as they are stored. In files of over 20,000 images they are compared when an image is read;
    one of another size counts as unreadable then.

    Args:
        config: Which images.
        seed: Decides which are held out, where there is no validation split.
        filter_empty: Leave out training images without objects, and those with a side below 32 pixels.

    Raises:
        InputError: There are no such files, or something is refused; lists up to 20 bad entries of all files.
    """
    if not config.data:
        raise InputError("no images given; use --data PATH, a folder or .json file in COCO format")
    names = (config.train_split,) if config.train_split else _TRAIN
    place = _find(config.data, names, "--train-split") or _only(config.data)
    if place is None:
        looked_for = " or ".join(_LOOKED_FOR.format(name=name) for name in names)
        raise InputError(f"{config.data} holds no COCO annotations; looked for {looked_for}, or one .json file")
    val_place = _find_val(config)
    train, *val = _read_files([place] if val_place is None else [place, val_place])
    splits = Splits(train, *val) if val else hold_out(train, config.val_fraction or 0.1, seed)
    if splits.val.classes != train.classes:
        others = shorten(sorted({*splits.val.classes} ^ {*train.classes})) or "their order"
        raise InputError(f"{val_place} has other categories than {place}: {others}")
    if filter_empty:
        splits = Splits(_without_empty(splits.train), splits.val)
    for name, images in (("training", splits.train), ("validation", splits.val)):
        images.max_pixels = config.max_pixels
        if not sum(images.counts() or ()):
            raise InputError(f"the {name} images hold no objects")
    return splits


def read_coco(path: Path, classes: tuple[str, ...]) -> ImageDataset:
    """Read the validation images of a data set in COCO's format, or the images of one of its files.

    Args:
        path: See `load_coco`.
        classes: The classes that are allowed, in order.

    Raises:
        InputError: As for `load_coco`, or there are objects of another class.
    """
    place = _find(str(path), _VAL, "the path of one") or _only(str(path))
    if place is None:
        looked_for = _LOOKED_FOR.format(name="val")
        raise InputError(f"{path} holds no COCO annotations; looked for {looked_for}, or one .json file")
    (images,) = _read_files([place])
    if unknown := [name for name in images.classes if name not in classes]:
        raise InputError(f"{place} has classes that are not among the {len(classes)} expected: {shorten(unknown)}")
    labels = images.targets["labels"]
    new = np.array([classes.index(name) for name in images.classes], np.int64)
    targets = {**images.targets, "labels": Ragged(new[labels.values], np.diff(labels.ends))}
    return ImageDataset(images.read, images.ids, targets, classes, sizes=images.sizes, notes=images.notes)


def _read_files(files: Sequence[Path]) -> list[ImageDataset]:
    """The images of several files; what is bad in any of them is one error."""
    problems: list[str] = []
    # Millions of lists are made, and none is garbage: looking for it would take longer than reading them.
    enabled = gc.isenabled()
    gc.disable()
    try:
        read = [_read(file, problems) for file in files]
    finally:
        if enabled:
            gc.enable()
    if problems:
        raise InputError(f"bad annotations: {shorten(problems, _LISTED, '; ')}")
    return read


def outlines(masks: np.ndarray) -> list[Any]:
    """The outlines of the objects of an image: polygons, or run lengths (see `vision_ssm.data.rle.to_rle`).

    Args:
        masks: What a sample has as `masks`.
    """
    return marshal.loads(masks.tobytes())


def _find(data: str, names: Sequence[str], option: str) -> Path | None:
    """The .json file of the first split that there is in a folder."""
    root = Path(data)
    if not root.exists():
        raise InputError(f"no such file or folder: {root}")
    for name in names:
        exact = root / "annotations" / f"instances_{name}.json"
        found = [exact] if exact.is_file() else sorted(root.glob(f"annotations/instances_{glob.escape(name)}*.json"))
        found += [file for file in (root / name / "_annotations.coco.json",) if file.is_file()]
        if len(found) > 1:
            listed = shorten([str(file.relative_to(root)) for file in found])
            raise InputError(f"{root} has several files of split {name} ({listed}); choose one with {option}")
        if found:
            return found[0]
    return None


def _only(data: str) -> Path | None:
    """The .json file that `data` is, or the only one in that folder."""
    files = [Path(data)] if Path(data).is_file() else sorted(Path(data).glob("*.json"))
    return files[0] if len(files) == 1 else None


def _find_val(config: DataConfig) -> Path | None:
    names = (config.val_split,) if config.val_split else _VAL
    if config.val_data is not None:
        found = _find(config.val_data, names, "--val-split") or _only(config.val_data)
        if found is None:
            raise InputError(f"{config.val_data} holds no COCO annotations of {' or '.join(names)}, nor one .json file")
        return found
    found = None if config.val_fraction else _find(config.data, names, "--val-split")
    if found is None and config.val_split and not config.val_fraction:
        raise InputError(f"{config.data} has no split {config.val_split}")
    return found


def _without_empty(images: Any) -> ImageDataset:
    objects = [(~images.targets["crowd"][number]).any() for number in images.index.tolist()]
    large = images.targets["original_size"][images.index].min(1) >= _SMALLEST
    kept = np.flatnonzero(np.array(objects) & large)
    left_out = f"{len(images) - len(kept):,} training images without objects or below {_SMALLEST} pixels, left out"
    images = images.subset(kept.tolist())
    images.notes = [*images.notes, left_out]
    return images


def _read(file: Path, problems: list[str]) -> ImageDataset:
    """The images of a file, without what is bad, which is added to `problems`."""
    data = _load(file)
    bad: list[str] = []
    noted: Counter[str] = Counter()
    categories = _checked(data["categories"], "category", {"id": int, "name": str}, bad.append)
    categories.sort(key=lambda entry: entry["id"])
    classes = tuple(entry["name"] for entry in categories)
    bad += [f"category {name} is named twice" for name, count in Counter(classes).items() if count > 1]
    fields = {"id": int, "file_name": str, "height": int, "width": int}
    images = _checked(data["images"], "image", fields, bad.append)
    for entry in images:
        if not (0 < entry["height"] <= _LARGEST and 0 < entry["width"] <= _LARGEST):
            bad.append(f"image {entry['id']}: size {entry['width']}x{entry['height']}, must be 1 to {_LARGEST:,}")
            entry["height"] = entry["width"] = _LARGEST
        if not _is_name(entry["file_name"]):
            bad.append(f"image {entry['id']}: {entry['file_name']!r:.40} cannot be the name of a file")
            entry["file_name"] = ""
    original_size = np.array([(entry["height"], entry["width"]) for entry in images], np.int64).reshape(-1, 2)
    root, sizes = _find_files(file, images, bad.append)
    numbers = {entry["id"]: number for number, entry in enumerate(images)}
    labels = {entry["id"]: label for label, entry in enumerate(categories)}
    fields = {"id": int, "image_id": int, "category_id": int, "bbox": list}
    objects = []
    declared = {entry.get("id") for entry in data["images"] if isinstance(entry, dict)}  # the bad ones, too
    for entry in _checked(data["annotations"], "annotation", fields, bad.append):
        if entry["image_id"] not in numbers and entry["image_id"] not in declared:
            bad.append(f"annotation {entry['id']}: there is no image {entry['image_id']}")
        elif entry["category_id"] not in labels:
            bad.append(f"annotation {entry['id']}: there is no category {entry['category_id']}")
        elif entry.get("iscrowd", 0) not in (0, 1):
            bad.append(f"annotation {entry['id']}: iscrowd {entry['iscrowd']}, must be 0 or 1")
        elif entry["image_id"] in numbers:
            objects.append(entry)
    number = np.array([numbers[entry["image_id"]] for entry in objects], np.int64)
    boxes, kept = _boxes(objects, original_size[number], bad.append, noted)
    masks, kept = _masks(objects, original_size[number], kept, bad.append, noted)
    problems += [f"{file}: {line}" for line in bad]

    kept = kept[np.argsort(number[kept], kind="stable")]  # by image
    lengths = np.bincount(number[kept], minlength=len(images))
    columns: dict[str, np.ndarray] = {
        "boxes": boxes[kept].astype(np.float32),
        "labels": np.array([labels[entry["category_id"]] for entry in objects], np.int64)[kept],
        "crowd": np.array([entry.get("iscrowd", 0) for entry in objects], bool)[kept],
        "area": _areas(objects, boxes, noted)[kept],
    }
    targets: dict[str, Any] = {"original_size": original_size}
    targets |= {name: Ragged(values, lengths) for name, values in columns.items()}
    if masks is not None:
        ends = targets["boxes"].ends.tolist()
        # Made and read by this program only; JSON would take ten times as long. Version 2 depends on the values alone.
        parts = [
            marshal.dumps([masks[i] for i in kept[start:end].tolist()], 2) for start, end in itertools.pairwise(ends)
        ]
        targets["masks"] = Ragged(np.frombuffer(b"".join(parts), np.uint8), [len(part) for part in parts])
    ids = Strings(entry["file_name"] for entry in images)
    notes = [f"{count:,} {what}" for what, count in noted.items()]
    dataset = ImageDataset(functools.partial(file_below, root, ids), ids, targets, classes, sizes=sizes, notes=notes)
    dataset.category_ids = tuple(labels)
    return dataset


def _is_name(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _load(file: Path) -> dict[str, list[Any]]:
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    for name in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(name), list):
            raise InputError(f"{file} is not in COCO's format: it has no list of {name}")
        if not data[name] and name != "annotations":
            raise InputError(f"{file}: the list of {name} is empty")
    return data


def _checked(entries: list[Any], what: str, fields: Mapping[str, type], report: Report) -> list[dict[str, Any]]:
    """The entries that have these fields and an id of their own."""
    good: dict[int, dict[str, Any]] = {}
    items = list(fields.items())
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            report(f"{what} number {place} is not an object")
            continue
        for name, kind in items:
            if not isinstance(entry.get(name), kind):
                words = {int: "a whole number", str: "a text", list: "a list"}[kind]
                which = entry["id"] if isinstance(entry.get("id"), int) else f"number {place}"
                report(f"{what} {which}: {name} must be {words}, got {entry.get(name)!r:.40}")
                break
        else:
            if entry["id"] in good:
                report(f"{what} {entry['id']} comes twice")
            good.setdefault(entry["id"], entry)
    return list(good.values())


def _find_files(file: Path, images: Sequence[Mapping[str, Any]], report: Report) -> tuple[Path, np.ndarray]:
    """The folder in which the images lie, and the sizes of their files in bytes."""
    split = file.stem.removeprefix("instances_")
    like = f"{glob.escape(split.rstrip('0123456789'))}*"
    places: list[Path] = []
    for base in (file.parent, file.parent.parent):
        places += [base / split, base / "images" / split]
        places += sorted(base.glob(like)) + sorted((base / "images").glob(like)) + [base / "images", base]
    probed = [entry["file_name"] for entry in images[:_PROBED]]
    found = (place for place in places if place.is_dir() and any((place / name).is_file() for name in probed))
    root = next(found, None)
    if root is None:
        where = "the folders of the split, images and the one of the file, there or one level above"
        report(f"found none of its images; looked for {shorten(probed, 1)} in {where}")
        return file.parent, np.full(len(images), -1)
    sizes = np.array([file_size(str(root / entry["file_name"])) for entry in images])
    for number in np.flatnonzero(sizes < 0).tolist():
        report(f"image {images[number]['id']}: no file {root / images[number]['file_name']}")
    if len(images) <= _MEASURED:
        for problem in filter(None, in_threads(functools.partial(_size_problem, root), images)):
            report(problem)
    return root, sizes


def _size_problem(root: Path, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with the size of an image, by the header of its file; one that has none may be replaced later."""
    try:
        sizes = image_sizes(root / entry["file_name"])
    except InputError:
        return None
    if (entry["height"], entry["width"]) in sizes or entry["height"] == _LARGEST:
        return None
    height, width = sizes[0]
    return f"image {entry['id']}: it has {width}x{height} pixels, not {entry['width']}x{entry['height']}"


def _boxes(
    objects: Sequence[Mapping[str, Any]], sizes: np.ndarray, report: Report, noted: Counter[str]
) -> tuple[np.ndarray, np.ndarray]:
    """(n, 4) x1 y1 x2 y2, and the numbers of the objects whose boxes can be used."""
    try:
        boxes = np.array([entry["bbox"] for entry in objects], np.float64).reshape(len(objects), 4)
    except (ValueError, TypeError, OverflowError):
        boxes = np.array([_four(entry["bbox"]) for entry in objects])
    finite = np.asarray(np.isfinite(boxes).all(axis=1))
    boxes[~finite] = 0
    flat = (boxes[:, 2:] <= 0).any(axis=1)
    boxes[:, 2:] += boxes[:, :2]
    limits = sizes[:, ::-1].astype(np.float64)  # width, height
    outside = (boxes[:, 2:] <= 0).any(axis=1) | (boxes[:, :2] >= limits).any(axis=1)
    for i in np.flatnonzero(~finite | (outside & ~flat)).tolist():
        width, height = sizes[i, ::-1].tolist()
        what = f"is outside of its image ({width}x{height})" if finite[i] else "must be four finite numbers"
        report(f"annotation {objects[i]['id']}: box {objects[i]['bbox']!s:.60} {what}")
    over = ((boxes[:, :2] < -1) | (boxes[:, 2:] > limits + 1)).any(axis=1) & ~outside
    boxes[over] = boxes[over].clip(0, np.tile(limits[over], 2))
    _note(noted, "boxes without width or height, dropped", int((flat & finite).sum()))
    _note(noted, "boxes that extend beyond their image, clipped", int((over & ~flat).sum()))
    return boxes, np.flatnonzero(finite & ~flat & ~outside)


def _four(box: list[Any]) -> list[float]:
    try:
        x, y, width, height = map(float, box)
        return [x, y, width, height]
    except (ValueError, TypeError, OverflowError):
        return [math.nan] * 4


def _areas(objects: Sequence[Mapping[str, Any]], boxes: np.ndarray, noted: Counter[str]) -> np.ndarray:
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    wrong = 0
    for i, entry in enumerate(objects):
        given = entry.get("area")
        if isinstance(given, (int, float)) and 0 < given < math.inf:
            areas[i] = given
        else:
            wrong += given is not None
    _note(noted, "areas that are not positive, replaced by those of the boxes", wrong)
    return areas


def _masks(
    objects: Sequence[Mapping[str, Any]], sizes: np.ndarray, kept: np.ndarray, report: Report, noted: Counter[str]
) -> tuple[list[Any] | None, np.ndarray]:
    """The outline of each object, if all have one, and the numbers of the objects that can be used."""
    masks: list[Any] = [None] * len(objects)
    missing, used = 0, []
    for i, (height, width) in zip(kept.tolist(), sizes[kept].tolist(), strict=True):
        given = objects[i].get("segmentation")
        if given in (None, [], [[]], {}, ""):
            missing += 1
            used.append(i)
            continue
        try:
            masks[i] = (
                _run_lengths(given, height, width) if isinstance(given, dict) else _polygons(given, height, width)
            )
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            report(f"annotation {objects[i]['id']}: {error}")
            continue
        if masks[i]:
            used.append(i)
    _note(noted, "objects whose outlines have fewer than three points, dropped", sum(mask == [] for mask in masks))
    if missing == len(used):
        return None, np.array(used, np.int64)
    _note(noted, f"of {len(used):,} objects have no outline: masks are not used", missing)
    return None if missing else masks, np.array(used, np.int64)


def _polygons(polygons: Any, height: int, width: int) -> list[list[float]]:
    """The polygons that have an area; few operations for each, as there may be a million.

    Raises:
        ValueError: They are no polygons.
    """
    far = 2 * max(height, width)
    good = []
    for polygon in polygons if isinstance(polygons, list) else [polygons]:
        try:
            finite = math.isfinite(sum(polygon))
        except (TypeError, OverflowError):
            finite = False
        if not finite or not isinstance(polygon, list) or len(polygon) % 2:
            raise ValueError(f"polygon {polygon!s:.60} must be an even number of finite numbers, x and y in turn")
        if len(polygon) < 6:
            continue
        if min(polygon) < -far or max(polygon) > 2 * far:
            raise ValueError(f"polygon {polygon!s:.60} is far outside of its image ({width}x{height})")
        good.append(polygon)
    return good


def _run_lengths(rle: Rle, height: int, width: int) -> Rle:
    """The mask with compressed run lengths.

    Raises:
        ValueError: It does not decode.
    """
    if rle.get("size") != [height, width]:
        raise ValueError(f"mask of size {rle.get('size')!r:.40}, but the image has [{height}, {width}]")
    if not isinstance(rle.get("counts"), (str, list)):
        raise ValueError(f"counts of a mask must be run lengths, got {rle.get('counts')!r:.40}")
    try:
        compressed = to_rle(rle, height, width)
        decode_masks([compressed], height, width)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"the run lengths of the mask do not decode to {width}x{height} pixels") from error
    return compressed


def _note(noted: Counter[str], what: str, count: int) -> None:
    if count:
        noted[what] += count
