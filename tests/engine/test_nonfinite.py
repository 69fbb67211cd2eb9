import csv
import dataclasses
import itertools

import pytest
import safetensors.torch
import torch

import vision_ssm.engine.fit as engine
from vision_ssm.engine.recorder import RunRecorder, Stopped
from vision_ssm.engine.run_folder import RunFolder
from vision_ssm.errors import InputError
from vision_ssm.recipes import small
from vision_ssm.tasks import classification, train
from vision_ssm.tasks.classification import Classification


class Overflow(torch.nn.Module):
    """Multiplies by infinity in some of the training passes."""

    def __init__(self, passes):
        super().__init__()
        self.passes, self.done = passes, 0

    def forward(self, x):
        self.done += self.training and torch.is_grad_enabled()
        return x * float("inf") if self.training and self.done in self.passes else x


class Model(torch.nn.Sequential):
    def __init__(self, passes):
        super().__init__(
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            Overflow(passes),
            torch.nn.BatchNorm1d(3),
            torch.nn.Linear(3, 3),
        )


@pytest.fixture
def config(images, monkeypatch):
    """Two epochs of three steps."""
    monkeypatch.setattr(Classification, "load", lambda *_, **__: pytest.skip("the model is none of timm's"))
    return small(
        data=str(images),
        model="test_convnext",
        epochs=2,
        batch_size=18,
        num_workers=0,
        device="cpu",
        color_jitter=0.0,
        lr=1e-2,
        warmup_epochs=0,
        ema_decay=0.5,
    )


@pytest.fixture
def seen(monkeypatch):
    """What model, average and optimizer are after each step."""
    states = []

    class Watching(RunRecorder):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            state = {**pl_module.model.state_dict(), **pl_module.ema.state_dict()}
            for name, values in enumerate(trainer.optimizers[0].state.values()):
                state |= {f"{name} {key}": value for key, value in values.items()}
            states.append({key: value.clone() for key, value in state.items() if "num_batches" not in key})
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    monkeypatch.setattr(engine, "RunRecorder", Watching)
    return states


def run(config, folder, monkeypatch, passes, **options):
    monkeypatch.setattr(classification, "create_model", lambda *_, **__: Model(passes))
    with pytest.raises(pytest.skip.Exception):
        train(config, folder, **options)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(precision, config, tmp_path, monkeypatch, seen):
    folder = RunFolder(tmp_path / "run")
    run(dataclasses.replace(config, precision=precision), folder, monkeypatch, passes=(2, 6))
    same = [all(torch.equal(a[key], b[key]) for key in a) for a, b in itertools.pairwise(seen)]
    assert same == [True, False, False, False, True]
    with folder.metrics.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["skipped_steps"] for row in rows] == ["1", "1"]
    assert [row["step"] for row in rows] == ["3", "6"]
    assert all(0 < float(row["train_loss"]) < 3 for row in rows)
    assert all(tensor.isfinite().all() for tensor in safetensors.torch.load_file(folder.last).values())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_several_in_a_row_stop_training_and_name_the_layer(accumulate, config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, batch_size=8, grad_accum=accumulate, max_skipped=2)
    monkeypatch.setattr(classification, "create_model", lambda *_, **__: Model((1, 2 + accumulate, *range(5, 99))))
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(InputError, match=r"2 steps in a row.*in the output of 2 \(Overflow\); try a lower --lr"):
        train(config, folder)


def test_a_rate_that_blows_up_the_weights_stops_training(config, tmp_path):
    config = dataclasses.replace(config, max_skipped=3, lr=1e30, min_lr=0.0, ema_decay=None)
    with pytest.raises(InputError, match=r"3 steps in a row.*is in the (output|gradient) of \w+"):
        train(config, RunFolder(tmp_path / "run"))


def test_the_count_survives_a_stop(config, tmp_path, monkeypatch, stop_at):
    folder = RunFolder(tmp_path / "run")
    monkeypatch.setattr(classification, "create_model", lambda *_, **__: Model((2,)))
    stop_at(0, 1)
    with pytest.raises(Stopped):
        train(config, folder)
    monkeypatch.setattr(engine, "RunRecorder", RunRecorder)
    run(config, folder, monkeypatch, (), resume=True)
    with folder.metrics.open() as file:
        assert [row["skipped_steps"] for row in csv.DictReader(file)] == ["1", "0"]
