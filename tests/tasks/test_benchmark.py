"""The benchmarks that train, load or use whole models, once through."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision_ssm.engine.weights import save_weights
from vision_ssm.recipes import small
from vision_ssm.tasks.classification import Classification, ClassifierSpec

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cifar.py"


def test_models_are_trained_alike_and_compared(tmp_path):
    generator = np.random.default_rng(0)
    for part, count in (("train", 7), ("test", 2)):
        for name in "abcdefghij":
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
    table, picture = tmp_path / "table.csv", tmp_path / "picture.png"
    command = [sys.executable, SCRIPT, "--quick", "--data", tmp_path, "--out", tmp_path / "runs"]
    done = subprocess.run([*command, "--csv", table, "--picture", picture], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with table.open() as file:
        rows = [(row["model"], row["distilled"]) for row in csv.DictReader(file)]
    assert sorted(rows) == [
        ("convnext_stride_4", "False"),
        ("group_mamba_atto", "False"),
        ("group_mamba_atto", "True"),
        ("vmamba_atto", "False"),
    ]
    assert (tmp_path / "table-epochs.csv").is_file()
    assert Image.open(picture).size == (1800, 750)
    again = subprocess.run(command, capture_output=True, text=True)
    assert "vision-ssm train" not in again.stdout


@pytest.mark.parametrize(("task", "peer"), [("detect", "torchvision's"), ("segment", "transformers'")])
def test_detectors_and_segmenters_are_compared(tmp_path, task, peer):
    command = [sys.executable, SCRIPT.with_name("dense.py"), task, "--quick", "--csv", tmp_path / "table.csv"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["form"] for row in rows] == ["inference", "training", "inference", "training", "inference, optimized"]
    assert rows[0]["backbone"].startswith(peer)
    assert float(rows[0]["ratio"]) == 1


def test_photographs_are_read_beside_timms_reader(tmp_path):
    command = [sys.executable, SCRIPT.with_name("loading.py"), "--quick", "--csv", tmp_path / "table.csv"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "table.csv").open() as file:
        assert [row["reader"] for row in csv.DictReader(file)] == ["timm.data.ImageDataset", "vision-ssm train"]


def test_a_classifier_in_int8_keeps_its_answers(tmp_path, images):
    pytest.importorskip("torchao")
    spec = ClassifierSpec.from_config(small(model="vmamba_atto"), ("blue", "green", "red"))
    save_weights(tmp_path / "w.safetensors", Classification.create_model(spec).state_dict(), "classification", spec)
    command = [sys.executable, SCRIPT.with_name("int8.py"), "--quick", "--data", images, "--csv", tmp_path / "t.csv"]
    done = subprocess.run([*command, "--run", tmp_path / "w.safetensors"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert all(float(row["same"]) > 0.9 for row in rows)
    done = subprocess.run([*command, "--run", tmp_path / "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: no such run folder" in done.stderr.splitlines()[-1]  # behind a warning of torch's own
