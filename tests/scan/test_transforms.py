"""Function transforms and forward-mode differentiation, against the definition in float64."""

from dataclasses import replace

import pytest
import torch
from cases import Case
from test_operator import flat
from torch.autograd import forward_ad

from vision_ssm.scan import (
    ROWS,
    backend_for,
    build_routes,
    last_backend,
    route_scan,
    selective_scan_fn,
    use_backend,
)

CASES = [
    Case(),
    Case(states=1, side_by_side=True),
    Case(side_by_side=True, shared=True, rank=0),
    Case(rank=0, shared=True, bias=False, skip=False, inclusive=False),
    Case(paths="atrous", states=3),
    Case(paths="shifted", chosen=1, weighted=True),
    Case(chosen=2, weighted=True),
    Case(chosen=3, rank=0, inclusive=False),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def function(call):
    """Outputs and last state as a function of the differentiable arguments; and these."""
    names = list(call.differentiable)

    def run(*values):
        return replace(call, tensors=call.tensors | dict(zip(names, values, strict=True))).run()

    return run, tuple(call.differentiable.values())


def like(tensors, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors)


def sum_of_squares(run):
    return lambda *values: sum(t.square().sum() for t in run(*values))


def dual(run, values, tangents):
    with forward_ad.dual_level():
        outputs = run(*map(forward_ad.make_dual, values, tangents))
        pairs = [forward_ad.unpack_dual(t) for t in outputs]
        return tuple(p.primal for p in pairs), tuple(p.tangent for p in pairs)


@cases
def test_forward_mode(case):
    run, values = function(case.make())
    tangents = like(values)
    with use_backend("reference"):
        expected = torch.func.jvp(run, values, tangents)
    torch.testing.assert_close(torch.func.jvp(run, values, tangents), expected)
    assert last_backend() == "portable"
    torch.testing.assert_close(dual(run, values, tangents), expected)
    with torch.no_grad():
        torch.testing.assert_close(dual(run, values, tangents), expected)
    leaves = [v.clone().requires_grad_() for v in values]
    torch.testing.assert_close(dual(run, leaves, tangents), expected)


@cases
def test_gradient_per_sample_and_of_an_ensemble(case):
    calls = [case.make(seed=seed) for seed in range(3)]
    run = sum_of_squares(function(calls[0])[0])
    arguments = [function(call)[1] for call in calls]
    stacked = tuple(map(torch.stack, zip(*arguments, strict=True)))
    gradient = torch.func.grad(run, tuple(range(len(stacked))))
    with use_backend("reference"):
        leaves = [[v.clone().requires_grad_() for v in values] for values in arguments]
        grads = [torch.autograd.grad(run(*values), values) for values in leaves]
        outputs = [run(*values).detach() for values in leaves]
    torch.testing.assert_close(torch.vmap(gradient)(*stacked), tuple(map(torch.stack, zip(*grads, strict=True))))
    torch.testing.assert_close(torch.vmap(run)(*stacked), torch.stack(outputs))
    # one argument alone, along another axis
    found = torch.vmap(lambda x: run(x, *arguments[0][1:]), in_dims=1)(stacked[0].movedim(0, 1))
    torch.testing.assert_close(found, torch.stack([run(x, *arguments[0][1:]) for x in stacked[0]]))


@cases
def test_mapped_backward(case):
    run, values = function(case.make())
    leaves = [v.clone().requires_grad_() for v in values]
    outputs = run(*leaves)
    weights = [like(outputs, seed) for seed in range(3)]
    stacked = tuple(map(torch.stack, zip(*weights, strict=True)))
    expected = [torch.autograd.grad(outputs, leaves, w, retain_graph=True) for w in weights]
    expected = tuple(map(torch.stack, zip(*expected, strict=True)))

    def pull(*w, **options):
        return torch.autograd.grad(outputs, leaves, w, retain_graph=True, **options)

    for create in (False, True):
        found = pull(*stacked, is_grads_batched=True, create_graph=create)
        torch.testing.assert_close(tuple(t.detach() for t in found), expected)
    torch.testing.assert_close(torch.vmap(pull)(*stacked), expected)


@pytest.mark.parametrize(
    "case",
    [Case(batch=1, height=1, width=3, channels=1), Case(height=1, width=2, channels=1, chosen=2, weighted=True)],
    ids=str,
)
def test_second_derivatives(case):
    run, values = function(case.make())
    f, which = sum_of_squares(run), tuple(range(len(values)))
    expected = torch.autograd.functional.hessian(f, values)  # the double backward, tested in test_operator.py
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        for inner in (torch.func.jacfwd, torch.func.jacrev):  # forward over reverse is torch.func.hessian
            torch.testing.assert_close(outer(inner(f, which), which)(*values), expected)
    for strategy in ("reverse-mode", "forward-mode"):
        options = dict(vectorize=True, outer_jacobian_strategy=strategy)
        torch.testing.assert_close(torch.autograd.functional.hessian(f, values, **options), expected)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_jacobian(strategy):
    run, values = function(Case(batch=1, height=2, width=2, channels=2).make())
    found = torch.autograd.functional.jacobian(run, values, vectorize=True, strategy=strategy)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(run, values))


def test_routes_chosen_per_mapped_call():
    call = Case(chosen=2, weighted=True).make()

    def run(index):
        return replace(call, tensors=call.tensors | dict(route_index=index)).run()[0]

    index = call.tensors["route_index"]
    stacked = torch.stack([index, index.flip(1)])
    torch.testing.assert_close(torch.vmap(run)(stacked), torch.stack([run(i) for i in stacked]))
    with pytest.raises(ValueError, match=r"route_index holds [4-6]; allowed are 0\.\.3"):
        torch.vmap(run)(stacked + 3)
    with use_backend("reference"), pytest.raises(NotImplementedError, match="reference backend reads route_index"):
        torch.vmap(run)(stacked)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_the_operator_itself_never_loses_a_tangent(grad):
    call = Case().make(torch.float32)
    _, *others = flat(call)
    x, operator = call.tensors["x"], torch.ops.vision_ssm

    def raw(x):
        return operator.route_scan(x, *others, False, True)

    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        for leaf in (x, x.clone().requires_grad_()):
            dual = forward_ad.make_dual(leaf, x)
            with pytest.raises(NotImplementedError, match=r"forward.mode"):
                raw(dual)
        with pytest.raises(NotImplementedError, match="have no forward-mode derivative; call vision_ssm"):
            operator.route_scan_backward(dual, None, x, *others, "")
        raw(x)  # nothing is lost where nothing is dual
    # Inside torch.func it is what it is made of.
    expected = torch.func.jvp(lambda x: replace(call, tensors=call.tensors | dict(x=x)).run(), (x,), (x,))
    torch.testing.assert_close(torch.func.jvp(raw, (x,), (x,)), expected)
    with pytest.raises(NotImplementedError, match=r"cannot run inside a transform of torch\.func"):
        torch.func.jvp(lambda g: operator.route_scan_backward(g, None, x, *others, ""), (x,), (x,))


def test_tangents_pass_through_graphs_made_outside_the_level():
    run, values = function(Case().make())
    leaves = [v.clone().requires_grad_() for v in values]
    outputs = run(*leaves)
    once = torch.autograd.grad(sum_of_squares(run)(*leaves), leaves, create_graph=True)
    for results in (outputs, once):  # backward and double backward are linear in what they are given
        weights = like(results)
        expected = torch.autograd.grad(results, leaves, weights, retain_graph=True)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(torch.zeros_like(w), w) for w in weights]
            found = torch.autograd.grad(results, leaves, duals, retain_graph=True)
            torch.testing.assert_close(tuple(forward_ad.unpack_dual(t).tangent for t in found), expected)


def test_routes_built_inside_a_transform_serve_outside():
    def f(x):
        routes = build_routes((ROWS,), 1, 11)
        return route_scan(x, x[:, :, None, :2], -torch.ones(1, 4, 1), routes, delta=x[:, :, None]).sum()

    x = torch.rand(2, 11, 4)
    torch.func.grad(f)(x)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(build_routes((ROWS,), 1, 11).read)
    with torch.no_grad():
        torch.testing.assert_close(f(x), torch.func.jvp(f, (x,), (x,))[0])
    assert last_backend() == "portable"
    f(x)
    assert last_backend() == backend_for("cpu")


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: torch.vmap(torch.func.grad(f))], ids=["grad", "vmap"])
def test_a_transform_compiles(transform):
    call = Case(batch=2).make(torch.float32)

    def f(x):
        return replace(call, tensors=call.tensors | dict(x=x)).run()[0].square().sum()

    x = call.tensors["x"]
    x = x if transform is torch.func.grad else torch.stack([x, 2 * x])
    found = torch.compile(transform(f), fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, transform(f)(x), rtol=1e-4, atol=1e-4)


def test_selective_scan_fn():
    u, delta, A, B = (torch.rand(shape, dtype=torch.float64) for shape in [(2, 4, 5), (2, 4, 5), (4, 3), (2, 3, 5)])

    def f(u, delta):
        return selective_scan_fn(u, delta, -A, B, B).square().sum()

    assert torch.autograd.gradcheck(f, (u.requires_grad_(), delta.requires_grad_()), check_forward_ad=True)
    expected = torch.autograd.grad(f(u, delta), (u, delta))
    found = torch.vmap(torch.func.grad(f, (0, 1)))(u[None].detach(), delta[None].detach())
    torch.testing.assert_close(tuple(t[0] for t in found), expected)


def test_empty_input():
    def f(x):
        tensors = dict(dbc=x.new_zeros(*x.shape[:2], 1, 4), A=x.new_zeros(1, 4, 2), delta=x[:, :, None])
        return route_scan(x, routes=build_routes((ROWS,), 2, 3), **tensors)

    y, tangent = torch.func.jvp(f, (torch.zeros(0, 6, 4),), (torch.zeros(0, 6, 4),))
    assert y.shape == tangent.shape == (0, 6, 4)
