import contextlib
import io
import math
import multiprocessing
import socket

import numpy as np
import pytest
import torch
from torch import distributed

from vision_ssm.data.rle import decode_masks, encode_masks
from vision_ssm.tasks.coco_metric import RECALLS, CocoMetric

TWELVE = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
HEIGHT, WIDTH = 160, 200


def boxes(rng, count):
    sides = np.exp(rng.uniform(np.log(8), np.log(150), (count, 1)) + rng.normal(0, 0.1, (count, 2))).clip(8, 150)
    corner = rng.uniform(0, 1, (count, 2)) * (np.array([WIDTH, HEIGHT]) - sides)
    return np.concatenate([corner, corner + sides], 1).astype(np.float32)


def masks(boxes):
    """Ellipses."""
    x1, y1, x2, y2 = boxes.T[:, :, None, None]
    ys, xs = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return encode_masks((((2 * xs - x1 - x2) / (x2 - x1)) ** 2 + ((2 * ys - y1 - y2) / (y2 - y1)) ** 2) <= 1)


def scene(rng, classes=4):
    """Objects, some of them crowds, and detections near them and elsewhere; an image in six has none of either."""
    truth = boxes(rng, rng.integers(1, 12) if rng.random() < 5 / 6 else 0)
    moved = truth + rng.normal(0, 0.05, truth.shape) * (truth[:, 2:] - truth[:, :2]).repeat(2, 1)
    found = np.concatenate([np.float32(moved), truth[:3], boxes(rng, rng.integers(0, 9))])
    found = np.concatenate([found] * 15) if rng.random() < 0.2 else found  # more than a hundred
    found = found[rng.random(len(found)) < (rng.random() < 5 / 6)]
    labels = rng.integers(0, classes - 1, len(truth))  # the last class has no objects
    guesses = np.resize(labels, len(found)) if len(labels) else np.zeros(len(found), np.int64)
    guesses = np.where(rng.random(len(found)) < 0.8, guesses, rng.integers(0, classes, len(found)))
    prediction = {"boxes": found, "labels": guesses, "scores": rng.random(len(found)), "masks": masks(found)}
    target = {"boxes": truth, "labels": labels, "crowd": rng.random(len(truth)) < 0.15, "masks": masks(truth)}
    target["area"] = rng.uniform(0.5, 0.9, len(truth)) * np.prod(truth[:, 2:] - truth[:, :2], 1)
    return prediction, target


SCENES = [scene(np.random.default_rng(number)) for number in range(24)]


def measure(scenes, classes=4, **options):
    metric = CocoMetric(classes, **options)
    for start in range(0, len(scenes), 5):
        metric.update(*zip(*scenes[start : start + 5], strict=True))
    return metric.compute()


def pycocotools(scenes, kind, classes=4):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = COCO(), []
    content = {"images": [], "annotations": [], "categories": [{"id": 5 + i, "name": str(i)} for i in range(classes)]}
    for number, (prediction, target) in enumerate(scenes, start=1):
        content["images"].append({"id": number, "height": HEIGHT, "width": WIDTH})
        for each, into in ((prediction, found), (target, content["annotations"])):
            for i, (x1, y1, x2, y2) in enumerate(each["boxes"].astype(np.float64).tolist()):
                entry = {"image_id": number, "category_id": 5 + int(each["labels"][i]), "id": len(into) + 1}
                if kind == "segm":
                    entry["segmentation"] = each["masks"][i]
                if kind == "bbox" or each is target:
                    entry["bbox"] = [x1, y1, x2 - x1, y2 - y1]
                if each is target:
                    entry |= {"iscrowd": int(each["crowd"][i]), "area": float(each["area"][i])}
                else:
                    entry["score"] = float(each["scores"][i])
                into.append(entry)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.dataset = content
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_agrees_with_pycocotools(kind, capsys):
    results, expected = measure(SCENES), pycocotools(SCENES, kind)
    assert not any(capsys.readouterr())
    figures = results.boxes if kind == "bbox" else results.masks
    np.testing.assert_allclose([getattr(figures, name) for name in TWELVE], expected.stats, rtol=0, atol=1e-12)
    assert figures.APl > 0
    assert 0.1 < figures.APs < figures.AP50 < 0.95
    precision = expected.eval["precision"][..., 0, 2]  # (thresholds, recalls, classes)
    np.testing.assert_allclose(figures.class_AP[:3], precision[:, :, :3].mean((0, 1)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(figures.class_AP50[:3], precision[0, :, :3].mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(figures.precision[:3], precision[0, :, :3].T, rtol=0, atol=1e-12)
    assert figures.curve.shape == RECALLS.shape
    assert figures.curve.mean() == pytest.approx(figures.AP50)
    assert math.isnan(figures.class_AP[3])
    assert math.isnan(figures.precision[3, 0])
    crowds = sum(int(target["crowd"].sum()) for _, target in SCENES)
    assert results.images == len(SCENES)
    assert sum(results.objects) == sum(len(target["boxes"]) for _, target in SCENES) - crowds
    assert results.objects[3] == 0 < crowds


OBJECT = {"boxes": [[10, 10, 60, 60]], "labels": [0]}


def found(*scored, box=(10, 10, 60, 60)):
    return {"boxes": [list(box)] * len(scored), "labels": [label for label, _ in scored],
            "scores": [score for _, score in scored]}  # fmt: skip


def test_hand_computed_cases():
    def figures(prediction, **target):
        return measure([(prediction, {**OBJECT, **target})], classes=2).boxes

    assert figures(found((0, 0.9))).AP == figures(found((0, 0.9))).AR1 == 1
    assert figures(found((0, 0.9))).APm == 1
    assert math.isnan(figures(found((0, 0.9))).APs)  # no small objects
    assert figures(found((0, 0.9)), area=[100.0]).APs == 1
    assert figures(found((0, 0.9), (0, 0.8))).AP == 1  # a duplicate after it costs nothing
    assert figures(found((1, 0.9))).AP == 0
    partly = figures(found((0, 0.9), box=(10, 10, 60, 45)))  # an overlap of 0.7, so five of ten thresholds
    assert (round(partly.AP, 9), partly.AP50, partly.AP75) == (0.5, 1, 0)
    assert figures(found()).AP == 0
    wrong_first = found((0, 0.9), (0, 0.8))
    wrong_first["boxes"][0] = [100, 100, 120, 120]
    assert figures(wrong_first).AP == 0.5


def test_crowds_are_no_objects_and_take_what_lies_on_them():
    target = {"boxes": [[10, 10, 60, 60], [100, 0, 180, 150]], "labels": [0, 0], "crowd": [False, True]}
    prediction = {"boxes": [[110, 10, 130, 30], [120, 40, 150, 70], [10, 10, 60, 60]], "labels": [0] * 3,
                  "scores": [0.9, 0.8, 0.7]}  # fmt: skip
    results = measure([(prediction, target)], classes=1)
    assert results.boxes.AP == 1
    assert results.objects.tolist() == [1]
    assert measure([(prediction, {**target, "crowd": [False, False]})], classes=1).boxes.AP < 0.3


NONE = {"boxes": [], "labels": []}


@pytest.mark.filterwarnings("ignore:.*called before the ``update`` method")
@pytest.mark.parametrize(
    "scenes",
    [[], [({**NONE, "scores": []}, NONE)], [(found((0, 0.5)), NONE)]],
    ids=["no images", "nothing in them", "no objects"],
)
def test_without_objects_nothing_is_defined(scenes):
    results = measure(scenes, classes=2)
    assert all(math.isnan(getattr(results.boxes, name)) for name in TWELVE)
    assert np.isnan(results.boxes.curve).all()
    assert results.masks is None
    assert results.objects.tolist() == [0, 0]


def test_tensors_of_any_type_are_taken_and_order_does_not_matter():
    as_tensors = [
        tuple({k: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for k, v in each.items()} for each in scene)
        for scene in reversed(SCENES)
    ]
    assert_equal(measure(as_tensors), measure(SCENES))
    half = found((0, 0.9)) | {"boxes": torch.tensor([[10.0, 10, 60, 60]], dtype=torch.bfloat16)}
    assert measure([(half, OBJECT)], classes=1).boxes.AP == 1


def test_masks_are_encoded_and_decoded():
    some = np.random.default_rng(0).random((3, 20, 30)) < 0.3
    assert np.array_equal(decode_masks(encode_masks(some), 20, 30), some)
    assert encode_masks(some[:0]) == []
    assert decode_masks([], 20, 30).shape == (0, 20, 30)


def assert_equal(one, other):
    for a, b in ((one.boxes, other.boxes), (one.masks, other.masks)):
        for name in (*TWELVE, "class_AP", "class_AP50", "precision"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)
    assert one.objects.tolist() == other.objects.tolist()


def share(rank, port, parts, queue):
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    queue.put((rank, [measure(part[rank]) for part in parts]))
    distributed.destroy_process_group()


def test_two_processes_measure_as_one():
    """One of them without any image, too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    parts = [(SCENES[::2], SCENES[1::2]), ([], SCENES)]
    both = [context.Process(target=share, args=(rank, port, parts, queue)) for rank in (0, 1)]
    for process in both:
        process.start()
    results = dict(queue.get(timeout=60) for _ in both)
    for process in both:
        process.join()
    for rank in (0, 1):
        for result in results[rank]:
            assert_equal(result, measure(SCENES))
