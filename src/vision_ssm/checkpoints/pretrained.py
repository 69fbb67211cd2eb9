"""Strict loading, and ``pretrained=True`` from the addresses where the authors published their weights."""

import copy
import logging
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from timm.models._hub import download_cached_file
from torch import nn

from vision_ssm.checkpoints.families import OPTIONS
from vision_ssm.checkpoints.reader import CheckpointError, read_checkpoint
from vision_ssm.checkpoints.rules import State
from vision_ssm.errors import shorten

Model = TypeVar("Model", bound=nn.Module)
Converter = Callable[[State], State]
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_logger = logging.getLogger(__name__)


def check_fit(model: nn.Module, state: State, adapted: Collection[str] = ()) -> None:
    """Check that weights fit a model: no missing or unexpected keys, equal shapes, floats where it has floats.

    Args:
        model: The model; it may be on the meta device.
        state: The weights.
        adapted: Keys to ignore.

    Raises:
        CheckpointError: If keys are missing, unexpected, of another shape or no floats; it lists them.
    """
    own = {key: value for key, value in model.state_dict().items() if key not in adapted}
    state = {key: value for key, value in state.items() if key not in adapted}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} (file {tuple(value.shape)}, model {tuple(own[key].shape)})"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape and (value.shape, own[key].dim()) != ((1,), 0)  # torch takes it
    ]
    kinds = [
        f"{key} ({value.dtype})"
        for key, value in state.items()
        if key in own and own[key].is_floating_point() and value.dtype not in _FLOATS
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes, "not floats": kinds}
    listed = [f"{len(keys)} {what}: {shorten(keys)}" for what, keys in problems.items() if keys]
    if listed:
        raise CheckpointError(f"the weights do not fit {type(model).__name__}: {'; '.join(listed)}", problems)


def load_strict(model: nn.Module, state: State) -> None:
    """Load all weights, or none if they do not fit.

    Raises:
        CheckpointError: See :func:`check_fit`.
    """
    check_fit(model, state)
    model.load_state_dict(state)


def classifier_names(configured: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of a model's classifiers from the entry in timm's configuration: one, several, or none."""
    return (configured,) if isinstance(configured, str) else tuple(configured or ())


def _left_out_of_features(model: nn.Module) -> list[str]:
    features: Any = copy.deepcopy(model).to("meta")
    features.prune_intermediate_layers(len(features.feature_info), prune_norm=True)
    return [*(model.state_dict().keys() - features.state_dict().keys())]


def _not_in_classifiers(own: State, state: State) -> State:
    """Return the model's own output norms and attention scales, each kind only if the file has none of it."""
    found: State = {}
    for pattern in OPTIONS:
        if not any(re.match(pattern, key) for key in state):
            found |= {key: value for key, value in own.items() if re.match(pattern, key)}
    return found


def build_from_official(
    cls: type[Model],
    variant: str,
    pretrained: bool,
    convert: Converter,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Model:
    """Build a model with timm; official weights are read safely and converted by ``convert``.

    timm adapts them to other ``in_chans`` and ``num_classes``; without ``num_classes`` the model has as many as the
    file. With ``features_only``, final norm and classifier may be missing, as they are in the files of detection and
    segmentation backbones. Output norms and attention scales, which a model has for them alone, keep their first
    values where a file, such as a classifier's, has none of them. Loading is strict otherwise.

    Raises:
        CheckpointError: If the downloaded or given file is damaged or does not fit.
    """
    # flatten_sequential is for timm's other feature wrappers ("list", "dict"); the getter ignores it.
    kwargs.setdefault("feature_cfg", dict(out_indices=(0, 1, 2, 3), feature_cls="getter", flatten_sequential=True))
    overlay = dict(pretrained_cfg_overlay or {})
    cfgs: dict[str, Any] = dict(pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay)
    resolved = resolve_pretrained_cfg(variant, **cfgs)
    heads = [f"{name}.{part}" for name in classifier_names(resolved.classifier) for part in ("weight", "bias")]
    features_only = bool(kwargs.get("features_only"))

    def convert_checked(state: State, model: nn.Module) -> State:
        # timm is no longer strict about any key once it drops the classifier
        adapted = _left_out_of_features(model) if features_only else []
        classes = overlay.get("num_classes", resolved.num_classes)
        if not features_only and model.num_classes != classes:
            adapted += heads
            if resolved.file and model.num_classes:
                text = "%s: its classifier of %s classes was left out; that of the model, for %s, is not trained"
                _logger.warning(text, resolved.file, classes, model.num_classes)
        if resolved.input_size and model.in_chans != resolved.input_size[0]:
            adapted += [f"{resolved.first_conv}.weight"]
        # a model with one classifier can start from weights with two
        own = model.state_dict()
        state = {key: value for key, value in convert(state).items() if key in own or key not in heads}
        untrained = _not_in_classifiers(own, state)
        check_fit(model, state | untrained, adapted)
        if untrained:
            where = (resolved.file or resolved.url) if not resolved.state_dict else "the given weights"
            _logger.warning("%s: without %s; these keep their initial values", where, shorten(list(untrained), most=20))
        return state | untrained

    if pretrained:
        path = resolved.file
        if path is None and resolved.url and not resolved.state_dict and resolved.source != "hf-hub":
            path = download_cached_file(resolved.url)
        if path is not None and resolved.source != "local-dir":
            checkpoint = read_checkpoint(path)
            if checkpoint.placeholders:
                _logger.info("not loaded from %s: %s", path, ", ".join(checkpoint.placeholders))
            overlay["state_dict"] = state = convert(checkpoint.state)
            # timm drops a classifier that has another number of classes than the configuration says
            found = (state[head] for head in heads if head in state)
            classes = next((len(x) for x in found if x.dim() == 2 and x.shape[1] >= 8), 0)  # thin ones are hostile
            overlay |= {"num_classes": classes} if classes else {}
    model = build_model_with_cfg(cls, variant, pretrained, pretrained_filter_fn=convert_checked, **cfgs, **kwargs)
    if "state_dict" in overlay:
        # timm keeps the configuration with the model; do not keep the weights twice.
        for cfg in (model.pretrained_cfg, getattr(model, "default_cfg", {})):
            cfg["state_dict"] = None
    return model
