import json
import math
import re

import pytest
import timm
import torch

import goldens
from vision_ssm.checkpoints.group_mamba import convert_group_mamba
from vision_ssm.engine.optimization import LearningRate, make_optimizer
from vision_ssm.errors import InputError
from vision_ssm.models.registry import registered_models
from vision_ssm.recipes import RECIPES, ClassificationConfig, find, from_dict, to_dict
from vision_ssm.recipes.config import OptimConfig
from vision_ssm.recipes.detection import DETECTION
from vision_ssm.recipes.published import PUBLISHED
from vision_ssm.recipes.segmentation import SEGMENTATION

DEFAULTS = to_dict(ClassificationConfig())
published = pytest.mark.parametrize("recipe", PUBLISHED, ids=lambda recipe: recipe.name)


@published
def test_every_value_has_a_source(recipe):
    values = to_dict(recipe())
    assert recipe.sources.keys() <= values.keys()
    assert {name for name in values if values[name] != DEFAULTS[name]} <= recipe.sources.keys()


def test_every_size_with_published_training_has_a_recipe():
    models = {recipe().model for recipe in PUBLISHED}
    ours = {name for name in registered_models() if not name.endswith("_atto")}
    assert ours - models == {"dgc_mamba_tiny", "dsn_mamba_tiny", "group_mamba_tiny_wide"}
    assert len(RECIPES) == len(PUBLISHED) + len(DETECTION) + len(SEGMENTATION) + 6


@published
def test_recipe_and_model_agree_on_the_crop(recipe):
    config = recipe()
    assert config.crop_pct == timm.get_pretrained_cfg(config.model).crop_pct


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_recipes_of_sparx_name_the_synchronized_batch_norms_of_the_authors(size):
    assert "--devices 8 --grad-accum 1 --sync-batchnorm" in " ".join(RECIPES[f"sparx-mamba-{size}-in1k"].notes)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(InputError, match="did you mean sparx-mamba-tiny-in1k"):
        find("sparx-mamba-tiny")


def rates(name, steps, times):
    """The learning rates of a recipe after `times`, in steps."""
    config = RECIPES[name]()
    optim = config.scaled(config.images_per_step)
    optimizer = make_optimizer(timm.create_model("vmamba_atto"), optim)
    schedule = LearningRate(optimizer, optim, steps)
    found = [optimizer.param_groups[0]["lr"]]
    for time in times:
        schedule.set(time)
        found.append(optimizer.param_groups[0]["lr"])
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
    return found


def test_rates_of_group_mamba_are_those_of_the_published_scheduler():
    found = rates("group-mamba-tiny-in1k", 1251, [0, 1251, 25_020, 200_160, 375_299])
    assert found == pytest.approx([1e-6, 1e-6, 5.095e-5, 1e-3, 5.05e-4, 1e-5], rel=1e-3)


def test_rates_of_efficient_vmamba_are_those_of_the_published_logs():
    epochs = [1, 5, 20, 100, 200, 299]
    found = rates("efficient-vmamba-base-in1k", 1251, [1251 * epoch for epoch in epochs])
    assert found == pytest.approx([1e-7, 1.001e-4, 5.001e-4, 2e-3, 1.624e-3, 5.668e-4, 1.06e-6], rel=3e-3)
    # A staircase first, then another rate at every step.
    one, other, later, last = rates("efficient-vmamba-base-in1k", 1251, [1251, 2501, 30_001, 30_002])[1:]
    assert one == other
    assert later > last


def test_rates_of_sparx_change_once_per_epoch_and_cool_down():
    steps = 625
    first, start, warm, same, top, half, *cool = rates(
        "sparx-mamba-small-in1k",
        steps,
        [0, 5 * steps, 6 * steps - 1, 20 * steps, 150 * steps, 300 * steps, 310 * steps],
    )
    assert (first, start) == (1e-6, 1e-6)
    assert warm == same == pytest.approx(1e-6 + (4e-3 - 1e-6) * 5 / 20)
    # The warm-up lies over the beginning of the cosine.
    assert top == pytest.approx(1e-5 + (4e-3 - 1e-5) * (1 + math.cos(math.pi * 20 / 300)) / 2)
    assert half == pytest.approx((4e-3 + 1e-5) / 2)
    assert cool == [1e-5, 1e-5]


@pytest.mark.parametrize("epochs", [1, 2, 5, 25])
def test_short_runs_keep_an_epoch_of_the_schedule(epochs):
    rates = dict(lr=1.0, warmup_lr=0.0, min_lr=0.0)
    optim = OptimConfig(epochs=epochs, **rates, warmup_epochs=20, cooldown_epochs=10, warmup_prefix=True)
    optimizer = make_optimizer(torch.nn.Linear(2, 2), optim)
    schedule = LearningRate(optimizer, optim, 10)
    found = []
    for step in range(10 * epochs):
        schedule.set(step)
        found.append(optimizer.param_groups[0]["lr"])
    warm = min(20, epochs - 1)
    assert found.index(1.0) == 10 * warm
    assert sum(0 < rate < 1 for rate in found[10 * warm :]) == 9


def test_rates_grow_with_the_images_per_step():
    optim = OptimConfig(lr=5e-4, min_lr=5e-6, warmup_lr=5e-7, lr_base_size=512).scaled(1024)
    assert (optim.lr, optim.min_lr, optim.warmup_lr, optim.lr_base_size) == (1e-3, 1e-5, 1e-6, None)
    plain = OptimConfig(lr=2e-3, min_lr=1e-5).scaled(1024)
    assert (plain.lr, plain.warmup_lr) == (2e-3, 2e-5)


# As counted in the optimizers of the published code.
@pytest.mark.parametrize(
    ("name", "spared"), [("group-mamba-tiny-in1k", 119_165), ("efficient-vmamba-tiny-in1k", 45_820)], ids=str
)
def test_recipes_decay_what_the_published_training_decays(name, spared):
    config = RECIPES[name]()
    model = timm.create_model(config.model, device="meta")
    optimizer = make_optimizer(model, config)
    groups = {group["weight_decay"]: sum(p.numel() for p in group["params"]) for group in optimizer.param_groups}
    assert groups == {0.0: spared, config.weight_decay: sum(p.numel() for p in model.parameters()) - spared}
    assert optimizer.defaults["betas"] == (0.9, 0.999)


def test_group_mamba_decays_the_published_tensors():
    golden = goldens.load("groupmamba_t")
    model = timm.create_model("group_mamba_tiny", device="meta")
    spared, decayed = (
        {id(p) for p in group["params"]}
        for group in make_optimizer(model, RECIPES["group-mamba-tiny-in1k"]()).param_groups
    )
    assert len(spared | decayed) == len(list(model.parameters()))
    marks = {name: torch.full(p.shape, float(id(p) in decayed)) for name, p in model.named_parameters()}
    marked = goldens.in_published_layout(convert_group_mamba, golden, marks)
    means = [float(mark.mean()) for mark in marked.values()]  # of buffers not a number
    assert (means.count(1.0), means.count(0.0)) == (688, 569)


def test_published_decay_of_a_model_that_tells_nothing():
    with pytest.raises(InputError, match=r"--published-decay: Linear does not list"):
        make_optimizer(torch.nn.Linear(2, 2), OptimConfig(published_decay=True))


def test_configuration_survives_json(tmp_path):
    config = RECIPES["finetune"](data="photos", model_args={"a": 1}, pretrained=tmp_path / "x.pth", betas=(0.9, 0.99))
    assert from_dict(ClassificationConfig, json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(TypeError, match="has no speed"):
        from_dict(ClassificationConfig, {"speed": 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(lr=-0.1), "--lr must be above 0, got -0.1"),
        (dict(lr=math.inf), "--lr must be above 0 and finite, got inf"),
        (dict(lr=math.nan), "--lr must be above 0 and finite, got nan"),
        (dict(hflip=1.5), "--hflip must be at least 0 and at most 1, got 1.5"),
        (dict(ema_decay=1.0), "--ema-decay must be at least 0 and below 1, got 1.0"),
        (dict(betas=(0.9, 1.5)), "--betas must be at least 0 and below 1, got 0.9 1.5"),
        (dict(scale=(1.0, 0.5)), "--scale takes the smaller value first, got 1.0 0.5"),
        (dict(warmup_lr=1.0), "--warmup-lr must be at most --lr 0.001, got 1"),
        (dict(num_workers=-1), "--num-workers must be at least 0 and at most 1024, got -1"),
        (dict(seed=2**64), "--seed must be at least 0 and below"),
        (dict(published_decay=True, layer_decay=0.8), "--published-decay and --layer-decay exclude each other"),
        (dict(val_data="x", val_fraction=0.1), "--val-data and --val-fraction exclude each other"),
        (dict(schedule="foo"), "--schedule must be one of cosine, tanh, multistep, poly, got 'foo'"),
        (dict(epochs="5"), "--epochs must be int, got '5'"),
        (dict(epochs=True), "--epochs must be int, got True"),
        (dict(img_size=1.5), "--img-size must be int | None, got 1.5"),
        (dict(scale=0.5), "--scale must be"),
        (dict(mixup=1.0, batch_size=7), "mixup and CutMix need an even --batch-size, got 7"),
    ],
    ids=str,
)
def test_values_are_checked_where_they_are_defined(values, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ClassificationConfig(**values)
