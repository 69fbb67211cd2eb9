"""Graphs for other programs: torch.export with named sizes, ONNX Runtime, torch.jit; one graph serves every size.

The models are small: an exporter's time is that of every layer, and one of each kind will do.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from test_timm_contract import SMALL, SMALLER
from torch import nn
from torch.export import Dim

# Maps of odd and even height and width, and for windows of 4x4: one, whole ones, and padded ones.
SHAPES = [(1, 3, 40, 56), (2, 3, 33, 47), (3, 3, 97, 64), (1, 3, 36, 130), (2, 3, 32, 32)]

small = pytest.mark.parametrize("name", SMALL)


def smaller(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **SMALLER[name]).eval()
    for parameter in model.parameters():
        if not parameter.any():  # no ties, which every program breaks in its way, where routers start at zero
            nn.init.normal_(parameter, std=0.02)
    return model


@small
def test_torch_export(name: str) -> None:
    model = smaller(name)
    # Named sizes, since torch refuses them wherever it finds a condition; Dim.DYNAMIC takes the conditions in.
    sizes = {0: Dim("batch", min=1, max=16), 2: Dim("height", min=32, max=512), 3: Dim("width", min=32, max=512)}
    exported = torch.export.export(model, (torch.randn(2, 3, 40, 56),), dynamic_shapes=[sizes]).module()
    for shape in SHAPES:
        x = torch.randn(shape)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-5, atol=1e-6)


# Windows, channel groups, and routes that each image chooses; the scan itself is tested in tests/scan.
@pytest.mark.parametrize("name", ["sparx_swin_atto", "group_mamba_atto", "vim2_atto"])
@pytest.mark.slow
def test_onnx_from_one_image(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = smaller(name)
    sizes = {"x": {0: "batch", 2: "height", 3: "width"}}
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (torch.randn(1, 3, 40, 56),), path, dynamo=True, dynamic_shapes=sizes, verbose=False)
    session = runtime.InferenceSession(path)
    for shape in SHAPES:
        x = torch.randn(shape)
        (y,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)


@small
@pytest.mark.filterwarnings("ignore")
def test_a_trace_serves_every_size(name: str) -> None:
    model = smaller(name)
    traced = torch.jit.trace(model, torch.randn(1, 3, 64, 96), check_trace=False)
    for shape in [*SHAPES, (1, 3, 4, 4), (2, 3, 2, 9)]:
        x = torch.randn(shape)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-6)


@small
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("whole", [True, False], ids=["itself", "inside of another"])
def test_scripting_is_refused(name: str, whole: bool) -> None:
    model = timm.create_model(name, device="meta")
    with pytest.raises(NotImplementedError, match=rf"^torch.jit.script cannot compile {type(model).__name__}; use .*$"):
        torch.jit.script(model if whole else nn.Sequential(model))
