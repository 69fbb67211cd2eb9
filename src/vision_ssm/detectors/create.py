"""Make a detector or a segmenter from its name and the name of a timm model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vision_ssm.checkpoints import check_fit, classifier_names
from vision_ssm.detectors.detector import Detector, to_nchw
from vision_ssm.detectors.retinanet import RetinaNet
from vision_ssm.detectors.segmenter import Segmenter, SmpSegmenter, UperNet
from vision_ssm.detectors.two_stage import FasterRCNN, MaskRCNN
from vision_ssm.errors import InputError, nearest
from vision_ssm.models.create import create_model, default_cfg
from vision_ssm.models.registry import registered_models

DETECTORS: dict[str, type[FasterRCNN | RetinaNet]] = {
    "mask-rcnn": MaskRCNN,
    "faster-rcnn": FasterRCNN,
    "retinanet": RetinaNet,
}
SMP_DECODERS = ("unet", "unetplusplus", "fpn", "linknet", "manet", "segformer")
"""Decoders of segmentation_models_pytorch that use all maps of any backbone; its DeepLabs and PAN need dilated ones."""

# Arguments that models get where they take them: what the published backbones have, and free image sizes.
_ARGS = {"feature_norm": True, "strict_img_size": False, "dynamic_img_size": True}
_DETECTOR_ARGS = {**_ARGS, "learnable_scale": True}


def create_detector(
    detector: str,
    model: str,
    model_args: Mapping[str, Any] | None = None,
    num_classes: int = 80,
    *,
    width: int = 256,
    out_indices: Sequence[int] | None = None,
    backbone_state: Mapping[str, Tensor] | None = None,
    backbone_pretrained: bool = False,
) -> Detector:
    """Make a detector in its published form, on any timm model that gives maps of several strides.

    The pyramid takes the last four levels of the backbone, or all if there are fewer; RetinaNet takes the last three of
    these. Our own models have a norm after every stage and SparX-Mamba learnable attention scales, as published.

    Args:
        detector: A name in ``DETECTORS``: mask-rcnn, faster-rcnn or retinanet.
        model: The backbone's name in timm.
        model_args: Arguments of the backbone; they win over those that are set here.
        num_classes: Number of classes, without background.
        width: Number of channels of pyramid and heads; 256 in the published form.
        out_indices: Which of the backbone's maps to take instead; the first one is 0.
        backbone_state: Weights of the classification model to start the backbone from, checked strictly.
        backbone_pretrained: Start from the weights that timm, or the authors of our models, published.

    Raises:
        InputError: A name or an argument is wrong, or the model cannot be the backbone of a detector.
        CheckpointError: ``backbone_state`` belongs to another model.
    """
    if detector not in DETECTORS:
        raise InputError(
            f"unknown detector {detector}, choose from {', '.join(DETECTORS)}{nearest(detector, DETECTORS)}"
        )
    _check_classes("detector", num_classes)
    last = 3 if detector == "retinanet" else 4
    start: dict[str, Any] = dict(state=backbone_state, pretrained=backbone_pretrained)
    backbone = _create_backbone("detector", model, model_args or {}, out_indices or (), last, **start)
    made = DETECTORS[detector](backbone, num_classes, width=width)
    made.backbone_name = model
    return made


def create_segmenter(
    decoder: str,
    model: str,
    model_args: Mapping[str, Any] | None = None,
    num_classes: int = 150,
    *,
    width: int = 512,
    out_indices: Sequence[int] | None = None,
    backbone_state: Mapping[str, Tensor] | None = None,
    backbone_pretrained: bool = False,
) -> Segmenter:
    """Make a semantic segmenter on any timm model that gives maps of several strides.

    Args:
        decoder: upernet in its published form, or a decoder of segmentation_models_pytorch (``SMP_DECODERS``).
        model: The backbone's name in timm.
        model_args: Arguments of the backbone; they win over those of the published form (see :func:`create_detector`).
        num_classes: Number of classes.
        width: Number of channels of upernet; 512 in the published form.
        out_indices: Which of the backbone's maps to take; by default upernet takes the last four, the others all.
        backbone_state: Weights of the classification model to start the backbone from, checked strictly.
        backbone_pretrained: Start from the weights that timm, or the authors of our models, published.

    Raises:
        InputError: A name or an argument is wrong, or the model cannot be the backbone of a segmenter.
        CheckpointError: ``backbone_state`` belongs to another model.
    """
    if decoder not in (known := ("upernet", *SMP_DECODERS)):
        raise InputError(f"unknown decoder {decoder}, choose from {', '.join(known)}{nearest(decoder, known)}")
    _check_classes("segmenter", num_classes)
    start: dict[str, Any] = dict(state=backbone_state, pretrained=backbone_pretrained)
    last = 4 if decoder == "upernet" else 5
    backbone = _create_backbone("segmenter", model, model_args or {}, out_indices or (), last, **start)
    made = UperNet(backbone, num_classes, width) if decoder == "upernet" else _smp(decoder, backbone, num_classes)
    made.backbone_name = model
    return made


def _smp(decoder: str, backbone: nn.Module, num_classes: int) -> Segmenter:
    """Return a segmenter whose decoder is made for an encoder of the backbone's widths and strides."""
    import segmentation_models_pytorch as smp

    info: Any = backbone.feature_info
    strides, widths = list(info.reduction()), list(info.channels())
    if strides[0] not in (2, 4) or not 3 <= (depth := len(strides) + strides[0] // 4) <= 5:
        raise InputError(f"{decoder} needs maps from stride 2 or 4 to 8, 16 or 32, got {', '.join(map(str, strides))}")
    options: dict[str, Any] = dict(encoder_depth=depth, encoder_weights=None, classes=num_classes)
    if decoder in ("unet", "unetplusplus", "manet"):
        options["decoder_channels"] = (256, 128, 64, 32, 16)[-depth:]
    known = smp.encoders.encoders
    out_channels = [3, *([0] if strides[0] == 4 else []), *widths]
    known[__name__] = {"encoder": _Widths, "params": dict(out_channels=out_channels)}
    try:
        made = smp.create_model(decoder, __name__, **options)
    finally:
        del known[__name__]
    return SmpSegmenter(backbone, made.decoder, made.segmentation_head)


class _Widths(nn.Module):
    """What the decoders of segmentation_models_pytorch ask an encoder for when they are made."""

    def __init__(self, out_channels: list[int], depth: int, output_stride: int) -> None:
        super().__init__()
        self.out_channels, self.output_stride = out_channels, output_stride

    def set_in_channels(self, in_channels: int, pretrained: bool) -> None:
        """Return at once: it has no layers."""


def _check_classes(what: str, num_classes: int) -> None:
    if num_classes < 1:
        raise InputError(f"a {what} needs at least one class, got num_classes={num_classes}")


def _create_backbone(
    what: str, model: str, model_args: Mapping[str, Any], chosen: Sequence[int], last: int, *,
    state: Mapping[str, Tensor] | None, pretrained: bool,
) -> nn.Module:  # fmt: skip
    """Return timm's extractor of the chosen maps, or of the last ones, with the arguments of the published form."""
    args = dict(model_args)
    classes = None if state is None else _count_classes(model, state)
    with torch.device("meta"):
        plain = create_model(model, args, classes)
    accepted = inspect.signature(type(plain)).parameters
    own = _DETECTOR_ARGS if what == "detector" else _ARGS
    args = {key: value for key, value in own.items() if key in accepted} | args
    more: dict[str, Any] = dict(features_only=True, out_indices=_levels(what, model, plain, chosen, last))
    if state is not None:
        if model.split(".")[0] not in registered_models():  # ours are checked when they are loaded
            check_fit(plain, dict(state))
        more["pretrained_cfg_overlay"] = dict(state_dict=dict(state))
    backbone = create_model(model, args, pretrained=pretrained or state is not None, **more)
    for module in backbone.modules():  # timm would keep the weights a second time
        for cfg in (getattr(module, "pretrained_cfg", None), getattr(module, "default_cfg", None)):
            if isinstance(cfg, dict) and "state_dict" in cfg:
                cfg["state_dict"] = None
    _check_maps(backbone, what, model)
    return backbone


def _count_classes(model: str, state: Mapping[str, Tensor]) -> int:
    heads = (f"{name}.weight" for name in classifier_names(default_cfg(model).classifier))
    return next((len(state[head]) for head in heads if head in state), 0)


def _levels(what: str, model: str, plain: nn.Module, chosen: Sequence[int], last: int) -> list[int]:
    """Return the indices of the maps to take, of the last four levels (of five for the decoders that take five)."""
    info = getattr(plain, "feature_info", None) or []
    if wrong := [index for index in chosen if index not in range(len(info))]:
        raise InputError(f"{model} has maps 0 to {len(info) - 1}, got {', '.join(map(str, wrong))}")
    taken = list(chosen) or list(range(len(info)))[-max(last, 4) :][-last:]
    strides = [info[i]["reduction"] for i in taken]
    if len(taken) < 2 or any(fine * 2 != coarse for fine, coarse in pairwise(strides)):
        found = f"{model} gives maps of strides {', '.join(map(str, strides))}" if strides else f"{model} gives no maps"
        raise InputError(f"{found}; a {what} needs at least two, each of twice the stride of the one before")
    return taken


def _check_maps(backbone: nn.Module, what: str, model: str) -> None:
    """Refuse a backbone that does not take images of any size, and freeze what its maps do not depend on.

    RetinaNet leaves out the first map, and with it the norm of that stage: DistributedDataParallel would wait for its
    gradient.
    """
    height, width = 64, 96
    info: Any = backbone.feature_info
    expected = [
        (channels, -(-height // stride), -(-width // stride))
        for channels, stride in zip(info.channels(), info.reduction(), strict=True)
    ]
    parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    try:
        images = torch.zeros(1, 3, height, width, device=next(backbone.parameters()).device)
        maps = to_nchw(backbone, backbone.eval()(images))
    except Exception as error:  # models raise anything
        reason = str(error) or type(error).__name__
        raise InputError(
            f"{model} does not take images of {height}x{width}, as a {what} needs it to: {reason}"
        ) from error
    if (found := [tuple(x.shape[1:]) for x in maps]) != expected:
        raise InputError(f"{model} gives maps of shapes {found} for images of {height}x{width}, expected {expected}")
    if torch.is_grad_enabled():
        total = torch.stack([x.sum() for x in maps]).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                parameter.requires_grad_(False)
    backbone.train()
