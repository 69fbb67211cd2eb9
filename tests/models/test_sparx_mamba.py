"""SparX-Mamba's own options, ablations and initialization."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

import goldens
from vision_ssm.analysis import complexity
from vision_ssm.layers import sparx_connections
from vision_ssm.models import SparXMamba
from vision_ssm.models.create import create_model
from vision_ssm.scan import ROWS, Reversed

TINY: dict[str, Any] = dict(
    dims=(8, 16),
    depths=(1, 3),
    steps=1,
    starts=(None, 1),
    windows=None,
    reductions=(4, 2),
    layer_scale=None,
    num_classes=3,
)
NONE = (None, None, None, None)
# Ablations of SparX-Mamba-T: parameters in millions, counted on the published class.
ABLATIONS: dict[str, tuple[str, dict[str, Any], float]] = {
    "none": ("sparx_mamba_tiny", dict(starts=NONE), 20.705),
    "published": ("sparx_mamba_tiny", {}, 27.052),
    "window-1": ("sparx_mamba_tiny", dict(windows=(None, None, 1, None)), 26.425),
    "window-2": ("sparx_mamba_tiny", dict(windows=(None, None, 2, None)), 26.843),
    "no-window": ("sparx_mamba_tiny", dict(windows=NONE), 27.052),
    "step-3": ("sparx_mamba_tiny", dict(steps=(1, 1, 3, 1)), 26.308),
    "step-1": ("sparx_mamba_tiny", dict(steps=1), 29.284),
    "dgc": ("dgc_mamba_tiny", {}, 27.679),
    "dgc-input-kept": ("dgc_mamba_tiny", dict(cross_stage=(False, False, True, False)), 28.306),
    "dsn": ("dsn_mamba_tiny", {}, 32.527),
    "dsn-without-input": ("dsn_mamba_tiny", dict(cross_stage=False), 30.666),
    "dsn-without-input-from-block-1": ("dsn_mamba_tiny", dict(cross_stage=False, starts=(None, 1, 0, 0)), 30.538),
}


@pytest.mark.parametrize("case", ABLATIONS)
def test_ablations_have_the_published_parameters(case: str) -> None:
    name, options, parameters = ABLATIONS[case]
    model = timm.create_model(name, device="meta", **options)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == parameters


@pytest.mark.parametrize(("name", "operations"), [("dgc_mamba_tiny", 5.371), ("dsn_mamba_tiny", 6.208)])
def test_ablations_have_the_published_cost(name: str, operations: float) -> None:
    assert complexity(timm.create_model(name, device="meta")).paper_ops / 1e9 == pytest.approx(operations, rel=5e-4)


def test_dsn_reads_all_that_came_before() -> None:
    for stage in timm.create_model("dsn_mamba_tiny", device="meta").stages[1:]:
        assert [sorted(maps) for maps in stage.connections.reads] == [
            list(range(layer + 1)) for layer in range(len(stage.blocks))
        ]


def test_the_window_binds_in_a_deep_stage_and_not_in_the_published_one() -> None:
    def built(depth: int, window: int | None) -> tuple[tuple[tuple[int, ...], ...], int]:
        options: dict[str, Any] = dict(depths=(2, 2, depth, 2), windows=(None, None, window, None))
        model = timm.create_model("sparx_mamba_tiny", device="meta", **options)
        return model.stages[2].connections.reads, sum(p.numel() for p in model.parameters())

    assert built(7, 3) == built(7, None)
    one, two, three, everything = (built(10, window) for window in (1, 2, 3, None))
    # Ganglion layers 1, 3, 5, 7 and 9, each of which reads the normal layer before it and up to M of them.
    assert [maps for maps in one[0] if maps] == [(0, 1), (3, 2), (5, 4), (7, 6), (9, 8)]
    assert [maps for maps in two[0] if maps] == [(0, 1), (3, 2), (5, 2, 4), (7, 4, 6), (9, 6, 8)]
    assert everything[0][-1] == (9, 2, 4, 6, 8)
    assert len({reads for reads, _ in (one, two, three, everything)}) == 4
    # A further map costs d (13 + 2 d) parameters, d = 320.
    assert [model[1] - one[1] for model in (two, three, everything)] == [n * 208_960 for n in (3, 5, 6)]


@pytest.mark.parametrize(
    ("name", "size"), [("sparx_mamba_t", "tiny"), ("sparx_mamba_s", "small"), ("sparx_mamba_b", "base")]
)
def test_cost_equals_the_published_code(name: str, size: str) -> None:
    published = goldens.load(name).facts["flops"]
    cost = complexity(timm.create_model(f"sparx_mamba_{size}", device="meta"))
    assert cost.parameters == published["params"]
    # There the layer scales are convolutions, and the means that fill up channels count nothing.
    assert cost.paper_ops == pytest.approx(published["flops_fvcore"], rel=5e-4)
    assert cost.macs == pytest.approx(published["mac"] + published["parts"]["sdpa"], rel=5e-4)


def test_small_variant_is_small() -> None:
    assert sum(p.numel() for p in timm.create_model("sparx_mamba_atto", device="meta").parameters()) < 1e6


@pytest.mark.parametrize(
    ("name", "size"), [("sparx_mamba_t", "tiny"), ("sparx_mamba_s", "small"), ("sparx_mamba_b", "base")]
)
def test_published_weight_decay_spares_what_the_published_layout_says(name: str, size: str) -> None:
    model = timm.create_model(f"sparx_mamba_{size}", device="meta")
    buffers = {key for key, _ in goldens.load(name).facts["state_dict"] if "running_" in key or "num_batches" in key}
    entries = {key: shape for key, shape in goldens.load(name).facts["state_dict"] if key not in buffers}
    spared = {key: shape for key, shape in entries.items() if len(shape) <= 1 or key.endswith(".bias")}
    parameters = dict(model.named_parameters())
    ours = model.published_no_weight_decay()
    assert len(ours) == len(spared)
    assert sum(parameters[key].numel() for key in ours) == sum(int(np.prod(shape)) for shape in spared.values())
    assert not any(key.endswith(("A_log", "dt_bias", "layer_scale1.weight")) for key in ours)


def test_weight_decay_spares_attention_scales() -> None:
    model = timm.create_model("sparx_mamba_atto", learnable_scale=True, device="meta")
    scales = {name for name, _ in model.named_parameters() if name.endswith(".scale")}
    assert len(scales) == sum(len(stage.connections.ganglia) for stage in model.stages)
    assert scales <= model.no_weight_decay()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stem_stride=3), "stem_stride must be one of 1, 2, 4, got 3"),
        (dict(stem_convs=4), "stem_convs must be 2 or 3, got 4"),
        (dict(output_stride=16), "output_stride must be 8, the network's own, got 16"),
        (dict(dims=(8, 16, 32)), "got 3 and 2"),
        (dict(dims=(1, 4)), r"dims\[0\] must be at least 2, got 1"),
        (dict(dims=(8, 18)), "dim must be divisible by 4, got 18"),
        (dict(steps=(1, 2, 1)), r"steps must have one entry for each of the 2 stages, got \(1, 2, 1\)"),
        (dict(starts=0), "starts must be None for stage 0, which has no earlier map, got 0"),
        (dict(steps=(1, 0)), "steps must be whole numbers from 1, got 0 in stage 1"),
        (dict(starts=(None, -1)), "starts must be whole numbers from 0 or None, got -1 in stage 1"),
        (dict(windows=0), "windows must be whole numbers from 1 or None, got 0 in stage 0"),
        (dict(windows="a"), "windows must be whole numbers from 1 or None, got 'a' in stage 0"),
        (dict(reductions=(1, 0)), "reductions must be whole numbers from 1, got 0 in stage 1"),
        (dict(paths=()), "paths must name at least one route, got none"),
        (dict(mlp_ratio=-1.0), "mlp_ratio must give 8 channels at least one hidden channel, got -1.0"),
        (dict(num_classes=-1), "num_classes must be at least 0, got -1"),
        (dict(drop_path_rate=1.5), "drop_path_rate must be between 0 and 1, got 1.5"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparXMamba(**TINY | options)


@pytest.mark.parametrize(
    "options",
    [
        dict(starts=None),
        dict(starts=(None, 0), steps=2, windows=1, cross_stage=True),
        dict(dense=True, d_state=3, ssm_ratio=(1.0, 1.5), mlp_ratio=(2.0, 3.0)),
        dict(layer_scale=0.5, stem_convs=3, learnable_scale=True, feature_norm=True),
        dict(paths=(ROWS, Reversed(ROWS))),
    ],
    ids=lambda value: ",".join(value),
)
def test_every_parameter_of_every_form_gets_a_gradient(options: dict[str, Any]) -> None:
    model = SparXMamba(**TINY | options)
    x = torch.randn(2, 3, 41, 52)
    maps = model.forward_intermediates(x, intermediates_only=True)
    (model(x).square().mean() + sum(y.square().mean() for y in maps)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_layer_scale_lies_on_the_identity_path() -> None:
    model = SparXMamba(**TINY | dict(layer_scale=0.5)).eval()
    block = model.stages[1].blocks[0]
    nn.init.zeros_(block.ss2d.out_proj.weight)
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.pos_embed.conv.weight)
    nn.init.ones_(block.layer_scale2.bias)
    x = torch.randn(1, 4, 4, 16)
    torch.testing.assert_close(block(x), 0.25 * x + 1)


def test_unconnected_blocks_read_nothing() -> None:
    model = SparXMamba(**TINY | dict(starts=None))
    assert all(block.dmca is None for stage in model.stages for block in stage.blocks)


def test_stochastic_depth_grows_linearly() -> None:
    model = SparXMamba(**TINY, drop_path_rate=0.3)
    blocks = [block for stage in model.stages for block in stage.blocks]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, 4), atol=1e-6)
    assert [type(block.drop_path2) for block in blocks] == [nn.Identity] + [DropPath] * 3


def test_initialization() -> None:
    model = timm.create_model("sparx_mamba_tiny", learnable_scale=True)
    block = model.stages[2].blocks[6]
    weights = [block.dmca.kv, block.dmca.q.proj, block.dmca.join_proj, block.ss2d.conv2d, block.mlp.conv.conv]
    for layer in (*weights, block.mlp.fc1, block.pos_embed.conv, model.stem.conv2, model.head.fc):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.bias is None or not layer.bias.any()
    for norm in (block.norm1, block.dmca.norm, block.dmca.q.norm, block.layer_scale1):
        assert bool((norm.weight == 1).all())
        assert not norm.bias.any()
    # torch's default, uniform within 1 / sqrt(fan in)
    assert block.ss2d.x_proj.weight.abs().max().item() == pytest.approx(640**-0.5, rel=0.02)
    assert block.ss2d.dt_weight.abs().max().item() == pytest.approx(20**-0.5, rel=0.02)
    assert not block.ss2d.A_log.any()
    assert bool((block.ss2d.D == 1).all())
    assert block.dmca.attention.scale.item() == pytest.approx(0.030989, rel=1e-4)
    assert all(isinstance(stage.blocks[0].layer_scale1, nn.Identity) for stage in model.stages[:2])


def test_gradient_checkpointing_keeps_less() -> None:
    model = timm.create_model("dsn_mamba_tiny", dims=(8, 16, 16, 16), num_classes=2)
    x = torch.randn(2, 3, 64, 64)

    def kept() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(x)
        return sum(sizes)

    plain = kept()
    model.set_grad_checkpointing()
    assert kept() < 0.5 * plain


def test_none_stands_for_every_stage():
    # timm leaves out arguments that are None, and the model's own windows would bind here
    args = dict(depths=(1, 1, 10, 1), dims=(8, 16, 24, 32))
    free = create_model("sparx_mamba_atto", dict(args, windows=None))
    bound = create_model("sparx_mamba_atto", args)
    assert free.stages[2].connections != bound.stages[2].connections
    assert free.stages[2].connections == sparx_connections(10, 2)
