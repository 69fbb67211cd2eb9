"""The benchmarks that load or use whole models, once through."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from vision_ssm.engine.weights import save_weights
from vision_ssm.recipes import small
from vision_ssm.tasks.classification import Classification, ClassifierSpec

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(("task", "peer"), [("detect", "torchvision's"), ("segment", "transformers'")])
def test_detectors_and_segmenters_are_compared(tmp_path, task, peer):
    command = [sys.executable, BENCHMARKS / "dense.py", task, "--quick", "--csv", tmp_path / "table.csv"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["form"] for row in rows] == 2 * ["inference", "training", "inference, optimized"]
    assert rows[0]["backbone"].startswith(peer)
    assert [float(row["ratio"]) for row in rows[:3]] == [1, 1, 1]


@pytest.mark.parametrize(
    "words", ["models.py", "models.py --training", "scan.py", "trainer.py", "loading.py --workers 0"], ids=str
)
def test_others_run(tmp_path, words):
    script, *options = words.split()
    if script == "models.py":
        options += ["--models", "vmamba_atto", "convnext_atto", "--no-memory"]
    command = [sys.executable, BENCHMARKS / script, *options, "--quick", "--csv", tmp_path / "table.csv"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "table.csv").open() as file:
        assert list(csv.DictReader(file))


def test_a_classifier_in_int8_keeps_its_answers(tmp_path, images):
    pytest.importorskip("torchao")
    spec = ClassifierSpec.from_config(small(model="vmamba_atto"), ("blue", "green", "red"))
    save_weights(tmp_path / "w.safetensors", Classification.create_model(spec).state_dict(), "classification", spec)
    command = [sys.executable, BENCHMARKS / "int8.py", "--quick", "--data", images, "--csv", tmp_path / "t.csv"]
    done = subprocess.run([*command, "--run", tmp_path / "w.safetensors"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert all(float(row["same"]) > 0.9 for row in rows)
    done = subprocess.run([*command, "--run", tmp_path / "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: no such run folder" in done.stderr.splitlines()[-1]  # behind a warning of torch's own
