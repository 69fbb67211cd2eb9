"""Programs of `torch.export`: with the scan as one operator, or compiled for images of one shape, for torch alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from vision_ssm.errors import InputError
from vision_ssm.export.outputs import Outputs


@torch.no_grad()
def save_program(
    outputs: Outputs, size: Sequence[int], path: Path, metadata: Mapping[str, str], *, fixed: bool = False
) -> None:
    """Write a program that takes images of any batch, height and width, (B, 3, H, W).

    Args:
        outputs: What it computes.
        size: Height and width of an image that the model takes.
        path: The file to write, ending in .pt2.
        metadata: What the file says of itself: `extra_files` of :func:`torch.export.load`.
        fixed: Whether the model takes only this size.

    Raises:
        InputError: torch cannot export the model.
    """
    height, width = size if fixed else (size[0] + 8, size[1] + 24)  # sides of one length might be taken for one
    sizes = {0: Dim.DYNAMIC} if fixed else {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    images = torch.zeros(2, 3, height, width)
    try:
        program = torch.export.export(outputs, (images,), dynamic_shapes={"images": sizes})
        torch.export.save(program, path, extra_files=dict(metadata))
    except OSError:
        raise
    except Exception as error:  # tracing raises anything
        raise _failed("export", error) from error


@torch.no_grad()
def compile_package(outputs: Outputs, shape: Sequence[int], path: Path, metadata: Mapping[str, str]) -> None:
    """Compile with AOTInductor for images of one shape into a package that torch loads, from C++ too.

    The scan becomes loops of torch's own operators, so that the package needs nothing of this one.

    Args:
        outputs: What it computes.
        shape: Of the images, (B, 3, H, W).
        path: The file to write, ending in .pt2.
        metadata: What the package says of itself: its `get_metadata()`.

    Raises:
        InputError: torch cannot export or compile the model.
    """
    scan = torch.ops.vision_ssm.route_scan.default
    rules: Any = torch.export.default_decompositions()
    rules[scan] = torch._decomp.decomposition_table[scan]
    options = {"aot_inductor.metadata": dict(metadata)}
    try:
        program = torch.export.export(outputs, (torch.zeros(*shape),)).run_decompositions(rules)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    except OSError:
        raise
    except Exception as error:  # so do compilers
        raise _failed("compile", error) from error


def run_program(path: Path) -> Callable[[Tensor], list[Tensor]]:
    """Return what computes the outputs of images, (B, 3, H, W), from the file of a program."""
    program = torch.export.load(path).module()
    return lambda images: list(program(images).values())


def run_package(path: Path) -> Callable[[Tensor], list[Tensor]]:
    """Return what computes the outputs of images, (B, 3, H, W), from a compiled package."""
    package: Any = torch._inductor.aoti_load_package(str(path))
    return lambda images: list(package(images).values())


def _failed(what: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(f"torch cannot {what} this model: {reason[:300]}")
