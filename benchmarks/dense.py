"""Time and memory of detectors and segmenters on this package's backbones beside the libraries' own, in one run.

python benchmarks/dense.py detect --csv detect.csv      # Mask R-CNN; beside torchvision's, on ResNet-50
python benchmarks/dense.py segment --csv segment.csv    # UPerNet; beside transformers', on Swin-T
python benchmarks/dense.py detect --models sparx_mamba_tiny resnet50 --size 480 640
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import torch
from torch import Tensor, nn

import vision_ssm
from vision_ssm.detectors import create_detector, create_segmenter
from vision_ssm.detectors.segmenter import label_map, resize
from vision_ssm.errors import InputError

PEERS = {"detect": "torchvision's, ResNet-50", "segment": "transformers', Swin-T"}
TITLES = {"detect": "Mask R-CNN", "segment": "UPerNet"}
SIZES = {"detect": [800, 1088], "segment": [512, 512]}
NOTES = {
    "detect": "one image with ten objects; inference finds a hundred and pastes their masks",
    "segment": "150 classes; training on two images, inference on one, to a label map of its size",
}
OBJECTS = 10
Size = tuple[int, int]
Step = Callable[[], Any]


def scene(size: Size) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw an image, (3, H, W), and ten objects with square masks."""
    torch.manual_seed(0)
    height, width = size
    side = min(size) // 5
    corners = torch.stack([torch.randint(0, limit - side, (OBJECTS,)) for limit in (width, height)], 1)
    masks = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
    for mask, (x, y) in zip(masks, corners.tolist(), strict=True):
        mask[y : y + side, x : x + side] = 1
    boxes = torch.cat([corners, corners + side], 1).float()
    return torch.randn(3, *size), {"boxes": boxes, "labels": torch.randint(1, 80, (OBJECTS,)), "masks": masks}


def detector_steps(name: str, size: Size) -> dict[str, Step]:
    """Return what is measured of a detector that finds a hundred objects, all of one class, wherever a proposal is."""
    image, target = scene(size)
    torch.manual_seed(0)
    if name in PEERS.values():
        from torchvision.models.detection import maskrcnn_resnet50_fpn

        sides = dict(min_size=min(size), max_size=max(size))
        model: Any = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=81, **sides)
        bias = model.roi_heads.box_predictor.cls_score.bias
        batch: tuple[Any, ...] = ([image],)
        losses = partial(_peer_losses, model, image, target)
    else:
        model = create_detector("mask-rcnn", name)
        bias, sizes = model.cls_score.bias, torch.tensor([size])
        batch = image[None], sizes, sizes
        losses = partial(_detector_losses, model, image[None], sizes, [target])
    with torch.no_grad():
        bias[1] += 4
    found = {"inference": partial(infer, model, _paste, *batch), "training": partial(train, model, losses)}
    found["inference, optimized"] = partial(infer, vision_ssm.optimize(model.eval()), _paste, *batch)
    return found


def _peer_losses(model: Any, image: Tensor, target: dict[str, Tensor]) -> Any:
    return model([image], [dict(target)])


def _detector_losses(model: Any, *batch: Any) -> Any:
    return model.losses(*batch)


def _paste(outputs: Any) -> Any:
    (found,) = outputs
    return found if isinstance(found, dict) else found.masks()


def segmenter_steps(name: str, size: Size) -> dict[str, Step]:
    """Return what is measured of a segmenter."""
    torch.manual_seed(0)
    image, labels = torch.randn(2, 3, *size), torch.randint(0, 150, (2, *size))
    labels[:, :8] = -1
    if name in PEERS.values():
        from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

        stages = [f"stage{i}" for i in range(1, 5)]
        swin = SwinConfig(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], out_features=stages)
        config = UperNetConfig(backbone_config=swin, num_labels=150, auxiliary_in_channels=384, loss_ignore_index=-1)
        model: Any = UperNetForSemanticSegmentation(config)
        losses = partial(_transformers_losses, model, image, labels)
    else:
        model = create_segmenter("upernet", name)
        losses = partial(_detector_losses, model, image, labels)
    found = {"inference": partial(infer, model, _labels, image[:1]), "training": partial(train, model, losses)}
    found["inference, optimized"] = partial(infer, vision_ssm.optimize(model.eval()), _labels, image[:1])
    return found


def _transformers_losses(model: Any, image: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"loss": model(image, labels=labels).loss}


def _labels(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        size = [4 * side for side in outputs.shape[-2:]]
        return label_map(outputs[0], size, size, size)
    return resize(outputs.logits, outputs.logits.shape[-2:])[0].argmax(0)  # resized to the image by the model


STEPS = {"detect": detector_steps, "segment": segmenter_steps}


def infer(model: nn.Module, finish: Callable[[Any], Any], *batch: Any) -> Any:
    """Forward, and what makes a result of it."""
    if model.training:
        model.eval()
    with torch.inference_mode():
        return finish(model(*batch))


def train(model: nn.Module, losses: Callable[[], dict[str, Tensor]]) -> None:
    """Forward and backward; leaves the gradients behind, as before an optimizer's step."""
    model.train()
    model.zero_grad(set_to_none=True)
    sum(losses().values()).backward()  # type: ignore[union-attr]


def measure(task: str, names: list[str], size: Size, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the steps of all models in turns; memory in processes of their own."""
    timed = {(name, form): step for name in names for form, step in STEPS[task](name, size).items()}
    timings = common.interleaved({str(key): step for key, step in timed.items()}, options.seconds)
    rows = []
    for name, form in timed:
        timing = timings[str((name, form))]
        base = timings[str((PEERS[task], form))]
        row = dict(backbone=name, form=form, height=size[0], width=size[1], milliseconds=timing.median * 1e3)
        row |= dict(best_milliseconds=timing.best * 1e3, calls=timing.calls, ratio=timing.median / base.median)
        row["peak_mib"] = None
        if not (options.quick and rows):
            row["peak_mib"] = common.in_new_process(memory_of, task, name, form, size, options.threads)
        rows.append(row)
    for row in rows:
        like = (PEERS[task], row["form"])
        base_mib = next(other["peak_mib"] for other in rows if (other["backbone"], other["form"]) == like)
        row["memory_ratio"] = row["peak_mib"] / base_mib if row["peak_mib"] and base_mib else None
    return rows


def memory_of(task: str, name: str, form: str, size: Size, threads: int) -> float | None:
    """Measure the peak of one step; MiB beyond model and image."""
    torch.set_num_threads(threads)
    step = STEPS[task](name, size)[form]
    step()
    if form == "training":
        step.args[0].zero_grad(set_to_none=True)  # type: ignore[attr-defined]
    return common.peak_memory(step)


def main() -> None:
    """Measure, print a table, and write it to a file if asked to."""
    parser = common.Parser(__doc__.splitlines()[0], seconds=15.0)
    parser.add_argument("task", choices=list(STEPS), help="what to measure")
    models = ["vmamba_tiny", "sparx_mamba_tiny", "efficient_vmamba_base", "group_mamba_tiny"]
    parser.add_argument("--models", nargs="+", default=models, metavar="NAME", help="backbones, by timm's names")
    parser.add_argument("--size", nargs=2, type=common.count, metavar=("H", "W"), help="image; 800 1088 and 512 512")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = tuple(options.size or SIZES[options.task])
    if options.quick:
        options.models, size, options.seconds = ["vmamba_atto"], (64, 96), 0.01
    if min(size) < 64 or any(side % 4 for side in size):
        parser.error(f"--size must be multiples of 4 from 64 on, got {' '.join(map(str, size))}")
    if options.task == "segment":
        parser.need("transformers")
    try:
        rows = measure(options.task, [PEERS[options.task], *options.models], size, options)
    except InputError as error:
        parser.error(error.line)
    title = TITLES[options.task]
    columns = [(f"{title} on", "{backbone}"), ("step", "{form}"), (">ms", "{milliseconds:.0f}")]
    columns += [(">ratio", "{ratio:.2f}"), (">peak MiB", "{peak_mib:.0f}"), (">ratio", "{memory_ratio:.2f}")]
    notes = [f"{NOTES[options.task]}; ratios: to {PEERS[options.task]}, in the same form"]
    common.show(f"{title}, images of {size[0]}x{size[1]}", rows, columns, [*notes, common.machine_line()])
    if options.csv:
        common.write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
