"""How the published weights of each model were trained on ImageNet-1K.

Where sources disagree, the one that made the published weights counts. Batch size and `accumulate` are the images of
one GPU and the number of GPUs, so that mixing and batch norms see on one GPU what they saw on several.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from vision_ssm.recipes.config import Augmentation, Distillation, FolderConfig, FolderData, Optimisation
from vision_ssm.recipes.recipe import Recipe, cite

_AUGMENT = Augmentation(
    scale=(0.08, 1.0),
    ratio=(3 / 4, 4 / 3),
    interpolation="bicubic",
    hflip=0.5,
    color_jitter=0.4,
    auto_augment="rand-m9-mstd0.5-inc1",
    erase=0.25,
    mixup=0.8,
    cutmix=1.0,
    mix_prob=1.0,
    mix_switch=0.5,
)
_OPTIM = Optimisation(
    optimizer="adamw",
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.05,
    published_decay=True,
    schedule="cosine",
    warmup_epochs=20,
    clip_grad=5.0,
    label_smoothing=0.1,
    ema_warmup=False,
)
# VMamba's trainer, which GroupMamba and (in an older version) MambaMixer use as well: rates for 512 images, changed at
# every step, and a cosine that begins after the warm-up.
_PER_512 = replace(_OPTIM, lr=5e-4, min_lr=5e-6, warmup_lr=5e-7, lr_batch=512, warmup_first=True)

_BATCH = "batch_size accumulate"
_MIX = "augment.mixup augment.cutmix augment.mix_prob augment.mix_switch"
_CHANGES = (
    "augment.scale augment.ratio augment.interpolation augment.hflip augment.color_jitter augment.auto_augment "
    "augment.erase " + _MIX
)
_RATES = "optim.lr optim.min_lr optim.warmup_lr optim.lr_batch"
_SCHEDULE = "epochs optim.schedule optim.warmup_epochs optim.warmup_first optim.warmup_by_epoch optim.decay_by_epoch"
_ADAMW = "optim.optimizer optim.betas optim.eps optim.weight_decay optim.published_decay optim.clip_grad"
_LOSS = "optim.label_smoothing"
_AVERAGE = "optim.ema optim.ema_warmup"
_INPUT = "image_size crop"
_MODEL = "model drop_path"

_AS_PUBLISHED = " as its published weights were trained on ImageNet-1K"
_JITTER = "Colour jitter is given, but RandAugment takes its place."


@dataclass(frozen=True)
class _Size:
    """What differs between the sizes of a family."""

    model: str
    drop_path: float
    batch_size: int = 128
    accumulate: int = 8
    crop: float = 0.875

    def recipe(self, title: str, config: FolderConfig, sources: dict[str, str], notes: tuple[str, ...] = ()) -> Recipe:
        def make(root: Path) -> FolderConfig:
            return replace(
                config,
                data=FolderData(root=root),
                model=self.model,
                drop_path=self.drop_path,
                batch_size=self.batch_size,
                accumulate=self.accumulate,
                crop=self.crop,
            )

        name = self.model.replace("_", "-") + "-in1k"
        return Recipe(name=name, text=title, make=make, sources=cite(sources), notes=notes)


_BASE = FolderConfig(data=FolderData(root=Path()), image_size=224, epochs=300, augment=_AUGMENT, precision="16-mixed")


def _vmamba() -> list[Recipe]:
    where = "MzeroMiko/VMamba@2ed52ea, classification"
    sizes = {
        "vmambav2v_tiny_224": _Size("vmamba_tiny", 0.2),
        "vmambav2_small_224": _Size("vmamba_small", 0.3),
        "vmambav2_base_224": _Size("vmamba_base", 0.6),
        "vmambav2_tiny_224": _Size("vmamba_tiny_s2l5", 0.2),
        "vmambav2v_small_224": _Size("vmamba_small_s1l20", 0.3),
        "vmambav2v_base_224": _Size("vmamba_base_s1l20", 0.5),
    }
    config = replace(_BASE, optim=replace(_PER_512, ema=0.9999))
    recipes = []
    for file, size in sizes.items():
        sources = {
            f"{where}, {file}.yaml": _MODEL,
            f"{where}: 8 GPUs of 128 images": _BATCH,
            where: f"{_RATES} {_SCHEDULE} {_ADAMW} {_LOSS} {_AVERAGE} {_CHANGES} precision",
            f"{where}: resized to 256, cropped to 224": _INPUT,
        }
        recipes.append(size.recipe("VMamba" + _AS_PUBLISHED, config, sources, (_JITTER,)))
    return recipes


def _sparx(family: str) -> list[Recipe]:
    where = "LMMMEng/SparX@4934ab1"
    swin = family == "sparx_swin"
    sizes = (
        _Size(f"{family}_tiny", 0.2, 256, 8, 0.9),
        _Size(f"{family}_small", 0.3, 256, 8, 0.95),
        _Size(f"{family}_base", 0.5, 256, 8, 0.95),
    )
    optim = replace(
        _OPTIM,
        lr=4e-3,
        min_lr=1e-5,
        warmup_lr=1e-6,
        warmup_by_epoch=True,
        decay_by_epoch=True,
        cooldown_epochs=10,
        ema=0.9998,
    )
    config = replace(_BASE, epochs=310, augment=replace(_AUGMENT, interpolation="random"), optim=optim)
    sources = {
        f"{where}, scripts: 8 GPUs of 256 images": _BATCH,
        f"{where}, scripts": _MODEL + " crop",
        f"{where}, train.py and scripts (timm 0.6.12)": (
            f"{_RATES} {_SCHEDULE} optim.cooldown_epochs {_ADAMW} {_LOSS} {_AVERAGE} {_CHANGES} image_size precision"
        ),
    }
    title = "SparX-Mamba" + _AS_PUBLISHED
    notes: tuple[str, ...] = (
        _JITTER,
        "Batch norms shared their statistics between the GPUs, 2048 images; here each 256 images have their own.",
        "Whether the published accuracy is that of the moving average is not stated.",
    )
    if swin:
        title = "SparX-Swin on ImageNet-1K; its training was not published, so as SparX-Mamba"
        sources = {f"not published; as for SparX-Mamba: {source}": fields for source, fields in sources.items()}
        notes = (_JITTER, "Training and weights of SparX-Swin were never published, and the sizes are ours.")
    return [size.recipe(title, config, sources, notes) for size in sizes]


def _efficient_vmamba() -> list[Recipe]:
    where = "TerryPei/EfficientVMamba@0bc5ee2"
    optim = replace(
        _OPTIM,
        lr=2e-3,
        min_lr=1e-6,
        warmup_lr=1e-7,
        warmup_first=True,
        warmup_by_epoch=True,
        weight_decay=0.04,
        clip_grad=1.0,
        ema=0.9999,
    )
    augment = replace(_AUGMENT, color_jitter=0.3, auto_augment="rand-m9-mstd0.5", mixup=0.2)
    config = replace(_BASE, augment=augment, optim=optim)
    sizes = (
        _Size("efficient_vmamba_tiny", 0.1, 128, 16),
        _Size("efficient_vmamba_small", 0.1, 128, 16),
        _Size("efficient_vmamba_base", 0.1, 64, 16),
    )
    disagree = "The recipes of readme and paper differ from the logs; a user of the readme's got 74.7 instead of 76.5."
    own = {
        "efficient_vmamba_small": ("Epochs 172 to 299 were trained without mixed precision.",),
        "efficient_vmamba_base": ("The learning rate was that of the smaller models, at half their batch.",),
    }
    recipes = []
    for size in sizes:
        letter = size.model.rsplit("_", 1)[-1][0].upper()
        sources = {
            f"{where}, classification/logs, log of {letter}: 16 GPUs of {size.batch_size} images": _BATCH,
            f"{where}, classification/logs, log of {letter}": (
                f"{_MODEL} {_RATES} {_SCHEDULE} {_ADAMW} {_LOSS} {_AVERAGE} {_CHANGES} precision"
            ),
            f"{where}, classification/logs: resized to 256, cropped to 224": _INPUT,
        }
        notes = (_JITTER, disagree, *own.get(size.model, ()))
        recipes.append(size.recipe("EfficientVMamba" + _AS_PUBLISHED, config, sources, notes))
    return recipes


def _group_mamba() -> list[Recipe]:
    where = "Amshaker/GroupMamba@c1800ed"
    distill = Distillation(teacher="regnety_160.deit_in1k", soft=False, alpha=0.5, tau=1.0)
    config = replace(_BASE, optim=replace(_PER_512, ema=0.9999), distill=distill)
    sources = {
        f"{where}: 8 GPUs of 128 images": _BATCH,
        f"{where}, train.py": f"{_MODEL} distill.teacher distill.soft distill.alpha distill.tau",
        f"{where}, train.py and config.py": f"{_RATES} {_SCHEDULE} {_ADAMW} {_LOSS} {_AVERAGE} {_CHANGES} precision",
        f"{where}: resized to 256, cropped to 224": _INPUT,
    }
    notes = (
        _JITTER,
        "The schedule ran one step late: steps 0 and 1 had the same rate.",
        "The teacher knows ImageNet's classes only. With others name one of your own, or --distill.teacher None.",
    )
    sizes = [_Size(f"group_mamba_{size}", 0.05) for size in ("tiny", "small", "base")]
    return [size.recipe("GroupMamba" + _AS_PUBLISHED, config, sources, notes) for size in sizes]


def _mamba_mixer(family: str) -> list[Recipe]:
    paper, older = "arXiv 2403.19888v1, section 6", "not stated; MzeroMiko/VMamba@d921eaf, whose pipeline it names"
    config = replace(_BASE, optim=replace(_PER_512, ema_warmup=True), precision="bf16-mixed")
    sources = {
        f"{paper}: batch 1024": _BATCH,
        paper: "model epochs optim.warmup_epochs optim.optimizer optim.weight_decay image_size",
        f"{paper}: 1e-3 at batch 1024": "optim.lr optim.lr_batch",
        "not stated; our choice": "precision optim.ema",
        older: (
            "drop_path optim.min_lr optim.warmup_lr optim.schedule optim.warmup_first optim.warmup_by_epoch "
            f"optim.decay_by_epoch optim.betas optim.eps optim.published_decay optim.clip_grad {_LOSS} {_CHANGES} crop"
        ),
    }
    notes = (
        _JITTER,
        "Code and weights were never published; the models are in the paper's style.",
    )
    sizes = [_Size(f"{family}_{size}", rate) for size, rate in (("tiny", 0.2), ("small", 0.3), ("base", 0.5))]
    title = "ViM2 and ViQS on ImageNet-1K as the paper tells; no weights were published"
    return [size.recipe(title, config, sources, notes) for size in sizes]


PUBLISHED = (
    *_vmamba(),
    *_sparx("sparx_mamba"),
    *_sparx("sparx_swin"),
    *_efficient_vmamba(),
    *_group_mamba(),
    *_mamba_mixer("vim2"),
    *_mamba_mixer("viqs"),
)
