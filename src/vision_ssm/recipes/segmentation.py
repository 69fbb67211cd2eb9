"""How the published segmenters were trained on ADE20K; where sources give the same value, the last one counts.

`batch_size` and `grad_accum` are the images of one GPU and the number of GPUs, as in the recipes for classification.
"""

from collections.abc import Sequence
from typing import Any

from vision_ssm.recipes.config import SegmentationConfig
from vision_ssm.recipes.recipe import Recipe, Sourced

_SWIN = "mmseg 1.2.2, configs/swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
_GPUS = dict(batch_size=2, grad_accum=8)
# The rate is whole at the last step of the warmup, not after it.
_UPERNET: dict[str, Any] = dict(
    decoder="upernet", backbone_weights=True, test_size=(2048, 512), mode="whole", scale=(0.5, 2.0), crop_size=512,
    max_class_share=0.75, photometric=True, hflip=0.5, ignore_labels=(0,), optimizer="adamw", lr=6e-5, min_lr=0.0,
    warmup_lr=6e-11, warmup_steps=1499, warmup_prefix=True, schedule="poly", steps=160_000, betas=(0.9, 0.999),
    weight_decay=0.01, clip_grad=None, precision="32-true", published_decay=True,
)  # fmt: skip

_AS_PUBLISHED = " as its published weights were trained on ADE20K"
_FOLLOWING = " on ADE20K following the paper; no weights were published"
_BATCH_NORMS = "Batch norms shared their statistics between the GPUs, 16 images; here each 2 images have their own."


def _recipe(text: str, values: Sourced, notes: Sequence[str] = ()) -> Recipe:
    model = next(part["model"] for part in values.values() if "model" in part)
    given = {f"{_SWIN}: 8 GPUs of 2 images": _GPUS, _SWIN: _UPERNET, **values}
    return Recipe(f"{model.replace('_', '-')}-upernet-160k", text, given, (_BATCH_NORMS, *notes), SegmentationConfig)


def _vmamba(model: str, drop_path_rate: float, config: str, iteration: int = 160_000) -> Recipe:
    where = f"MzeroMiko/VMamba@2ed52ea, segmentation/configs/vssm1/upernet_vssm_4xb4-160k_ade20k-512x512_{config}.py"
    notes = ["Its file name says 4 GPUs of 4 images, its base configuration 8 of 2; both are 16 per step."]
    notes += [f"The published weights are of iteration {iteration:,}; how it was chosen is not stated."][
        : iteration < 160_000
    ]
    values: Sourced = {where: dict(model=model, drop_path_rate=drop_path_rate)}
    return _recipe("UPerNet on VMamba" + _AS_PUBLISHED, values, notes)


def _sparx_mamba(size: str, drop_path_rate: float) -> Recipe:
    where = f"LMMMEng/SparX@7fdb991, segmentation/configs/upernet_sparx_mamba_{size[0]}_ade20k.py"
    own = dict(model=f"sparx_mamba_{size}", drop_path_rate=drop_path_rate, size_multiple=32)
    notes = ("The published weights are those of the best measurement on the validation images.",)
    return _recipe("UPerNet on SparX-Mamba" + _AS_PUBLISHED, {where: own}, notes)


def _efficient_vmamba(size: str) -> Recipe:
    paper = "arXiv 2403.09977: as VMamba"
    stated = dict(model=f"efficient_vmamba_{size}", optimizer="adamw", lr=6e-5, steps=160_000, drop_path_rate=0.2)
    values: Sourced = {paper: stated}
    return _recipe("UPerNet on EfficientVMamba" + _FOLLOWING, values)


def _group_mamba() -> Recipe:
    values: Sourced = {
        "arXiv 2407.13772, section 4.3": dict(model="group_mamba_tiny", optimizer="adamw", lr=6e-5, steps=160_000),
        "not stated; as VMamba-T": dict(drop_path_rate=0.2),
    }
    notes = ("The backbone starts from the distilled classifier.",)
    return _recipe("UPerNet on GroupMamba" + _FOLLOWING, values, notes)


def _vim2(size: str, drop_path_rate: float) -> Recipe:
    values: Sourced = {
        "arXiv 2403.19888v1, section 6": dict(model=f"vim2_{size}", optimizer="adamw", lr=6e-5, crop_size=512),
        "not stated; as VMamba, whose pipeline it names": dict(drop_path_rate=drop_path_rate),
        "no classifier was published": dict(backbone_weights=False),
    }
    notes = (
        "Code and weights were never published; the models are in the paper's style.",
        "Start from a classifier of your own with --backbone-weights.",
    )
    return _recipe("UPerNet on ViM2" + _FOLLOWING, values, notes)


SEGMENTATION = (
    _vmamba("vmamba_tiny", 0.2, "tiny"),
    _vmamba("vmamba_tiny_s2l5", 0.2, "tiny1"),
    _vmamba("vmamba_small", 0.3, "small", 144_000),
    _vmamba("vmamba_base", 0.6, "base"),
    *(_sparx_mamba(size, rate) for size, rate in (("tiny", 0.2), ("small", 0.4), ("base", 0.5))),
    *(_efficient_vmamba(size) for size in ("tiny", "small", "base")),
    _group_mamba(),
    *(_vim2(size, rate) for size, rate in (("tiny", 0.2), ("small", 0.3))),
)
"""The recipes of the published segmenters."""
