"""The resizing of published detectors: OpenCV's bilinear interpolation of 8-bit images, bit for bit, in NumPy."""

import numpy as np

_BITS = 11  # of the weights; products keep 4 bits less after the horizontal pass, so that they fit 16
_ROWS = 32  # resized together, which keeps the intermediate values in the cache


def fit_size(height: int, width: int, limits: tuple[int, int]) -> tuple[int, int]:
    """Return the largest (height, width) of the same ratio within limits, as mmcv's `rescale_size` rounds it.

    Args:
        height: Height in pixels.
        width: Width in pixels.
        limits: Largest long side and largest short side in pixels, such as (1333, 800).
    """
    scale = min(max(limits) / max(height, width), min(limits) / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize as `cv2.resize` with `INTER_LINEAR` does: without antialiasing, in 11-bit fixed point.

    Args:
        image: (H, W, C) uint8.
        size: New height and width in pixels.

    Returns:
        (height, width, C) uint8; a copy where the size stays the same.
    """
    (height, width), (rows, columns), channels = image.shape[:2], size, image.shape[2]
    if (height, width) == (rows, columns):
        return image.copy()
    if (height, width) == (2 * rows, 2 * columns):  # OpenCV takes the mean of 2 by 2 pixels
        pairs = np.add(image[::2], image[1::2], dtype=np.uint16)
        return ((pairs[:, ::2] + pairs[:, 1::2] + 2) >> 2).astype(np.uint8)

    left, share = _sources(width, columns)
    share[(left < 0) | (left >= width - 1)] = 0
    left = left.clip(0, width - 1)
    right = np.minimum(left + 1, width - 1)
    weights = np.repeat(_weights(share), channels, axis=1)  # (2, columns * C)
    top, share = _sources(height, rows)
    top, bottom = top.clip(0, height - 1), (top + 1).clip(0, height - 1)
    above, below = _weights(share)[:, :, None]  # (rows, 1) each

    resized = np.empty((rows, columns * channels), np.uint8)
    for start in range(0, rows, _ROWS):
        part = slice(start, start + _ROWS)
        used = np.unique((top[part], bottom[part]))
        lines = image[used]
        values = lines[:, left].reshape(len(used), -1) * weights[0]
        values += lines[:, right].reshape(len(used), -1) * weights[1]
        values >>= 4
        upper = values[np.searchsorted(used, top[part])]
        lower = values[np.searchsorted(used, bottom[part])]
        upper *= above[part]
        upper >>= 16
        lower *= below[part]
        lower >>= 16
        upper += lower
        upper += 2
        upper >>= 2
        resized[part] = upper
    return resized.reshape(rows, columns, channels)


def _sources(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Index of the pixel before each new one, and how far it lies behind that, in float32 as OpenCV computes it."""
    places = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    index = np.floor(places)
    return index.astype(np.int64), places - index


def _weights(share: np.ndarray) -> np.ndarray:
    return np.rint(np.stack([1 - share, share]) * np.float32(1 << _BITS)).astype(np.int32)  # (2, n)
