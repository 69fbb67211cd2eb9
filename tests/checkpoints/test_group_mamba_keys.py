"""Official GroupMamba keys, and strict loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import goldens
from vision_ssm.checkpoints import CheckpointError, check_fit, convert_official, load_strict, read_checkpoint
from vision_ssm.checkpoints.group_mamba import convert_group_mamba
from vision_ssm.models import GroupMamba

GOLDEN = goldens.load("groupmamba_mini")
OFFICIAL = GOLDEN.state_dict()


def mini(**options: Any) -> GroupMamba:
    return GroupMamba(
        dims=(32, 48, 68, 96), depths=(1, 2, 2, 1), mlp_ratios=(8, 8, 4, 4), stem_dim=8, num_classes=10, **options
    )


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_every_published_key_fits(size: str) -> None:
    golden = goldens.load(f"groupmamba_{size[0]}")
    assert len(golden.facts["state_dict"]) == golden.facts["num_state_dict_entries"]
    state = {key: torch.empty(shape, device="meta") for key, shape in golden.facts["state_dict"]}
    name = f"group_mamba_{size}"
    check_fit(timm.create_model(name, device="meta"), convert_official(name, state))


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda state: {"model_ema": state, "max_accuracy": 83.3},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
    ],
    ids=["bare", "averaged", "data-parallel"],
)
def test_every_form_gives_the_published_logits(tmp_path: Path, wrap: Any) -> None:
    torch.save(wrap(OFFICIAL), tmp_path / "weights.pth")
    model = mini().eval()
    load_strict(model, convert_group_mamba(read_checkpoint(tmp_path / "weights.pth").state))
    with torch.inference_mode():
        y = model(torch.from_numpy(goldens.fill.image(2, 64, 64)))
    torch.testing.assert_close(y, torch.from_numpy(GOLDEN.arrays["eval/logits"]), rtol=0, atol=1e-4)


def test_our_own_keys_pass_through() -> None:
    ours = mini().state_dict()
    found = convert_group_mamba(ours)
    assert all(found[key] is value for key, value in ours.items())
    assert convert_group_mamba(convert_group_mamba(OFFICIAL)).keys() == ours.keys()


def test_conversion_leaves_its_argument_alone() -> None:
    before = dict(OFFICIAL)
    convert_group_mamba(OFFICIAL)
    assert OFFICIAL.keys() == before.keys()
    assert all(OFFICIAL[key] is value for key, value in before.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("patch_embed1.proj.bias"), "1 missing: stem.conv4.bias"),
        (lambda s: s.update({"block1.0.extra": torch.zeros(1)}), "1 unexpected: block1.0.extra"),
        (
            lambda s: s.update({"head.weight": torch.zeros(5, 96)}),
            r"1 of another shape: head.fc.weight \(file \(5, 96\), model \(10, 96\)\)",
        ),
        (
            lambda s: s.update({"post_network.0.attn.mamba_g1.other": torch.zeros(3)}),
            "1 unexpected: post_network.0.attn.mamba_g1.other",
        ),
    ],
    ids=["missing", "unexpected", "shape", "group-unknown"],
)
def test_strict_loading_lists_what_does_not_fit(change: Any, message: str) -> None:
    state = dict(OFFICIAL)
    change(state)
    with pytest.raises(CheckpointError, match="the weights do not fit GroupMamba: .*" + message):
        load_strict(mini(), convert_group_mamba(state))


def test_groups_that_do_not_fit_together() -> None:
    state = dict(OFFICIAL)
    del state["block3.1.attn.mamba_g2.Ds"]
    state["block3.1.attn.mamba_g1.dt_projs_bias"] = torch.zeros(1, 3)
    with pytest.raises(CheckpointError) as caught:
        convert_group_mamba(state)
    message = str(caught.value)
    assert "missing block3.1.attn.mamba_g2.Ds" in message
    assert "block3.1.attn.mamba_g1.dt_projs_bias (1, 3) where the other groups have (1, 17)" in message
    assert message.count("mamba_g") == 2


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    state = timm.create_model("group_mamba_atto").state_dict()
    torch.save(state, path)
    return path, state


@pytest.mark.parametrize(
    "options",
    [{}, dict(distilled=False), dict(num_classes=7), dict(features_only=True), dict(in_chans=1)],
    ids=lambda options: ",".join(options) or "plain",
)
def test_pretrained_with_other_heads(file: tuple[Path, dict[str, Tensor]], options: dict[str, Any]) -> None:
    path, state = file
    model = timm.create_model(
        "group_mamba_atto", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **options
    )
    loaded = (model.model if "features_only" in options else model).state_dict()
    same = {key for key, value in loaded.items() if value.shape == state[key].shape and torch.equal(value, state[key])}
    other: set[str] = {"stem.conv1.weight"} if "in_chans" in options else set()
    if "num_classes" in options:
        other = {f"head.{name}.{part}" for name in ("fc", "fc_dist") for part in ("weight", "bias")}
    assert loaded.keys() - same == other
    assert any("fc_dist" in key for key in loaded) == (not {"distilled", "features_only"} & options.keys())
