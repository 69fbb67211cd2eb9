"""What was published about detectors and segmenters on the backbones of this package: results, cost and weights."""

from dataclasses import dataclass

_VMAMBA = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2det/mask_rcnn_vssm_fpn_coco_"
_SPARX = "https://github.com/LMMMEng/SparX/releases/download/v1/maskrcnn_sparx_mamba_"
_COST, _FLOPS = "its published cost does not fit the heads it names", "its published FLOPs do not fit the network"
_UNPUBLISHED = "its network was not published"


@dataclass(frozen=True)
class PublishedDetector:
    """A published result; it belongs to its authors' weights, which only some of them released.

    Args:
        model: The backbone, by its name in timm's registry.
        detector: mask-rcnn or retinanet.
        schedule: 1x (12 epochs) or 3x (36 epochs and multi-scale training).
        box_ap: AP of the boxes in %, over IoU 0.5 to 0.95.
        mask_ap: AP of the masks in %.
        parameters: Millions of parameters, as published.
        flops: GFLOPs for an image of 1280 x 800, as published; a multiply-accumulate is one.
        weights: Address of the weights file.
        note: What to know about the row.
    """

    model: str
    detector: str
    schedule: str
    box_ap: float
    mask_ap: float | None = None
    parameters: float | None = None
    flops: float | None = None
    weights: str | None = None
    note: str | None = None


def _vmamba(model: str, schedule: str, box_ap: float, mask_ap: float, cost: tuple[float, float], file: str,
            note: str | None = None) -> PublishedDetector:  # fmt: skip
    """Source: MzeroMiko/VMamba@2ed52ea, README.md and assets/performance.md."""
    url = f"{_VMAMBA}{file}.pth"
    return PublishedDetector(model, "mask-rcnn", schedule, box_ap, mask_ap, *cost, url, note)


def _sparx(size: str, schedule: str, box_ap: float, mask_ap: float) -> PublishedDetector:
    """Source: LMMMEng/SparX@a59b4f4, detection/readme.md."""
    url = f"{_SPARX}{size[0]}_fpn_{schedule}_coco.pth"
    return PublishedDetector(f"sparx_mamba_{size}", "mask-rcnn", schedule, box_ap, mask_ap, weights=url)


def _efficient(
    size: str, schedule: str, box_ap: float, mask_ap: float, cost: tuple[float, float], note: str | None = None
) -> PublishedDetector:
    """Source: arXiv 2403.09977, table 7."""
    model = f"efficient_vmamba_{size}"
    return PublishedDetector(model, "mask-rcnn", schedule, box_ap, mask_ap, *cost, note=note)


def _efficient_retinanet(size: str, box_ap: float, parameters: float, note: str | None = None) -> PublishedDetector:
    """Source: arXiv 2403.09977, table 3."""
    return PublishedDetector(f"efficient_vmamba_{size}", "retinanet", "1x", box_ap, None, parameters, note=note)


PUBLISHED_DETECTORS = (
    _vmamba("vmamba_tiny", "1x", 47.3, 42.7, (50, 271), "tiny_s_epoch_12"),
    _vmamba("vmamba_tiny", "3x", 48.8, 43.7, (50, 271), "tiny_ms_3x_s_epoch_31"),
    _vmamba("vmamba_tiny_s2l5", "1x", 47.4, 42.7, (50, 270), "tiny_epoch_12"),
    _vmamba("vmamba_tiny_s2l5", "3x", 48.9, 43.7, (50, 270), "tiny_ms_3x_epoch_36"),
    _vmamba("vmamba_small", "1x", 48.7, 43.7, (70, 384), "small_epoch_11", _FLOPS),
    _vmamba("vmamba_small", "3x", 49.9, 44.2, (70, 384), "small_ms_3x_epoch_32", _FLOPS),
    _vmamba("vmamba_base", "1x", 49.2, 44.1, (108, 485), "base_epoch_11"),
    _vmamba("vmamba_base", "1x", 49.2, 43.9, (108, 485), "base_epoch_12_bs8", "trained with 8 images per step"),
    _sparx("tiny", "1x", 48.1, 43.1),
    _sparx("tiny", "3x", 50.2, 44.7),
    _sparx("small", "1x", 49.4, 44.1),
    _sparx("small", "3x", 51.0, 45.2),
    _sparx("base", "1x", 49.7, 44.3),
    _sparx("base", "3x", 51.8, 45.8),
    _efficient("tiny", "1x", 35.6, 33.2, (11, 60), _COST),
    _efficient("tiny", "3x", 38.3, 35.3, (11, 60), _COST),
    _efficient("small", "1x", 39.3, 36.7, (31, 197)),
    _efficient("small", "3x", 41.6, 38.2, (31, 197)),
    _efficient("base", "1x", 43.7, 40.2, (53, 252)),
    _efficient("base", "3x", 45.0, 40.8, (53, 252)),
    _efficient_retinanet("tiny", 37.5, 13.0, _COST),
    _efficient_retinanet("small", 39.1, 19.0, _COST),
    _efficient_retinanet("base", 42.8, 44.0),
    # arXiv 2407.13772, section 4.2
    PublishedDetector("group_mamba_tiny", "mask-rcnn", "1x", 47.6, 42.9, 40.0, 279.0, note=_UNPUBLISHED),
    # arXiv 2403.19888v1, table 4
    PublishedDetector("vim2_tiny", "mask-rcnn", "1x", 47.1, 42.4, 39.0, note=f"{_UNPUBLISHED}, nor its schedule"),
    PublishedDetector("vim2_small", "mask-rcnn", "1x", 48.5, 43.1, 62.0, note=f"{_UNPUBLISHED}, nor its schedule"),
)
"""All published results."""

_VMAMBA_SEG = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_"
_SPARX_SEG = "https://github.com/LMMMEng/SparX/releases/download/v1/upernet_sparx_mamba_"


@dataclass(frozen=True)
class PublishedSegmenter:
    """A published result of UPerNet, 160,000 iterations on ADE20K; it belongs to its authors' weights.

    Args:
        model: The backbone, by its name in timm's registry.
        miou: Mean IoU in % on the validation images.
        miou_ms: The same, averaged over six scales and flips.
        parameters: Millions of parameters, as published.
        flops: GFLOPs for an image of 2048 x 512, as published; a multiply-accumulate is one.
        weights: Address of the weights file.
        note: What to know about the row.
        detector: The decoder.
        schedule: Its iterations.
    """

    model: str
    miou: float
    miou_ms: float | None = None
    parameters: float | None = None
    flops: float | None = None
    weights: str | None = None
    note: str | None = None
    detector: str = "upernet"
    schedule: str = "160k"


PUBLISHED_SEGMENTERS = (
    # MzeroMiko/VMamba@2ed52ea, README.md and assets/performance.md
    PublishedSegmenter("vmamba_tiny", 47.9, 48.8, 62, 949, f"{_VMAMBA_SEG}tiny_s_iter_160000.pth"),
    PublishedSegmenter("vmamba_tiny_s2l5", 48.3, 48.6, 62, 948, f"{_VMAMBA_SEG}tiny_iter_160000.pth"),
    PublishedSegmenter("vmamba_small", 50.6, 51.2, 82, 1028, f"{_VMAMBA_SEG}small_iter_144000.pth"),
    PublishedSegmenter("vmamba_base", 51.0, 51.6, 122, 1170, f"{_VMAMBA_SEG}base_iter_160000.pth"),
    # LMMMEng/SparX@7fdb991, segmentation/readme.md
    PublishedSegmenter("sparx_mamba_tiny", 50.2, weights=f"{_SPARX_SEG}tiny.pth"),
    PublishedSegmenter("sparx_mamba_small", 51.4, weights=f"{_SPARX_SEG}small.pth"),
    PublishedSegmenter("sparx_mamba_base", 52.5, weights=f"{_SPARX_SEG}base.pth"),
    # arXiv 2403.09977, table 4
    PublishedSegmenter("efficient_vmamba_tiny", 38.9, 39.3, 14, 230, note=_COST),
    PublishedSegmenter("efficient_vmamba_small", 41.5, 42.1, 29, 505, note=_COST),
    PublishedSegmenter("efficient_vmamba_base", 46.5, 47.3, 65, 930),
    # arXiv 2407.13772, section 4.3
    PublishedSegmenter("group_mamba_tiny", 48.6, 49.2, 49, 955, note=_UNPUBLISHED),
    # arXiv 2403.19888v1, section 6
    PublishedSegmenter("vim2_tiny", 48.6, 49.9, 51, note=_UNPUBLISHED),
    PublishedSegmenter("vim2_small", 50.2, 51.4, 75, note=_UNPUBLISHED),
)
"""All published results of semantic segmentation."""
