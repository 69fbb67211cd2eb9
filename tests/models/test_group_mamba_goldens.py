"""GroupMamba against what the published code computed."""

from __future__ import annotations

import re
from contextlib import ExitStack

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import goldens
import vision_ssm  # noqa: F401  (registers the models)
from vision_ssm.checkpoints import load_strict
from vision_ssm.checkpoints.group_mamba import convert_group_mamba
from vision_ssm.models import GroupMamba
from vision_ssm.scan import build_routes

# Published builders and the names under which we register their networks.
OURS = {"groupmamba_t": "group_mamba_tiny", "groupmamba_s": "group_mamba_small", "groupmamba_b": "group_mamba_base"}
# Random weights make these networks sensitive: two correct implementations differ by up to 2e-4. Absolute on logits,
# which are of the order of 1; relative to the largest number of a map.
TOLERANCE = 5e-4
MINI_TOLERANCE = 1e-4
EPS_TOLERANCE = 1e-5


def mini(golden: goldens.Golden, state: dict[str, Tensor] | None = None) -> GroupMamba:
    config = golden.facts["config"]
    model = GroupMamba(
        dims=config["embed_dims"],
        depths=config["depths"],
        mlp_ratios=config["mlp_ratios"],
        stem_dim=config["stem_hidden_dim"],
        num_classes=config["num_classes"],
    )
    load_strict(model, convert_group_mamba(state or golden.state_dict()))
    return model.eval()


def image(batch: int, height: int, width: int) -> Tensor:
    return torch.from_numpy(goldens.fill.image(batch, height, width))


def assert_close(found: Tensor, golden: goldens.Golden, key: str, tolerance: float) -> None:
    np.testing.assert_allclose(found.detach(), golden.arrays[key], rtol=0, atol=tolerance, err_msg=key)


def assert_map(x: Tensor, golden: goldens.Golden, key: str) -> None:
    """Compare a map, (B, H, W, C), with the numbers kept of it."""
    tolerance = TOLERANCE * max(np.abs(golden.arrays[f"{key}_{part}"]).max() for part in ("slice", "last"))
    assert_close(x[0, :4, -4:, :8], golden, f"{key}_slice", tolerance)
    assert_close(x[-1, -1, -1], golden, f"{key}_last", tolerance)
    wide = x.double()
    assert_close(torch.stack([wide.mean(), wide.std()]), golden, f"{key}_mean_std", tolerance)


@pytest.fixture(scope="module", params=OURS)
def built(request: pytest.FixtureRequest) -> tuple[goldens.Golden, nn.Module]:
    golden = goldens.load(request.param)
    model = timm.create_model(OURS[request.param])
    load_strict(model, convert_group_mamba(golden.state_dict()))
    return golden, model


def test_every_file_is_used() -> None:
    assert goldens.names("groupmamba_*") == sorted([*OURS, "groupmamba_mini"])


def test_agrees_with_published(built: tuple[goldens.Golden, nn.Module]) -> None:
    golden, model = built
    model.eval()
    assert sum(p.numel() for p in model.parameters()) == golden.facts["num_params"]
    runs = sorted({key.rpartition("/")[0] for key in golden.arrays} - {"train", "train/after"})
    for run in runs:
        start = f"{run}/" if run else ""
        height, width = (int(n) for n in run.split("x")) if run else (224, 224)
        maps: dict[str, Tensor] = {}
        with ExitStack() as hooks, torch.inference_mode():

            def keep(module: nn.Module, key: str, maps: dict[str, Tensor] = maps, hooks: ExitStack = hooks) -> None:
                hooks.enter_context(module.register_forward_hook(lambda _m, _i, y: maps.__setitem__(key, y)))

            for i, stage in enumerate(model.stages, 1):
                keep(model.stem if i == 1 else stage.downsample, f"patch_embed{i}_tokens")
                keep(stage.blocks, f"stage{i}_tokens")
            keep(model.head.block, "cls_embed")
            keep(model.head.fc, "logits_head")
            keep(model.head.fc_dist, "logits_dist_head")
            batch = len(golden.arrays[f"{start}logits"])
            features, found = model.forward_intermediates(image(batch, height, width), output_fmt="NHWC")
            maps["final_features"] = model.forward_head(features, pre_logits=True)
            maps["logits"] = model.forward_head(features)
            assert torch.equal(maps["logits"], (maps["logits_head"] + maps["logits_dist_head"]) / 2)
            model.feature_norm = True
            *_, normed = model.forward_intermediates(image(batch, height, width), [-1], False, False, "NHWC", True)
            model.feature_norm = False
        assert found[-1] is features
        assert torch.equal(found[-1], maps["stage4_tokens"])
        maps |= {f"stage{i}_norm_tokens": x for i, x in enumerate([*found[:3], normed], 1)}
        for key, x in maps.items():
            if x.ndim == 4:
                assert_map(x, golden, start + key)
            else:
                assert_close(x, golden, start + key, TOLERANCE)
        for i, x in enumerate(found, 1):
            assert tuple(x.shape[1:3]) == tuple(golden.arrays[f"{start}stage{i}_hw"])


def test_training_agrees() -> None:
    golden = goldens.load("groupmamba_t")
    # In float64: the batch statistics that torch computes of channels-last maps in float32 are off by some 1e-6, of
    # which these weights make 9e-4 in the logits.
    model = timm.create_model("group_mamba_tiny", dtype=torch.float64).train()
    load_strict(model, convert_group_mamba(golden.state_dict()))
    model.set_distilled_training(True)
    with torch.no_grad():
        logits, logits_dist = model(image(2, 224, 224).double())
    assert_close(logits, golden, "train/logits_head", TOLERANCE)
    assert_close(logits_dist, golden, "train/logits_dist_head", TOLERANCE)
    assert_statistics(model, golden)


def assert_statistics(model: nn.Module, golden: goldens.Golden) -> None:
    buffers = goldens.in_published_layout(convert_group_mamba, golden, dict(model.named_buffers()))
    kept = [key for key in golden.arrays if key.startswith("train/after/")]
    assert kept
    for key in kept:
        found = buffers[key.removeprefix("train/after/")]
        np.testing.assert_allclose(found, golden.arrays[key], rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.fixture(scope="module")
def small() -> goldens.Golden:
    return goldens.load("groupmamba_mini")


def test_parts_of_a_block_agree(small: goldens.Golden) -> None:
    model = mini(small)
    block, head = model.stages[0].blocks[0], model.head
    calls: list[tuple[nn.Module, Tensor]] = []
    modules = [
        model.stem,
        block,
        *block.modules(),
        *(part for stage in model.stages for part in (stage.downsample, stage.blocks)),
        head.block.mixer,
        head.block,
        head.norm,
    ]
    with ExitStack() as hooks, torch.inference_mode():
        for module in dict.fromkeys(modules):
            hooks.enter_context(module.register_forward_hook(lambda m, _i, y: calls.append((m, y[:1]))))
        model(image(2, 64, 64))

    def seen(module: nn.Module, call: int = 0) -> Tensor:
        return [y for m, y in calls if m is module][call]

    mixer = block.mixer
    groups = seen(mixer.ss2d.out_proj).permute(0, 2, 3, 1).unflatten(-1, (4, -1))  # (1, H, W, groups, d)
    found = {
        "patch_embed1": seen(model.stem),
        "block1.0.attn.norm_call1": seen(mixer.norm),
        "block1.0.attn.gate": torch.sigmoid(seen(mixer.fc2)),
        "block1.0.attn.mamba_g2.in_proj": torch.cat(
            [seen(part)[:, 8:16].permute(0, 2, 3, 1) for part in (mixer.ss2d.in_proj, mixer.ss2d.gate_proj)], -1
        ),
        "block1.0.attn.mamba_g2.conv2d": seen(mixer.ss2d.conv2d)[:, 8:16],
        "block1.0.attn.mamba_g2.out_norm": seen(mixer.ss2d.out_norm)[..., 8:16],
        **{f"block1.0.attn.mamba_g{k + 1}": groups[..., k, :] for k in range(4)},
        "block1.0.attn.norm_call2": seen(mixer.norm, 1),
        "block1.0.attn": seen(mixer),
        "block1.0.mlp.dwconv": seen(block.mlp.dwconv)[:, :16].permute(0, 2, 3, 1),
        "block1.0.mlp": seen(block.mlp),
        "block1.0": seen(block),
        **{f"patch_embed{i + 1}": seen(model.stages[i].downsample) for i in (1, 2, 3)},
        **{f"stage{i + 1}": seen(model.stages[i].blocks) for i in (1, 2, 3)},
        "post_network.0.attn": seen(head.block.mixer),
        "post_network.0": seen(head.block),
        "norm4": seen(head.norm),
    }
    assert {f"mid/{key}" for key in found} == {key for key in small.arrays if key.startswith("mid/")}
    for key, x in found.items():
        expected = small.arrays[f"mid/{key}"]
        if key == "post_network.0":  # the published block carries along the tokens, which it does not change
            expected = expected[:, 0]
        np.testing.assert_allclose(x.reshape(expected.shape), expected, rtol=0, atol=MINI_TOLERANCE, err_msg=key)


@pytest.mark.parametrize(
    ("run", "size", "training"),
    [("eval", (64, 64), False), ("train", (64, 64), True), ("rect_exact", (64, 96), False)],
    ids=["eval", "train", "rectangle"],
)
def test_gradients_agree(small: goldens.Golden, run: str, size: tuple[int, int], training: bool) -> None:
    model = mini(small).train(training)
    model.set_distilled_training(True)  # in evaluation without effect
    x = image(2, *size).requires_grad_()
    outputs = model(x) if training else (model(x),)
    names = ("logits_head", "logits_dist_head") if training else ("logits",)
    for name, logits in zip(names, outputs, strict=True):
        assert_close(logits, small, f"{run}/{name}", MINI_TOLERANCE)
    loss = sum(logits.square().mean() for logits in outputs)
    loss.backward()
    np.testing.assert_allclose(loss.item(), small.arrays[f"{run}/loss"], rtol=1e-4)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.double().norm(), small.arrays[f"{run}/input_grad_norm"], rtol=0.02)
    kept = small.arrays[f"{run}/input_grad_slice"]
    np.testing.assert_allclose(x.grad[:, :, :8, -8:], kept, rtol=0, atol=0.02 * np.abs(kept).max())

    ours = {name: p.grad for name, p in model.named_parameters()}
    grads = goldens.in_published_layout(convert_group_mamba, small, ours)
    expected = dict(zip(small.facts["grad_norm_names"], small.arrays[f"{run}/grad_norm"], strict=True))
    norms = {name: grads[name].norm().item() for name in expected}
    # Exactly zero where nothing depends on a parameter; below 1e-4 rounding noise.
    assert {name for name in norms if norms[name] == 0} == {name for name in expected if expected[name] == 0}
    compared = {name for name in expected if expected[name] > 1e-4}
    assert len(compared) > 0.7 * len(expected)
    for name in compared:
        assert norms[name] == pytest.approx(expected[name], rel=0.02), name
    for key in small.arrays:
        if key.startswith(f"{run}/grad/"):
            name, kept = key.removeprefix(f"{run}/grad/"), small.arrays[key]
            found = grads[name].flatten()[: kept.size]
            np.testing.assert_allclose(found, kept, rtol=0, atol=0.02 * np.abs(kept).max() + 1e-6, err_msg=key)
    if training:
        assert_statistics(model, small)


def test_gradients_of_rectangles_are_not_the_published_ones(small: goldens.Golden) -> None:
    # The published backward pass exchanges height and width in two of the groups.
    assert np.array_equal(small.arrays["rect_official/logits"], small.arrays["rect_exact/logits"])
    model = mini(small)
    x = image(2, 64, 96).requires_grad_()
    model(x).square().mean().backward()
    kept = small.arrays["rect_official/input_grad_slice"]
    assert x.grad is not None
    assert np.abs(x.grad[:, :, :8, -8:].numpy() - kept).max() > 0.2 * np.abs(kept).max()


def test_every_eps_is_the_published_one(small: goldens.Golden) -> None:
    # Weights made so small that each eps shows in the logits.
    state = small.state_dict()
    for key in state:
        factor = next((f for pattern, f in small.facts["eps_rules"] if re.search(pattern, key)), None)
        if factor is not None:
            state[key] = state[key] * factor
    with torch.inference_mode():
        assert_close(mini(small, state)(image(2, 64, 64)), small, "eps/logits", EPS_TOLERANCE)


def test_routes_are_the_published_ones(small: goldens.Golden) -> None:
    ss2d = mini(small).stages[0].blocks[0].mixer.ss2d
    for k, tokens in enumerate(build_routes(ss2d.paths, 3, 4).read, 1):
        assert tokens.tolist() == small.arrays[f"scan_order/{k}"].tolist()


def test_published_weight_decay(small: goldens.Golden) -> None:
    model = mini(small)
    names = model.published_no_weight_decay()
    marks = {name: torch.full_like(p, float(name in names)) for name, p in model.named_parameters()}
    marked = goldens.in_published_layout(convert_group_mamba, small, marks)
    spared = {key for key, mark in marked.items() if bool((mark == 1).all())}
    assert spared == set(small.facts["no_weight_decay"])
    assert all(bool((mark == 0).all()) for key, mark in marked.items() if key in marks.keys() - spared)
