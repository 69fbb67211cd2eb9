"""Switch of Scans: every image takes the scan paths that a router chooses for it.

Source: the name and purpose are from the abstract of MambaMixer's second version (arXiv 2403.19888v2): "dynamically
uses a set of useful image scans to traverse image patches". Its definition was not available; router, choice and
balance term are ours, after the usual sparse mixture of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vision_ssm.scan import COLUMNS, ROWS, AntiDiagonal, Diagonal, ScanPath
from vision_ssm.scan.routes import as_paths

SCAN_POOL: tuple[ScanPath, ...] = (ROWS, COLUMNS, AntiDiagonal(), Diagonal())
"""Rows, columns and both diagonals; each is walked in both directions."""


class FixedScans(nn.Module):
    """The first ``k`` of several paths for every image, with equal weights; in place of :class:`SwitchOfScans`.

    Args:
        paths: The pool, of which the rest is dropped.
        k: Paths per image.
    """

    def __init__(self, paths: Sequence[ScanPath], k: int) -> None:
        super().__init__()
        self.paths, self.k = as_paths(paths)[:k], k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return indices, weights and no balance term for a map, (B, H, W, dim), as :class:`SwitchOfScans` does."""
        index, weight = _first(x, self.k)
        return index, weight, None


def _first(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the indices 0 to k - 1 and equal weights for every image, (B, k) both; one leaf of an FX graph."""
    index = torch.arange(k, device=x.device).expand(x.shape[0], -1)
    return index, torch.full_like(index, 1 / k, dtype=torch.float32)


torch.fx.wrap("_first")


class SwitchOfScans(nn.Module):
    """Choose ``k`` of several paths per image, and a weight for each.

    A linear layer of the image's mean token scores the paths. Evaluation takes the ``k`` best; training draws ``k``
    without replacement, with the probabilities of the softmax (Gumbel noise on the scores), and so needs torch's random
    state. The weights are the probabilities, for ``k`` > 1 divided by their sum: through them the router learns.

    Args:
        dim: Channels of the map.
        paths: The pool.
        k: Paths per image.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If the pool is empty, or ``k`` is not between 1 and its size.
    """

    def __init__(
        self,
        dim: int,
        paths: Sequence[ScanPath] = SCAN_POOL,
        k: int = 2,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.paths = as_paths(paths)
        if not 1 <= k <= len(paths):
            raise ValueError(f"k must be between 1 and {len(paths)}, the number of paths, got {k}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.k = k
        self.router = nn.Linear(dim, len(self.paths), **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with equal probabilities."""
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Choose paths for the images of a map, (B, H, W, dim).

        Returns:
            Indices into the pool, (B, k), their weights, (B, k), and in training the balance term of the batch, a
            scalar: the number of paths times the sum over paths of (share of the choices) x (mean probability). It is
            1 where all paths are used alike and grows up to the number of paths.
        """
        logits = self.router(x.mean((1, 2))).float()  # (B, paths)
        probabilities = logits.softmax(-1)
        if not self.training:
            index = logits.topk(self.k).indices
            return index, self._weights(probabilities, index), None
        noise = -torch.empty_like(logits).exponential_().log()
        index = (logits.detach() + noise).topk(self.k).indices
        share = nn.functional.one_hot(index, len(self.paths)).float().mean((0, 1))
        balance = len(self.paths) * (share * probabilities.mean(0)).sum()
        return index, self._weights(probabilities, index), balance

    def _weights(self, probabilities: Tensor, index: Tensor) -> Tensor:
        weight = probabilities.gather(1, index)
        # A single weight divided by itself would leave the router without a gradient.
        return weight if self.k == 1 else weight / weight.sum(-1, keepdim=True)
