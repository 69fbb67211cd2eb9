"""``vision-ssm analyze resolution``: models at other sizes than that of training."""

import json

import numpy as np
import pytest
from PIL import Image

from scenes import write_masks
from short_runs import SEGMENTER
from vision_ssm.cli import main
from vision_ssm.engine.weights import save_weights
from vision_ssm.recipes import segment, small
from vision_ssm.tasks.classification import Classification, ClassifierSpec
from vision_ssm.tasks.segmentation import Segmentation


def analyze(capsys, *words):
    code = main(["analyze", "resolution", *map(str, words), "--device", "cpu", "--seconds", "0.01"])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    root = tmp_path_factory.mktemp("numbered")
    for name in ("0", "7"):
        (root / name).mkdir()
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_a_file_beside_a_timm_name(numbered, tmp_path, capsys):
    spec = ClassifierSpec.from_config(small(model="test_convnext", img_size=32), ("0", "7"))
    file = tmp_path / "own.safetensors"
    save_weights(file, Classification.create_model(spec).state_dict(), "classification", spec)
    words = (file, "test_convnext=random", "--data", numbered, "--images", 4, "--out", tmp_path / "out")
    code, out, err = analyze(capsys, *words, "--sizes", "48,32", "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)["rows"]
    assert [(row["model"], row["size"], row["own_size"]) for row in rows] == [
        *(("own.safetensors", 32, 32), ("own.safetensors", 48, 32)),
        *(("test_convnext=random", 32, 160), ("test_convnext=random", 48, 160)),
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["resolution.csv", "resolution.png"]


def test_a_size_that_fails_is_a_row(numbered, tmp_path, capsys):
    words = ("test_vit=random", "--data", numbered, "--sizes", "99,160", "--out", tmp_path)
    code, out, err = analyze(capsys, *words)
    lines = out.splitlines()
    assert code == 0
    assert lines[1].split() == ["test_vit=random", "99", "failed", "-", "-"]
    assert lines[2].split()[:2] == ["test_vit=random", "160*"]
    assert "warning: test_vit=random fails at 99: " in err


def test_segmenters_are_resized_by_their_shortest_side(tmp_path, capsys):
    data = write_masks(tmp_path / "data", {"train": 2, "val": 2})
    config = segment(data=str(data), **SEGMENTER)
    task = Segmentation.from_config(config, Segmentation.load_data(config))
    save_weights(tmp_path / "s.safetensors", task.model.state_dict(), "segmentation", task.spec)
    words = (tmp_path / "s.safetensors", "--data", data, "--sizes", "36,72", "--out", tmp_path / "out", "--json")
    code, out, _ = analyze(capsys, *words)
    assert code == 0
    small_, own = json.loads(out)["rows"]
    assert (own["size"], own["own_size"]) == (72, 72)
    assert 0 <= own["mIoU"] <= 1
    assert own["peak_memory_mib"] > 1.2 * small_["peak_memory_mib"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param("", "name at least one model or run", id="no-model"),
        pytest.param("test_vit=random", "which images is test_vit=random to be measured on?", id="no-data"),
        pytest.param("test_vit=random test_vit=random --data DATA", "cannot be told apart", id="twice"),
        pytest.param("test_vit=random --data DATA --sizes 99", "no size can be measured; test_vit", id="all-fail"),
        pytest.param("test_vit=random --data DATA --sizes", "--sizes takes at least one size", id="no-sizes"),
        pytest.param("test_vit=random --data DATA --sizes 0,32", "--sizes must be at least 1, got 0 32", id="zero"),
    ],
)
def test_bad_input(words, message, numbered, tmp_path, capsys):
    code, _, err = analyze(capsys, *words.replace("DATA", str(numbered)).split(), "--out", tmp_path / "out")
    assert code == 2
    assert message in err.splitlines()[-1]
