"""The recipes of published detectors against the settings and schedules of their configurations."""

import pytest
import torch

from vision_ssm.checkpoints.published_detectors import PUBLISHED_DETECTORS
from vision_ssm.engine.optimization import LearningRate
from vision_ssm.recipes import RECIPES, DetectionConfig, to_dict
from vision_ssm.recipes.detection import DETECTION

DEFAULTS = to_dict(DetectionConfig())
STEPS = 7330  # per epoch of COCO train2017 with 16 images each


@pytest.mark.parametrize("recipe", DETECTION, ids=lambda recipe: recipe.name)
def test_every_value_has_a_source(recipe):
    config = recipe()
    values = to_dict(config)
    assert recipe.sources.keys() <= values.keys()
    assert {name for name in values if values[name] != DEFAULTS[name]} <= recipe.sources.keys()
    schedule = "3x" if config.epochs == 36 else "1x"
    assert recipe.name == f"{config.model.replace('_', '-')}-{config.detector}-{schedule}"
    assert (config.images_per_step, config.lr, config.clip_grad, config.filter_empty) == (16, 1e-4, None, True)
    assert (config.test_size, config.long_side, config.hflip) == ((1333, 800), 1333, 0.5)
    assert config.weight_decay == (1e-4 if config.detector == "retinanet" else 0.05)
    assert config.random_crop == (schedule == "3x")
    assert config.short_sides == (tuple(range(480, 801, 32)) if schedule == "3x" else (800,))


def test_every_published_result_has_a_recipe():
    results = {(result.model, result.detector, result.schedule) for result in PUBLISHED_DETECTORS}
    configs = [recipe() for recipe in DETECTION]
    found = {(c.model, c.detector, "3x" if c.epochs == 36 else "1x") for c in configs}
    assert found - results == {
        (f"vim2_{size}", "mask-rcnn", "3x") for size in ("tiny", "small")
    }  # of which none is given
    assert results <= found


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("vmamba-tiny-mask-rcnn-1x", 0.2),
        ("vmamba-small-mask-rcnn-3x", 0.3),
        ("vmamba-base-mask-rcnn-1x", 0.6),
        ("sparx-mamba-base-mask-rcnn-3x", 0.45),
        ("efficient-vmamba-base-mask-rcnn-3x", 0.1),
    ],
)
def test_stochastic_depth(name, rate):
    assert RECIPES[name]().drop_path_rate == rate


# Of the warmup: first, halfway, last but one and last; then around the two drops, in epochs.
@pytest.mark.parametrize(
    ("name", "warmup", "drops"),
    [
        ("vmamba-tiny-mask-rcnn-1x", 1000, (8, 11)),
        ("sparx-mamba-tiny-mask-rcnn-3x", 1000, (27, 33)),
        ("group-mamba-tiny-mask-rcnn-1x", 1000, (9, 11)),
        ("efficient-vmamba-base-retinanet-1x", 500, (8, 11)),
    ],
)
def test_rates_are_those_of_mmengine(name, warmup, drops):
    config = RECIPES[name]()
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), lr=config.lr)
    schedule = LearningRate(optimizer, config.scaled(config.images_per_step), STEPS)

    def rate(step):
        schedule.set(step)
        return optimizer.param_groups[0]["lr"]

    for step in (0, warmup // 2, warmup - 2, warmup - 1):  # LinearLR(start_factor=0.001, end=warmup)
        assert rate(step) == pytest.approx(1e-4 * (0.001 + 0.999 * step / (warmup - 1)), rel=1e-6)
    for i, epoch in enumerate(drops):
        assert rate(epoch * STEPS - 1) == pytest.approx(1e-4 * 0.1**i)
        assert rate(epoch * STEPS) == pytest.approx(1e-4 * 0.1 ** (i + 1))
    assert rate(config.epochs * STEPS - 1) == pytest.approx(1e-6)
