import http.client
import itertools
import json
import tarfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np

from vision_ssm.data.dataset import ImageDataset, Strings
from vision_ssm.data.streams import ImageStream
from vision_ssm.data.tars import TarMember, TarReader, list_members
from vision_ssm.errors import InputError
from vision_ssm.recipes.config import ClassDataConfig

# Seconds to wait before a shard is asked for again.
_WAITS = (1.0, 5.0, 25.0)
_TOO_MANY = 429  # requests, says the server


@dataclass(frozen=True)
class Fields:
    """Which files of a webdataset sample hold the image and the class.

    Args:
        images: Extensions of images, the preferred ones first.
        target: `cls` for a file that holds the class as a number; otherwise a field of the sample's `json`.
    """

    images: tuple[str, ...]
    target: str

    @classmethod
    def of(cls, config: ClassDataConfig) -> "Fields":
        """The fields that a configuration names."""
        images = (config.input_key or "jpg;jpeg;png;webp").lower().split(";")
        return cls(tuple(key.strip() for key in images), config.target_key or "cls")

    @property
    def file(self) -> str:
        """Extension of the file that holds the class."""
        return "cls" if self.target == "cls" else "json"

    def image(self, parts: Mapping[str, Any]) -> Any:
        """The image among the files of a sample, or None."""
        return next((parts[key] for key in self.images if key in parts), None)

    def label(self, text: bytes | None, sample: str) -> int:
        """The class in the content of `file`.

        Raises:
            InputError: There is no such file, or no class in it.
        """
        if text is None:
            raise InputError(f"{sample} has no .{self.file}")
        try:
            return int(text if self.target == "cls" else json.loads(text)[self.target])
        except (ValueError, KeyError, TypeError):
            under = "" if self.target == "cls" else f" under {self.target}"
            raise InputError(f"{sample}: no class in .{self.file}{under}") from None


def read_shards(shards: list[str], config: ClassDataConfig, classes: tuple[str, ...]) -> ImageDataset | ImageStream:
    """Webdataset shards: indexed, so that they can be read in any order, or as a stream if they are URLs.

    Raises:
        InputError: Shards are missing or damaged, or a sample has no class, or one that does not exist.
    """
    fields = Fields.of(config)
    if "://" in shards[0]:
        return ImageStream([UrlShard(url, fields) for url in shards], classes, None, config.shuffle_buffer)
    images: list[TarMember] = []
    labels: list[int] = []
    ids: list[str] = []
    for shard in map(Path, shards):
        samples: dict[str, dict[str, TarMember]] = {}
        for path, member in list_members(shard, PurePosixPath()):
            name, extension = _sample_name(path)
            samples.setdefault(name, {})[extension] = member
        for name, parts in samples.items():
            if (image := fields.image(parts)) is None:
                continue
            target = parts.get(fields.file)
            label = fields.label(target and target.read(), f"{shard}: {name}")
            if not 0 <= label < len(classes):
                raise InputError(f"{shard}: {name} has label {label}, but there are {len(classes)} classes")
            images.append(image)
            labels.append(label)
            ids.append(f"{shard.name}/{name}")
    if not images:
        raise InputError(f"no images in {shards[0]} and the shards after it (looked for {' '.join(fields.images)})")
    return ImageDataset(TarReader(images), Strings(ids), {"label": np.array(labels)}, classes)


def _sample_name(path: PurePosixPath) -> tuple[str, str]:
    """Which sample of a shard a file belongs to, and the file's extension, which begins at the first dot."""
    key, _, extension = path.name.partition(".")
    return str(path.with_name(key)), extension.lower()


# Not by `datasets`, whose reader takes a damaged header for the end of a shard.
@dataclass(frozen=True)
class UrlShard:
    """A webdataset shard behind a URL; where the connection is lost, it is asked for again.

    Args:
        name: The URL.
        fields: What a sample consists of.
    """

    name: str
    fields: Fields

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
            if (image := self.fields.image(parts)) is not None:
                sample = f"{self.name}: {name}"
                yield sample, self.fields.label(parts.get(self.fields.file), sample), image

    def _files(self) -> Iterator[tuple[str, str, bytes]]:
        with urlopen(self.name, timeout=60) as response:
            body = _Counted(response)
            try:
                with tarfile.open(fileobj=body, mode="r|") as tar:  # type: ignore[call-overload]
                    for info in tar:
                        tar.members = []  # or it keeps all of them in memory
                        name, extension = _sample_name(PurePosixPath(info.name))
                        if info.isreg() and extension in (*self.fields.images, self.fields.file):
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
