import csv
import dataclasses
import io

import pytest
import safetensors.torch
import torch
from rich.console import Console

import vision_ssm.engine.fit as engine
from vision_ssm.engine.recorder import RunRecorder, Stopped
from vision_ssm.engine.run_folder import RunFolder
from vision_ssm.recipes import small
from vision_ssm.tasks import train
from vision_ssm.tasks.classification import ClassifierSpec, first_model


@pytest.fixture
def config(images):
    """A model without batch norms, and three steps of 18 images."""
    return small(
        data=str(images),
        model="test_vit",
        epochs=2,
        batch_size=18,
        num_workers=0,
        device="cpu",
        model_args={"img_size": 32},
        color_jitter=0.0,
        lr=1e-3,
        warmup_epochs=1,
        clip_grad=1.0,
    )


def weights(folder):
    return safetensors.torch.load_file(folder.last)


def test_accumulated_steps_equal_those_of_the_large_batch(config, tmp_path):
    large, parts = RunFolder(tmp_path / "large"), RunFolder(tmp_path / "parts")
    train(config, large)
    train(dataclasses.replace(config, batch_size=6, grad_accum=3), parts)
    first = first_model(config, ClassifierSpec.from_config(config, ("blue", "green", "red")), resume=True).state_dict()
    one, other = weights(large), weights(parts)
    moved = max(float((one[key] - first[key]).abs().max()) for key in one)
    assert moved > 1e-3
    assert max(float((one[key] - other[key]).abs().max()) for key in one) < 1e-3 * moved
    tables = [list(csv.DictReader(folder.metrics.open())) for folder in (large, parts)]
    assert [row["step"] for row in tables[1]] == ["3", "6"]  # 54 images make three whole steps
    assert [row["lr"] for row in tables[0]] == [row["lr"] for row in tables[1]]


@pytest.mark.parametrize("stop", [(0, 1), (0, 2), (0, 3), (1, 4)], ids=str)
def test_stop_between_steps_waits_for_the_step_and_resumes_exactly(stop, config, tmp_path, monkeypatch, stop_at):
    config = dataclasses.replace(
        config,
        batch_size=6,
        grad_accum=3,
        mixup=0.8,
        cutmix=1.0,
        mixup_switch_prob=0.3,
        train_interpolation="random",
        decay_by_epoch=True,
        cooldown_epochs=1,
        ema_decay=0.9,
        ema_warmup=False,
    )
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    train(config, whole)
    stop_at(*stop)
    with pytest.raises(Stopped):
        train(config, parts)
    monkeypatch.setattr(engine, "RunRecorder", RunRecorder)
    train(config, parts, resume=True)
    one, other = weights(whole), weights(parts)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_average_without_warm_up_begins_with_the_first_weights(config, tmp_path):
    config = dataclasses.replace(
        config,
        epochs=1,
        batch_size=54,
        ema_decay=0.75,
        ema_warmup=False,
    )
    folder, shown = RunFolder(tmp_path / "run"), Console(file=io.StringIO())
    train(config, folder, console=shown)
    assert "1 steps are few" in shown.file.getvalue()
    first = first_model(config, ClassifierSpec.from_config(config, ("blue", "green", "red")), resume=True).state_dict()
    trained = torch.load(folder.state, weights_only=True)["state_dict"]
    for key, value in weights(folder).items():
        torch.testing.assert_close(value, 0.75 * first[key] + 0.25 * trained[f"model.{key}"])


def test_crop_and_interpolation_reach_the_transforms(config):
    config = dataclasses.replace(config, crop_pct=0.8, train_interpolation="random")
    spec = ClassifierSpec.from_config(config, ("a", "b"))
    assert spec.eval_transform().transforms[0].size == 40
    assert len(spec.train_transform(config).transforms[0].interpolation) == 2
