"""ONNX files in standard operators: made and quantized."""

from __future__ import annotations

import copy
import functools
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vision_ssm.engine.onnx_model import open_session
from vision_ssm.errors import InputError
from vision_ssm.export.outputs import Outputs

INPUT = "images"


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
    outputs = _with_own_pools(outputs)
    dims = {0: "batch"} if fixed else {0: "batch", 2: "height", 3: "width"}
    how: dict[str, Any] = dict(input_names=[INPUT], output_names=names, dynamic_shapes={"images": dims})
    try:
        with _silence():
            program: Any = torch.onnx.export(outputs, (images,), dynamo=True, verbose=False, **how)
            proto = program.model_proto
            _strip(proto.graph)
            proto.metadata_props.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in metadata.items())
            return proto.SerializeToString()
    except Exception as error:  # the exporter raises anything
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise InputError(f"torch cannot write this model as ONNX: {reason}") from error


def _strip(graph: Any) -> None:
    """Remove what the exporter notes of where nodes are from, which is more than a small model's weights."""
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _strip(attribute.g)


def _with_own_pools(outputs: Outputs) -> Outputs:
    """Return a copy that pools adaptively by matrix products: torch's exporter writes pooling for one size alone."""
    outputs = copy.deepcopy(outputs)
    for module in outputs.modules():
        if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size not in (1, (1, 1)):
            # Its method, because transformers' UPerNet calls modules from a list of its own.
            module.forward = functools.partial(_pool, module.output_size)  # type: ignore[method-assign]
    return outputs


def _pool(size: int | Sequence[int | None] | None, x: Tensor) -> Tensor:
    sides = (size, size) if isinstance(size, int) or size is None else tuple(size)
    rows, columns = (_means(count, length, x) for count, length in zip(sides, x.shape[-2:], strict=True))
    return rows @ x @ columns.mT


def _means(count: int | None, length: int, like: Tensor) -> Tensor:
    """Return the matrix, (count, length), that takes means over count overlapping parts of an axis."""
    count = length if count is None else count
    i, place = torch.arange(count, device=like.device)[:, None], torch.arange(length, device=like.device)
    start, end = i * length // count, ((i + 1) * length + count - 1) // count
    return ((place >= start) & (place < end)).to(like.dtype) / (end - start)


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


def run_onnx(content: bytes) -> Callable[[Tensor], list[Tensor]]:
    """Return what computes the outputs of images, (B, 3, H, W), from the content of a file."""
    session = open_session(content)
    return lambda images: [torch.from_numpy(x) for x in session.run(None, {INPUT: images.numpy()})]


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
    # Not the step sizes' projections, a matrix for each route, nor depthwise convolutions, few weights that lose most.
    weights = {t.name for t in proto.graph.initializer if len(t.dims) == 2 or (len(t.dims) == 4 and t.dims[1] > 1)}
    layers = [n.name for n in proto.graph.node if n.op_type in ("Conv", "Gemm", "MatMul") and n.input[1] in weights]
    with tempfile.TemporaryDirectory() as folder, _silence():
        out = Path(folder) / "int8.onnx"
        quantize_dynamic(proto, out, per_channel=True, nodes_to_quantize=layers)
        return out.read_bytes()
