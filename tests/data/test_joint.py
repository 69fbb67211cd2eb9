import marshal
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision import tv_tensors

from scenes import write_scenes
from vision_ssm.data import seeded
from vision_ssm.data.coco import load_coco
from vision_ssm.data.joint import Crop, Fit, collate, eval_transform, train_transform
from vision_ssm.data.module import ImageData
from vision_ssm.data.resize import resize
from vision_ssm.data.rle import decode_masks
from vision_ssm.recipes.config import DataConfig, TrainConfig

PIXELS = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
UNCHANGED = dict(mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3)  # leaves values from 0 to 255


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return load_coco(DataConfig(data=str(write_scenes(tmp_path_factory.mktemp("scenes")))))


def train(**options):
    defaults = dict(short_sides=(80, 100, 130), long_side=300, crop=False, jitter=None, jitter_size=64, hflip=0.5)
    return train_transform(**{**UNCHANGED, "masks": True, **defaults, **options})


def draws(transform, sample, count=40):
    for number in range(count):
        with seeded(number):
            yield transform(sample)


def filled(height=90, width=150):
    """A black image with one white rectangle whose box, mask and pixels are the same."""
    image = Image.new("RGB", (width, height))
    x1, y1, x2, y2 = box = 30, 20, 60, 50
    ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), fill="white")
    polygon = [x1, y1, x2, y1, x2, y2, x1, y2]
    return {
        "image": image, "id": "a", "original_size": np.array([height, width]),
        "boxes": np.array([box, (5, 5, 9, 9)], np.float32), "labels": np.array([1, 0]),
        "crowd": np.array([False, True]), "area": np.array([900.0, 16.0]),
        "masks": np.frombuffer(marshal.dumps([[polygon], [[5, 5, 9, 5, 9, 9]]], 2), np.uint8),
    }  # fmt: skip


WAYS = {"resize": {}, "crop": {"crop": True}, "jitter": {"jitter": (0.1, 2.0)}}


@pytest.mark.parametrize("way", WAYS)
def test_boxes_and_masks_stay_on_their_objects(way):
    """The pixels say where the object is."""
    gone, flipped, sizes = 0, 0, set()
    for sample in draws(train(**WAYS[way]), filled()):
        sizes.add(sample["size"])
        height, width = sample["size"]
        assert sample["image"].shape == (3, height, width)
        assert sample["original_size"] == (90, 150)
        boxes, masks = sample["boxes"], sample["masks"]
        assert boxes.dtype == torch.float32
        assert len(boxes) == len(masks) == len(sample["labels"]) <= 1  # the crowd is gone
        bright = sample["image"][0] > 127
        if not len(boxes):
            gone += 1
            assert bright.sum() < 0.02 * bright.numel()
            continue
        assert sample["labels"].tolist() == [1]
        x1, y1, x2, y2 = boxes[0].tolist()
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        if bright.any():
            ys, xs = bright.nonzero().T
            inside = [xs.min() - x1, ys.min() - y1, x2 - xs.max() - 1, y2 - ys.max() - 1]
            assert max(map(abs, map(float, inside))) <= 1.5 + max(height, width) / 90
        assert (masks[0] != bright).sum() <= 0.06 * bright.numel()
        flipped += (x1 + x2) / 2 > width / 2
    assert 5 < flipped < 35
    assert len(sizes) == 3 if way == "resize" else len(sizes) > 5
    assert (gone > 0) == (way == "crop")


def test_sizes_are_the_published_ones(splits):
    """Of the training of 12 epochs, and of the two ways of that of 36."""
    sample = filled(427, 640)
    once = train(short_sides=range(480, 801, 32), long_side=1333, masks=False)
    shorts = {min(item["size"]) for item in draws(once, sample, 16)}
    assert shorts <= set(range(480, 801, 32))
    assert len(shorts) > 5
    assert {item["size"] for item in draws(train(short_sides=[800], long_side=1333, masks=False), sample, 2)} == {
        (800, 1199)
    }
    assert all("masks" not in item for item in draws(once, sample, 1))
    twice = train(short_sides=range(480, 801, 32), long_side=1333, crop=True, masks=False)
    ratios = [max(size) / min(size) for item in draws(twice, sample, 16) for size in [item["size"]]]
    assert 3 < sum(abs(ratio - 640 / 427) < 0.01 for ratio in ratios) < 13
    jittered = [item["size"] for item in draws(train(jitter=(0.1, 2.0), jitter_size=256, masks=False), sample)]
    assert max(max(size) for size in jittered) == 256
    assert 20 < min(max(size) for size in jittered) < 100


def test_crops_have_sides_within_the_limits_of_the_image():
    crop = Crop(40, 60)
    image = Fit([(500, 50)])  # 50 by 75
    some = image(tv_tensors.Image(torch.zeros(3, 80, 120, dtype=torch.uint8)))
    assert some.shape == (3, 50, 75)
    sizes = {tuple(crop(some).shape[1:]) for _ in range(300)}
    assert {size[0] for size in sizes} == set(range(40, 51))
    assert {size[1] for size in sizes} == set(range(40, 61))
    assert crop(torch.zeros(3, 30, 33).as_subclass(tv_tensors.Image)).shape == (3, 30, 33)


def test_images_are_resized_as_opencv_does_and_boxes_by_both_factors():
    sample = {**filled(), "image": Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8))}
    (item,) = draws(train(short_sides=[77], hflip=0.0), sample, 1)
    assert item["size"] == (77, 128)
    expected = resize(np.asarray(sample["image"]), (77, 128))
    assert np.array_equal(item["image"].permute(1, 2, 0), expected)
    factors = np.array([128 / 150, 77 / 90] * 2, np.float32)
    np.testing.assert_allclose(item["boxes"], sample["boxes"][:1] * factors, rtol=1e-6)
    rows, columns = np.arange(77) * 90 // 77, np.arange(128) * 150 // 128
    mask = np.zeros((90, 150), bool)
    mask[20:50, 30:60] = True
    assert np.array_equal(item["masks"][0], mask[rows][:, columns])


def test_transforms_can_be_sent_to_workers_and_repeat_with_their_seed(splits):
    for transform in (train(**WAYS["crop"]), train(**WAYS["jitter"]), eval_transform(**PIXELS, test_size=(150, 100))):
        again = pickle.loads(pickle.dumps(transform))
        for key in range(3):
            (one,), (other,) = (draws(each, splits.train.sample(key), 1) for each in (transform, again))
            assert torch.equal(one["image"], other["image"])
            assert np.array_equal(one["boxes"], other["boxes"])


def test_evaluation_keeps_what_it_is_measured_on(splits):
    sample = splits.val.sample(1)
    item = eval_transform(**PIXELS, test_size=(150, 100))(sample)
    assert item["size"] == tuple(item["image"].shape[1:]) == (133, 100)
    assert item["original_size"] == (128, 96)
    for name in ("boxes", "labels", "crowd", "area"):
        assert item[name] is sample[name]
    assert item["crowd"].any()
    for box, mask in zip(item["boxes"], decode_masks(item["masks"], 128, 96), strict=True):
        ys, xs = mask.nonzero()
        np.testing.assert_allclose([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], box, atol=1.5)
    alone = eval_transform(**PIXELS, test_size=(150, 100))({"image": sample["image"], "id": "x"})
    assert alone.keys() == {"image", "id", "size", "original_size"}


def test_batches_are_padded_at_the_right_and_bottom(splits):
    samples = list(draws(train(), splits.train.sample(0), 2)) + list(draws(train(), splits.train.sample(1), 1))
    batch = collate(samples)
    height, width = batch["image"].shape[2:]
    assert height == 32 * math.ceil(max(sample["size"][0] for sample in samples) / 32)
    assert width == 32 * math.ceil(max(sample["size"][1] for sample in samples) / 32)
    assert batch["size"].tolist() == [list(sample["size"]) for sample in samples]
    assert batch["original_size"].tolist() == [[96, 128], [96, 128], [128, 96]]
    for image, target, sample in zip(batch["image"], batch["targets"], samples, strict=True):
        h, w = sample["size"]
        assert torch.equal(image[:, :h, :w], sample["image"])
        assert not image[:, h:].any()
        assert not image[:, :, w:].any()
        assert target["masks"].shape == (len(sample["boxes"]), height, width)
        assert torch.equal(target["masks"][:, :h, :w], sample["masks"])
        assert target.keys() == {"boxes", "labels", "masks"}
    assert collate(samples, divisor=1)["image"].shape[2] == max(sample["size"][0] for sample in samples)


def test_the_data_module_gives_equal_batches_with_workers(splits):
    def batches(workers):
        config = TrainConfig(batch_size=4, num_workers=workers)
        data = ImageData(splits, train(), eval_transform(**PIXELS, test_size=(150, 100)), config, collate, 1)
        return [*data.train_dataloader(), *data.val_dataloader()]

    for one, other in zip(batches(0), batches(1), strict=True):
        assert one["id"] == other["id"]
        assert torch.equal(one["image"], other["image"])
        for target, same in zip(one["targets"], other["targets"], strict=True):
            assert np.array_equal(target["boxes"], same["boxes"])
            assert len(target["masks"]) == len(same["masks"])


def test_an_image_without_objects_goes_through():
    sample = filled()
    sample["crowd"] = np.array([True, True])
    for way in WAYS.values():
        for item in draws(train(**way), sample, 3):
            assert item["boxes"].shape == (0, 4)
            assert item["labels"].shape == (0,)
            assert item["masks"].shape == (0, *item["size"])
