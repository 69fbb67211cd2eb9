"""SS2D and VSSBlock as parts of somebody's own network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssm.checkpoints import load_strict
from vision_ssm.checkpoints.vmamba import convert_ss2d, convert_vss_block
from vision_ssm.layers import SS2D, SelectiveTokenMixer, SwitchOfScans, VSSBlock, quasi_separable_scan
from vision_ssm.scan import CROSS_SCAN, ROWS, Diagonal, Reversed, ScanPath, Snake, Transposed

V0: dict[str, Any] = dict(d_state=16, ssm_ratio=2.0, conv_bias=True, gated=True)


def official_weights(dim: int, states: int, ratio: float, gated: bool) -> dict[str, Tensor]:
    """Random weights under the names and shapes of the official SS2D."""
    inner, rank = int(dim * ratio), math.ceil(dim / 16)
    weights = {
        "in_proj.weight": torch.randn(inner * (1 + gated), dim) / dim**0.5,
        "conv2d.weight": torch.randn(inner, 1, 3, 3) / 3,
        "conv2d.bias": 0.1 * torch.randn(inner),
        "x_proj_weight": torch.randn(4, rank + 2 * states, inner) / inner**0.5,
        "dt_projs_weight": torch.randn(4, inner, rank) / rank**0.5,
        "dt_projs_bias": torch.randn(4, inner) - 3,
        "A_logs": torch.randn(4 * inner, states) * 0.3,
        "Ds": torch.randn(4 * inner),
        "out_norm.weight": 1 + 0.1 * torch.randn(inner),
        "out_norm.bias": 0.1 * torch.randn(inner),
        "out_proj.weight": torch.randn(dim, inner) / inner**0.5,
    }
    return {key: value.double() for key, value in weights.items()}


def official_ss2d(w: dict[str, Tensor], x: Tensor, gated: bool) -> Tensor:
    """The published SS2D on (B, H, W, C), as its formulas read, one token at a time."""
    batch, height, width, _ = x.shape
    inner, states = w["out_norm.weight"].shape[0], w["A_logs"].shape[1]
    rank = w["dt_projs_weight"].shape[2]
    x = x @ w["in_proj.weight"].T
    z = None
    if gated:
        x, z = x.chunk(2, dim=-1)
        z = F.silu(z)
    x = F.silu(F.conv2d(x.permute(0, 3, 1, 2), w["conv2d.weight"], w["conv2d.bias"], padding=1, groups=inner))
    rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)  # (B, inner, L)
    sequences = [rows, columns, rows.flip(-1), columns.flip(-1)]
    outputs = []
    for k, u in enumerate(sequences):
        low, B, C = torch.einsum("oc,bcl->bol", w["x_proj_weight"][k], u).split([rank, states, states], dim=1)
        dt = F.softplus(torch.einsum("cr,brl->bcl", w["dt_projs_weight"][k], low) + w["dt_projs_bias"][k][:, None])
        A = -torch.exp(w["A_logs"][k * inner : (k + 1) * inner])
        h = x.new_zeros(batch, inner, states)
        y = []
        for t in range(u.shape[-1]):
            step = dt[:, :, t, None]
            h = torch.exp(step * A) * h + step * B[:, None, :, t] * u[:, :, t, None]
            y.append((h * C[:, None, :, t]).sum(-1) + w["Ds"][k * inner : (k + 1) * inner] * u[:, :, t])
        outputs.append(torch.stack(y, dim=-1))
    by_row = outputs[0] + outputs[2].flip(-1)
    by_column = (outputs[1] + outputs[3].flip(-1)).unflatten(-1, (width, height)).transpose(2, 3).flatten(2)
    y = (by_row + by_column).transpose(1, 2).unflatten(1, (height, width))
    y = F.layer_norm(y, (inner,), w["out_norm.weight"], w["out_norm.bias"])
    if z is not None:
        y = y * z
    return y @ w["out_proj.weight"].T


@pytest.mark.parametrize("size", [(5, 7), (6, 4), (1, 9), (8, 1), (1, 1)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize(
    ("states", "ratio", "gated"), [(16, 2.0, True), (1, 1.0, False), (4, 1.5, False)], ids=["v0", "noz", "n4"]
)
def test_agrees_with_the_published_formulas(size: tuple[int, int], states: int, ratio: float, gated: bool) -> None:
    dim = 20
    weights = official_weights(dim, states, ratio, gated)
    layer = SS2D(dim, d_state=states, ssm_ratio=ratio, gated=gated, conv_bias=True, dtype=torch.float64)
    load_strict(layer, convert_ss2d(weights))
    x = torch.randn(2, *size, dim, dtype=torch.float64)
    torch.testing.assert_close(layer(x), official_ss2d(weights, x, gated), rtol=1e-10, atol=1e-10)


def test_gradients_agree_with_the_published_formulas() -> None:
    weights = {key: value.requires_grad_() for key, value in official_weights(8, 16, 2.0, True).items()}
    layer = SS2D(8, **V0, dtype=torch.float64)
    load_strict(layer, convert_ss2d(weights))
    x = torch.randn(1, 5, 4, 8, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(ours).square().sum().backward()
    official_ss2d(weights, theirs, True).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10)
    expected = convert_ss2d({key: value.grad for key, value in weights.items() if value.grad is not None})
    assert expected.keys() == dict(layer.named_parameters()).keys()
    for key, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, expected[key], rtol=1e-9, atol=1e-10, msg=key)


def test_block_takes_official_names() -> None:
    weights = {f"op.{key}": value for key, value in official_weights(16, 1, 1.0, False).items()}
    weights |= {f"{norm}.{part}": torch.randn(16) for norm in ("norm", "norm2") for part in ("weight", "bias")}
    weights |= {"mlp.fc1.weight": torch.randn(64, 16, 1, 1), "mlp.fc1.bias": torch.randn(64)}
    weights |= {"mlp.fc2.weight": torch.randn(16, 64), "mlp.fc2.bias": torch.randn(16)}
    block = VSSBlock(16, conv_bias=True, dtype=torch.float64)
    load_strict(block, convert_vss_block(weights))
    w = {key: value.double() for key, value in weights.items()}
    x = torch.randn(1, 3, 4, 16, dtype=torch.float64)
    op = {key[3:]: value for key, value in w.items() if key.startswith("op.")}
    y = x + official_ss2d(op, F.layer_norm(x, (16,), w["norm.weight"], w["norm.bias"]), False)
    hidden = F.layer_norm(y, (16,), w["norm2.weight"], w["norm2.bias"]) @ w["mlp.fc1.weight"].flatten(1).T
    expected = y + F.gelu(hidden + w["mlp.fc1.bias"]) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "paths",
    [(ROWS,), (Snake(),), (Diagonal(), Reversed(Diagonal())), (*CROSS_SCAN, Snake(), Transposed(Snake()))],
    ids=["rows", "snake", "diagonals", "six"],
)
@pytest.mark.parametrize("size", [(7, 5), (1, 6)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_any_set_of_paths(paths: tuple[ScanPath, ...], size: tuple[int, int]) -> None:
    layer = SS2D(12, d_state=2, paths=paths)
    x = torch.randn(2, *size, 12, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert layer.A_log.shape[0] == len(paths)


def test_turning_the_map_turns_the_result() -> None:
    # four routes with the same weights treat rows and columns, forwards and backwards, alike
    layer = SS2D(8, d_conv=1, dtype=torch.float64)
    with torch.no_grad():
        for p in (layer.dt_weight, layer.dt_bias, layer.A_log, layer.D):
            p.copy_(p[:1].expand_as(p))
        routes = layer.x_proj.weight.unflatten(0, (4, -1))
        routes.copy_(routes[:1].expand_as(routes))
    x = torch.randn(1, 5, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x.flip(1, 2)), layer(x).flip(1, 2))
    torch.testing.assert_close(layer(x.transpose(1, 2)), layer(x).transpose(1, 2))


@pytest.mark.parametrize("layout", ["channels-last", "permuted", "strided"])
def test_any_memory_layout(layout: str) -> None:
    block = VSSBlock(8).eval()
    x = torch.randn(2, 6, 5, 8)
    same = {
        "channels-last": x,
        "permuted": x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "strided": torch.stack([x, x], dim=-1).flatten(-2)[..., ::2],
    }[layout]
    torch.testing.assert_close(block(same), block(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dim=0), "dim must be at least 1, got 0"),
        (dict(d_state=-1), "d_state must be at least 1, got -1"),
        (dict(dt_rank=0), "dt_rank must be at least 1, got 0"),
        (dict(ssm_ratio=0.01), r"dim \* ssm_ratio must be at least 1, got 0"),
        (dict(d_conv=4), "d_conv must be odd and at least 1, got 4"),
        (dict(paths=()), "paths must name at least one route, got none"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SS2D(**{"dim": 8} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mlp_ratio=-0.5), "mlp_ratio must be at least 0, got -0.5"),
        (dict(drop_path=1.1), "drop_path must be between 0 and 1, got 1.1"),
    ],
    ids=["mlp_ratio", "drop_path"],
)
def test_block_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VSSBlock(8, **options)


def test_dropped_block_is_the_identity() -> None:
    block = VSSBlock(8, drop_path=1.0).train()
    x = torch.randn(3, 4, 4, 8)
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)


def test_v0_initialization() -> None:
    layer = SS2D(16, **V0)
    torch.testing.assert_close(layer.A_log[2, 5], torch.arange(1, 17).log())
    assert layer.in_proj.weight.shape == (64, 16)
    assert layer.conv2d.bias is not None


def test_parameters_to_be_spared_by_weight_decay_are_named_as_in_the_models() -> None:
    names = {name for name, _ in SS2D(8).named_parameters()}
    assert {"A_log", "D", "dt_bias"} <= names


@pytest.mark.parametrize(
    "layer", [SS2D(8), VSSBlock(8), torch.fx.symbolic_trace(SS2D(8))], ids=["SS2D", "block", "traced"]
)
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(2, 8, 5, 6), ValueError, r"height, width, 8\), got \(2, 8, 5, 6\); x.permute\(0, 2, 3, 1\) puts"),
        (torch.randn(2, 5, 6, 9), ValueError, r"x must have shape \(batch, height, width, 8\), got \(2, 5, 6, 9\)$"),
        (torch.randn(2, 30, 8), ValueError, r"x must have shape .*got \(2, 30, 8\)"),
        ([1.0], TypeError, "x must be a tensor of shape .*got list"),
    ],
    ids=["channels first", "channels", "tokens", "list"],
)
def test_bad_maps(layer: nn.Module, x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SS2D(8, paths=ROWS),
        lambda: SwitchOfScans(8, ROWS),
        lambda: SelectiveTokenMixer(8, paths=ROWS),
        lambda: quasi_separable_scan(torch.zeros(1, 2, 2, 4), *[torch.zeros(1)] * 3, ROWS),
    ],
    ids=["SS2D", "switch", "mixer", "quasi-separable"],
)
def test_one_path_is_no_sequence(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"paths must be a sequence of paths such as \(ROWS, COLUMNS\), got Rows\(\)"):
        make()


def test_gradients_per_sample() -> None:
    torch.manual_seed(0)
    block, x = VSSBlock(8, d_state=2, gated=True).double(), torch.randn(3, 4, 5, 8, dtype=torch.float64)
    parameters = dict(block.named_parameters())

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(block, parameters, (image[None],)).square().sum()

    detached = {name: p.detach() for name, p in parameters.items()}
    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(detached, x)
    for i, image in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, image), list(parameters.values()))
        torch.testing.assert_close([grad[i] for grad in found.values()], list(expected))
