"""How the published detectors were trained on COCO train2017; where sources give the same value, the last one counts.

`batch_size` and `grad_accum` are the images of one GPU and the number of GPUs, as in the recipes for classification.
"""

from collections.abc import Sequence
from typing import Any

from vision_ssm.recipes.config import DetectionConfig
from vision_ssm.recipes.recipe import Recipe, Sourced

_SWIN = "mmdet 3.3.0, configs/swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"
_PVT = "mmdet 3.3.0, configs/pvt/retinanet_pvt-t_fpn_1x_coco.py"

_GPUS = dict(batch_size=2, grad_accum=8)
_IMAGES: dict[str, Any] = dict(
    backbone_weights=True, test_size=(1333, 800), short_sides=(800,), long_side=1333, hflip=0.5, filter_empty=True
)
# The rate starts at a thousandth and is whole at the last step of the warmup, not after it.
_OPTIM: dict[str, Any] = dict(
    optimizer="adamw", lr=1e-4, clip_grad=None, precision="32-true", published_decay=True, warmup_lr=1e-7,
    schedule="multistep", milestones=(8, 11), decay_rate=0.1, epochs=12,
)  # fmt: skip
_MASK_RCNN = dict(
    _IMAGES, **_OPTIM, detector="mask-rcnn", betas=(0.9, 0.999), weight_decay=0.05, warmup_steps=999, drop_path_rate=0.2
)
_RETINANET = dict(_IMAGES, **_OPTIM, detector="retinanet", weight_decay=1e-4, warmup_steps=499)
_SCHEDULES: dict[str, dict[str, Any]] = {
    "1x": {},
    "3x": dict(epochs=36, milestones=(27, 33), short_sides=tuple(range(480, 801, 32)), random_crop=True),
}

_AS_PUBLISHED = " as its published weights were trained on COCO"
_FOLLOWING = " on COCO following the paper; no weights were published"


def _recipe(text: str, schedule: str, values: Sourced, notes: Sequence[str] = ()) -> Recipe:
    given = {name: value for part in values.values() for name, value in part.items()}
    name = f"{given['model'].replace('_', '-')}-{given['detector']}-{schedule}"
    return Recipe(name, text, values, tuple(notes), DetectionConfig)


def _vmamba(model: str, drop_path_rate: float, config: str, schedule: str, epoch: int) -> Recipe:
    config += "_ms_3x" if schedule == "3x" else ""
    own = dict(_SCHEDULES[schedule], model=model, drop_path_rate=drop_path_rate)
    values: Sourced = {
        f"{_SWIN}: 8 GPUs of 2 images": _GPUS,
        _SWIN: _MASK_RCNN,
        f"MzeroMiko/VMamba@2ed52ea, detection/configs/vssm1/mask_rcnn_vssm_fpn_coco_{config}.py": own,
    }
    note = f"The published weights are of epoch {epoch}; how it was chosen is not stated."
    return _recipe("Mask R-CNN on VMamba" + _AS_PUBLISHED, schedule, values, [note] if epoch not in (12, 36) else [])


def _sparx_mamba(size: str, drop_path_rate: float, schedule: str) -> Recipe:
    own = dict(_SCHEDULES[schedule], model=f"sparx_mamba_{size}", drop_path_rate=drop_path_rate)
    values: Sourced = {
        f"{_SWIN}: 8 GPUs of 2 images": _GPUS,
        _SWIN: _MASK_RCNN,
        f"LMMMEng/SparX@a59b4f4, detection/config/maskrcnn_sparx_mamba_{size[0]}_fpn_{schedule}_coco.py": own,
    }
    notes = (
        "Batch norms shared their statistics between the GPUs, 16 images; here each 2 images have their own.",
        "The published weights are those of the best epoch on val2017, measured with 4 images per batch, whose padding "
        "its group norms see.",
    )
    return _recipe("Mask R-CNN on SparX-Mamba" + _AS_PUBLISHED, schedule, values, notes)


def _efficient_vmamba(size: str, schedule: str) -> Recipe:
    where = "TerryPei/EfficientVMamba@0bc5ee2, detection/configs"
    own = dict(model=f"efficient_vmamba_{size}", drop_path_rate=0.1, precision="16-mixed")
    values: Sourced = {
        f"{_SWIN}: 8 GPUs of 2 images": _GPUS,
        _SWIN: _MASK_RCNN,
        where: dict(own, **(_SCHEDULES[schedule] if size == "base" else {})),
        **({f"{where}: 3x as for B": _SCHEDULES["3x"]} if schedule == "3x" and size != "base" else {}),
    }
    notes = [
        "The paper's text differs: drop path 0.2, and a rate that starts at 1e-5 and drops after epochs 9 and 11.",
        "The released configurations of T and S have other backbones than the released classifiers, which are taken.",
    ]
    text = "Mask R-CNN on EfficientVMamba on COCO as configured by its authors; no weights were published"
    return _recipe(text, schedule, values, notes)


def _efficient_vmamba_retinanet(size: str) -> Recipe:
    paper = "arXiv 2403.09977, section 4.2: as PVT"
    values: Sourced = {
        f"{_PVT}: 8 GPUs of 2 images": _GPUS,
        _PVT: _RETINANET,
        paper: dict(model=f"efficient_vmamba_{size}"),
        "not stated; as for its Mask R-CNN": dict(drop_path_rate=0.1),
    }
    notes = ("All parameters are decayed.",)
    return _recipe("RetinaNet on EfficientVMamba" + _FOLLOWING, "1x", values, notes)


def _group_mamba() -> Recipe:
    paper = "arXiv 2407.13772, section 4.2"
    values: Sourced = {
        f"{paper}, Swin's hyperparameters; {_SWIN}: 8 GPUs of 2 images": _GPUS,
        f"{paper}, Swin's hyperparameters; {_SWIN}": _MASK_RCNN,
        paper: dict(model="group_mamba_tiny", optimizer="adamw", lr=1e-4, epochs=12, milestones=(9, 11)),
    }
    notes = ("The backbone starts from the distilled classifier.",)
    return _recipe("Mask R-CNN on GroupMamba" + _FOLLOWING, "1x", values, notes)


def _vim2(size: str, drop_path_rate: float, schedule: str) -> Recipe:
    paper, older = "arXiv 2403.19888v1, section 6", "not stated; as VMamba, whose pipeline it names"
    stated = dict(model=f"vim2_{size}", optimizer="adamw", lr=1e-4, epochs=_SCHEDULES[schedule].get("epochs", 12))
    values: Sourced = {
        f"{older}; {_SWIN}: 8 GPUs of 2 images": _GPUS,
        f"{older}; {_SWIN}": _MASK_RCNN,
        older: dict(_SCHEDULES[schedule], drop_path_rate=drop_path_rate),
        paper: stated,
        "no classifier was published": dict(backbone_weights=False),
    }
    notes = (
        "Code and weights were never published; the models are in the paper's style.",
        "Start from a classifier of your own with --backbone-weights.",
        "The table of results does not say whether they are of 12 or 36 epochs.",
    )
    return _recipe("Mask R-CNN on ViM2" + _FOLLOWING, schedule, values, notes)


DETECTION = (
    _vmamba("vmamba_tiny", 0.2, "tiny", "1x", 12),
    _vmamba("vmamba_tiny", 0.2, "tiny", "3x", 31),
    _vmamba("vmamba_tiny_s2l5", 0.2, "tiny1", "1x", 12),
    _vmamba("vmamba_tiny_s2l5", 0.2, "tiny1", "3x", 36),
    _vmamba("vmamba_small", 0.3, "small", "1x", 11),
    _vmamba("vmamba_small", 0.3, "small", "3x", 32),
    _vmamba("vmamba_base", 0.6, "base", "1x", 11),
    *(
        _sparx_mamba(size, rate, schedule)
        for size, rate in (("tiny", 0.2), ("small", 0.3), ("base", 0.45))
        for schedule in _SCHEDULES
    ),
    *(_efficient_vmamba(size, schedule) for size in ("tiny", "small", "base") for schedule in _SCHEDULES),
    *(_efficient_vmamba_retinanet(size) for size in ("tiny", "small", "base")),
    _group_mamba(),
    *(_vim2(size, rate, schedule) for size, rate in (("tiny", 0.2), ("small", 0.3)) for schedule in _SCHEDULES),
)
"""The recipes of the published detectors."""
