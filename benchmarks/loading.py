"""Photographs as training reads them, ours beside timm's data set with the same random changes: images per second.

python benchmarks/loading.py --csv loading.csv
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import ImageDataset

from vision_ssm import recipes
from vision_ssm.data.sampling import TrainingSamples
from vision_ssm.tasks.classification import Classification

SIZES = [(500, 375), (4000, 3000)]
"""Width and height: typical of ImageNet, and of a phone."""


def measure(size: tuple[int, int], options: Any) -> list[dict[str, Any]]:
    """Read the same files in turns, in this process."""
    with tempfile.TemporaryDirectory() as place:
        for name, pixels in zip("ab", load_sample_images().images, strict=True):
            for part in ("train", "val"):
                (Path(place) / part / name).mkdir(parents=True)
                Image.fromarray(pixels).resize(size).save(Path(place) / part / name / "x.jpg", quality=90)
        config = recipes.scratch(data=place, model="vmamba_atto", img_size=options.size)
        splits = Classification.load_data(config)
        task = Classification.from_config(config, splits)
        ours = TrainingSamples(splits.train, task.train_transform, seed=0)
        timms = ImageDataset(str(Path(place) / "train"), transform=task.spec.train_transform(config))
        theirs, epochs = itertools.count(), itertools.count()  # each reads the two files in turns
        timings = common.interleaved(
            {
                "timm.data.ImageDataset": lambda: timms[next(theirs) % 2],
                "vision-ssm train": lambda: ours.__getitems__([((turn := next(epochs)) // 2, turn % 2)]),
            },
            options.seconds,
        )
    first = next(iter(timings.values())).median
    return [
        dict(width=size[0], height=size[1], to=options.size, reader=name, images_per_second=1 / timing.median,
             ratio=first / timing.median)
        for name, timing in timings.items()
    ]  # fmt: skip


def main() -> int:
    """Run the command line."""
    parser = common.Parser("How fast photographs are read for training.", seconds=10.0)
    parser.add_argument("--size", type=common.count, default=224, metavar="N", help="pixels of the network's input")
    options = parser.parse_args()
    if options.quick:
        options.seconds = 0.01
    torch.set_num_threads(1)
    rows = [row for size in SIZES[: 1 if options.quick else None] for row in measure(size, options)]
    columns = [("JPEG", "{width}x{height}"), ("reader", "{reader}"), (">images/s", "{images_per_second:.1f}")]
    columns += [(">ratio", "{ratio:.2f}")]
    notes = [f"one process; changes of the recipe scratch, to {options.size}x{options.size}", common.machine_line()]
    common.show("Reading photographs for training", rows, columns, notes)
    if options.csv:
        common.write_csv(options.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
