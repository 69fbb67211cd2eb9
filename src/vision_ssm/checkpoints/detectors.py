"""Published detectors and segmenters: their keys, and ours.

Covers what mmdet 3 writes for Mask R-CNN, Faster R-CNN (``configs/_base_/models/mask-rcnn_r50_fpn.py``) and RetinaNet
(``configs/pvt/retinanet_pvt-t_fpn_1x_coco.py``), and mmseg 1 for UPerNet (``configs/_base_/models/upernet_swin.py``),
with the backbones of this package in their published layout inside.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from vision_ssm.checkpoints.families import can_convert, rules_of
from vision_ssm.checkpoints.rules import Rules, State, apply_rules, convert, invert, within

_PYRAMID: Rules = {
    "neck.lateral_convs.#.conv.": "fpn.inner_blocks.#.0.",
    "neck.fpn_convs.#.conv.": "fpn.layer_blocks.#.0.",
}
TWO_STAGE: Rules = {
    **_PYRAMID,
    **within("rpn_head.rpn_", "rpn_head.", {"conv.": "conv.0.0.", "cls.": "cls_logits.", "reg.": "bbox_pred."}),
    **within("roi_head.bbox_head.shared_fcs.", "box_head.", {"0.": "fc6.", "1.": "fc7."}),
    **within("roi_head.bbox_head.fc_", "", {"cls.": "cls_score.", "reg.": "bbox_pred."}),
    "roi_head.mask_head.convs.#.conv.": "mask_head.#.0.",
    "roi_head.mask_head.upsample.": "mask_predictor.conv5_mask.",
    "roi_head.mask_head.conv_logits.": "mask_predictor.mask_fcn_logits.",
}
RETINANET: Rules = {
    # P6 and P7 follow the three levels of the backbone.
    **within("neck.fpn_convs.", "fpn.extra_blocks.", {"3.conv.": "p6.", "4.conv.": "p7."}),
    **_PYRAMID,
    **within("bbox_head.cls_convs.#.conv.", "head.classification_head.conv.#.0.", {"": ""}),
    **within("bbox_head.reg_convs.#.conv.", "head.regression_head.conv.#.0.", {"": ""}),
    "bbox_head.retina_cls.": "head.classification_head.cls_logits.",
    "bbox_head.retina_reg.": "head.regression_head.bbox_reg.",
}
_BLOCKS = (
    *(f"decode_head.{name}." for name in ("psp_modules.#.1", "bottleneck", "lateral_convs.#", "fpn_convs.#")),
    *("decode_head.fpn_bottleneck.", "auxiliary_head.convs.#."),
)
UPERNET: Rules = {
    **{f"{block}conv.": f"{block}conv." for block in _BLOCKS},
    **{f"{block}bn.": f"{block}batch_norm." for block in _BLOCKS},
    **{f"{head}.conv_seg.": f"{head}.classifier." for head in ("decode_head", "auxiliary_head")},
}
_HEADS = {"retinanet": RETINANET, "upernet": UPERNET}
# The first of these that begins a name of a file tells its kind; published and our own names.
_KINDS = {
    "bbox_head.": "retinanet",
    "head.classification_head.": "retinanet",
    "roi_head.mask_head.": "mask-rcnn",
    "mask_predictor.": "mask-rcnn",
    "roi_head.": "faster-rcnn",
    "box_head.": "faster-rcnn",
    "decode_head.": "upernet",
}


def detector_of(names: Iterable[str]) -> str | None:
    """Return which detector or segmenter has weights of these names, published or ours, or None."""
    names = list(names)
    return next((kind for prefix, kind in _KINDS.items() if any(name.startswith(prefix) for name in names)), None)


def convert_detector(model: str, state: State) -> State:
    """Map a published state dict of a detector or segmenter to our names.

    Raises:
        CheckpointError: If there is no conversion for that backbone, or tensors that are joined do not fit together.
    """
    return convert(_rules(model, state), state)


def trace_detector(model: str, state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the names of the published tensors of which each of ours is made."""
    return {key: theirs for key, (_, theirs) in apply_rules(_rules(model, state), state).items()}


def detector_no_decay(detector: nn.Module, model: str) -> set[str]:
    """Return the names of the parameters that the published training of a detector excludes from weight decay.

    Those are the ones whose full published name contains "norm". So norms that it calls by a number, biases, and the
    parameters of the scan are decayed. A backbone without a published layout goes by its own names. RetinaNet decays
    all.

    Args:
        detector: The detector.
        model: Its backbone's name in timm's registry.

    Source: ``norm_decay_mult`` in mmengine's ``optim/optimizer/default_constructor.py``, set by the configurations of
    Mask R-CNN and UPerNet on VMamba and SparX and not by that of RetinaNet on PVT.
    """
    names = [name for name, _ in detector.named_parameters()]
    if detector_of(names) == "retinanet":
        return set()
    published = invert(_rules(model, names), names) if can_convert(model) else {name: [name] for name in names}
    return {name for name, theirs in published.items() if any("norm" in key for key in theirs)}


def _rules(model: str, names: Iterable[str]) -> Rules:
    heads = _HEADS.get(detector_of(names) or "", TWO_STAGE)
    backbone = [name.removeprefix("backbone.").removeprefix("model.") for name in names]
    return {**within("backbone.", "backbone.model.", rules_of(model, backbone)), **heads}
