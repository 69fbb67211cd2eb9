import multiprocessing
import os
import random
import resource
import signal
import sys
import time

import safetensors.torch
import torch

from vision_ssm.cli import main
from vision_ssm.engine.run_folder import RunFolder
from vision_ssm.tasks import train

# A server with everything imported makes each of the processes that get killed in a moment.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["vision_ssm.engine.fit", "vision_ssm.tasks.classification", "vision_ssm.cli.train"])


def killed_at(event, file, count):
    """Kill this process when it opens the file's temporary one, or renames it, for the `count`th time."""
    left = [count]

    def watch(name, arguments):
        if name == event and str(arguments[0]).endswith(f"/.{file}.tmp"):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def killed_inside_a_write(size):
    """Let the system kill this process once a file of it grows beyond `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def attempt(config, folder, death):
    torch.set_num_threads(1)
    if death is not None:
        death[0](*death[1:])
    train(config, folder, resume=folder.state.is_file(), overwrite=True)


def start(*arguments):
    process = PROCESSES.Process(target=attempt, args=arguments)
    process.start()
    return process


def test_killed_again_and_again_and_resumed_is_bit_identical(config, tmp_path):
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    start(config, whole, None).join()
    deaths = [
        (killed_at, "os.rename", "config.json", 1),
        (killed_at, "os.rename", "last.ckpt", 1),  # weights are there, but no state
        (killed_inside_a_write, 1_500_000),  # of last.ckpt
        (killed_at, "os.rename", "metrics.csv", 1),  # the first epoch is saved
        (killed_at, "open", "last.ckpt", 1),
        None,  # at a random time
        (killed_at, "os.rename", "last.ckpt", 1),
        (killed_at, "os.rename", "last.safetensors", 2),  # the second epoch is saved
        (killed_at, "os.rename", "metrics.csv", 1),  # all is trained, but nothing more is written
    ]
    size = {path.name: path.stat().st_size for path in whole.path.iterdir()}
    assert size["last.safetensors"] < 1_500_000 < size["last.ckpt"]
    for number, death in enumerate(deaths):
        process = start(config, parts, death)
        if death is None:
            time.sleep(random.uniform(0.1, 0.6))
            process.kill()
        process.join()
        if process.exitcode == 0 and number >= deaths.index(None):
            break  # the one at a random time came so far that fewer were left
        assert process.exitcode < 0, death
    process = start(config, parts, None)
    process.join()
    assert process.exitcode == 0
    for name in ("last", "best"):
        one, other = (safetensors.torch.load_file(getattr(folder, name)) for folder in (whole, parts))
        assert all(torch.equal(one[key], other[key]) for key in one), name
    assert not [path.name for path in parts.path.iterdir() if path.name.endswith(".tmp")]


def command(words, errors, room):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    with errors.open("w") as sys.stderr:
        sys.exit(main(words))


def test_full_disk_is_one_line_and_the_run_may_be_started_again(config, tmp_path, capsys):
    words = ["train", "classify", "--data", config.data, "--out", str(tmp_path / "run"), "--epochs", "2"]
    words += ["--model", "test_convnext", "--num-workers", "0", "--device", "cpu", "--batch-size", "8"]
    process = PROCESSES.Process(target=command, args=(words, tmp_path / "errors", 1_500_000))
    process.start()
    process.join()
    assert process.exitcode == 2
    error = (tmp_path / "errors").read_text()
    assert error.count("\n") == 1
    assert "last.ckpt" in error
    assert "too large" in error  # a real full disk says that no space is left
    assert not (tmp_path / "run" / "last.ckpt").exists()
    assert main(words) == 0
    assert "the warmup of 2 epochs is shortened to 1" in capsys.readouterr().out
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert "this run was complete: 2 of 2 epochs trained" in capsys.readouterr().out
