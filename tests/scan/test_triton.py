"""What is particular to the Triton kernels: how calls are split, bad indices, compiling without a GPU, warming up."""

import csv
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from cases import Case
from compare import TOLERANCE, assert_equal_to_reference, device, error

import vision_ssm
from vision_ssm.scan import ROWS, backend_for, build_routes, route_scan, triton, use_backend
from vision_ssm.scan.arguments import ScanArguments
from vision_ssm.scan.backends import BACKENDS
from vision_ssm.scan.triton import tiles
from vision_ssm.scan.triton.tiles import BACKWARD, CANDIDATES, FORWARD

ROOT = Path(__file__).parents[2]
needs_kernels = pytest.mark.skipif(not triton.available(), reason="no Triton here, or no GPU")


def arguments(call):
    routes = dict(read=call.routes.read, write=call.routes.write, complete=call.routes.complete)
    return ScanArguments(**routes, **call.tensors, **call.switches)


@pytest.fixture
def many_processors(monkeypatch):
    """A GPU so large that every call is split as far as possible."""
    monkeypatch.setattr(triton, "processors", lambda device: 1000)


SPLIT = [
    Case(batch=1, height=7, width=11, states=1),
    Case(batch=1, height=7, width=11, states=3, rank=0, inclusive=False),
    Case(batch=1, height=6, width=7, side_by_side=True, channels=5),
    Case(batch=2, height=6, width=7, chosen=2, weighted=True),
    Case(paths="atrous", batch=1, height=13, width=15, shared=True),
    Case(paths="shifted", batch=1, height=12, width=12, shared=True, rank=0, skip=False),
]


@needs_kernels
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_sequences_split_into_chunks(case, many_processors):
    call = case.make(torch.float32)
    assert triton.make_plan(arguments(call), FORWARD).chunks > 1
    assert_equal_to_reference(call, "triton", torch.float32)


@needs_kernels
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=7, height=2, width=3, states=1),
        Case(batch=9, height=1, width=1, states=2),
        Case(batch=5, height=2, width=2, side_by_side=True, rank=0, inclusive=False),
    ],
    ids=str,
)
def test_short_routes_share_a_program(case):
    call = case.make(torch.float32)
    plan = triton.make_plan(arguments(call), FORWARD)
    assert plan.images > 1
    assert_equal_to_reference(call, "triton", torch.float32)


@needs_kernels
def test_routes_are_added_in_one_program_or_in_many(monkeypatch):
    call = Case(batch=4, height=5, width=4).make(torch.float32)
    results = []
    for number, parts in ((0, 1), (1, 2), (1000, 4)):
        monkeypatch.setattr(triton, "processors", lambda device, number=number: number)
        assert triton.make_plan(arguments(call), FORWARD).parts == parts
        assert_equal_to_reference(call, "triton", torch.float32)
        with use_backend("triton"):
            results.append(call.on(device("triton")).run()[0])
    assert all(error(results[0], other.cpu()) < 1e-6 for other in results[1:])


@needs_kernels
@pytest.mark.parametrize(("number", "dtype"), [(0, torch.float32), (1, torch.bfloat16), (1000, torch.float16)], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_complete_routes_need_no_cleared_memory(dtype, number, shared, monkeypatch):
    call = Case(batch=4, height=5, width=4, channels=17, states=1, shared=shared).make(dtype)
    assert call.routes.complete
    monkeypatch.setattr(triton, "processors", lambda device: number)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # makes torch.empty hold NaN
    try:
        assert_equal_to_reference(call, "triton", dtype)
    finally:
        torch.use_deterministic_algorithms(False)


@needs_kernels
def test_indices_out_of_range_are_masked():
    call = Case(batch=2, height=3, width=4, chosen=2, weighted=True).make(torch.float32)
    args = arguments(call.on(device("triton")))
    outside = torch.tensor([12, 10**6, -7], dtype=torch.int32)
    read, write = args.read.clone(), args.write.clone()
    read[0, :3], write[1, :3] = outside.to(read), outside.to(read)
    index = args.route_index.clone()
    index[1, 0] = 99
    expected = replace(args, read=read.where(read.abs() < 12, -1), write=write.where(write.abs() < 12, -1))
    y, _ = triton.forward(replace(args, read=read, write=write, route_index=index), torch.float32)
    first, _ = triton.forward(expected, torch.float32)
    assert torch.equal(y[0], first[0])
    # The route that is not there adds nothing.
    second, _ = triton.forward(
        replace(expected, route_index=args.route_index[:, 1:], route_weight=args.route_weight[:, 1:]), torch.float32
    )
    assert error(y[1], second[1].cpu()) < 1e-6
    grads = triton.backward(replace(args, read=read, write=write, route_index=index), torch.ones_like(y), None)
    assert all(grad.isfinite().all() for grad in grads.values())


@needs_kernels
def test_rows_numbered_in_64_bits(monkeypatch):
    call = Case(batch=2, height=3, width=4, rank=0).make(torch.float32)
    constants = triton._constants
    monkeypatch.setattr(triton, "_constants", lambda *given: constants(*given) | {"WIDE": True})
    assert_equal_to_reference(call, "triton", torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])  # the latter with CUDA graphs
def test_compiled_models(mode):
    model = timm.create_model("vmamba_atto", num_classes=5).eval().cuda()
    images = torch.randn(2, 3, 32, 32, device="cuda")
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):  # the third call replays a graph
        with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
            assert error(compiled(images), model(images).cpu()) < TOLERANCE[torch.bfloat16]


@needs_kernels
def test_small_step_sizes_keep_their_digits():
    # softplus(-20) = 2.06e-9, far below the spacing of float32 numbers at 1
    raw = torch.linspace(-20, 20, 64).view(1, 64, 1, 1).expand(1, 64, 1, 4).contiguous().to(device("triton"))
    x, dbc = torch.ones_like(raw[..., 0, :]), torch.ones(1, 64, 1, 2, device=raw.device)
    A = torch.full((1, 4, 1), -1e30, device=raw.device)  # no memory: each output is delta x
    with use_backend("triton"):
        y = route_scan(x, dbc, A, build_routes((ROWS,), 1, 64, raw.device), delta=raw)
    expected = torch.nn.functional.softplus(raw[0, :, 0].double(), threshold=100)
    assert ((y[0].double() - expected) / expected).abs().max() < 2e-6


def test_missing_triton_is_said_once(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # where only the GPU is missing, there is nothing to say
        backend_for("cuda")
    monkeypatch.setattr(triton, "load_kernels", lambda: None)
    triton.warn_of_fallback.cache_clear()
    with pytest.warns(RuntimeWarning, match="Triton is not installed"):
        assert backend_for("cuda") == "portable"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend_for("cuda") == "portable"
        assert backend_for("mps") == "portable"
        assert backend_for("xpu") == "portable"
    with pytest.raises(ValueError, match="'triton'; allowed are 'reference', 'portable'"), use_backend("triton"):
        pass


def test_a_gpu_uses_triton_but_for_float64(monkeypatch):
    monkeypatch.setitem(BACKENDS, "triton", replace(BACKENDS["triton"], available=lambda: True))
    assert backend_for("cuda") == "triton"
    assert backend_for("cuda", torch.bfloat16) == "triton"
    assert backend_for("cuda", torch.float64) == "portable"


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_model(dtype):
    model = timm.create_model("vmamba_atto", num_classes=5, depths=(1, 1), dims=(16, 32)).eval()
    model = model.to(device("triton"), dtype)
    images = torch.randn(2, 3, 16, 16).to(device("triton"), dtype)

    def run(backend):
        with use_backend(backend):
            logits = model(images)
            return logits.detach(), torch.autograd.grad(logits.float().square().sum(), list(model.parameters()))

    (expected, expected_grads), (found, grads) = run("portable"), run("triton")
    assert error(found, expected.cpu()) < TOLERANCE[dtype]
    # In bfloat16, rounding differs at every layer.
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert all(error(f, e.cpu(), least=0.1) < tolerance for f, e in zip(grads, expected_grads, strict=True))


def test_warming_up_leaves_a_model_as_it_was():
    model = timm.create_model("group_mamba_atto", num_classes=3).train()
    model.stages[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    vision_ssm.warmup(model, [32, (32, 48)], batch=2, training=True)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("sizes", [[], 0, [32, -1], [(32, 32, 32)], [3.5], "32", None, 32.0, True], ids=str)
def test_warming_up_refuses(sizes):
    with pytest.raises(ValueError, match="sizes must be positive"):
        vision_ssm.warmup(timm.create_model("vmamba_atto"), sizes)


@pytest.mark.parametrize("batch", [0, 2.5, "2", True], ids=str)
def test_warming_up_refuses_a_batch(batch):
    with pytest.raises(ValueError, match="batch must be an integer of at least 1"):
        vision_ssm.warmup(timm.create_model("vmamba_atto"), 32, batch=batch)
    with pytest.raises(ValueError, match="no parameters"):
        vision_ssm.warmup(torch.nn.Identity(), 32)


@needs_kernels
def test_a_rate_of_minus_infinity_leaves_no_nan():
    call = Case(batch=1, height=5, width=7, states=1).make(torch.float32)
    args = arguments(call.on(device("triton")))
    y, state = triton.forward(replace(args, A=torch.full_like(args.A, -torch.inf)), torch.float32)
    assert y.isfinite().all()
    assert state.isfinite().all()
    _, state = triton.forward(replace(args, A=torch.full_like(args.A, torch.nan)), torch.float32)
    assert state.isnan().all()


@needs_kernels
@pytest.mark.parametrize("kind", CANDIDATES)
def test_every_candidate_gives_the_same(kind, monkeypatch):
    call = Case(batch=1, height=5, width=7, channels=18, states=1).make(torch.float32)
    for tile in CANDIDATES[kind]:
        monkeypatch.setattr(triton, "choose", lambda kind, args, default, run, tile=tile: tile)
        assert_equal_to_reference(call, "triton", torch.float32)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache; calling it is like a new process."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    tiles._known.cache_clear()
    yield tiles._known.cache_clear
    tiles._known.cache_clear()


@pytest.fixture
def timed(monkeypatch):
    """The tiles that were timed; the third of each kind is the fastest."""
    seen = []

    def milliseconds(step, device):
        seen.append(step.args[0])
        return 1.0 if seen[-1] in (CANDIDATES["forward"][2], CANDIDATES["backward"][2]) else 2.0

    monkeypatch.setattr(tiles, "_milliseconds", milliseconds)
    return seen


@pytest.fixture
def used(monkeypatch):
    """The tiles of all calls."""
    seen, make_plan = [], triton.make_plan
    monkeypatch.setattr(triton, "make_plan", lambda args, tile: seen.append(tile) or make_plan(args, tile))
    return seen


def small_model():
    return timm.create_model("vmamba_atto", num_classes=5, depths=(1,), dims=(16,)).to(device("triton"))


@needs_kernels
def test_tuning_keeps_the_fastest_tile_for_later_processes(cache, timed, used, tmp_path):
    fastest = [CANDIDATES["forward"][2], CANDIDATES["backward"][2]]
    with use_backend("triton"):
        model = small_model()
        vision_ssm.warmup(model, 16, training=True)
        assert not timed
        assert used == [FORWARD, BACKWARD]
        vision_ssm.warmup(model, 16, training=True, tune=True)
        assert timed == [*CANDIDATES["forward"], *CANDIDATES["backward"]]
        for _ in range(2):
            used.clear()
            vision_ssm.warmup(model, 16, training=True)
            assert used == fastest
            cache()
        tiles._write(tiles._gpu(torch.device(device("triton"))), {"another process's": FORWARD})
        vision_ssm.warmup(model, 16, training=True, tune=True)
        assert len(timed) == sum(map(len, CANDIDATES.values()))  # asked once
        (kept,) = tmp_path.glob("cache/*/tiles.json")
        assert len(json.loads(kept.read_text())) == 3
        used.clear()
        vision_ssm.warmup(model, 8)  # another kind of call
        assert used == [FORWARD]


@needs_kernels
@pytest.mark.parametrize("content", ["[1, 2]", '{"forward": 3}', "{"], ids=["list", "number", "cut"])
def test_what_tuning_kept_may_be_damaged(content, cache, timed, used, tmp_path):
    with use_backend("triton"):
        model = small_model()
        vision_ssm.warmup(model, 16, tune=True)
        (kept,) = tmp_path.glob("cache/*/tiles.json")
        kept.write_text(content)
        cache()
        used.clear()
        vision_ssm.warmup(model, 16)
        assert used == [FORWARD]
        vision_ssm.warmup(model, 16, tune=True)
        assert len(json.loads(kept.read_text())) == 1


@needs_kernels
def test_tuning_without_a_place_to_keep_it(cache, timed, used, tmp_path, caplog):
    (tmp_path / "cache").write_text("not a folder")
    with use_backend("triton"):
        model = small_model()
        vision_ssm.warmup(model, 16, tune=True)
        used.clear()
        vision_ssm.warmup(model, 16)
    assert used == [CANDIDATES["forward"][2]]
    assert "only this process uses them" in caplog.text


@needs_kernels
@pytest.mark.parametrize("fitting", [[], [CANDIDATES["forward"][1]]], ids=["none fits", "one fits"])
def test_tiles_that_do_not_fit_are_left_out(fitting, cache, used, monkeypatch, tmp_path):
    def milliseconds(step, device):
        if step.args[0] not in fitting:
            raise torch.OutOfMemoryError
        return 1.0

    monkeypatch.setattr(tiles, "_milliseconds", milliseconds)
    with use_backend("triton"):
        vision_ssm.warmup(small_model(), 16, tune=True)
    assert used == (fitting or [FORWARD])
    assert len(list(tmp_path.glob("cache/*/tiles.json"))) == len(fitting)  # a default is not kept as an answer


def test_kernels_compile_without_a_gpu_and_spill_nothing():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "benchmarks" / "triton_resources.py", "--quick", "--targets", "sm_90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "Triton is not installed" in done.stderr:
        pytest.skip("Triton is not installed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "backward" in done.stdout


def test_the_table_of_resources_has_no_spills():
    with open(ROOT / "benchmarks" / "triton_resources.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    kernels = {"forward", "summary", "summary (forward)", "chain", "chain (reverse)", "backward"}
    assert {row["kernel"] for row in rows} == kernels
    assert all(int(row["states"]) > 16 or row["spilled_bytes"] == "0" for row in rows)


@needs_kernels
def test_the_table_of_resources_is_of_the_tiles_in_use(cache, used, monkeypatch):
    with open(ROOT / "benchmarks" / "triton_resources.csv") as file:
        rows = list(csv.DictReader(file))
    kinds = {(row["states"], row["rank"], row["kernel"]): (row["tile"], row["warps"]) for row in rows}
    monkeypatch.setattr(triton, "_launch", lambda *args, **options: None)
    monkeypatch.setattr(triton, "_chain", lambda *args, **options: None)
    for states, rank in {(row["states"], row["rank"]) for row in rows}:
        args = arguments(Case(batch=1, channels=16, states=int(states), rank=int(rank)).make(torch.bfloat16))
        triton.forward(args, torch.bfloat16)
        triton.backward(args, torch.zeros_like(args.x), None)
        for kernel, tile in zip(("forward", "backward"), used[-2:], strict=True):
            assert kinds[states, rank, kernel] == (f"{tile.Q}x{tile.S}x{tile.C}", str(tile.warps))


@pytest.mark.skipif(not triton.interpreted(), reason="the script measures for minutes on a GPU")
def test_the_gpu_benchmark_runs_through(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--quick", "--csv", tmp_path / "gpu.csv"]
    done = subprocess.run([*command, "--only", "operator", "kinds", "tiles"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(tmp_path / "gpu.csv") as file:
        assert {row["table"] for row in csv.DictReader(file)} == {"operator", "kinds", "tiles", "aims"}


def test_the_gpu_benchmark_says_that_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA device, so nothing was measured" in done.stderr
    assert "Traceback" not in done.stderr
