"""What holds for all detectors, backbones and numbers of classes."""

from __future__ import annotations

import copy
import functools

import pytest
import timm
import torch
from torch import Tensor

from vision_ssm.detectors import DETECTORS, Detections, Detector, boxes, create_detector, paste_mask, rois, two_stage
from vision_ssm.errors import InputError

SIZES = torch.tensor([[64, 90], [50, 64]])
ORIGINAL = torch.tensor([[128, 180], [75, 96]])
LOSSES = {
    "mask-rcnn": {"rpn_cls", "rpn_box", "cls", "box", "mask"},
    "faster-rcnn": {"rpn_cls", "rpn_box", "cls", "box"},
    "retinanet": {"cls", "box"},
}


@pytest.fixture(autouse=True)
def _few_proposals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads on 1,000 RoIs take seconds."""
    monkeypatch.setattr(two_stage, "_PROPOSALS", 20)
    monkeypatch.setattr(two_stage, "_DETECTIONS", 5)


@functools.cache
def made(detector: str, model: str, num_classes: int) -> Detector:
    return create_detector(detector, model, {}, num_classes)


def make(detector: str, model: str = "resnet18", num_classes: int = 3) -> Detector:
    return copy.deepcopy(made(detector, model, num_classes))  # faster than initializing 30 M parameters


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def targets(*counts: int, num_classes: int = 3) -> list[dict[str, Tensor]]:
    made = []
    for count, (height, width) in zip(counts, SIZES.tolist(), strict=True):
        corner = torch.rand(count, 2) * 20
        masks = torch.rand(count, height, width) > 0.5
        labels = torch.randint(num_classes, (count,))
        made.append(
            dict(boxes=torch.cat([corner, corner + 12 + torch.rand(count, 2) * 15], 1), labels=labels, masks=masks)
        )
    return made


def surer(model: Detector) -> Detector:
    """Let an untrained detector find something: without this every score is below the threshold."""
    name = "head.classification_head.cls_logits" if hasattr(model, "head") else "cls_score"
    torch.nn.init.normal_(model.get_submodule(name).weight, std=0.2)
    torch.nn.init.normal_(model.get_submodule(name).bias, std=2.0)
    return model.eval()


def same(found: Detections, other: Detections) -> None:
    assert len(found) == len(other) > 0
    torch.testing.assert_close(found.boxes, other.boxes, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.scores, other.scores, rtol=0, atol=1e-5)
    assert torch.equal(found.labels, other.labels)


@pytest.mark.parametrize(
    "model", ["vmamba_atto", "sparx_mamba_atto", "hrnet_w18_small", "swin_tiny_patch4_window7_224"]
)
def test_every_trainable_parameter_gets_a_gradient(model: str) -> None:
    detector = make("retinanet", model)
    losses = detector.losses(images(), SIZES, targets(2, 0))
    sum(losses.values()).backward()
    frozen = [name for name, p in detector.named_parameters() if not p.requires_grad]
    assert [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None] == []
    if model == "vmamba_atto":  # the norm of the stage that the pyramid leaves out
        assert frozen == ["backbone.model.feature_norms.0.weight", "backbone.model.feature_norms.0.bias"]


@pytest.mark.parametrize("counts", [(2, 0), (0, 0)], ids=["one_empty", "empty"])
@pytest.mark.parametrize("detector", ["mask-rcnn", "retinanet"])
def test_all_heads_get_gradients_without_objects(detector: str, counts: tuple[int, int]) -> None:
    model = make(detector)
    losses = model.losses(images(), SIZES, targets(*counts))
    assert losses.keys() == LOSSES[detector]
    if not any(counts):
        assert all(losses[name] == 0 for name in losses if name not in ("cls", "rpn_cls"))
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("detector", "num_classes"),
    [("mask-rcnn", 1), ("mask-rcnn", 1000), ("faster-rcnn", 1000), ("retinanet", 1), ("retinanet", 1000)],
)
def test_works_for_any_number_of_classes(detector: str, num_classes: int) -> None:
    model = surer(make(detector, num_classes=num_classes))
    with torch.no_grad():
        for found, size in zip(model(images(), SIZES, ORIGINAL), ORIGINAL.tolist(), strict=True):
            assert found.labels.dtype == torch.int64
            assert found.size == tuple(size)
            assert ((found.labels >= 0) & (found.labels < num_classes)).all()
            assert (found.boxes >= 0).all()
            assert (found.boxes <= torch.tensor(size[::-1] * 2) + 1e-3).all()
            if detector == "mask-rcnn":
                assert found.masks().shape == (len(found), *size)
    losses = model.losses(images(), SIZES, targets(3, 1, num_classes=num_classes))
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("detector", DETECTORS)
@torch.no_grad()
def test_an_image_is_the_same_alone(detector: str) -> None:
    model = surer(make(detector))
    both = model(images(), SIZES, ORIGINAL)
    for b in range(2):
        same(both[b], model(images()[b : b + 1], SIZES[b : b + 1], ORIGINAL[b : b + 1])[0])


@pytest.mark.parametrize("detector", DETECTORS)
@torch.no_grad()
def test_nothing_found_has_shapes(detector: str) -> None:
    model = make(detector).eval()
    name = "head.classification_head.cls_logits.bias" if detector == "retinanet" else "cls_score.bias"
    bias = model.get_parameter(name)
    bias.copy_(torch.full_like(bias, -9.0))
    bias[-1] += 20 * (detector != "retinanet")  # background
    (found,) = model(images(1), SIZES[:1], ORIGINAL[:1])
    assert found.boxes.shape == (0, 4)
    assert (found.scores.shape, found.labels.shape, found.labels.dtype) == ((0,), (0,), torch.int64)
    if detector == "mask-rcnn":
        assert found.mask_probs.shape == (0, 28, 28)
        assert found.masks().shape == (0, 128, 180)
    else:
        with pytest.raises(ValueError, match="no masks"):
            found.masks()


@pytest.mark.parametrize("detector", ["mask-rcnn", "retinanet"])
@torch.no_grad()
def test_boxes_are_float32_in_bfloat16(detector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_stage, "_DETECTIONS", 1)
    model, pixels, size = surer(make(detector)), images(1)[..., :32, :32], torch.tensor([[32, 30]])
    model.box_samples = 4  # convolutions in bfloat16 are slow on most CPUs
    with torch.autocast("cpu", torch.bfloat16):
        target = dict(
            boxes=torch.tensor([[2.0, 3, 20, 30]]), labels=torch.tensor([1]), masks=torch.ones(1, 32, 30).bool()
        )
        losses = model.losses(pixels, size, [target])
        found = model(pixels, size, size)
    found += model.bfloat16()(pixels.bfloat16(), size, size)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    for each in found:
        assert len(each) > 0
        assert each.boxes.dtype == each.scores.dtype == torch.float32
        assert each.mask_probs is None or each.mask_probs.dtype == torch.float32


def test_anchors_and_roi_levels_follow_the_strides() -> None:
    model = make("mask-rcnn", "vmamba_atto")
    assert (model.backbone_strides, model.strides) == ([2, 4, 8, 16], [2, 4, 8, 16, 32])
    sides = [(a[:, 2:] - a[:, :2]).prod(1).sqrt() for a in model.anchors(model.pyramid(images()))]
    for side, stride in zip(sides, model.strides, strict=True):
        torch.testing.assert_close(side, torch.full_like(side, 8 * stride))
    square = torch.tensor([27.0, 28.0, 55.0, 56.0, 111.0, 112.0, 5000.0])
    levels = rois.roi_levels(torch.stack([0 * square, 0 * square, square, square], 1), model.backbone_strides)
    assert levels.tolist() == [0, 0, 0, 1, 1, 2, 3]
    model = make("retinanet", "vmamba_atto")
    assert model.strides == [4, 8, 16, 32, 64]
    (first, *_) = model.anchors(model.pyramid(images()))
    sides = (first[:9, 2:] - first[:9, :2]).prod(1).sqrt()
    torch.testing.assert_close(sides, torch.tensor([16 * 2 ** (octave / 3) for octave in range(3)] * 3))


@pytest.mark.parametrize("detector", DETECTORS)
def test_costs_are_counted_without_computing(detector: str) -> None:
    with torch.device("meta"):
        model = create_detector(detector, "vmamba_atto", num_classes=3)
    outputs = model.forward_costs(torch.zeros(1, 3, 96, 64, device="meta"))
    assert all(x.device.type == "meta" for x in outputs)
    if detector == "mask-rcnn":
        assert outputs[-1].shape == (5, 3, 28, 28)


def test_backbones_have_what_the_published_ones_have() -> None:
    with torch.device("meta"):
        model = create_detector("mask-rcnn", "efficient_vmamba_tiny")
        assert sum(p.numel() for p in model.parameters()) == 26_198_916
        model = create_detector("retinanet", "vmamba_atto", {"feature_norm": False}).backbone.model
        assert model.feature_norms is None
    names = make("retinanet", "sparx_mamba_atto").state_dict()
    assert {name.rsplit(".", 1)[0] for name in names if "feature_norms" in name} == {
        f"backbone.model.feature_norms.{i}" for i in range(4)
    }
    assert any(name.endswith(".scale") for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mask-rcn", "resnet18"), "unknown detector mask-rcn, .*mask-rcnn"),
        (("mask-rcnn", "resnet1"), "unknown model resnet1; did you mean resnet1"),
        (("mask-rcnn", "vit_tiny_patch16_224"), "strides 16, 16, 16, 16; .* twice the stride"),
        (("mask-rcnn", "maxvit_tiny_rw_224"), "does not take images of 64x96"),
        (("mask-rcnn", "resnet18", {"widht": 3}), "cannot make resnet18 with widht=3"),
        (("mask-rcnn", "resnet18", {"output_stride": 8}), "strides 4, 8, 8, 8; "),
        (("mask-rcnn", "resnet18", {}, 0), "num_classes=0"),
    ],
    ids=["detector", "model", "strides", "fixed_size", "argument", "dilated", "classes"],
)
def test_wrong_choices_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_detector(*arguments)


def test_missing_published_weights_are_named() -> None:
    with pytest.raises(InputError, match="vmamba_atto has no published weights"):
        create_detector("retinanet", "vmamba_atto", backbone_pretrained=True)


@pytest.mark.parametrize("name", ["vmamba_atto", "resnet18"])
def test_backbone_starts_from_a_classifier(name: str) -> None:
    args = {"feature_norm": True} if name == "vmamba_atto" else {}
    classifier = timm.create_model(name, num_classes=7, **args)
    state = {key: value + 0.01 for key, value in classifier.state_dict().items() if value.is_floating_point()}
    state = classifier.state_dict() | state
    backbone = create_detector("retinanet", name, backbone_state=state).backbone
    found = backbone.state_dict()
    assert all(torch.equal(value, state[key.removeprefix("model.")]) for key, value in found.items())
    assert all(
        value is not state for module in backbone.modules() for value in getattr(module, "pretrained_cfg", {}).values()
    )
    del state[next(iter(state))]
    with pytest.raises(InputError, match="missing"):
        create_detector("retinanet", name, backbone_state=state)


def test_large_nms_equals_small(monkeypatch: pytest.MonkeyPatch) -> None:
    corner = torch.rand(400, 2) * 100
    found = torch.cat([corner, corner + 5 + torch.rand(400, 2) * 40], 1)
    scores, groups = torch.rand(400), torch.randint(5, (400,))
    joint = boxes.grouped_nms(found, scores, groups, 0.5)
    monkeypatch.setattr(boxes, "_JOINT_NMS", 100)
    assert torch.equal(boxes.grouped_nms(found, scores, groups, 0.5), joint)
    assert 5 < len(joint) < 400


def test_coding_is_inverted_by_decoding() -> None:
    corner = torch.rand(50, 2) * 50
    anchors, found = (torch.cat([corner, corner + 5 + torch.rand(50, 2) * 20], 1) for _ in range(2))
    stds = (0.1, 0.1, 0.2, 0.2)
    again = boxes.decode_boxes(anchors, boxes.encode_boxes(anchors, found, stds), stds, (100, 100))
    torch.testing.assert_close(again, found, rtol=0, atol=1e-4)


def test_sampling_is_random_within_its_shares() -> None:
    matched = torch.tensor([0] * 40 + [-2] * 10 + [-1] * 50)
    positive, negative = boxes.sample_boxes(matched, 32, 0.25)
    assert (len(positive), len(negative)) == (8, 24)
    assert (matched[positive] == 0).all()
    assert (matched[negative] == -1).all()
    assert len({*positive.tolist(), *negative.tolist()}) == 32
    torch.manual_seed(1)
    other, _ = boxes.sample_boxes(matched, 32, 0.25)
    torch.manual_seed(1)
    assert torch.equal(boxes.sample_boxes(matched, 32, 0.25)[0], other)
    assert not torch.equal(positive, other)


@pytest.mark.parametrize(
    ("box", "area"),
    [((10, 20, 30, 40), 400), ((3, 3, 3, 3), 4), ((-20, -20, 5, 5), 25), ((90, 90, 99, 99), 0), ((0, 0, 50, 60), 3000)],
    ids=["inside", "no_area_as_mmdet_on_a_cpu", "partly_outside", "outside", "whole"],
)
def test_masks_are_pasted_into_their_box(box: tuple[int, ...], area: int) -> None:
    mask = paste_mask(torch.ones(28, 28), torch.tensor(box, dtype=torch.float32), (60, 50))
    assert mask.shape == (60, 50)
    assert mask.sum() == area
