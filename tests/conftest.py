"""Shared by all tests. Its place puts this folder on the import path, so that ``import goldens`` works."""

from __future__ import annotations

import functools
import os

import numpy as np
import pytest
import torch
from PIL import Image

# Without a GPU, the Triton kernels are interpreted. Must be set before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tests are small: several threads gain little on them, and lose much where the machine is shared.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)
    os.environ.pop("COLUMNS", None)  # that of pytest's own terminal would break lines of tables


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
def stop_at(monkeypatch):
    """Press Ctrl-C while a batch is trained on."""
    from short_runs import interrupt

    return functools.partial(interrupt, monkeypatch)
