"""The published detectors: their goldens, their weights under our names, and their training data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from timm.models import FeatureInfo
from torch import Tensor, nn

import goldens
from goldens import fill_dense
from vision_ssm.checkpoints.detectors import RETINANET, TWO_STAGE, UPERNET
from vision_ssm.checkpoints.rules import convert


def ours(key: str, pyramid_levels: int = 5) -> str:
    """Return our name of a published tensor; RetinaNet's pyramid makes two of its levels from others."""
    rules = UPERNET if "decode" in key or "auxiliary" in key else RETINANET if pyramid_levels == 3 else TWO_STAGE
    return next(iter(convert(rules, {key: torch.empty(0)})))


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


class GivenMaps(nn.Module):
    """A backbone that returns what it is told to."""

    def __init__(self, widths: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        info = [dict(num_chs=c, reduction=s, module="") for c, s in zip(widths, strides, strict=True)]
        self.feature_info = FeatureInfo(info, tuple(range(len(info))))
        self.maps: list[Tensor] = []

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.maps


class Published:
    """A golden file of a detector: ``facts``, ``arrays``, and inputs that follow from names."""

    def __init__(self, name: str) -> None:
        golden = goldens.load(name)
        self.facts, self.arrays = golden.facts, golden.arrays
        self.inputs = SimpleNamespace(**self.facts["inputs"])
        self.pyramid_levels = 3 if name == "retinanet" else 5
        if name == "upernet":
            return
        self.sizes = torch.tensor(self.inputs.img_shapes)
        self.original_sizes = torch.tensor(self.inputs.ori_shapes)
        self.small_object = name == "maskrcnn"  # the third object of an image; RetinaNet's golden has it whole
        self.images = torch.zeros(2, 3, *self.inputs.batch_input_shape)

    def state(self, scales: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        state = fill_dense.state(self.facts["keys"], 0, self.facts["scales"] if scales is None else scales)
        return {ours(key, self.pyramid_levels): tensor(value) for key, value in state.items()}

    def maps(self, name: str, widths: Sequence[int], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        both = enumerate(zip(widths, sizes, strict=True))
        return [tensor(fill_dense.noise(f"{name}{i}", (2, width, *size))) for i, (width, size) in both]

    def features(self) -> list[Tensor]:
        sizes = getattr(self.inputs, "feature_sizes", self.inputs.level_sizes[:4])
        return self.maps("feature", self.inputs.channels, sizes)

    def pyramid(self) -> list[Tensor]:
        return self.maps("pyramid", [256] * 5, self.inputs.level_sizes)

    def targets(self, case: str) -> list[dict[str, Tensor]]:
        """Return the objects of a training case."""
        targets = []
        for b, (h, w) in enumerate(self.inputs.img_shapes):
            count = self.facts["losses"][case]["ground_truth"][b]
            boxes = fill_dense.boxes(f"gt_boxes{b}", count, h, w, smallest=12)
            if count > 2:
                boxes[1] = np.clip(boxes[0] + np.float32([4, -3, 6, 2]), 0, np.float32([w, h, w, h]))
                if self.small_object:
                    boxes[2, 2:] = boxes[2, :2] + np.float32([9, 7])
            labels = fill_dense.labels(f"gt_labels{b}", (count,), 80)
            masks = fill_dense.ellipses(boxes, h, w)
            targets.append(dict(boxes=tensor(boxes), labels=tensor(labels), masks=tensor(masks)))
        return targets

    def proposals(self, case: str) -> list[Tensor]:
        """Return the proposals of a training case."""
        proposals = []
        for b, ((h, w), target) in enumerate(zip(self.inputs.img_shapes, self.targets(case), strict=True)):
            own = fill_dense.near(f"train_near{b}", target["boxes"].numpy(), 6, h, w) if len(target["boxes"]) else []
            others = fill_dense.boxes(f"train_proposals{b}", 40, h, w, smallest=12)
            proposals.append(tensor(np.concatenate([*([own] if len(own) else []), others])))
        return proposals

    def assert_map(self, key: str, x: Tensor, channels: int = 8, side: int = 4, rtol: float = 1e-5) -> None:
        """Compare a map with the numbers that were kept of it."""
        x = x.detach()
        assert tuple(x.shape) == tuple(self.arrays[f"{key}.shape"])
        wide = x.double()
        found = {
            "slice": x[:, :channels, :side, :side],
            "last": x[0, :64, -1, -1],
            "stat": torch.stack([wide.mean(), wide.std(), wide.abs().mean()]),
        }
        for part, value in found.items():
            self.assert_close(f"{key}.{part}", value, 2e-5, rtol)

    def assert_close(self, key: str, x: Tensor, atol: float, rtol: float = 0.0) -> None:
        np.testing.assert_allclose(x.detach().numpy(), self.arrays[key], rtol=rtol, atol=atol, err_msg=key)

    def assert_equal(self, key: str, x: Tensor) -> None:
        np.testing.assert_array_equal(x.detach().numpy(), self.arrays[key], err_msg=key)

    def assert_anchors(self, anchors: Sequence[Tensor], per_place: int) -> None:
        assert len(anchors) == 5
        for i, level in enumerate(anchors):
            self.assert_equal(f"anchors{i}.base", level[:per_place])
            self.assert_equal(f"anchors{i}.every37", level[::37])
            self.assert_equal(f"anchors{i}.last", level[-1])
            assert list(level.shape) == list(self.arrays[f"anchors{i}.shape"])

    def assert_gradients(self, case: str, model: nn.Module, features: Sequence[Tensor], prefix: str = "train") -> None:
        """Compare the norms of all gradients of neck and heads, and of those of the features."""
        gradients = dict(model.named_parameters())
        names = [ours(name, self.pyramid_levels) for name in self.facts["grad_names"]]
        assert set(names) == {name for name in gradients if not name.startswith("backbone")}
        # In float32, as the published ones: their summation error is 7e-4 for the largest weight.
        norms = torch.stack([gradients[name].grad.float().norm() for name in names])
        self.assert_norms(f"{prefix}.{case}.grad_norms", norms)
        feature_norms = [torch.zeros(()) if x.grad is None else x.grad.float().norm() for x in features]
        self.assert_norms(f"{prefix}.{case}.feature_grad_norms", torch.stack(feature_norms))

    def assert_norms(self, key: str, norms: Tensor) -> None:
        kept = self.arrays[key]
        compared = kept > 1e-4  # below, a norm is rounding noise
        np.testing.assert_allclose(norms.numpy()[compared], kept[compared], rtol=1e-4, err_msg=key)
        assert (norms.numpy()[~compared] < 2e-4).all()
