"""Official GroupMamba checkpoints: their keys, and ours."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from vision_ssm.checkpoints.reader import CheckpointError

_STEM = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2", "6": "conv3", "7": "norm3"}
_HEADS = {"head": "fc", "dist_head": "fc_dist"}
_MIXER = r"(block\d+\.\d+|post_network\.0)\.attn"


def _transposed(groups: list[Tensor]) -> Tensor:
    return torch.cat([value.mT for value in groups])


def _grouped(groups: list[Tensor]) -> Tensor:
    """Join linear layers, (d', d) or (1, d', d), to a grouped 1x1 convolution, (4 d', d, 1, 1)."""
    return torch.cat([value.reshape(-1, value.shape[-1]) for value in groups])[:, :, None, None]


def _first_half(groups: list[Tensor]) -> Tensor:
    return _grouped([value[: value.shape[1]] for value in groups])


def _second_half(groups: list[Tensor]) -> Tensor:
    return _grouped([value[value.shape[1] :] for value in groups])


# Four modules of one group each there, one of four groups here: our names, and how the four become one.
_GROUPED: dict[str, tuple[str, Callable[[list[Tensor]], Tensor]]] = {
    "conv2d.weight": ("conv2d.weight", torch.cat),  # (d, 1, 3, 3)
    "conv2d.bias": ("conv2d.bias", torch.cat),  # (d,)
    "x_proj_weight": ("x_proj.weight", _grouped),  # (1, R + 2N, d)
    "dt_projs_weight": ("dt_weight", _transposed),  # (1, d, R)
    "dt_projs_bias": ("dt_bias", torch.cat),  # (1, d)
    "A_logs": ("A_log", torch.stack),  # (d, N)
    "Ds": ("D", torch.stack),  # (d,)
    "out_norm.weight": ("out_norm.weight", torch.cat),  # (d,)
    "out_norm.bias": ("out_norm.bias", torch.cat),  # (d,)
    "out_proj.weight": ("out_proj.weight", _grouped),  # (d, d)
}
# Input and gate have one projection there, of their channels in this order.
_HALVES: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "in_proj.weight": _first_half,
    "gate_proj.weight": _second_half,
}  # (2d, d)


def convert_group_mamba(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map the state dict of an official GroupMamba to the names and shapes of :class:`vision_ssm.models.GroupMamba`.

    Keys it does not know pass through unchanged, so that strict loading lists them. A state dict that already has
    our keys is returned as it is.

    Raises:
        CheckpointError: If one of the four groups lacks a weight, or has it in another shape than the others.
    """
    if not any(re.match(r"patch_embed\d+\.|block\d+\.", key) for key in state):
        return dict(state)
    ours: dict[str, Tensor] = {}
    wrong: dict[str, None] = {}
    for key, value in state.items():
        match = re.fullmatch(_MIXER + r"\.mamba_g([1-4])\.(.+)", key)
        rules = _rules(match[3]) if match else {}
        if match and rules:
            names = [f"{match[1]}.attn.mamba_g{k}.{match[3]}" for k in (1, 2, 3, 4)]
            if problem := _misfit(names, state):
                wrong[problem] = None
                continue
            groups = [state[name] for name in names]
            prefix = f"{_module(match[1])}.mixer.ss2d."
            if match[2] == "1":
                try:
                    ours |= {prefix + own: join(groups) for own, join in rules.items()}
                except (RuntimeError, IndexError):  # of other axes: strict loading will name them
                    ours |= dict(zip(names, groups, strict=True))
        elif match:
            ours[key] = value
        else:
            ours[_name(key)] = value
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(f"the four groups of GroupMamba do not fit together: {'; '.join([*wrong][:8])}{more}")
    return ours


def _rules(name: str) -> dict[str, Callable[[list[Tensor]], Tensor]]:
    """Return how our weights by our names are made of the four groups'; none where a group has no such weight."""
    if name == "in_proj.weight":
        return _HALVES
    return dict([_GROUPED[name]]) if name in _GROUPED else {}


def _misfit(names: list[str], state: dict[str, Tensor]) -> str | None:
    """Say which of the four groups' weights is missing, or of another shape than most."""
    if missing := [name for name in names if name not in state]:
        return f"missing {', '.join(missing)}"
    shapes = [tuple(state[name].shape) for name in names]
    usual = max(shapes, key=shapes.count)
    if odd := [f"{name} {shape}" for name, shape in zip(names, shapes, strict=True) if shape != usual]:
        return f"{', '.join(odd)} where the other groups have {usual}"
    return None


def _module(prefix: str) -> str:
    # stages count from 1 there; the class block is a list of one
    match = re.fullmatch(r"block(\d+)\.(\d+)", prefix)
    return f"stages.{int(match[1]) - 1}.blocks.{match[2]}" if match else "head.block"


def _name(key: str) -> str:
    if match := re.fullmatch(r"patch_embed1\.conv\.([013467])\.(.+)", key):
        # a Sequential there; 2, 5 and 8 hold no weights
        return f"stem.{_STEM[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"patch_embed1\.(proj|norm)\.(.+)", key):
        return f"stem.{'conv4' if match[1] == 'proj' else 'norm4'}.{match[2]}"
    if match := re.fullmatch(r"patch_embed(\d+)\.(proj|norm)\.(.+)", key):
        # modules of the network there, of a stage here
        return f"stages.{int(match[1]) - 1}.downsample.{'conv' if match[2] == 'proj' else 'norm'}.{match[3]}"
    if match := re.fullmatch(r"norm(\d+)\.(.+)", key):
        # the last norm follows the pooling
        return f"head.norm.{match[2]}" if match[1] == "4" else f"stages.{int(match[1]) - 1}.norm.{match[2]}"
    if match := re.fullmatch(r"(head|dist_head)\.(.+)", key):
        return f"head.{_HEADS[match[1]]}.{match[2]}"
    if match := re.fullmatch(_MIXER + r"\.(.+)", key):
        return f"{_module(match[1])}.mixer.{match[2]}"
    if match := re.fullmatch(r"(block\d+\.\d+)\.(?:norm2|mlp(?:\.dwconv)?)\.(.+)", key):
        # a block's only norm is numbered 2 there; dwconv is a module within a module
        rest = key[len(match[1]) + 1 :].replace("norm2.", "norm.").replace("dwconv.dwconv.", "dwconv.")
        return f"{_module(match[1])}.{rest}"
    if match := re.fullmatch(r"(post_network\.0)\.(.+)", key):
        return f"{_module(match[1])}.{match[2]}"
    return key
