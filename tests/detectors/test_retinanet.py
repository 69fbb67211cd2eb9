"""RetinaNet against what mmdet computed, stage by stage and as a whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from published import GivenMaps, Published, tensor

from goldens import fill_dense
from vision_ssm.detectors import Detections, RetinaNet, boxes, retinanet


@pytest.fixture(scope="module")
def golden() -> Published:
    return Published("retinanet")


@pytest.fixture
def model(golden: Published) -> RetinaNet:
    with torch.device("meta"):
        made = RetinaNet(GivenMaps(golden.inputs.channels[1:], (8, 16, 32)), 80)
    made.load_state_dict(golden.state(), assign=True)
    assert sum(p.numel() for p in made.parameters()) == golden.facts["params_of_neck_and_heads"]
    return made.requires_grad_(True).eval()


@torch.inference_mode()
def test_neck_agrees(golden: Published, model: RetinaNet) -> None:
    model.backbone.maps = golden.features()[1:]
    for i, x in enumerate(model.pyramid(golden.images)):
        golden.assert_map(f"neck.out{i}", x)


@torch.inference_mode()
def test_head_agrees(golden: Published, model: RetinaNet) -> None:
    for i, x in enumerate(golden.pyramid()):
        for name, y in zip(("logits", "deltas"), model.predict([x]), strict=True):
            y = y.unflatten(1, (*x.shape[-2:], 9)).permute(0, 3, 4, 1, 2).flatten(1, 2)
            golden.assert_map(f"head.{name}{i}", y, 24)


def test_anchors_are_equal(golden: Published, model: RetinaNet) -> None:
    golden.assert_anchors(model.anchors(golden.pyramid()), 9)


@pytest.mark.parametrize("rescaled", [False, True], ids=["plain", "rescaled"])
def test_detections_agree(golden: Published, model: RetinaNet, rescaled: bool) -> None:
    salt = golden.facts["salts"]["detections"]

    def noise(name: str, *shape: int) -> np.ndarray:
        return fill_dense.noise(f"{name}#{salt}", (2, *shape))

    logits, deltas = [], []
    for i, (h, w) in enumerate(golden.inputs.level_sizes):
        logit = (noise(f"retina_logits{i}", 720, h, w) * np.float32(1.2) - np.float32(6.2)).reshape(2, 9, 80, h, w)
        logit[:, :, [0, 20, 40, 60]] += np.float32(4.5) * (noise(f"retina_up{i}", 9, h, w) > 1.5)[:, :, None]
        delta = noise(f"retina_deltas{i}", 36, h, w) * np.float32(0.15)
        extreme = np.abs(noise(f"retina_extreme{i}", 36, h, w)) > 3
        delta = np.where(extreme, delta * np.float32(40), delta).reshape(2, 9, 4, h, w)
        logits.append(tensor(logit.transpose(0, 3, 4, 1, 2).reshape(2, -1, 80)))
        deltas.append(tensor(delta.transpose(0, 3, 4, 1, 2).reshape(2, -1, 4)))
    anchors = model.anchors(golden.pyramid())
    for b, size in enumerate(golden.inputs.img_shapes):
        original = golden.inputs.ori_shapes[b] if rescaled else size
        found = retinanet.select_boxes(anchors, torch.cat(logits, 1)[b], torch.cat(deltas, 1)[b], size, original)
        assert_detections(golden, f"detections.{'rescaled' if rescaled else 'plain'}{b}", found, 1e-3, 1e-6)


def test_matching_is_equal(golden: Published, model: RetinaNet) -> None:
    maps, facts = golden.pyramid(), golden.facts["losses"]["both"]
    anchors = torch.cat(model.anchors(maps))
    for b, (target, size) in enumerate(zip(golden.targets("both"), golden.inputs.img_shapes, strict=True)):
        usable = model.usable_anchors(maps, size)
        matched = boxes.match_boxes(anchors[usable], target["boxes"], 0.5, 0.4, 0.0)
        golden.assert_equal(f"train.both.pos{b}", (matched >= 0).nonzero().flatten())
        golden.assert_equal(f"train.both.pos_gt{b}", matched[matched >= 0])
        assert (matched == -1).sum() == facts["neg"][b]


@pytest.mark.parametrize("case", ["both", "one_empty", "empty"])
def test_losses_and_gradients_agree(golden: Published, model: RetinaNet, case: str) -> None:
    features = [x.requires_grad_() for x in golden.features()]
    model.backbone.maps = features[1:]
    losses = model.losses(golden.images, golden.sizes, golden.targets(case))
    for name, theirs in {"cls": "loss_cls", "box": "loss_bbox"}.items():
        assert losses[name].item() == pytest.approx(golden.facts["losses"][case][theirs], rel=1e-5), name
    sum(losses.values()).backward()
    golden.assert_gradients(case, model, features)


@torch.inference_mode()
def test_chain_agrees(golden: Published, model: RetinaNet) -> None:
    model.backbone.maps = golden.features()[1:]
    for b, found in enumerate(model(golden.images, golden.sizes, golden.original_sizes)):
        assert_detections(golden, f"chain{b}", found, 5e-3, 5e-5)


def assert_detections(golden: Published, key: str, found: Detections, pixels: float, score: float) -> None:
    golden.assert_close(f"{key}.bboxes", found.boxes, pixels)
    golden.assert_close(f"{key}.scores", found.scores, score)
    golden.assert_equal(f"{key}.labels", found.labels)
