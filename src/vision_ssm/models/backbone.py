"""The base class of all backbones: timm's interface over a stem, stages, a norm and a head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vision_ssm.layers import SS2D


class Stage(nn.Module):
    """Downsampling, blocks, and where a model has one, a norm; maps are (B, H, W, C).

    Args:
        blocks: The blocks, each of one argument.
        downsample: First module of the stage; ``None`` in the first stage.
        norm: Last module of the stage; ``None`` in most models.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], downsample: nn.Module | None = None, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map, (B, H, W, in_dim)."""
        x = self.downsample(x)
        return self.norm(checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x))


def check_options(
    dims: Sequence[int], depths: Sequence[int], in_chans: int, drop_path_rate: float, **flags: bool
) -> None:
    """Check the options that all backbones share, and that flags are flags: a word such as "no" would count as true.

    Raises:
        ValueError: If one is out of range.
    """
    if len(dims) != len(depths) or not dims:
        raise ValueError(f"dims and depths must have one entry per stage, got {len(dims)} and {len(depths)}")
    if min(dims) < 1 or min(depths) < 1:
        raise ValueError(f"dims and depths must be at least 1, got {tuple(dims)} and {tuple(depths)}")
    if in_chans < 1:
        raise ValueError(f"in_chans must be at least 1, got {in_chans}")
    if not 0 <= drop_path_rate <= 1:
        raise ValueError(f"drop_path_rate must be between 0 and 1, got {drop_path_rate}")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def _check_num_classes(num_classes: int) -> None:
    if num_classes < 0:
        raise ValueError(f"num_classes must be at least 0, got {num_classes}")


class Backbone(nn.Module):
    """Stem, stages, norm and classifier with timm's interface; maps are (B, H, W, C) inside.

    The constructor of a family takes its own options and these, which all families have:

    - ``in_chans``, ``num_classes``, ``global_pool``, ``dims``, ``drop_rate``, ``output_stride``, ``device`` and
      ``dtype``, as below;
    - ``depths``: number of blocks in each stage;
    - ``drop_path_rate``: largest stochastic depth rate; it grows linearly over the blocks;
    - ``feature_norm``: a LayerNorm for the map of every stage in ``forward_intermediates`` and ``features_only``, as
      published detection and segmentation backbones have.

    Args:
        stem: Images, (B, in_chans, H, W), to maps, (B, H', W', dims[0]).
        stages: One module per stage, (B, H, W, C) to (B, H', W', C'), with a flag ``grad_checkpointing``.
        dims: Number of channels in each stage.
        stem_stride: Stride of the stem; every further stage halves the map.
        in_chans: Number of image channels.
        num_classes: Number of outputs of the classifier; 0 for none.
        global_pool: timm's pooling type; ``""`` for none.
        norm: Between the last map and the pooling.
        feature_norms: The norms of ``feature_norm``, one per stage.
        drop_rate: Dropout rate before the classifier.
        output_stride: Accepted for libraries that pass it; only the network's own stride is allowed.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If ``output_stride`` is not the network's own, or ``num_classes`` is negative.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        dims: Sequence[int],
        stem_stride: int,
        *,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        norm: nn.Module,
        feature_norms: Sequence[nn.Module] | None = None,
        drop_rate: float = 0.0,
        output_stride: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        stride = stem_stride * 2 ** (len(dims) - 1)
        if output_stride is not None and output_stride != stride:
            raise ValueError(
                f"output_stride must be {stride}, the network's own, got {output_stride}: scans cannot be dilated; "
                "use a decoder that takes this stride, such as UPerNet or FPN in place of DeepLab"
            )
        _check_num_classes(num_classes)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.output_fmt = "NHWC"
        self.num_features = dims[-1]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.feature_info: list[dict[str, Any]] = [
            dict(num_chs=dim, reduction=stem_stride * 2**i, module=f"stages.{i}") for i, dim in enumerate(dims)
        ]
        self.feature_norms = None if feature_norms is None else nn.ModuleList(feature_norms)
        self.norm = norm
        self.head: Any = ClassifierHead(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            input_fmt=self.output_fmt,
            device=device,
            dtype=dtype,
        )
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def __prepare_scriptable__(self) -> None:
        # torch.jit.script calls this first, also for nested models; its own error would be pages long.
        raise NotImplementedError(
            f"torch.jit.script cannot compile {type(self).__name__}; use torch.export or torch.compile"
        )

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters to exclude from weight decay."""
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in ("A_log", "D", "dt_bias")}

    def published_no_weight_decay(self) -> set[str]:
        """Return the names of all parameters that the published training excludes from weight decay.

        That is what has one dimension in the published layout, or a name that ends in ``.bias``. It decays A and the
        bias of the step size, which :meth:`no_weight_decay` excludes.
        """
        return {
            name
            for name, p in self.named_parameters()
            if p.dim() <= 1 or name.endswith(".bias") or name.rsplit(".", 1)[-1] == "D"
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns for layer-wise learning rates."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.", (99998,)),
            (r"^(?:norm|feature_norms)", (99999,)),
        ]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations.

        Batch norms inside the blocks then update their running statistics twice per step, as with torch's and timm's
        own checkpointing.
        """
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """Return the final linear layer, or a tuple of them where a model has several."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling if ``global_pool`` is given."""
        _check_num_classes(num_classes)
        self.num_classes = num_classes
        parameter = next(self.parameters())
        self.head.reset(num_classes, pool_type=global_pool)
        self.head.to(device=parameter.device, dtype=parameter.dtype)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        if global_pool is not None:
            self.global_pool = global_pool

    def normalize_map(self, x: Tensor, stage: int, norm: bool) -> Tensor:
        """Return a stage's map, (B, H, W, C), as :meth:`forward_intermediates` gives it."""
        if self.feature_norms is not None:
            return self.feature_norms[stage](x)
        return self.norm(x) if norm and stage == len(self.stages) - 1 else x

    def run_stages(self, x: Tensor, stages: Iterable[nn.Module]) -> list[Tensor]:
        """Return the map after each of the stages, given the output of the stem."""
        maps = []
        for stage in stages:
            x = stage(x)
            maps.append(x)
        return maps

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
            stop_early: Skip the stages after the last requested one.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: Return the maps alone.

        Returns:
            The maps, and before them the output of :meth:`forward_features` unless ``intermediates_only``.

        Raises:
            ValueError: If ``output_fmt`` is neither, or there is no such stage.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        take, last = self._take(indices)
        stages = self.stages[: last + 1] if stop_early else self.stages
        run = self.run_stages(self.stem(x), stages)
        x = run[-1]
        maps = []
        for i, y in enumerate(run):
            if i in take:
                y = self.normalize_map(y, i, norm)
                maps.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        if intermediates_only:
            return maps
        # A stage left out would give the final norm a map of another width.
        return (self.norm(x) if len(stages) == len(self.stages) else x), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of these stages do not need; return the stages' indices."""
        take, last = self._take(indices)
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

    def _take(self, indices: int | list[int] | None) -> tuple[list[int], int]:
        """Return the stages that indices name, and the last one."""
        try:
            return feature_take_indices(len(self.stages), indices)
        except AssertionError as error:
            strides = ", ".join(str(info["reduction"]) for info in self.feature_info)
            raise ValueError(
                f"{error}: there are {len(self.stages)} maps, of strides {strides}; a decoder of "
                "segmentation_models_pytorch takes fewer than five with encoder_depth=4"
            ) from None

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalized map of the last stage, (B, H', W', num_features), from (B, in_chans, H, W)."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map and classify it, or stop before the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, (B, in_chans, H, W) to (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def stem_strides(stride: int) -> tuple[int, int]:
    """Return the strides of a stem's first and last convolution.

    Raises:
        ValueError: If the stem cannot have this stride.
    """
    strides = {1: (1, 1), 2: (1, 2), 4: (2, 2)}
    if stride not in strides:
        raise ValueError(f"stem_stride must be one of {', '.join(map(str, strides))}, got {stride}")
    return strides[stride]


def conv2d(in_dim: int, dim: int, size: int = 3, stride: int = 1, bias: bool = True, **dd: Any) -> nn.Conv2d:
    """Return a dense convolution, padded by half of its kernel size."""
    return nn.Conv2d(in_dim, dim, size, stride=stride, padding=size // 2, bias=bias, **dd)


def init_weights(module: nn.Module, name: str) -> None:
    """Initialize as VMamba does: linear layers truncated normal 0.02, the scan as Mamba, the rest as torch does."""
    # x_proj keeps torch's default: in the published models it is not a Linear, so their initialization skips it.
    if isinstance(module, nn.Linear) and not name.endswith("x_proj"):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, SS2D):
        module.reset_scan_parameters()


def make_cfg(url: str = "", top1: str = "", **more: Any) -> dict[str, Any]:
    """Return timm's configuration of a variant.

    Args:
        url: Address at which the authors published weights.
        top1: Published ImageNet accuracy of those weights.
        **more: Further entries, or replacements of the defaults.
    """
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
        **more,
    }


# Ours, for images of about 32x32 pixels; no published weights. Their four maps have strides 2 to 16, so that
# segmentation_models_pytorch needs encoder_depth=4.
ATTO: dict[str, Any] = dict(
    input_size=(3, 32, 32), pool_size=(2, 2), min_input_size=(3, 16, 16), crop_pct=1.0, license="apache-2.0"
)
