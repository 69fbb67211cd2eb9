import csv
import errno
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from vision_ssm.errors import InputError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only once it is complete and on disk.

    Raises:
        OSError: Writing failed (a full disk, say); nothing is left behind and an older `path` is untouched.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    part = temporary(path)
    try:
        with part.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        # torch.save hides the reason of a failed write behind a RuntimeError of its own.
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            error = error.__context__
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
            raise error from None
        raise


def temporary(path: Path) -> Path:
    """Where a file is until it is complete.

    It is always the same, so that what a killed process left is overwritten by the next write.
    """
    return path.with_name(f".{path.name}.tmp")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="surrogateescape"))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write rows as a CSV file, whole or not at all; by default with the columns of the last one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or (list(rows[-1]) if rows else []), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_json(path: Path) -> Any:
    """What a JSON file holds; bytes that are not UTF-8, of names of files, survive as in `write_json`.

    Raises:
        InputError: It is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def write_json(path: Path, values: Any) -> None:
    """Write an indented JSON file, whole or not at all."""
    write_text(path, to_json(values))


def to_json(values: Any) -> str:
    """Indented JSON, with null for numbers that are not finite, which JSON does not have."""
    return json.dumps(_finite(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(values: Any) -> Any:
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    if isinstance(values, Mapping):
        return {name: _finite(value) for name, value in values.items()}
    return [*map(_finite, values)] if isinstance(values, (list, tuple)) else values
