"""What the published code computed, and the weights and images it was given.

Every ``<name>.json`` and ``<name>.npz`` holds outputs of a published implementation (repository and commit in the
json) in float32 on a CPU. Weights and images are not stored: they follow from the names, see ``fill.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from goldens import fill

FOLDER = Path(__file__).parent


def names(pattern: str) -> list[str]:
    return sorted(path.stem for path in FOLDER.glob(f"{pattern}.json"))


@dataclass(frozen=True)
class Golden:
    """One golden file: ``facts`` is its json, ``arrays`` its npz."""

    name: str
    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def runs(self) -> list[str]:
        """Runs that have logits, by name: ``<anything><height>x<width>``, or one number for a square."""
        return [key.removesuffix(".logits") for key in self.arrays if key.endswith(".logits")]

    def state_dict(self, *more: str) -> dict[str, Tensor]:
        """Weights under the published names, with the entries of further lists in the json."""
        entries = self.facts["state_dict"] + [entry for key in more for entry in self.facts[key]]
        return {key: torch.from_numpy(np.array(fill.value(key, tuple(shape)))) for key, shape in entries}

    def image(self, run: str) -> Tensor:
        height, width = ([int(n) for n in run.lstrip("abcdefghijklmnopqrstuvwyz").split("x")] * 2)[:2]
        batch = next((len(value) for key, value in self.arrays.items() if key.startswith(f"{run}.") and value.ndim > 1))
        return torch.from_numpy(fill.image(batch, height, width))

    def assert_map(self, key: str, x: Tensor, tolerance: float) -> None:
        """Compare a map, (B, C, H, W), with the numbers kept of it; ``tolerance`` is relative to the largest."""
        kept = {part: self.arrays[f"{key}.{part}"] for part in ("shape", "slice", "last", "stat")}
        tolerance *= max(np.abs(kept["slice"]).max(), np.abs(kept["last"]).max())
        assert tuple(x.shape) == tuple(kept["shape"])
        wide = x.detach().double()
        stat = torch.stack([wide.mean(), wide.std(), wide.abs().mean()]).numpy()
        np.testing.assert_allclose(x[:, :8, :4, :4].detach(), kept["slice"], rtol=0, atol=tolerance, err_msg=key)
        np.testing.assert_allclose(x[0, :, -1, -1].detach(), kept["last"], rtol=0, atol=tolerance, err_msg=key)
        np.testing.assert_allclose(stat, kept["stat"], rtol=0, atol=tolerance, err_msg=key)


def load(name: str) -> Golden:
    facts = json.loads((FOLDER / f"{name}.json").read_text())
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return Golden(name, facts, dict(arrays))


def published_names(convert: Callable[[dict[str, Tensor]], dict[str, Tensor]], golden: Golden) -> dict[str, str]:
    """Return the published name of each of our tensors: tensors that hold their own number go through ``convert``."""
    keys = [key for key, _ in golden.facts["state_dict"]]
    tags = {key: torch.full(shape, float(i)) for i, (key, shape) in enumerate(golden.facts["state_dict"])}
    found = convert(tags)
    assert all(bool((tag == tag.flatten()[0]).all()) for tag in found.values()), "a tensor of ours mixes several"
    return {ours: keys[int(tag.flatten()[0])] for ours, tag in found.items()}


def in_published_layout(
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]], golden: Golden, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Bring tensors with our names and shapes, such as gradients, to the published ones.

    Also where a tensor of ours holds several of theirs: ``convert`` is given tensors that number their elements.
    """
    shapes = {key: tuple(shape) for key, shape in golden.facts["state_dict"]}
    sizes = [math.prod(shape) for shape in shapes.values()]
    numbers = torch.arange(sum(sizes), dtype=torch.float64)
    places = convert({k: part.view(shapes[k]) for k, part in zip(shapes, numbers.split(sizes), strict=True)})
    flat = torch.full_like(numbers, math.nan)
    for name, tensor in tensors.items():
        flat[places[name].long()] = tensor.detach().double()
    return {key: part.view(shapes[key]) for key, part in zip(shapes, flat.split(sizes), strict=True)}
