"""Which rules belong to which model."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from vision_ssm.checkpoints.efficient_vmamba import EFFICIENT_VMAMBA
from vision_ssm.checkpoints.group_mamba import GROUP_MAMBA
from vision_ssm.checkpoints.reader import CheckpointError
from vision_ssm.checkpoints.rules import Rules, State, apply_rules, convert, invert
from vision_ssm.checkpoints.sparx import sparx_rules
from vision_ssm.checkpoints.vmamba import VMAMBA

# The rules, or a function that chooses them by the names of the tensors, by the beginning of a model's name.
_FAMILIES: dict[str, Rules | Callable[[Iterable[str]], Rules]] = {
    "efficient_vmamba_": EFFICIENT_VMAMBA,
    "sparx_mamba_": sparx_rules,
    "group_mamba_": GROUP_MAMBA,
    "vmamba_": VMAMBA,
}
# Tensors that a model has with an option only: output norms, and what SparX's detection backbone adds.
OPTIONS = {r"feature_norms\.": "feature_norm", r".*\.attention\.scale$": "learnable_scale"}


def options_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the options that a model needs to have these weights, which have our names."""
    return {option: True for pattern, option in OPTIONS.items() if any(re.match(pattern, key) for key in state)}


def can_convert(model: str) -> bool:
    """Return whether there is a conversion for a model, by the name it has in timm's registry."""
    return _family(model) is not None


def same_family(model: str, other: str) -> bool:
    """Return whether the official checkpoints of two models are converted by the same rules."""
    return can_convert(model) and _family(model) == _family(other)


def convert_official(model: str, state: State) -> State:
    """Map the official state dict of a model, by the name it has in timm's registry, to this package's names.

    Raises:
        CheckpointError: If there is no conversion for that model, or tensors that are joined do not fit together.
    """
    return convert(rules_of(model, state), state)


def trace_official(model: str, state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the names of the published tensors of which each of ours is made."""
    return {key: theirs for key, (_, theirs) in apply_rules(rules_of(model, state), state).items()}


def published_names(model: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Return the published names of a model's tensors, by ours: several where one of ours is made of several.

    Source: the tables in this package, inverted. EfficientVMamba's merging of patches has two published places,
    ``layers.#.downsample`` and, after stages of inverted residuals, a number; the first is taken.

    Raises:
        CheckpointError: If there is no conversion for that model.
    """
    names = list(names)
    return invert(rules_of(model, names), names)


def rules_of(model: str, names: Iterable[str]) -> Rules:
    """Return the rules of a model; ``names`` are those of its tensors, published or ours.

    Raises:
        CheckpointError: If there is no conversion for that model.
    """
    if (family := _family(model)) is None:
        families = ", ".join(f"{prefix}*" for prefix in _FAMILIES)
        raise CheckpointError(f"no conversion of official checkpoints for {model}; there is one for {families}")
    return rules(names) if callable(rules := _FAMILIES[family]) else rules


def _family(model: str) -> str | None:
    return next((prefix for prefix in _FAMILIES if model.startswith(prefix)), None)


# Parts of addresses that follow from the names of other files, and were not seen on a page of the authors.
_INFERRED = ("/%23v2det/", "/%23v2seg/", "/groupmamba_base_ema.pth")


def address_note(url: str | None) -> str:
    """Return what to print behind an address of weights: that it is inferred, where it is."""
    return " (address inferred, not seen)" if any(part in (url or "") for part in _INFERRED) else ""


def published(name: str, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model's authors published: paper, accuracy, weights and their license."""
    hub = cfg.get("hf_hub_id")
    url = cfg.get("url") or (f"https://huggingface.co/{hub}/{cfg.get('hf_hub_filename') or ''}" if hub else None)
    top1 = re.search(r"([\d.]+) ?%", cfg.get("description") or "")
    known = bool(url or top1)
    # .../OWNER/REPOSITORY/... on GitHub and on Hugging Face alike
    source = url or cfg.get("origin_url") or ""
    return {
        "input_size": list(cfg["input_size"]),
        "paper": cfg.get("paper_name"),
        "paper_id": cfg.get("paper_ids"),
        "published_top1": float(top1[1]) if top1 else None,
        "weights_by": "/".join(source.split("/")[3:5]) or None if known else None,
        "weights_file": url.rsplit("/", 1)[-1] or None if url else None,
        "weights_license": cfg.get("license") if known else None,
        "weights": url,
        "weights_inferred": bool(address_note(url)),
        "pretrained": url is not None,
        "convertible": known and can_convert(name),
    }
