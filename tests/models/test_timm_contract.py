"""What timm, and libraries built on it, expect of a backbone; after timm's own tests/test_models.py.

Nothing here knows a family: a new one adds its smallest model to ``SMALL``. Attributes are checked of every registered
model, shapes on the meta device of all but the largest ones, numbers on the small ones.
"""

from __future__ import annotations

import copy
import math
import pickle
from functools import cache
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import model_entrypoint
from timm.models._features_fx import create_feature_extractor
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import vision_ssm  # noqa: F401  (registers the models)

SMALL = [
    "efficient_vmamba_atto",
    "group_mamba_atto",
    "sparx_mamba_atto",
    "sparx_swin_atto",
    "vim2_atto",
    "viqs_atto",
    "vmamba_atto",
]
# One layer of each kind: a compiler's and an exporter's time is that of every layer.
SMALLER: dict[str, dict[str, Any]] = {
    "efficient_vmamba_atto": dict(depths=(1, 1, 1), dims=(16, 24, 32)),
    "group_mamba_atto": dict(depths=(1,), dims=(16,), mlp_ratios=(2.0,), stem_dim=8),
    "sparx_mamba_atto": dict(
        depths=(1, 1), dims=(16, 32), starts=(None, 0), windows=1, steps=1, reductions=2, layer_scale=1.0
    ),
    "sparx_swin_atto": dict(
        depths=(1, 2), dims=(16, 32), num_heads=(1, 2), starts=(None, 1), windows=1, steps=1, reductions=2
    ),
    "vim2_atto": dict(depths=(1,), dims=(32,)),
    "viqs_atto": dict(depths=(1,), dims=(32,)),
    "vmamba_atto": dict(depths=(1, 1), dims=(16, 32)),
}
# Stems of patches, by the side of one: as published, they leave out what does not fill a patch.
PATCHES = {"efficient_vmamba_atto": 2}
# Without effect in the published model: it scans a single token.
NO_GRADIENT = {"group_mamba_atto": {"head.block.mixer.ss2d.A_log"}}
REGISTERED = [n for n in timm.list_models() if model_entrypoint(n).__module__.startswith("vision_ssm.models")]

small = pytest.mark.parametrize("name", SMALL)
registered = pytest.mark.parametrize("name", REGISTERED)
# Larger ones of a family differ in widths and depths.
typical = pytest.mark.parametrize("name", [n for n in REGISTERED if not n.endswith(("_small", "_base", "_large"))])


def on_meta(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, device="meta", **options).eval()


@cache
def unchanged(name: str) -> nn.Module:
    """For tests that only look at a model."""
    return on_meta(name)


def meta_image(model: nn.Module, batch: int = 2) -> Tensor:
    return torch.empty(batch, *model.pretrained_cfg["input_size"], device="meta")


def channels(model: nn.Module, x: Tensor) -> int:
    return x.shape[-1 if getattr(model, "output_fmt", "NCHW") == "NHWC" else 1]


def area(model: nn.Module, x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape[1:3] if getattr(model, "output_fmt", "NCHW") == "NHWC" else x.shape[2:4])


def classifiers(model: nn.Module) -> list[str]:
    """Return the names of the final layers; a distilled model has two."""
    names = model.pretrained_cfg["classifier"]
    return [names] if isinstance(names, str) else list(names)


def final_layers(model: nn.Module) -> list[nn.Module]:
    found = model.get_classifier()
    return list(found) if isinstance(found, tuple) else [found]


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad()
    torch.manual_seed(0)  # some models draw random numbers in training
    y = model(x)
    y.square().mean().backward()
    return y.detach(), {key: None if p.grad is None else p.grad.clone() for key, p in model.named_parameters()}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert value is not None, key
        assert torch.equal(found[key], value), key


def test_no_family_is_forgotten() -> None:
    assert set(SMALL) == {name for name in REGISTERED if name.endswith("_atto")}
    assert {family(name) for name in SMALL} == {family(name) for name in REGISTERED}


def family(name: str) -> str:
    return model_entrypoint(name).__module__


# Shapes and metadata, of every registered model


@registered
def test_attributes_and_configuration(name: str) -> None:
    model = unchanged(name)
    cfg = model.pretrained_cfg
    assert model.num_classes == cfg["num_classes"] == 1000
    assert model.num_features > 0
    assert model.head_hidden_size > 0
    assert model.in_chans == cfg["input_size"][0] == 3
    for key in ("pool_size", "crop_pct", "interpolation", "mean", "std", "license", "min_input_size"):
        assert cfg[key], key
    for key in (cfg["first_conv"], *classifiers(model)):
        assert f"{key}.weight" in model.state_dict()
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    for layer, key in zip(final_layers(model), classifiers(model), strict=True):
        assert isinstance(layer, nn.Linear)
        assert layer is model.get_submodule(key)


@typical
def test_every_parameter_is_on_the_device_asked_for(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model = on_meta(name, dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())


@typical
def test_features_head_and_classifier(name: str) -> None:
    model = on_meta(name)
    x = meta_image(model)
    features = model.forward_features(x)
    assert area(model, features) == model.pretrained_cfg["pool_size"]
    assert channels(model, features) == model.num_features
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size)
    assert model.forward_head(features).shape == (2, 1000)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert model.forward_head(features).shape == pre_logits.shape
    model.reset_classifier(0, "")
    assert model.forward_head(features).shape == features.shape
    model.reset_classifier(7, "avg")
    assert model.num_classes == 7
    assert all(layer.weight.is_meta for layer in final_layers(model))
    assert model(x).shape == (2, 7)


@typical
def test_built_without_head(name: str) -> None:
    model = on_meta(name, num_classes=0, global_pool="")
    y = model(meta_image(model))
    assert y.ndim == 4
    assert area(model, y) == model.pretrained_cfg["pool_size"]
    pooled = on_meta(name, num_classes=0)
    assert pooled.forward_head(y).shape == (2, pooled.num_features)


@typical
def test_features_only(name: str) -> None:
    assert_features(name)


@small
@pytest.mark.parametrize("feature_cls", ["getter", "list", "dict", "hook", "fx"])
def test_other_feature_wrappers(name: str, feature_cls: str) -> None:
    assert_features(name, feature_cls)


def assert_features(name: str, feature_cls: str | None = None) -> None:
    options = {} if feature_cls is None else {"feature_cls": feature_cls}
    model = on_meta(name, features_only=True, **options)
    size = (96, 100)
    maps = model(torch.empty(1, 3, *size, device="meta"))
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    assert len(maps) == len(model.feature_info) >= 3
    default = feature_cls in (None, "getter")
    for x, info in zip(maps, model.feature_info, strict=True):
        layout = "NCHW" if default else str(getattr(model.output_fmt, "value", model.output_fmt))
        assert x.shape[layout.index("C")] == info["num_chs"]
        for axis, length in zip("HW", size, strict=True):
            assert x.shape[layout.index(axis)] == math.ceil(length / info["reduction"])


@small
@pytest.mark.parametrize("indices", [(0,), (1, 2), (0, 3), (-2,), (3, 1)])
def test_features_only_leaves_out_what_is_not_asked_for(name: str, indices: tuple[int, ...]) -> None:
    whole = on_meta(name, features_only=True)
    x = torch.empty(1, 3, 64, 64, device="meta")
    expected = [y.shape for y in whole(x)]
    model = on_meta(name, features_only=True, out_indices=indices)
    taken = [i % len(expected) for i in indices]
    assert [y.shape for y in model(x)] == [expected[i] for i in sorted(taken)]
    left = sum(p.numel() for p in model.parameters())
    if max(taken) < len(expected) - 1:
        assert left < sum(p.numel() for p in whole.parameters())
    assert not [p for layer in final_layers(model.model) for p in layer.parameters()]


@registered
def test_feature_modules_exist(name: str) -> None:
    model = unchanged(name)
    for info in model.feature_info:
        assert isinstance(model.get_submodule(info["module"]), nn.Module)


@registered
def test_optimizer_groups(name: str) -> None:
    model = unchanged(name)
    parameters = dict(model.named_parameters())
    spared = model.no_weight_decay()
    assert spared
    assert spared <= parameters.keys()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(parameters)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decay[id(parameters[key])] == 0 for key in spared)
    assert scale[id(parameters[f"{model.pretrained_cfg['first_conv']}.weight"])] == min(scale.values())
    for key in classifiers(model):
        assert scale[id(parameters[f"{key}.weight"])] == max(scale.values()) == 1
    assert len(set(scale.values())) >= len(model.feature_info) + 2
    assert set(model.group_matcher(coarse=True)) == set(model.group_matcher()) == {"stem", "blocks"}


@registered
def test_what_the_published_training_does_not_decay(name: str) -> None:
    model = unchanged(name)
    spared = model.published_no_weight_decay()
    assert spared
    assert spared <= {key for key, _ in model.named_parameters()}
    matrices = {f"{key}.weight" for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert not spared & matrices


# Numbers, of the small models


@small
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 32), (97, 65), (1, 1), (7, 120)], ids=str)
def test_any_size(name: str, size: tuple[int, int]) -> None:
    model = timm.create_model(name).eval()
    size = tuple(max(side, PATCHES.get(name, 1)) for side in size)
    with torch.inference_mode():
        y = model(torch.randn(1, 3, *size))
    assert y.shape == (1, 1000)
    assert y.isfinite().all()


@small
@settings(max_examples=8, deadline=None)
@given(height=st.integers(32, 100), width=st.integers(32, 100))
def test_one_image_of_any_size(name: str, height: int, width: int) -> None:
    model = timm.create_model(name, num_classes=5).eval()
    with torch.inference_mode():
        y = model(torch.randn(1, 3, height, width))
    assert y.shape == (1, 5)
    assert y.isfinite().all()


@small
@settings(max_examples=8, deadline=None)
@given(height=st.integers(32, 80), width=st.integers(32, 80), batch=st.integers(1, 2))
def test_feature_sizes_follow_the_image(name: str, height: int, width: int, batch: int) -> None:
    model = timm.create_model(name, features_only=True).eval()
    with torch.inference_mode():
        maps = model(torch.randn(batch, 3, height, width))
    height, width = (side - side % PATCHES.get(name, 1) for side in (height, width))
    for x, info in zip(maps, model.feature_info, strict=True):
        assert x.isfinite().all()
        assert x.is_contiguous()
        assert x.shape[:2] == (batch, info["num_chs"])
        assert x.shape[2] == math.ceil(height / info["reduction"])
        assert x.shape[3] == math.ceil(width / info["reduction"])


@small
def test_images_of_a_batch_do_not_mix(name: str) -> None:
    model = timm.create_model(name).eval()
    x = torch.randn(3, 3, 40, 56)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), torch.cat([model(image[None]) for image in x]), rtol=1e-4, atol=1e-5)


@small
@pytest.mark.parametrize("in_chans", [1, 5])
def test_other_channels(name: str, in_chans: int) -> None:
    model = timm.create_model(name, in_chans=in_chans, num_classes=3).eval()
    assert model.in_chans == in_chans
    assert model(torch.randn(2, in_chans, 32, 48)).shape == (2, 3)


@small
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = timm.create_model(name, num_classes=42, drop_path_rate=0.1).train()
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    y = model(x)
    assert y.shape == (2, 42)
    y.mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    assert x.grad is not None
    assert x.grad.isfinite().all()


@small
def test_no_gradient_is_zero(name: str) -> None:
    model = timm.create_model(name, num_classes=42).train()
    _, found = gradients(model, torch.randn(4, 3, 64, 64))
    zero = {key for key, gradient in found.items() if gradient is not None and not gradient.any()}
    assert zero == NO_GRADIENT.get(name, set())


@small
def test_no_images_at_all(name: str) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    assert model(torch.randn(0, 3, 33, 40)).shape == (0, 3)


@small
def test_intermediates(name: str) -> None:
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, 64, 48)
    levels = len(model.feature_info)
    with torch.inference_mode():
        features, maps = model.forward_intermediates(x)
        assert torch.equal(features, model.forward_features(x))
        assert len(maps) == levels
        assert [y.shape[1] for y in maps] == [info["num_chs"] for info in model.feature_info]
        _, nhwc = model.forward_intermediates(x, output_fmt="NHWC")
        assert all(torch.equal(a, b.permute(0, 3, 1, 2)) for a, b in zip(maps, nhwc, strict=True))
        only = model.forward_intermediates(x, indices=[0, -2], intermediates_only=True)
        assert torch.equal(only[0], maps[0])
        assert torch.equal(only[1], maps[-2])
        last = model.forward_intermediates(x, indices=2, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(last, maps[-2:], strict=True))
        early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        assert torch.equal(early[0], maps[1])
        features, normed = model.forward_intermediates(x, norm=True)
        expected = features if getattr(model, "output_fmt", "NCHW") == "NCHW" else features.permute(0, 3, 1, 2)
        assert torch.equal(normed[-1], expected)


@small
def test_stopping_early_runs_nothing_further(name: str) -> None:
    model = timm.create_model(name).eval()
    ran = []
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(lambda *_, key=info["module"]: ran.append(key))
    model.forward_intermediates(torch.randn(1, 3, 32, 32), indices=[0, 1], stop_early=True)
    assert ran == [info["module"] for info in model.feature_info[:2]]


@small
def test_pruning_keeps_the_maps(name: str) -> None:
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    before = sum(p.numel() for p in model.parameters())
    assert model.prune_intermediate_layers([0, -2]) == [0, 2]
    assert sum(p.numel() for p in model.parameters()) < before
    found = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    features, _ = model.forward_intermediates(x)
    assert channels(model, features) == model.num_features == model.head_hidden_size
    model.reset_classifier(5, "avg")
    assert model(x).shape == (1, 5)


@small
@pytest.mark.parametrize("option", [{"output_fmt": "NHCW"}, {"output_fmt": None}], ids=str)
def test_unknown_layout(name: str, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(option.values())))):
        timm.create_model(name).forward_intermediates(torch.randn(1, 3, 32, 32), **option)


@small
def test_output_stride_is_only_its_own(name: str) -> None:
    own = on_meta(name).feature_info[-1]["reduction"]
    on_meta(name, output_stride=own)
    with pytest.raises(ValueError, match=f"output_stride must be {own}.* got 8"):
        on_meta(name, output_stride=8)


@small
def test_gradient_checkpointing(name: str) -> None:
    model = timm.create_model(name, num_classes=42).train()
    x = torch.randn(2, 3, 48, 48)
    y, expected = gradients(model, x)
    model.set_grad_checkpointing(enable=True)
    found, grads = gradients(model, x)
    assert torch.equal(found, y)
    assert_same(grads, expected)
    model.set_grad_checkpointing(False)
    torch.manual_seed(0)
    assert torch.equal(model(x), y)


@small
def test_gradient_checkpointing_keeps_less(name: str) -> None:
    model = timm.create_model(name, num_classes=42).train()
    x = torch.randn(2, 3, 64, 64)
    expected = bytes_kept(model, x)
    model.set_grad_checkpointing()
    assert bytes_kept(model, x) < 0.7 * expected


def bytes_kept(model: nn.Module, x: Tensor) -> int:
    """What the forward pass keeps for the backward pass, besides parameters."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    y.sum().backward()
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in parameters)


@small
def test_fx_tracing_is_exact(name: str) -> None:
    model = timm.create_model(name, num_classes=42).train()
    x = torch.randn(2, 3, 40, 56)
    y, expected = gradients(model, x)
    traced = torch.fx.symbolic_trace(model)
    found, grads = gradients(traced, x)
    assert torch.equal(found, y)
    assert_same(grads, expected)
    # a graph traced without sizes serves every size
    other = torch.randn(1, 3, 65, 32)
    torch.manual_seed(0)
    expected = model(other)
    torch.manual_seed(0)
    assert torch.equal(traced(other), expected)


@small
def test_fx_feature_extraction_is_exact(name: str) -> None:
    model = timm.create_model(name, num_classes=42).train()
    x = torch.randn(2, 3, 40, 56)
    y, expected = gradients(model, x)
    extractor = create_feature_extractor(model, {key: key for key in classifiers(model)})
    model.zero_grad()
    torch.manual_seed(0)
    found = sum(extractor(x).values()) / len(classifiers(model))
    assert torch.equal(found, y)
    found.square().mean().backward()
    assert_same({key: p.grad for key, p in extractor.named_parameters()}, expected)


@small
def test_torchvision_feature_extraction(name: str) -> None:
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = timm.create_model(name).eval()
    module = model.feature_info[1]["module"]
    extractor = feature_extraction.create_feature_extractor(model, {module: "map"})
    x = torch.randn(1, 3, 64, 32)
    layout = getattr(model, "output_fmt", "NCHW")
    expected = model.forward_intermediates(x, indices=[1], output_fmt=layout, intermediates_only=True)
    assert torch.equal(extractor(x)["map"], expected[0])


@small
@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(name: str, again: Any) -> None:
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, 32, 48)
    other = again(model)
    assert torch.equal(other(x), model(x))
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in other.parameters()}


@small
def test_from_meta_to_memory(name: str) -> None:
    source, model = timm.create_model(name).eval(), on_meta(name)
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(1, 3, 32, 48)
    assert torch.equal(model(x), source(x))


@small
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    model = timm.create_model(name, dtype=dtype).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    y = model(torch.randn(1, 3, 48, 32, dtype=dtype))
    assert y.dtype == dtype
    assert y.isfinite().all()
    model.reset_classifier(4)
    assert model(torch.randn(1, 3, 48, 32, dtype=dtype)).dtype == dtype


@small
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_autocast(name: str, checkpointing: bool) -> None:
    model = timm.create_model(name, num_classes=42).train()
    model.set_grad_checkpointing(checkpointing)
    x = torch.randn(2, 3, 48, 64)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        loss = nn.functional.cross_entropy(y, torch.tensor([1, 2]))
    loss.backward()
    assert y.dtype == torch.bfloat16
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.manual_seed(0)
    torch.testing.assert_close(y.float(), model(x), rtol=0.1, atol=0.1)


@small
def test_compile(name: str) -> None:
    torch.compiler.reset()
    model = timm.create_model(name, num_classes=42, **SMALLER[name]).train()
    x = torch.randn(2, 3, 32, 48)
    y, expected = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    torch.manual_seed(0)
    found = compiled(x)
    found.square().mean().backward()
    torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-6)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.slow
def test_inductor() -> None:
    cpp_builder = pytest.importorskip("torch._inductor.cpp_builder")
    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError:
        pytest.skip("inductor needs a C++ compiler, and finds none")
    torch.compiler.reset()
    # Every kind of layer once: the time is that of compiling them.
    model = timm.create_model("vmamba_atto", num_classes=42, depths=(1, 1), dims=(8, 16)).eval()
    x = torch.randn(2, 3, 32, 48)
    with torch.inference_mode():
        found = torch.compile(model, fullgraph=True)(x)
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


@small
def test_training_lowers_the_loss(name: str) -> None:
    model = timm.create_model(name, num_classes=4, in_chans=1).train()
    optimizer = create_optimizer_v2(model, "adamw", lr=2e-3, weight_decay=0.01)
    x = torch.randn(16, 1, 32, 32)
    target = torch.arange(16) % 4
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@small
def test_ten_steps_in_bfloat16_autocast_stay_finite(name: str) -> None:
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.1).train()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    for _ in range(10):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.randint(10, (4,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("vim2_atto", "switch"),
        ("efficient_vmamba_atto", "atrous"),
        ("group_mamba_atto", "all_directions"),
        ("sparx_mamba_atto", "dense"),
        ("sparx_mamba_atto", "cross_stage"),
        ("vmamba_atto", "feature_norm"),
    ],
)
def test_a_word_is_no_flag(name, flag):
    with pytest.raises(ValueError, match=f"{flag} must be True or False.*got 'no'"):
        timm.create_model(name, **{flag: "no"})
