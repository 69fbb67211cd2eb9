import dataclasses
import functools

import numpy as np
import pytest
from PIL import Image

from short_runs import SHORT, interrupt
from vision_ssm.recipes import Augmentation, Optimisation, small


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Red, green and blue noise, 20 images each."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir()
        for i in range(20):
            pixels = generator.integers(0, 120, (32, 32, 3))
            pixels[..., channel] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def config(images):
    """A run of a few seconds in which everything draws at random."""
    return dataclasses.replace(
        small(images),
        **SHORT | dict(epochs=3, batch_size=8, optim=Optimisation(lr=3e-3, warmup_epochs=1, ema=0.8)),
        drop_path=0.2,
        augment=Augmentation(mixup=0.5, cutmix=0.5, auto_augment="rand-m5"),
    )


@pytest.fixture
def stop_at(monkeypatch):
    """Press Ctrl-C while a batch is trained on."""
    return functools.partial(interrupt, monkeypatch)
