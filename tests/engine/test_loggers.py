import csv
import dataclasses
import importlib.util

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vision_ssm.engine.fit as engine
from vision_ssm.engine.recorder import RunRecorder, Stopped
from vision_ssm.engine.run_folder import RunFolder
from vision_ssm.errors import InputError
from vision_ssm.recipes import small
from vision_ssm.tasks import train


@pytest.fixture
def config(images):
    return small(
        data=str(images),
        model="test_convnext",
        epochs=2,
        num_workers=0,
        device="cpu",
        logger="tensorboard",
        batch_size=18,
    )


def test_tensorboard_shows_the_metrics_of_every_epoch_of_a_resumed_run(config, tmp_path, monkeypatch, stop_at):
    folder = RunFolder(tmp_path / "run")
    stop_at(0, 2)  # after the first epoch
    with pytest.raises(Stopped):
        train(config, folder)
    monkeypatch.setattr(engine, "RunRecorder", RunRecorder)
    train(config, folder, resume=True)
    events = EventAccumulator(str(folder.path / "logger"))
    events.Reload()
    with folder.metrics.open() as file:
        rows = list(csv.DictReader(file))
    for name in rows[0].keys() - {"epoch"}:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(i + 1, pytest.approx(float(row[name]), rel=1e-5)) for i, row in enumerate(rows)], name


def test_a_logger_that_is_not_installed_is_named_before_any_work(config, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--logger wandb needs a package that is not installed: pip install wandb"):
        train(dataclasses.replace(config, logger="wandb"), RunFolder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
