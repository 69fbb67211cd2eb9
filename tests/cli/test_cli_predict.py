"""Predicting for real work, and what no command may answer with a traceback."""

import csv
import json
import subprocess
import sys

import pytest
from PIL import Image

from vision_ssm.cli import COMMANDS, main
from vision_ssm.engine.weights import save_weights
from vision_ssm.errors import printable
from vision_ssm.recipes import small
from vision_ssm.tasks.classification import Classification, ClassifierSpec


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    spec = ClassifierSpec.from_config(small(model="test_convnext"), ("cat [tame]", "dog\x07"))
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(path, Classification.create_model(spec).state_dict(), "classification", spec)
    return path


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    for name in ("a.png", "deep/a.png", "[b].png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "red").save(folder / name)
    (folder / "broken.png").write_text("no picture")
    return folder


def test_files_copies_and_unreadable_images(weights, pictures, tmp_path, capsys):
    words = ["predict", str(weights), str(pictures), "--out", str(tmp_path / "out"), "--device", "cpu"]
    words += ["--copy", str(tmp_path / "sorted"), "--top", "1", "--threshold", "0.1"]
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert "broken.png" in shown.err
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [len(row["predictions"]) for row in rows] == [1, 1, 1]
    with (tmp_path / "out" / "predictions.csv").open() as file:
        assert [row["image"] for row in csv.DictReader(file)] == [row["image"] for row in rows]
    answer = printable(rows[0]["answer"])
    copies = sorted(path.name for path in (tmp_path / "sorted" / answer).iterdir())
    assert copies == ["[b].png", "a-2.png", "a.png"]


def test_copies_stay_where_they_belong(weights, pictures, tmp_path, capsys):
    words = ["predict", str(weights), str(pictures), "--device", "cpu"]
    assert main([*words, "--copy", str(pictures / "sorted")]) == 2
    assert "lies in a folder whose images are read" in capsys.readouterr().err
    spec = ClassifierSpec.from_config(small(model="test_convnext"), ("..", "."))
    save_weights(tmp_path / "w.safetensors", Classification.create_model(spec).state_dict(), "classification", spec)
    assert main(["predict", str(tmp_path / "w.safetensors"), *words[2:], "--copy", str(tmp_path / "deep" / "out")]) == 2
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "deep" / "out").iterdir()] == ["_"]


def test_below_the_threshold_the_answer_is_unsure(weights, pictures, capsys):
    words = ["predict", str(weights), str(pictures / "a.png"), "--device", "cpu"]
    assert main([*words, "--threshold", "0.999", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["answer"] == "unsure"
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert main([*words, "--weights", "last"]) == 2
    assert "--weights last is for the folder of a run" in capsys.readouterr().err
    assert "dog\\x07" in shown
    assert "cat [tame]" in shown
    assert len(shown.splitlines()) == 2  # not wrapped where it is piped


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train digits --num-workers -1", "--num-workers must be at least 0"),
        ("train digits --seed 99999999999999999999999", "--seed must be at least 0 and below"),
        ("train digits --device meta", "no device meta here"),
        ("train digits --device nonsense", "no device nonsense here"),
        ("train digits --model resnet18.nosuch", "resnet18 has no pretrained tag nosuch"),
        ("train digits --model-args dims=(99999999,9,9,9)", "cannot make vmamba_atto"),
        ("train digits --model-args checkpoint_path=x", "checkpoint_path is not a model argument here"),
        ("train digits --monitor speed", "--monitor"),
        ("train digits --data nothing", "no such file or folder: nothing"),
        ("predict nowhere x.png", "no such run folder"),
        ("predict nowhere.onnx x.png", "no such file: nowhere.onnx"),
        ("predict model.pt2 x.png", "model.pt2: programs are for torch.export.load; give the run, or an ONNX file"),
        ("--import nomodule recipes", "--import nomodule: ModuleNotFoundError"),
        ("train digits --num-workers 99999", "--num-workers must be at least 0 and at most 1024"),
        ("bench vmamba_atto --batch 0", "--batch must be at least 1"),
        ("bench vmamba_atto --device meta --size 32", "no device meta here"),
        ("info vmamba_atto --num-classes -3", "--num-classes must be at least 0"),
    ],
    ids=str,
)
def test_no_command_answers_with_a_traceback(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_batches_of_one_with_batch_norms(tmp_path, capsys):
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / f"{i}.png")
    words = ["train", "classify", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--batch-size", "1"]
    words += ["--model", "test_efficientnet", "--img-size", "32", "--num-workers", "0", "--device", "cpu"]
    assert main(words) == 2
    assert capsys.readouterr().err == "vision-ssm: error: --batch-size 1 is too small for batch norms\n"


def test_own_models_by_import(tmp_path):
    (tmp_path / "mymodels.py").write_text(
        "import timm\nfrom timm.models import register_model\n\n\n@register_model\n"
        "def my_own_net(pretrained=False, **kwargs):\n    return timm.create_model('test_convnext', **kwargs)\n"
    )
    words = ["--import", "mymodels", "info", "my_own_net", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "vision_ssm", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "my_own_net"


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    for module in [name for name in sys.modules if name.startswith("vision_ssm.cli.")]:
        monkeypatch.delitem(sys.modules, module)
    assert main(["train", "digits"]) == 2
    assert "pip install 'vision-ssm[train]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    monkeypatch.delitem(sys.modules, "vision_ssm.data.rle", raising=False)
    monkeypatch.setitem(COMMANDS, "train", ("vision_ssm.data.rle:decode_masks", ""))
    assert main(["train", "detect"]) == 2
    assert (
        "needs faster_coco_eval, which is not installed; pip install 'vision-ssm[detection]'" in capsys.readouterr().err
    )
