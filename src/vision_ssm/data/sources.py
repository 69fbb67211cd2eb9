import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vision_ssm.data.datasets import Images, LabelledImages, Splits, hold_out, load_digits, load_folder, shorten
from vision_ssm.data.remote import open_shards, open_table
from vision_ssm.data.shards import read_shards
from vision_ssm.data.streams import ImageStream
from vision_ssm.data.tars import read_tars
from vision_ssm.errors import InputError
from vision_ssm.recipes import FolderConfig, TimmConfig, TimmData, TrainConfig

_SYNONYMS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation", "test"))


@dataclass(frozen=True, slots=True)
class TableImage:
    """An encoded image in a table of Hugging Face's.

    Args:
        reader: timm's reader of the table.
        index: The row.
    """

    reader: Any
    index: int

    def open(self) -> BinaryIO:
        """The encoded image."""
        with self.reader[self.index][0] as file:
            return io.BytesIO(file.read())


def load_splits(config: TrainConfig) -> Splits:
    """The images a configuration trains and validates on.

    Raises:
        InputError: They are missing or cannot be used.
    """
    if isinstance(config, FolderConfig):
        return load_folder(config.data.root, config.data.val, config.data.val_fraction, seed=config.seed)
    if isinstance(config, TimmConfig):
        return load_source(config.data, config.seed)
    return load_digits()


def load_source(data: TimmData, seed: int = 0) -> Splits:
    """Training and validation images from tar files, webdataset shards or Hugging Face datasets, or streams of these.

    Args:
        data: Which, and where.
        seed: Decides which images are held out, if that is asked for.

    Raises:
        InputError: They are missing, or cannot be used.
    """
    named = _class_names(data.classes)
    held_out = data.val_fraction is not None
    readers: dict[str, Callable[[TimmData, str, tuple[str, ...] | None], Images]]
    readers = {"hfds": _read_table, "hfids": open_table, "wds": _read_shards}
    train: Images
    val: Images | None
    if read := readers.get(data.dataset.partition("/")[0]):
        train = read(data, data.train_split, named)
        val = None if held_out else read(data, data.val_split, named)
    elif data.dataset:
        raise InputError(
            f"--data.dataset must be hfds/NAME, hfids/NAME, wds/ or empty (for tar files), not {data.dataset}"
        )
    else:
        root = _folder(data.root)
        train = read_tars(_split_place(root, data.train_split) or root, named)
        val_place = _split_place(root, data.val_split)
        if val_place is None and not held_out:
            raise InputError(
                f"{root} has neither {data.val_split}.tar nor a folder {data.val_split}; "
                "name it with --data.val-split, or hold a share out with --data.val-fraction"
            )
        val = None if held_out or val_place is None else read_tars(val_place, train.classes)
    if len(train.classes) < 2:
        raise InputError(f"the training images are of one class only ({train.classes[0]}); at least two are needed")
    train = _with_length(train, data)
    if val is None:
        if isinstance(train, ImageStream):
            raise InputError("no share of a stream can be held out; name a validation split with --data.val-split")
        return hold_out(train, data.val_fraction or 0.0, seed)
    if val.classes != train.classes:
        raise InputError(f"the classes of {data.val_split} are not those of {data.train_split}")
    return Splits(train, val)


def _with_length(train: Images, data: TimmData) -> Images:
    if not isinstance(train, ImageStream):
        if data.samples is not None:
            raise InputError("--data.samples is for streams; these training images have been counted")
        return train
    train.length = train.length if data.samples is None else data.samples
    if not train.length:
        raise InputError(f"{data.train_split} does not say how many images it holds; give their number, --data.samples")
    return train


def _class_names(classes: int | Path | None) -> tuple[str, ...] | None:
    if classes is None:
        return None
    if isinstance(classes, int):
        if classes < 2:
            raise InputError(f"--data.classes must be at least 2, got {classes}")
        return tuple(map(str, range(classes)))
    if not classes.is_file():
        raise InputError(f"no such file of class names: {classes}")
    names = tuple(classes.read_text(encoding="utf-8").split("\n"))
    names = tuple(name.strip() for name in names if name.strip())
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"{classes} must name at least two classes, one a line and none twice")
    return names


def _folder(root: Path | None) -> Path:
    if root is None:
        raise InputError("where are the images? give --data.root")
    if not root.exists():
        raise InputError(f"no such file or folder: {root}")
    return root


def _split_place(root: Path, split: str) -> Path | None:
    """The tar file or folder of a split, under its own name or a usual other one, as timm finds it."""
    if root.is_file():
        return None
    others = next((names for names in _SYNONYMS if split in names), ())
    places = [root / f"{name}{end}" for name in (split, *others) for end in ("", ".tar")]
    return next((place for place in places if place.exists()), None)


def _read_shards(data: TimmData, split: str, named: tuple[str, ...] | None) -> Images:
    if named is None:
        raise InputError("shards hold no names of classes; give their number, or a file of names, --data.classes")
    if "://" in split:
        return open_shards(data, split, named)
    if data.root is None and "://" in data.train_split:
        raise InputError(f"--data.val-split {split} is no URL; name the validation shards as the training ones")
    keys = {key: value for key in ("input_key", "target_key") if (value := getattr(data, key))}
    return read_shards(_folder(data.root), split, named, **keys)


def _read_table(data: TimmData, split: str, named: tuple[str, ...] | None) -> LabelledImages:
    try:
        import datasets
        from timm.data.readers import create_reader
    except ImportError:
        raise InputError("hfds/ needs Hugging Face's datasets: pip install 'vision-ssm[data]'") from None
    options: dict[str, Any] = {"input_key": data.input_key, "target_key": data.target_key}
    if isinstance(data.classes, Path) and named is not None:
        options["class_map"] = {name: i for i, name in enumerate(named)}
    try:
        reader = create_reader(data.dataset, root=data.root and str(data.root), split=split, **options)
        # A column that is asked for but absent has been added, empty.
        columns = [key for key, value in reader.dataset[0].items() if value is not None] if len(reader) else []
        for option, key in (("input", data.input_key or "image"), ("target", data.target_key or "label")):
            if key.split("/")[0] not in columns:
                raise InputError(f"{data.dataset} has no column {key}; --data.{option}-key takes {shorten(columns)}")
        targets = [int(target) for target in reader.iter_targets()]
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"cannot read {split} of {data.dataset}: {type(error).__name__}: {error}") from error
    classes = named or tuple(sorted(reader.class_to_idx, key=reader.class_to_idx.get))
    if not classes:
        raise InputError(f"{data.dataset} does not name its classes; give their number with --data.classes")
    if wrong := sorted(set(targets) - set(range(len(classes)))):
        raise InputError(f"{split} of {data.dataset} has class {shorten([str(i) for i in wrong])} of {len(classes)}")
    images = [TableImage(reader, i) for i in range(len(targets))]
    return LabelledImages(images, targets, classes, [f"{split} {i}" for i in range(len(targets))])
