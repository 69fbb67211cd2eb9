import inspect
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import nn

import vision_ssm.models  # noqa: F401  (registers them)
from vision_ssm.checkpoints.families import address_note
from vision_ssm.errors import InputError, nearest

# Arguments of timm's that name files, or where to look for them. They come from files of others too.
_OPENS_FILES = ("checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")


def create_model(
    name: str, args: Mapping[str, Any], num_classes: int | None = None, *, pretrained: bool = False, **more: Any
) -> nn.Module:
    """Timm's `create_model`, with errors that name the bad value and what is allowed.

    Args:
        name: A model of timm's or ours.
        args: What the user gave it.
        num_classes: Outputs of the classifier; `None` leaves it to the model.
        pretrained: Load published weights, or those in `more`.
        **more: Further arguments of timm's, such as `features_only` and `pretrained_cfg_overlay`.

    Raises:
        InputError: The model is unknown, does not take `args`, or has no published weights.
    """
    known = default_cfg(name)
    if wrong := [key for key in args if key in _OPENS_FILES]:
        raise InputError(f"{', '.join(wrong)} is not a model argument here; start from weights with --pretrained FILE")
    published = pretrained and "pretrained_cfg_overlay" not in more
    if published and not (known.url or known.hf_hub_id or known.file):
        raise InputError(f"{name} has no published weights; give a file of your own instead")
    try:
        more |= {} if num_classes is None else {"num_classes": num_classes}
        return timm.create_model(name, pretrained=pretrained, **more, **_spell_out_none(name, args))
    except InputError:
        raise
    except Exception as error:  # models raise anything
        if published and isinstance(error, (OSError, RuntimeError)):
            where = f"{known.url or known.hf_hub_id or known.file}{address_note(known.url)}"
            raise InputError(
                f"cannot fetch the published weights of {name} from {where}: {error}; --pretrained FILE takes a file"
            ) from error
        given = " ".join(f"{k}={v}" for k, v in args.items() if k != "device") or "no arguments"
        raise InputError(f"cannot make {name} with {given}: {_explain(name, args, error)}") from error


def default_cfg(name: str) -> Any:
    """Timm's description of a model and its published weights.

    Raises:
        InputError: timm does not know the model.
    """
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        hint = nearest(architecture, timm.list_models(), "; vision-ssm models lists ours, timm.list_models() all")
        raise InputError(f"unknown model {name}{hint}")
    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError:
        known = None
    if known is None and name == architecture:
        return PretrainedCfg()  # a model of the user's own
    if known is None:
        raise InputError(f"{architecture} has no pretrained tag {name.partition('.')[2]}")
    return known


def model_class(name: str) -> type[nn.Module]:
    """The class of a model, whose signature names the arguments that it takes.

    Raises:
        InputError: timm does not know the model.
    """
    default_cfg(name)
    with torch.device("meta"):
        return type(timm.create_model(name))


@torch.no_grad()
def check_takes(model: nn.Module, name: str, size: int) -> None:
    """Refuse an image size that a model cannot work with; leaves the model in training mode.

    Raises:
        InputError: The model fails on an image of that size.
    """
    try:
        model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{name} cannot take images of {size}x{size}; try another --img-size ({reason})") from error
    model.train()


def _spell_out_none(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Give None to each stage where a model has a value per stage: timm leaves out arguments that are None."""
    if None not in args.values():
        return dict(args)
    known, changed = inspect.signature(model_class(name)).parameters, dict(args)
    for key in (key for key, value in args.items() if value is None and key in known):
        if isinstance(default := known[key].default, tuple | list):
            changed[key] = (None,) * len(args.get("depths", default))
        elif default is not None:
            raise InputError(f"{key}={default} cannot be none")
    return changed


def _explain(name: str, args: Mapping[str, Any], error: Exception) -> str:
    """Name the arguments that a model does not know, or that are no sequences where it takes some."""
    if not isinstance(error, TypeError):
        return str(error)
    kind = model_class(name)
    known = inspect.signature(kind).parameters
    if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
        return f"{kind.__name__} has no argument {unknown[1]}{nearest(unknown[1], known)}"
    for key, value in args.items():
        default = known[key].default if key in known else None
        if isinstance(default, tuple | list) and not isinstance(value, tuple | list):
            return f"{key} takes several values, such as {key}={str(default).replace(' ', '')}"
    return f"a value is of the wrong type ({error})"
