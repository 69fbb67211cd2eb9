"""``vision-ssm analyze attention``: files, table, layers, and bad words."""

import csv
import json

import pytest
from PIL import Image

from short_runs import SEGMENTER
from vision_ssm.cli import main
from vision_ssm.engine.weights import save_weights
from vision_ssm.tasks.segmentation import Segmentation


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (80, 64), (60 * number, 90, 200)).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


def run(capsys, *words):
    code = main(["analyze", "attention", *map(str, words), "--device", "cpu"])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_it_draws_writes_and_prints(photos, tmp_path, capsys):
    words = ("vim2_atto=random", "--data", photos, "--images", 2, "--position", 0, 1, "--out", tmp_path / "out")
    code, out, _ = run(capsys, *words, "--layer", "stages.1.blocks.0")
    assert code == 0
    assert "scan stages.1.blocks.0 of vim2_atto=random, " in out
    assert "from row 0, column 1" in out
    assert (
        len([line for line in out.splitlines() if "Shifted" not in line and line.startswith(("0.png", "1.png"))]) == 10
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "attention.png", "attention.csv", "attention-routes.png", "attention-routes.csv",
    }  # fmt: skip
    with (tmp_path / "out" / "attention.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0])[:6] == ["image", "layer", "route", "row", "column", "weight"]
    assert {line["route"] for line in lines} >= {"all"}


def test_the_channel_attention_of_a_ganglion_layer(photos, tmp_path, capsys):
    subject = ("sparx_mamba_atto=random", "--data", photos, "--out", tmp_path / "out", "--images", 1, "--json")
    code, out, _ = run(capsys, *subject, "--list")
    layers = json.loads(out)["layers"]
    assert code == 0
    assert {layer["kind"] for layer in layers} == {"scan", "channel attention"}
    name = next(layer["name"] for layer in layers if layer["kind"] == "channel attention")
    code, out, _ = run(capsys, *subject, "--layer", name)
    facts = json.loads(out)
    assert (code, facts["layer"], facts["rows"]) == (0, name, [])
    header = (tmp_path / "out" / "attention.csv").read_text().partition("\n")[0]
    assert header == "image,layer,head,channel,from_channel,weight"


def test_the_backbone_of_a_segmenter_without_padding(photos, tmp_path, capsys):
    options = {name: SEGMENTER[name] for name in ("model", "model_args", "width", "test_size")}
    spec = Segmentation.Spec(decoder="upernet", classes=("ground", "disc"), labels=(0, 1), **options)
    path = tmp_path / "segmenter.safetensors"
    save_weights(path, Segmentation.create_model(spec).state_dict(), "segmentation", spec)
    words = (path, "--data", photos, "--images", 1, "--json", "--layer", "backbone.model.stages.1.blocks.0.ss2d")
    code, out, _ = run(capsys, *words, "--out", tmp_path / "out")
    assert code == 0
    assert json.loads(out)["grid"] == [18, 23]  # of 72x90 pixels, which the network pads to 96x96
    assert len(json.loads(out)["rows"]) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("vmamba_atto=random", "--layer", "stages.2.blocks.0.ssd"), "did you mean stages.2.blocks.0.ss2d"),
        (("vmamba_atto=random", "--position", "0.5", "2"), "--position must be at least 0 and at most 1, got 0.5 2"),
        (("test_convnext=random",), "has no layer that scans"),
        (("sparx_swin_mini_atto=random",), "sparx_swin_mini_atto"),
    ],
    ids=["layer", "position", "no scan", "no model"],
)
def test_bad_words(photos, tmp_path, capsys, words, message):
    code, _, err = run(capsys, *words, "--data", photos, "--out", tmp_path / "out")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
