"""Which conversion belongs to which model, and what it does with the tensors of a file."""

from __future__ import annotations

import pytest
import timm
import torch

from official_names import official
from vision_ssm.checkpoints import (
    CheckpointError,
    can_convert,
    convert_official,
    options_of,
    same_family,
    trace_official,
)
from vision_ssm.checkpoints.rules import To
from vision_ssm.models.registry import registered_models


def test_conversions() -> None:
    assert can_convert("vmamba_tiny")
    assert same_family("vmamba_tiny", "vmamba_base_s1l20")
    assert not can_convert("resnet18")
    assert not same_family("resnet18", "resnet18")
    with pytest.raises(CheckpointError, match=r"no conversion .* for resnet18; there is one for .*, vmamba_\*"):
        convert_official("resnet18", {})


@pytest.mark.parametrize("name", registered_models())
def test_what_is_published_can_be_converted(name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    assert can_convert(name) or not (cfg.url or cfg.hf_hub_id)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("feature_norms.0.weight", {"feature_norm": True}),
        ("stages.1.blocks.1.dmca.attention.scale", {"learnable_scale": True}),
        ("stages.1.blocks.1.norm1.weight", {}),
    ],
)
def test_options_that_tensors_tell_of(key: str, options: dict[str, bool]) -> None:
    assert options_of({"stem.conv1.weight": torch.ones(1), key: torch.ones(1)}) == options


def test_tracing() -> None:
    state = official(timm.create_model("vmamba_atto", depths=(1, 1), dims=(8, 16)).state_dict())
    traced = trace_official("vmamba_atto", state | {"unknown": torch.ones(2, 0)})
    assert traced["stem.conv1.weight"] == ["patch_embed.0.weight"]
    assert traced["stages.1.downsample.norm.bias"] == ["layers.0.downsample.3.bias"]
    assert traced["stages.1.blocks.0.ss2d.dt_weight"] == ["layers.1.blocks.0.op.dt_projs_weight"]
    assert traced["stages.1.blocks.0.ss2d.A_log"] == ["layers.1.blocks.0.op.A_logs"]
    assert sorted(name for names in traced.values() for name in names) == sorted([*state, "unknown"])


def test_tracing_tensors_that_are_joined_split_and_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {
        "{b,a}.weight": To("all", by=torch.cat),
        "c": To("first", "second", by=lambda value: tuple(value.chunk(2))),
        "d.": To(),
    }
    monkeypatch.setattr("vision_ssm.checkpoints.families._FAMILIES", {"vmamba_": rules})
    state = {key: torch.rand(2) for key in ("a.weight", "b.weight", "c", "d.mean")}
    traced = trace_official("vmamba_atto", state)
    assert traced == {"all": ["b.weight", "a.weight"], "first": ["c"], "second": ["c"]}
    converted = convert_official("vmamba_atto", state)
    assert torch.equal(converted["all"], torch.cat([state["b.weight"], state["a.weight"]]))
    assert torch.equal(converted["second"], state["c"][1:])
