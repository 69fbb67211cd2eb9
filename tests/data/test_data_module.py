import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vision_ssm.data import EpochSampler, load_digits, seeded
from vision_ssm.data.module import ImageData
from vision_ssm.data.sampling import TrainingSamples
from vision_ssm.errors import InputError
from vision_ssm.recipes import digits, small
from vision_ssm.recipes.config import AugmentConfig
from vision_ssm.tasks.classification import Classification, ClassifierSpec, OnImage

SPLITS = load_digits()
SPEC = ClassifierSpec.from_config(digits(), SPLITS.train.classes)


def module(batch_size=64, workers=0):
    augment = AugmentConfig(auto_augment="rand-m9-mstd0.5", random_erase=0.5)
    transforms = OnImage(SPEC.train_transform(augment)), OnImage(SPEC.eval_transform())
    return ImageData(SPLITS, *transforms, digits(batch_size=batch_size, num_workers=workers))


def test_seeded_draws_depend_on_the_key_alone_and_leave_no_trace():
    # ruff: noqa: NPY002 (timm draws from NumPy's global generator)
    def draw(*key):
        with seeded(*key):
            return random.random(), np.random.rand(), torch.rand(1).item()

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first, other = draw(1, 2), draw(2, 1)
    torch.rand(3)
    torch.set_rng_state(before[2])
    assert draw(1, 2) == first != other
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_order_is_a_function_of_the_epoch_and_can_start_inside():
    ten = SPLITS.val.subset(range(10))
    sampler = EpochSampler(ten, seed=3)
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert sorted(index for _, index in orders[0]) == list(range(10))
    assert [i for _, i in orders[0]] != [i for _, i in orders[1]]
    resumed = EpochSampler(ten, seed=3, epoch=1, start=4)
    assert list(resumed) == orders[1][4:]
    resumed.set_epoch(0)
    assert list(resumed) == orders[0]


def test_processes_share_the_images():
    def seen(rank, batches_done=0):
        data = module()
        data.trainer = SimpleNamespace(global_rank=rank, world_size=3)
        data._batches_done = batches_done
        train, val = data.train_dataloader(), data.val_dataloader()
        assert len(train) == data.batches_per_epoch == 8  # the last one smaller
        return [index for _, index in train.sampler], list(val.sampler)

    parts = [seen(rank) for rank in range(3)]
    used = [i for train, _ in parts for i in train]
    assert len(used) == len(set(used)) == 478 * 3
    assert sorted(i for _, val in parts for i in val) == list(range(360))
    assert seen(1, batches_done=2)[0] == parts[1][0][128:]


def test_augmentation_does_not_depend_on_workers_and_leaves_the_global_generators_alone():
    def first_batches(workers):
        batches = iter(module(workers=workers).train_dataloader())
        return [next(batches) for _ in range(3)]

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for alone, spread in zip(first_batches(0), first_batches(2), strict=True):
        assert torch.equal(alone["image"], spread["image"])
        assert torch.equal(alone["label"], spread["label"])
        assert alone["id"] == spread["id"]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_augmentation_changes_with_the_epoch():
    data = TrainingSamples(SPLITS.train, OnImage(SPEC.train_transform(AugmentConfig())), seed=0)
    first, again, later = (sample["image"] for sample in data.__getitems__([(0, 5), (0, 5), (1, 5)]))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def test_step_larger_than_the_data():
    with pytest.raises(InputError, match="--batch-size 64 times --grad-accum 40 is larger than the 1437"):
        ImageData(SPLITS, dict, dict, digits(grad_accum=40))
    assert ImageData(SPLITS, dict, dict, digits(batch_size=2000)).images_per_epoch == 1436


def test_training_decodes_large_photographs_as_small_as_its_crops_allow(tmp_path):
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (640, 480)).save(tmp_path / place / "x.jpg")
    # The smallest crop is half of the area, and keeps at least as many pixels as the input of the network has.
    for size, sides in ((24, (80, 60)), (64, (160, 120)), (130, (320, 240)), (400, (640, 480))):
        config = small(data=str(tmp_path), img_size=size)
        splits = Classification.load_data(config)
        Classification.from_config(config, splits)
        assert splits.train.sample(0)["image"].size == sides
        assert splits.val.sample(0)["image"].size == (640, 480)
