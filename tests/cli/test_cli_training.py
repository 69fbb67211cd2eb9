import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import vision_ssm
from vision_ssm.cli import main
from vision_ssm.recipes import small, to_dict

TINY = [
    *("--model", "test_convnext", "--img-size", "32", "--batch-size", "4", "--num-workers", "0", "--device", "cpu"),
    *("--recipe", "small", "--warmup-epochs", "0", "--color-jitter", "0"),
]


def train(*words):
    return main(["train", *map(str, words)])


def fill(root, **counts):
    generator = np.random.default_rng(0)
    for level, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise = generator.integers(0, 120, (24, 32, 3))
            noise[..., level] += 100
            Image.fromarray(noise.astype(np.uint8)).save(root / name / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("images"), brick=24, grass=12, water=12)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    words = ["--data", images, "--val-fraction", 0.25, "--epochs", 4, "--out", out, "--lr", 0.003]
    assert train("classify", *words, *TINY) == 0
    return out


def test_what_a_run_prints(images, tmp_path, capsys):
    assert train("classify", "--data", images, "--epochs", 2, "--out", tmp_path / "run", *TINY) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    assert lines[0] == "Data   44 training and 4 validation images in 3 classes"
    assert "brick" in lines[2]
    assert lines[2].split()[1:] == ["22", "2"]
    assert sum("balanced" in line and "val loss" in line for line in lines) == 2
    assert any("balanced accuracy" in line for line in lines)
    assert str(tmp_path / "run" / "predictions.png") in shown.out


def test_eval_on_its_own_and_on_other_data(run, images, tmp_path, capsys):
    assert main(["eval", str(run)]) == 0
    assert "recall" in capsys.readouterr().out
    assert main(["eval", str(run), "--data", str(images), "--json", "--plots", str(tmp_path / "p")]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["images"] == 48
    assert [row["class"] for row in values["per_class"]] == ["brick", "grass", "water"]
    assert values["accuracy"] > 0.9
    assert "top5_accuracy" not in values
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["confusion.png", "predictions.png"]


def test_predict_files_and_folders(run, images, capsys):
    assert main(["predict", str(run), str(images / "water"), str(images / "brick" / "00.png"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["predictions"][0]["class"] for row in rows] == ["water"] * 12 + ["brick"]
    assert sum(p["probability"] for p in rows[0]["predictions"]) == pytest.approx(1)
    assert main(["predict", str(run), str(images / "water" / "00.png")]) == 0
    assert "water" in capsys.readouterr().out


def test_the_fastest_form_says_the_same(run, images, capsys, monkeypatch):
    forms = []
    original = vision_ssm.optimize

    def counted(model, **options):
        forms.append(options)
        return original(model, **options)

    monkeypatch.setattr("vision_ssm.engine.task.optimize", counted)
    losses = []
    for words in ([], ["--no-optimize"], ["--precision", "bf16-true"]):
        assert main(["eval", str(run), "--data", str(images), "--json", "--device", "cpu", *words]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert forms == [{"dtype": torch.float32}, {"dtype": torch.bfloat16}]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=0.1)


def test_predict_names_the_unreadable_and_classifies_the_rest(run, images, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    words = ["predict", str(run), str(tmp_path / "broken.jpg"), str(images / "water" / "00.png"), "--json"]
    assert main(words) == 2
    shown = capsys.readouterr()
    assert [row["predictions"][0]["class"] for row in json.loads(shown.out)] == ["water"]
    assert shown.err.count("\n") == 1
    assert "broken.jpg" in shown.err


def test_eval_tells_of_absent_classes(run, images, tmp_path, capsys):
    (tmp_path / "some" / "water").mkdir(parents=True)
    (tmp_path / "some" / "water" / "00.png").write_bytes((images / "water" / "00.png").read_bytes())
    assert main(["eval", str(run), "--data", str(tmp_path / "some")]) == 0
    assert "classes have no images here" in capsys.readouterr().out


def test_a_run_that_saved_nothing_may_be_started_again(images, tmp_path, capsys):
    words = ["classify", "--data", images, "--epochs", "1", *TINY, "--out", tmp_path / "run"]
    assert train(*words, "--val-data", tmp_path / "none") == 2
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"model_type": "of something else"}')
    assert train(*words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert train(*words, "--overwrite") == 2
    assert "does not hold a run" in capsys.readouterr().err
    record = {"task": "classification", "config": to_dict(small(data=str(images)))}
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    assert train(*words) == 0


def test_overwrite_only_when_told_and_only_a_run(run, images, tmp_path, capsys):
    words = ["classify", "--data", images, "--epochs", "1", *TINY]
    assert train(*words, "--out", run) == 2
    assert "--overwrite" in capsys.readouterr().err
    (tmp_path / "thesis.txt").write_text("years of work")
    assert train(*words, "--out", tmp_path, "--overwrite") == 2
    assert (tmp_path / "thesis.txt").exists()
    # A mistake in the new command does not cost the old run.
    assert train(*words, "--out", run, "--overwrite", "--model", "test_convnetx") == 2
    assert (run / "best.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param("digits --model test_convnetx", "did you mean test_convnext", id="unknown-model"),
        pytest.param("digits --model test_convnext --model-args colour=red", "colour=red", id="unknown-argument"),
        pytest.param("digits --pretrained", "no published weights", id="no-published-weights"),
        pytest.param("digits --pretrained nowhere.pth", "no such checkpoint file", id="no-checkpoint"),
        pytest.param("digits --lr -0.1", "--lr must be above 0, got -0.1", id="negative-rate"),
        pytest.param("digits --epochs 0", "--epochs must be at least 1", id="no-epochs"),
        pytest.param("digits --model test_convnext", "cannot take images of 16x16", id="image-too-small"),
        pytest.param("digits --mixup 1 --batch-size 7", "need an even --batch-size, got 7", id="odd-mixup"),
        pytest.param("digits --optimizer adamx", "did you mean", id="unknown-optimizer"),
        pytest.param("digits --grad-accum 0", "--grad-accum must be at least 1", id="no-accumulation"),
        pytest.param(
            "digits --grad-accum 40",
            "--grad-accum 40 is larger than the 1437",
            id="step-too-large",
        ),
        pytest.param("digits --crop-pct 1.5", "--crop-pct must be above 0 and at most 1, got 1.5", id="crop"),
        pytest.param("digits --warmup-lr 1", "--warmup-lr must be at most --lr", id="warmup-rate"),
        pytest.param("digits --betas 0.9 1.5", "--betas must be at least 0 and below 1, got 0.9 1.5", id="betas"),
        pytest.param("digits --optimizer sgd --eps 1e-8", "sgd does not take --eps", id="eps-of-none"),
        pytest.param("digits --cooldown-epochs -1", "--cooldown-epochs must be at least 0", id="cooldown"),
        pytest.param(
            "digits --model test_vit --model-args img_size=16 --published-decay",
            "--published-decay: VisionTransformer does not list",
            id="no-published-decay",
        ),
        pytest.param("digits --distill-alpha 1.5", "--distill-alpha must be at least 0 and at most 1", id="alpha"),
        pytest.param("digits --distill-tau 0", "--distill-tau must be above 0, got 0", id="tau"),
        pytest.param("digits --teacher runs/x", "--teacher: unknown model runs/x", id="no-teacher"),
        pytest.param("digits --teacher resnet18", "resnet18 has 1000 classes", id="teacher-of-others"),
        pytest.param("digits --device cuda:77", "no device cuda:77", id="no-device"),
        pytest.param("classify --data nowhere", "no such file or folder", id="no-folder"),
        pytest.param("--resume nowhere", "no such run folder", id="no-run"),
        pytest.param("digits --resume", "needs the folder of a run", id="resume-what"),
        pytest.param("digits --auto-augment foo", "Unknown AA policy foo", id="unknown-policy"),
        pytest.param("digits --scale 1 0.5", "--scale takes the smaller value first", id="reversed-range"),
        pytest.param("classify", "give --data PATH", id="no-data"),
        pytest.param("classification", "classify, digits, detect, segment, not classification", id="train-what"),
    ],
)
def test_bad_options_get_one_line_and_leave_nothing(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train(*words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("vision-ssm: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("digits --epoch 3", "--epochs"),
        ("digits --model-args foo", "expected KEY=VALUE, not foo"),
        ("digits --schedule plateau", "cosine"),
    ],
    ids=["typo", "no-pair", "unknown-schedule"],
)
def test_words_that_do_not_fit_are_explained_by_the_parser(words, message, capsys):
    assert train(*words.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_training_image_is_named(workers, tmp_path, capsys):
    root = fill(tmp_path / "images", cat=6, dog=6)
    for path in root.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:200])
    words = ["classify", "--data", root, "--out", tmp_path / "run", *TINY, "--num-workers", workers]
    assert train(*words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot read image" in error
    assert ".png" in error


def test_bad_runs_and_images(run, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_text("not an image")
    for words, message in (
        (["eval", str(tmp_path)], "is not a run folder"),
        (["eval", str(run), "--data", str(tmp_path)], "no class folders"),
        (["predict", str(run), str(tmp_path / "none.png")], "no such file"),
        (["predict", str(run), str(tmp_path / "broken.jpg")], "broken.jpg"),
        (["predict", str(tmp_path / "broken.jpg"), str(tmp_path)], "was not written by a vision-ssm run"),
        (["fly"], "no command fly"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["terminal", "SLURM"])
def test_interrupted_process_says_how_to_resume_and_does(number, images, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "vision_ssm", "train"]
    words = ["classify", "--data", str(images), "--epochs", "500", "--out", str(out), *TINY, "--num-workers", "1"]
    process = subprocess.Popen(
        [*command, *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (out / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, number)  # to the workers too
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert error.strip() == f"Stopped. Continue with: vision-ssm train --resume {out}"
    assert train("--resume", out, "--epochs", "7") == 2  # another length would be another schedule


def test_help_is_quick_and_complete(capsys):
    assert train("digits", "--help") == 0
    shown = capsys.readouterr().out
    for option in ("--model", "--model-args", "--pretrained", "--device", "--precision", "--num-workers", "--lr"):
        assert option in shown
    assert "(default: )" not in " ".join(shown.split())
    assert main(["--help"]) == 0
    assert "predict" in capsys.readouterr().out
