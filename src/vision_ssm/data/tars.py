import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from vision_ssm.data.datasets import EXTENSIONS, LabelledImages, shorten
from vision_ssm.errors import InputError


# timm's tar reader keeps the files open, which forked workers then share, and reads whole archives to index them.
@dataclass(frozen=True, slots=True)
class TarMember:
    """A file inside an uncompressed tar file.

    Args:
        tar: The tar file.
        offset: Where in it the content begins.
        size: Bytes of content.
    """

    tar: Path
    offset: int
    size: int

    def open(self) -> BinaryIO:
        """The content; nothing stays open that processes could share."""
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


def read_tars(root: Path, classes: tuple[str, ...] | None = None) -> LabelledImages:
    """The images in a tar file, or in all tar files of a folder; tar files may hold tar files.

    The class of an image is the name of the folder or, where it lies in none, of the tar file that it lies in.

    Args:
        root: The tar file or the folder.
        classes: The classes that are allowed, in order; otherwise all that there are, sorted.

    Raises:
        InputError: There are no tar files or no images in them, they are damaged or compressed, or hold a class not
            in `classes`.
    """
    tars = [root] if root.is_file() else sorted(root.glob("*.tar"))
    if not tars:
        raise InputError(f"{root} holds no .tar files")
    found = [
        (place.parent.name, str(place), member)
        for tar in tars
        for place, member in list_members(tar, PurePosixPath() if root.is_file() else PurePosixPath(tar.stem))
        if place.suffix.lower() in EXTENSIONS
    ]
    if not found:
        raise InputError(f"{root} holds no images (looked for {' '.join(EXTENSIONS)} in {len(tars)} tar files)")
    names = sorted({label for label, *_ in found})
    if "" in names:
        raise InputError(f"{root} holds images that lie in no folder, so their class is unknown")
    if classes is not None and (unknown := sorted(set(names) - set(classes))):
        raise InputError(f"{root} has classes that are not among the {len(classes)} known: {shorten(unknown)}")
    index = {name: i for i, name in enumerate(classes or names)}
    found.sort(key=lambda entry: entry[:2])
    return LabelledImages(
        images=[member for *_, member in found],
        targets=[index[label] for label, *_ in found],
        classes=classes or tuple(names),
        names=[name for _, name, _ in found],
    )


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
    except tarfile.TarError as error:
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
