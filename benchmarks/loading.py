"""Photographs as training reads them, our loader beside timm's with the same random changes: images per second.

python benchmarks/loading.py --csv loading.csv
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader

from vision_ssm import recipes
from vision_ssm.data.module import ImageData
from vision_ssm.tasks.classification import Classification

SIZES = [(500, 375), (4000, 3000)]
"""Width and height: typical of ImageNet, and of a phone."""
BATCH = 16


def write_photographs(place: Path, size: tuple[int, int], count: int) -> None:
    """Write scikit-learn's two photographs as two classes, each many times, and once for validation."""
    from sklearn.datasets import load_sample_images

    for name, pixels in zip("ab", load_sample_images().images, strict=True):
        image = Image.fromarray(pixels).resize(size)
        for part, copies in (("train", count // 2), ("val", 1)):
            folder = place / part / name
            folder.mkdir(parents=True)
            for number in range(copies):
                image.save(folder / f"{number}.jpg", quality=90)


def make_epochs(place: Path, size: int, workers: int) -> dict[str, Callable[[], int]]:
    """Return, for each loader, a call that reads all training images once."""
    data = dict(data=str(place), img_size=size, batch_size=BATCH, num_workers=workers)
    config = recipes.scratch(model="vmamba_atto", **data)
    splits = Classification.load_data(config)
    task = Classification.from_config(config, splits)
    ours = ImageData(splits, task.train_transform, task.eval_transform, config).train_dataloader()
    theirs = create_loader(
        ImageDataset(str(place / "train")), (3, size, size), BATCH, is_training=True, use_prefetcher=False,
        num_workers=workers, persistent_workers=workers > 0, pin_memory=False,
    )  # fmt: skip
    theirs.dataset.transform = task.spec.train_transform(config)
    epochs = itertools.count()

    def read_ours() -> int:
        ours.sampler.set_epoch(next(epochs))
        return sum(len(batch["image"]) for batch in ours)

    return {"timm": lambda: sum(len(images) for images, _ in theirs), "vision-ssm train": read_ours}


def measure(size: tuple[int, int], options: Any) -> list[dict[str, Any]]:
    """Read the same files with each loader, interleaved, in this process and with workers."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        write_photographs(Path(place), size, options.images)
        for workers in options.workers:
            timings = common.interleaved(make_epochs(Path(place), options.size, workers), options.seconds)
            first = next(iter(timings.values())).median
            for name, timing in timings.items():
                row = dict(width=size[0], height=size[1], to=options.size, workers=workers, reader=name)
                row |= dict(images_per_second=options.images / timing.median, ratio=first / timing.median)
                rows.append(row | dict(calls=timing.calls, spread=timing.spread))
    return rows


def main() -> int:
    """Run the command line."""
    parser = common.Parser("How fast photographs are read for training.", seconds=10.0)
    parser.add_argument("--size", type=common.count, default=224, metavar="N", help="pixels of the network's input")
    parser.add_argument("--images", type=common.count, default=64, metavar="N", help="photographs per epoch")
    parser.add_argument(
        "--workers",
        nargs="+",
        type=int,
        choices=(0, 1, 2, 4, 8),
        default=[0, 2],
        help="processes that load; 0: this one",
    )
    options = parser.parse_args()
    parser.need("sklearn")
    if options.quick:
        options.seconds, options.images = 0.01, BATCH
    if options.images % BATCH:
        parser.error(f"argument --images: must be a multiple of {BATCH}, got {options.images}")
    torch.set_num_threads(1)
    rows = [row for size in SIZES[: 1 if options.quick else None] for row in measure(size, options)]
    columns = [("JPEG", "{width}x{height}"), (">workers", "{workers}"), ("reader", "{reader}")]
    columns += [(">images/s", "{images_per_second:.1f}"), (">ratio", "{ratio:.2f}")]
    notes = [
        f"whole epochs in batches of {BATCH}; random changes of the recipe scratch, to {options.size}x{options.size}",
        common.machine_line(),
    ]
    common.show("Reading photographs for training", rows, columns, notes)
    if options.csv:
        common.write_csv(options.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
