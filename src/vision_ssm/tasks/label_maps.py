"""Label maps as pictures and files."""

import colorsys
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor


def default_colors(count: int) -> tuple[str, ...]:
    """Colors that are easy to tell apart where they are few."""
    turns = (0.61803398875 * i % 1 for i in range(count))
    tones = ((0.75, 0.9), (0.9, 0.6), (0.45, 1.0))
    parts = (colorsys.hsv_to_rgb(turn, *tones[i % 3]) for i, turn in enumerate(turns))
    return tuple("#" + "".join(f"{round(255 * part):02x}" for part in color) for color in parts)


def color_labels(labels: np.ndarray, colors: Sequence[str]) -> Image.Image:
    """The picture of a label map; black where a pixel does not count."""
    table = np.array([*map(ImageColor.getrgb, colors), (0, 0, 0)], np.uint8)  # the last one has index -1 too
    return Image.fromarray(table[labels])


def pack_labels(labels: np.ndarray) -> bytes:
    """A label map as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(labels.astype(np.uint16)).save(file, "PNG")
    return file.getvalue()


def read_labels(file: bytes) -> np.ndarray:
    """The label map of a PNG file."""
    return np.asarray(Image.open(io.BytesIO(file))).astype(np.int64)
