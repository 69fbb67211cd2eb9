"""VMamba: visual state-space model with four-way cross scans.

Paper: "VMamba: Visual State Space Model", arXiv 2401.10166 (NeurIPS 2024).
Variants follow the published final models (no gate, one state per channel).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates, trunc_normal_
from timm.models import checkpoint_seq, generate_default_cfgs, named_apply, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vision_ssm.checkpoints import build_from_official
from vision_ssm.checkpoints.vmamba import convert_vmamba
from vision_ssm.layers import SS2D, VSSBlock
from vision_ssm.scan import CROSS_SCAN, Path

__all__ = ["VMamba"]

# Strides of the stem's two convolutions, by the stem's total stride.
_STEM_STRIDES = {1: (1, 1), 2: (1, 2), 4: (2, 2)}


def _conv3x3(in_dim: int, dim: int, stride: int, **dd: Any) -> nn.Conv2d:
    # Weights lie in memory as the maps do; otherwise they would be rearranged in every call.
    return nn.Conv2d(in_dim, dim, 3, stride=stride, padding=1, **dd).to(memory_format=torch.channels_last)


class Stem(nn.Module):
    """Two 3x3 convolutions, each followed by LayerNorm: (B, in_chans, H, W) to (B, H', W', dim)."""

    def __init__(self, in_chans: int, dim: int, stride: int, **dd: Any) -> None:
        super().__init__()
        if stride not in _STEM_STRIDES:
            raise ValueError(f"stem_stride must be one of {', '.join(map(str, _STEM_STRIDES))}, got {stride}")
        first, second = _STEM_STRIDES[stride]
        self.conv1 = _conv3x3(in_chans, dim // 2, stride=first, **dd)
        self.norm1 = nn.LayerNorm(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = _conv3x3(dim // 2, dim, stride=second, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Embed an image."""
        x = self.conv1(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        x = self.act(self.norm1(x)).permute(0, 3, 1, 2)
        return self.norm2(self.conv2(x).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """3x3 convolution of stride 2 and LayerNorm: (B, H, W, in_dim) to (B, ceil(H/2), ceil(W/2), dim)."""

    def __init__(self, in_dim: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv = _conv3x3(in_dim, dim, stride=2, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Halve a map."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class VMambaStage(nn.Module):
    """Downsampling (but in the first stage) and blocks."""

    def __init__(self, in_dim: int, dim: int, drop_path: Sequence[float], downsample: bool, **block: Any) -> None:
        super().__init__()
        dd = {"device": block.get("device"), "dtype": block.get("dtype")}
        self.grad_checkpointing = False
        self.downsample = Downsample(in_dim, dim, **dd) if downsample else nn.Identity()
        self.blocks = nn.Sequential(*(VSSBlock(dim, drop_path=rate, **block) for rate in drop_path))

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map, (B, H, W, in_dim)."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class VMamba(nn.Module):
    """VMamba backbone and classifier, with timm's interface. Images of any height and width.

    Args:
        in_chans: Channels of the image.
        num_classes: Outputs of the classifier; 0 for none.
        global_pool: timm's pooling type; ``""`` for none.
        dims: Channels of each stage.
        depths: Blocks of each stage.
        stem_stride: Stride of the stem: 4 as published, 2 or 1 for small images.
        d_state: States per channel.
        ssm_ratio: Inner channels of SS2D per channel.
        mlp_ratio: Hidden channels of the MLP per channel.
        paths: Routes of every scan.
        feature_norm: Give every stage a LayerNorm for ``forward_intermediates`` and ``features_only``, as the published
            detection and segmentation backbones have.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Largest stochastic depth rate; it grows linearly over the blocks.
        output_stride: Only the network's own stride, for libraries that pass it.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 8, 2),
        stem_stride: int = 4,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        mlp_ratio: float = 4.0,
        paths: Sequence[Path] = CROSS_SCAN,
        feature_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_stride: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(dims) != len(depths) or not dims:
            raise ValueError(f"dims and depths must have one entry per stage, got {len(dims)} and {len(depths)}")
        if in_chans < 1 or dims[0] < 2:
            raise ValueError(f"in_chans must be at least 1 and dims[0] at least 2, got {in_chans} and {dims[0]}")
        if not 0 <= drop_path_rate <= 1:
            raise ValueError(f"drop_path_rate must be between 0 and 1, got {drop_path_rate}")
        stride = stem_stride * 2 ** (len(dims) - 1)
        if output_stride is not None and output_stride != stride:
            raise ValueError(f"output_stride must be {stride}, the network's own, got {output_stride}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.output_fmt = "NHWC"
        self.num_features = dims[-1]
        self.stem = Stem(in_chans, dims[0], stem_stride, **dd)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        block: dict[str, Any] = dict(d_state=d_state, ssm_ratio=ssm_ratio, mlp_ratio=mlp_ratio, paths=paths, **dd)
        self.stages = nn.Sequential(
            *(VMambaStage(dims[max(0, i - 1)], dim, rates[i], downsample=i > 0, **block) for i, dim in enumerate(dims))
        )
        self.feature_info: list[dict[str, Any]] = [
            dict(num_chs=dim, reduction=stem_stride * 2**i, module=f"stages.{i}") for i, dim in enumerate(dims)
        ]
        self.feature_norms = nn.ModuleList([nn.LayerNorm(dim, **dd) for dim in dims]) if feature_norm else None
        self.norm: nn.Module = nn.LayerNorm(self.num_features, **dd)
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt, **dd
        )
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        named_apply(_init_weights, self)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay must spare."""
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in ("A_log", "D", "dt_bias")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns for layer-wise learning rates."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^(?:norm|feature_norms)", (99999,)),
        ]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.modules():
            if isinstance(stage, VMambaStage):
                stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the final linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling where one is named."""
        self.num_classes = num_classes
        parameter = next(self.parameters())
        self.head.reset(num_classes, pool_type=global_pool)
        self.head.to(device=parameter.device, dtype=parameter.dtype)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        if global_pool is not None:
            self.global_pool = global_pool

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps after several stages.

        Args:
            x: Images, (B, in_chans, H, W).
            indices: Which stages: the last n, a list, or all.
            norm: Apply the final norm to the last stage's map. With ``feature_norm`` every map has its own.
            stop_early: Leave out stages after the last one asked for.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: Return the maps alone.

        Returns:
            The maps, and before them the output of :meth:`forward_features` unless ``intermediates_only``.

        Raises:
            ValueError: If ``output_fmt`` is neither.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: last + 1] if stop_early else self.stages
        x = self.stem(x)
        maps = []
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take:
                y = x
                if self.feature_norms is not None:
                    y = self.feature_norms[i](x)
                elif norm and i == len(self.stages) - 1:
                    y = self.norm(x)
                maps.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        if intermediates_only:
            return maps
        # A stage left out would give the final norm a map of another width.
        return (self.norm(x) if len(stages) == len(self.stages) else x), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of these stages do not need; return the stages' indices."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if self.feature_norms is not None:
            self.feature_norms = self.feature_norms[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.feature_info[last]["num_chs"]
            self.head.in_features = self.head.num_features = self.num_features
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised map of the last stage, (B, H / 32, W / 32, num_features), from (B, in_chans, H, W)."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map and classify it, or stop before the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, (B, in_chans, H, W) to (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module, name: str) -> None:
    # x_proj keeps torch's default: in the published models it is no Linear, so their initialisation passes it by.
    if isinstance(module, nn.Linear) and not name.endswith("x_proj"):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, SS2D):
        module.reset_scan_parameters()


def _cfg(url: str = "", top1: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "description": f"ImageNet-1K {top1} %" if top1 else None,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "min_input_size": (3, 32, 32),
        "license": "mit",
        "paper_ids": "arXiv:2401.10166",
        "paper_name": "VMamba: Visual State Space Model",
        "origin_url": "https://github.com/MzeroMiko/VMamba",
        **kwargs,
    }


_RELEASE = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/"

default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny.in1k": _cfg(_RELEASE + "vssm1_tiny_0230s_ckpt_epoch_264.pth", "82.6"),
        "vmamba_small.in1k": _cfg(_RELEASE + "vssm_small_0229_ckpt_epoch_222.pth", "83.6"),
        "vmamba_base.in1k": _cfg(_RELEASE + "vssm_base_0229_ckpt_epoch_237.pth", "83.9"),
        "vmamba_tiny_s2l5.in1k": _cfg(_RELEASE + "vssm_tiny_0230_ckpt_epoch_262.pth", "82.5"),
        "vmamba_small_s1l20.in1k": _cfg(_RELEASE + "vssm1_small_0229s_ckpt_epoch_240.pth", "83.3"),
        "vmamba_base_s1l20.in1k": _cfg(_RELEASE + "vssm1_base_0229s_ckpt_epoch_225.pth", "83.8"),
        # Ours, for small images; no published weights.
        "vmamba_atto.untrained": _cfg(
            input_size=(3, 32, 32), pool_size=(2, 2), min_input_size=(3, 16, 16), crop_pct=1.0, license="apache-2.0"
        ),
    }
)


def _create_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> VMamba:
    return build_from_official(VMamba, variant, pretrained, convert_vmamba, **kwargs)


@register_model
def vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T (s1l8): 30.2 M parameters."""
    args = dict(depths=(2, 2, 8, 2), dims=(96, 192, 384, 768), ssm_ratio=1.0)
    return _create_vmamba("vmamba_tiny", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S (s2l15): 50.1 M parameters."""
    args = dict(depths=(2, 2, 15, 2), dims=(96, 192, 384, 768), ssm_ratio=2.0)
    return _create_vmamba("vmamba_small", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B (s2l15): 88.6 M parameters."""
    args = dict(depths=(2, 2, 15, 2), dims=(128, 256, 512, 1024), ssm_ratio=2.0)
    return _create_vmamba("vmamba_base", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The earlier VMamba-T (s2l5), with which SparX compares: 30.7 M parameters."""
    args = dict(depths=(2, 2, 5, 2), dims=(96, 192, 384, 768), ssm_ratio=2.0)
    return _create_vmamba("vmamba_tiny_s2l5", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S, narrower and deeper (s1l20): 49.0 M parameters."""
    args = dict(depths=(2, 2, 20, 2), dims=(96, 192, 384, 768), ssm_ratio=1.0)
    return _create_vmamba("vmamba_small_s1l20", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B, narrower and deeper (s1l20): 86.6 M parameters."""
    args = dict(depths=(2, 2, 20, 2), dims=(128, 256, 512, 1024), ssm_ratio=1.0)
    return _create_vmamba("vmamba_base_s1l20", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_atto(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Ours, for images of about 32x32 pixels (stem of stride 2): less than 1 M parameters."""
    args = dict(depths=(1, 2, 3, 1), dims=(32, 64, 96, 128), stem_stride=2)
    return _create_vmamba("vmamba_atto", pretrained, **dict(args, **kwargs))
