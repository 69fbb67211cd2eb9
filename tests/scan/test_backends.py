"""Every backend against the reference: outputs, states and every gradient."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import CASES, PATHS, Case
from compare import assert_equal_to_reference, device, error, exact, interpreted
from hypothesis import given, settings
from hypothesis import strategies as st

from vision_ssm.scan import available_backends, build_routes, last_backend, route_scan, use_backend

# "cpu" is the best of the instruction sets that follow it by name.
FAST = [name for name in available_backends() if name not in ("reference", "cpu")]


def strided(call):
    """The same call with tensors that are not contiguous."""
    tensors = {
        name: tensor.transpose(0, -1).contiguous().transpose(0, -1) for name, tensor in call.differentiable.items()
    }
    return replace(call, tensors=call.tensors | tensors)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case, backend):
    assert_equal_to_reference(case.make(), backend, exact(backend))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [Case(), Case(states=16, rank=0, batch=1, width=3), Case(chosen=2, weighted=True), Case(side_by_side=True)],
    ids=str,
)
def test_precisions(case, dtype, backend):
    assert_equal_to_reference(case.make(), backend, dtype)


@pytest.mark.parametrize("backend", [backend for backend in FAST if backend != "triton"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_size(backend, data):
    check_any_size(backend, data)


@settings(max_examples=6, deadline=None)  # its interpreter takes seconds for each
@given(data=st.data())
def test_any_size_triton(data):
    check_any_size("triton", data)


def check_any_size(backend, data):
    side_by_side = data.draw(st.booleans())
    case = Case(
        paths=data.draw(st.sampled_from(sorted(PATHS))),
        batch=data.draw(st.integers(1, 3)),
        height=data.draw(st.integers(1, 6)),
        width=data.draw(st.integers(1, 6)),
        channels=data.draw(st.integers(1, 9)),
        states=data.draw(st.integers(1, 5)),
        rank=data.draw(st.integers(0, 4)),
        side_by_side=side_by_side,
        shared=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
        skip=data.draw(st.booleans()),
        inclusive=data.draw(st.booleans()),
        chosen=0 if side_by_side else data.draw(st.integers(0, 1)),
        weighted=not side_by_side and data.draw(st.booleans()),
    )
    dtype = data.draw(st.sampled_from([exact(backend), torch.float32, torch.bfloat16, torch.float16]))
    call = case.make(seed=data.draw(st.integers(0, 99)))
    assert_equal_to_reference(strided(call) if data.draw(st.booleans()) else call, backend, dtype)


@pytest.mark.parametrize("backend", FAST)
def test_noncontiguous_inputs(backend):
    call = strided(Case().make())
    assert not call.tensors["x"].is_contiguous()
    assert_equal_to_reference(call, backend, exact(backend))


@pytest.mark.parametrize("backend", FAST)
def test_uninitialized_memory_is_never_read(backend, monkeypatch):
    call = Case(paths="atrous", states=3).make(exact(backend)).on(device(backend))
    with use_backend(backend):
        y, state, grads = call.gradients()
        torch.use_deterministic_algorithms(True)  # makes torch.empty hold NaN
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        try:
            again = call.gradients()
        finally:
            torch.use_deterministic_algorithms(False)
    assert torch.equal(y, again[0])
    assert torch.equal(state, again[1])
    assert all(torch.equal(grad, again[2][name]) for name, grad in grads.items())


@pytest.mark.parametrize("backend", FAST)
def test_long_routes_match_the_definition(backend):
    # 65,536 tokens (256 if interpreted) in float32 against a float64 recurrence of one channel and state, step by step
    torch.manual_seed(0)
    length = 16 if interpreted(backend) else 256
    tokens, channels = length**2, 3
    x, delta = torch.randn(1, tokens, channels), 0.3 * torch.rand(1, tokens, 1, channels)
    dbc, A = torch.randn(1, tokens, 1, 2), -torch.rand(1, channels, 1) - 0.01
    with use_backend(backend):
        routes = build_routes(PATHS["one"], length, length, device(backend))
        given = (tensor.to(device(backend)) for tensor in (x, dbc, A))
        y = route_scan(*given, routes, delta=delta.to(device(backend)), softplus=False)
    decay = torch.exp(delta[0, :, 0].double() * A[0, :, 0].double()).numpy()
    drive = (delta[0, :, 0].double() * x[0].double() * dbc[0, :, 0, :1].double()).numpy()
    h, states = 0.0, []
    for a, b in zip(decay, drive, strict=True):
        h = a * h + b
        states.append(h)
    expected = torch.from_numpy(np.stack(states)) * dbc[0, :, 0, 1:].double()
    assert error(y[0], expected) < 1e-6


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("step", "rate"), [(1e4, -1e4), (1e-30, -1e-30), (80.0, -1e-6), (0.0, -1.0), (1e3, -1.0)], ids=str
)
def test_extreme_step_sizes_and_rates_stay_finite(step, rate, backend):
    torch.manual_seed(0)
    length = 16 if interpreted(backend) else 64
    options = dict(requires_grad=True, device=device(backend))
    x = torch.randn(1, length**2, 4, **options)
    delta = torch.full((1, length**2, 1, 4), step, **options)
    dbc = torch.randn(1, length**2, 1, 4, **options)
    A = torch.full((1, 4, 2), rate, **options)
    with use_backend(backend):
        routes = build_routes(PATHS["cross"], length, length, device(backend))
        y = route_scan(x, dbc, A, routes, delta=delta, softplus=False)
        y.mean().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(t.grad).all() for t in (x, delta, dbc, A))


@pytest.mark.parametrize("backend", FAST)
def test_same_result_from_run_to_run(backend):
    sizes = dict(height=3, channels=5, states=2) if interpreted(backend) else dict(height=17, channels=40, states=4)
    call = Case(batch=3, width=13, **sizes).make(torch.float32).on(device(backend))
    with use_backend(backend):
        first, second = call.gradients(), call.gradients()
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(grad, second[2][name]) for name, grad in first[2].items())


@pytest.mark.parametrize("backend", FAST)
def test_two_threads_at_once(backend):
    if interpreted(backend):
        pytest.skip("Triton's interpreter takes one thread at a time")
    calls = [Case(height=9, width=8 + i, states=1 + i).make(torch.float32, seed=i) for i in range(2)]
    calls = [call.on(device(backend)) for call in calls]
    expected = [call.gradients() for call in calls]
    found: list = [None, None]

    def work(i):
        with use_backend(backend):
            for _ in range(10):
                found[i] = calls[i].gradients()
            assert last_backend() == backend

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for (y, state, grads), (found_y, found_state, found_grads) in zip(expected, found, strict=True):
        assert error(found_y, y.cpu()) < 1e-6
        assert error(found_state, state.cpu()) < 1e-6
        assert all(error(found_grads[name], grad.cpu()) < 1e-6 for name, grad in grads.items())


@pytest.mark.parametrize("backend", FAST)
def test_images_do_not_see_each_other(backend):
    # Also when there are so many that they are processed in several groups.
    length, channels, states = (2, 5, 2) if interpreted(backend) else (16, 32, 16)
    call = Case(batch=9, height=length, width=length, channels=channels, states=states).make(torch.float32)
    call = call.on(device(backend))
    with use_backend(backend):
        y, state, grads = call.gradients()
        alone = {n: t[4:5] if n in ("x", "dbc") else t for n, t in call.tensors.items()}
        y4, state4 = type(call)(call.routes, alone, call.switches).run()
    assert error(y[4:5], y4.cpu()) < 1e-6
    assert error(state[4:5], state4.cpu()) < 1e-6
    assert all(torch.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)], ids=["no images", "no channels"])
def test_empty_inputs(shape):
    batch, channels = shape
    x = torch.zeros(batch, 6, channels, requires_grad=True)
    dbc, A = torch.zeros(batch, 6, 1, 4, requires_grad=True), torch.zeros(1, channels, 2, requires_grad=True)
    delta = torch.zeros(batch, 6, 1, channels)
    y, state = route_scan(x, dbc, A, build_routes(PATHS["cross"], 2, 3), delta=delta, return_last_state=True)
    y.sum().backward()
    assert y.shape == x.shape
    assert state.shape == (batch, 4, channels, 2)
    assert A.grad.shape == A.shape
