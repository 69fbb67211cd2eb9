"""Function transforms and forward-mode differentiation, against the definition in float64."""

from dataclasses import replace

import pytest
import torch
from cases import Case
from test_operator import flat
from torch.autograd import forward_ad

from vision_ssm.scan import CROSS_SCAN, build_routes, last_backend, route_scan, use_backend

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
    "case", [Case(height=2, width=2, channels=2), Case(height=1, width=3, channels=2, chosen=2, weighted=True)], ids=str
)
def test_second_derivatives(case):
    run, values = function(case.make())
    f = sum_of_squares(run)
    which = tuple(range(len(values)))
    expected = torch.autograd.functional.hessian(f, values)  # the double backward, tested in test_operator.py
    torch.testing.assert_close(torch.func.hessian(f, which)(*values), expected)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(f, which), which)(*values), expected)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacfwd(f, which), which)(*values), expected)
    torch.testing.assert_close(torch.func.jacfwd(torch.func.jacfwd(f, which), which)(*values), expected)
    torch.testing.assert_close(torch.autograd.functional.hessian(f, values, vectorize=True), expected)
    forward = dict(vectorize=True, outer_jacobian_strategy="forward-mode")
    torch.testing.assert_close(torch.autograd.functional.hessian(f, values, **forward), expected)
    tangents = like(values)
    of_gradient = torch.func.jvp(torch.func.grad(f, which), values, tangents)[1]
    contracted = tuple(
        sum((h.flatten(a.dim()) @ t.flatten()) for h, t in zip(row, tangents, strict=True))
        for a, row in zip(values, expected, strict=True)
    )
    torch.testing.assert_close(of_gradient, contracted)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_jacobian(strategy):
    run, values = function(Case(height=2, width=3, channels=2).make())
    expected = torch.autograd.functional.jacobian(run, values)
    torch.testing.assert_close(
        torch.autograd.functional.jacobian(run, values, vectorize=True, strategy=strategy), expected
    )
