"""The operator's arguments in one place: shapes, checks, and what every backend derives from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from vision_ssm.scan.transforms import unwrapped


@dataclass(frozen=True)
class ScanArguments:
    """The tensors and switches of one call of the operator (see :func:`vision_ssm.scan.route_scan`)."""

    x: Tensor  # (B, L, C)
    dbc: Tensor  # (B, L, K or 1, R + 2N)
    A: Tensor  # (K or 1, Dk, N or 1)
    read: Tensor  # (K, T) int32
    write: Tensor  # (K, T) int32
    delta: Tensor | None = None  # (B, L, K or 1, heads)
    dt_weight: Tensor | None = None  # (K or 1, R, Dk)
    dt_bias: Tensor | None = None  # (K or 1, heads)
    D: Tensor | None = None  # (K or 1, Dk)
    route_index: Tensor | None = None  # (B, K') int64
    route_weight: Tensor | None = None  # (B, K')
    softplus: bool = True
    inclusive: bool = True
    complete: bool = False  # every route reads and writes every token

    PER_IMAGE: ClassVar = ("x", "dbc", "delta", "route_index", "route_weight")
    SHARED: ClassVar = ("dt_weight", "dt_bias", "A", "D")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of step sizes, states and sums: float64 for float64 tokens, else float32."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def routes(self) -> int:
        """K, the number of routes in the pool."""
        return self.read.shape[0]

    @property
    def routes_per_image(self) -> int:
        """K', the number of routes each image takes."""
        return self.routes if self.route_index is None else self.route_index.shape[1]

    @property
    def channels_per_route(self) -> int:
        """Dk."""
        return self.A.shape[1]

    @property
    def state_size(self) -> int:
        """N."""
        return (self.dbc.shape[3] - self.rank) // 2

    @property
    def rank(self) -> int:
        """R; 0 for ready-made step sizes."""
        return 0 if self.dt_weight is None else self.dt_weight.shape[1]

    @property
    def heads(self) -> int:
        """Number of step sizes per token and route, each for neighboring channels; Dk with ``dt_weight``."""
        return self.channels_per_route if self.delta is None else self.delta.shape[3]

    @property
    def side_by_side(self) -> bool:
        """Whether every route carries its own slice of the channels."""
        return self.channels_per_route != self.x.shape[2]

    @cached_property
    def signature(self) -> tuple[Any, ...]:
        """Everything but the values: two calls of one signature differ in no shape, dtype, device or switch."""
        tensors = [self.x, self.dbc, self.A, self.read, self.write, self.delta, self.dt_weight, self.dt_bias, self.D]
        tensors += [self.route_index, self.route_weight]
        shapes = tuple([None if t is None else (t.shape, t.dtype, t.device) for t in tensors])
        return (*shapes, self.softplus, self.inclusive, self.complete)

    def images(self, group: slice) -> ScanArguments:
        """Return the same call for some of the images."""
        parts: dict[str, Any] = {
            name: None if (tensor := getattr(self, name)) is None else tensor[group] for name in self.PER_IMAGE
        }
        return replace(self, **parts)


_checked: set[tuple[Any, ...]] = set()


def check_arguments(args: ScanArguments) -> None:
    """Check shapes, dtypes and devices.

    Raises:
        TypeError: If a tensor has a dtype that is not allowed.
        ValueError: If a shape does not fit, naming the argument, what it is and what is allowed.
    """
    if type(args.x) is not Tensor or torch.compiler.is_compiling():  # sizes may be symbolic
        _check_arguments(args)
    elif (signature := args.signature) not in _checked:
        _check_arguments(args)
        if len(_checked) >= 4096:
            _checked.clear()
        _checked.add(signature)


def _check_arguments(args: ScanArguments) -> None:
    x, dbc, A = args.x, args.dbc, args.A
    if args.write is not args.read and args.read.shape != args.write.shape:
        raise ValueError(f"read and write must have one shape, got {tuple(args.read.shape)}, {tuple(args.write.shape)}")
    _check_float("x", x)
    _check_float("dbc", dbc)
    if args.delta is not None:
        _check_float("delta", args.delta)
    for name in (*args.SHARED, "route_weight"):
        parameter = getattr(args, name)
        if parameter is not None and parameter.dtype not in (torch.float32, args.dtype):
            raise TypeError(f"{name} must be {' or '.join({'torch.float32', str(args.dtype)})}, got {parameter.dtype}")
    for name in (*args.PER_IMAGE, *args.SHARED, "read", "write"):
        tensor = getattr(args, name)
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; all arguments must be on one device")

    if x.dim() != 3:
        raise ValueError(f"x must have shape (batch, tokens, channels), got {tuple(x.shape)}")
    batch, tokens, channels = x.shape
    routes = args.routes
    if A.dim() != 3 or A.shape[0] not in (1, routes) or A.shape[2] < 1:
        raise ValueError(f"A must have shape ({routes} or 1, channels per route, states), got {tuple(A.shape)}")
    width = args.channels_per_route
    if width != channels and routes * width != channels:
        raise ValueError(
            f"A gives {width} channels per route; with {channels} channels in x and {routes} routes it must be "
            f"{channels} (every route carries all) or {channels}/{routes} (side by side)"
        )
    if (args.dt_weight is None) == (args.delta is None):
        both = "both" if args.delta is not None else "neither"
        raise ValueError(f"give either dt_weight (low-rank step sizes in dbc) or delta (ready-made ones), got {both}")
    if args.dt_weight is not None:
        _check_shape("dt_weight", args.dt_weight, ((routes, 1), None, (width,)))
    if args.delta is not None:
        _check_shape("delta", args.delta, ((batch,), (tokens,), (routes, 1), None))
        if args.heads != width and (args.heads < 1 or width % args.heads):
            raise ValueError(
                f"delta must have {width} step sizes per token, one per channel of a route, or one per head of equally "
                f"many channels, got {args.heads}"
            )
    features = args.rank + 2 * A.shape[2]
    _check_shape("dbc", dbc, ((batch,), (tokens,), (routes, 1), (features,) if A.shape[2] > 1 else None))
    if A.shape[2] == 1 and (dbc.shape[3] < features or (dbc.shape[3] - args.rank) % 2):
        raise ValueError(f"dbc must have {args.rank} + 2 x states features per token, got {dbc.shape[3]}")
    if args.dt_bias is not None:
        _check_shape("dt_bias", args.dt_bias, ((routes, 1), (args.heads,)))
    if args.D is not None:
        _check_shape("D", args.D, ((routes, 1), (width,)))
    if args.route_index is not None:
        if args.route_index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"route_index must be an int32 or int64 tensor, got {args.route_index.dtype}")
        _check_shape("route_index", args.route_index, ((batch,), None))
        if args.route_index.shape[1] < 1:
            raise ValueError("route_index must choose at least one route per image, got none")
    if args.route_weight is not None:
        _check_shape("route_weight", args.route_weight, ((batch,), (args.routes_per_image,)))
    if (args.route_index is not None or args.route_weight is not None) and args.side_by_side:
        raise ValueError(
            f"route_index and route_weight need routes that carry all channels; here each of {routes} carries "
            f"{width} of {channels}"
        )


def check_values(args: ScanArguments) -> None:
    """Check the values of ``route_index`` (not on a GPU: it would synchronize).

    Raises:
        ValueError: If a route is out of range.
    """
    index = args.route_index
    if index is None or index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = unwrapped(index).aminmax()
    for value in (int(low), int(high)):
        if not 0 <= value < args.routes:
            raise ValueError(f"route_index holds {value}; allowed are 0..{args.routes - 1}")


def _check_float(name: str, tensor: Tensor) -> None:
    allowed = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def _check_shape(name: str, tensor: Tensor, allowed: tuple[tuple[int, ...] | None, ...]) -> None:
    fits = tensor.dim() == len(allowed) and all(
        sizes is None or any(size == n for n in sizes) for size, sizes in zip(tensor.shape, allowed, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if n is None else " or ".join(str(v) for v in dict.fromkeys(n)) for n in allowed)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}")
