"""Make a detector from its name and the name of a timm model."""

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
from vision_ssm.detectors.two_stage import FasterRCNN, MaskRCNN
from vision_ssm.errors import InputError, nearest
from vision_ssm.models.create import create_model, default_cfg
from vision_ssm.models.registry import registered_models

DETECTORS: dict[str, type[FasterRCNN | RetinaNet]] = {
    "mask-rcnn": MaskRCNN,
    "faster-rcnn": FasterRCNN,
    "retinanet": RetinaNet,
}

# Arguments that models get where they take them: what the published detection backbones have, and free image sizes.
_ARGS = {"feature_norm": True, "learnable_scale": True, "strict_img_size": False, "dynamic_img_size": True}


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
    if num_classes < 1:
        raise InputError(f"a detector needs at least one class, got num_classes={num_classes}")
    args = dict(model_args or {})
    classes = None if backbone_state is None else _count_classes(model, backbone_state)
    with torch.device("meta"):
        plain = create_model(model, args, classes)
    accepted = inspect.signature(type(plain)).parameters
    args = {key: value for key, value in _ARGS.items() if key in accepted} | args
    taken = _levels(detector, model, plain, out_indices or ())
    more: dict[str, Any] = dict(features_only=True, out_indices=taken)
    if backbone_state is not None:
        if model.split(".")[0] not in registered_models():  # ours are checked when they are loaded
            check_fit(plain, dict(backbone_state))
        more["pretrained_cfg_overlay"] = dict(state_dict=dict(backbone_state))
    backbone = create_model(model, args, pretrained=backbone_pretrained or backbone_state is not None, **more)
    for module in backbone.modules():  # timm would keep the weights a second time
        for cfg in (getattr(module, "pretrained_cfg", None), getattr(module, "default_cfg", None)):
            if isinstance(cfg, dict) and "state_dict" in cfg:
                cfg["state_dict"] = None
    _check_maps(backbone, model)
    made = DETECTORS[detector](backbone, num_classes, width=width)
    made.backbone_name = model
    return made


def _count_classes(model: str, state: Mapping[str, Tensor]) -> int:
    heads = (f"{name}.weight" for name in classifier_names(default_cfg(model).classifier))
    return next((len(state[head]) for head in heads if head in state), 0)


def _levels(detector: str, model: str, plain: nn.Module, chosen: Sequence[int]) -> list[int]:
    """Return the indices of the maps that the pyramid takes."""
    info = getattr(plain, "feature_info", None) or []
    if wrong := [index for index in chosen if index not in range(len(info))]:
        raise InputError(f"{model} has maps 0 to {len(info) - 1}, got {', '.join(map(str, wrong))}")
    taken = list(chosen) or list(range(len(info)))[-4:][-3 if detector == "retinanet" else -4 :]
    strides = [info[i]["reduction"] for i in taken]
    if len(taken) < 2 or any(fine * 2 != coarse for fine, coarse in pairwise(strides)):
        found = f"{model} gives maps of strides {', '.join(map(str, strides))}" if strides else f"{model} gives no maps"
        raise InputError(f"{found}; a detector needs at least two, each of twice the stride of the one before")
    return taken


def _check_maps(backbone: nn.Module, model: str) -> None:
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
            f"{model} does not take images of {height}x{width}, as a detector needs it to: {reason}"
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
