"""SparX's connections across the blocks of other networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from vision_ssm.layers import NCHW, NHWC, Tokens, connect
from vision_ssm.layers.connect import Ganglion

Pair = tuple[nn.Module, nn.Module]


def convnext() -> Pair:
    plain = timm.create_model("convnext_atto", num_classes=3, depths=(1, 1, 4, 1), dims=(8, 16, 24, 32))
    model = copy.deepcopy(plain)
    stage = model.stages[2]
    stage.blocks = connect(stage.blocks, 24, NCHW(), step=2, window=1, reduction=2)
    return plain, model


def vit() -> Pair:
    options = dict(img_size=64, embed_dim=24, depth=4, num_heads=2, reg_tokens=3)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=3, **options)
    model = copy.deepcopy(plain)
    model.blocks = connect(model.blocks, 24, Tokens(4, 4, prefix=4), step=2)
    return plain, model


def swin() -> Pair:
    options = dict(img_size=64, embed_dim=8, depths=(1, 3), num_heads=(1, 2), window_size=4)
    plain = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **options)
    model = copy.deepcopy(plain)
    model.layers[1].blocks = connect(model.layers[1].blocks, 16, NHWC(), start=1)
    return plain, model


foreign = pytest.mark.parametrize("build", [convnext, vit, swin], ids=lambda build: build.__name__)
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(IMAGES).square().sum().backward()
    return {key: p.grad.clone() for key, p in model.named_parameters()}


def new_parameters(model: nn.Module) -> set[str]:
    ganglia = [(name, module) for name, module in model.named_modules() if isinstance(module, Ganglion)]
    return {f"{name}.{key}" for name, module in ganglia for key, _ in module.named_parameters() if key[:6] != "block."}


@foreign
def test_starts_as_it_was(build: Callable[[], Pair]) -> None:
    plain, model = build()
    with torch.no_grad():
        assert torch.equal(model.eval()(IMAGES), plain.eval()(IMAGES))
        assert torch.equal(model.train()(IMAGES), plain.train()(IMAGES))


@foreign
def test_the_scales_learn_at_once_and_then_everything(build: Callable[[], Pair]) -> None:
    plain, model = build()
    before, found = gradients(plain), gradients(model)
    new = new_parameters(model)
    assert len(found) == len(before) + len(new)
    assert {key for key in new if found[key].any()} == {key for key in new if key.endswith(".scale")} != set()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    torch.optim.SGD(plain.parameters(), lr=0.01).step()
    assert not torch.equal(model(IMAGES), plain(IMAGES))
    found = gradients(model)
    assert [key for key in sorted(new) if not (found[key].isfinite().all() and found[key].any())] == []


@foreign
def test_gradient_checkpointing(build: Callable[[], Pair]) -> None:
    _, model = build()
    (connected,) = (module for module in model.modules() if hasattr(module, "connections"))
    for module in connected.modules():
        if isinstance(module, Ganglion):
            nn.init.constant_(module.scale, 0.3)
    expected = gradients(model)
    ran = []
    connected[0].register_forward_pre_hook(lambda *_: ran.append(0))
    connected.set_grad_checkpointing()
    found = gradients(model)
    assert len(ran) == 2
    assert all(torch.equal(found[key], grad) for key, grad in expected.items())


def test_which_blocks_are_connected() -> None:
    model = connect([nn.Identity() for _ in range(7)], 8, NHWC(), step=2, start=1, window=2)
    assert [type(block).__name__ for block in model] == ["Identity", *["Identity", "Ganglion"] * 3]
    assert [model[i].dmca.norm.num_channels // 8 for i in (2, 4, 6)] == [3, 2, 3]


def test_blocks_of_ones_own() -> None:
    blocks = [nn.Conv2d(8, 8, 3, padding=1, dtype=torch.float64) for _ in range(3)]
    model = connect(blocks, 8, NCHW(), reduction=2)
    assert model[2].block is blocks[2]
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    x = torch.randn(2, 8, 9, 14, dtype=torch.float64)
    assert torch.equal(model(x), blocks[2](blocks[1](blocks[0](x))))
    for block in model:
        nn.init.ones_(block.scale)
    traced = torch.fx.symbolic_trace(model.eval())
    assert torch.equal(traced(x), model(x))
    assert model(torch.randn(1, 8, 1, 5, dtype=torch.float64)).shape == (1, 8, 1, 5)


def test_tokens_before_the_grid_are_not_connected() -> None:
    model = connect([nn.Identity()], 8, Tokens(2, 3, prefix=2)).eval()
    nn.init.ones_(model[0].scale)
    x = torch.randn(2, 8, 8)
    y = model(x)
    assert torch.equal(y[:, :2], x[:, :2])
    assert (y[:, 2:] != x[:, 2:]).all()
    as_map = connect([nn.Identity()], 8, NHWC()).eval()
    as_map.load_state_dict(model.state_dict())
    torch.testing.assert_close(y[:, 2:].reshape(2, 2, 3, 8), as_map(x[:, 2:].reshape(2, 2, 3, 8)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(blocks=[]), "blocks must hold at least one block, got none"),
        (dict(dim=10), "dim must be divisible by 4, got 10"),
        (dict(step=0), "step must be at least 1, got 0"),
        (dict(window=0), "window must be at least 1, got 0"),
        (dict(reduction=0), "reduction must be at least 1, got 0"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        connect(**dict(blocks=[nn.Identity()], dim=8, layout=NHWC()) | options)


@pytest.mark.parametrize("layout", ["NCHW", NCHW], ids=str)
def test_no_layout(layout: Any) -> None:
    with pytest.raises(TypeError, match="layout must be NCHW"):
        connect([nn.Identity()], 8, layout)


@foreign
def test_layer_decay_is_as_before(build: Callable[[], Pair]) -> None:
    plain, model = build()
    options = dict(opt="sgd", lr=1.0, weight_decay=0.0, layer_decay=0.5)
    scales = []
    for each in (plain, model):
        groups = create_optimizer_v2(each, **options).param_groups
        names = {id(p): name.replace(".block.", ".") for name, p in each.named_parameters()}
        scales.append({names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]})
    assert {name: scales[1][name] for name in scales[0]} == scales[0]


def test_blocks_run_as_a_whole() -> None:
    _, model = vit()
    with pytest.raises(RuntimeError, match="set_grad_checkpointing"):
        model.forward_intermediates(IMAGES)


@pytest.mark.parametrize("grid", [(0, 2, 0), (2, 0, 0), (2, 2, -1)], ids=str)
def test_grid_out_of_range(grid: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        Tokens(*grid)
