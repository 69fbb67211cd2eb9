"""How the published weights of each model were trained on ImageNet-1K.

Where sources disagree, the one that made the published weights counts. `batch_size` and `grad_accum` are the images of
one GPU and the number of GPUs, so that mixing and batch norms see on one GPU what they saw on several.
"""

from collections.abc import Sequence
from typing import Any

from vision_ssm.recipes.recipe import Recipe, Sourced

_CROP = dict(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), train_interpolation="bicubic", hflip=0.5, color_jitter=0.4)
_MIX = dict(mixup=0.8, cutmix=1.0, mixup_prob=1.0, mixup_switch_prob=0.5)
_AUGMENT = dict(_CROP, **_MIX, auto_augment="rand-m9-mstd0.5-inc1", random_erase=0.25)
_ADAMW = dict(optimizer="adamw", betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, published_decay=True, clip_grad=5.0)
_SCHEDULE = dict(
    epochs=300, schedule="cosine", warmup_epochs=20, warmup_prefix=False, warmup_by_epoch=False, decay_by_epoch=False
)
_RUN = dict(label_smoothing=0.1, ema_decay=0.9999, ema_warmup=False, precision="16-mixed", monitor="accuracy")
_COMMON: dict[str, Any] = dict(_AUGMENT, **_ADAMW, **_SCHEDULE, **_RUN)
# VMamba's trainer, which GroupMamba and (in an older version) MambaMixer use as well: learning rates for 512 images,
# changed at every step, and a cosine that begins after the warmup.
_PER_512 = dict(_COMMON, lr=5e-4, min_lr=5e-6, warmup_lr=5e-7, lr_base_size=512, warmup_prefix=True)
_INPUT = dict(img_size=224, crop_pct=0.875)
_RESIZED = "resized to 256, cropped to 224"

_AS_PUBLISHED = " as its published weights were trained on ImageNet-1K"
_JITTER = "Color jitter is given, but RandAugment takes its place."


def _recipe(text: str, values: Sourced, notes: Sequence[str] = ()) -> Recipe:
    model = next(given["model"] for given in values.values() if "model" in given)
    return Recipe(f"{model.replace('_', '-')}-in1k", text, values, (_JITTER, *notes))


def _vmamba(model: str, drop_path_rate: float, file: str) -> Recipe:
    where = "MzeroMiko/VMamba@2ed52ea, classification"
    values: Sourced = {
        f"{where}, {file}.yaml": dict(model=model, drop_path_rate=drop_path_rate),
        f"{where}: 8 GPUs of 128 images": dict(batch_size=128, grad_accum=8),
        where: _PER_512,
        f"{where}: {_RESIZED}": _INPUT,
    }
    return _recipe("VMamba" + _AS_PUBLISHED, values)


def _sparx_mamba(model: str, drop_path_rate: float, crop_pct: float) -> Recipe:
    where = "LMMMEng/SparX@4934ab1"
    rates = dict(lr=4e-3, min_lr=1e-5, warmup_lr=1e-6, lr_base_size=None)
    schedule = dict(epochs=310, warmup_by_epoch=True, decay_by_epoch=True, cooldown_epochs=10)
    others = dict(img_size=224, train_interpolation="random", ema_decay=0.9998)
    values: Sourced = {
        f"{where}, scripts: 8 GPUs of 256 images": dict(batch_size=256, grad_accum=8),
        f"{where}, scripts": dict(model=model, drop_path_rate=drop_path_rate, crop_pct=crop_pct),
        f"{where}, train.py and scripts (timm 0.6.12)": _COMMON | rates | schedule | others,
    }
    notes = (
        "Batch norms shared their statistics between the GPUs, 2048 images; here each 256 images have their own. On as "
        "many GPUs, --devices 8 --grad-accum 1 --sync-batchnorm does what the authors did.",
        "Whether the published accuracy is that of the moving average is not stated.",
    )
    return _recipe("SparX-Mamba" + _AS_PUBLISHED, values, notes)


def _sparx_swin(model: str, drop_path_rate: float, crop_pct: float) -> Recipe:
    like = _sparx_mamba(model, drop_path_rate, crop_pct)
    values = {f"not published; as for SparX-Mamba: {source}": given for source, given in like.values.items()}
    text = "SparX-Swin on ImageNet-1K; its training was not published, so as SparX-Mamba"
    return _recipe(text, values, ("Training and weights of SparX-Swin were never published, and the sizes are ours.",))


def _efficient_vmamba(size: str, batch_size: int, *notes: str) -> Recipe:
    where = "TerryPei/EfficientVMamba@0bc5ee2, classification/logs"
    log = f"{where}, log of {size[0].upper()}"
    rates = dict(lr=2e-3, min_lr=1e-6, warmup_lr=1e-7, lr_base_size=None, warmup_prefix=True, warmup_by_epoch=True)
    augment = dict(color_jitter=0.3, auto_augment="rand-m9-mstd0.5", mixup=0.2)
    model = dict(model=f"efficient_vmamba_{size}", drop_path_rate=0.1, weight_decay=0.04, clip_grad=1.0)
    values: Sourced = {
        f"{log}: 16 GPUs of {batch_size} images": dict(batch_size=batch_size, grad_accum=16),
        log: _COMMON | rates | augment | model,
        f"{where}: {_RESIZED}": _INPUT,
    }
    disagree = "The recipes of readme and paper differ from the logs; a user of the readme's got 74.7 instead of 76.5."
    return _recipe("EfficientVMamba" + _AS_PUBLISHED, values, (disagree, *notes))


def _group_mamba(size: str) -> Recipe:
    where = "Amshaker/GroupMamba@c1800ed"
    distill = dict(teacher="regnety_160.deit_in1k", distill_type="hard", distill_alpha=0.5, distill_tau=1.0)
    values: Sourced = {
        f"{where}: 8 GPUs of 128 images": dict(batch_size=128, grad_accum=8),
        f"{where}, train.py": dict(distill, model=f"group_mamba_{size}", drop_path_rate=0.05),
        f"{where}, train.py and config.py": _PER_512,
        f"{where}: {_RESIZED}": _INPUT,
    }
    notes = (
        "The schedule ran one step late: steps 0 and 1 had the same learning rate.",
        "The teacher knows ImageNet's classes only. With others name one of your own, or --teacher None.",
    )
    return _recipe("GroupMamba" + _AS_PUBLISHED, values, notes)


def _mamba_mixer(model: str, drop_path_rate: float) -> Recipe:
    paper, older = "arXiv 2403.19888v1, section 6", "not stated; MzeroMiko/VMamba@d921eaf, whose pipeline it names"
    stated = dict(epochs=300, warmup_epochs=20, optimizer="adamw", weight_decay=0.05)
    rates = dict(lr=5e-4, lr_base_size=512)
    chosen = dict(precision="bf16-mixed", ema_decay=None)
    others = {name: value for name, value in _PER_512.items() if name not in {*stated, *rates, *chosen, "ema_warmup"}}
    values: Sourced = {
        f"{paper}: batch 1024": dict(batch_size=128, grad_accum=8),
        paper: dict(stated, model=model, img_size=224),
        f"{paper}: 1e-3 at batch 1024": rates,
        "not stated; our choice": chosen,
        older: dict(others, drop_path_rate=drop_path_rate, crop_pct=0.875),
    }
    text = "ViM2 and ViQS on ImageNet-1K following the paper; no weights were published"
    return _recipe(text, values, ("Code and weights were never published; the models are in the paper's style.",))


PUBLISHED = (
    _vmamba("vmamba_tiny", 0.2, "vmambav2v_tiny_224"),
    _vmamba("vmamba_small", 0.3, "vmambav2_small_224"),
    _vmamba("vmamba_base", 0.6, "vmambav2_base_224"),
    _vmamba("vmamba_tiny_s2l5", 0.2, "vmambav2_tiny_224"),
    _vmamba("vmamba_small_s1l20", 0.3, "vmambav2v_small_224"),
    _vmamba("vmamba_base_s1l20", 0.5, "vmambav2v_base_224"),
    *(
        make(f"{family}_{size}", rate, crop)
        for family, make in (("sparx_mamba", _sparx_mamba), ("sparx_swin", _sparx_swin))
        for size, rate, crop in (("tiny", 0.2, 0.9), ("small", 0.3, 0.95), ("base", 0.5, 0.95))
    ),
    _efficient_vmamba("tiny", 128),
    _efficient_vmamba("small", 128, "Epochs 172 to 299 were trained without mixed precision."),
    _efficient_vmamba("base", 64, "The learning rate was that of the smaller models, at half their batch."),
    *(_group_mamba(size) for size in ("tiny", "small", "base")),
    *(
        _mamba_mixer(f"{family}_{size}", rate)
        for family in ("vim2", "viqs")
        for size, rate in (("tiny", 0.2), ("small", 0.3), ("base", 0.5))
    ),
)
