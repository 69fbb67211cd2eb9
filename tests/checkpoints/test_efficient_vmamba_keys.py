"""Official EfficientVMamba keys and containers, and strict loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import goldens
from vision_ssm.checkpoints import CheckpointError, load_strict, read_checkpoint
from vision_ssm.checkpoints.efficient_vmamba import convert_efficient_vmamba
from vision_ssm.checkpoints.families import convert_official
from vision_ssm.models import EfficientVMamba

GOLDEN = goldens.load("efficientvmamba_mini")
OFFICIAL = GOLDEN.state_dict()
RUN = "eval60x52"


def mini() -> EfficientVMamba:
    return EfficientVMamba(num_classes=10, dims=(16, 32, 64, 128), depths=(1, 2, 2, 1))


def wrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.module.{key}": value for key, value in state.items()}


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in state.items()}


# What the file holds, and whether the averaged weights are asked for.
FORMS: dict[str, tuple[Any, bool]] = {
    "bare": (OFFICIAL, False),
    "released": ({"state_dict": wrapped(OFFICIAL)}, False),
    "trainer": ({"epoch": 3, "model": OFFICIAL, "ema_model": wrapped(zeros(OFFICIAL))}, False),
    "trainer-ema": ({"epoch": 3, "model": zeros(OFFICIAL), "ema_model": wrapped(OFFICIAL)}, True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_published_form_gives_the_published_logits(tmp_path: Path, form: str) -> None:
    content, ema = FORMS[form]
    torch.save(content, tmp_path / "weights.ckpt")
    model = mini().eval()
    state = read_checkpoint(tmp_path / "weights.ckpt", ema=ema).state
    load_strict(model, convert_official("efficient_vmamba_tiny", state))
    with torch.inference_mode():
        y = model(GOLDEN.image(RUN))
    torch.testing.assert_close(y, torch.from_numpy(GOLDEN.arrays[f"{RUN}.logits"]), rtol=0, atol=5e-6)


def test_our_own_keys_pass_through() -> None:
    ours = mini().state_dict()
    assert convert_efficient_vmamba(ours).keys() == ours.keys()
    assert convert_efficient_vmamba(convert_efficient_vmamba(OFFICIAL)).keys() == ours.keys()


def test_conversion_leaves_its_argument_alone() -> None:
    before = dict(OFFICIAL)
    convert_efficient_vmamba(OFFICIAL)
    assert OFFICIAL.keys() == before.keys()
    assert all(OFFICIAL[key] is value for key, value in before.items())


def test_keys_of_an_mlp_and_of_output_norms() -> None:
    names = {
        "layers.1.blocks.0.norm2.bias": "stages.1.blocks.0.norm2.bias",
        "layers.1.blocks.0.mlp.fc1.weight": "stages.1.blocks.0.mlp.fc1.weight",
        "outnorm2.weight": "feature_norms.2.weight",
    }
    assert list(convert_efficient_vmamba({key: torch.zeros(2) for key in names})) == list(names.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("patch_embed.0.bias"), "1 missing: stem.conv.bias"),
        (lambda s: s.update({"layers.2.1.extra": torch.zeros(1)}), "1 unexpected: stages.2.blocks.0.extra"),
        (lambda s: s.update({"layers.2.0.weight": torch.zeros(1)}), "1 unexpected: layers.2.0.weight"),
        (
            lambda s: s.update({"layers.0.blocks.0.op.x_proj_weight": torch.zeros(4, 35, 32)}),
            r"x_proj.proj.weight \(file \(140, 32, 1, 1\), model \(132, 32, 1, 1\)\)",
        ),
        (
            lambda s: s.update({"layers.0.blocks.0.op.A_logs": torch.zeros(7, 3)}),
            "1 missing: stages.0.blocks.0.ss2d.A_log; 1 unexpected: stages.0.blocks.0.ss2d.A_logs",
        ),
        # what the published class builds by default, and no published weights have
        (
            lambda s: s.update({"layers.0.downsample.1.weight": torch.zeros(1)}),
            "1 unexpected: layers.0.downsample.1.weight",
        ),
    ],
    ids=["missing", "extra", "permutation", "shape", "impossible-shape", "other-downsampling"],
)
def test_strict_loading_lists_what_does_not_fit(change: Any, message: str) -> None:
    state = dict(OFFICIAL)
    change(state)
    with pytest.raises(CheckpointError, match="the weights do not fit EfficientVMamba: .*" + message):
        load_strict(mini(), convert_efficient_vmamba(state))
