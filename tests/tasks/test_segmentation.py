import csv
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import vision_ssm
from scenes import write_masks
from short_runs import SEGMENTER, interrupt
from vision_ssm.cli import main
from vision_ssm.data.segmentation import load_masks
from vision_ssm.engine.recorder import Stopped
from vision_ssm.engine.run_folder import RunFolder
from vision_ssm.engine.weights import save_weights
from vision_ssm.errors import InputError
from vision_ssm.recipes import SegmentationConfig
from vision_ssm.tasks import load, train
from vision_ssm.tasks.classification import Classification, ClassifierSpec
from vision_ssm.tasks.segmentation import Segmentation, balanced_weights
from vision_ssm.tasks.segmentation_results import mean_iou


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_masks(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("run") / "run")
    return folder, train(SegmentationConfig(data=str(scenes), **SEGMENTER), folder)


def test_run_leaves_a_folder_that_is_enough_to_use_it(run, scenes, tmp_path):
    folder, result = run
    with folder.metrics.open() as file:
        rows = list(csv.DictReader(file))
    assert {"train_loss", "train_loss_pixels", "train_loss_auxiliary", "val_mIoU", "val_pixel_accuracy"} <= set(rows[0])
    for name in ("curves", "predictions", "confusion"):
        assert Image.open(folder.path / f"{name}.png").size > (300, 300)
    alone = tmp_path / "moved.safetensors"
    alone.write_bytes(folder.best.read_bytes())
    task = load(alone, "cpu", optimized=False)
    assert task.spec.classes == ("ground", "disc", "square", "triangle")
    again = task.evaluate(task.read_images(scenes))
    assert again.metrics() == pytest.approx(result.metrics())
    assert again.metrics() == pytest.approx(task.evaluate(task.read_images(scenes / "images" / "val")).metrics())
    best = rows[json.loads(folder.results.read_text())["best_epoch"] - 1]
    assert float(best["val_mIoU"]) == pytest.approx(again.metrics()["mIoU"])


def test_metrics_are_those_of_the_label_maps(run, scenes):
    folder, result = run
    task = load(folder.path)
    paths = sorted((scenes / "images" / "val").iterdir())
    confusion = np.zeros((4, 4))
    for found, path in zip(task.predict(paths), paths, strict=True):
        truth = np.asarray(Image.open(scenes / "masks" / "val" / f"{path.stem}.png"))
        assert found["label_map"].shape == truth.shape
        counts = truth != 255
        np.add.at(confusion, (truth[counts], found.label_map.numpy()[counts]), 1)
    hits = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hits
    values = result.metrics()
    assert values["mIoU"] == pytest.approx((hits / union)[union > 0].mean(), abs=1e-3)
    assert values["pixel_accuracy"] == pytest.approx(hits.sum() / confusion.sum(), abs=1e-3)
    assert values["mean_accuracy"] == pytest.approx((hits / confusion.sum(1)).mean(), abs=1e-3)


def test_mean_iou_leaves_out_classes_that_are_nowhere():
    confusion = torch.tensor([[6, 2, 0], [0, 0, 0], [0, 0, 0]])
    assert mean_iou(confusion) == pytest.approx((6 / 8 + 0 / 2) / 2)


def test_batches_of_one_size_change_nothing_and_others_little(run, scenes):
    folder, _ = run
    task = load(folder.path)
    images = task.read_images(scenes)
    one, four = (task.evaluate(images, batch_size).metrics()["mIoU"] for batch_size in (1, 4))
    assert one == pytest.approx(four, abs=0.1)
    same = images.subset([0, 3])  # of one size
    one, two = (task.evaluate(same, batch_size).metrics()["mIoU"] for batch_size in (1, 2))
    assert one == pytest.approx(two, abs=1e-4)


@pytest.mark.parametrize("changes", [dict(mode="slide", crop_size=48), dict(tta=True)], ids=["slide", "tta"])
def test_other_ways_to_test(run, scenes, changes):
    folder, _ = run
    task = load(folder.path, **changes)
    path = sorted((scenes / "images" / "val").iterdir())[0]
    (found,) = task.predict([path])
    assert found.label_map.shape == Image.open(path).size[::-1]
    pair = [path, path.with_name("0001.jpg")]  # of different sizes in one batch
    assert torch.equal(task.predict(pair)[0].label_map, found.label_map)
    assert [x.label_map.shape for x in task.predict(pair, 2)] == [x.label_map.shape for x in task.predict(pair)]


def test_interrupted_run_takes_the_same_course(scenes, tmp_path, monkeypatch):
    config = SegmentationConfig(data=str(scenes), **SEGMENTER, ema_decay=0.9)
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    train(config, whole)
    with monkeypatch.context() as patch:
        interrupt(patch, 1, 1)
        with pytest.raises(Stopped):
            train(config, parts)
    train(config, parts, resume=True)
    for name in ("best", "last"):
        states = [safetensors.torch.load_file(getattr(folder, name)) for folder in (whole, parts)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_small_data_are_learned(tmp_path):
    scenes = write_masks(tmp_path / "scenes", {"train": 4}, sizes=((64, 64),))
    changes = dict(decoder="unet", epochs=50, batch_size=4, lr=1e-2, min_lr=1e-2)
    changes |= dict(photometric=False, hflip=0.0, scale=(1.0, 1.0))
    config = SegmentationConfig(
        data=str(scenes), val_data=str(scenes / "images" / "train"), **{**SEGMENTER, **changes, "test_size": (64, 64)}
    )
    assert train(config, tmp_path / "run").metrics()["mIoU"] > 0.85


def test_weights_of_rare_classes(scenes):
    config = SegmentationConfig(data=str(scenes), **SEGMENTER, class_balance=0.5)
    task = Segmentation.from_config(config, load_masks(config))
    counts = torch.tensor(load_masks(config).train.counts())
    assert float((task.class_weights * counts).sum() / counts.sum()) == pytest.approx(1)
    assert float(task.class_weights[1] / task.class_weights[0]) == pytest.approx(float(counts[0] / counts[1]) ** 0.5)
    assert balanced_weights([3, 0, 1], 1.0).tolist() == pytest.approx([2 / 3, 0, 2])
    batch = task.collate([task.train_transform(load_masks(config).train.sample(key)) for key in (0, 1)])
    losses, plain = task.training_step(task.model.eval(), batch)[0], task.model.losses(batch["image"], batch["mask"])
    assert losses["pixels"] != plain["pixels"]


def test_unet_and_classes_that_are_numbered(tmp_path, scenes):
    other = write_masks(tmp_path / "scenes", {"train": 5})
    (other / "classes.txt").unlink()
    config = SegmentationConfig(data=str(other), decoder="unet", val_fraction=0.2, **{**SEGMENTER, "epochs": 1})
    train(config, tmp_path / "run")
    task = load(tmp_path / "run")
    assert (task.spec.decoder, task.spec.labels, task.spec.classes) == ("unet", (0, 1, 2, 3), ("0", "1", "2", "3"))


def test_a_classifier_and_a_segmenter_start_others(scenes, tmp_path, caplog, run):
    args = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    spec = ClassifierSpec(model="vmamba_atto", model_args=args, classes=("a", "b"), interpolation="bicubic")
    classifier = Classification.create_model(spec)
    save_weights(tmp_path / "classifier.safetensors", classifier.state_dict(), "classification", spec)
    config = SegmentationConfig(data=str(scenes), **SEGMENTER, backbone_weights=tmp_path / "classifier.safetensors")
    task = Segmentation.from_config(config, load_masks(config))
    started = task.model.backbone.state_dict()
    given = {f"model.{key}": value for key, value in classifier.state_dict().items()}
    assert all(torch.equal(value, given[key]) for key, value in started.items() if "feature_norms" not in key)
    assert "feature_norms" in caplog.text
    caplog.clear()
    folder, _ = run
    (tmp_path / "classes.txt").write_text("ground\nround\nsquare\ntriangle\n")
    config = SegmentationConfig(
        data=str(scenes), **SEGMENTER, pretrained=folder.path, class_map=tmp_path / "classes.txt"
    )
    task = Segmentation.from_config(config, load_masks(config))
    theirs = safetensors.torch.load_file(folder.best)
    assert torch.equal(
        task.model.state_dict()["decode_head.bottleneck.conv.weight"], theirs["decode_head.bottleneck.conv.weight"]
    )
    assert "the layers that depend on its classes, which differ, were not loaded" in caplog.text


def test_command_line(run, scenes, tmp_path, capsys):
    folder, result = run
    assert main(["eval", str(folder.path), "--json", "--plots", str(tmp_path / "plots")]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["mIoU"] == pytest.approx(result.metrics()["mIoU"], abs=1e-3)
    assert {row["class"] for row in values["per_class"]} == {"ground", "disc", "square", "triangle"}
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["confusion.png", "predictions.png"]
    assert main(["eval", str(folder.path), "--data", str(scenes), "--tta", "--test-size", "96", "72"]) == 0
    assert "six sizes" in capsys.readouterr().out
    out = tmp_path / "out"
    assert main(["predict", str(folder.path), str(scenes / "images" / "val"), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        "index", "color", "predictions.csv", "predictions.json", *(f"{i:04}.jpg" for i in range(4)),
    }  # fmt: skip
    (found,) = vision_ssm.load(folder.path).predict([scenes / "images" / "val" / "0000.jpg"])
    assert np.array_equal(np.asarray(Image.open(out / "index" / "0000.png")), found.label_map.numpy())
    assert Image.open(out / "color" / "0000.png").size == Image.open(scenes / "images" / "val" / "0000.jpg").size
    image = Image.open(scenes / "images" / "val" / "0000.jpg")
    assert Image.open(out / "0000.jpg").height > 2 * image.height  # the true classes above the predicted ones
    assert found.draw(image).height < 2 * image.height
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert list(rows[0]) == ["image", "class", "pixels", "share"]
    capsys.readouterr()
    assert main(["predict", str(folder.path), str(scenes / "images" / "val"), "--threshold", "0.5"]) == 2
    assert "which has no --threshold" in capsys.readouterr().err


def test_training_by_command_in_steps_and_with_all_labels(tmp_path, capsys):
    scenes = write_masks(tmp_path / "scenes")
    (scenes / "classes.txt").unlink()
    small = [f"{name}={value}".replace(" ", "") for name, value in SEGMENTER["model_args"].items()]
    words = ["train", "segment", "--data", str(scenes), "--ignore-labels", "--model", "vmamba_atto", "--model-args"]
    words += [*small, "--width", "16", "--test-size", "96", "72", "--crop-size", "64", "--device", "cpu"]
    words += ["--num-workers", "0", "--steps", "5", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["epochs"] == 3  # of 2 steps each
    task = load(tmp_path / "run")
    assert (task.spec.classes, task.spec.labels[-1]) == (("0", "1", "2", "3", "255"), 255)
    (found,) = task.predict([scenes / "images" / "val" / "0000.jpg"])
    assert {*np.unique(np.asarray(task.spec.format.write(found.label_map.numpy())))} <= {0, 1, 2, 3, 255}
    capsys.readouterr()
    (scenes / "masks" / "train" / "0000.png").unlink()
    assert main([*words, "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no mask for image" in error
    assert load(tmp_path / "run").spec == task.spec  # nothing is lost


def test_bad_options_are_refused(scenes):
    config = SegmentationConfig(data=str(scenes), **SEGMENTER, monitor="accuracy")
    with pytest.raises(InputError, match="--monitor must be one of mIoU"):
        Segmentation.from_config(config, load_masks(config))
    with pytest.raises(InputError, match="takes the smaller value first"):
        SegmentationConfig(scale=(2.0, 0.5))
    with pytest.raises(InputError, match="longer side first"):
        SegmentationConfig(test_size=(512, 2048))


def test_report_shows_the_worst_images(run, scenes, tmp_path):
    folder, result = run
    images = load_masks(SegmentationConfig(data=str(scenes)), 0).val
    worst = result.mistakes(images, 2)
    assert [each.image for each in worst] == [name for name, *_ in sorted(result.records, key=lambda r: r[1])[:2]]
    assert main(["report", str(folder.path), "--out", str(tmp_path / "r.html"), "--num-workers", "0"]) == 0
    page = (tmp_path / "r.html").read_text()
    assert all(text in page for text in ("IoU", "triangle", "Confusion", worst[0].text, "Speed"))
