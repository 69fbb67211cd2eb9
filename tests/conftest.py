"""Shared by all tests. Its place puts this folder on the import path, so that ``import goldens`` works."""

from __future__ import annotations

import os

import pytest
import torch

# Without a GPU, the Triton kernels are interpreted. Must be set before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tests are small: several threads gain little on them, and lose much where the machine is shared.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
