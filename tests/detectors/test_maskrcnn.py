"""Mask R-CNN against what mmdet computed, stage by stage and as a whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published import GivenMaps, Published, tensor

import goldens
import vision_ssm
from goldens import fill_dense
from vision_ssm.cli import main
from vision_ssm.detectors import Detections, MaskRCNN, boxes, paste_mask, rois, two_stage
from vision_ssm.detectors.detector import rescaling

BOX_TOLERANCE, SCORE_TOLERANCE = 1e-3, 1e-6


@pytest.fixture(scope="module")
def golden() -> Published:
    return Published("maskrcnn")


@pytest.fixture(scope="module")
def weights(golden: Published) -> dict[str, torch.Tensor]:
    return golden.state()


@pytest.fixture
def model(golden: Published, weights: dict[str, torch.Tensor]) -> MaskRCNN:
    with torch.device("meta"):
        made = MaskRCNN(GivenMaps(golden.inputs.channels, (4, 8, 16, 32)), 80)
    made.load_state_dict({key: value.clone() for key, value in weights.items()}, assign=True)
    assert sum(p.numel() for p in made.parameters()) == golden.facts["params_of_neck_and_heads"]
    made.requires_grad_(True)
    return made.eval()


@pytest.fixture
def first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "choose", lambda candidates, count: candidates[:count])


def salted(golden: Published, stage: str):
    salt = golden.facts["salts"][stage]
    return lambda name: f"{name}#{salt}"


@torch.inference_mode()
def test_neck_agrees(golden: Published, model: MaskRCNN) -> None:
    model.backbone.maps = golden.features()
    for i, x in enumerate(model.pyramid(golden.images)):
        golden.assert_map(f"neck.out{i}", x)


@torch.inference_mode()
def test_rpn_head_agrees(golden: Published, model: MaskRCNN) -> None:
    for i, (logits, deltas) in enumerate(zip(*model.rpn_head(golden.pyramid()), strict=True)):
        golden.assert_map(f"rpn.logits{i}", logits, 12, 6)
        golden.assert_map(f"rpn.deltas{i}", deltas, 12, 6)


def test_anchors_are_equal(golden: Published, model: MaskRCNN) -> None:
    golden.assert_anchors(model.anchors(golden.pyramid()), 3)


@pytest.mark.parametrize(("mode", "per_level"), [("test", 1000), ("train", 2000)])
def test_proposals_agree(golden: Published, model: MaskRCNN, mode: str, per_level: int) -> None:
    name = salted(golden, "proposals")
    areas = [h * w for h, w in golden.inputs.level_sizes]
    flat = tensor(fill_dense.spread(name("rpn_logits"), (6 * sum(areas),), -8, 2)).split([6 * area for area in areas])
    logits, deltas = [], []
    for i, ((h, w), logit) in enumerate(zip(golden.inputs.level_sizes, flat, strict=True)):
        delta = fill_dense.noise(name(f"rpn_deltas{i}"), (2, 12, h, w)) * np.float32(0.12)
        extreme = np.abs(fill_dense.noise(name(f"rpn_extreme{i}"), (2, 12, h, w))) > 2.8
        delta = tensor(np.where(extreme, delta * np.float32(30), delta))
        logits.append(logit.view(2, 3, h, w).permute(0, 2, 3, 1).flatten(1))
        deltas.append(delta.permute(0, 2, 3, 1).reshape(2, -1, 4))
    anchors = model.anchors(golden.pyramid())
    for b, (found, scores) in enumerate(model.propose(logits, deltas, anchors, golden.inputs.img_shapes, per_level)):
        golden.assert_close(f"proposals.{mode}{b}.boxes", found, BOX_TOLERANCE)
        golden.assert_close(f"proposals.{mode}{b}.scores", scores, SCORE_TOLERANCE)


def test_roi_features_agree(golden: Published, model: MaskRCNN) -> None:
    maps, found = golden.pyramid(), tensor(golden.arrays["roialign.rois"])
    per_image = [found[found[:, 0] == b, 1:] for b in range(2)]
    order = torch.cat([(found[:, 0] == b).nonzero().flatten() for b in range(2)])
    golden.assert_equal("roialign.levels", rois.roi_levels(found[:, 1:], (4, 8, 16, 32)))
    for key, size, channels in (("box", 7, 4), ("mask", 14, 2)):
        features = model.roi_features(maps, per_image, size)[order.argsort()]
        golden.assert_close(f"roialign.{key}", features[:, :channels], 1e-5)
        wide = features.double()
        golden.assert_close(f"roialign.{key}.stat", torch.stack([wide.mean(), wide.std(), wide.abs().mean()]), 1e-5)


@torch.inference_mode()
def test_box_head_agrees(golden: Published, model: MaskRCNN) -> None:
    logits, deltas = model.predict_boxes(tensor(fill_dense.noise("box_features", (12, 256, 7, 7))))
    golden.assert_close("box_head.logits", logits, 2e-5, 1e-5)
    golden.assert_close("box_head.deltas", deltas.flatten(1), 2e-5, 1e-5)


@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("rescaled", [False, True], ids=["plain", "rescaled"])
def test_detections_agree(golden: Published, image: int, rescaled: bool) -> None:
    name = salted(golden, "detections")
    b, (h, w) = image, golden.inputs.img_shapes[image]
    centers = fill_dense.boxes(name(f"det_centres{b}"), 25, h, w, smallest=16)
    proposals = tensor(fill_dense.near(name(f"det_rois{b}"), centers, 8, h, w))
    logits = fill_dense.noise(name(f"det_logits{b}"), (200, 81))
    picked = np.array([0, 3, 17, 41, 56, 79, 80])[fill_dense.labels(name(f"det_pick{b}"), (25,), 7)].repeat(8)
    logits[np.arange(200), picked] += fill_dense.spread(name(f"det_boost{b}"), (200,), 2, 9)
    deltas = fill_dense.noise(name(f"det_deltas{b}"), (200, 320)) * np.float32(0.5)
    extreme = np.abs(fill_dense.noise(name(f"det_extreme{b}"), (200, 320))) > 3
    deltas = tensor(np.where(extreme, deltas * np.float32(50), deltas)).view(200, 80, 4)
    scale = rescaling((h, w), golden.inputs.ori_shapes[b], deltas) if rescaled else None
    found, scores, labels = two_stage.select_boxes(proposals, tensor(logits), deltas, (h, w), scale)
    key = f"detections.{'rescaled' if rescaled else 'plain'}{b}"
    golden.assert_close(f"{key}.bboxes", found, BOX_TOLERANCE)
    golden.assert_close(f"{key}.scores", scores, SCORE_TOLERANCE)
    golden.assert_equal(f"{key}.labels", labels)


@torch.inference_mode()
def test_mask_head_agrees(golden: Published, model: MaskRCNN) -> None:
    logits = model.predict_masks(tensor(fill_dense.noise("mask_features", (6, 256, 14, 14))))
    golden.assert_close("mask_head.logits", logits[:, ::16, ::3, ::3], 2e-5, 1e-5)
    wide = logits.double()
    golden.assert_close("mask_head.stat", torch.stack([wide.mean(), wide.std(), wide.abs().mean()]), 2e-5, 1e-5)


def test_pasted_masks_are_equal(golden: Published) -> None:
    name = salted(golden, "paste")
    size, original = golden.inputs.img_shapes[0], tuple(golden.inputs.ori_shapes[0])
    found = tensor(golden.arrays["paste.boxes_network_scale"])
    found = found / rescaling(size, original, found)
    golden.assert_close("paste.boxes", found, 0)
    labels = tensor(fill_dense.labels("paste_labels", (10,), 80))
    logits = tensor(fill_dense.noise(name("paste_logits"), (10, 80, 28, 28)) * np.float32(3))
    probs = logits[torch.arange(10), labels].sigmoid()
    masks = Detections(found, torch.ones(10), labels, original, probs).masks()
    golden.assert_equal("paste.areas", masks.sum((1, 2)))
    golden.assert_equal("paste.rows", masks.sum(2))
    golden.assert_equal("paste.columns", masks.sum(1))
    golden.assert_equal("paste.packed", packed(masks[[0, 1, 7, 8, 9]]))
    for mask, prob, box in zip(masks, probs, found, strict=True):
        assert torch.equal(paste_mask(prob, box, original), mask)


@pytest.mark.parametrize("case", ["all", "first"])
def test_matching_and_sampling_are_equal(golden: Published, model: MaskRCNN, first_ones: None, case: str) -> None:
    set_samples(golden, model, case)
    targets, maps = golden.targets(case), golden.pyramid()
    anchors = torch.cat(model.anchors(maps))
    areas, objects, facts = [], [], golden.facts["losses"][case]
    for b, (target, size) in enumerate(zip(targets, golden.inputs.img_shapes, strict=True)):
        usable = model.usable_anchors(maps, size)
        matched = boxes.match_boxes(anchors[usable], target["boxes"], 0.7, 0.3, 0.3)
        positive, negative = boxes.sample_boxes(matched, model.rpn_samples, 0.5)
        golden.assert_equal(f"train.{case}.rpn_pos{b}", positive)  # among the usable ones
        golden.assert_equal(f"train.{case}.rpn_pos_gt{b}", matched[positive])
        assert len(negative) == facts["rpn_neg"][b]
        if case == "first":
            golden.assert_equal(f"train.first.rpn_neg{b}", negative)
        proposals = golden.proposals(case)[b]
        sample = model.sample(proposals, target)
        kept = tensor(golden.arrays[f"train.{case}.roi_pos{b}"])
        assert torch.equal(sample.positive, torch.cat([target["boxes"], proposals])[kept])
        golden.assert_equal(f"train.{case}.roi_pos_gt{b}", sample.objects)
        assert len(sample.boxes) - len(sample.objects) == facts["roi_neg"][b]
        goals = rois.mask_targets(target["masks"], sample.positive, sample.objects, golden.inputs.batch_input_shape)
        areas.append(goals)
        objects.append(sample.objects)
    if case == "all":
        goals = torch.cat(areas)
        golden.assert_equal("train.all.mask_targets_packed", packed(goals.bool()))
        golden.assert_equal("train.all.mask_target_areas", goals.sum((1, 2)))


@pytest.mark.parametrize("case", ["all", "one_empty", "empty", "first"])
def test_losses_and_gradients_agree(
    golden: Published, model: MaskRCNN, first_ones: None, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    set_samples(golden, model, case)
    features = model.backbone.maps = [x.requires_grad_() for x in golden.features()]
    proposals = golden.proposals(case)
    monkeypatch.setattr(model, "propose", lambda *_args, **_more: [(x, x[:, 0]) for x in proposals])
    losses = model.losses(golden.images, golden.sizes, golden.targets(case))
    names = {"rpn_cls": "loss_rpn_cls", "rpn_box": "loss_rpn_bbox", "cls": "loss_cls", "box": "loss_bbox"}
    for name, theirs in {**names, "mask": "loss_mask"}.items():
        assert losses[name].item() == pytest.approx(golden.facts["losses"][case][theirs], rel=1e-5), name
    sum(losses.values()).backward()
    golden.assert_gradients(case, model, features)


@torch.inference_mode()
def test_chain_agrees(golden: Published, model: MaskRCNN) -> None:
    model.backbone.maps = golden.features()
    for b, found in enumerate(model(golden.images, golden.sizes, golden.original_sizes)):
        assert_detections(golden, f"chain{b}", found, 4)


@pytest.fixture(scope="module")
def converted(golden: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole published detector, as its file becomes ours on the command line."""
    vmamba = goldens.load("vmamba_tiny_s1l8").facts
    keys = [entry for entry in vmamba["state_dict"] if not entry[0].startswith("classifier.")]
    keys = [(f"backbone.{key}", shape) for key, shape in keys + vmamba["backbone_extra_keys"]]
    state = fill_dense.state(keys + golden.facts["keys"], golden.facts["seed"], golden.facts["e2e"]["scales"])
    folder = tmp_path_factory.mktemp("converted")
    torch.save({"meta": {}, "state_dict": {key: tensor(value) for key, value in state.items()}}, folder / "theirs.pth")
    ours = folder / "ours.safetensors"
    assert main(["convert", str(folder / "theirs.pth"), str(ours), "--task", "detect", "--model", "vmamba_tiny"]) == 0
    return ours


@pytest.mark.parametrize("case", ["same", "resized"])
def test_file_to_masks_agrees(golden: Published, converted: Path, tmp_path: Path, case: str) -> None:
    facts, key = golden.facts["e2e"][case], f"e2e.{case}"
    picture = fill_dense.picture(*facts["picture"])
    Image.fromarray(np.ascontiguousarray(picture[..., ::-1])).save(tmp_path / "picture.png")  # BGR to RGB
    task = vision_ssm.load(converted, test_size=facts["resize_scale"] or facts["picture"][::-1])
    (found,) = task.predict([tmp_path / "picture.png"])
    objects = in_published_order(golden, key, found.found)
    assert_detections(golden, key, objects, 6)
    golden.assert_close(f"{key}.mask_logits", objects.mask_probs[:6].logit(), 1e-3)
    if case == "resized":
        return
    sample = task.eval_transform({"image": Image.open(tmp_path / "picture.png"), "id": ""})
    images, sizes = task.collate([sample])["image"], [sample["size"]]
    with torch.no_grad():
        for i, x in enumerate(task.model.backbone(images)):
            golden.assert_map(f"{key}.feature{i}", x, 6)
        pyramid = task.model.pyramid(images)
        proposals, scores = task.model.propose(*task.model.rpn(pyramid), task.model.anchors(pyramid), sizes)[0]
    golden.assert_close(f"{key}.proposals", proposals[:50], 5e-3)
    golden.assert_close(f"{key}.proposal_scores", scores[:50], 5e-5)


def in_published_order(golden: Published, key: str, found: Detections) -> Detections:
    """Exchange objects whose scores are equal within the tolerance: packed layers round in another way on every CPU."""
    order = torch.cdist(tensor(golden.arrays[f"{key}.bboxes"]), found.boxes).argmin(1)
    assert sorted(order.tolist()) == [*range(len(found))]
    assert (found.scores[order] - found.scores).abs().max() < 5e-5
    return Detections(found.boxes[order], found.scores[order], found.labels[order], found.size, found.mask_probs[order])


def assert_detections(golden: Published, key: str, found: Detections, masks: int) -> None:
    golden.assert_close(f"{key}.bboxes", found.boxes, 5e-3)
    golden.assert_close(f"{key}.scores", found.scores, 5e-5)
    golden.assert_equal(f"{key}.labels", found.labels)
    pasted = found.masks()
    np.testing.assert_allclose(pasted.sum((1, 2)).numpy(), golden.arrays[f"{key}.mask_areas"], rtol=5e-3, atol=20)
    kept = np.unpackbits(golden.arrays[f"{key}.masks_packed"], axis=1, count=pasted[0].numel())
    wrong = (pasted[:masks].flatten(1).numpy() != kept.astype(bool)).sum(1)
    assert (wrong <= 0.005 * kept.sum(1) + 20).all()


def packed(masks: torch.Tensor) -> torch.Tensor:
    return tensor(np.packbits(masks.flatten(1).numpy(), axis=1))


def set_samples(golden: Published, model: MaskRCNN, case: str) -> None:
    if case == "first":
        numbers = golden.facts["samplers_of_first"]
        model.rpn_samples, model.box_samples = numbers["rpn"], numbers["rcnn"]
    else:
        model.rpn_samples = model.box_samples = 10**7
