"""Random calls of the operator, shared by its tests."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from vision_ssm.scan import (
    ATROUS_SCAN,
    COLUMNS,
    CROSS_SCAN,
    ROWS,
    AntiDiagonal,
    Diagonal,
    Reversed,
    Routes,
    ScanPath,
    Shifted,
    Snake,
    Windowed,
    build_routes,
    route_scan,
)

PATHS: dict[str, tuple[ScanPath, ...]] = {
    "one": (ROWS,),
    "cross": CROSS_SCAN,
    "atrous": ATROUS_SCAN,
    "shifted": (Shifted(COLUMNS), Shifted(Reversed(COLUMNS))),
    "oblique": (Diagonal(), AntiDiagonal(), Snake(), Windowed(2)),
}


@dataclass(frozen=True)
class Case:
    """One kind of call; ``make`` draws its tensors."""

    paths: str = "cross"
    batch: int = 2
    height: int = 3
    width: int = 5
    channels: int = 6  # per route
    states: int = 2
    rank: int = 3  # 0: ready-made step sizes
    heads: int = 0  # of ready-made step sizes; 0: one for every channel
    rates: str = "state"  # what has a decay rate of its own: every channel's state, every channel, or every head
    decay: float = 1.0  # factor of the rates
    side_by_side: bool = False
    shared: bool = False  # one set of parameters and one dbc for all routes
    bias: bool = True
    skip: bool = True
    softplus: bool = True
    inclusive: bool = True
    chosen: int = 0  # routes that each image takes; 0: all
    weighted: bool = False

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(changed) or "default"

    def make(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Call:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, like: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(like)

        routes = build_routes(PATHS[self.paths], self.height, self.width)
        K, Dk, N, R = len(routes), self.channels, self.states, self.rank
        own = 1 if self.shared else K
        tokens = self.height * self.width
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        tensors: dict[str, Tensor | None] = dict(
            x=draw(self.batch, tokens, Dk * K if self.side_by_side else Dk),
            dbc=draw(self.batch, tokens, own, R + 2 * N),
            A=-torch.rand(own, Dk, N, generator=generator, dtype=torch.float64).to(exact) - 0.05,
        )
        heads = self.heads or Dk
        if self.rates != "state":
            of_head = tensors["A"][:, :, :1] if self.rates == "channel" else tensors["A"][:, :heads, :1]
            tensors["A"] = self.decay * of_head.repeat_interleave(Dk // of_head.shape[1], 1)
        if R:
            tensors["dt_weight"] = 0.5 * draw(own, R, Dk, like=exact)
        else:
            # without a softplus, step sizes are positive by themselves
            delta = draw(self.batch, tokens, own, heads)
            tensors["delta"] = delta if self.softplus else delta.abs()
        if self.bias:
            bias = draw(own, heads, like=exact)
            tensors["dt_bias"] = bias if self.softplus else 0.1 * bias.abs()
        if self.skip:
            tensors["D"] = draw(own, Dk, like=exact)
        taken = self.chosen or K
        if self.chosen:
            order = torch.rand(self.batch, K, generator=generator).argsort(1)
            tensors["route_index"] = order[:, : self.chosen].contiguous()
        if self.weighted:
            tensors["route_weight"] = torch.rand(self.batch, taken, generator=generator).to(exact)
        return Call(routes, tensors, dict(softplus=self.softplus, inclusive=self.inclusive))


@dataclass(frozen=True)
class Call:
    """The tensors and switches of one call."""

    routes: Routes
    tensors: dict[str, Tensor | None]
    switches: dict[str, bool]

    @property
    def differentiable(self) -> dict[str, Tensor]:
        return {n: t for n, t in self.tensors.items() if t is not None and t.dtype.is_floating_point}

    def to(self, dtype: torch.dtype) -> Call:
        """The same call in another precision; parameters stay at least float32."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32

        def cast(name: str, tensor: Tensor | None) -> Tensor | None:
            if tensor is None or name == "route_index":
                return tensor
            return tensor.to(dtype if name in ("x", "dbc", "delta") else exact)

        return replace(self, tensors={name: cast(name, tensor) for name, tensor in self.tensors.items()})

    def on(self, device: str) -> Call:
        """The same call on another device."""
        tensors = {name: None if tensor is None else tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, routes=self.routes.to(device), tensors=tensors)

    def run(self, **options: bool) -> tuple[Tensor, Tensor]:
        """Outputs and last state."""
        tensors = dict(self.tensors)
        x, dbc, A = tensors.pop("x"), tensors.pop("dbc"), tensors.pop("A")
        return route_scan(x, dbc, A, self.routes, **tensors, **self.switches, return_last_state=True, **options)

    def gradients(self, seed: int = 1) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Outputs, last state, and the gradient of every argument for random gradients of both."""
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in self.differentiable.items()}
        y, state = replace(self, tensors=self.tensors | leaves).run()
        generator = torch.Generator().manual_seed(seed)
        # Sixteenths are the same numbers in every precision.
        draws = ((t, 16 * torch.randn(t.shape, generator=generator)) for t in (y, state))
        grads = [draw.round().to(t) / 16 for t, draw in draws]
        # A route over padding alone depends on nothing; the last output ties every leaf in, with gradient 0.
        outputs = [(t, g) for t, g in zip((y, state), grads, strict=True) if t.requires_grad]
        outputs.append((sum(leaf.sum() for leaf in leaves.values()), y.new_zeros(())))
        found = torch.autograd.grad([e for e, _ in outputs], list(leaves.values()), [w.to(e.dtype) for e, w in outputs])
        return y.detach(), state.detach(), dict(zip(leaves, found, strict=True))


CASES = [
    Case(),
    Case(paths="one", states=1),
    Case(states=1, rank=1),
    Case(states=1, rank=21),
    Case(states=16, batch=1, width=3),
    Case(side_by_side=True),
    Case(side_by_side=True, channels=87, states=1, rank=6),
    Case(side_by_side=True, shared=True),
    Case(side_by_side=True, shared=True, rank=0),
    Case(shared=True),
    Case(rank=0),
    Case(rank=0, shared=True, softplus=False),
    Case(bias=False, skip=False),
    Case(paths="atrous"),
    Case(paths="atrous", height=1, width=1),
    Case(paths="atrous", rank=0, bias=False),
    Case(paths="shifted", skip=False),
    Case(inclusive=False),
    Case(inclusive=False, skip=False, states=1),
    Case(paths="oblique", height=4, width=3),
    Case(chosen=2),
    Case(chosen=2, weighted=True),
    Case(chosen=3, weighted=True, shared=True, rank=0),
    Case(chosen=2, weighted=True, inclusive=False, paths="oblique"),
    Case(weighted=True),
    Case(height=1, width=1),
    Case(batch=1, height=1, width=7),
    Case(batch=5, channels=1),
    Case(rates="channel"),
    Case(rank=0, heads=3),
    Case(rank=0, heads=2, side_by_side=True, shared=True),
    Case(rank=0, heads=3, rates="head", height=5, width=7),
    Case(rank=0, heads=2, channels=32, rates="channel", height=5, width=7),
    *(
        Case(paths="shifted", rank=0, rates="head", height=5, width=7, **options)  # type: ignore[arg-type]
        for options in (
            dict(channels=160, heads=5, weighted=True),
            dict(channels=160, heads=5, decay=0.1, states=5, inclusive=False),
            dict(channels=48, heads=3, decay=0.1, bias=False, skip=False),
            dict(channels=75, heads=1, decay=0.1, weighted=True),
            dict(channels=64, heads=2, decay=0.1, side_by_side=True, shared=True, states=1),
            dict(channels=64, heads=4, decay=30, softplus=False, chosen=1),
        )
    ),
]
