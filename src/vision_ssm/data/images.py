import contextlib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps

from vision_ssm.errors import InputError

T = TypeVar("T")
R = TypeVar("R")


def open_image(
    file: str | PathLike[str] | BinaryIO,
    name: str | None = None,
    max_pixels: int | None = None,
    size: Sequence[int] | None = None,
    least_pixels: int | None = None,
) -> Image.Image:
    """Read an image file as 8-bit RGB.

    The EXIF orientation is applied, transparency is laid on white, and samples deeper than 8 bits are scaled by
    the range of their format (see `to_rgb`).

    Args:
        file: Its path, or its content.
        name: What to call it in messages, if not by its path.
        max_pixels: The largest number of pixels to decode, if not Pillow's limit.
        size: The height and width that it must have. Where only the image as it is stored has them, and the EXIF
            orientation would swap its sides, the orientation is not applied: boxes that were drawn by a program that
            ignores it belong to the stored pixels.
        least_pixels: A JPEG file that is larger is decoded at a half, a fourth or an eighth of its sides, as far as so
            many pixels are left; that takes less time than decoding and resizing it.

    Raises:
        InputError: The file is missing, truncated, not an image, too large, or of another size.
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        if max_pixels is not None:
            Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2  # Pillow refuses images beyond twice its limit
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of images beyond half the limit, and of odd metadata
            with Image.open(file) as image:
                if least_pixels:
                    factor = max(1, math.sqrt(image.width * image.height / least_pixels))
                    image.draft(None, (max(1, int(image.width / factor)), max(1, int(image.height / factor))))
                image.load()
                with contextlib.suppress(Exception):  # tags of wrong types
                    if size is None or not _is_stored_as(image, size):
                        ImageOps.exif_transpose(image, in_place=True)
                if size is not None and (image.height, image.width) != tuple(size):
                    expected = f"the annotations say {size[1]}x{size[0]}"
                    raise ValueError(f"it has {image.width}x{image.height} pixels, {expected}")
                return to_rgb(image)
    except Image.DecompressionBombError as error:
        pixels, most = re.findall(r"\d+", str(error))[:2]  # its own text speaks of attacks
        has = f"has {int(pixels):,} pixels, at most {int(most):,} are allowed"
        raise InputError(f"image {name or file} {has}; --max-pixels raises the limit") from error
    except Exception as error:  # decoders raise anything
        raise InputError(f"cannot read image {name or file}: {_reason(error)}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def image_sizes(file: Path) -> list[tuple[int, int]]:
    """Height and width of an image as it is shown and, where its EXIF orientation swaps them, as it is stored.

    Raises:
        InputError: It is no image.
    """
    try:
        with Image.open(file) as image:
            stored = image.height, image.width
            return [stored[::-1], stored] if _swaps(image) else [stored]
    except Exception as error:  # decoders raise anything
        raise InputError(f"cannot read image {file}: {_reason(error)}") from error


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """What a function that reads image files gives for each of many; warnings of odd files are left out.

    Filters of warnings belong to the whole process, so the threads themselves must not change them.
    """
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")
        return list(pool.map(function, items))


def _is_stored_as(image: Image.Image, size: Sequence[int]) -> bool:
    """Whether an image has a height and width that its EXIF orientation would swap."""
    return _swaps(image) and image.height != image.width and (image.height, image.width) == tuple(size)


def _swaps(image: Image.Image) -> bool:
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return isinstance(orientation, int) and orientation >= 5


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (
        "not an image, or damaged"
        if isinstance(error, Image.UnidentifiedImageError)
        else str(error) or type(error).__name__
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any PIL mode to 8-bit RGB.

    Range taken as black to white: 0 to 65535 for 16-bit samples (and for 32-bit integers that fit); 0 to 1 or
    0 to 255 for floats that fit; the image's own minimum to maximum for everything else.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled(np.asarray(image, dtype=np.float64), integer=image.mode != "F").convert("RGB")
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)  # needs less memory than compositing in RGBA
        return white
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _scaled(values: np.ndarray, *, integer: bool) -> Image.Image:
    values = np.nan_to_num(values)
    low, high = float(values.min()), float(values.max())
    for top in (65535.0,) if integer else (1.0, 255.0):
        if low >= 0 and high <= top:
            low, high = 0.0, top
            break
    levels = (values - low) * (255.0 / (high - low if high > low else 1.0))
    return Image.fromarray(np.round(levels).astype(np.uint8))
