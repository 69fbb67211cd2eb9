"""What is particular to the C++ backend: threads, building, and what happens without it."""

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import Case

from vision_ssm.scan import ROWS, available_backends, backend_for, build_routes, cpu, route_scan, use_backend
from vision_ssm.scan.arguments import ScanArguments
from vision_ssm.scan.cpu import build, library

LEVELS = [level for level in library.LEVELS if f"cpu-{level}" in available_backends()]


@pytest.fixture
def fresh_library():
    library.load_library.cache_clear()
    yield
    library.load_library.cache_clear()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, height=9, width=7, channels=16, states=1),
        Case(batch=1, height=9, width=7, channels=200, states=3),
        Case(batch=3, height=9, width=7, channels=150, side_by_side=True, shared=True),
        Case(batch=1, height=32, width=32, channels=16, states=1, side_by_side=True, shared=True, rank=0),
        Case(batch=2, chosen=3, weighted=True, channels=87),
        Case(batch=35, channels=70, rank=0, shared=True),
    ],
    ids=str,
)
def test_results_do_not_depend_on_the_number_of_threads(case, level):
    call = case.make(torch.float32)
    found = []
    with use_backend(f"cpu-{level}"):
        try:
            for threads in (1, 2, 3, 16):
                torch.set_num_threads(threads)
                found.append(call.gradients())
        finally:
            torch.set_num_threads(1)
    y, state, grads = found[0]
    for other_y, other_state, other_grads in found[1:]:
        assert torch.equal(y, other_y)
        assert torch.equal(state, other_state)
        assert all(torch.equal(grad, other_grads[name]) for name, grad in grads.items())


@pytest.mark.parametrize("level", LEVELS)
def test_a_channel_that_forgets_everything_stays_finite(level):
    # Steps that only fill a tile have step size 0, which times a rate of minus infinity would be no number.
    call = Case(height=1, width=3, states=1).make(torch.float32)
    call.tensors["A"][:, 0] = -torch.inf
    with use_backend(f"cpu-{level}"):
        y, state, grads = call.gradients()
    with use_backend("portable"):
        expected_y, expected_state, _ = call.gradients()
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(state, expected_state)
    assert torch.isfinite(grads["x"]).all()


@pytest.mark.parametrize("level", LEVELS)
def test_states_that_decay_alike_give_the_same_bits(level):
    # One exponential serves them all; another channel of the block, whose states differ, prevents that.
    channels, states, tokens = 20, 5, 37
    x, bc, delta = (
        torch.randn(2, tokens, channels),
        torch.randn(2, tokens, 1, 2 * states),
        torch.randn(2, tokens, 1, channels),
    )
    alike = -torch.rand(1, channels, 1).expand(-1, -1, states).contiguous()
    other = alike.clone()
    other[:, -1] *= torch.arange(1, states + 1)
    found = []
    for A in (alike, other):
        arguments = [t.clone().requires_grad_() for t in (x, A, delta)]
        with use_backend(f"cpu-{level}"):
            y = route_scan(arguments[0], bc, arguments[1], build_routes((ROWS,), 1, tokens), delta=arguments[2])
            assert isinstance(y, torch.Tensor)
            grads = torch.autograd.grad(y.square().sum(), arguments)
        found.append([y[..., :-1], grads[0][..., :-1], grads[1][:, :-1], grads[2][..., :-1]])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("level", LEVELS)
def test_nan_and_lazily_negated_tensors(level):
    call = Case().make(torch.float32)
    x = call.tensors["x"]
    with torch.no_grad(), use_backend(f"cpu-{level}"):
        expected = replace(call, tensors=call.tensors | {"x": -x}).run()[0]
        found = replace(call, tensors=call.tensors | {"x": torch._neg_view(x)}).run()[0]
        assert torch.equal(found, expected)
        poisoned = x.clone()
        poisoned.view(torch.int32)[0, 0] = 0x7FC00001  # NaN with a payload
        y = replace(call, tensors=call.tensors | {"x": poisoned, "A": call.tensors["A"].clone()}).run()[0]
        assert y[0, 0].isnan().all()
        assert y[1:].isfinite().all()


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, **environment},
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_torch_threads_are_used_and_no_others():
    found = run_python(
        "import os, torch; from cases import Case\n"
        "from vision_ssm.scan.cpu.library import load_library\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "call = Case(batch=8, channels=64).make(torch.float32)\n"
        "torch.set_num_threads(1); torch.ones(2**20).sum(); before = count(); call.run()\n"
        "alone = count() - before\n"
        "torch.set_num_threads(4); call.run(); ours = count() - before\n"
        "torch.ones(2**22).exp(); torchs = count() - before\n"
        "print(load_library().pool, alone, ours, torchs)"
    )
    assert found.split() == ["GOMP", "0", "3", "3"]


@pytest.mark.usefixtures("fresh_library")
def test_without_the_library_one_warning_and_portable(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "SOURCES", tmp_path)
    with pytest.warns(RuntimeWarning, match="'portable' backend: no compiled C\\+\\+ scan, it was not built") as caught:
        assert backend_for("cpu") == "portable"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Case().make(torch.float32).run()
        with pytest.raises(ValueError, match=r"'cpu'; allowed are 'reference', 'portable'"), use_backend("cpu"):
            pass


@pytest.mark.usefixtures("fresh_library")
@pytest.mark.parametrize("content", [b"", b"not a library"], ids=["empty", "garbage"])
def test_a_broken_library_is_not_used(content, monkeypatch, tmp_path):
    (tmp_path / build.LIBRARY).write_bytes(content)
    monkeypatch.setattr(library, "SOURCES", tmp_path)
    with pytest.warns(RuntimeWarning, match=build.LIBRARY):
        assert backend_for("cpu") == "portable"


@pytest.mark.usefixtures("fresh_library")
def test_another_library_is_not_used(monkeypatch, tmp_path):
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" int other() { return 0; }')
    library_path = tmp_path / build.LIBRARY
    subprocess.run([*build.find_compiler(), "-shared", "-fPIC", str(source), "-o", str(library_path)], check=True)
    monkeypatch.setattr(library, "SOURCES", tmp_path)
    with pytest.warns(RuntimeWarning, match="vision_ssm_source"):
        assert backend_for("cpu") == "portable"


@pytest.mark.usefixtures("fresh_library")
def test_a_library_of_other_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(library, "source_hash", lambda: "0123")
    with pytest.warns(RuntimeWarning, match="was built from other sources"):
        assert backend_for("cpu") == "portable"


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", "CXX is 'no-such-compiler', which was not found"),
        ("false", "-c .*scan.cpp.* failed"),
        ('"open', "No closing quotation"),
    ],
)
def test_a_compiler_that_does_not_work_is_named(compiler, message, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(build.BuildError, match=message):
        build.build(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloads the sanitizer")
def test_under_address_and_undefined_behavior_sanitizers(tmp_path):
    compiler = build.find_compiler()
    # Without the C++ library beside it, the sanitizer finds no __cxa_throw, and an exception in libtriton ends Python.
    names = ("libasan.so", "libstdc++.so.6")
    found = [subprocess.run([*compiler, f"-print-file-name={n}"], capture_output=True, text=True).stdout for n in names]
    preload = [path.strip() for path in found]
    if not Path(preload[0]).is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    # Optimised, it would be compiled five times as long, and run no faster.
    build.build(tmp_path, ["-O0", *sanitize], sanitize)
    run_python(
        "import sys, torch; from pathlib import Path; from cases import CASES, Case\n"
        "from vision_ssm.scan import last_backend, use_backend\n"
        "from vision_ssm.scan.cpu import library\n"
        f"library.SOURCES = Path({str(tmp_path)!r})\n"
        "cases = [*CASES, Case(batch=1, height=9, width=7, channels=87), Case(height=5, width=7, channels=150)]\n"
        f"for level in {LEVELS}:\n"
        "    for threads, dtype in ((1, torch.float32), (2, torch.bfloat16), (2, torch.float16)):\n"
        "        torch.set_num_threads(threads)\n"
        "        with use_backend(f'cpu-{level}'):\n"
        "            [case.make(dtype).gradients() for case in cases]\n"
        "assert last_backend().startswith('cpu')\n",
        LD_PRELOAD=" ".join(preload),
        ASAN_OPTIONS="detect_leaks=0",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 37, 40), (3, 16, 16), (1, 33, 2, 24), (2, 64, 1, 101), (2, 5, 8), (1, 1, 20)], ids=str
)
def test_copies_of_what_is_not_channels_last(shape, dtype):
    # (B, L, ...) of memory that is (B, ..., L)
    tensor = torch.randn(*shape[:1], *shape[2:], shape[1]).to(dtype).movedim(-1, 1)
    dense = cpu._dense(tensor)
    assert dense.is_contiguous()
    assert torch.equal(dense, tensor)


def test_channels_first_images_are_copied_some_at_a_time(monkeypatch):
    call = Case(batch=5, height=9, width=7, channels=40, rank=0).make(torch.float32)
    expected = call.run()
    monkeypatch.setattr(cpu, "_COPIED", 2 * 63 * 40)
    monkeypatch.setattr(cpu, "_FORWARD_BLOCK", 1)
    assert cpu._images_at_once(ScanArguments(call.tensors["x"].mT.contiguous().mT, *[call.tensors["A"]] * 4)) == 2
    moved = {name: call.tensors[name].movedim(1, -1).contiguous().movedim(-1, 1) for name in ("x", "dbc", "delta")}
    found = replace(call, tensors=call.tensors | moved).run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
