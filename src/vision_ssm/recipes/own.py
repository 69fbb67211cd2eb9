from pathlib import Path

from vision_ssm.recipes.config import Augmentation, DigitsConfig, FolderConfig, FolderData, Optimisation
from vision_ssm.recipes.recipe import Recipe

_SMALL, _LARGE = "vmamba_atto", "vmamba_tiny"


def digits() -> DigitsConfig:
    """Handwritten digits, enlarged from 8x8 to 16x16 pixels: about 99 % right, in a minute or two on two cores."""
    return DigitsConfig(
        model=_SMALL,
        image_size=16,
        epochs=15,
        batch_size=64,
        workers=0,
        augment=Augmentation(scale=(0.7, 1.0), hflip=0.0, color_jitter=0.0),
        optim=Optimisation(lr=4e-3, warmup_epochs=3),
    )


def small(root: Path) -> FolderConfig:
    """Small images (32 by 32) from scratch, sized for a CPU."""
    return FolderConfig(
        data=FolderData(root=root),
        model=_SMALL,
        image_size=32,
        epochs=20,
        batch_size=64,
        augment=Augmentation(scale=(0.5, 1.0), color_jitter=0.2),
        optim=Optimisation(lr=2e-3, warmup_epochs=2, label_smoothing=0.1),
    )


def scratch(root: Path) -> FolderConfig:
    """Photographs from random weights, with the augmentation customary since DeiT."""
    return FolderConfig(
        data=FolderData(root=root),
        model=_LARGE,
        drop_path=0.2,
        epochs=300,
        batch_size=128,
        augment=Augmentation(auto_augment="rand-m9-mstd0.5-inc1", erase=0.25, mixup=0.8, cutmix=1.0),
        optim=Optimisation(lr=5e-4, warmup_epochs=20, ema=0.9999),
    )


def finetune(root: Path) -> FolderConfig:
    """Photographs from the published weights: few epochs, small steps, gentle augmentation."""
    return FolderConfig(
        data=FolderData(root=root),
        model=_LARGE,
        pretrained=True,
        drop_path=0.1,
        epochs=20,
        batch_size=32,
        augment=Augmentation(scale=(0.3, 1.0), color_jitter=0.3),
        optim=Optimisation(lr=2e-4, min_lr=1e-6, warmup_epochs=2, layer_decay=0.8, label_smoothing=0.1),
    )


OWN = tuple(
    Recipe(name=make.__name__, text=(make.__doc__ or "").rstrip("."), make=make) for make in (small, scratch, finetune)
)
