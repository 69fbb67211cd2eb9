"""Official VMamba keys, in all the forms in which they were published, and strict loading."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import goldens
import vision_ssm  # noqa: F401  (registers the models)
from vision_ssm.checkpoints import CheckpointError, load_strict, read_checkpoint
from vision_ssm.checkpoints.vmamba import convert_vmamba
from vision_ssm.models import VMamba

GOLDEN = goldens.load("vmamba_mini")
OFFICIAL = GOLDEN.state_dict()
RUN = "eval72x56"


def mini() -> VMamba:
    return VMamba(num_classes=10, dims=(16, 32, 64, 128), depths=(1, 2, 3, 1), ssm_ratio=2.0)


def pointwise_4d(state: dict[str, Tensor]) -> dict[str, Tensor]:
    four = re.compile(r"(in_proj|out_proj|fc1|fc2)\.weight$")
    return {key: value[:, :, None, None] if four.search(key) else value for key, value in state.items()}


def single_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"x_proj_weight": "x_proj.weight", "dt_projs_weight": "dt_projs.weight", "dt_projs_bias": "dt_projs.bias"}
    renamed = {}
    for key, value in state.items():
        for theirs, folded in names.items():
            if key.endswith(theirs):
                key, value = key.replace(theirs, folded), value.flatten(0, 1)
        renamed[key] = value
    return renamed


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    rules = (
        (r"^patch_embed\.0\.", "patch_embed.proj."),
        (r"^patch_embed\.2\.", "patch_embed.norm."),
        (r"(blocks\.\d+)\.norm\.", r"\1.ln_1."),
        (r"\.op\.", ".self_attention."),
        (r"^classifier\.norm\.", "norm."),
        (r"^classifier\.head\.", "head."),
    )
    for pattern, name in rules:
        state = {re.sub(pattern, name, key): value for key, value in state.items()}
    return state


FORMS: dict[str, Any] = {
    "classification": dict,
    "pointwise-4d": pointwise_4d,
    "single-file": single_file,
    "old-names": old_names,
    "old-single-file-4d": lambda state: old_names(single_file(pointwise_4d(state))),
    "model-key": lambda state: {"model": state, "epoch": 264},
    "data-parallel": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_published_form_gives_the_published_logits(tmp_path: Path, form: str) -> None:
    content = FORMS[form](OFFICIAL)
    torch.save(content, tmp_path / "weights.pth")
    model = mini().eval()
    load_strict(model, convert_vmamba(read_checkpoint(tmp_path / "weights.pth").state))
    with torch.inference_mode():
        y = model(GOLDEN.image(RUN))
    torch.testing.assert_close(y, torch.from_numpy(GOLDEN.arrays[f"{RUN}.logits"]), rtol=0, atol=2e-5)


def test_forms_differ_from_one_another() -> None:
    assert len({frozenset(FORMS[form](OFFICIAL)) for form in ("classification", "single-file", "old-names")}) == 3
    assert any(value.dim() == 4 for key, value in pointwise_4d(OFFICIAL).items() if "in_proj" in key)


def test_our_own_keys_pass_through() -> None:
    ours = mini().state_dict()
    assert convert_vmamba(ours).keys() == ours.keys()
    assert convert_vmamba(convert_vmamba(OFFICIAL)).keys() == ours.keys()


def test_conversion_leaves_its_argument_alone() -> None:
    before = dict(OFFICIAL)
    convert_vmamba(OFFICIAL)
    assert OFFICIAL.keys() == before.keys()
    assert all(OFFICIAL[key] is value for key, value in before.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("patch_embed.0.bias"), "1 missing: stem.conv1.bias"),
        (lambda s: s.update({"layers.0.extra": torch.zeros(1)}), "1 unexpected: layers.0.extra"),
        (
            lambda s: s.update({"classifier.head.weight": torch.zeros(5, 128)}),
            r"1 of another shape: head.fc.weight \(file \(5, 128\), model \(10, 128\)\)",
        ),
        (
            lambda s: [s.pop("classifier.norm.weight"), s.update({"outnorm0.weight": torch.zeros(16)})],
            "1 missing: norm.weight; 1 unexpected: feature_norms.0.weight",
        ),
        (
            lambda s: [s.pop(key) for key in list(s) if key.startswith("layers.2.")],
            r"58 missing: stages\.2.* and 50 more",
        ),
    ],
    ids=["missing", "unexpected", "shape", "both", "many"],
)
def test_strict_loading_lists_what_does_not_fit(change: Any, message: str) -> None:
    state = dict(OFFICIAL)
    change(state)
    model = mini()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="the weights do not fit VMamba: .*" + message) as caught:
        load_strict(model, convert_vmamba(state))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("broken", ["dt_projs_weight", "A_logs", "Ds", "x_proj_weight"])
def test_scan_weights_of_an_impossible_shape(broken: str) -> None:
    state = dict(OFFICIAL)
    key = f"layers.1.blocks.0.op.{broken}"
    state[key] = torch.zeros(7, 3)
    with pytest.raises(CheckpointError, match=f"1 unexpected: stages.1.blocks.0.ss2d.{broken}"):
        load_strict(mini(), convert_vmamba(state))


def test_weights_of_another_model() -> None:
    other = timm.create_model("resnet10t").state_dict()
    with pytest.raises(CheckpointError, match=r"missing: .*; \d+ unexpected: conv1"):
        load_strict(mini(), convert_vmamba(other))
