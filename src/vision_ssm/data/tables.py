import functools
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vision_ssm.data.dataset import ImageDataset, Strings
from vision_ssm.data.streams import ImageStream
from vision_ssm.errors import InputError
from vision_ssm.recipes.config import ClassDataConfig


@dataclass(frozen=True)
class TableShard:
    """A shard of a Hugging Face dataset that is read as a stream.

    Args:
        name: What to call it.
        table: The `datasets.IterableDataset`, with its images as they are encoded.
        number: Which of its shards.
        image: Column of the images.
        target: Column of the classes.
        labels: Label of each value of that column; by default the values are labels.
    """

    name: str
    table: Any
    number: int
    image: str
    target: str
    labels: Mapping[Any, int] | None

    def __iter__(self) -> Iterator[tuple[str, int, bytes]]:
        with _errors(self.name):
            for i, row in enumerate(self.table.shard(self.table.num_shards, self.number)):
                image = row[self.image] or {}
                name = f"{self.name} image {i}" + (f" ({Path(image['path']).name})" if image.get("path") else "")
                yield name, _label(row[self.target], self.labels, name), _content(image)


Place = tuple[str, str]
"""What `--data` names, and a split of it."""


def find_split(data: str, names: tuple[str, ...]) -> Place | None:
    """The first of some splits that a Hugging Face dataset has.

    Raises:
        InputError: It cannot be read.
    """
    with _errors(f"the splits of {data}") as datasets:
        available = datasets.get_dataset_split_names(_name(data))
    return next(((data, name) for name in names if name in available), None)


def read_table(
    place: Place | str, config: ClassDataConfig, named: tuple[str, ...] | None
) -> ImageDataset | ImageStream:
    """A split of a Hugging Face dataset, or of a local folder of its files, downloaded or as a stream.

    Args:
        place: hfds/NAME, or hfids/NAME for a stream, and the split.
        config: How to read it.
        named: Names of the classes, if they are given.

    Raises:
        InputError: It cannot be read, lacks a column, or its classes are not known.
    """
    if isinstance(place, str):
        raise InputError(f"{place} has no split of a usual name; give it with --train-split or --val-split")
    data, split = place
    stream = data.startswith("hfids/") or (config.data_format == "hfids" and not data.startswith("hfds/"))
    image, target = config.input_key or "image", config.target_key or "label"
    with _errors(f"{split} of {data}") as datasets:
        builder = datasets.load_dataset_builder(_name(data), cache_dir=config.cache_dir and str(config.cache_dir))
        if stream:
            table: Any = builder.as_streaming_dataset(split=split)
        else:
            builder.download_and_prepare()
            table = builder.as_dataset(split=split)
        columns = table.column_names or list(next(iter(table), {}))
        for option, key in (("input", image), ("target", target)):
            if key not in columns:
                raise InputError(f"{data} has no column {key}; --{option}-key takes {', '.join(columns)}")
        names = getattr((table.features or {}).get(target), "names", None)
        table = table.cast_column(image, datasets.Image(decode=False))
        classes = named or tuple(names or ())
        if not classes:
            raise InputError(f"{data} does not name its classes; give --num-classes or --class-map")
        labels = _labels(classes, names) if config.class_map else None
        if stream:
            shards = [
                TableShard(f"{split} shard {i}", table, i, image, target, labels) for i in range(table.num_shards)
            ]
            length = getattr((builder.info.splits or {}).get(split), "num_examples", None) or None
            return ImageStream(shards, classes, length, config.shuffle_buffer)
        ids = [f"{split} {i}" for i in range(len(table))]
        values = [_label(value, labels, name) for value, name in zip(table[target], ids, strict=True)]
        if wrong := sorted(set(values) - set(range(len(classes)))):
            raise InputError(f"{split} of {data} has label {wrong[0]}, but there are {len(classes)} classes")
        return ImageDataset(
            functools.partial(_open, table, image), Strings(ids), {"label": np.array(values, np.int64)}, classes
        )


def _labels(classes: tuple[str, ...], names: list[str] | None) -> dict[Any, int]:
    """Label of each class that a column names or numbers."""
    index = {name: i for i, name in enumerate(classes)}
    return {i: index[name] for i, name in enumerate(names) if name in index} if names else index


def _label(value: Any, labels: Mapping[Any, int] | None, name: str) -> int:
    if labels is not None and value not in labels:
        raise InputError(f"{name} has class {value}, which is not in --class-map")
    return int(value) if labels is None else labels[value]


def _open(table: Any, image: str, number: int) -> BinaryIO:
    return io.BytesIO(_content(table[number][image] or {}))


def _content(image: Mapping[str, Any]) -> bytes:
    import fsspec

    if image.get("bytes") is not None or image.get("path") is None:
        return image.get("bytes") or b""
    with fsspec.open(image["path"]) as file:
        return file.read()


def _name(data: str) -> str:
    return data.removeprefix("hfds/").removeprefix("hfids/")


@contextmanager
def _errors(what: str) -> Iterator[Any]:
    """Yields the library `datasets`, and turns what it raises into an `InputError`."""
    try:
        import datasets
    except ImportError:
        raise InputError("Hugging Face datasets need the package datasets: pip install 'vision-ssm[data]'") from None
    try:
        yield datasets
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"cannot read {what}: {type(error).__name__}: {error}") from error
