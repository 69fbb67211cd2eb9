from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vision_ssm.engine.weights import from_metadata
from vision_ssm.errors import InputError


def open_session(source: Path | bytes) -> Any:
    """An ONNX Runtime session of a file, or of its content, on the CPU with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class OnnxModel(nn.Module):
    """An ONNX file that `vision-ssm export onnx` wrote, run by ONNX Runtime on the CPU.

    Args:
        path: The file.

    Raises:
        InputError: The file is damaged, or was written by something else.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            self.session = open_session(path)
            self.description = from_metadata(self.session.get_modelmeta().custom_metadata_map)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # ONNX Runtime's own have no class in common
            raise InputError(f"{path} was not written by vision-ssm export onnx, or is damaged") from error
        self.path = path
        self.outputs: list[str] = [output.name for output in self.session.get_outputs()]

    def __reduce__(self) -> Any:  # for loader processes where they are not forked
        return type(self), (self.path,)

    def forward(self, images: Tensor) -> Tensor:
        """The first output for images, (B, 3, H, W).

        Raises:
            InputError: The file is for one size of images, and these have another.
        """
        wanted = self.session.get_inputs()[0]
        if any(isinstance(side, int) and side != n for side, n in zip(wanted.shape, images.shape, strict=True)):
            sizes = ["x".join(map(str, shape[2:])) for shape in (wanted.shape, images.shape)]
            raise InputError(f"{self.path} takes images of {sizes[0]} pixels only, not {sizes[1]}")
        return torch.from_numpy(self.session.run(self.outputs[:1], {wanted.name: images.numpy()})[0])
