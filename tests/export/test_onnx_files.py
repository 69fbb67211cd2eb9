"""ONNX files: what they hold, that they are used without the network, and what is refused. One export per kind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vision_ssm
from vision_ssm.cli import main
from vision_ssm.engine.weights import save_weights
from vision_ssm.errors import InputError
from vision_ssm.export import demo
from vision_ssm.recipes import small
from vision_ssm.tasks.classification import Classification, ClassifierSpec
from vision_ssm.tasks.detection import Detection, DetectorSpec
from vision_ssm.tasks.segmentation import Segmentation, SegmenterSpec

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

ARGS: dict[str, Any] = dict(depths=(1, 1), dims=(8, 16))
DENSE: dict[str, Any] = dict(
    model="vmamba_atto", model_args={"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, width=16, test_size=(96, 72)
)


def save(kind: Any, spec: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    save_weights(folder / "w.safetensors", kind.create_model(spec).state_dict(), kind.name, spec)
    return folder / "w.safetensors"


def domains(path: Path) -> set[str]:
    def walk(graph: Any) -> Any:
        for node in graph.node:
            yield node.domain
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    yield from walk(attribute.g)

    proto = onnx.load(path)
    assert not proto.functions
    return {*walk(proto.graph)}


def axes(values: Any) -> list[list[Any]]:
    return [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(4):
            Image.fromarray(noise.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A weights file, and the ONNX file of it."""
    folder = tmp_path_factory.mktemp("classifier")
    spec = ClassifierSpec.from_config(small(model="vmamba_atto", model_args=ARGS), ("cat", "dog"))
    weights = save(Classification, spec, folder)
    assert main(["export", "onnx", str(weights), str(folder / "m.onnx")]) == 0
    return weights, folder / "m.onnx"


def refuse_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("a network is built"))


def test_one_file_of_standard_operators_for_any_size_says_what_it_is(classifier: tuple[Path, Path]) -> None:
    weights, file = classifier
    proto = onnx.load(file)
    assert domains(file) == {""}
    assert axes(proto.graph.input) == [["batch", 3, "height", "width"]]
    assert axes(proto.graph.output) == [["batch", 2]]
    held = {entry.key: entry.value for entry in proto.metadata_props}
    spec = json.loads(held["vision_ssm"])
    assert (spec["task"], spec["classes"], spec["img_size"]) == ("classification", ["cat", "dog"], 32)
    assert {*file.parent.iterdir()} == {weights, file}


def test_predict_and_eval_say_the_same_without_the_network(
    classifier: tuple[Path, Path],
    pictures: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answers(path: Path) -> tuple[Any, Any]:
        assert main(["predict", str(path), str(pictures), "--json", "--device", "cpu"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert main(["eval", str(path), "--data", str(pictures), "--json", "--device", "cpu"]) == 0
        return rows, json.loads(capsys.readouterr().out)

    weights, file = classifier
    rows, metrics = answers(weights)
    refuse_networks(monkeypatch)
    found, measured = answers(file)
    assert measured["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
    assert [row["answer"] for row in found] == [row["answer"] for row in rows]
    for ours, theirs in zip(found, rows, strict=True):
        assert ours["predictions"][0]["probability"] == pytest.approx(theirs["predictions"][0]["probability"], abs=1e-5)


def test_load_takes_the_file_with_torchs_threads(
    classifier: tuple[Path, Path], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_networks(monkeypatch)
    task = vision_ssm.load(classifier[1])
    assert task.model.session.get_session_options().intra_op_num_threads == torch.get_num_threads()
    assert {each.label for each in task.predict([pictures / "cat" / "0.png"])} <= {"cat", "dog"}
    with pytest.raises(InputError, match=r"^.*not on device cuda and precision 32-true$"):
        vision_ssm.load(classifier[1], "cuda")


def test_the_demo_of_the_file_only_predicts(classifier: tuple[Path, Path], pictures: Path) -> None:
    pytest.importorskip("gradio")
    page = demo(vision_ssm.load(classifier[1]))
    assert "An ONNX file only predicts" in str(page.config)
    call: Any = next(each.fn for each in page.fns.values() if each.name == "predict")
    shown = {getattr(item, "label", None): value for item, value in call({"path": pictures / "cat" / "0.png"}).items()}
    assert shown["Prediction"].keys() == {"cat", "dog"}
    assert shown["Seen"] is None


def test_int8_is_in_standard_operators_too(classifier: tuple[Path, Path], pictures: Path, tmp_path: Path) -> None:
    from vision_ssm.export.onnx import quantize

    content = quantize(classifier[1].read_bytes())
    (tmp_path / "q.onnx").write_bytes(content)
    assert domains(tmp_path / "q.onnx") == {""}
    assert {"MatMulInteger", "ConvInteger"} & {node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node}
    both = [vision_ssm.load(path) for path in (classifier[1], tmp_path / "q.onnx")]
    found = [torch.stack([each.probabilities for each in task.predict([*pictures.rglob("*.png")])]) for task in both]
    torch.testing.assert_close(*found, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("predict {file} {pictures} --precision bf16-true", "not on device auto and precision bf16-true"),
        ("predict {file} {pictures} --no-optimize", "--no-optimize is for models of torch"),
        ("predict {file} {pictures} --test-size 96 64", "has no test_size"),
        ("eval {file} --data {pictures} --precision bf16-true", "not on device cpu and precision bf16-true"),
        ("eval {file}", "give --data DIR"),
        ("predict {broken} {pictures}", "was not written by vision-ssm export onnx, or is damaged"),
        ("eval {foreign} --data {pictures}", "was not written by vision-ssm export onnx, or is damaged"),
        ("predict {features} {pictures}", "gives feature_0, for your own programs"),
        ("export onnx {file} {out}", "is an ONNX file, which predict and eval take"),
        ("export onnx vmamba_atto=random {out}.pt", "must end in .onnx"),
        ("export onnx vmamba_atto=random {out}/no/x.onnx", "no such folder"),
        ("export onnx vmamba_ato=random {out}", "unknown model vmamba_ato"),
    ],
    ids=lambda value: value if "{" in value else None,
)
def test_bad_input_is_one_line(
    words: str,
    message: str,
    classifier: tuple[Path, Path],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {name: tmp_path / f"{name}.onnx" for name in ("broken", "foreign", "features", "out")}
    files["broken"].write_bytes(classifier[1].read_bytes()[:5000])
    proto = onnx.load(classifier[1])
    for node in proto.graph.node:
        node.output[:] = ["feature_0" if name == "logits" else name for name in node.output]
    proto.graph.output[0].name = "feature_0"
    onnx.save(proto, files["features"])
    del proto.metadata_props[:]
    onnx.save(proto, files["foreign"])
    places = {name: str(path) for name, path in files.items()} | {"file": classifier[1], "pictures": pictures}
    given = [word.format(**places) for word in words.split()]
    assert main([*given, *(["--device", "cpu"] if given[0] == "eval" else [])]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not files["out"].exists()


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export", "onnx", "test_convnext=random", str(tmp_path / "x.onnx")]) == 2
    assert "needs onnx, which is not installed; pip install 'vision-ssm[export]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_of_one_size_and_its_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "onnx", "test_vit=random", str(tmp_path / "x.onnx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == "any batch, one size"
    assert axes(onnx.load(tmp_path / "x.onnx").graph.input) == [["batch", 3, 160, 160]]
    with pytest.raises(InputError, match=r"takes images of 160x160 pixels only, not 32x32"):
        vision_ssm.load(tmp_path / "x.onnx").model(torch.zeros(1, 3, 32, 32))
    assert main(["export", "onnx", "test_convnext=random", str(tmp_path / "f.onnx"), "--features"]) == 0
    assert [value.name for value in onnx.load(tmp_path / "f.onnx").graph.output] == [f"feature_{i}" for i in range(4)]


@pytest.mark.slow
def test_a_segmenter_gives_the_same_label_maps(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    spec = SegmenterSpec(decoder="upernet", classes=("a", "b", "c"), labels=(0, 1, 2), **DENSE)
    weights = save(Segmentation, spec, tmp_path)
    assert main(["export", "onnx", str(weights), str(tmp_path / "s.onnx")]) == 0
    expected = vision_ssm.load(weights, "cpu").predict(pictures / "cat" / "0.png")[0].label_map
    refuse_networks(monkeypatch)
    assert domains(tmp_path / "s.onnx") == {""}
    found = vision_ssm.load(tmp_path / "s.onnx").predict(pictures / "cat" / "0.png")[0].label_map
    assert (found == expected).float().mean() > 0.999


@pytest.mark.parametrize(
    ("detector", "names"),
    [("retinanet", {"logits", "deltas"}), ("mask-rcnn", {"map", "objectness", "deltas"})],
)
def test_raw_outputs_of_detectors(detector: str, names: set[str]) -> None:
    spec = DetectorSpec(detector=detector, classes=("a", "b"), category_ids=(1, 2), **DENSE)
    with torch.device("meta"):
        found = Detection.create_model(spec).eval().raw_outputs(torch.zeros(2, 3, 64, 96))
    assert {name.rpartition("_")[0] for name in found} == names
    assert all(len(x) == 2 and (x.ndim == 4 or x.shape[2:] in {(), (2,), (4,)}) for x in found.values())


@pytest.mark.slow
def test_a_detector_is_for_programs_of_your_own(tmp_path: Path, pictures: Path, capsys: Any) -> None:
    quick = DENSE | dict(model="test_convnext", model_args={})
    spec = DetectorSpec(detector="mask-rcnn", classes=("a", "b"), category_ids=(1, 2), **quick)
    assert main(["export", "onnx", str(save(Detection, spec, tmp_path)), str(tmp_path / "d.onnx")]) == 0
    assert domains(tmp_path / "d.onnx") == {""}
    assert main(["predict", str(tmp_path / "d.onnx"), str(pictures)]) == 2
    assert "for your own programs" in capsys.readouterr().err
