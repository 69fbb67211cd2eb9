"""An optimized copy computes what the model computes, and refuses what it cannot do."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vision_ssm
from vision_ssm.layers import ResidualConv
from vision_ssm.optimize.packed import PackedConv2d, PackedLinear

OURS = [
    "efficient_vmamba_atto",
    "group_mamba_atto",
    "sparx_mamba_atto",
    "sparx_swin_atto",
    "vim2_atto",
    "viqs_atto",
    "vmamba_atto",
]
PEERS = ["swin_tiny_patch4_window7_224", "convnext_tiny", "resnet50", "vit_small_patch16_224"]
LAYERS, PACKED = (nn.Linear, nn.Conv2d), (PackedLinear, PackedConv2d)


def build(name: str, **options: Any) -> nn.Module:
    model = timm.create_model(name, **options).eval()
    for key, value in model.named_buffers():  # statistics that make a difference
        if key.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return model


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * (expected.max() - expected.min())


def count(model: nn.Module, kinds: tuple[type, ...]) -> int:
    return sum(isinstance(module, kinds) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("name", [*OURS, *PEERS])
def test_logits_agree_and_layers_are_replaced(name: str) -> None:
    model = build(name)
    optimized = vision_ssm.optimize(model)
    assert count(model, LAYERS) == count(optimized, PACKED) > 0
    assert count(optimized, LAYERS) == 0
    assert count(optimized, (nn.BatchNorm2d,)) == 0
    assert isinstance(optimized, type(model))
    sizes = [(224, 224)] if name in PEERS else [(32, 32), (45, 67)]
    for batch, size in zip((1, 2), sizes, strict=False):
        x = torch.randn(batch, 3, *size)
        expected = model(x)
        assert_close(optimized(x), expected)
        assert_close(optimized(x), expected)  # from packed weights
        assert_close(optimized.forward_head(optimized.forward_features(x)), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", OURS)
def test_maps_and_bfloat16(name: str) -> None:
    model = build(name, features_only=True)
    x = torch.randn(2, 3, 40, 52)
    for found, expected in zip(vision_ssm.optimize(model)(x), model(x), strict=True):
        assert_close(found, expected)
    model = build(name)
    low = vision_ssm.optimize(model, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    for image in (x, x.bfloat16()):
        y = low(image)
        assert y.dtype == torch.bfloat16
        assert_close(y.float(), model(x), 0.1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close(low(image).float(), model(x).float(), 0.1)


@torch.no_grad()
def test_the_model_stays_as_it_is() -> None:
    model = build("sparx_mamba_atto").train()
    before = copy.deepcopy(model.state_dict())
    vision_ssm.optimize(model)(torch.randn(1, 3, 32, 32))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert count(model, PACKED) == 0


@torch.no_grad()
@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["sparx_mamba_atto", "vim2_atto"])
def test_copies_pack_again(name: str, again: Any) -> None:
    optimized = vision_ssm.optimize(build(name))
    x = torch.randn(1, 3, 32, 48)
    y = optimized(x)
    packed = [module for module in optimized.modules() if isinstance(module, PACKED)]
    assert all(module.packed is not None for module in packed)
    held = sum(torch.ops.mkldnn._nbytes(module.packed) for module in packed if module.packed.is_mkldnn)
    assert 0 < held <= sum(module.weight.nbytes for module in packed)
    other = again(optimized)
    assert type(other) is type(optimized)
    assert all(module.packed is None for module in other.modules() if isinstance(module, PACKED))
    assert torch.equal(other(x), y)
    with pytest.raises(RuntimeError, match="cannot train"):
        other.train()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: m.train(), "cannot train"),
        (lambda m: m.stages[0].blocks[0].mlp.fc1.train(), "cannot train"),
        (lambda m: m.load_state_dict(m.state_dict()), "cannot load weights"),
        (lambda m: m.requires_grad_(True), "cannot require gradients"),
        (lambda m: m.to("meta"), "cannot move to meta"),
        (lambda m: m.half(), "cannot move to torch.float16"),
        (lambda m: m(torch.randn(1, 3, 32, 32, requires_grad=True)), "cannot give gradients"),
    ],
    ids=["train", "part", "load", "gradients", "device", "dtype", "input"],
)
def test_what_a_copy_cannot_do(act: Any, message: str) -> None:
    optimized = vision_ssm.optimize(build("vmamba_atto"))
    with pytest.raises(RuntimeError, match=f"an optimized copy {message}.*call vision_ssm.optimize"):
        act(optimized)
    assert not optimized.training
    assert optimized.eval() is optimized
    assert optimized.to("cpu", torch.float32).requires_grad_(False)(torch.randn(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("vmamba_tiny", {}, TypeError, "must be a torch.nn.Module, got str"),
        (nn.Linear(2, 2), {"dtype": torch.float16}, TypeError, "dtype must be torch.float32 or torch.bfloat16 or None"),
        (nn.Linear(2, 2, device="meta"), {}, ValueError, "must be on a CPU, got parameters or buffers on meta"),
        (vision_ssm.optimize(nn.Sequential(nn.Linear(2, 2))), {}, ValueError, "already an optimized copy"),
    ],
    ids=["no-module", "dtype", "device", "twice"],
)
def test_what_cannot_be_optimized(model: Any, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        vision_ssm.optimize(model, **options)


def conv_norm_act() -> nn.Sequential:
    norm = nn.BatchNorm2d(8)
    nn.init.normal_(norm.running_mean)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU()).eval()


class Parts(nn.Module):
    """Code that nobody knows, around a block that could be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.block = conv_norm_act()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if x.sum() > 1e9:
            return self.block(x)
        self.seen.append(x)
        for layer in self.block[:2]:
            x = layer(x)
        return x


def patched(model: nn.Module) -> nn.Module:
    model[2].forward = lambda x: -x
    return model


def shared(model: nn.Module) -> nn.Module:
    return nn.Sequential(model, nn.ConvTranspose2d(8, 8, 1), model[2])


def hooked(model: nn.Module) -> nn.Module:
    model[0].register_forward_hook(lambda _m, _i, y: y + 1)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "fused"),
    [
        (conv_norm_act(), True),
        (nn.Sequential(conv_norm_act(), conv_norm_act()[2]), True),
        (Parts(), False),
        (patched(conv_norm_act()), False),
        (hooked(conv_norm_act()), False),
    ],
    ids=["sequential", "nested", "unknown-code", "patched", "hooked"],
)
def test_only_what_belongs_together_is_fused(model: nn.Module, fused: bool) -> None:
    model.eval()
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    optimized = vision_ssm.optimize(model)
    assert_close(optimized(x), expected, 1e-5)
    if fused:
        assert count(optimized, (nn.BatchNorm2d,)) == 0
        assert any(module.activation[0] == "relu" for module in packed_layers(optimized))
    assert all(type(value) is Tensor for value in getattr(optimized, "seen", []))


def packed_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, PACKED)]


@torch.no_grad()
def test_shared_activations_and_hooks_of_all_modules_stay() -> None:
    model = shared(conv_norm_act()).eval()
    x = torch.randn(2, 3, 9, 9)
    assert_close(vision_ssm.optimize(model)(x), model(x), 1e-5)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _i, y: y + 1 if isinstance(module, nn.ReLU) else y
    )
    try:
        assert vision_ssm.optimize(conv_norm_act())(x).min() >= 1
    finally:
        handle.remove()


@torch.no_grad()
def test_maps_between_layer_and_norm() -> None:
    model = build("ghostnet_050")  # its intermediates are taken there
    x = torch.randn(1, 3, 64, 64)
    found = vision_ssm.optimize(model).forward_intermediates(x, intermediates_only=True)
    for y, expected in zip(found, model.forward_intermediates(x, intermediates_only=True), strict=True):
        assert_close(y, expected)


@torch.no_grad()
def test_a_convolution_whose_weight_does_not_fit_into_the_caches() -> None:
    model = nn.Sequential(nn.Conv2d(1024, 1024, 3, padding=1), nn.GELU()).eval()
    optimized = vision_ssm.optimize(model)
    for size in ((3, 5), (32, 33)):  # packed, and in the layout that is faster on a large map
        x = torch.randn(1, 1024, *size)
        expected = model(x)
        assert_close(optimized(x), expected)
        assert_close(optimized(x.contiguous(memory_format=torch.channels_last)), expected)


def test_nan_and_edited_weights_and_forward_mode() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU()).eval()
    optimized, x = vision_ssm.optimize(model), torch.randn(3, 64)
    with torch.no_grad():
        x[1, 2] = torch.nan
        assert torch.equal(optimized(x).isnan(), model(x).isnan())
        x[1, 2] = 0
        optimized[0].weight.mul_(2)
        assert_close(optimized(x), torch.relu(2 * (model[0](x) - model[0].bias) + model[0].bias))
        optimized[0].weight.data = torch.zeros(64, 64)
        assert_close(optimized(x), torch.relu(model[0].bias).expand(3, 64))
        with torch.autograd.forward_ad.dual_level():
            y = vision_ssm.optimize(model)(torch.autograd.forward_ad.make_dual(x, x))
            tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
        assert_close(tangent, torch.func.jvp(model, (x,), (x,))[1])
    with pytest.raises(RuntimeError, match="cannot load weights"):
        optimized[0].load_state_dict(model[0].state_dict())
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        optimized(torch.randn(3, 65))


@torch.no_grad()
def test_observers_see_torch_operators() -> None:
    model = build("vmamba_atto")
    optimized, x = vision_ssm.optimize(model), torch.randn(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(x)
    with FlopCounterMode(display=False) as other:
        optimized(x)
    assert other.get_total_flops() == counter.get_total_flops()
    torch.compiler.reset()
    compiled = torch.compile(optimized, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), model(x))
    exported = torch.export.export(optimized, (x,)).module()
    assert_close(exported(x), model(x))
    assert_close(torch.func.vmap(optimized.head.fc)(torch.ones(2, 1, 128))[:, 0], model.head.fc(torch.ones(2, 128)))
    assert optimized(x[:0]).shape == (0, 1000)


@torch.no_grad()
def test_a_residual_kernel() -> None:
    layer = ResidualConv(6, nn.GELU()).eval()
    x = torch.randn(2, 7, 5, 6)
    optimized = vision_ssm.optimize(nn.Sequential(layer))
    assert_close(optimized(x), layer(x), 1e-6)
    assert not optimized[0].residual
    assert layer.residual
