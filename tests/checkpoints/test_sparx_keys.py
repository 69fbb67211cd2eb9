"""Official SparX-Mamba keys, and strict loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import goldens
from vision_ssm.checkpoints import CheckpointError, convert_official, load_strict, read_checkpoint
from vision_ssm.checkpoints.sparx import convert_sparx
from vision_ssm.models import SparXMamba

GOLDEN = goldens.load("sparx_mamba_mini")
OFFICIAL = GOLDEN.state_dict()
RUN = "eval72x56"


def mini() -> SparXMamba:
    return SparXMamba(
        num_classes=10, dims=(16, 32, 64, 128), depths=(1, 2, 7, 2), steps=(1, 1, 2, 1), windows=(None, None, 2, None)
    )


FORMS: dict[str, Any] = {
    "bare": dict,
    "model-key": lambda state: {"model": state, "epoch": 309},
    "data-parallel": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_published_logits(tmp_path: Path, form: str) -> None:
    torch.save(FORMS[form](OFFICIAL), tmp_path / "weights.pth")
    model = mini().eval()
    load_strict(model, convert_official("sparx_mamba_tiny", read_checkpoint(tmp_path / "weights.pth").state))
    with torch.inference_mode():
        y = model(GOLDEN.image(RUN))
    torch.testing.assert_close(y, torch.from_numpy(GOLDEN.arrays[f"{RUN}.logits"]), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "model", "options"),
    [
        ("sparx_mamba_t", "sparx_mamba_tiny", {}),
        ("sparx_mamba_s", "sparx_mamba_small", {}),
        ("sparx_mamba_b", "sparx_mamba_base", {}),
        ("sparx_mamba_t_detection", "sparx_mamba_tiny", dict(feature_norm=True, learnable_scale=True)),
        ("sparx_mamba_t_segmentation", "sparx_mamba_tiny", dict(feature_norm=True)),
    ],
    ids=lambda value: value if isinstance(value, str) and "_mamba_t_" in value else "",
)
def test_every_published_key_has_its_place(name: str, model: str, options: dict[str, Any]) -> None:
    golden = goldens.load(name)
    found = convert_sparx({key: torch.empty(shape, device="meta") for key, shape in golden.facts["state_dict"]})
    own = timm.create_model(model, device="meta", **options).state_dict()
    if options:  # a backbone has no classifier
        own = {key: value for key, value in own.items() if not key.startswith(("norm.", "head."))}
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in own.items()}


def test_our_own_keys_pass_through() -> None:
    ours = mini().state_dict()
    assert convert_sparx(ours).keys() == ours.keys()
    assert convert_sparx(convert_sparx(OFFICIAL)).keys() == ours.keys()


def test_conversion_leaves_its_argument_alone() -> None:
    before = dict(OFFICIAL)
    convert_sparx(OFFICIAL)
    assert OFFICIAL.keys() == before.keys()
    assert all(OFFICIAL[key] is value for key, value in before.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("patch_embed.0.weight"), "1 missing: stem.conv1.weight"),
        (lambda s: s.update({"layers.0.extra": torch.zeros(1)}), "1 unexpected: layers.0.extra"),
        (lambda s: s.update({"patch_embed.9.bias": torch.zeros(1)}), "1 unexpected: patch_embed.9.bias"),
        (
            lambda s: s.update({"layers.1.blocks.1.op.scale": torch.zeros(1)}),
            "1 unexpected: stages.1.blocks.1.dmca.attention.scale",
        ),
        (
            lambda s: s.update({"classifier.3.weight": torch.zeros(5, 128)}),
            r"1 of another shape: head.fc.weight \(file \(5, 128\), model \(10, 128\)\)",
        ),
        (
            lambda s: s.update({"layers.2.blocks.0.op.Ds": torch.zeros(7, 3)}),
            "1 missing: stages.2.blocks.0.ss2d.D; 1 unexpected: stages.2.blocks.0.ss2d.Ds",
        ),
    ],
    ids=["missing", "unexpected", "stem", "detection", "shape", "scan"],
)
def test_strict_loading_lists_what_does_not_fit(change: Any, message: str) -> None:
    state = dict(OFFICIAL)
    change(state)
    with pytest.raises(CheckpointError, match="the weights do not fit SparXMamba: .*" + message):
        load_strict(mini(), convert_sparx(state))


def test_a_file_of_the_other_families_does_not_fit() -> None:
    with pytest.raises(CheckpointError, match=r"missing: .*; \d+ unexpected"):
        load_strict(mini(), convert_sparx(goldens.load("vmamba_mini").state_dict()))
