"""``vision-ssm eval MODEL``: any timm model on folders of images, its outputs found by the folders' names."""

import dataclasses
import functools
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from timm.models import _registry

from official_names import official
from vision_ssm.cli import main
from vision_ssm.data import open_image

SYNSETS = ImageNetInfo().label_names()


def fill(root, *names, each=2):
    generator = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(each):
            pixels = generator.integers(0, 255, (200, 260, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((130, 100)).save(root / name / f"{i}.png")
    return root


def run(capsys, *words):
    code = main(["eval", *map(str, words), "--device", "cpu"])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.fixture
def model(tmp_path):
    model = timm.create_model("test_convnext").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return model


@torch.no_grad()
def test_wordnet_folders_are_imagenets_outputs_under_the_models_own_crop(model, tmp_path, capsys):
    data = fill(tmp_path / "data", SYNSETS[3], SYNSETS[7], SYNSETS[990])
    code, out, err = run(capsys, "test_convnext", "--weights", tmp_path / "weights.pth", "--data", data, "--json")
    values = json.loads(out)
    transform = create_transform(160, interpolation="bicubic", crop_pct=0.95, mean=(0.5,) * 3, std=(0.5,) * 3)
    logits = torch.stack([model(transform(open_image(p))[None])[0] for p in sorted(data.rglob("*.png"))])
    targets = torch.tensor([3, 3, 7, 7, 990, 990])
    assert code == 0
    assert values["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-4)
    assert (values["images"], len(values["per_class"])) == (6, 1000)
    assert values["per_class"][7]["class"] == f"{SYNSETS[7]} cock"
    assert [i for i, row in enumerate(values["per_class"]) if row["images"]] == [3, 7, 990]
    assert values["images_per_second"] > 0
    assert "published_top1" not in values
    assert f"997 of 1000 classes have no images here; the metrics leave them out and are for {SYNSETS[3]}" in err


def test_a_file_of_ten_classes_with_numbered_folders(tmp_path, capsys):
    torch.save(timm.create_model("test_convnext", num_classes=10).state_dict(), tmp_path / "ten.pth")
    data = fill(tmp_path / "data", "0", "9", "02", each=1)
    words = ("test_convnext", "--weights", tmp_path / "ten.pth", "--data", data)
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    assert [row["class"] for row in json.loads(out)["per_class"] if row["images"]] == ["0", "2", "9"]
    out = run(capsys, *words)[1]
    assert "published" not in out
    assert "test_convnext, 160×160, crop 95.0%, bicubic; " in " ".join(out.split())


def test_worst_classes_first_where_there_are_many(tmp_path, capsys):
    model = timm.create_model("test_convnext", num_classes=30)
    torch.nn.init.zeros_(model.head.fc.weight)
    model.head.fc.bias.data = torch.arange(30.0)  # always the last class
    torch.save(model.state_dict(), tmp_path / "w.pth")
    data = fill(tmp_path / "data", *(f"class {i:02}" for i in range(30)), each=1)
    out = run(capsys, "test_convnext", "--weights", tmp_path / "w.pth", "--data", data)[1]
    lines = out.splitlines()
    assert lines[1].split() == ["class", "00", "1", "0.0%", "–"]
    assert not any(line.startswith("class 29") for line in lines)
    assert "and 10 classes with at least this recall" in out


@pytest.fixture
def published(tmp_path, monkeypatch):
    """vmamba_atto as if it were published: an official file, served over HTTP, and an accuracy."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    torch.save({"model": official(timm.create_model("vmamba_atto").state_dict())}, tmp_path / "published.pth")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{httpd.server_address[1]}/published.pth"
    cfg = _registry._model_pretrained_cfgs["vmamba_atto"]
    changed = dataclasses.replace(cfg, url=url, description="ImageNet-1K 70.5 %")
    monkeypatch.setitem(_registry._model_pretrained_cfgs, "vmamba_atto", changed)
    yield tmp_path / "published.pth"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_the_published_accuracy_stands_beside_published_weights_only(published, tmp_path, capsys):
    data = fill(tmp_path / "data", SYNSETS[0], each=1)
    code, out, _ = run(capsys, "vmamba_atto", "--pretrained", "--data", data)
    assert code == 0
    assert "published accuracy 70.5%, on the 50,000 validation images of ImageNet-1K, which is not what was" in out
    values = json.loads(run(capsys, "vmamba_atto", "--pretrained", "--data", data, "--json")[1])
    assert (values["weights"], values["published_top1"]) == ("published", 70.5)
    own = json.loads(run(capsys, "vmamba_atto", "--weights", published, "--data", data, "--json")[1])
    assert own["loss"] == values["loss"]
    assert "published_top1" not in own


@pytest.mark.parametrize(
    ("folders", "words", "message"),
    [
        pytest.param(
            "cat dog", "--weights {w}", "which of the 1000 outputs the 2 class folders (cat, dog)", id="names"
        ),
        pytest.param("n01440764 n99999999", "--weights {w}", "n99999999: not among the 1000 classes", id="synset"),
        pytest.param("0 1000", "--weights {w}", "class folder 1000: the outputs are numbered 0 to 999", id="number"),
        pytest.param("0", "", "which weights of test_convnext?", id="no-weights"),
        pytest.param("0", "--weights best", "which weights of test_convnext?", id="weights-of-a-run"),
        pytest.param("0", "--weights {w} --pretrained", "which weights of test_convnext?", id="both"),
        pytest.param("0", "--weights nowhere.pth", "no such checkpoint file", id="no-file"),
        pytest.param("", "--weights {w}", "no class folders", id="empty"),
    ],
)
def test_bad_input_gets_one_line(folders, words, message, model, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    fill(tmp_path / "data", *folders.split(), each=1)
    words = words.format(w=tmp_path / "weights.pth").split()
    code, _, err = run(capsys, "test_convnext", "--data", tmp_path / "data", *words)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_what_and_on_what(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for words, message in (
        (["test_convnetx", "--pretrained"], "did you mean test_convnext"),
        (["runs/nowhere"], "no such run folder or weights file: runs/nowhere"),
        (["test_convnext", "--pretrained"], "give a folder of class folders with --data"),
        ([tmp_path / "run", "--pretrained"], "--pretrained belongs to the name of a model"),
        (["vmamba_atto", "--pretrained", "--data", fill(tmp_path / "d", "0", each=1)], "no published weights"),
    ):
        code, _, err = run(capsys, *words)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_every_unreadable_image_is_named(model, tmp_path, capsys):
    data = fill(tmp_path / "data", "0", "1")
    for name in ("0/1.png", "1/0.png"):
        (data / name).write_text("no picture")
    code, _, err = run(capsys, "test_convnext", "--weights", tmp_path / "weights.pth", "--data", data)
    assert (code, err.count("\n")) == (2, 1)
    assert "0/1.png" in err
    assert "1/0.png" in err
