"""Shared by all tests. Its place puts this folder on the import path, so that ``import goldens`` works."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
