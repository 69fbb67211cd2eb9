"""The linear layers' short cut for inference on a CPU gives what torch's own layers give."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Mlp as TimmMlp
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vision_ssm.layers import Linear, Mlp
from vision_ssm.layers import mlp as module


@pytest.fixture
def fused(monkeypatch):
    """Counts the calls that oneDNN served."""
    served = []
    original = module._fused

    def counted(*args):
        y = original(*args)
        served.append(y is not None)
        return y

    monkeypatch.setattr(module, "_fused", counted)
    return served


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 7, 24), (1, 24), (2, 3, 1, 24), (24,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear_without_gradients_equals_torch(shape, bias, dtype, fused):
    layer = Linear(24, 17, bias=bias).to(dtype)
    for x in (torch.randn(shape, dtype=dtype), torch.randn(*shape, 2, dtype=dtype)[..., 0]):
        with torch.no_grad():
            y = layer(x)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias), rtol=tolerance, atol=tolerance)
        assert y.shape == (*shape[:-1], 17)
    assert all(fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mlp_equals_timm(dtype, fused):
    ours, theirs = Mlp(24, 96).to(dtype).eval(), TimmMlp(24, 96).to(dtype).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 24, dtype=dtype)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x))
    assert any(fused) == (dtype == torch.float32)
    fused.clear()
    torch.testing.assert_close(ours(x), theirs(x))
    assert not any(fused)


@torch.no_grad()
def test_hooks_and_adapters_see_the_first_layer_before_the_activation(fused):
    mlp, x = Mlp(8, 16).eval(), torch.randn(3, 8)
    expected, seen = mlp(x), []
    handle = mlp.fc1.register_forward_hook(lambda _, __, y: seen.append(y))
    torch.testing.assert_close(mlp(x), expected)
    torch.testing.assert_close(seen[0], F.linear(x, mlp.fc1.weight, mlp.fc1.bias))
    handle.remove()

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 1

    mlp.fc1 = Adapted(mlp.fc1)
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1.base(x) + 1)))
    mlp.act = nn.GELU(approximate="tanh")
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1.base(x) + 1, approximate="tanh")))


@torch.no_grad()
def test_whoever_watches_sees_torch_operations(fused):
    mlp, x = Mlp(8, 16).eval(), torch.randn(3, 8)
    with FlopCounterMode(display=False) as counter:
        mlp(x)
    assert counter.get_total_flops() == 2 * 2 * 3 * 8 * 16
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp(x).dtype == torch.bfloat16
    torch.func.vmap(mlp)(x)
    torch.jit.trace(mlp, x, check_trace=False)
    torch.export.export(mlp, (x,))
    assert not any(fused)
    assert mlp(x[:0]).shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_batched_linear(dtype):
    x, weight = torch.randn(4, 6, 24, dtype=dtype), torch.randn(4, 17, 24, dtype=dtype)
    expected = torch.stack([F.linear(rows, matrix) for rows, matrix in zip(x, weight, strict=True)])
    tolerance = 1e-5 if dtype != torch.bfloat16 else 2e-2
    torch.testing.assert_close(module.batched_linear(x, weight), expected, rtol=tolerance, atol=tolerance)
    with torch.inference_mode():
        torch.testing.assert_close(module.batched_linear(x, weight), expected, rtol=tolerance, atol=tolerance)
