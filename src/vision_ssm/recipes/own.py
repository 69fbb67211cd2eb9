from vision_ssm.recipes.config import DetectionConfig, SegmentationConfig
from vision_ssm.recipes.recipe import OURS, Sourced, recipe


@recipe()
def digits() -> Sourced:
    """Handwritten digits, enlarged from 8x8 to 16x16 pixels: about 99 % accuracy, in a minute or two on two cores."""
    model = dict(data="digits", model="vmamba_atto", img_size=16, num_workers=0)
    augment = dict(scale=(0.7, 1.0), hflip=0.0, color_jitter=0.0)
    return {OURS: dict(model, **augment, epochs=15, batch_size=64, lr=4e-3, warmup_epochs=3)}


@recipe()
def small() -> Sourced:
    """Small images (32 by 32) from scratch, sized for a CPU."""
    augment = dict(scale=(0.5, 1.0), color_jitter=0.2)
    optim = dict(epochs=20, batch_size=64, lr=2e-3, warmup_epochs=2)
    return {OURS: dict(augment, **optim, model="vmamba_atto", img_size=32)}


@recipe()
def scratch() -> Sourced:
    """Photographs from random weights, with the augmentation customary since DeiT."""
    augment = dict(auto_augment="rand-m9-mstd0.5-inc1", random_erase=0.25, mixup=0.8, cutmix=1.0)
    optim = dict(epochs=300, batch_size=128, lr=5e-4, warmup_epochs=20, ema_decay=0.9999)
    return {OURS: dict(augment, **optim, model="vmamba_tiny", drop_path_rate=0.2)}


@recipe()
def finetune() -> Sourced:
    """Photographs from the published weights: few epochs, small steps, gentle augmentation."""
    model = dict(model="vmamba_tiny", pretrained=True, drop_path_rate=0.1)
    augment = dict(scale=(0.3, 1.0), color_jitter=0.3)
    optim = dict(epochs=20, batch_size=32, lr=2e-4, min_lr=1e-6, warmup_epochs=2, layer_decay=0.8)
    return {OURS: dict(model, **augment, **optim)}


@recipe(DetectionConfig)
def detect() -> Sourced:
    """Objects in your photographs, with masks where the data has them; sized for a CPU."""
    model = dict(model="sparx_mamba_atto", out_indices=(1, 2, 3), width=96, box_samples=64, test_size=(320, 192))
    augment = dict(short_sides=(144, 160, 176, 192), long_side=320)
    optim = dict(epochs=16, batch_size=4, lr=1e-3, warmup_epochs=2, weight_decay=0.05)
    return {OURS: dict(model, **augment, **optim)}


@recipe(SegmentationConfig)
def segment() -> Sourced:
    """Every pixel of your photographs; sized for a CPU."""
    model = dict(model="sparx_mamba_atto", out_indices=(1, 2, 3), width=96, test_size=(320, 240))
    augment = dict(scale=(0.6, 1.6), crop_size=192, class_balance=0.25)
    optim = dict(epochs=50, batch_size=4, lr=2e-3, warmup_epochs=2, weight_decay=0.05)
    return {OURS: dict(model, **augment, **optim)}
