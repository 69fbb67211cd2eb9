"""UPerNet against what mmseg computed, stage by stage and as a whole; and segmenters in general."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published import GivenMaps, Published, tensor
from torch import Tensor, nn
from torch.nn import functional as F

import goldens
import vision_ssm
from goldens import fill_dense
from vision_ssm.cli import main
from vision_ssm.data.pixels import collate, eval_transform
from vision_ssm.detectors import SMP_DECODERS, UperNet, create_segmenter
from vision_ssm.detectors.segmenter import IGNORED, label_map, resize, slide, to_original
from vision_ssm.errors import InputError
from vision_ssm.tasks.segmentation import Segmentation, SegmenterSpec

STRIDES = (4, 8, 16, 32)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def golden() -> Published:
    return Published("upernet")


@pytest.fixture
def model(golden: Published) -> UperNet:
    return heads(golden, GivenMaps(golden.inputs.channels, STRIDES))


def heads(golden: Published, backbone: nn.Module) -> UperNet:
    made = UperNet(backbone, 150)
    state = golden.state()
    assert sum(p.numel() for p in made.parameters()) == golden.facts["params_of_heads"] + parameters(backbone)
    assert made.load_state_dict(state, strict=False).missing_keys == [
        f"backbone.{key}" for key in backbone.state_dict()
    ]
    return made.eval()


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class ToyBackbone(GivenMaps):
    """Projections of means over squares, as the golden describes."""

    def __init__(self, golden: Published) -> None:
        super().__init__(golden.inputs.channels, STRIDES)
        self.proj = nn.ModuleList(nn.Conv2d(3, width, 1) for width in golden.inputs.channels)
        keys = [(key.removeprefix("backbone."), shape) for key, shape in golden.facts["toy_backbone_keys"]]
        full = fill_dense.state(golden.facts["toy_backbone_keys"], 0)
        self.load_state_dict({key: tensor(full[name]) for (key, _), name in zip(keys, full, strict=True)})

    def forward(self, images: Tensor) -> list[Tensor]:
        means = (F.avg_pool2d(images, 4 * 2**i, ceil_mode=True, count_include_pad=False) for i in range(4))
        return [project(x) for project, x in zip(self.proj, means, strict=True)]


def features(golden: Published, size: tuple[int, int]) -> list[Tensor]:
    sizes = [[-(-side // stride) for side in size] for stride in STRIDES]
    return golden.maps("feature", golden.inputs.channels, sizes)


@pytest.mark.parametrize("case", ["even", "odd"])
@torch.inference_mode()
def test_heads_agree(golden: Published, model: UperNet, case: str) -> None:
    height, width = getattr(golden.inputs, case)
    maps = features(golden, (height, width))
    model.backbone.maps = maps
    golden.assert_map(f"{case}.psp", model.decode_head.psp_forward(maps))
    fused: list[Tensor] = []
    handle = model.decode_head.classifier.register_forward_pre_hook(lambda _, inputs: fused.append(inputs[0]))
    scores = model(torch.zeros(2, 3, height, width))
    handle.remove()
    golden.assert_map(f"{case}.fused", fused[0])
    golden.assert_map(f"{case}.logits", scores, 24, 6)
    golden.assert_map(f"{case}.aux", model.auxiliary_head(maps), 24, 6)
    resized = resize(scores, (height, width))
    golden.assert_map(f"{case}.resized", resized, 16, 6)
    original = 2 * height + 1, width + 13
    at_original = torch.stack([to_original(x, (height, width), (height, width), original) for x in scores])
    golden.assert_map(f"{case}.original", at_original, 16, 6)
    labels = torch.stack([label_map(x, (height, width), (height, width), original) for x in scores])
    assert_labels(golden, f"{case}.labels", labels[:, ::3, ::3])
    assert torch.equal(labels, at_original.argmax(1))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_losses_and_gradients_agree(
    golden: Published, model: UperNet, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vision_ssm.detectors.segmenter._DROPOUT", 0.0)
    height, width = golden.inputs.even
    # In float64: the coarsest pooling leaves its batch norm two values to normalize, whose gradient is a difference of
    # nearly equal numbers, in float32 off by up to 1.5e-4 on some processors.
    maps = [x.double().requires_grad_() for x in features(golden, (height, width))]
    model.double().backbone.maps = maps
    labels = tensor(fill_dense.label_map("segments", 2, height, width, 150))
    model.train(mode == "train")
    losses = model.losses(torch.zeros(2, 3, height, width, dtype=torch.float64), labels.where(labels != 255, IGNORED))
    facts = golden.facts["losses"][mode]
    assert losses["pixels"].item() == pytest.approx(facts["decode.loss_ce"], rel=1e-5)
    assert losses["auxiliary"].item() == pytest.approx(facts["aux.loss_ce"], rel=1e-5)
    sum(losses.values()).backward()
    golden.assert_gradients(mode, model, maps, prefix="loss")
    if mode == "train":
        buffers = dict(model.named_buffers())
        means = [buffers[ours_of(name)].float().mean() for name in golden.facts["buffer_names"]]
        golden.assert_close("loss.train.buffer_means", torch.stack(means), 1e-5, 1e-4)


def ours_of(name: str) -> str:
    from published import ours

    return ours(name)


@torch.inference_mode()
def test_windows_agree(golden: Published) -> None:
    model, facts = heads(golden, ToyBackbone(golden)), golden.facts["slide"]
    images = tensor(goldens.fill.image(1, *facts["image"]))
    windows = slide(model, images, facts["crop"], facts["stride"])
    golden.assert_map("slide.logits", windows, 16, 6)
    golden.assert_close("slide.grid", windows[0, ::10, ::16, ::16], 2e-5, 1e-5)
    whole = model(images)
    golden.assert_map("whole.logits", resize(whole, images.shape[-2:]), 16, 6)
    golden.assert_close("whole.grid", resize(whole, images.shape[-2:])[0, ::10, ::16, ::16], 2e-5, 1e-5)
    small = images[..., :50, :60]
    assert torch.equal(slide(model, small, 96, 64), resize(model(small), (50, 60)))


@torch.inference_mode()
def test_several_scales_and_flips_agree(golden: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = rgb(fill_dense.picture(*golden.inputs.tta_image))
    spec = SegmenterSpec(decoder="upernet", model="toy", classes=names(150), labels=tuple(range(150)), tta=True)
    task = Segmentation(heads(golden, ToyBackbone(golden)), spec)
    inputs: list[Tensor] = []
    task.model.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    kept: list[Tensor] = []
    softmax = Tensor.softmax
    monkeypatch.setattr(Tensor, "softmax", lambda x, dim: kept.append(softmax(x, dim)) or kept[-1])
    (found,) = task.predict([picture])
    for facts, image in zip(golden.facts["tta"], inputs, strict=True):
        pixels = image[0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        bgr = (255 * pixels).round().to(torch.uint8).flip(0)
        assert zlib.crc32(bgr.contiguous().numpy().tobytes()) == facts["crc32"], facts
    probabilities = torch.stack(kept).mean(0)
    golden.assert_close("tta.probabilities", probabilities[::10, ::8, ::8], 1e-6)
    assert_labels(golden, "tta.labels", found.label_map[::3, ::3])


@pytest.mark.parametrize("case", [0, 1])
def test_preprocessing_is_equal(golden: Published, case: int) -> None:
    facts = golden.facts["pre"][case]
    sample = {"image": Image.fromarray(rgb(fill_dense.picture(*facts["size"], facts["seed"]))), "id": ""}
    batch = collate([eval_transform(mean=MEAN, std=STD, test_size=(2048, 512))(dict(sample))])
    assert list(batch["images"][0].shape) == facts["input"]
    golden.assert_close(f"pre{case}.input", batch["images"][0][0, :, ::41, ::43], 1e-5)
    stretched = eval_transform(mean=MEAN, std=STD, test_size=(2048, 512), multiple=32)(dict(sample))["images"][0]
    assert list(stretched.shape[1:]) == facts["multiple"]
    pixels = 255 * (stretched * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))
    bgr = pixels.round().to(torch.uint8).flip(0).permute(1, 2, 0).contiguous()
    assert zlib.crc32(bgr.numpy().tobytes()) == facts["multiple_crc32"]


@pytest.fixture(scope="module")
def converted(golden: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden segmenter as published, turned into ours."""
    classifier = goldens.load("vmamba_tiny_s1l8").facts["state_dict"]
    keys = [(f"backbone.{key}", shape) for key, shape in classifier if not key.startswith("classifier.")]
    keys += [
        (f"backbone.outnorm{i}.{part}", [width])
        for i, width in enumerate((96, 192, 384, 768))
        for part in ("weight", "bias")
    ]
    state = fill_dense.state(keys + golden.facts["keys"], golden.facts["seed"], golden.facts["scales"])
    folder = tmp_path_factory.mktemp("converted")
    torch.save({"meta": {}, "state_dict": {key: tensor(value) for key, value in state.items()}}, folder / "theirs.pth")
    ours = folder / "ours.safetensors"
    assert main(["convert", str(folder / "theirs.pth"), str(ours), "--task", "segment", "--model", "vmamba_tiny"]) == 0
    return ours


def test_file_to_label_map_agrees(golden: Published, converted: Path, tmp_path: Path) -> None:
    height, width = golden.facts["e2e"]["run"]["picture"]
    Image.fromarray(rgb(fill_dense.picture(height, width))).save(tmp_path / "picture.png")
    task = vision_ssm.load(converted, test_size=(width, height))
    (found,) = task.predict([tmp_path / "picture.png"])
    assert (found["label_map"].shape, found.classes[:2]) == ((height, width), ("wall", "building"))
    assert_labels(golden, "e2e.labels", found.label_map[::2, ::2])
    batch = task.collate([task.eval_transform({"image": Image.open(tmp_path / "picture.png"), "id": ""})])
    with torch.no_grad():
        maps = task.model.maps(batch["images"][0])
        for i, x in enumerate(maps):
            golden.assert_map(f"e2e.feature{i}", x, 6)
        scores = task.model(batch["images"][0])
        golden.assert_map("e2e.logits", scores, 6, 6)
        golden.assert_map("e2e.aux", task.model.auxiliary_head(maps), 6, 6)
        at_original = to_original(scores[0], (height, width), (height, width), (height, width))
    golden.assert_close("e2e.grid", at_original[::10, ::16, ::16], 5e-5, 1e-4)


def assert_labels(golden: Published, key: str, labels: Tensor) -> None:
    assert (labels.numpy() == golden.arrays[key]).mean() >= 0.998


def rgb(bgr: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bgr[..., ::-1])


def names(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


@pytest.mark.parametrize("decoder", SMP_DECODERS)
@pytest.mark.parametrize("model", ["vmamba_atto", "resnet18", "convnext_atto"])
def test_other_decoders_train_and_keep_the_size(decoder: str, model: str) -> None:
    segmenter = create_segmenter(decoder, model, {}, 5)
    labels = torch.randint(IGNORED, 5, (2, 70, 100))
    losses = segmenter.losses(torch.randn(2, 3, 70, 100), labels)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in segmenter.parameters() if p.requires_grad)
    assert segmenter.eval()(torch.randn(1, 3, 70, 100)).shape == (1, 5, 70, 100)


def test_bad_segmenters_are_refused() -> None:
    with pytest.raises(InputError, match="unknown decoder deeplab, choose from upernet, unet"):
        create_segmenter("deeplab", "vmamba_atto")
    with pytest.raises(InputError, match="a segmenter needs at least one class"):
        create_segmenter("upernet", "vmamba_atto", {}, 0)
    with pytest.raises(InputError, match="a segmenter needs at least two"):
        create_segmenter("upernet", "vit_tiny_patch16_224")


def test_padding_of_a_batch_does_not_move_flipped_scores() -> None:
    scores = torch.randn(3, 8, 10)
    padded, size, original = (32, 40), (32, 28), (64, 56)
    mirrored = to_original(scores.flip(-1), padded, size, original, flipped=True)
    torch.testing.assert_close(mirrored, to_original(scores, padded, size, original), rtol=0, atol=1e-5)
