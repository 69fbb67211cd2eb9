"""Routes through a map of tokens, as data.

A route is a list of token indices: step ``t`` reads token ``read[t]`` and adds its
output to token ``write[t]``. :class:`ScanPath` describes the order of a route for any
height and width; :class:`Routes` holds the indices of several routes for one size.
"""

from __future__ import annotations

import copyreg
import operator
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from threading import RLock
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

_INT32_MAX = 2**31 - 1


def _check_integers(**fields: Any) -> None:
    for name, value in fields.items():
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")


@dataclass(frozen=True, eq=False)
class ScanPath:
    """The order in which a route visits the tokens of a (height, width) map.

    A path is a value: it compares, hashes and pickles by its class and attributes, dataclass or not. Tokens are
    numbered row by row, ``row * width + column``. Subclasses implement :meth:`tokens`, from attributes and size alone.
    Where all attributes are numbers, strings, paths or tuples of them, a path can be hashed and its indices are cached.
    """

    complete: ClassVar[bool] = False
    """Whether every token of any map is read and written, each once. Backends then need not clear outputs.

    Trusted while tracing, where indices have no values to check; not inherited, so a subclass declares it itself.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Reset what a subclass must not inherit: ``complete``, and equality and hash of a dataclass."""
        super().__init_subclass__(**options)
        if "complete" not in cls.__dict__:
            cls.complete = False
        # Inherited from a dataclass or made for one, these would see its fields alone.
        for name in ("__eq__", "__hash__"):
            if cls.__module__ != __name__ and name not in cls.__dict__:
                setattr(cls, name, getattr(ScanPath, name))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and _state(self) == _state(other)

    def __hash__(self) -> int:
        return hash((type(self), _state(self, fixed=True)))

    def tokens(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """Return the visited tokens in order, (T,) int64; -1 stands for a padding token.

        Tensor arithmetic of ``height`` and ``width`` only, so that it traces with dynamic sizes.
        """
        raise NotImplementedError

    def steps(self, height: int, width: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Return what every step reads and where it writes, both (T,) int64."""
        tokens = self.tokens(height, width, device)
        return tokens, tokens


@dataclass(frozen=True)
class Rows(ScanPath):
    """Row by row from the top left, each from left to right."""

    complete = True

    def tokens(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """See :meth:`ScanPath.tokens`."""
        return torch.arange(height * width, device=device)


@dataclass(frozen=True)
class Snake(ScanPath):
    """Row by row, every other row backwards, so that neighboring steps are neighboring tokens."""

    complete = True

    def tokens(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """See :meth:`ScanPath.tokens`."""
        row, column = _grid(height, width, device)
        return row * width + torch.where(row % 2 == 0, column, width - 1 - column)


@dataclass(frozen=True)
class Diagonal(ScanPath):
    """Diagonals from the top right corner to the bottom left one, each downwards to the right."""

    complete = True

    def tokens(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """See :meth:`ScanPath.tokens`."""
        row, column = _grid(height, width, device)
        return _sorted_by((row - column + width - 1) * height + row)


@dataclass(frozen=True)
class AntiDiagonal(ScanPath):
    """Anti-diagonals from the top left corner to the bottom right one, each downwards to the left."""

    complete = True

    def tokens(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """See :meth:`ScanPath.tokens`."""
        row, column = _grid(height, width, device)
        return _sorted_by((row + column) * height + row)


@dataclass(frozen=True)
class Windowed(ScanPath):
    """Window by window in row order, row by row inside each window (LocalMamba's local scan).

    Windows at the right and bottom border are cut, never padded.

    Args:
        size: Side of the square window in tokens, at least 1.

    Raises:
        ValueError: If ``size`` is smaller than 1.
    """

    complete = True
    size: int = 7

    def __post_init__(self) -> None:
        _check_integers(size=self.size)
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")

    def tokens(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """See :meth:`ScanPath.tokens`."""
        row, column = _grid(height, width, device)
        size = self.size
        window = (row // size) * ((width + size - 1) // size) + column // size
        return _sorted_by(window * (size * size) + (row % size) * size + column % size)


@dataclass(frozen=True)
class SkipSampled(ScanPath):
    """Every ``step``-th token of every ``step``-th row (EfficientVMamba's atrous scan).

    The map counts as padded at the bottom and the right to a multiple of ``step``. Padding tokens
    are visited too: they carry no input, yet the state decays at them.

    Args:
        row: First row, 0 to ``step`` - 1.
        column: First column, 0 to ``step`` - 1.
        step: Distance between sampled rows and columns, at least 1.

    Raises:
        ValueError: If a field is outside its range.
    """

    row: int = 0
    column: int = 0
    step: int = 2

    def __post_init__(self) -> None:
        _check_integers(row=self.row, column=self.column, step=self.step)
        if self.step < 1:
            raise ValueError(f"step must be at least 1, got {self.step}")
        for name, value in (("row", self.row), ("column", self.column)):
            if not 0 <= value < self.step:
                raise ValueError(f"{name} must lie in 0..{self.step - 1} (step - 1), got {value}")

    def tokens(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """See :meth:`ScanPath.tokens`."""
        step = self.step
        row, column = _grid((height + step - 1) // step, (width + step - 1) // step, device)
        row, column = row * step + self.row, column * step + self.column
        return torch.where((row < height) & (column < width), row * width + column, -1)


@dataclass(frozen=True)
class Transposed(ScanPath):
    """A path with rows and columns exchanged: ``Transposed(Rows())`` goes column by column."""

    path: ScanPath

    @property
    def complete(self) -> bool:  # type: ignore[override]
        """See :attr:`ScanPath.complete`."""
        return self.path.complete

    def tokens(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """See :meth:`ScanPath.tokens`."""
        tokens = self.path.tokens(width, height, device)
        column = torch.div(tokens, height, rounding_mode="floor")
        return torch.where(tokens >= 0, (tokens - column * height) * width + column, -1)


@dataclass(frozen=True)
class Reversed(ScanPath):
    """A path walked from its end to its beginning."""

    path: ScanPath

    @property
    def complete(self) -> bool:  # type: ignore[override]
        """See :attr:`ScanPath.complete`."""
        return self.path.complete

    def tokens(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """See :meth:`ScanPath.tokens`."""
        return self.path.tokens(height, width, device).flip(0)


@dataclass(frozen=True)
class Shifted(ScanPath):
    """A path whose outputs are written one step later: the shift form of a quasi-separable scan.

    Step ``t`` writes to the token that step ``t + 1`` reads; the last output is dropped.
    """

    path: ScanPath

    def tokens(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """See :meth:`ScanPath.tokens`."""
        return self.path.tokens(height, width, device)

    def steps(self, height: int, width: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`ScanPath.steps`."""
        tokens = self.tokens(height, width, device)
        return tokens, torch.cat([tokens[1:], tokens.new_full((1,), -1)])


ROWS = Rows()
COLUMNS = Transposed(ROWS)

CROSS_SCAN: tuple[ScanPath, ...] = (ROWS, COLUMNS, Reversed(ROWS), Reversed(COLUMNS))
"""VMamba's four routes, in its order."""

ATROUS_SCAN: tuple[ScanPath, ...] = (
    SkipSampled(0, 0),
    Transposed(SkipSampled(0, 1)),
    SkipSampled(0, 1),
    Transposed(SkipSampled(1, 1)),
)
"""EfficientVMamba's four skip-sampled quarter grids, in its order."""


@dataclass(frozen=True, eq=False)
class Routes:
    """The token indices of K routes with T steps each.

    Args:
        read: Token that each step reads, (K, T) integers in -1..tokens - 1. A step at -1 visits a padding
            token: its input is zero and the state decays.
        write: Token to which each step's output is added, (K, T); -1 drops the output. ``None``: as ``read``.
        tokens: Number of tokens the indices refer to.
        complete: Whether every route reads and writes every token. Used only while tracing, where indices have no
            values; otherwise it is computed from them.

    Raises:
        TypeError: If an index tensor is not an integer tensor.
        ValueError: If shapes or devices differ, an index is out of range, or a route names a token twice.
            Checked once, here, and not while tracing.
    """

    read: Tensor
    write: Tensor
    tokens: int
    complete: bool

    def __init__(self, read: Tensor, write: Tensor | None = None, *, tokens: int, complete: bool = False) -> None:
        write = read if write is None else write
        for name, index in (("read", read), ("write", write)):
            if not isinstance(index, Tensor):
                raise TypeError(f"{name} must be an integer tensor, got {type(index).__name__}")
            if index.dtype not in (torch.int32, torch.int64, torch.int16, torch.int8):
                raise TypeError(f"{name} must be a signed integer tensor, got {index.dtype}")
            if index.dim() != 2:
                raise ValueError(f"{name} must have shape (routes, steps), got {tuple(index.shape)}")
        if read.shape != write.shape:
            raise ValueError(
                f"read and write must have the same shape, got {tuple(read.shape)} and {tuple(write.shape)}"
            )
        if read.device != write.device:
            raise ValueError(f"read and write must be on one device, got {read.device} and {write.device}")
        if _holds_values(read):
            if not isinstance(tokens, int):
                raise TypeError(f"tokens must be an integer, got {tokens!r}")
            _check_values("read", read, tokens)
            if write is not read:
                _check_values("write", write, tokens)
            # No token is named twice, so those that are named can be counted.
            complete = all(bool(((index >= 0).sum(1) == tokens).all()) for index in (read, write))
        read32 = read.to(torch.int32).contiguous()
        object.__setattr__(self, "read", read32)
        object.__setattr__(self, "write", read32 if write is read else write.to(torch.int32).contiguous())
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "complete", complete)

    def __len__(self) -> int:
        return self.read.shape[0]

    def to(self, device: torch.device | str) -> Routes:
        """Return the same routes with their indices on ``device``."""
        moved = object.__new__(Routes)
        read = self.read.to(device)
        object.__setattr__(moved, "read", read)
        object.__setattr__(moved, "write", read if self.write is self.read else self.write.to(device))
        object.__setattr__(moved, "tokens", self.tokens)
        object.__setattr__(moved, "complete", self.complete)
        return moved


def as_paths(paths: Sequence[ScanPath]) -> tuple[ScanPath, ...]:
    """Return ``paths`` as a tuple.

    Raises:
        TypeError: If ``paths`` is not a sequence of paths.
        ValueError: If ``paths`` is empty.
    """
    if not isinstance(paths, Sequence):
        raise TypeError(f"paths must be a sequence of paths such as (ROWS, COLUMNS), got {paths!r}")
    for i, path in enumerate(paths):
        if not isinstance(path, ScanPath):
            raise TypeError(f"paths[{i}] must be a path such as ROWS or Windowed(7), got {path!r}")
    if not paths:
        raise ValueError("paths must name at least one route, got none")
    return tuple(paths)


def build_routes(
    paths: Sequence[ScanPath], height: int, width: int, device: torch.device | str | None = None
) -> Routes:
    """Return the indices of ``paths`` on a (height, width) map.

    The most recently used results are cached by value, except while tracing (torch.compile, torch.export, fake
    tensors), where the arithmetic becomes part of the graph and sizes may be symbolic.

    Raises:
        TypeError: If ``paths`` is not a sequence of paths, or a size is not an integer.
        ValueError: If the paths differ in their number of steps, or the map is empty.
    """
    device = torch.device(device) if device is not None else torch.device("cpu")
    if torch.compiler.is_compiling():
        return _build(as_paths(paths), height, width, device)
    if type(height) is not int or type(width) is not int:
        height, width = _size("height", height), _size("width", width)
    symbolic = not (type(height) is int and type(width) is int)
    if symbolic or _get_current_dispatch_mode() is not None:
        return _build(as_paths(paths), height, width, device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = (tuple(paths) if isinstance(paths, Sequence) else paths, height, width, device)
    try:
        found, fixed = _cache.get(key), True
    except TypeError:  # attributes that may change: built again at each call
        found, fixed = None, False
    if found is not None:
        return found
    # Tensors born in inference mode could never take part in training later, nor could any of a function transform.
    with torch.inference_mode(False), torch._C._DisableFuncTorch():
        routes = _build(as_paths(paths), height, width, torch.device("cpu")).to(device)
    return _cache.put(key, routes) if fixed else routes


def _size(name: str, value: Any) -> Any:
    if isinstance(value, torch.SymInt) or (isinstance(value, Tensor) and torch.jit.is_tracing()):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _state(path: ScanPath, fixed: bool = False) -> tuple[Any, ...]:
    """Return all attributes, in slots too, as pickle finds them; if ``fixed``, none that could change or hide another.

    Raises:
        TypeError: If one is not ``fixed``.
    """
    slots = copyreg._slotnames(type(path))  # type: ignore[attr-defined]
    found = vars(path) | {name: getattr(path, name) for name in slots if hasattr(path, name)}
    if fixed and not all(issubclass(base, ScanPath) or base is object for base in type(path).__mro__):
        raise TypeError(f"unhashable path: {type(path).__name__} has other base classes than paths")
    return tuple((name, _typed(name, found[name], fixed)) for name in sorted(found))


def _typed(name: str, value: Any, fixed: bool) -> Any:
    """Return a value with its type: 1, 1.0 and True are equal, but not as sizes."""
    if isinstance(value, ScanPath):
        return value
    if type(value) is tuple:
        return tuple([_typed(name, part, fixed) for part in value])
    if fixed and type(value) not in (int, float, bool, str, bytes, type(None)):
        raise TypeError(f"unhashable path: its {name} is of type {type(value).__name__}")
    return type(value), value


class _Cache:
    """A thread-safe cache of the most recently used routes, at most ``limit`` bytes of them."""

    OVERHEAD = 4096  # bytes, more than an entry takes beside its indices

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._routes: OrderedDict[Hashable, Routes] = OrderedDict()
        self._lock = RLock()  # a path's own comparison may build routes

    def get(self, key: Hashable) -> Routes | None:
        with self._lock:
            if (found := self._routes.get(key)) is not None:
                self._routes.move_to_end(key)
            return found

    def put(self, key: Hashable, routes: Routes) -> Routes:
        """Store routes unless they alone exceed the limit; return them, or those another thread stored first."""
        if (size := self._size(routes)) > self.limit:
            return routes
        with self._lock:
            if key in self._routes:
                return self._routes[key]
            self._routes[key] = routes
            self.held += size
            while self.held > self.limit:
                self.held -= self._size(self._routes.popitem(last=False)[1])
        return routes

    def _size(self, routes: Routes) -> int:
        return self.OVERHEAD + sum(t.nbytes for t in {id(t): t for t in (routes.read, routes.write)}.values())


_cache = _Cache(64 * 2**20)


def _build(paths: Sequence[ScanPath], height: int, width: int, device: torch.device) -> Routes:
    if type(height) is int and type(width) is int and (height < 1 or width < 1):
        raise ValueError(f"height and width must be at least 1, got {height} and {width}")
    steps = [path.steps(height, width, device) for path in paths]
    for path, pair in zip(paths, steps, strict=True):
        for index in pair:
            if not isinstance(index, Tensor) or index.dim() != 1 or index.is_floating_point():
                found = f"{tuple(index.shape)} {index.dtype}" if isinstance(index, Tensor) else type(index).__name__
                raise TypeError(f"tokens of {path!r} must be an integer tensor of one dimension, got {found}")
    if not torch.compiler.is_compiling():
        lengths = [len(read) for read, _ in steps]
        if len(set(lengths)) > 1:
            raise ValueError(f"paths must have the same number of steps, got {lengths} on a {height}x{width} map")
    read = torch.stack([read for read, _ in steps])
    write = None
    if not all(step_read is step_write for step_read, step_write in steps):
        write = torch.stack([write for _, write in steps])
    return Routes(read, write, tokens=height * width, complete=all(path.complete for path in paths))


def _holds_values(index: Tensor) -> bool:
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not tracing and type(index) is Tensor and index.device.type != "meta"


def _check_values(name: str, index: Tensor, tokens: int) -> None:
    if index.shape[0] < 1 or index.shape[1] < 1:
        raise ValueError(f"{name} must hold at least one route and one step, got {tuple(index.shape)}")
    if not 0 < tokens <= _INT32_MAX:
        raise ValueError(f"tokens must lie in 1..{_INT32_MAX}, got {tokens}")
    outside = (index < -1) | (index >= tokens)
    if outside.any():
        route, step = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{name}[{route}, {step}] is {int(index[route, step])}; allowed are 0..{tokens - 1}, and -1 for none"
        )
    # Each token at most once per route: gradients then scatter without atomics.
    ordered = index.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        route, step = twice.nonzero()[0].tolist()
        raise ValueError(
            f"{name}[{route}] names token {int(ordered[route, step])} twice; a route may name a token once "
            "(make a two-way path two routes)"
        )


def _grid(height: int, width: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Return row and column of every token in row order, (H * W,) each."""
    # Flat, not broadcast: a broadcast axis would tie an exported graph to sizes above 1.
    token = torch.arange(height * width, device=device)
    row = torch.div(token, width, rounding_mode="floor")
    return row, token - row * width


def _sorted_by(key: Tensor) -> Tensor:
    """Return the tokens in ascending order of their key; keys are distinct."""
    return key.argsort()
