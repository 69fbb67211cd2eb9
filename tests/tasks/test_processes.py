import copy
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
from torch.distributed.tensor import DTensor

import vision_ssm.tasks.train as training
from vision_ssm.cli import main
from vision_ssm.data import EpochSampler
from vision_ssm.errors import InputError
from vision_ssm.recipes import Augmentation, Distillation, Optimisation, small
from vision_ssm.tasks.optimisation import make_optimizer
from vision_ssm.tasks.recorder import RunRecorder
from vision_ssm.tasks.run_folder import RunFolder
from vision_ssm.tasks.sharding import SHARDABLE_OPTIMIZERS, check_shardable, shard
from vision_ssm.tasks.spec import read_spec, save_classifier, spec_for

# A server with everything imported starts processes in a moment.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["vision_ssm.tasks.train", "vision_ssm.cli.train"])


@pytest.fixture
def config(images):
    """A model without batch norms; steps of 12 of 45 images, and 15 to validate on."""
    config = dataclasses.replace(
        small(images),
        model="test_vit",
        model_args={"img_size": 32},
        epochs=3,
        batch_size=12,
        workers=0,
        device="cpu",
        augment=Augmentation(scale=(0.5, 1.0), color_jitter=0.2),
        optim=Optimisation(lr=1e-3, warmup_epochs=1, ema=0.8),
    )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, val_fraction=0.25))


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
    evaluation = training.train(config, folder)
    assert evaluation.targets.shape == (15,)  # also in the process that writes nothing


class ToldToStop(RunRecorder):
    """SIGTERM comes to one of the processes only, in the second epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx, trainer.global_rank) == (1, 1, 1):
            signal.raise_signal(signal.SIGTERM)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def command(rank, words, recorder, out):
    training.RunRecorder = recorder
    with open(f"{out}{rank}", "w") as sys.stdout, open(f"{out}{rank}.err", "w") as sys.stderr:
        return main([str(word) for word in words])


def rows(folder):
    with folder.metrics.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("model", "flags"),
    [("test_vit", []), ("vmamba_atto", ["--fsdp"])],
    ids=["ddp", "fsdp"],
)
def test_two_processes_train_as_one_and_resume_exactly(model, flags, config, tmp_path):
    if flags:
        config = dataclasses.replace(config, model=model, model_args={}, image_size=16)
    one, two, parts = (RunFolder(tmp_path / name) for name in ("one", "two", "parts"))
    training.train(config, one)
    halves = dataclasses.replace(config, batch_size=6, devices=2, fsdp=bool(flags))
    assert run_two(train_and_report, halves, two) == [0, 0]
    assert sorted(path.name for path in one.path.iterdir()) == sorted(path.name for path in two.path.iterdir())
    for a, b in zip(rows(one), rows(two), strict=True):
        assert a.keys() == b.keys()
        for name in ("step", "lr", "train_accuracy", "val_accuracy", "val_balanced_accuracy"):
            assert a[name] == b[name], name
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=1e-4)
        assert b["val_loss"] == pytest.approx(a["val_loss"], abs=1e-4)

    words = ["train", "folder", "--data.root", config.data.root, "--data.val-fraction", 0.25, "--out", parts.path]
    words += ["--image-size", 16] if flags else ["--model-args", "img_size=32"]
    words += ["--model", model, "--epochs", 3, "--batch-size", 6, "--workers", 0]
    words += ["--augment.scale", 0.5, 1, "--optim.lr", 1e-3, "--optim.warmup-epochs", 1, "--optim.ema", 0.8]
    words += ["--device", "cpu", "--devices", 2, *flags]
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


def assert_same_files(one, two):
    """Both hold whole tensors under the same names, of about the same values."""
    weights = [safetensors.torch.load_file(folder.best) for folder in (one, two)]
    read_spec(two.best).create().load_state_dict(weights[1], strict=True)
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


def test_sharded_weights_learn_as_whole_ones(config, tmp_path):
    """Distillation into two classifiers, with batch norms, accumulation, clipping and layer decay."""
    teacher = tmp_path / "teacher.safetensors"
    spec = spec_for(config, ("blue", "green", "red"))
    save_classifier(teacher, spec.create().state_dict(), spec)
    config = dataclasses.replace(
        config,
        model="group_mamba_atto",
        model_args={},
        epochs=2,
        batch_size=4,
        accumulate=2,
        devices=2,
        optim=Optimisation(lr=1e-3, warmup_epochs=1, ema=0.8, layer_decay=0.8, clip_grad=0.1),
        distill=Distillation(teacher=str(teacher), soft=True),
    )
    ddp, fsdp = (RunFolder(tmp_path / name) for name in ("ddp", "fsdp"))
    assert run_two(train_and_report, config, ddp) == [0, 0]
    assert run_two(train_and_report, dataclasses.replace(config, fsdp=True), fsdp) == [0, 0]
    for a, b in zip(rows(ddp), rows(fsdp), strict=True):
        for name in ("step", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert b[name] == pytest.approx(a[name], abs=1e-4), name
    assert_same_files(ddp, fsdp)


class Infinite(RunRecorder):
    """One of the processes gets images that are not finite."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1:
            batch[0].fill_(float("inf"))


@pytest.mark.parametrize("flags", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_an_error_of_all_is_said_once(flags, config, tmp_path):
    words = ["train", "folder", "--data.root", config.data.root, "--out", tmp_path / "run", "--model", "vmamba_atto"]
    words += ["--image-size", 16, "--batch-size", 6, "--workers", 0, "--max-skipped", 2, "--device", "cpu"]
    assert run_two(command, [*words, "--devices", 2, *flags], Infinite, tmp_path / "said") == [2, 2]
    said = "".join((tmp_path / name).read_text() for name in ("said0.err", "said1.err"))
    assert "2 steps in a row, up to step 2, have no finite loss" in said
    assert "not finite is in the input of the model;" in said
    assert said.count("\n") == 1


def take_steps(rank):
    """Steps with shares of the parameters are those with all of them."""
    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    batches, targets = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    for name in SHARDABLE_OPTIMIZERS:
        torch.manual_seed(0)
        whole = torch.nn.Sequential(
            torch.nn.Linear(6, 5), torch.nn.GELU(), torch.nn.LayerNorm(5), torch.nn.Linear(5, 4)
        )
        sharded = copy.deepcopy(whole)
        shard(sharded, mesh)
        for model, mine in ((whole, slice(None)), (sharded, slice(rank, None, 2))):
            optimizer = make_optimizer(model, Optimisation(optimizer=name, lr=1e-2))
            for batch in batches:
                torch.nn.functional.cross_entropy(model(batch[mine]), targets[mine]).backward()
                optimizer.step()
                optimizer.zero_grad()
        for parameter, other in zip(whole.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(
                other.full_tensor(), parameter.data, msg=lambda text, name=name: f"{name}: {text}"
            )
            # Otherwise runs could not be resumed.
            kept = optimizer.state[other].values()
            assert all(not isinstance(value, DTensor) or value.shape == other.shape for value in kept), name


def test_optimizers_take_the_same_steps_with_shares():
    assert run_two(take_steps) == [0, 0]


def test_processes_share_the_same_global_batches():
    whole = list(EpochSampler(45, seed=0, epoch=2, used=36))
    parts = [list(EpochSampler(45, 0, epoch=2, used=12, rank=rank, world=3)) for rank in range(3)]
    assert [len(part) for part in parts] == [12, 12, 12]
    assert [sample for samples in zip(*parts, strict=True) for sample in samples] == whole
    resumed = EpochSampler(45, 0, epoch=2, start=4, used=12, rank=1, world=3)
    assert list(resumed) == parts[1][4:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(devices=3), "torchrun started 2 processes, but --devices 3 times --nodes 1 is 3"),
        ({}, "torchrun started 2 processes, but --devices 1 times --nodes 1 is 1"),
    ],
    ids=["too-few", "unsaid"],
)
def test_another_number_of_processes_is_refused(options, message, config, tmp_path, monkeypatch):
    for name, value in dict(RANK=0, LOCAL_RANK=0, GROUP_RANK=0, WORLD_SIZE=2, TORCHELASTIC_RUN_ID="x").items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match=message):
        training.train(dataclasses.replace(config, **options), RunFolder(tmp_path / "run"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--devices 0 --out {}", "--devices must be positive, got 0"),
        ("--devices 2 --nodes 2", "on several machines, say --out DIR"),
        ("--fsdp --out {}", "--fsdp divides the weights among several devices, say how many with --devices"),
        ("--fsdp --devices 2 --precision 16-mixed --out {}", "--fsdp goes with --precision 32-true, bf16-mixed or"),
        ("--fsdp --devices 2 --optim.optimizer muon --out {}", "--fsdp goes with --optim.optimizer adam, "),
        ("--devices 30 --out {}", "30 processes times --batch-size 64 times --accumulate 1 is larger than the 1437"),
        ("--sync-batchnorm --out {}", "--sync-batchnorm needs GPUs"),
    ],
    ids=["none", "without-a-folder", "alone", "scaled", "muon", "too-many", "synchronised-on-a-cpu"],
)
def test_bad_options_get_one_line(options, message, tmp_path, capsys):
    words = options.format(tmp_path / "run").split()
    assert main(["train", "digits", "--device", "cpu", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_has_no_dimension_cannot_be_divided():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    check_shardable(model, "a_model")
    model[0].register_parameter("scale", torch.nn.Parameter(torch.tensor(1.0)))
    with pytest.raises(InputError, match=r"--fsdp cannot divide a_model: its parameter 0\.scale is a single number"):
        check_shardable(model, "a_model")
