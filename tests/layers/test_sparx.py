"""Which layers SparX connects, and the aggregator by its published formulas."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vision_ssm.layers import DMCA, Connections, sparx_connections
from vision_ssm.layers.sparx import ChannelAttention

# The published networks: rule of a stage, its ganglion layers, and the number of maps that each reads.
PUBLISHED: dict[str, tuple[dict[str, Any], list[int], list[int]]] = {
    "T1": (dict(depth=2, start=1), [1], [2]),
    "T2": (dict(depth=7, step=2, window=3), [0, 2, 4, 6], [1, 2, 3, 4]),
    "T3": (dict(depth=2), [0, 1], [1, 1]),
    "S2": (dict(depth=17, step=3, window=3), [1, 4, 7, 10, 13, 16], [2, 3, 4, 5, 5, 5]),
    "B2": (dict(depth=21, step=3, window=3), [2, 5, 8, 11, 14, 17, 20], [3, 3, 4, 5, 5, 5, 5]),
    "B3": (dict(depth=3, step=2, start=2), [2], [3]),
}


@pytest.mark.parametrize("stage", PUBLISHED)
def test_published_stages(stage: str) -> None:
    rule, ganglia, widths = PUBLISHED[stage]
    connections = sparx_connections(**rule)
    assert list(connections.ganglia) == ganglia
    assert [len(connections.reads[i]) for i in ganglia] == widths


def test_order_of_what_is_read() -> None:
    # map 0 is the stage's input, map i + 1 the output of layer i
    reads = {i: maps for i, maps in enumerate(sparx_connections(10, 3, 0, 2).reads) if maps}
    assert reads == {0: (0,), 3: (2, 3, 1), 6: (5, 6, 1, 4), 9: (8, 9, 4, 7)}


def test_stage_input_as_a_ganglion_map_counts_in_the_window() -> None:
    reads = {i: maps for i, maps in enumerate(sparx_connections(8, 3, 0, 2, cross_stage=True).reads) if maps}
    assert reads == {1: (1, 0), 4: (3, 4, 0, 2), 7: (6, 7, 2, 5)}


def test_dense_reads_all_earlier_layers_and_the_input_once() -> None:
    reads = sparx_connections(7, 2, dense=True).reads
    assert [sorted(reads[i]) for i in (0, 2, 4, 6)] == [[0], [1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize(
    "rule", [dict(start=None), dict(start=4), dict(start=100, stage_input=False), dict(start=None, stage_input=False)]
)
def test_no_ganglion_layer(rule: dict[str, Any]) -> None:
    assert sparx_connections(4, **rule).ganglia == ()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (dict(depth=0), "depth must be at least 1, got 0"),
        (dict(step=0), "step must be at least 1, got 0"),
        (dict(start=-1), "start must be at least 0, got -1"),
        (dict(window=0), "window must be at least 1, got 0"),
        (dict(stage_input=False), "start must be None, or at least 4, in a stage without a stage input, got 0"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_rules_out_of_range(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparx_connections(**{"depth": 4} | rule)


@pytest.mark.parametrize(
    ("reads", "message"),
    [
        ((), "got none"),
        (((), (2,)), r"layer 1 can read the maps 0..1, got \(2,\)"),
        (((-1,),), r"layer 0 can read the maps 0..0, got \(-1,\)"),
        (((), (1, 1)), r"layer 1 must read every map once, got \(1, 1\)"),
    ],
    ids=["empty", "later", "negative", "twice"],
)
def test_connections_out_of_range(reads: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Connections(reads)


def test_run_hands_over_the_maps_and_lets_go_of_them() -> None:
    connections = sparx_connections(8, 2, 0, 1)
    alive: dict[int, weakref.ref[Tensor]] = {}
    most = 0

    def layer(i: int) -> Any:
        def call(x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
            nonlocal most
            assert [int(y) for y in maps or []] == list(connections.reads[i])
            assert (maps is None) == (i not in connections.ganglia)
            y = torch.tensor(i + 1)  # every map is its own number
            alive[i + 1] = weakref.ref(y)
            most = max(most, sum(ref() is not None for ref in alive.values()))
            return y

        return call

    assert int(connections.run(map(layer, range(8)), torch.tensor(0))) == 8
    # the ganglion layer in the window, the normal layer after it, and what the layer makes
    assert most == 3


def test_run_wants_as_many_blocks_as_layers() -> None:
    with pytest.raises(ValueError, match="zip"):
        sparx_connections(3, start=None).run([torch.relu], torch.zeros(1))


def published_dmca(m: DMCA, x: Tensor, shortcut: Tensor) -> Tensor:
    """The aggregator by the published formulas, on channels-first maps, in eval mode."""

    def bn(norm: Any, y: Tensor) -> Tensor:
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias)

    def project(p: Any, y: Tensor) -> Tensor:
        if reduction > 1:
            conv, norm, _ = p.reduce
            half = (reduction + 1) // 2
            y = F.gelu(bn(norm, F.conv2d(y, conv.weight, None, reduction, half, groups=d)))
        return bn(p.norm, F.conv2d(y, p.proj.weight[:, :, None, None]))

    batch, d, height, width = x.shape
    reduction = m.q.reduce[0].stride[0] if isinstance(m.q.reduce, torch.nn.Sequential) else 1
    s = F.group_norm(shortcut, 1, m.norm.weight, m.norm.bias)
    s = F.gelu(bn(m.conv_norm, F.conv2d(s, m.conv.weight, padding=1, groups=s.shape[1])))
    k, v = F.gelu(F.conv2d(s, m.kv.weight[:, :, None, None], m.kv.bias)).chunk(2, dim=1)
    q, k, v = project(m.q, x), project(m.k, k), bn(m.v.norm, F.conv2d(v, m.v.proj.weight[:, :, None, None]))
    first = q if q.shape == x.shape else x
    q, k, flat = (y.reshape(batch * 4, d // 4, -1) for y in (q, k, v))
    scale = None if m.attention.scale is None else m.attention.scale.item()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    a = ((scale * q @ k.transpose(1, 2)).softmax(-1) @ flat).view(v.shape)
    c = torch.cat([first, a, v], 1).view(batch, d, 3, height, width).transpose(1, 2).flatten(1, 2)
    u = F.gelu(F.conv2d(c, m.join_conv.weight, m.join_conv.bias, padding=1, groups=3 * d))
    u = F.conv2d(u, m.join_proj.weight, m.join_proj.bias, groups=3)
    if m.missing:
        rows = u.flatten(2).transpose(1, 2)
        means = F.adaptive_avg_pool1d(rows, m.missing).transpose(1, 2).reshape(batch, -1, height, width)
        u = torch.cat([u, means], 1)
    return u


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (8, 8), (9, 5), (16, 3)], ids=str)
@pytest.mark.parametrize(
    ("out_dim", "sources", "reduction", "scale"),
    [(12, 1, 1, None), (24, 3, 2, None), (25, 2, 4, 0.03), (29, 2, 8, None), (5, 1, 3, None)],
)
def test_aggregator_agrees_with_its_formulas(
    size: tuple[int, int], out_dim: int, sources: int, reduction: int, scale: float | None
) -> None:
    m = DMCA(12, out_dim, sources, reduction=reduction, scale=scale).double().eval()
    for tensor in (*m.parameters(), *m.buffers()):
        if tensor.is_floating_point() and tensor.dim() == 1 and tensor is not m.attention.scale:
            tensor.data = torch.rand_like(tensor) + 0.5
    x, *shortcut = torch.randn(1 + sources, 2, *size, 12, dtype=torch.float64)
    y = m(x, shortcut)
    assert y.shape == (2, *size, out_dim)
    expected = published_dmca(m, *(z.permute(0, 3, 1, 2) for z in (x, torch.cat(shortcut, -1))))
    torch.testing.assert_close(y, expected.permute(0, 2, 3, 1), rtol=1e-9, atol=1e-9)
    # the kernels of inference, which know float32
    m = m.float()
    with torch.inference_mode():
        y = m(x.float(), [z.float() for z in shortcut])
    torch.testing.assert_close(y.double(), expected.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_query_takes_the_place_of_the_map_where_sizes_agree(reduction: int) -> None:
    m = DMCA(4, 6, 1, reduction=reduction).eval()
    seen: list[Tensor] = []
    m.join_conv.register_forward_pre_hook(lambda _m, x: seen.append(x[0]))
    for side in (1, 2):
        x, shortcut = torch.randn(2, 1, side, side, 4)
        m(x, [shortcut])
        # the shuffle leaves the first channel in its place
        first = m.q(x) if side == 1 or reduction == 1 else x
        assert torch.equal(seen[-1][:, 0], first[..., 0])


def test_aggregator_traces_for_maps_of_every_size() -> None:
    m = DMCA(8, 16, 2, reduction=2).eval()
    traced = torch.fx.symbolic_trace(m)
    for side in (1, 5):
        x, first, second = torch.randn(3, 1, side, side, 8)
        assert torch.equal(traced(x, [first, second]), m(x, [first, second]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dim=6), "dim must be divisible by 4, got 6"),
        (dict(dim=0), "dim must be divisible by 4, got 0"),
        (dict(out_dim=2), "out_dim must be at least 3, got 2"),
        (dict(sources=0), "sources must be at least 1, got 0"),
        (dict(reduction=0), "reduction must be at least 1, got 0"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_aggregator_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DMCA(**dict(dim=8, out_dim=16, sources=1) | options)


def test_attention_needs_a_group() -> None:
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        ChannelAttention(0)
