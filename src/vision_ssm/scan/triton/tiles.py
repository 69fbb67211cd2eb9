"""How much a program of the Triton kernels computes at once: constants, unless they were tuned on this GPU.

``vision_ssm.warmup(..., tune=True)`` tunes them. The results are kept in Triton's cache, beside the compiled kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import astuple, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from vision_ssm.scan.arguments import ScanArguments

_log = logging.getLogger(__name__)
_tuning = ContextVar("tuning", default=False)


@dataclass(frozen=True)
class Tile:
    """How much a program computes at once: S segments of Q steps, C channels, by a number of warps."""

    Q: int
    S: int
    C: int
    warps: int

    @property
    def steps(self) -> int:
        """Steps of a tile."""
        return self.Q * self.S

    def __str__(self) -> str:
        return f"{self.Q}x{self.S}x{self.C}, {self.warps} warp{'s' if self.warps > 1 else ''}"


# Of those that spill nothing on any target (benchmarks/triton_resources.py), the ones with the fewest instructions.
# A program of one warp never waits for other warps.
FORWARD = Tile(Q=4, S=8, C=16, warps=1)
BACKWARD = Tile(Q=2, S=8, C=16, warps=1)
BACKWARD_LARGE = Tile(Q=2, S=8, C=16, warps=2)  # for many states and a large rank

# What else may be fastest: fewer numbers in each thread, or wider blocks of channels.
CANDIDATES = {
    "forward": (FORWARD, Tile(2, 8, 16, 1), Tile(4, 8, 32, 2)),
    "backward": (BACKWARD, BACKWARD_LARGE, Tile(2, 8, 32, 2)),
}


@contextlib.contextmanager
def tuning() -> Iterator[None]:
    """Time the candidates at every kind of scan that was not tuned on this GPU yet."""
    token = _tuning.set(True)
    try:
        with torch.autograd.set_multithreading_enabled(False):  # other threads do not see the context variable
            yield
    finally:
        _tuning.reset(token)


def choose(kind: str, args: ScanArguments, default: Tile, run: Callable[[Tile], Any]) -> Tile:
    """Return the tile of a call: the fastest candidate if this was measured, else the default.

    Args:
        kind: A key of ``CANDIDATES``.
        args: The call; its batch size is rounded up to a power of two.
        default: The tile to use without tuning.
        run: The call with a given tile, to be timed.
    """
    device = args.x.device
    table = _known(_gpu(device))
    if not table and not _tuning.get():
        return default
    call = f"{kind} {_describe(args)}"
    if _tuning.get() and call not in table:
        fastest = _fastest(call, CANDIDATES[kind], run, device)
        if fastest is not None:
            table[call] = fastest
            _write(_gpu(device), table)
    return table.get(call, default)


def _fastest(call: str, candidates: tuple[Tile, ...], run: Callable[[Tile], Any], device: torch.device) -> Tile | None:
    from triton.errors import TritonError

    times: dict[Tile, float] = {}
    for tile in candidates:
        try:
            times[tile] = _milliseconds(partial(run, tile), device)
        except (TritonError, torch.OutOfMemoryError) as error:  # others may fit
            _log.info("%s: no %s (%s)", call, tile, type(error).__name__)
    _log.info("%s: %s", call, "; ".join(f"{tile}: {ms:.3f} ms" for tile, ms in times.items()))
    return min(times, key=lambda tile: times[tile]) if times else None


def _describe(args: ScanArguments) -> str:
    """Return everything that decides which tile is fastest."""
    batch = 1 << (args.x.shape[0] - 1).bit_length()
    sizes = f"B<={batch} T={args.read.shape[1]} C={args.channels_per_route} N={args.state_size} R={args.rank}"
    dtypes = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in (args.x, args.dbc))
    groups = 0 if args.delta is None else args.delta.shape[2]
    switches = {
        "side by side": args.side_by_side,
        "exclusive": not args.inclusive,
        "no softplus": not args.softplus,
        "one projection": args.dbc.shape[2] < args.routes,
        "one step size": 0 < groups < args.routes,
        "some tokens": not args.complete,
        "chosen": args.route_index is not None,
        "weighted": args.route_weight is not None,
    }
    return "; ".join([f"{sizes} K={args.routes_per_image}", dtypes, *(name for name, on in switches.items() if on)])


def _milliseconds(step: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        from triton.testing import do_bench

        with torch.cuda.device(device):  # the events of do_bench are those of the current one
            return float(do_bench(step, warmup=10, rep=50, return_mode="median"))
    begin = time.perf_counter()
    step()
    return (time.perf_counter() - begin) * 1e3


@lru_cache(maxsize=16)
def _gpu(device: torch.device) -> str:
    """Return a key for all that the fastest tiles depend on: the kind of GPU, Triton and the kernels."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreted"
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(f"{name} {triton.__version__}".encode() + sources).hexdigest()


@lru_cache(maxsize=16)
def _known(gpu: str) -> dict[str, Tile]:
    """Return the tuned tiles of a GPU; kept for the process, and extended by :func:`choose`."""
    return _read(gpu)


def _read(gpu: str) -> dict[str, Tile]:
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # no file, or none of ours
        path = _cache(gpu).get_file("tiles.json")
        known = {} if path is None else json.loads(Path(path).read_text())
        tiles = {astuple(tile): tile for candidates in CANDIDATES.values() for tile in candidates}
        return {call: tiles[tuple(tile)] for call, tile in known.items() if tuple(tile) in tiles}
    return {}


def _write(gpu: str, table: dict[str, Tile]) -> None:
    table = _read(gpu) | table  # another process may have added to it
    try:
        _cache(gpu).put(json.dumps({call: astuple(tile) for call, tile in table.items()}, indent=1), "tiles.json")
    except OSError as error:
        _log.warning("cannot cache the tuned tiles, only this process uses them: %s", error)


def _cache(gpu: str) -> Any:
    from triton.runtime.cache import get_cache_manager

    return get_cache_manager(gpu)
