import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import vision_ssm
from scenes import write_scenes
from short_runs import DETECTOR, interrupt
from vision_ssm.cli import main
from vision_ssm.data.coco import load_coco
from vision_ssm.engine.recorder import Stopped
from vision_ssm.engine.run_folder import RunFolder
from vision_ssm.engine.weights import save_weights
from vision_ssm.errors import InputError
from vision_ssm.recipes import DetectionConfig
from vision_ssm.tasks import load, train
from vision_ssm.tasks.classification import Classification, ClassifierSpec
from vision_ssm.tasks.detection import Detection, DetectorSpec, first_model
from vision_ssm.tasks.detection_results import DetectionResults


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("run") / "run")
    return folder, train(DetectionConfig(data=str(scenes), **DETECTOR), folder)


def test_run_leaves_a_folder_that_is_enough_to_use_it(run, scenes, tmp_path):
    folder, result = run
    with folder.metrics.open() as file:
        rows = list(csv.DictReader(file))
    losses = {f"train_loss{part}" for part in ("", "_rpn_cls", "_rpn_box", "_cls", "_box", "_mask")}
    assert losses | {"val_box_AP", "val_mask_AP", "val_box_ARl"} <= set(rows[0])
    for name in ("curves", "predictions", "precision"):
        assert Image.open(folder.path / f"{name}.png").size > (300, 300)
    alone = tmp_path / "moved.safetensors"
    alone.write_bytes(folder.best.read_bytes())
    task = load(alone, "cpu", optimized=False)
    again = task.evaluate(task.read_images(scenes))
    assert again.metrics() == pytest.approx(result.metrics(), nan_ok=True)
    best = rows[json.loads(folder.results.read_text())["best_epoch"] - 1]
    assert float(best["val_mask_AP"]) == pytest.approx(again.metrics()["mask_AP"])


def test_predictions_are_in_pixels_of_the_image(run, scenes):
    folder, _ = run
    paths = sorted(scenes.glob("val2017/*"))
    for found, path in zip(load(folder.path).predict(paths), paths, strict=True):
        width, height = Image.open(path).size
        assert found.id == str(path)
        count = len(found)
        assert found.masks.shape == (count, height, width)
        assert found.masks.dtype == torch.bool
        assert found.boxes.shape == (count, 4)
        assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)
        assert found.labels.dtype == torch.int64
        assert (found.boxes[:, 2] <= width).all()
        assert (found.boxes[:, 3] <= height).all()


def test_another_test_size_of_a_file(run):
    folder, _ = run
    assert load(folder.path, test_size=[200, 160]).spec.test_size == (200, 160)
    with pytest.raises(InputError, match="is of detection, which has no img_size, but"):
        load(folder.path, img_size=3)
    with pytest.raises(InputError, match="longer side first"):
        load(folder.path, test_size=(100, 160))


@pytest.mark.parametrize("detector", ["mask-rcnn", "retinanet"])
def test_interrupted_run_takes_the_same_course(scenes, tmp_path, monkeypatch, detector):
    config = DetectionConfig(data=str(scenes), **DETECTOR | dict(detector=detector, ema_decay=0.9, grad_accum=2))
    whole = RunFolder(tmp_path / "whole")
    train(config, whole)
    with monkeypatch.context() as patch:
        interrupt(patch, 0, 1)
        with pytest.raises(Stopped):
            train(config, tmp_path / "parts")
    parts = RunFolder(tmp_path / "parts")
    train(config, parts, resume=True)
    for name in ("best", "last"):
        one, other = (safetensors.torch.load_file(getattr(run, name)) for run in (whole, parts))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_overfitted_batch_is_found_again(tmp_path):
    root = write_scenes(tmp_path, {"train2017": 2, "val2017": 1}, crowd=False, sizes=[(96, 96)])
    more = dict(model_args={}, out_indices=(1, 2, 3), width=32, short_sides=(96,), test_size=(96, 96), hflip=0.0)
    config = DetectionConfig(data=str(root), **DETECTOR | more)
    task = Detection.from_config(config, splits := load_coco(config))
    optimizer = torch.optim.AdamW(task.model.parameters(), 3e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, 100)
    batch = task.collate([task.train_transform(splits.train.sample(key)) for key in range(2)])
    torch.manual_seed(0)
    for _ in range(100):
        losses, _ = task.training_step(task.model.train(), batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 5.0)
        optimizer.step()
        rates.step()
    task.model.eval()
    metrics = task.evaluate(splits.train).metrics()
    assert metrics["box_AP50"] > 0.9
    assert metrics["mask_AP50"] > 0.9


def test_data_without_masks_trains_boxes(tmp_path):
    scenes = write_scenes(tmp_path / "scenes", masks=False)
    splits = load_coco(config := DetectionConfig(data=str(scenes), **DETECTOR))
    task = Detection.from_config(config, splits)
    assert (task.spec.detector, task.monitor) == ("faster-rcnn", "box_AP")


def test_backbone_starts_from_a_classifier_and_a_detector_from_a_detector(run, scenes, tmp_path, caplog):
    small = DETECTOR["model_args"]
    spec = ClassifierSpec(model="vmamba_atto", model_args=small, classes=("a", "b"), interpolation="bicubic")
    classifier = Classification.create_model(spec)
    file = tmp_path / "classifier.safetensors"
    save_weights(file, classifier.state_dict(), "classification", spec)
    config = DetectionConfig(data=str(scenes), **DETECTOR | dict(backbone_weights=file))
    splits = load_coco(config)
    started = Detection.from_config(config, splits).model.backbone.model
    assert torch.equal(started.stages[1].blocks[0].ss2d.A_log, classifier.stages[1].blocks[0].ss2d.A_log)
    assert caplog.text.count("feature_norms") > 0
    whole = replace(config, backbone_weights=False, pretrained=run[0].path)
    task = Detection.from_config(whole, splits)
    stored = safetensors.torch.load_file(run[0].best)
    assert torch.equal(task.model.cls_score.weight, stored["cls_score.weight"])
    renamed = replace(task.spec, classes=("x", "y", "z"))
    caplog.clear()
    other = first_model(whole, renamed)
    assert not torch.equal(other.cls_score.weight, stored["cls_score.weight"])
    assert torch.equal(other.box_head.fc6.weight, stored["box_head.fc6.weight"])
    assert "depend on its classes" in caplog.text
    with pytest.raises(InputError, match="is of mask-rcnn on vmamba_atto, not of retinanet"):
        Detection.from_config(replace(whole, detector="retinanet"), splits)


def test_padding_changes_the_maps(run, scenes):
    """Why evaluation goes image by image: in a batch, the scans run over the padding of smaller images too."""
    task = load(run[0].path, "cpu", optimized=False)
    small, large = (
        task.eval_transform({"image": Image.new("RGB", size, "white"), "id": ""}) for size in [(96, 64), (96, 96)]
    )
    with torch.no_grad():
        alone, together = (task.model.pyramid(task.collate(each)["image"]) for each in ([small], [small, large]))
    apart = [(b[:1, :, : a.shape[2]] - a).abs().max() / a.abs().max() for a, b in zip(alone, together, strict=True)]
    assert 0.01 < max(apart) < 1


def test_predict_and_eval_from_the_command_line(run, scenes, tmp_path, capsys):
    folder, result = run
    images, out = scenes / "val2017", tmp_path / "out"
    assert main(["predict", str(folder.path), str(images), "--out", str(out), "--threshold", "0.05"]) == 0
    document = json.loads((out / "predictions.json").read_text())
    assert {entry["category_id"] for entry in document["annotations"]} <= {3, 7, 9}
    assert len(document["images"]) == len([*images.iterdir()]) == len([*out.glob("*.jpg")])
    assert (out / "predictions.csv").read_text().startswith("image,class,score,x1,y1,x2,y2\n")
    assert main(["predict", str(folder.path), str(images / "0000.png"), "--top", "3"]) == 2
    assert "of detection, which has no --top" in capsys.readouterr().err
    plots = ["--plots", str(tmp_path / "plots")]
    assert main(["eval", str(folder.path), "--data", str(scenes), "--json", "--no-optimize", *plots]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["box_AP"] == pytest.approx(result.metrics()["box_AP"])
    assert [row["class"] for row in values["per_class"]] == ["disc", "square", "triangle"]
    assert (tmp_path / "plots" / "precision.png").is_file()


def test_bad_annotations_stop_a_run_before_it_writes(scenes, tmp_path, capsys):
    bad = json.loads((scenes / "annotations" / "instances_val2017.json").read_text())
    bad["annotations"][0]["bbox"] = [500, 0, 5, 5]
    file = scenes / "annotations" / "bad.json"
    file.write_text(json.dumps(bad))
    words = ["train", "detect", "--data", str(scenes), "--val-data", str(file), "--out", str(tmp_path / "run")]
    assert main(words) == 2
    assert "outside" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_loads_by_its_published_call(run):
    spec = load(run[0].path).spec
    assert isinstance(spec, DetectorSpec)
    assert isinstance(vision_ssm.load(run[0].path, test_size=(128, 96)).predict(np.zeros((40, 60, 3), np.uint8)), list)


def test_mistakes_are_objects_that_are_not_annotated(scenes):
    images = load_coco(DetectionConfig(data=str(scenes)), 0).val
    rows = []
    for key in range(len(images)):
        sample = images.sample(key)
        boxes, labels = sample["boxes"].tolist(), sample["labels"].tolist()
        objects = [{"box": box, "label": label, "score": 0.9} for box, label in zip(boxes, labels, strict=True)]
        rows.append({"objects": [{**each, "class": images.classes[each["label"]]} for each in objects]})
    assert DetectionResults(images.classes, None, tuple(rows)).mistakes(images) == []
    box = [0, 0, *images.sample(2)["image"].size]  # overlaps all, but with none by half
    rows[2]["objects"] += [{"box": box, "label": 1, "score": 0.6, "class": "square"}]
    (found,) = DetectionResults(images.classes, None, tuple(rows)).mistakes(images)
    assert (found.image, found.text) == (images.id(2), "square (60.0%), not annotated")


def test_report_of_a_detector(run, tmp_path):
    assert main(["report", str(run[0].path), "--out", str(tmp_path / "r.html"), "--num-workers", "0"]) == 0
    page = (tmp_path / "r.html").read_text()
    assert all(text in page for text in ("mask AP", "box AP50", "Precision", "triangle", "Samples", "Speed"))
