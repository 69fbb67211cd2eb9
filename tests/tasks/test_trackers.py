import csv
import dataclasses
import importlib.util

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vision_ssm.tasks.train as training
from vision_ssm.errors import InputError
from vision_ssm.recipes import small
from vision_ssm.tasks.recorder import RunRecorder, Stopped
from vision_ssm.tasks.run_folder import RunFolder


@pytest.fixture
def config(images):
    return dataclasses.replace(
        small(images), model="test_convnext", epochs=2, workers=0, device="cpu", tracker="tensorboard", batch_size=18
    )


def test_tensorboard_shows_the_figures_of_every_epoch_of_a_resumed_run(config, tmp_path, monkeypatch, stop_at):
    folder = RunFolder(tmp_path / "run")
    stop_at(0, 2)  # after the first epoch
    with pytest.raises(Stopped):
        training.train(config, folder)
    monkeypatch.setattr(training, "RunRecorder", RunRecorder)
    training.train(config, folder, resume=True)
    events = EventAccumulator(str(folder.path / "tracker"))
    events.Reload()
    with folder.metrics.open() as file:
        rows = list(csv.DictReader(file))
    for name in rows[0].keys() - {"epoch"}:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(i + 1, pytest.approx(float(row[name]), rel=1e-5)) for i, row in enumerate(rows)], name


def test_a_tracker_that_is_not_installed_is_named_before_any_work(config, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--tracker wandb needs a package that is not installed: pip install wandb"):
        training.train(dataclasses.replace(config, tracker="wandb"), RunFolder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
