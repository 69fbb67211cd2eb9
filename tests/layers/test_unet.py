"""The U-Net of docs/layers.md learns, on images of any size."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from test_docs import ROOT, run_blocks


def test_the_documented_unet_learns_on_random_sizes(tmp_path: Path) -> None:
    page = ROOT / "docs" / "layers.md"
    model = run_blocks(page.read_text(encoding="utf-8"), str(page))["UNet"]()  # type: ignore[operator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        height, width = torch.randint(17, 40, (2,)).tolist()
        image = torch.randn(2, 3, height, width)
        # a pixel's class: is its smoothed first color positive?
        target = (F.avg_pool2d(image[:, :1], 3, stride=1, padding=1)[:, 0] > 0).long()
        logits = model(image)
        assert logits.shape == (2, 2, height, width)
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
