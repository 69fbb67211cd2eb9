"""One file per task, on the engine; `load` gives the task of any weights file."""

import importlib
from pathlib import Path
from typing import Any

from vision_ssm.engine.onnx_model import OnnxModel
from vision_ssm.engine.run_folder import RunFolder, weights_file
from vision_ssm.engine.task import Evaluation, Task
from vision_ssm.engine.weights import read_metadata
from vision_ssm.errors import InputError
from vision_ssm.recipes import Precision, TrainConfig

__all__ = ["TASKS", "load", "task_type", "train"]

TASKS = {
    "classification": "vision_ssm.tasks.classification:Classification",
    "detection": "vision_ssm.tasks.detection:Detection",
    "segmentation": "vision_ssm.tasks.segmentation:Segmentation",
}
"""Name of each task: where its class is."""


def task_type(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        InputError: There is none of that name.
    """
    if name not in TASKS:
        raise InputError(f"unknown task {name}; there are {', '.join(TASKS)}")
    module, kind = TASKS[name].split(":")
    return getattr(importlib.import_module(module), kind)


def load(
    path: str | Path,
    device: str = "auto",
    precision: Precision = "32-true",
    *,
    optimized: bool = True,
    **changes: Any,
) -> Task:
    """A trained model of any task, ready to predict: `vision_ssm.load("runs/x").predict(["a.jpg"])`.

    Args:
        path: The folder of a run (whose best weights are taken), a weights file of one, or an ONNX file that
            `vision-ssm export onnx` wrote of a classifier or segmenter.
        device: auto, cpu, cuda, cuda:1 or mps.
        precision: Number format of the computation.
        optimized: Whether to use `vision_ssm.optimize` on a CPU.
        changes: Other values for the description of the model, such as `test_size=(1333, 800)` of a detector.

    Raises:
        InputError: The file is missing, damaged or does not fit its model, there is no such device, the description
            has no such entry, or an ONNX file has other outputs or is to run on another device than the CPU.
    """
    file = weights_file(Path(path))
    if file.suffix == ".onnx":
        if device not in ("auto", "cpu") or precision != "32-true":
            asked = f"device {device} and precision {precision}"
            raise InputError(f"{file} runs in ONNX Runtime on the CPU in 32-true, or its own int8, not on {asked}")
        model = OnnxModel(file)
        return task_type(model.description["task"]).from_onnx(model, **changes)
    return task_type(read_metadata(file)["task"]).load(file, device, precision, optimized=optimized, **changes)


def train(config: TrainConfig, folder: str | Path | RunFolder, **options: Any) -> Evaluation:
    """Train the task of a configuration.

    Args:
        config: What to train and how.
        folder: Where to write.
        options: `resume`, `overwrite`, `console` and `about` of `vision_ssm.engine.fit.fit`, which tells the rest.
    """
    from vision_ssm.engine.fit import fit  # Lightning takes seconds

    run = folder if isinstance(folder, RunFolder) else RunFolder(Path(folder))
    return fit(task_type(config.task), config, run, **options)
