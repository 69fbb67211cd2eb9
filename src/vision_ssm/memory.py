"""What the C library does with memory that is free again."""

import ctypes
import os
import sys

# Of glibc's malloc.h. The values are 32-bit integers; those of the environment may be larger.
_SETTINGS = {"MMAP_MAX": (-4, 0), "TRIM_THRESHOLD": (-1, 2**31 - 1), "TOP_PAD": (-2, 2**28)}


def keep_freed_memory() -> bool:
    """Keep freed memory for the next layer instead of returning it to the system, as long as this process runs.

    By default glibc returns large blocks at once and gets them again page by page, which costs time on a CPU in any
    model, most of it in virtual machines. The process then keeps the most memory that it ever needed. ``vision-ssm``
    does this by itself. Without glibc nothing changes, and ``MALLOC_MMAP_MAX_``, ``MALLOC_MMAP_THRESHOLD_``,
    ``MALLOC_TRIM_THRESHOLD_`` or ``MALLOC_TOP_PAD_`` in the environment takes precedence.

    Returns:
        Whether freed memory is kept.
    """
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return False
    if any(f"MALLOC_{name}_" in os.environ for name in ("MMAP_THRESHOLD", *_SETTINGS)):
        return os.environ.get("MALLOC_MMAP_MAX_") == "0"
    return all([library.mallopt(key, value) for key, value in _SETTINGS.values()])
