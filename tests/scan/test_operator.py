"""The operator as torch sees it: compile, export, derivatives, counting, autocast, and bad input."""

import copy
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import PATHS, Case
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vision_ssm.scan import (
    CROSS_SCAN,
    Routes,
    available_backends,
    backend_for,
    build_routes,
    last_backend,
    route_scan,
    use_backend,
)
from vision_ssm.scan.operator import _NAMES, scan_flops

VARIETY = [
    Case(),
    Case(states=1, side_by_side=True),
    Case(rank=0, shared=True, bias=False, skip=False, inclusive=False),
    Case(paths="atrous"),
    Case(chosen=2, weighted=True),
]


class Scanner(nn.Module):
    """A scan over maps of any size, (B, H, W, 8)."""

    def __init__(self, paths=CROSS_SCAN, states=2, rank=3):
        super().__init__()
        torch.manual_seed(0)
        self.paths, K = paths, len(paths)
        self.project = nn.Linear(8, K * (rank + 2 * states))
        self.A_log = nn.Parameter(torch.rand(K, 8, states))
        self.dt_weight = nn.Parameter(torch.randn(K, rank, 8))
        self.dt_bias = nn.Parameter(torch.randn(K, 8))
        self.D = nn.Parameter(torch.randn(K, 8))

    def forward(self, x):
        height, width = x.shape[1:3]
        tokens = x.flatten(1, 2)
        dbc = self.project(tokens).unflatten(-1, (len(self.paths), -1))
        routes = build_routes(self.paths, height, width, x.device)
        parameters = dict(dt_weight=self.dt_weight, dt_bias=self.dt_bias, D=self.D)
        return route_scan(tokens, dbc, -self.A_log.exp(), routes, **parameters).unflatten(1, (height, width))


def flat(call):
    values = dict(call.tensors, read=call.routes.read, write=call.routes.write, **call.switches)
    return [values.get(name) for name in _NAMES]


@pytest.mark.parametrize("case", VARIETY, ids=str)
def test_opcheck(case):
    values = flat(case.make(torch.float32))
    leaves = [v.requires_grad_() if isinstance(v, torch.Tensor) and v.dtype == torch.float32 else v for v in values]
    torch.library.opcheck(torch.ops.vision_ssm.route_scan.default, (*leaves, False, True))
    y = torch.randn_like(leaves[0])
    plain = [v.detach() if isinstance(v, torch.Tensor) else v for v in leaves]
    torch.library.opcheck(torch.ops.vision_ssm.route_scan_backward.default, (y.detach(), None, *plain, ""))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch._inductor.config.patch(force_disable_caches=True)
def test_compile_forward_and_backward(backend, monkeypatch):
    monkeypatch.setenv("CI", "true")  # inductor is stricter there
    model = Scanner()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for shape in [(2, 4, 5, 8), (1, 7, 3, 8), (3, 5, 9, 8)]:
        x = torch.randn(shape, requires_grad=True)
        leaves = [x, *model.parameters()]
        expected, found = model(x), compiled(x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found.square().sum(), leaves),
            torch.autograd.grad(expected.square().sum(), leaves),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.fixture(scope="module")
def exported():
    size = torch.export.Dim.DYNAMIC
    return torch.export.export(
        Scanner(PATHS["atrous"]), (torch.randn(2, 4, 6, 8),), dynamic_shapes=[(size,) * 3 + (8,)]
    )


SIZES = [(1, 5, 3, 8), (3, 2, 9, 8), (2, 13, 9, 8), (2, 2, 3, 8)]  # below, at and beyond the length of a chunk


def test_export_with_dynamic_batch_and_sizes(exported):
    model = Scanner(PATHS["atrous"])
    for shape in SIZES:
        x = torch.randn(shape)
        torch.testing.assert_close(exported.module()(x), model(x))


def test_decomposes_into_standard_operators_and_scans(exported):
    table = torch._decomp.get_decompositions([torch.ops.vision_ssm.route_scan.default])
    program = exported.run_decompositions(table)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not any("vision_ssm" in target for target in targets)
    assert sum("ScanOp" in target or target == "scan" for target in targets) == 3
    for shape in SIZES:
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), Scanner(PATHS["atrous"])(x), rtol=1e-4, atol=1e-5)


def test_onnx_runtime_with_dynamic_sizes(exported, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    program = torch.onnx.export(exported, dynamo=True, verbose=False)
    program.save(tmp_path / "scan.onnx")
    assert [node.op_type for node in program.model_proto.graph.node].count("Scan") == 3
    session = runtime.InferenceSession(tmp_path / "scan.onnx")
    for shape in SIZES:
        x = torch.randn(shape)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), Scanner(PATHS["atrous"])(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", VARIETY, ids=str)
def test_decomposition_equals_the_operator(case):
    call = replace(case, height=8, width=13).make()  # several chunks
    decomposition = torch._decomp.decomposition_table[torch.ops.vision_ssm.route_scan.default]
    torch.testing.assert_close(decomposition(*flat(call), False, True), call.run())


@pytest.mark.parametrize("case", VARIETY, ids=str)
def test_second_derivatives(case):
    call = case.make()
    small = {n: t[:, :, :1] if n in ("dbc", "delta") else t for n, t in call.tensors.items()} if case.shared else {}
    call = type(call)(call.routes, call.tensors | small, call.switches)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in call.differentiable.items()}

    def run(*values):
        return type(call)(call.routes, call.tensors | dict(zip(leaves, values, strict=True)), call.switches).run()

    assert torch.autograd.gradgradcheck(run, list(leaves.values()), fast_mode=True)


def test_second_derivative_counts_each_argument_once():
    # dbc is computed from x: the path through it must not be counted twice
    x = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    A, delta = -torch.rand(1, 4, 1, dtype=torch.float64), torch.rand(1, 6, 1, 4, dtype=torch.float64)
    routes = build_routes(PATHS["one"], 2, 3)

    def f(x):
        return route_scan(x, x[:, :, None, :2].tanh(), A, routes, delta=delta)

    assert torch.autograd.gradcheck(f, (x,))
    assert torch.autograd.gradgradcheck(f, (x,))


def test_backward_on_the_reference_is_its_own():
    call = Case().make()
    with use_backend("reference"):
        expected = call.gradients()[2]
        assert last_backend() == "reference"
    found = call.gradients()[2]
    assert last_backend() == backend_for("cpu", torch.float64) == "portable"
    torch.testing.assert_close(found, expected)


def test_counting_flops():
    case = Case(height=6, width=4, rank=3, states=2)
    call = case.make(torch.float32)
    expected = 2 * 4 * 24 * 6 * (2 * 3 + 9 * 2 + 1)
    assert scan_flops(2, 4, 24, 6, 2, 3, skip=True) == expected
    with FlopCounterMode(display=False) as counter:
        call.run()
    assert counter.get_total_flops() == expected
    with FlopCounterMode(display=False) as counter:
        call.gradients()
    assert counter.get_total_flops() == 3 * expected
    with FlopCounterMode(display=False) as counter:
        Case(chosen=1, rank=0, skip=False).make(torch.float32).run()
    assert counter.get_total_flops() == 2 * 1 * 15 * 6 * 9 * 2


@pytest.mark.parametrize("backend", available_backends())
def test_autocast_changes_nothing_inside(backend):
    # Inputs keep their dtype, parameters stay float32, and so does everything inside.
    call = Case(rank=3).make(torch.bfloat16)
    with use_backend(backend):
        expected = call.gradients()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = call.gradients()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_float_output_is_not_rounded():
    call = Case().make(torch.bfloat16)
    rounded, exact = call.run()[0], call.run(float_output=True)[0]
    assert (rounded.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(exact.bfloat16(), rounded)
    assert not torch.equal(exact, rounded.float())


def test_choosing_a_backend(monkeypatch):
    assert backend_for("cpu") == "cpu"  # the package's tests want a compiler
    assert backend_for("cpu", torch.float64) == backend_for("meta") == "portable"
    monkeypatch.setenv("VISION_SSM_BACKEND", "reference")
    assert backend_for("cpu") == "reference"
    with use_backend("portable"):
        assert backend_for("cpu") == "portable"
    Case().make().run()
    assert last_backend() == "reference"
    with use_backend("cpu"):  # gives way where it cannot run
        assert backend_for("cpu", torch.float64) == backend_for("cuda") == "portable"
    monkeypatch.setenv("VISION_SSM_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"VISION_SSM_BACKEND is 'fastest'; allowed are 'reference', 'portable'"):
        Case().make().run()
    with pytest.raises(ValueError, match=r"'quick'; allowed are"), use_backend("quick"):
        pass


def test_models_copy_and_pickle():
    model = Scanner(PATHS["oblique"])
    x = torch.randn(1, 3, 4, 8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


ORDER = """
import torch
from test_operator import Scanner

model = Scanner()
size = torch.export.Dim.DYNAMIC
torch.export.export(model, (torch.randn(2, 4, 6, 8),), dynamic_shapes=[(size,) * 3 + (8,)])

from vision_ssm.layers import SS2D
layer = SS2D(8)
x = torch.randn(2, 4, 6, 8)
traced = torch.fx.symbolic_trace(layer)
assert torch.equal(traced(x), layer(x))
with torch.inference_mode():
    model(x)
    layer(x)
for module in (model, layer, traced):
    module(x).sum().backward()
print("fine")
"""


def test_export_fx_inference_then_training_in_one_process():
    # Routes built on the way must neither be fake, nor proxies, nor inference tensors later.
    done = subprocess.run(
        [sys.executable, "-c", ORDER], capture_output=True, text=True, check=False, cwd=__file__.rsplit("/", 1)[0]
    )
    assert done.stdout.strip() == "fine", done.stderr


def _call(**changes):
    tensors = dict(
        x=torch.randn(2, 6, 4),
        dbc=torch.randn(2, 6, 4, 7),
        A=-torch.rand(4, 4, 2),
        dt_weight=torch.randn(4, 3, 4),
        dt_bias=torch.randn(4, 4),
        D=torch.randn(4, 4),
    )
    routes = changes.pop("routes", build_routes(CROSS_SCAN, 2, 3))
    tensors |= changes
    x, dbc, A = tensors.pop("x"), tensors.pop("dbc"), tensors.pop("A")
    return route_scan(x, dbc, A, routes, **tensors)


BAD = {
    "integer x": (dict(x=torch.ones(2, 6, 4, dtype=torch.int64)), TypeError, "x must be float32.*int64"),
    "x is a list": (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
    "half A": (dict(A=-torch.rand(4, 4, 2).half()), TypeError, "A must be torch.float32, got torch.float16"),
    "flat x": (dict(x=torch.randn(2, 24)), ValueError, r"x must have shape \(batch, tokens, channels\), got \(2, 24\)"),
    "tokens": (dict(x=torch.randn(2, 5, 4), dbc=torch.randn(2, 5, 4, 7)), ValueError, "5 tokens.*built for 6"),
    "channels": (dict(A=-torch.rand(4, 3, 2)), ValueError, "A gives 3 channels per route; with 4 channels"),
    "routes of A": (dict(A=-torch.rand(3, 4, 2)), ValueError, r"A must have shape \(4 or 1"),
    "dbc": (dict(dbc=torch.randn(2, 6, 4, 8)), ValueError, r"dbc must have shape \(2, 6, 4 or 1, 7\), got"),
    "dt_weight": (dict(dt_weight=torch.randn(4, 3, 5)), ValueError, r"dt_weight must have shape \(4 or 1, any, 4\)"),
    "dt_bias": (dict(dt_bias=torch.randn(4)), ValueError, r"dt_bias must have shape \(4 or 1, 4\), got \(4,\)"),
    "D": (dict(D=torch.randn(2, 4)), ValueError, r"D must have shape \(4 or 1, 4\), got \(2, 4\)"),
    "both steps": (dict(delta=torch.randn(2, 6, 4, 4)), ValueError, "either dt_weight .* or delta .*got both"),
    "no steps": (dict(dt_weight=None), ValueError, "got neither"),
    "heads": (
        dict(dt_weight=None, delta=torch.randn(2, 6, 4, 3), dbc=torch.randn(2, 6, 4, 4)),
        ValueError,
        "delta must have 4 step sizes per token, .* got 3",
    ),
    "dt_bias of heads": (
        dict(dt_weight=None, delta=torch.randn(2, 6, 4, 2), dbc=torch.randn(2, 6, 4, 4)),
        ValueError,
        r"dt_bias must have shape \(4 or 1, 2\), got \(4, 4\)",
    ),
    "states": (
        dict(A=-torch.rand(4, 4, 1), dbc=torch.randn(2, 6, 4, 8)),
        ValueError,
        r"dbc must have 3 \+ 2 x states features per token, got 8",
    ),
    "route_index range": (dict(route_index=torch.tensor([[0], [4]])), ValueError, r"holds 4; allowed are 0\.\.3"),
    "route_index negative": (dict(route_index=torch.tensor([[0], [-1]])), ValueError, "holds -1"),
    "route_index dtype": (dict(route_index=torch.zeros(2, 1)), TypeError, "route_index must be an int32 or int64"),
    "route_index batch": (dict(route_index=torch.tensor([[0]])), ValueError, r"route_index must have shape \(2, any\)"),
    "route_weight": (dict(route_weight=torch.rand(2, 3)), ValueError, r"route_weight must have shape \(2, 4\)"),
    "other device": (dict(A=-torch.rand(4, 4, 2, device="meta")), ValueError, "A is on meta and x on cpu"),
    "a switch": (dict(inclusive="no"), TypeError, "inclusive must be True or False, got 'no'"),
    "raw indices": (dict(routes=torch.zeros(4, 6)), TypeError, "routes must be vision_ssm.scan.Routes, got Tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        _call(**changes)


def test_choice_needs_routes_with_all_channels():
    case = Case(side_by_side=True).make()
    tensors = case.tensors | dict(route_index=torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="need routes that carry all channels; here each of 4 carries 6 of 24"):
        type(case)(case.routes, tensors, case.switches).run()


# The Triton kernels mask such indices instead, see test_triton.py.
@pytest.mark.parametrize("backend", [name for name in available_backends() if name not in ("reference", "triton")])
@pytest.mark.parametrize("name", ["read", "write"])
@pytest.mark.parametrize("offset", [1000, -1000, 1], ids=["far above", "far below", "one above"])
def test_the_operator_itself_never_reads_out_of_bounds(name, offset, backend):
    # Called past route_scan's checks, an index out of range is an error, not a crash.
    values = dict(zip(_NAMES, flat(Case().make(torch.float32)), strict=True))
    values[name] = values[name] + offset
    if backend == "portable" and offset != 1000:
        pytest.skip("portable takes any negative index for none, and finds only tokens beyond the last image's")
    with use_backend(backend), pytest.raises((IndexError, RuntimeError, ValueError)):
        torch.ops.vision_ssm.route_scan(*values.values(), False, False)


def test_the_operator_itself_checks_shapes():
    values = dict(zip(_NAMES, flat(Case().make(torch.float32)), strict=True))
    for name, part in (("write", values["write"][:, :1]), ("dbc", values["dbc"][:, :, :, :2])):
        with pytest.raises(ValueError, match=name):
            torch.ops.vision_ssm.route_scan(*(values | {name: part}).values(), False, False)


@pytest.mark.parametrize("backend", [name for name in available_backends() if name.startswith("cpu")])
def test_a_route_out_of_range_is_refused_by_the_operator_itself(backend):
    values = dict(zip(_NAMES, flat(Case(chosen=2).make(torch.float32)), strict=True))
    values["route_index"] = values["route_index"] + 3
    with use_backend(backend), pytest.raises(ValueError, match=r"route_index must lie in 0\.\.3"):
        torch.ops.vision_ssm.route_scan(*values.values(), False, False)


def test_routes_object_moves():
    routes = Routes(torch.tensor([[0, 1, -1]]), torch.tensor([[1, -1, 0]]), tokens=2)
    moved = routes.to("meta")
    assert (moved.read.device.type, moved.tokens, len(moved)) == ("meta", 2, 1)
