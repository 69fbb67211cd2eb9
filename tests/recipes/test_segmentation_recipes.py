"""The recipes of published segmenters against the settings and schedules of their configurations."""

import pytest
import torch

from vision_ssm.checkpoints.published_detectors import PUBLISHED_SEGMENTERS
from vision_ssm.engine.optimization import LearningRate
from vision_ssm.recipes import RECIPES, SegmentationConfig, to_dict
from vision_ssm.recipes.segmentation import SEGMENTATION

DEFAULTS = to_dict(SegmentationConfig())


@pytest.mark.parametrize("recipe", SEGMENTATION, ids=lambda recipe: recipe.name)
def test_every_value_has_a_source(recipe):
    config = recipe()
    values = to_dict(config)
    assert recipe.sources.keys() <= values.keys()
    assert {name for name in values if values[name] != DEFAULTS[name]} <= recipe.sources.keys()
    assert recipe.name == f"{config.model.replace('_', '-')}-upernet-160k"
    assert (config.images_per_step, config.lr, config.clip_grad, config.weight_decay) == (16, 6e-5, None, 0.01)
    assert (config.test_size, config.scale, config.crop_size, config.max_class_share) == (
        (2048, 512),
        (0.5, 2),
        512,
        0.75,
    )
    assert config.size_multiple == (32 if "sparx" in config.model else 1)
    assert config.ignore_labels == (0,)


def test_every_published_result_has_a_recipe():
    assert {result.model for result in PUBLISHED_SEGMENTERS} == {recipe().model for recipe in SEGMENTATION}


@pytest.mark.parametrize(
    ("name", "rate"), [("vmamba-base", 0.6), ("sparx-mamba-small", 0.4), ("efficient-vmamba-tiny", 0.2)]
)
def test_stochastic_depth(name, rate):
    assert RECIPES[f"{name}-upernet-160k"]().drop_path_rate == rate


def test_rates_are_those_of_mmengine():
    config = RECIPES["vmamba-tiny-upernet-160k"](epochs=127)  # of 1,263 steps each, as a run sets it
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), lr=config.lr)
    schedule = LearningRate(optimizer, config.scaled(config.images_per_step), 1263)

    def rate(step):
        schedule.set(step)
        return optimizer.param_groups[0]["lr"]

    for step in (0, 750, 1498, 1499):  # LinearLR(start_factor=1e-6, end=1500)
        assert rate(step) == pytest.approx(6e-5 * (1e-6 + (1 - 1e-6) * step / 1499), rel=1e-6)
    for step in (1500, 80_750, 159_000, 159_999):  # PolyLR(power=1, begin=1500, end=160000)
        assert rate(step) == pytest.approx(6e-5 * (1 - (step - 1500) / 158_499), abs=1e-9)
    assert rate(80_750) == pytest.approx(3e-5, rel=1e-4)
    assert rate(160_100) == 0
