"""``vision-ssm export hub``: timm, transformers and the card's own code use what it writes, without a network."""

import json
import re
import socket

import pytest
import timm
import torch
from PIL import Image

import vision_ssm
from scenes import write_masks
from short_runs import SEGMENTER, SHORT
from vision_ssm.cli import main
from vision_ssm.engine.weights import save_weights
from vision_ssm.recipes import segment, small
from vision_ssm.tasks import train
from vision_ssm.tasks.segmentation import Segmentation

MODEL = dict(model="vmamba_atto", model_args={"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)})
NAMES = {"red": "red|<b>", "green": "green", "blue": "blue"}


def export(capsys, *words):
    code = main(["export", "hub", *map(str, words)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for name, new in NAMES.items():
        (root / "data").mkdir(exist_ok=True)
        (root / "data" / new).symlink_to(images / name)
    config = small(data=str(root / "data"), **{**SHORT, **MODEL, "epochs": 1, "crop_pct": 0.9})
    train(config, root / "run", about={"recipe": "small", "command": "vision-ssm train classify --data colors"})
    return root / "run"


@pytest.fixture(scope="module")
def folder(run):
    assert main(["export", "hub", str(run), str(run.parent / "colors")]) == 0
    return run.parent / "colors"


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", None)


def test_timm_loads_the_folder(folder, run, images):
    assert sorted(path.name for path in folder.iterdir()) == [
        *("README.md", "config.json", "confusion.png", "curves.png", "model.safetensors"),
    ]
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    model, task = timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), vision_ssm.load(run)
    assert model.pretrained_cfg["label_names"] == list(task.spec.classes)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    picture = images / "red" / "0.png"
    with torch.no_grad():
        found = model(transform(Image.open(picture))[None]).softmax(1)[0]
    for each in (task, vision_ssm.load(folder)):
        torch.testing.assert_close(each.predict([picture])[0].probabilities, found, rtol=1e-4, atol=1e-5)


def test_the_card_is_of_the_run(folder, run, images, monkeypatch, capsys):
    card = (folder / "README.md").read_text(encoding="utf-8")
    results = json.loads((run / "results.json").read_text())
    assert card.startswith("---\ntags:\n- image-classification\n- timm\n- transformers\n- vision-ssm\n")
    assert "license: unknown\n---\n# Model card for colors\n" in card
    assert f"| accuracy | {results['accuracy']:.1%} (95% interval " in card
    assert "| red\\|\\<b\\> | " in card
    assert "vision-ssm train classify --data colors" in card
    assert "- **Epochs:** best 1 of 1" in card
    pictures = re.findall(r"!\[.+]\((.+)\)", card)
    assert pictures == ["confusion.png", "curves.png"]
    assert all((folder / name).is_file() for name in pictures)
    Image.open(images / "blue" / "1.png").save(folder.parent / "picture.jpg")
    monkeypatch.chdir(folder.parent)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.split()[0] in NAMES.values()


def test_transformers_loads_the_folder(folder, images):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert sorted(model.config.id2label.values()) == sorted(NAMES.values())
    picture = Image.open(images / "green" / "2.png")
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(picture)["pixel_values"]
    expected = vision_ssm.load(folder / "model.safetensors", optimized=False)
    torch.testing.assert_close(pixels[0], expected.spec.eval_transform()(picture))
    torch.testing.assert_close(model(pixels).logits, expected.model(pixels))


def test_last_weights_have_no_results(run, tmp_path, capsys):
    assert export(capsys, run / "last.safetensors", tmp_path / "last")[0] == 0
    card = (tmp_path / "last" / "README.md").read_text(encoding="utf-8")
    assert "## Results" not in card
    assert "![Learning curves](curves.png)" in card


def test_other_weights_have_a_short_card(tmp_path, capsys):
    torch.save(timm.create_model("test_convnext").state_dict(), tmp_path / "w.pth")
    code, out, err = export(capsys, f"test_convnext={tmp_path / 'w.pth'}", tmp_path / "new")
    assert (code, err) == (0, "")
    assert out.endswith(f"hf upload OWNER/NAME {tmp_path / 'new'}\n")
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert "license: unknown\n" in card
    assert "vision_ssm" not in card
    assert timm.create_model(f"local-dir:{tmp_path / 'new'}", pretrained=True).num_classes == 1000


@pytest.mark.parametrize(
    ("model", "out", "line"),
    [
        ("{run}", "{run}", "{run} is not empty; name a new folder"),
        ("{run}", "{run}/config.json", "{run}/config.json is a file; name a new folder"),
        ("{run}", "{run}/no/x", "no such folder: {run}/no"),
        ("vmamba_atto", "{run}/x", "vmamba_atto has no published weights; "),
        ("vmamba_atto=random", "{run}/x", "vmamba_atto=random has new weights, which are nothing to share"),
    ],
    ids=["not empty", "a file", "no parent", "no weights", "new weights"],
)
def test_what_is_refused(model, out, line, run, capsys):
    code, shown, err = export(capsys, model.format(run=run), out.format(run=run))
    assert (code, shown) == (2, "")
    assert err.startswith(f"vision-ssm: error: {line.format(run=run)}")
    assert err.count("\n") == 1
    assert not (run / "x").exists()


def test_a_segmenter_is_refused(tmp_path, capsys):
    write_masks(tmp_path / "streets")
    config = segment(data=str(tmp_path / "streets"), **SEGMENTER)
    task = Segmentation.from_config(config, Segmentation.load_data(config))
    file = tmp_path / "best.safetensors"
    save_weights(file, task.model.state_dict(), task.name, task.spec)
    code, _, err = export(capsys, file, tmp_path / "out")
    assert code == 2
    assert err == (
        f"vision-ssm: error: {file} is of segmentation, and timm's format is for classifiers; upload its weights "
        f"file, {file}, itself: vision_ssm.load reads it\n"
    )


def test_nothing_is_left_where_the_disk_is_full(run, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "config.json")

    monkeypatch.setattr("vision_ssm.export.hub.write_json", full)
    assert export(capsys, run, tmp_path / "out") == (
        2,
        "",
        "vision-ssm: error: No space left on device (config.json)\n",
    )
    assert list(tmp_path.iterdir()) == []
