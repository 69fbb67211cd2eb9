"""Find, check and call the compiled library; it runs on torch's thread pool."""

from __future__ import annotations

import ctypes
import platform
import warnings
from functools import lru_cache
from pathlib import Path

import torch

from vision_ssm.scan.cpu.build import LIBRARY, SOURCES, source_hash

LEVELS = ("baseline", "avx2", "avx512")
"""Instruction sets by their number in the library: SSE2 or NEON, AVX2, AVX-512."""

_SIZES = (
    "batch tokens channels routes taken steps width states rates rank head softplus inclusive "
    "x_type dbc_type delta_type y_type grad_y_type "
    "dbc_route delta_route A_route dt_weight_route dt_bias_route D_route"
)
_ARGUMENTS = "x dbc delta A dt_weight dt_bias D route_weight read write route_index y state"
_BACKWARD = "grad_y grad_state grad_x grad_dbc grad_delta grad_parameters grad_route_weight"


class Problem(ctypes.Structure):
    """One call; the fields of ``problem.h`` in its order."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES.split()),
        *((name, ctypes.c_void_p) for name in _ARGUMENTS.split()),
        *((name, ctypes.c_int64) for name in ("blocks", "block_size", "parts")),
        ("partial", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in _BACKWARD.split()),
        *((name, ctypes.c_int64) for name in ("groups", "threads")),
    ]


class Library:
    """The functions of a compiled library.

    Raises:
        OSError: If it cannot be loaded, or was not built from the sources beside it.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.vision_ssm_source.restype = ctypes.c_char_p
        built_from = self._library.vision_ssm_source().decode()
        if built_from != source_hash() or self._library.vision_ssm_problem_size() != ctypes.sizeof(Problem):
            raise OSError(f"{path} was built from other sources")
        for name in ("forward", "backward", "transpose"):
            function = getattr(self._library, f"vision_ssm_{name}")
            function.argtypes, function.restype = [ctypes.POINTER(Problem), ctypes.c_int64], ctypes.c_int64
        self.levels = tuple(name for i, name in enumerate(LEVELS) if self._library.vision_ssm_has_level(i))
        self.pool = self._use_torch_threads()

    def run(self, name: str, problem: Problem, level: str | None) -> None:
        """Call ``forward``, ``backward`` or ``transpose``, on the best instruction set or a named one.

        Raises:
            ValueError: If an index is out of range.
            MemoryError: If working memory could not be allocated.
        """
        problem.threads = torch.get_num_threads()
        number = LEVELS.index(level or self.levels[-1])
        result = getattr(self._library, f"vision_ssm_{name}")(ctypes.byref(problem), number)
        if result == 1:
            raise ValueError(f"read and write must lie in -1..{problem.tokens - 1}; an index is out of range")
        if result == 2:
            raise ValueError(f"route_index must lie in 0..{problem.routes - 1}; an index is out of range")
        if result == 3:
            raise MemoryError("not enough memory for the scan's workspace")

    def _use_torch_threads(self) -> str:
        """Pass the entry points of torch's OpenMP library to ours; return its kind."""
        set_pool = self._library.vision_ssm_set_pool
        set_pool.argtypes, set_pool.restype = [ctypes.c_int64, *[ctypes.c_void_p] * 3], None
        for kind, names in (
            (1, ["GOMP_parallel"]),
            (2, ["__kmpc_fork_call", "__kmpc_global_thread_num", "__kmpc_push_num_threads"]),
        ):
            found = [_find_symbol(name) for name in names]
            if all(found):
                set_pool(kind, *found, *[None] * (3 - len(found)))
                return {1: "GOMP", 2: "KMP"}[kind]
        set_pool(0, None, None, None)
        return "none"


@lru_cache(maxsize=1)
def load_library() -> Library | None:
    """Return the library, or ``None`` after warning once why it cannot be used."""
    path = SOURCES / LIBRARY
    if not path.exists():
        reason = "it was not built when the package was installed (no C++ compiler?)"
    else:
        try:
            return Library(path)
        except (OSError, AttributeError, UnicodeDecodeError) as error:  # no library, or not ours
            reason = str(error)
    warnings.warn(
        f"vision_ssm runs its scans on the slower 'portable' backend: no compiled C++ scan, {reason}. "
        "With GCC or Clang installed, `python -m vision_ssm.scan.cpu` builds it.",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


@lru_cache(maxsize=1)
def _torch_libraries() -> list[ctypes.CDLL]:
    # A handle of torch's library also searches the libraries it is linked with, and so finds the pool torch uses.
    suffix = {"Darwin": "dylib", "Windows": "dll"}.get(platform.system(), "so")
    found = []
    for path in (Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}", None):
        try:
            found.append(ctypes.CDLL(None if path is None else str(path)))
        except (OSError, TypeError):  # Windows has no handle of the process
            continue
    return found


def _find_symbol(name: str) -> int | None:
    for handle in _torch_libraries():
        if hasattr(handle, name):
            return ctypes.cast(getattr(handle, name), ctypes.c_void_p).value
    return None
