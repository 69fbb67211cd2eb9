"""ONNX files in standard operators: made, compared with the model, quantized."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vision_ssm.analysis.capture import stage_outputs
from vision_ssm.detectors import Detector
from vision_ssm.engine.onnx_model import open_session
from vision_ssm.errors import InputError

if TYPE_CHECKING:
    from vision_ssm.engine.task import Task

INPUT = "images"
TOLERANCE = 1e-4
"""Largest difference between file and model, as a share of the range of an output's values."""


@dataclass(frozen=True)
class Comparison:
    """How far a file is from the model.

    Args:
        shape: Of the images, (B, 3, H, W).
        difference: The largest one, as a share of the range of the output's values.
    """

    shape: tuple[int, ...]
    difference: float


class Outputs(nn.Module):
    """What a file computes of images, by name.

    Args:
        task: A model.
        features: Give the maps of the stages (of the backbone), ``feature_0`` and so on, instead of the result.
    """

    def __init__(self, task: Task, *, features: bool = False) -> None:
        super().__init__()
        self.model, self.name, self.features = task.model.eval(), task.onnx_output, features

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute it of images, (B, 3, H, W)."""
        if self.features:
            return {f"feature_{i}": x for i, x in enumerate(stage_outputs(self.model, images))}
        if isinstance(self.model, Detector):
            return self.model.raw_outputs(images)
        assert self.name is not None
        return {self.name: self.model(images)}


def check_shapes(size: Sequence[int], fixed: bool) -> list[tuple[int, ...]]:
    """Return shapes of images to compare on: two batches, and unless fixed, three sizes from a model's own upwards."""
    height, width = size
    sizes = [(height, width), (height + 32, width + 64), (height + 5 - height % 2, width + 23 - width % 2)]
    return [(batch, 3, *each) for each in (sizes[:1] if fixed else sizes) for batch in (1, 3)]


@torch.no_grad()
def to_onnx(outputs: Outputs, size: Sequence[int], metadata: Mapping[str, str], *, fixed: bool = False) -> bytes:
    """Return the content of an ONNX file; its input is ``images``, (B, 3, H, W).

    Args:
        outputs: What it computes.
        size: Height and width of an image that the model takes.
        metadata: What the file says of itself.
        fixed: Whether the model takes only this size.

    Raises:
        InputError: The model has no such outputs, or cannot be written.
    """
    import onnx
    import onnxscript  # noqa: F401  (the exporter would hide that it is missing)

    height, width = size if fixed else (size[0] + 8, size[1] + 24)  # sides of one length might be taken for one
    images = torch.zeros(2, 3, height, width)
    names = list(outputs(images))
    dims = {0: "batch"} if fixed else {0: "batch", 2: "height", 3: "width"}
    how: dict[str, Any] = dict(input_names=[INPUT], output_names=names, dynamic_shapes={"images": dims})
    try:
        with _silence():
            program: Any = torch.onnx.export(outputs, (images,), dynamo=True, verbose=False, **how)
            proto = program.model_proto
            proto.metadata_props.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in metadata.items())
            return proto.SerializeToString()
    except Exception as error:  # the exporter raises anything
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise InputError(f"torch cannot write this model as ONNX: {reason}") from error


@contextmanager
def _silence() -> Iterator[None]:
    """Keep away what exporter and quantizer have to say to their developers."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@torch.no_grad()
def compare(content: bytes, outputs: Outputs, shapes: Iterable[Sequence[int]]) -> list[Comparison]:
    """Return how far a file is from the model on random images.

    Args:
        content: That of the file.
        outputs: What it computes.
        shapes: Of the images, (B, 3, H, W).
    """
    session, rows = open_session(content), []
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        images = torch.randn(*shape, generator=generator)
        found = session.run(None, {INPUT: images.numpy()})
        worst = max(_difference(*both) for both in zip(found, outputs(images).values(), strict=True))
        rows.append(Comparison(tuple(shape), worst))
    return rows


def _difference(found: np.ndarray, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    extent = expected.max() - expected.min()
    return float((torch.from_numpy(found) - expected).abs().max() / extent.clamp_min(1e-12))


def quantize(content: bytes) -> bytes:
    """Return the content of a file whose linear layers and convolutions compute in int8.

    Weights have a scale per channel, activations one that is found anew for every input: fixed ones, from images to
    calibrate on, cost a small EfficientVMamba about a point of accuracy.

    Args:
        content: A file in float32.
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    proto = onnx.load_from_string(content)
    weights = {tensor.name for tensor in proto.graph.initializer}
    layers = [n.name for n in proto.graph.node if n.op_type in ("Conv", "Gemm", "MatMul") and n.input[1] in weights]
    with tempfile.TemporaryDirectory() as folder, _silence():
        out = Path(folder) / "int8.onnx"
        quantize_dynamic(proto, out, per_channel=True, nodes_to_quantize=layers)
        return out.read_bytes()
