"""``route_scan`` as one ``torch.library`` operator, so that compile, export and FLOP counting see it."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vision_ssm.scan import export_form, portable
from vision_ssm.scan.arguments import ScanArguments, check_arguments, check_values
from vision_ssm.scan.backends import BACKENDS, backend_for, select
from vision_ssm.scan.routes import Routes
from vision_ssm.scan.transforms import forward_mode, has_tangent, transformed, unobserved

_ARGUMENTS = (
    "Tensor x, Tensor dbc, Tensor A, Tensor read, Tensor write, Tensor? delta, Tensor? dt_weight, "
    "Tensor? dt_bias, Tensor? D, Tensor? route_index, Tensor? route_weight, "
    "bool softplus, bool inclusive, bool complete"
)
_DIFFERENTIABLE = ("x", "dbc", "A", "delta", "dt_weight", "dt_bias", "D", "route_weight")
_NAMES = tuple(part.split()[-1] for part in _ARGUMENTS.split(", "))

_library = torch.library.Library("vision_ssm", "DEF")
_library.define(f"route_scan({_ARGUMENTS}, bool float_output, bool return_state) -> (Tensor, Tensor)")
# One gradient per differentiable argument, empty where it was not given: a list could not be mapped over, as
# `is_grads_batched=True` does.
_library.define(
    f"route_scan_backward(Tensor grad_y, Tensor? grad_state, {_ARGUMENTS}, str backend) "
    f"-> ({', '.join(['Tensor'] * len(_DIFFERENTIABLE))})"
)


def route_scan(
    x: Tensor,
    dbc: Tensor,
    A: Tensor,
    routes: Routes,
    *,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    delta: Tensor | None = None,
    D: Tensor | None = None,
    softplus: bool = True,
    inclusive: bool = True,
    route_index: Tensor | None = None,
    route_weight: Tensor | None = None,
    float_output: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run selective scans (S6) along routes through a map of tokens and add up their outputs.

    Along route ``k``, with ``x_t`` the token that step ``t`` reads::

        h_t = exp(delta_t A) h_(t-1) + delta_t B_t x_t        y_t = C_t h_t + D x_t

    Sizes: B images, L tokens, C channels, K routes of T steps, N states, R the rank of the step size. Every route
    carries ``Dk`` channels: all C (outputs of the routes add up), or C / K, route ``k`` the ``k``-th slice (outputs
    stand side by side). Where a size reads "K or 1", 1 means shared by all routes.

    Args:
        x: Tokens, (B, L, C); float32, bfloat16, float16, or float64.
        dbc: Step size in low rank, B and C per token, (B, L, K or 1, R + 2N), in this order; with a
            ready-made ``delta``, B and C alone, (B, L, K or 1, 2N).
        A: Decay rates, negative, (K or 1, Dk, N), float32; (K or 1, Dk, 1): all states decay alike.
        routes: Which token each step reads and writes; see :func:`build_routes`.
        dt_weight: Projects the low-rank step sizes, (K or 1, R, Dk), float32.
        dt_bias: Added to the step sizes before the softplus, also at padding tokens, (K or 1, Dk), float32.
        delta: Ready-made step sizes instead of ``dt_weight``, (B, L, K or 1, Dk); or one for every head, Dk / H
            neighboring channels, (B, L, K or 1, H), with ``dt_bias`` (K or 1, H).
        D: Skip connection, (K or 1, Dk), float32.
        softplus: Whether the step sizes pass through a softplus.
        inclusive: If false, ``y_t = C_t exp(delta_t A) h_(t-1)``: a step does not see its own input
            (``D`` aside).
        route_index: Which K' of the K routes each image takes, (B, K') integers.
        route_weight: Weight of each of these routes' outputs, (B, K'), float32.
        float_output: Return the outputs in float32 instead of rounding them to ``x.dtype``.
        return_last_state: Also return the states after the last step.

    Returns:
        Outputs, (B, L, C) in ``x.dtype``. With ``return_last_state`` also the states in float32, (B, K', Dk, N),
        unweighted. Step sizes, states and sums are float32 (float64 for float64 tokens) whatever the input, also
        under autocast.

    Raises:
        TypeError: If an argument is not a floating-point tensor of an allowed dtype.
        ValueError: If shapes, devices or indices do not fit.
    """
    if not isinstance(routes, Routes):
        raise TypeError(f"routes must be vision_ssm.scan.Routes, got {type(routes).__name__}; see build_routes")
    tensors: dict[str, Any] = dict(delta=delta, dt_weight=dt_weight, dt_bias=dt_bias, D=D)
    tensors |= dict(route_index=route_index, route_weight=route_weight)
    for name, value in dict(x=x, dbc=dbc, A=A, **tensors).items():
        if not isinstance(value, Tensor) and (value is not None or name in ("x", "dbc", "A")):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    switches: dict[str, Any] = dict(softplus=softplus, inclusive=inclusive)
    for name, switch in dict(**switches, float_output=float_output, return_last_state=return_last_state).items():
        if not isinstance(switch, bool):
            raise TypeError(f"{name} must be True or False, got {switch!r}")
    args = ScanArguments(x, dbc, A, routes.read, routes.write, **tensors, **switches, complete=routes.complete)
    check_arguments(args)
    if x.shape[1] != routes.tokens:
        raise ValueError(f"x has {x.shape[1]} tokens, but the routes were built for {routes.tokens}")
    if not torch.compiler.is_compiling():
        check_values(args)
        if transformed() or backend_for(x.device, x.dtype) == "reference":
            y, state = _run_plain(args, float_output, return_last_state)
            return (y, state) if return_last_state else y
        # Saves 0.1 ms in torch's dispatcher; a profiler has to see the operator.
        if x.device.type == "cpu" and unobserved(x) and not torch.autograd._profiler_enabled():
            y, state = _run(args, float_output, return_last_state)
            return (y, state) if return_last_state else y
    y, state = torch.ops.vision_ssm.route_scan(*(getattr(args, n) for n in _NAMES), float_output, return_last_state)
    return (y, state) if return_last_state else y


def _run_plain(args: ScanArguments, float_output: bool, return_state: bool) -> tuple[Tensor, Tensor]:
    """Run a backend made of torch's operators, each of which torch sees and differentiates."""
    if args.x.numel() == 0:
        y, state = _empty_results(args, float_output, return_state)
        return y.zero_(), state.zero_()
    with torch.autocast(args.x.device.type, enabled=False):
        y, state = select(args.x).forward(args, _output_dtype(args, float_output))
    return y, state if return_state else state.new_empty(0)


def _output_dtype(args: ScanArguments, float_output: bool) -> torch.dtype:
    return args.dtype if float_output else args.x.dtype


def _forward(*values: Any) -> tuple[Tensor, Tensor]:
    *given, float_output, return_state = values
    _refuse_tangents(given)
    return _run(ScanArguments(**dict(zip(_NAMES, given, strict=True))), float_output, return_state)


def _transformed_forward(*values: Any) -> tuple[Tensor, Tensor]:
    *given, float_output, return_state = values
    args = ScanArguments(**dict(zip(_NAMES, given, strict=True)))
    check_arguments(args)
    if not torch.compiler.is_compiling():
        check_values(args)
    return _run_plain(args, float_output, return_state)


def _transformed_backward(*values: Any) -> tuple[Tensor, ...]:
    raise NotImplementedError(
        "torch.ops.vision_ssm.route_scan_backward cannot run inside a transform of torch.func; "
        "differentiate vision_ssm.scan.route_scan instead"
    )


def _refuse_tangents(values: list[Any]) -> None:
    # Here, below autograd, a tangent would be dropped silently.
    if forward_mode() and any(isinstance(value, Tensor) and has_tangent(value) for value in values):
        raise NotImplementedError(
            "the operators torch.ops.vision_ssm.* have no forward-mode derivative; call vision_ssm.scan.route_scan, "
            "which has one"
        )


def _run(args: ScanArguments, float_output: bool, return_state: bool) -> tuple[Tensor, Tensor]:
    check_arguments(args)  # again: the operator can be called by itself
    if args.x.numel() == 0:
        y, state = _empty_results(args, float_output, return_state)
        return y.zero_(), state.zero_()
    backend, dtype = select(args.x), _output_dtype(args, float_output)
    if backend.compiled is not None:
        y, state = backend.run_forward(args, dtype)
    else:
        # Autocast would round the step sizes' projection; the operator decides its own precision.
        with torch.no_grad(), torch.autocast(args.x.device.type, enabled=False):
            y, state = backend.run_forward(args, dtype)
    state = state.clone(memory_format=torch.contiguous_format) if return_state else state.new_empty(0)
    return y.contiguous(), state


def _fake(*values: Any) -> tuple[Tensor, Tensor]:
    # Where the variable CI is set, inductor refuses to call an operator that has a decomposition, unless listed here.
    if allowed := getattr(sys.modules.get("torch._inductor.lowering"), "FALLBACK_ALLOW_LIST", None):
        allowed.add("vision_ssm::route_scan")
    *given, float_output, return_state = values
    return _empty_results(ScanArguments(**dict(zip(_NAMES, given, strict=True))), float_output, return_state)


def _empty_results(args: ScanArguments, float_output: bool, return_state: bool) -> tuple[Tensor, Tensor]:
    x = args.x
    y = x.new_empty(x.shape, dtype=_output_dtype(args, float_output))
    shape = (x.shape[0], args.routes_per_image, args.channels_per_route, args.state_size) if return_state else (0,)
    return y, x.new_empty(shape, dtype=args.dtype)


def _backward(grad_y: Tensor, grad_state: Tensor | None, *values: Any) -> tuple[Tensor, ...]:
    *given, backend = values
    _refuse_tangents([grad_y, grad_state, *given])
    args = ScanArguments(**dict(zip(_NAMES, given, strict=True)))
    check_arguments(args)
    if args.x.numel() == 0:
        return tuple(grad.zero_() for grad in _backward_fake(grad_y, grad_state, *values))
    with torch.no_grad(), torch.autocast(args.x.device.type, enabled=False):
        chosen = BACKENDS[backend] if backend else select(args.x)
        found = chosen.run_backward(args, grad_y, grad_state)
    return tuple(found[name].contiguous() if name in found else grad_y.new_empty(0) for name in _DIFFERENTIABLE)


def _backward_fake(grad_y: Tensor, grad_state: Tensor | None, *values: Any) -> tuple[Tensor, ...]:
    args = ScanArguments(**dict(zip(_NAMES, values[:-1], strict=True)))
    given = (getattr(args, name) for name in _DIFFERENTIABLE)
    return tuple(grad_y.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in given)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *given, _, ctx.return_state = inputs
    given_by_name = dict(zip(_NAMES, given, strict=True))
    ctx.switches = {name: value for name, value in given_by_name.items() if isinstance(value, bool)}
    ctx.save_for_backward(*(value for value in given if not isinstance(value, bool)))
    # The backward pass may run on another thread, where the override of this one is not seen.
    ctx.backend = "" if torch.compiler.is_compiling() else select(given_by_name["x"]).name


def _autograd(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    names = [name for name in _NAMES if name not in ctx.switches]
    args = ScanArguments(**dict(zip(names, ctx.saved_tensors, strict=True)), **ctx.switches)
    state = grad_state if ctx.return_state else None
    if (torch.is_grad_enabled() or transformed()) and not torch.compiler.is_compiling() and args.x.numel() > 0:
        found = _differentiable_gradients(args, grad_y, state)
    else:
        values = [getattr(args, name) for name in _NAMES]
        grads = torch.ops.vision_ssm.route_scan_backward(grad_y, state, *values, ctx.backend)
        found = {
            name: grad for name, grad in zip(_DIFFERENTIABLE, grads, strict=True) if getattr(args, name) is not None
        }
    return (*(found.get(name) for name in _NAMES), None, None)


def _differentiable_gradients(args: ScanArguments, grad_y: Tensor, grad_state: Tensor | None) -> dict[str, Tensor]:
    """Return gradients that can be differentiated again, through the portable form."""
    given = ((name, getattr(args, name)) for name in _DIFFERENTIABLE)
    again = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(args.x.device.type, enabled=False):
        # Fresh views: one argument may have been computed from another, which must not count here.
        views = {name: tensor.view_as(tensor) for name, tensor in given if tensor is not None and tensor.requires_grad}
        y, state = portable.scan(replace(args, **views), args.dtype)
        outputs, grads = [y], [grad_y.to(y.dtype)]
        if grad_state is not None:
            outputs, grads = [y, state], [*grads, grad_state]
        found = torch.autograd.grad(outputs, list(views.values()), grads, create_graph=again, allow_unused=True)
    return {name: grad for name, grad in zip(views, found, strict=True) if grad is not None}


def _decomposition(*values: Any) -> tuple[Tensor, Tensor]:
    *given, float_output, return_state = values
    args = ScanArguments(**dict(zip(_NAMES, given, strict=True)))
    # Else the check of a permuted tensor's layout would ask whether there is one image, and fix the answer.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        y, state = export_form.scan(args)
    return y.to(_output_dtype(args, float_output)), state if return_state else state.new_empty(0)


def scan_flops(batch: int, routes: int, steps: int, width: int, states: int, rank: int, skip: bool) -> int:
    """Return the operations of a forward pass: 2 T Dk R + 9 T Dk N + T Dk per image and route."""
    return batch * routes * steps * width * (2 * rank + 9 * states + int(skip))


def scan_sizes(*shapes: Any) -> dict[str, Any]:
    """Return the arguments of :func:`scan_flops` from the shapes of the operator's arguments."""
    of = dict(zip(_NAMES, shapes, strict=False))  # its last two arguments are not tensors
    rank = 0 if of["dt_weight"] is None else of["dt_weight"][1]
    return dict(
        batch=of["x"][0],
        routes=of["read"][0] if of["route_index"] is None else of["route_index"][1],
        steps=of["read"][1],
        width=of["A"][1],
        states=(of["dbc"][3] - rank) // 2,
        rank=rank,
        skip=of["D"] is not None,
    )


def _flops(*shapes: Any, **_: Any) -> int:
    return scan_flops(**scan_sizes(*shapes))


def _backward_flops(grad_y: Any, grad_state: Any, *values: Any, **_: Any) -> int:
    return 2 * _flops(*values)  # as for a matrix product: one such pass per factor; recomputation is not counted


torch.library.impl("vision_ssm::route_scan", "CompositeExplicitAutograd", _forward, lib=_library)
torch.library.impl("vision_ssm::route_scan_backward", "CompositeExplicitAutograd", _backward, lib=_library)
# The outermost key of torch.func's transforms: they see plain operators, with all the rules those have.
torch.library.impl("vision_ssm::route_scan", "FuncTorchDynamicLayerFrontMode", _transformed_forward, lib=_library)
torch.library.impl(
    "vision_ssm::route_scan_backward", "FuncTorchDynamicLayerFrontMode", _transformed_backward, lib=_library
)
torch.library.register_fake("vision_ssm::route_scan", _fake, lib=_library)
torch.library.register_fake("vision_ssm::route_scan_backward", _backward_fake, lib=_library)
torch.library.register_autograd("vision_ssm::route_scan", _autograd, setup_context=_setup_context, lib=_library)
torch._decomp.register_decomposition(torch.ops.vision_ssm.route_scan.default)(_decomposition)
# Where it has a decomposition and sizes are symbolic, torch would trace that one in place of the fake kernel.
torch._decomp.register_decomposition(torch.ops.vision_ssm.route_scan.default, type="meta")(_fake)
register_flop_formula(torch.ops.vision_ssm.route_scan)(_flops)
register_flop_formula(torch.ops.vision_ssm.route_scan_backward)(_backward_flops)
