"""A classifier in int8, by torchao and by torch, beside float32: size, accuracy, predictions that stay, time.

python benchmarks/int8.py --run cifar-vmamba --data cifar10/test
"""

from __future__ import annotations

import copy
import io
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

import vision_ssm
from vision_ssm.data.sampling import Samples
from vision_ssm.errors import InputError

BATCH = 64


def by_torchao(config: Any) -> Callable[[nn.Module], nn.Module]:
    """Return what makes a quantized copy."""

    def quantized(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        quantize_(model, config)
        return model

    return quantized


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "float32": copy.deepcopy,
    "torchao Int8WeightOnlyConfig": by_torchao(Int8WeightOnlyConfig()),
    "torchao Int8DynamicActivationInt8WeightConfig": by_torchao(Int8DynamicActivationInt8WeightConfig()),
    "torch's quantize_dynamic": lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8),
    "vision_ssm.optimize, float32": vision_ssm.optimize,
}


def measure(run: Path, data: Path, quick: bool) -> list[dict[str, Any]]:
    """Go through the images once, with every form in turns on each batch."""
    task = vision_ssm.load(run, "cpu", optimized=False)
    if task.name != "classification":
        raise InputError(f"{run} is of {task.name}, not of a classifier")
    images = task.read_images(data)
    samples: Any = Samples(images, task.eval_transform)
    batches = DataLoader(Subset(samples, range(len(images))[: BATCH + 2 if quick else None]), BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own form is deprecated
        models = {name: form(task.model.eval()) for name, form in FORMS.items()}
    answers: dict[str, list[torch.Tensor]] = {name: [] for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    labels = []
    with torch.inference_mode():
        for batch in batches:
            labels.append(batch["label"])
            for name, model in models.items():
                begin = time.perf_counter()
                answers[name].append(model(batch["image"]).argmax(1))
                seconds[name].append(time.perf_counter() - begin)
    truth, first = torch.cat(labels), torch.cat(answers["float32"])
    rows = []
    for name, model in models.items():
        file, found = io.BytesIO(), torch.cat(answers[name])
        torch.save(model.state_dict(), file)
        # Not the first batch, which warms up, nor the last, which may be smaller.
        ratios = [a / b for a, b in zip(seconds[name], seconds["float32"], strict=True)][1:-1] or [float("nan")]
        row = dict(form=name, megabytes=file.tell() / 1e6, accuracy=(found == truth).double().mean().item())
        rows.append(row | dict(same=(found == first).double().mean().item(), time=statistics.median(ratios)))
    return rows


def main() -> int:
    """Run the command line."""
    parser = common.Parser("A classifier in int8 beside float32.", seconds=None)
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="run or weights file of a classifier")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="images with one folder per class")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        rows = measure(options.run, options.data, options.quick)
    except InputError as error:
        parser.error(error.line)
    columns = [("form", "{form}"), (">MB", "{megabytes:.2f}"), (">accuracy", "{accuracy:.1%}")]
    columns += [(">same predictions", "{same:.1%}"), (">time", "{time:.2f}")]
    notes = [f"batches of {BATCH}, not compiled; time: median of the ratios to float32", common.machine_line()]
    common.show(f"{options.run} in int8", rows, columns, notes)
    if options.csv:
        common.write_csv(options.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
