"""SparX-Swin: what it shares with Swin, windows on maps of any size, its sizes and options."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models import swin_transformer
from torch import Tensor, nn

import vision_ssm  # noqa: F401  (registers the models)
from vision_ssm.models import SparXSwin
from vision_ssm.models.sparx_swin import SparXSwinBlock, WindowAttention

SMALL: dict[str, Any] = dict(dims=(8, 16), depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=3)
SMALL |= dict(steps=1, starts=(None, 0), windows=None, reductions=(4, 2))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# Swin


def from_swin(swin: nn.Module, tensors: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Rename timm's tensors; put the position biases of windows that it made smaller into the middle of whole ones."""
    ours = dict(tensors)
    for name, module in swin.named_modules():
        if isinstance(module, swin_transformer.WindowAttention):
            key, (h, w) = f"{name}.relative_position_bias_table", module.window_size
            table = torch.zeros(2 * size - 1, 2 * size - 1, module.num_heads)
            table[size - h : size + h - 1, size - w : size + w - 1] = tensors[key].view(2 * h - 1, 2 * w - 1, -1)
            ours[key] = table.flatten(0, 1)
    return {key.replace("patch_embed.", "stem.").replace("layers.", "stages."): value for key, value in ours.items()}


def assert_equals_swin(ours: nn.Module, swin: nn.Module, size: int, x: Tensor) -> None:
    ours.load_state_dict(from_swin(swin, swin.state_dict(), size))
    found, expected = ours(x), swin(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    found.square().mean().backward()
    expected.square().mean().backward()
    grads = from_swin(swin, {key: p.grad for key, p in swin.named_parameters()}, size)
    for key, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, grads[key], rtol=0, atol=1e-4 * grads[key].abs().max().item(), msg=key)


def test_equals_swin_at_224() -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.0)
    ours = SparXSwin(dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 24), starts=None)
    assert_equals_swin(ours, swin, 7, torch.randn(1, 3, 224, 224))


@pytest.mark.parametrize(
    ("image", "depths"),
    [
        ((128, 128), (2, 2)),
        ((128, 64), (2, 2)),
        ((32, 96), (2, 2)),  # one window along one axis, several along the other
        ((16, 64), (2, 2)),
        ((16, 16), (2, 2)),  # smaller than a window
        ((8, 4), (2, 2)),
        ((52, 76), (1, 1)),  # padded; where timm also shifts, it rolls before it pads, unlike Swin's own code
        ((28, 100), (1, 1)),
    ],
    ids=str,
)
def test_equals_swin_at_other_sizes(image: tuple[int, int], depths: tuple[int, int]) -> None:
    options: dict[str, Any] = dict(depths=depths, num_heads=(2, 4), window_size=4, num_classes=3)
    swin = swin_transformer.SwinTransformer(img_size=image, embed_dim=8, drop_path_rate=0.0, **options)
    ours = SparXSwin(**SMALL | options | dict(starts=None))
    assert_equals_swin(ours, swin, 4, torch.randn(2, 3, *image))


# Windows


def attend_by_definition(layer: WindowAttention, x: Tensor) -> Tensor:
    """Shifted-window attention of one map, (H, W, C), over all pairs of its tokens."""
    size, heads = layer.window_size, layer.relative_position_bias_table.shape[1]
    sides = [min(n, size) for n in x.shape[:2]]
    shifts = [size // 2 if layer.shifted and n > size else 0 for n in x.shape[:2]]
    lengths = [-(-n // side) * side for n, side in zip(x.shape[:2], sides, strict=True)]
    padded = x.new_zeros(*lengths, x.shape[2])
    padded[: x.shape[0], : x.shape[1]] = x
    q, k, v = layer.qkv(padded).flatten(0, 1).unflatten(-1, (3, heads, -1)).unbind(1)  # (tokens, heads, D)
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    table = layer.relative_position_bias_table.view(2 * size - 1, 2 * size - 1, heads)
    places = torch.cartesian_prod(*(torch.arange(n) for n in lengths))
    # where tokens lie after the roll
    rolled = torch.stack([(places[:, i] - shifts[i]) % lengths[i] for i in (0, 1)], 1)
    window = rolled // torch.tensor(sides)
    distance = rolled[:, None] - rolled
    together = (window[:, None] == window).all(-1)
    scores = scores.masked_fill(~together, -torch.inf)
    distance = (distance + size - 1).clamp(0, 2 * size - 2)
    scores = scores + table[distance[..., 0], distance[..., 1]].permute(2, 0, 1)
    # from opposite borders: neighbours after the roll that were none before
    wrapped = places < torch.tensor(shifts)
    scores = scores - 100 * (wrapped[:, None] != wrapped).any(-1)
    y = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(*lengths, -1)
    return layer.proj(y[: x.shape[0], : x.shape[1]])


SIZES = [(1, 1), (1, 9), (2, 3), (4, 4), (4, 5), (3, 8), (5, 5), (8, 12), (9, 7), (13, 2), (6, 11)]


def attention(shifted: bool) -> WindowAttention:
    layer = WindowAttention(6, 3, window_size=4, shifted=shifted)
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
def test_windows_of_any_map(shifted: bool, size: tuple[int, int]) -> None:
    layer = attention(shifted)
    x = torch.randn(2, *size, 6)
    torch.testing.assert_close(layer(x), torch.stack([attend_by_definition(layer, y) for y in x]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
def test_one_exported_graph_serves_every_map(shifted: bool) -> None:
    layer = attention(shifted).eval()
    free = torch.export.Dim.DYNAMIC
    exported = torch.export.export(layer, (torch.randn(2, 9, 7, 6),), dynamic_shapes=[{0: free, 1: free, 2: free}])
    for size in SIZES:
        if min(size) > 1:
            x = torch.randn(3, *size, 6)
            torch.testing.assert_close(exported.module()(x), layer(x), rtol=1e-5, atol=1e-5)


def test_compiled_for_maps_of_any_size() -> None:
    torch.compiler.reset()
    layer = attention(True).double()
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend="aot_eager")
    for size in ((9, 7), (3, 8), (13, 2)):
        x = torch.randn(2, *size, 6, dtype=torch.float64, requires_grad=True)
        found, expected = compiled(x), layer(x)
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
        torch.testing.assert_close(*grads)


def test_shifted_windows_reach_over_their_borders() -> None:
    x = torch.randn(1, 8, 8, 6, requires_grad=True)
    attention(True)(x)[0, 3, 3].sum().backward()
    assert x.grad is not None
    reached = x.grad.abs().sum(-1)[0] > 0
    assert reached[2:6, 2:6].all()
    assert int(reached.sum()) == 16


# Connections


def test_ganglion_block() -> None:
    block = SparXSwinBlock(8, 2, window_size=4, sources=2, reduction=2).eval()
    x, *shortcut = torch.randn(3, 2, 6, 5, 8)
    y = x + block.attn(block.dmca(block.norm1(x), shortcut))
    torch.testing.assert_close(block(x, shortcut), y + block.mlp(block.norm2(y)))


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("tiny", [[0, 0], [0, 2], [0, 2, 0, 2, 0, 3], [1, 1]]),
        ("small", [[0, 0], [0, 2], [0, 0, 3, 0, 0, 3, 0, 0, 4] + [0, 0, 5] * 3, [1, 1]]),
        ("base", [[0, 0], [0, 2], [0, 0, 3, 0, 0, 3, 0, 0, 4] + [0, 0, 5] * 3, [1, 1]]),
    ],
)
def test_sizes(name: str, reads: list[list[int]]) -> None:
    model = timm.create_model(f"sparx_swin_{name}", device="meta")
    assert [[len(maps) for maps in stage.connections.reads] for stage in model.stages] == reads
    parameters, swin = (
        sum(p.numel() for p in m.parameters())
        for m in (model, timm.create_model(f"swin_{name}_patch4_window7_224", device="meta"))
    )
    assert parameters == {"tiny": 28_215_270, "small": 48_077_784, "base": 85_284_485}[name]
    assert abs(parameters / swin - 1) < 0.05


def test_atto_is_small() -> None:
    assert sum(p.numel() for p in timm.create_model("sparx_swin_atto", device="meta").parameters()) == 925_513


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(patch_size=0), "patch_size must be at least 1, got 0"),
        (dict(num_heads=3), "num_heads must divide the 8 channels, got 3"),
        (dict(num_heads=(2, 0)), "num_heads must divide the 16 channels, got 0"),
        (dict(num_heads=(2, 4, 8)), "num_heads must have one entry for each of the 2 stages"),
        (dict(window_size=0), "window_size must be whole numbers from 1, got 0 in stage 0"),
        (dict(dims=(8, 18), num_heads=2), "dim must be divisible by 4, got 18"),
        (dict(starts=0), "starts must be None for stage 0, which has no earlier map, got 0"),
        (dict(mlp_ratio=0.01), "mlp_ratio must give 8 channels at least one hidden channel, got 0.01"),
        (dict(output_stride=16), "output_stride must be 8, the network's own, got 16"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparXSwin(**SMALL | options)


def test_patches_and_windows_by_stage() -> None:
    model = SparXSwin(**SMALL | dict(patch_size=3, window_size=(2, 5), feature_norm=True)).eval()
    assert [stage.blocks[0].attn.window_size for stage in model.stages] == [2, 5]
    assert [stage.blocks[1].attn.shifted for stage in model.stages] == [True, True]
    maps = model.forward_intermediates(torch.randn(1, 3, 32, 47), intermediates_only=True)
    assert [tuple(y.shape[2:]) for y in maps] == [(11, 16), (6, 8)]


def test_what_weight_decay_spares() -> None:
    model = SparXSwin(**SMALL)
    tables = {f"stages.{i}.blocks.{j}.attn.relative_position_bias_table" for i in (0, 1) for j in (0, 1)}
    assert model.no_weight_decay() == tables
    decayed = model.state_dict().keys() & dict(model.named_parameters()).keys() - model.published_no_weight_decay()
    assert all(key.endswith(".weight") and model.get_parameter(key).dim() > 1 for key in decayed)


def test_initialization() -> None:
    model = timm.create_model("sparx_swin_tiny", depths=(1, 2, 1, 1))
    dmca, attn = model.stages[1].blocks[1].dmca, model.stages[1].blocks[1].attn
    for weight in (attn.qkv.weight, attn.relative_position_bias_table, dmca.kv.weight, dmca.join_proj.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not attn.qkv.bias.any()
    # torch's default, uniform within 1 / sqrt(fan in)
    assert model.stem.proj.weight.abs().max().item() == pytest.approx(48**-0.5, rel=0.02)
