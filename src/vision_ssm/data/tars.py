import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np

from vision_ssm.errors import InputError


class TarMember(NamedTuple):
    """A file inside an uncompressed tar file."""

    tar: Path
    offset: int
    """Where in it the content begins."""
    size: int
    """Bytes of content."""

    def read(self) -> bytes:
        """The content; no file stays open that processes could share."""
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


# timm's tar reader keeps the files open, which forked workers then share, and reads whole archives to index them.
class TarReader:
    """Opens members of tar files by their numbers.

    Args:
        members: The members; kept as arrays, which forked processes share.
    """

    def __init__(self, members: Sequence[TarMember]) -> None:
        self.tars = list(dict.fromkeys(member.tar for member in members))
        numbers = {tar: i for i, tar in enumerate(self.tars)}
        self._places = np.array([(numbers[tar], offset, size) for tar, offset, size in members], np.int64)

    def __call__(self, number: int) -> BinaryIO:
        tar, offset, size = self._places[number].tolist()
        return io.BytesIO(TarMember(self.tars[tar], offset, size).read())


def list_members(tar: Path, place: PurePosixPath) -> Iterator[tuple[PurePosixPath, TarMember]]:
    """The files in a tar file and in the tar files inside it.

    Args:
        tar: The tar file.
        place: Path that the files get as a prefix.

    Raises:
        InputError: It cannot be read, or is compressed.
    """
    try:
        with tarfile.open(tar, "r:") as file:
            yield from _members(file, tar, place, 0)
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"cannot read {tar} as an uncompressed tar file: {error}") from error


def _members(
    file: tarfile.TarFile, tar: Path, place: PurePosixPath, start: int
) -> Iterator[tuple[PurePosixPath, TarMember]]:
    for info in file:
        file.members = []  # type: ignore[attr-defined]  # or it keeps all of them in memory
        if not info.isreg() or info.issparse():
            continue
        path = place / info.name
        if path.suffix.lower() == ".tar":
            with tarfile.open(fileobj=file.extractfile(info), mode="r:") as inner:
                yield from _members(inner, tar, path.with_suffix(""), start + info.offset_data)
        else:
            yield path, TarMember(tar, start + info.offset_data, info.size)
    # tarfile takes a damaged header for the end, which a block of zeros marks.
    file.fileobj.seek(file.offset)
    if file.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it is cut off or damaged")
