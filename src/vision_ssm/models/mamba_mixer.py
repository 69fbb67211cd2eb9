"""ViM2 and ViQS: backbones of MambaMixer and QSMixer blocks, which select tokens and channels.

Paper: "MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection", arXiv 2403.19888.

These models are ViM2- and ViQS-style, after the text of the paper's first version and the abstract of its second. No
code or weights were published, and the second version's definitions could not be read: the quasi-separable scan, Switch
of Scans, the gate, and ViQS follow our design. Widths, the pattern of two token mixers per channel mixer, and the
averaging of earlier outputs are those of the first version (table 8, section 3.2); the channel mixers' widths
are chosen to meet its parameter counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, named_apply, register_model
from torch import Tensor, nn

from vision_ssm.checkpoints import build_from_official
from vision_ssm.layers import (
    SCAN_POOL,
    QSTokenMixer,
    SelectiveChannelMixer,
    SelectiveTokenMixer,
    SwitchOfScans,
    WeightedAverage,
)
from vision_ssm.layers.mamba_mixer import MlpChannelMixer
from vision_ssm.layers.patches import PatchEmbed, PatchMerging
from vision_ssm.models.backbone import ATTO, Backbone, check_options, make_cfg
from vision_ssm.scan import ScanPath

__all__ = ["MambaMixer"]


class MixerStage(nn.Module):
    """Downsampling, then mixers, each of which reads a weighted average of all earlier outputs; maps are (B, H, W, C).

    Args:
        blocks: Token mixers, which return a map and a balance term, and channel mixers, which return a map.
        downsample: First module of the stage; ``None`` in the first stage.
        weighted_average: ``False`` lets a mixer read the newest output alone.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        downsample: nn.Module | None = None,
        weighted_average: bool = True,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.ModuleList(blocks)
        self.weighted_average = weighted_average
        if weighted_average:
            self.averages = nn.ModuleList(WeightedAverage(n + 1, **dd) for n in range(len(blocks)))
            self.out_average = WeightedAverage(len(blocks) + 1, **dd)

    def forward(self, x: Tensor, return_balance: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Transform a map, (B, H, W, in_dim).

        Returns:
            The map, and with ``return_balance`` the balance terms of those token mixers that gave one.
        """
        maps, terms = [self.downsample(x)], []
        for n, block in enumerate(self.blocks):
            average = self.averages[n] if self.weighted_average else _newest
            if self.grad_checkpointing:
                y, balance = checkpoint(_mix, average, block, *maps)
            else:
                y, balance = _mix(average, block, *maps)
            maps = [*maps, y] if self.weighted_average else [y]
            if balance is not None:
                terms.append(balance)
        y = self.out_average(maps) if self.weighted_average else maps[-1]
        return (y, terms) if return_balance else y


def _newest(maps: Sequence[Tensor]) -> Tensor:
    return maps[-1]


def _mix(average: Callable[..., Tensor], block: nn.Module, *maps: Tensor) -> tuple[Tensor, Tensor | None]:
    result = block(average(maps))
    return result if isinstance(result, tuple) else (result, None)


class MambaMixer(Backbone):
    """ViM2 or ViQS backbone and classifier, with timm's interface. Images of any height and width.

    A unit is two token mixers and a channel mixer. After a forward pass in training, ``aux_loss`` is the weighted mean
    of the token mixers' balance terms, to be added to the loss; after one in evaluation it is ``None``. Graphs of
    ``torch.fx`` and ``torch.export`` do not carry it.

    Training is random: token mixers draw scan paths, see :class:`vision_ssm.layers.SwitchOfScans`.

    Options that all families have are documented on :class:`vision_ssm.models.backbone.Backbone`.

    Args:
        depths: Units of each stage; the stochastic depth rate grows over their mixers.
        stem_stride: Side of the stem's patches: 4 as published, less for small images.
        qs_mixer: QSMixer blocks: token mixers with one decay rate per head, channel mixers without a gate.
        d_state: States of every scan.
        expand: Inner channels of the token mixers per channel.
        channel_expand: Inner channels of the channel mixers per channel.
        paths: The pool of scan paths of every token mixer.
        scans: How many of them an image takes.
        switch: Choose them for every image; else all images take the first ones with equal weights, there is no router,
            and ``aux_loss`` is ``None``.
        bidirectional: Walk paths and channels in both directions, or forwards alone.
        mlp_ratio: Hidden channels per channel of MLPs in place of the selective channel mixers; ``None`` for these.
            With ``weighted_average=False`` it has the form of the paper's ablation ViM2-MLP.
        weighted_average: Let mixers read a weighted average of all earlier outputs of their stage, else the newest.
        aligned: The aligned form of the quasi-separable scan instead of the shift form.
        aux_loss_weight: Factor in ``aux_loss``.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (1, 1, 3, 1),
        stem_stride: int = 4,
        qs_mixer: bool = False,
        d_state: int = 16,
        expand: float = 2.0,
        channel_expand: float = 1.0,
        paths: Sequence[ScanPath] = SCAN_POOL,
        scans: int = 2,
        switch: bool = True,
        bidirectional: bool = True,
        mlp_ratio: float | None = None,
        weighted_average: bool = True,
        aligned: bool = False,
        aux_loss_weight: float = 0.01,
        feature_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_stride: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        flags = dict(
            qs_mixer=qs_mixer,
            switch=switch,
            bidirectional=bidirectional,
            weighted_average=weighted_average,
            aligned=aligned,
            feature_norm=feature_norm,
        )
        check_options(dims, depths, in_chans, drop_path_rate, **flags)
        if stem_stride < 1:
            raise ValueError(f"stem_stride must be at least 1, got {stem_stride}")
        if int(min(dims) * channel_expand) < 1:
            raise ValueError(
                f"channel_expand must give {min(dims)} channels at least one inner channel, got {channel_expand}"
            )
        if mlp_ratio is not None and int(min(dims) * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio must give {min(dims)} channels at least one hidden channel, got {mlp_ratio}")
        if not aux_loss_weight >= 0:
            raise ValueError(f"aux_loss_weight must be at least 0, got {aux_loss_weight}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        shared: dict[str, Any] = dict(d_state=d_state, bidirectional=bidirectional, aligned=aligned, **dd)
        token: dict[str, Any] = dict(expand=expand, paths=paths, scans=scans, switch=switch, **shared)
        channel: dict[str, Any] = dict(expand=channel_expand, gated=not qs_mixer, **shared)
        token_mixer = QSTokenMixer if qs_mixer else SelectiveTokenMixer

        def channel_mixer(dim: int, rate: float) -> nn.Module:
            if mlp_ratio is not None:
                return MlpChannelMixer(dim, int(dim * mlp_ratio), drop_path=rate, **dd)
            return SelectiveChannelMixer(dim, drop_path=rate, **channel)

        rates = calculate_drop_path_rates(drop_path_rate, [3 * depth for depth in depths], stagewise=True)
        stages = [
            MixerStage(
                [
                    channel_mixer(dim, rate) if n % 3 == 2 else token_mixer(dim, drop_path=rate, **token)
                    for n, rate in enumerate(rates[i])
                ],
                PatchMerging(dims[i - 1], dim, **dd) if i else None,
                weighted_average,
                **dd,
            )
            for i, dim in enumerate(dims)
        ]
        super().__init__(
            PatchEmbed(in_chans, dims[0], stem_stride, **dd),
            stages,
            dims,
            stem_stride,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            norm=nn.LayerNorm(dims[-1], **dd),
            feature_norms=[nn.LayerNorm(dim, **dd) for dim in dims] if feature_norm else None,
            drop_rate=drop_rate,
            output_stride=output_stride,
            **dd,
        )
        self.aux_loss_weight = aux_loss_weight
        self.aux_loss: Tensor | None = None
        named_apply(_init_weights, self)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters to exclude from weight decay."""
        excluded = ("scalars", "level_weight", "bc_bias")
        more = {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in excluded}
        return super().no_weight_decay() | more

    def run_stages(self, x: Tensor, stages: Iterable[nn.Module]) -> list[Tensor]:
        """See :meth:`Backbone.run_stages`; also sets ``aux_loss``."""
        if not self.training:
            self.aux_loss = None
            return super().run_stages(x, stages)
        maps, terms = [], []
        for stage in stages:
            x, balance = stage(x, return_balance=True)
            maps.append(x)
            terms += balance
        aux_loss = self.aux_loss_weight * torch.stack(terms).mean() if terms else None
        # Do not keep the proxies of an FX trace, and do not let an exported graph change the module.
        keep = isinstance(aux_loss, Tensor) and not torch.compiler.is_exporting()
        self.aux_loss = aux_loss if keep else None
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalized map of the last stage, (B, H', W', num_features), from (B, in_chans, H, W)."""
        return self.norm(self.run_stages(self.stem(x), self.stages)[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out ``aux_loss``, whose graph cannot be copied or pickled."""
        return self.__dict__ | {"aux_loss": None}


def _init_weights(module: nn.Module, name: str) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, SwitchOfScans):
        module.reset_parameters()  # after its linear layer


_cfg = partial(
    make_cfg,
    first_conv="stem.proj",
    license="apache-2.0",
    paper_ids="arXiv:2403.19888",
    paper_name="MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection",
    origin_url="https://github.com/MambaMixer/M2",
)

# Neither the authors nor we have published weights.
default_cfgs = generate_default_cfgs(
    {
        f"{family}_{size}.untrained": _cfg(**(ATTO if size == "atto" else {}))
        for family in ("vim2", "viqs")
        for size in ("tiny", "small", "base", "atto")
    }
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], options: dict[str, Any]) -> MambaMixer:
    # There is nothing to convert: a file of weights has our names.
    return build_from_official(MambaMixer, variant, pretrained, dict, **defaults | options)


@register_model
def vim2_tiny(pretrained: bool = False, **kwargs: Any) -> MambaMixer:
    """ViM2-T: 20.3 M parameters (the paper's: 20 M)."""
    args = dict(depths=(1, 1, 3, 1), dims=(96, 192, 384, 768))
    return _create("vim2_tiny", pretrained, args, kwargs)


@register_model
def vim2_small(pretrained: bool = False, **kwargs: Any) -> MambaMixer:
    """ViM2-S: 43.0 M parameters (the paper's: 43 M)."""
    args = dict(depths=(1, 1, 9, 1), dims=(96, 192, 384, 768), channel_expand=2.25)
    return _create("vim2_small", pretrained, args, kwargs)


@register_model
def vim2_base(pretrained: bool = False, **kwargs: Any) -> MambaMixer:
    """ViM2-B: 74.8 M parameters (the paper's: 74 M)."""
    args = dict(depths=(1, 1, 9, 1), dims=(128, 256, 512, 1024), channel_expand=2.25)
    return _create("vim2_base", pretrained, args, kwargs)


@register_model
def vim2_atto(pretrained: bool = False, **kwargs: Any) -> MambaMixer:
    """Ours, for images of about 32x32 pixels (stem of stride 2): less than 1 M parameters."""
    args = dict(depths=(1, 1, 1, 1), dims=(32, 64, 96, 128), stem_stride=2, d_state=8)
    return _create("vim2_atto", pretrained, args, kwargs)


@register_model
def viqs_tiny(pretrained: bool = False, **kwargs: Any) -> MambaMixer:
    """ViQS-T: 18.1 M parameters; the paper's sizes are not known."""
    args = dict(depths=(1, 1, 3, 1), dims=(96, 192, 384, 768), qs_mixer=True)
    return _create("viqs_tiny", pretrained, args, kwargs)


@register_model
def viqs_small(pretrained: bool = False, **kwargs: Any) -> MambaMixer:
    """ViQS-S: 31.1 M parameters; the paper's sizes are not known."""
    args = dict(depths=(1, 1, 9, 1), dims=(96, 192, 384, 768), qs_mixer=True)
    return _create("viqs_small", pretrained, args, kwargs)


@register_model
def viqs_base(pretrained: bool = False, **kwargs: Any) -> MambaMixer:
    """ViQS-B: 54.5 M parameters; the paper's sizes are not known."""
    args = dict(depths=(1, 1, 9, 1), dims=(128, 256, 512, 1024), qs_mixer=True)
    return _create("viqs_base", pretrained, args, kwargs)


@register_model
def viqs_atto(pretrained: bool = False, **kwargs: Any) -> MambaMixer:
    """Ours, for images of about 32x32 pixels (stem of stride 2): less than 1 M parameters."""
    args = dict(depths=(1, 1, 1, 1), dims=(32, 64, 96, 128), stem_stride=2, d_state=8, qs_mixer=True)
    return _create("viqs_atto", pretrained, args, kwargs)
