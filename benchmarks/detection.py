"""Time and memory of Mask R-CNN on backbones of this package beside torchvision's own on ResNet-50, in one run.

python benchmarks/detection.py --csv detection.csv
python benchmarks/detection.py --models sparx_mamba_tiny resnet50 --size 480 640
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import torch
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn

import vision_ssm
from vision_ssm.detectors import create_detector
from vision_ssm.errors import InputError

TORCHVISION = "torchvision's, ResNet-50"
OBJECTS, CLASSES = 10, 80
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
    return torch.randn(3, *size), {"boxes": boxes, "labels": torch.randint(1, CLASSES, (OBJECTS,)), "masks": masks}


def build(name: str) -> nn.Module:
    """Make a detector that finds a hundred objects in every image: all of one class, wherever a proposal is."""
    torch.manual_seed(0)
    if name == TORCHVISION:
        model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES + 1)
        bias = model.roi_heads.box_predictor.cls_score.bias
    else:
        model = create_detector("mask-rcnn", name, num_classes=CLASSES)
        bias = model.cls_score.bias
    with torch.no_grad():
        bias[1] += 4
    return model


def steps(name: str, size: Size) -> dict[str, Step]:
    """Return what is measured of a detector, on one image of this size, by the name of the form."""
    model, (image, target) = build(name), scene(size)
    if name == TORCHVISION:
        return {
            "inference": partial(infer, model, [image]),
            "training": partial(train, model, lambda: model([image], [dict(target)])),
        }
    sizes = torch.tensor([size])
    batch = image[None], sizes, sizes
    return {
        "inference": partial(infer, model, *batch),
        "inference, optimized": partial(infer, vision_ssm.optimize(model), *batch),
        "training": partial(train, model, lambda: model.losses(image[None], sizes, [target])),
    }


def infer(model: nn.Module, *batch: Any) -> Any:
    """Find objects, and paste their masks into the image, as torchvision's model does too."""
    if model.training:
        model.eval()
    with torch.inference_mode():
        (found,) = model(*batch)
        return found if isinstance(found, dict) else found.masks()


def train(model: nn.Module, losses: Callable[[], dict[str, Tensor]]) -> None:
    """Forward and backward; leaves the gradients behind, as before an optimizer's step."""
    model.train()
    model.zero_grad(set_to_none=True)
    sum(losses().values()).backward()  # type: ignore[union-attr]


def measure(names: list[str], size: Size, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the steps of all detectors in turns; memory in processes of their own."""
    timed = {(name, form): step for name in names for form, step in steps(name, size).items()}
    timings = common.interleaved({str(key): step for key, step in timed.items()}, options.seconds)
    rows = []
    for name, form in timed:
        timing = timings[str((name, form))]
        base = timings[str((TORCHVISION, form.partition(",")[0]))]
        row = dict(backbone=name, form=form, height=size[0], width=size[1], milliseconds=timing.median * 1e3)
        row |= dict(best_milliseconds=timing.best * 1e3, calls=timing.calls, ratio=timing.median / base.median)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row["peak_mib"] = pool.apply(memory_of, (name, form, size, options.threads))
        rows.append(row)
    for row in rows:
        like = (TORCHVISION, row["form"].partition(",")[0])
        base_mib = next(other["peak_mib"] for other in rows if (other["backbone"], other["form"]) == like)
        row["memory_ratio"] = row["peak_mib"] / base_mib if row["peak_mib"] and base_mib else None
    return rows


def memory_of(name: str, form: str, size: Size, threads: int) -> float | None:
    """Measure the peak of one step; MiB beyond model and image."""
    torch.set_num_threads(threads)
    step = steps(name, size)[form]
    step()
    if form == "training":
        step.args[0].zero_grad(set_to_none=True)  # type: ignore[attr-defined]
    return common.peak_memory(step)


def main() -> None:
    """Measure, print a table, and write it to a file if asked to."""
    parser = common.Parser(__doc__.splitlines()[0], seconds=20.0)
    models = ["resnet50", "vmamba_tiny", "sparx_mamba_tiny", "efficient_vmamba_base", "group_mamba_tiny"]
    parser.add_argument("--models", nargs="+", default=models, metavar="NAME", help="backbones, by timm's names")
    parser.add_argument("--size", nargs=2, type=common.count, default=[800, 1088], metavar=("H", "W"), help="image")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.models, options.size, options.seconds = ["vmamba_atto"], [64, 96], 0.01
    if min(options.size) < 64:
        parser.error(f"--size must be at least 64 64, got {' '.join(map(str, options.size))}")
    try:
        rows = measure([TORCHVISION, *options.models], tuple(options.size), options)
    except InputError as error:
        parser.error(error.line)
    columns = [("Mask R-CNN on", "{backbone}"), ("step", "{form}"), (">ms", "{milliseconds:.0f}")]
    columns += [(">ratio", "{ratio:.2f}"), (">peak MiB", "{peak_mib:.0f}"), (">ratio", "{memory_ratio:.2f}")]
    notes = ["one image with ten objects; inference finds a hundred and pastes their masks; ratios: to torchvision's"]
    height, width = options.size
    common.show(f"Mask R-CNN, one image of {height}x{width}", rows, columns, [*notes, common.machine_line()])
    if options.csv:
        common.write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
