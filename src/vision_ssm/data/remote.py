import http.client
import itertools
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.error import HTTPError
from urllib.request import urlopen

from vision_ssm.data.datasets import shorten
from vision_ssm.data.shards import expand_braces, image_extensions, parse_target, sample_name, target_file
from vision_ssm.data.streams import ImageStream
from vision_ssm.errors import InputError
from vision_ssm.recipes import TimmData

# Seconds to wait before a shard is asked for again.
_WAITS = (1.0, 5.0, 25.0)
_TOO_MANY = 429  # requests, says the server


@dataclass(frozen=True)
class UrlShard:
    """A webdataset shard behind a URL; where the connection is lost, it is asked for again.

    Args:
        name: The URL.
        input_key: Extensions of images, separated by semicolons.
        target_key: See `read_shards`.
    """

    name: str
    input_key: str
    target_key: str

    def __iter__(self) -> Iterator[tuple[str, int, bytes]]:
        done = 0
        for wait in (*_WAITS, None):
            try:
                for sample in itertools.islice(self._samples(), done, None):
                    yield sample
                    done += 1
                return
            except (OSError, http.client.HTTPException) as error:
                refused = isinstance(error, HTTPError) and error.code < 500 and error.code != _TOO_MANY
                if wait is None or refused:
                    raise InputError(f"cannot read {self.name}: {error or type(error).__name__}") from error
            time.sleep(wait)

    def _samples(self) -> Iterator[tuple[str, int, bytes]]:
        for name, group in itertools.groupby(self._files(), key=lambda file: file[0]):
            parts = {extension: content for _, extension, content in group}
            image = next((parts[key] for key in image_extensions(self.input_key) if key in parts), None)
            if image is not None:
                sample = f"{self.name}: {name}"
                yield sample, parse_target(parts.get(target_file(self.target_key)), self.target_key, sample), image

    def _files(self) -> Iterator[tuple[str, str, bytes]]:
        wanted = {*image_extensions(self.input_key), target_file(self.target_key)}
        with urlopen(self.name, timeout=60) as response:
            body = _Counted(response)
            try:
                with tarfile.open(fileobj=body, mode="r|") as tar:  # type: ignore[call-overload]
                    for info in tar:
                        tar.members = []  # or it keeps all of them in memory
                        name, extension = sample_name(PurePosixPath(info.name))
                        if info.isreg() and extension in wanted:
                            yield name, extension, tar.extractfile(info).read()
                    # tarfile takes a damaged header for the end, which is two blocks of zeros.
                    if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                        raise tarfile.ReadError("it is cut off or damaged")
            except tarfile.TarError as error:
                length = response.headers.get("Content-Length")
                if length is not None and not body.read(1) and body.count < int(length):
                    raise ConnectionError("the connection was lost") from error
                raise InputError(f"cannot read {self.name} as an uncompressed tar file: {error}") from error


class _Counted:
    """Counts the bytes that are read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.count = file, 0

    def read(self, size: int) -> bytes:
        content = self.file.read(size)
        self.count += len(content)
        return content


def open_shards(data: TimmData, split: str, classes: tuple[str, ...]) -> ImageStream:
    """Webdataset shards behind URLs as a stream.

    Args:
        data: How to read them.
        split: Their URLs, such as `https://HOST/train-{0000..0146}.tar`, and perhaps `|` and the number of images.
        classes: Names of the classes.

    Raises:
        InputError: What follows `|` is no number.
    """
    pattern, _, length = split.partition("|")
    if length and not length.isdecimal():
        raise InputError(f"after | comes the number of images, not {length}")
    input_key, target_key = data.input_key or "jpg;jpeg;png;webp", data.target_key or "cls"
    shards = [UrlShard(url, input_key, target_key) for url in expand_braces(pattern)]
    return ImageStream(shards, classes, int(length) if length else None, data.shuffle)


@dataclass(frozen=True)
class TableShard:
    """A shard of a Hugging Face dataset that is read as a stream.

    Args:
        name: What to call it.
        table: The `datasets.IterableDataset`, with its images as they are encoded.
        number: Which of its shards.
        image: Column of the images.
        target: Column of the classes.
        places: Index of each class that the column names or numbers; otherwise the column holds the index.
    """

    name: str
    table: Any
    number: int
    image: str
    target: str
    places: dict[Any, int] | None

    def __iter__(self) -> Iterator[tuple[str, int, bytes]]:
        import datasets
        import fsspec

        try:
            for i, row in enumerate(self.table.shard(self.table.num_shards, self.number)):
                image, target = row[self.image] or {}, row[self.target]
                path, content = image.get("path"), image.get("bytes")
                if content is None and path is not None:
                    with fsspec.open(path) as file:
                        content = file.read()
                name = f"{self.name} image {i}" + (f" ({Path(path).name})" if path else "")
                if self.places is not None and target not in self.places:
                    raise InputError(f"{name} is of class {target}, which is not among those of --data.classes")
                yield name, int(target) if self.places is None else self.places[target], content or b""
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise InputError(f"cannot read {self.name}: {type(error).__name__}: {error}") from error


def open_table(data: TimmData, split: str, named: tuple[str, ...] | None) -> ImageStream:
    """A Hugging Face dataset, or a local folder of its files, as a stream.

    Args:
        data: Which, and how to read it.
        split: The split.
        named: Names of the classes, if they are given.

    Raises:
        InputError: It cannot be read, lacks a column, or its classes are not known.
    """
    try:
        import datasets
    except ImportError:
        raise InputError("hfids/ needs Hugging Face's datasets: pip install 'vision-ssm[data]'") from None
    image, target = data.input_key or "image", data.target_key or "label"
    try:
        builder = datasets.load_dataset_builder(data.dataset.partition("/")[2], cache_dir=data.root and str(data.root))
        table = builder.as_streaming_dataset(split=split)
        columns = table.column_names or list(next(iter(table), {}))
        for option, key in (("input", image), ("target", target)):
            if key not in columns:
                raise InputError(f"{data.dataset} has no column {key}; --data.{option}-key takes {shorten(columns)}")
        names = getattr((table.features or {}).get(target), "names", None)
        table = table.cast_column(image, datasets.Image(decode=False))
        info = (builder.info.splits or {}).get(split)
        shards = range(table.num_shards)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"cannot read {split} of {data.dataset}: {type(error).__name__}: {error}") from error
    classes = named or tuple(names or ())
    if not classes:
        raise InputError(f"{data.dataset} does not name its classes; give their number with --data.classes")
    places = None
    if isinstance(data.classes, Path):
        index = {name: i for i, name in enumerate(classes)}
        places = {i: index[name] for i, name in enumerate(names) if name in index} if names else index
    return ImageStream(
        [TableShard(f"{split} shard {i}", table, i, image, target, places) for i in shards],
        classes,
        getattr(info, "num_examples", None) or None,
        data.shuffle,
    )
