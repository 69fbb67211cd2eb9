"""`vision-ssm convert --task detect`, as a user calls it."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

import vision_ssm
from official_names import official, official_detector
from vision_ssm.cli import main
from vision_ssm.detectors import create_detector, create_segmenter
from vision_ssm.tasks.detection import DetectorSpec

NAME = "vmamba_atto"


@pytest.fixture
def convert(capsys, tmp_path):
    """Save a checkpoint and convert it to `tmp_path / "ours.safetensors"`; return code, output and errors."""

    def run(content, *words, task="detect", model=NAME):
        torch.save(content, tmp_path / "theirs.pth")
        files = (str(tmp_path / "theirs.pth"), str(tmp_path / "ours.safetensors"))
        code = main(("convert", *files, "--model", model, "--task", task, *words))
        output = capsys.readouterr()
        assert len(output.err.splitlines()) == (code != 0)
        assert (tmp_path / "ours.safetensors").exists() == (code == 0)
        return code, " ".join(output.out.split()), output.err

    return run


@pytest.fixture(scope="module")
def detectors():
    """Small detectors of each kind."""
    torch.manual_seed(0)
    return {kind: create_detector(kind, NAME).eval() for kind in ("mask-rcnn", "retinanet")}


@pytest.fixture
def picture(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def described(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["vision_ssm"])


@pytest.mark.parametrize("kind", ["mask-rcnn", "retinanet"])
def test_a_converted_file_is_the_same_detector(convert, detectors, tmp_path, kind):
    state = detectors[kind].state_dict()
    code, out, _ = convert({"meta": {}, "state_dict": official_detector(state)})
    assert code == 0
    assert f"{len(state)} tensors in {tmp_path / 'theirs.pth'} under 'state_dict'" in out
    assert "not needed" not in out
    assert "left out" not in out
    assert f"vision_ssm.load('{tmp_path / 'ours.safetensors'}')" in out
    spec = described(tmp_path / "ours.safetensors")
    assert (spec["task"], spec["detector"], spec["model"], spec["test_size"]) == ("detection", kind, NAME, [1333, 800])
    assert (len(spec["classes"]), spec["classes"][0], spec["classes"][-1]) == (80, "person", "toothbrush")
    assert (len(spec["category_ids"]), spec["category_ids"][11], spec["category_ids"][-1]) == (80, 13, 90)
    assert np.multiply(spec["mean"], 255).astype(np.float32).tolist() == np.float32([123.675, 116.28, 103.53]).tolist()
    assert np.multiply(spec["std"], 255).astype(np.float32).tolist() == np.float32([58.395, 57.12, 57.375]).tolist()
    task = vision_ssm.load(tmp_path / "ours.safetensors", optimized=False)
    images, size = torch.randn(1, 3, 64, 96), torch.tensor([[60, 90]])
    with torch.no_grad():
        for found, expected in zip(task.model(images, size, size), detectors[kind](images, size, size), strict=True):
            assert torch.equal(found.boxes, expected.boxes)
            assert torch.equal(found.scores, expected.scores)


def test_where_the_tensors_went(convert, detectors):
    out = convert(official_detector(detectors["mask-rcnn"].state_dict()))[1]
    for row in (
        "backbone.patch_embed 8 backbone.stem 8 5,184",
        "backbone.outnorm3 2 backbone.feature_norms 2 256",
        "neck 16 fpn 16",
        "roi_head 4 box_head 4",
        "roi_head 4 mask_predictor 4",
    ):
        assert row in out


@pytest.mark.parametrize("names", [None, ("cat", "dog", "a car"), ("cat", "dog")], ids=["numbers", "named", "too-few"])
def test_other_classes(convert, tmp_path, names):
    state = official_detector(create_detector("retinanet", NAME, num_classes=3).state_dict())
    words = ()
    if names:
        (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
        words = ("--class-map", str(tmp_path / "names.txt"))
    code, _, err = convert(state, *words)
    if len(names or "abc") < 3:
        assert code == 2
        assert "names.txt names 2 classes, " in err
        return
    spec = described(tmp_path / "ours.safetensors")
    assert (tuple(spec["classes"]), spec["category_ids"]) == (names or ("0", "1", "2"), [0, 1, 2])


def test_arguments_of_the_backbone_are_stored(convert, tmp_path):
    args = dict(depths=(1, 1, 1, 1), feature_norm=False)
    state = official_detector(create_detector("retinanet", NAME, args).state_dict())
    assert convert(state, "--model-args", "depths=(1,1,1,1)", "feature_norm=False")[0] == 0
    assert described(tmp_path / "ours.safetensors")["model_args"] == {"depths": [1, 1, 1, 1], "feature_norm": False}
    vision_ssm.load(tmp_path / "ours.safetensors")


def test_verify_names_what_is_found(convert, detectors, picture, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Small(DetectorSpec):
        test_size: tuple[int, int] = (96, 64)

    monkeypatch.setattr("vision_ssm.tasks.detection.Detection.Spec", Small)
    state = official_detector(detectors["retinanet"].state_dict())
    key = "bbox_head.retina_cls.bias"
    state[key] = torch.where(torch.arange(len(state[key])) % 80 == 15, 2.0, -9.0)
    out = convert(state, "--verify", str(picture))[1]
    assert f"{picture}, as {NAME} sees it: class score x1 y1 x2 y2 cat 0.88" in out


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


def classifier(state):
    return official(timm.create_model(NAME).state_dict())


def segmenter(state):
    return {key: value for key, value in state.items() if "backbone" in key} | {"decode_head.w": torch.ones(1)}


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (classifier, (), "theirs.pth holds no detector, as no weights of its heads are there; leave --task detect out"),
        (segmenter, (), "theirs.pth holds no detector, but upernet; use --task segment"),
        (dict, ("--model", "vmamba_tiny"), "theirs.pth is no vmamba_tiny; it fits vmamba_atto"),
        (
            lambda state: without(state, "bbox_head.retina_reg.bias"),
            (),
            "the weights do not fit RetinaNet: 1 missing: head.regression_head.bbox_reg.bias",
        ),
        (lambda state: state | {"bbox_head.w": torch.ones(1)}, (), "1 unexpected: bbox_head.w"),
        (dict, ("--backbone",), "--backbone and --task detect exclude each other"),
        (dict, ("--class-map", "none.txt"), "no such file of class names: none.txt"),
        (dict, ("--model", "resnet18"), "no conversion of official checkpoints for resnet18"),
        (dict, ("--task", "classify"), "theirs.pth is of a whole retinanet: "),
        (dict, ("--task", "classify"), "; --task detect takes all, --backbone takes the backbone alone"),
        (dict, ("--task", "classify", "--class-map", "x"), "--class-map is for detectors and segmenters: give"),
    ],
    ids=["classifier", "segmenter", "other-variant", "head", "unknown", "backbone", "class-map",
         "no-conversion", "whole", "hint", "classes-of-classifier"],
)  # fmt: skip
def test_what_is_refused(convert, detectors, content, words, message):
    code, _, err = convert(content(official_detector(detectors["retinanet"].state_dict())), *words)
    assert code == 2
    assert message in err


def test_a_segmenter_is_converted(convert, tmp_path, picture):
    torch.manual_seed(0)
    segmenter = create_segmenter("upernet", NAME).eval()
    code, out, _ = convert({"state_dict": official_detector(segmenter.state_dict())}, task="segment")
    assert code == 0
    assert "not needed" not in out
    spec = described(tmp_path / "ours.safetensors")
    assert (spec["task"], spec["decoder"], spec["model"], spec["size_multiple"]) == ("segmentation", "upernet", NAME, 1)
    assert (spec["test_size"], spec["mode"], spec["labels"][:2], spec["ignored"]) == ([2048, 512], "whole", [1, 2], [0])
    assert (len(spec["classes"]), spec["classes"][0], spec["classes"][-1]) == (150, "wall", "flag")
    task = vision_ssm.load(tmp_path / "ours.safetensors", optimized=False)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(task.model(images), segmenter(images))
    (found,) = vision_ssm.load(tmp_path / "ours.safetensors", test_size=(96, 64)).predict([picture])
    assert found.label_map.shape == (48, 64)


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (dict, ("--task", "detect"), "theirs.pth holds no detector, but upernet; use --task segment"),
        (dict, ("--task", "classify"), "theirs.pth is of a whole upernet: "),
        (classifier, (), "holds no segmenter, as no weights of its heads are there; leave --task segment out"),
        (lambda state: without(state, "decode_head.conv_seg.bias"), (), "1 missing: decode_head.classifier.bias"),
        (dict, ("--class-map", "none.txt"), "no such file of class names: none.txt"),
    ],
    ids=["detector", "whole", "classifier", "head", "class-map"],
)
def test_what_is_refused_of_segmenters(convert, change, words, message):
    state = official_detector(create_segmenter("upernet", NAME, width=64).state_dict())
    code, _, err = convert(change(state), *words, task="segment")
    assert code == 2
    assert message in err
