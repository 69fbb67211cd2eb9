from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_ssm.layers import (
    MultiResolutionConv,
    QSTokenMixer,
    SelectiveChannelMixer,
    SelectiveTokenMixer,
    WeightedAverage,
    quasi_separable_scan,
)
from vision_ssm.layers.mamba_mixer import _averages
from vision_ssm.scan import Snake, Transposed

MIXERS: dict[str, Any] = dict(
    token=lambda **options: SelectiveTokenMixer(16, **options),
    qs_token=lambda **options: QSTokenMixer(16, **options),
    channel=lambda **options: SelectiveChannelMixer(16, **options),
    qs_channel=lambda **options: SelectiveChannelMixer(16, gated=False, **options),
    fixed=lambda **options: SelectiveTokenMixer(16, switch=False, bidirectional=False, **options),
    qs_fixed=lambda **options: QSTokenMixer(16, switch=False, bidirectional=False, **options),
    channel_forward=lambda **options: SelectiveChannelMixer(16, bidirectional=False, **options),
)
mixers = pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)


@mixers
@pytest.mark.parametrize("options", [{}, dict(aligned=True), dict(d_state=3, drop_path=0.2)], ids=str)
@pytest.mark.parametrize("size", [(7, 5), (1, 1)], ids=str)
def test_every_parameter_gets_a_gradient(make: Any, options: dict[str, Any], size: tuple[int, int]) -> None:
    mixer = make(**options).train()
    x = torch.randn(2, *size, 16, requires_grad=True)
    result = mixer(x)
    y, balance = result if isinstance(result, tuple) else (result, None)
    assert y.shape == x.shape
    (y.square().mean() + (0 if balance is None else balance)).backward()
    assert [name for name, p in mixer.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert x.grad.isfinite().all()


@mixers
def test_without_its_output_a_mixer_is_the_identity(make: Any) -> None:
    mixer = make().eval()
    nn.init.zeros_(mixer.out_proj.weight)
    x = torch.randn(2, 4, 6, 16)
    result = mixer(x)
    assert torch.equal(result[0] if isinstance(result, tuple) else result, x)


def test_other_pools() -> None:
    mixer = SelectiveTokenMixer(16, paths=(Snake(), Transposed(Snake()), Snake()), scans=3, dt_rank=4, expand=1.5)
    assert mixer.A_log.shape == (3, 24, 16)
    assert mixer(torch.randn(1, 5, 4, 16))[0].shape == (1, 5, 4, 16)


def test_qs_token_mixer_is_the_selective_scan_with_equal_rates_in_a_head() -> None:
    torch.manual_seed(1)
    mixer = QSTokenMixer(32, d_state=4).eval()  # 64 inner channels: two heads
    for p in (mixer.A_log, mixer.D):
        nn.init.normal_(p)
    u, v = torch.randn(2, 3, 4, 32), torch.randn(2, 3, 4, 64)
    index, weight = torch.tensor([[0, 2], [3, 1]]), torch.rand(2, 2)
    y = mixer.scan(u, v, index, weight)
    bcdt = mixer.bcdt_proj(u)
    bc = F.silu(mixer.bc_conv2d(bcdt[..., :8].permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    for head in range(2):
        channels = slice(32 * head, 32 * head + 32)
        expected = quasi_separable_scan(
            v[..., channels],
            torch.cat([bcdt[..., 8 + head : 9 + head], bc], dim=-1),
            -mixer.A_log[:, head, None, None].exp().expand(-1, 32, 4),
            mixer.D[head],
            mixer.switch.paths,
            dt_weight=torch.ones(1, 1, 32),
            dt_bias=mixer.dt_bias[..., head, None].expand(-1, -1, 32),
            path_index=index,
            path_weight=weight,
        )
        torch.testing.assert_close(y[..., channels], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(7, 7), (5, 9), (2, 1)], ids=str)
def test_channel_mixer_applies_one_matrix_per_image(size: tuple[int, int]) -> None:
    mixer = SelectiveChannelMixer(6, expand=1.5, d_state=2).double().eval()  # 9 inner channels
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(torch.randn_like(p))
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    u = mixer.norm(x)
    a = F.silu(F.conv1d(mixer.in_proj(u).reshape(-1, 1, 9), mixer.conv1d.weight, mixer.conv1d.bias, padding=1))
    a = a.view(2, *size, 9)
    g = F.adaptive_avg_pool2d(a.permute(0, 3, 1, 2), 7).flatten(2)
    raw = mixer.x_proj(g)  # (2, 9, 5)
    step = F.softplus(raw[..., :1] + mixer.dt_bias.t())  # (2, 9, 2)
    B, C = (raw[..., 1:] + mixer.bc_bias).chunk(2, dim=-1)
    decay = -mixer.A_log.exp()
    M = torch.zeros(2, 9, 9, dtype=torch.float64)
    for image in range(2):
        for i in range(9):
            for j in range(9):
                if i == j:
                    M[image, i, j] = mixer.D[i]
                    continue
                way, at = (0, i - 1) if j < i else (1, i + 1)
                low, high = (j + 1, i) if j < i else (i + 1, j)
                exponent = decay * step[image, low:high, way].sum()
                M[image, i, j] = (C[image, at] @ B[image, j]) * exponent.exp() * step[image, j, way]
    y = mixer.out_norm(torch.einsum("bij,bhwj->bhwi", M, a)) * F.silu(mixer.gate_proj(u))
    torch.testing.assert_close(mixer(x), x + mixer.out_proj(y), rtol=0, atol=1e-10)


def test_multi_resolution_conv_sees_1_3_7_15() -> None:
    conv = MultiResolutionConv(1)
    x = torch.zeros(1, 21, 21, 1)
    x[0, 10, 10] = 1
    for level, reach in enumerate((1, 3, 7, 15)):
        with torch.no_grad():
            for p in conv.convs.parameters():
                p.copy_(torch.ones_like(p) * (p.dim() > 1))
            conv.level_weight.zero_()
            conv.level_weight[level] = 1
        rows = conv(x)[0, :, 10, 0].nonzero().flatten()
        assert (rows.min().item(), rows.max().item()) == (10 - reach // 2, 10 + reach // 2)


def test_weighted_average() -> None:
    average = WeightedAverage(3)
    maps = [torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(3)]
    assert torch.equal(average(maps), maps[-1])
    scalars = torch.randn(4)
    with torch.no_grad():
        average.scalars.copy_(scalars)
    expected = (scalars[0] + scalars[1]) * maps[0] + scalars[2] * maps[1] + scalars[3] * maps[2]
    torch.testing.assert_close(average(maps), expected)
    assert torch.equal(WeightedAverage(1)(maps[:1]), maps[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelectiveTokenMixer(0), "dim must be at least 1, got 0"),
        (lambda: SelectiveTokenMixer(8, d_state=0), "d_state must be at least 1, got 0"),
        (lambda: SelectiveTokenMixer(8, dt_rank=0), "dt_rank must be at least 1, got 0"),
        (lambda: SelectiveTokenMixer(8, expand=0.1), "expand must give 8 channels at least one inner channel, got 0.1"),
        (lambda: SelectiveTokenMixer(8, drop_path=2.0), "drop_path must be between 0 and 1, got 2.0"),
        (lambda: QSTokenMixer(8), "multiple of 32, the channels of a head, got 16"),
        (lambda: SelectiveChannelMixer(8, d_state=0), "d_state must be at least 1, got 0"),
        (
            lambda: SelectiveChannelMixer(8, expand=0.0),
            "expand must give 8 channels at least one inner channel, got 0.0",
        ),
        (lambda: MultiResolutionConv(8, 0), "got 8 and 0"),
        (lambda: WeightedAverage(0), "maps must be at least 1, got 0"),
        (lambda: WeightedAverage(2)([torch.ones(1)]), "there must be 2 maps, got 1"),
    ],
)
def test_options_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("size", [(1, 3), (7, 14), (9, 20)], ids=str)
def test_pooling_by_products_is_adaptive_pooling(size: tuple[int, int]) -> None:
    a = torch.randn(2, 3, *size)
    rows, columns = (_averages(length, a) for length in size)
    torch.testing.assert_close(rows @ a @ columns.t(), F.adaptive_avg_pool2d(a, 7))
