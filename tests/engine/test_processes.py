import csv
import dataclasses
import multiprocessing
import os
import signal
import socket
import sys

import pytest
import safetensors.torch
import torch

import vision_ssm.engine.fit as engine
from scenes import write_masks, write_scenes
from short_runs import DETECTOR, SEGMENTER
from vision_ssm.cli import main
from vision_ssm.data import EpochSampler, load_digits
from vision_ssm.engine.recorder import RunRecorder
from vision_ssm.engine.run_folder import RunFolder
from vision_ssm.errors import InputError
from vision_ssm.recipes import DetectionConfig, SegmentationConfig, small
from vision_ssm.tasks import load, train

# A server with everything imported starts processes in a moment.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["vision_ssm.engine.fit", "vision_ssm.tasks.classification", "vision_ssm.cli.train"])


@pytest.fixture
def config(images):
    """A model without batch norms; steps of 12 of 45 images, and 15 to validate on."""
    return small(
        data=str(images),
        model="test_vit",
        model_args={"img_size": 32},
        val_fraction=0.25,
        epochs=3,
        batch_size=12,
        num_workers=0,
        device="cpu",
        lr=1e-3,
        warmup_epochs=1,
        ema_decay=0.8,
    )


def as_torchrun_does(rank, port, function, arguments):
    here = dict(RANK=rank, LOCAL_RANK=rank, GROUP_RANK=0, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)
    os.environ |= {name: str(value) for name, value in here.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    torch.set_num_threads(1)
    sys.exit(function(rank, *arguments))


def run_two(function, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [PROCESSES.Process(target=as_torchrun_does, args=(rank, port, function, arguments)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    return [process.exitcode for process in both]


def train_and_report(rank, config, folder):
    evaluation = train(config, folder)
    assert len(evaluation.records) == evaluation.images == 15  # also in the process that writes nothing


class ToldToStop(RunRecorder):
    """SIGTERM comes to one of the processes only, in the second epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx, trainer.global_rank) == (1, 1, 1):
            signal.raise_signal(signal.SIGTERM)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def command(rank, words, recorder, out):
    engine.RunRecorder = recorder
    with open(f"{out}{rank}", "w") as sys.stdout, open(f"{out}{rank}.err", "w") as sys.stderr:
        return main([str(word) for word in words])


def rows(folder):
    with folder.metrics.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_two_processes_train_as_one_and_resume_exactly(config, tmp_path):
    one, two, parts = (RunFolder(tmp_path / name) for name in ("one", "two", "parts"))
    train(config, one)
    halves = dataclasses.replace(config, batch_size=6, devices=2)
    assert run_two(train_and_report, halves, two) == [0, 0]
    assert sorted(path.name for path in one.path.iterdir()) == sorted(path.name for path in two.path.iterdir())
    for a, b in zip(rows(one), rows(two), strict=True):
        assert a.keys() == b.keys()
        for name in ("step", "lr", "train_accuracy", "val_accuracy", "val_balanced_accuracy"):
            assert a[name] == b[name], name
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=1e-4)
        assert b["val_loss"] == pytest.approx(a["val_loss"], abs=1e-4)

    words = ["train", "classify", "--data", config.data, "--val-fraction", 0.25, "--out", parts.path]
    words += ["--model", "test_vit", "--model-args", "img_size=32", "--epochs", 3, "--batch-size", 6]
    words += ["--lr", 1e-3, "--warmup-epochs", 1, "--ema-decay", 0.8, "--num-workers", 0]
    words += ["--device", "cpu", "--devices", 2]
    assert run_two(command, words, ToldToStop, tmp_path / "stopped") == [130, 0]
    assert "Stopped. Continue with" in (tmp_path / "stopped0.err").read_text()
    assert run_two(command, ["train", "--resume", parts.path], RunRecorder, tmp_path / "resumed") == [0, 0]
    assert "Best epoch" in (tmp_path / "resumed0").read_text()
    for file in ("stopped1", "stopped1.err", "resumed1", "resumed0.err", "resumed1.err"):
        assert (tmp_path / file).read_text() == "", file
    a, b = (safetensors.torch.load_file(folder.last) for folder in (two, parts))
    assert all(torch.equal(a[key], b[key]) for key in a)
    losses = [[row["train_loss"] for row in rows(folder)] for folder in (two, parts)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)  # the processes' sums are added up at each stop
    assert_same_files(one, two)


def train_and_count(rank, config, folder):
    evaluation = train(config, folder)
    assert evaluation.images == len(evaluation.records) == 4


@pytest.mark.parametrize(
    ("write", "config", "values"),
    [(write_scenes, DetectionConfig, DETECTOR), (write_masks, SegmentationConfig, SEGMENTER)],
    ids=["detector", "segmenter"],
)
def test_two_processes_train_other_tasks(tmp_path, write, config, values):
    scenes = write(tmp_path / "scenes")
    config = config(data=str(scenes), **values | dict(batch_size=2, devices=2, epochs=1))
    folder = RunFolder(tmp_path / "run")
    assert run_two(train_and_count, config, folder) == [0, 0]
    assert rows(folder)[0]["step"] == 2  # 8 images, 2 of each process in a step
    task = load(folder.best, "cpu", optimized=False)
    alone = task.evaluate(task.read_images(scenes)).metrics()
    for name, value in alone.items():  # gathered from both
        assert rows(folder)[0][f"val_{name}"] == pytest.approx(value, abs=1e-6, nan_ok=True), name


def assert_same_files(one, two):
    """Both hold whole tensors under the same names, of about the same values."""
    weights = [safetensors.torch.load_file(folder.best) for folder in (one, two)]
    load(two.best, "cpu")
    states = [torch.load(folder.state, weights_only=True) for folder in (one, two)]
    for a, b in (weights, [state["state_dict"] for state in states]):
        assert a.keys() == b.keys()
        assert all(type(b[name]) is torch.Tensor and b[name].shape == a[name].shape for name in a)
        assert all(torch.allclose(a[name].double(), b[name].double(), atol=1e-4) for name in a)
    a, b = (state["optimizer_states"][0] for state in states)
    assert [group["params"] for group in a["param_groups"]] == [group["params"] for group in b["param_groups"]]
    assert a["state"].keys() == b["state"].keys()
    for number, values in a["state"].items():
        for name, value in values.items():
            assert torch.allclose(value, b["state"][number][name], atol=1e-4), (number, name)


class Infinite(RunRecorder):
    """One of the processes gets images that are not finite."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1:
            batch["image"].fill_(float("inf"))


def test_an_error_of_one_ends_all_with_one_line_each(config, tmp_path):
    words = ["train", "classify", "--data", config.data, "--out", tmp_path / "run", "--model", "vmamba_atto"]
    words += ["--img-size", 16, "--batch-size", 6, "--num-workers", 0, "--max-skipped", 2, "--device", "cpu"]
    assert run_two(command, [*words, "--devices", 2], Infinite, tmp_path / "said") == [2, 2]
    said = [(tmp_path / name).read_text() for name in ("said0.err", "said1.err")]
    assert all(line.count("\n") == 1 for line in said)
    assert all("2 steps in a row, up to step 2, have no finite loss" in line for line in said)
    assert "non-finite value is in the input of the model;" in said[1]


def test_processes_share_the_same_global_batches():
    images = load_digits().val.subset(range(45))
    whole = list(EpochSampler(images, seed=0, epoch=2, used=36))
    parts = [list(EpochSampler(images, 0, epoch=2, used=12, rank=rank, world=3)) for rank in range(3)]
    assert [len(part) for part in parts] == [12, 12, 12]
    assert [sample for samples in zip(*parts, strict=True) for sample in samples] == whole
    resumed = EpochSampler(images, 0, epoch=2, start=4, used=12, rank=1, world=3)
    assert list(resumed) == parts[1][4:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(devices=3), "torchrun started 2 processes, but --devices 3 times --num-nodes 1 is 3"),
        ({}, "torchrun started 2 processes, but --devices 1 times --num-nodes 1 is 1"),
    ],
    ids=["too-few", "unsaid"],
)
def test_another_number_of_processes_is_refused(options, message, config, tmp_path, monkeypatch):
    for name, value in dict(RANK=0, LOCAL_RANK=0, GROUP_RANK=0, WORLD_SIZE=2, TORCHELASTIC_RUN_ID="x").items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(config, **options), RunFolder(tmp_path / "run"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--devices 0 --out {}", "--devices must be at least 1, got 0"),
        ("--devices 2 --num-nodes 2", "several machines, torchrun and SLURM need --out DIR"),
        (
            "--devices 30 --grad-accum 2 --out {}",
            "--grad-accum 2 times 30 processes is larger than the 1437",
        ),
        ("--sync-batchnorm --out {}", "--sync-batchnorm needs GPUs"),
    ],
    ids=["none", "without-a-folder", "too-many", "synchronized-on-a-cpu"],
)
def test_bad_options_get_one_line(options, message, tmp_path, capsys):
    words = options.format(tmp_path / "run").split()
    assert main(["train", "digits", "--device", "cpu", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
