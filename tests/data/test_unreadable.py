import csv
import dataclasses
import io
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from rich.console import Console

import vision_ssm.engine.fit as engine
from short_runs import SHORT, interrupt
from vision_ssm.cli import main
from vision_ssm.data import ImageDataset, load_splits
from vision_ssm.data.sampling import TrainingSamples, find_unreadable
from vision_ssm.engine.module import TrainingModule
from vision_ssm.engine.recorder import RunRecorder, Stopped
from vision_ssm.engine.run_folder import RunFolder
from vision_ssm.errors import InputError
from vision_ssm.recipes import small
from vision_ssm.recipes.config import ClassDataConfig
from vision_ssm.tasks import train

BROKEN = ("cat/03.png", "dog/05.png")


def fill(root, **counts):
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / name / f"{i:02}.png")
    return root


@pytest.fixture
def images(tmp_path):
    """24 training images, two of them damaged, and 4 for validation."""
    fill(tmp_path / "train", cat=12, dog=12)
    fill(tmp_path / "val", cat=2, dog=2)
    for name in BROKEN:
        path = tmp_path / "train" / name
        path.write_bytes(path.read_bytes()[:100])
    return tmp_path


@pytest.fixture
def config(images):
    return small(data=str(images), max_unreadable=0.1, mixup=0.5, **SHORT)


def test_replacement_is_a_function_of_seed_epoch_and_index(images):
    train = load_splits(ClassDataConfig(data=str(images))).train
    names = [train.id(i) for i in range(24)]
    broken = [names.index(name) for name in BROKEN]

    def drawn(seed, epoch, index):
        (sample,) = TrainingSamples(train, dict, seed).__getitems__([(epoch, index)])
        chosen = [i for i in range(24) if train.id(i) == sample["id"]]
        assert sample["label"] == train.labels()[chosen[0]]
        assert (names[index] in sample["unreadable"]) == (index in broken)
        return chosen[0]

    assert drawn(0, 0, 0) == 0
    assert drawn(0, 0, broken[0]) == drawn(0, 0, broken[0])
    assert len({drawn(seed, epoch, i) for seed in (0, 1) for epoch in range(4) for i in broken}) > 4


def test_run_goes_on_and_names_each_file_once(config, tmp_path):
    folder = RunFolder(tmp_path / "run")
    console = Console(record=True, width=400, file=io.StringIO())
    train(config, folder, console=console)
    lines = folder.unreadable.read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == list(BROKEN)
    shown = console.export_text()
    for name in BROKEN:
        assert shown.count(f"{name}: ") == 1
    assert shown.count("2 of 24 training images cannot be read") == 1
    with folder.metrics.open() as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["data_wait_ms"]) > 0 for row in rows)
    assert shown.count("data wait") == 2


def test_waiting_is_for_data_alone(config, tmp_path, monkeypatch):
    sample = ImageDataset.sample
    monkeypatch.setattr(ImageDataset, "sample", lambda self, index: (time.sleep(0.02), sample(self, index))[1])
    step = TrainingModule.training_step
    monkeypatch.setattr(TrainingModule, "training_step", lambda *a: (time.sleep(0.3), step(*a))[1])
    folder = RunFolder(tmp_path / "run")
    train(dataclasses.replace(config, epochs=1), folder)
    waited = float(folder.metrics.read_text().splitlines()[1].split(",")[-1])
    assert 80 < waited < 300


def test_workers_and_interruptions_do_not_change_the_weights(config, tmp_path, monkeypatch):
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    train(config, whole)
    interrupt(monkeypatch, 0, 3)
    with pytest.raises(Stopped):
        train(config, parts)
    monkeypatch.setattr(engine, "RunRecorder", RunRecorder)
    # How many may be unreadable can be changed on the way.
    train(dataclasses.replace(config, num_workers=2, max_unreadable=0.5), parts, resume=True)
    one, other = (safetensors.torch.load_file(f.last) for f in (whole, parts))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert whole.unreadable.read_text() == parts.unreadable.read_text()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param([], "2 of 24 training images cannot be read, --max-unreadable 0.01 allows 1", id="limit"),
        pytest.param(["--max-unreadable", "0"], "to train without such images", id="none"),
        pytest.param(
            ["--max-unreadable", "2"], "--max-unreadable must be at least 0 and at most 1, got 2", id="no-share"
        ),
    ],
)
def test_too_many_stop_the_run_with_one_line(options, message, workers, images, tmp_path, capsys):
    words = ["train", "classify", "--data", str(images), "--out", str(tmp_path / "run"), "--device", "cpu"]
    words += ["--model", "test_convnext", "--batch-size", "4", "--num-workers", str(workers), "--epochs", "1"]
    assert main([*words, *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    if "at most" not in message:
        assert "cannot read image" in error
        assert (tmp_path / "run" / "unreadable.txt").read_text().count("\n") == 2 - ("0" in options)


def test_nothing_readable(images):
    for path in (images / "train").rglob("*.png"):
        path.write_text("")
    train = load_splits(ClassDataConfig(data=str(images))).train
    with pytest.raises(InputError, match="hardly any training image can be read"):
        TrainingSamples(train, dict, 0).__getitems__([(0, 0)])
    assert list(find_unreadable(train)) == [train.id(i) for i in range(len(train))]


def test_unreadable_validation_images_are_refused_before_training(config, tmp_path):
    for name in ("cat/00.png", "dog/01.png"):
        (tmp_path / "val" / name).write_text("no picture")
    with pytest.raises(InputError, match=r"cat/00.png: .*; .*dog/01.png: .*; repair or remove"):
        train(config, RunFolder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
