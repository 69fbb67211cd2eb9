"""Published detectors: their keys, which parameters they do not decay, and what was published about them."""

from __future__ import annotations

import functools
import re
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import goldens
from official_names import official_detector
from vision_ssm.analysis import complexity
from vision_ssm.checkpoints import (
    CheckpointError,
    check_fit,
    convert_detector,
    detector_no_decay,
    detector_of,
    load_strict,
    published_names,
    read_checkpoint,
    trace_detector,
    trace_official,
)
from vision_ssm.checkpoints.published_detectors import PUBLISHED_DETECTORS, PUBLISHED_SEGMENTERS
from vision_ssm.detectors import create_detector, create_segmenter

HEADS = {"mask-rcnn": "maskrcnn", "faster-rcnn": "maskrcnn", "retinanet": "retinanet", "upernet": "upernet"}


class Unfilled(TorchFunctionMode):
    """Passes over initialization, which takes most of the time on the meta device."""

    FILLING = {getattr(torch.Tensor, name) for name in dir(torch.Tensor) if re.fullmatch(r"[a-z].*[a-z]_", name)} - {
        torch.Tensor.requires_grad_
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in self.FILLING else func(*args, **(kwargs or {}))


@functools.cache
def on_meta(detector: str, model: str) -> Any:
    with torch.device("meta"), torch.no_grad(), Unfilled(), patch("vision_ssm.detectors.create._check_maps"):
        return create_segmenter(detector, model) if detector == "upernet" else create_detector(detector, model)


def heads(detector: str, widths: Iterable[int]) -> dict[str, Tensor]:
    """Neck and heads of a published detector on maps of these widths, empty."""
    shapes = dict(goldens.load(HEADS[detector]).facts["keys"])
    if detector == "upernet":
        *laterals, last = widths
        for i, width in enumerate(laterals):
            shapes[f"decode_head.lateral_convs.{i}.conv.weight"][1] = width
        for i in range(4):
            shapes[f"decode_head.psp_modules.{i}.1.conv.weight"][1] = last
        shapes["decode_head.bottleneck.conv.weight"][1] = last + 4 * 512
        shapes["auxiliary_head.convs.0.conv.weight"][1] = width
        return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    for i, width in enumerate(widths):
        shapes[f"neck.lateral_convs.{i}.conv.weight"][1] = width
    if detector == "retinanet":
        shapes["neck.fpn_convs.3.conv.weight"][1] = width
    if detector == "faster-rcnn":
        shapes = {key: shape for key, shape in shapes.items() if ".mask_head." not in key}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def backbone(golden: str, widths: Iterable[int]) -> dict[str, Tensor]:
    """A published backbone, with norms of its maps where the classifier of the golden has none, empty."""
    entries = goldens.load(golden).facts["state_dict"]
    state = {f"backbone.{key}": torch.empty(shape, device="meta") for key, shape in entries}
    norms = {} if golden.endswith(("detection", "segmentation")) else dict(enumerate(widths))
    out = {
        f"outnorm{i}.{part}": torch.empty(width, device="meta")
        for i, width in norms.items()
        for part in ("weight", "bias")
    }
    state |= {f"backbone.{key}": value for key, value in out.items()}
    return {key: value for key, value in state.items() if not key.startswith("backbone.classifier.")}


@pytest.mark.parametrize(
    ("detector", "golden", "model", "widths"),
    [
        ("mask-rcnn", "vmamba_tiny_s1l8", "vmamba_tiny", (96, 192, 384, 768)),
        ("faster-rcnn", "vmamba_tiny_s1l8", "vmamba_tiny", (96, 192, 384, 768)),
        ("mask-rcnn", "sparx_mamba_t_detection", "sparx_mamba_tiny", (96, 192, 320, 512)),
        ("mask-rcnn", "efficientvmamba_tiny", "efficient_vmamba_tiny", (48, 96, 192, 384)),
        ("retinanet", "efficientvmamba_tiny", "efficient_vmamba_tiny", (48, 96, 192, 384)),
        ("upernet", "vmamba_tiny_s1l8", "vmamba_tiny", (96, 192, 384, 768)),
        ("upernet", "sparx_mamba_t_segmentation", "sparx_mamba_tiny", (96, 192, 320, 512)),
        ("upernet", "efficientvmamba_tiny", "efficient_vmamba_tiny", (48, 96, 192, 384)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_published_key_fits(detector: str, golden: str, model: str, widths: tuple[int, ...]) -> None:
    levels = widths[1:] if detector == "retinanet" else widths
    state = {**backbone(golden, widths), **heads(detector, levels)}
    assert detector_of(state) == detector
    ours = convert_detector(model, state)
    check_fit(on_meta(detector, model), ours)
    assert detector_of(ours) == detector
    assert convert_detector(model, ours).keys() == ours.keys()
    used = [name for names in trace_detector(model, state).values() for name in names]
    assert sorted(used) == sorted(state)


class HistoryBuffer:
    """Stands for the class that mmengine's runner leaves in its files."""


@pytest.fixture
def runner_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Path]:
    """A small detector, and its file as mmengine's runner writes it, with a class that is not installed."""
    detector = create_detector("faster-rcnn", "vmamba_atto")
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    monkeypatch.setattr(HistoryBuffer, "__module__", module.__name__)
    with monkeypatch.context() as installed:
        for name in ("mmengine", "mmengine.logging", module.__name__):
            installed.setitem(sys.modules, name, module)
        content = {
            "meta": {"epoch": 12},
            "state_dict": official_detector(detector.state_dict()),
            "message_hub": {"log_scalars": {"loss": HistoryBuffer()}},
        }
        torch.save(content, tmp_path / "epoch_12.pth")
    return detector, tmp_path / "epoch_12.pth"


def test_the_file_of_a_runner(runner_file: tuple[Any, Path]) -> None:
    detector, path = runner_file
    checkpoint = read_checkpoint(path)
    assert checkpoint.placeholders == ("mmengine.logging.history_buffer.HistoryBuffer",)
    ours = convert_detector("vmamba_atto", checkpoint.state)
    again = create_detector("faster-rcnn", "vmamba_atto")
    load_strict(again, ours)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in detector.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("backbone.outnorm0.bias"), "1 missing: backbone.model.feature_norms.0.bias"),
        (lambda state: state.pop("neck.fpn_convs.4.conv.bias"), "1 missing: fpn.extra_blocks.p7.bias"),
        (
            lambda state: state.update({"bbox_head.scales.0.scale": torch.ones(1)}),
            "1 unexpected: bbox_head.scales.0.scale",
        ),
        (
            lambda state: state.update({"bbox_head.retina_reg.bias": torch.ones(4)}),
            r"1 of another shape: head.regression_head.bbox_reg.bias \(file \(4,\), model \(36,\)\)",
        ),
    ],
    ids=["unused-norm", "missing", "unexpected", "shape"],
)
def test_strict_loading_lists_what_does_not_fit(change: Any, message: str) -> None:
    widths = (48, 96, 192, 384)
    state = {**backbone("efficientvmamba_tiny", widths), **heads("retinanet", widths[1:])}
    change(state)
    with pytest.raises(CheckpointError, match=f"do not fit RetinaNet: {message}"):
        check_fit(on_meta("retinanet", "efficient_vmamba_tiny"), convert_detector("efficient_vmamba_tiny", state))


@pytest.mark.parametrize("name", ["classifier.head.weight", "mlp_head.weight", "backbone.norm.weight"])
def test_what_is_no_detector(name: str) -> None:
    assert detector_of([name]) is None


@pytest.mark.parametrize(
    ("golden", "model"),
    [
        ("vmamba_tiny_s1l8", "vmamba_tiny"),
        ("sparx_mamba_t", "sparx_mamba_tiny"),
        ("sparx_mamba_b", "sparx_mamba_base"),
        ("sparx_mamba_t_detection", "sparx_mamba_tiny"),
        ("efficientvmamba_base", "efficient_vmamba_base"),
        ("groupmamba_t", "group_mamba_tiny"),
    ],
    ids=lambda value: value,
)
def test_published_names_are_what_the_conversion_reads(golden: str, model: str) -> None:
    state = {key: torch.empty(shape, device="meta") for key, shape in goldens.load(golden).facts["state_dict"]}
    traced = trace_official(model, state)
    found = published_names(model, traced)
    other = {key for key, theirs in traced.items() if sorted(found[key]) != sorted(theirs)}
    # The place of one merging of patches depends on the depth of its stage.
    assert other == {key for key in traced if golden.startswith("efficient") and key.startswith("stages.3.downsample")}


@pytest.mark.parametrize(("model", "exempt"), [("vmamba_tiny", 84 + 8), ("sparx_mamba_tiny", 100)])
def test_what_upernet_does_not_decay(model: str, exempt: int) -> None:
    segmenter = on_meta("upernet", model)
    found = segmenter.published_no_weight_decay()
    assert len(found) == exempt  # batch norms of the heads are called bn, and decayed
    assert all(name.startswith("backbone.model.") for name in found)


# The counts are those of mmengine's optimizer.
@pytest.mark.parametrize(
    ("golden", "model", "exempt", "flat"),
    [("vmamba_tiny_s1l8", "vmamba_tiny", 84 + 8, 57), ("sparx_mamba_t_detection", "sparx_mamba_tiny", 100, 229)],
    ids=["vmamba", "sparx"],
)
def test_what_mask_rcnn_does_not_decay(golden: str, model: str, exempt: int, flat: int) -> None:
    detector = on_meta("mask-rcnn", model)
    parameters = {name for name, _ in detector.named_parameters()}
    found = detector_no_decay(detector, model)
    assert len(found) == exempt
    assert all(name in parameters and name.startswith("backbone.model.") for name in found)
    assert len([name for name in found if ".feature_norms." in name]) == 8
    dims = {f"backbone.{key}": len(shape) for key, shape in goldens.load(golden).facts["state_dict"]}
    traced = trace_detector(model, {key: value for key, value in detector.state_dict().items() if key in parameters})
    published = published_names(model, [name.removeprefix("backbone.model.") for name in traced if "model." in name])
    decayed = {ours: f"backbone.{key}" for ours, (key,) in published.items() if f"backbone.model.{ours}" not in found}
    assert len([key for key in decayed.values() if dims[key] == 1]) == flat
    assert {"stem.norm1.weight", "stages.1.downsample.norm.weight"} <= decayed.keys()  # numbers in the published names


@pytest.mark.parametrize("model", ["vim2_atto", "sparx_swin_atto", "resnet18", "convnext_atto", "group_mamba_atto"])
def test_other_backbones_go_by_their_own_names(model: str) -> None:
    detector = on_meta("mask-rcnn", model)
    named = {name for name, _ in detector.named_parameters() if "norm" in name}
    found = detector_no_decay(detector, model)
    if model == "group_mamba_atto":  # those of its stem have numbers in the published names
        assert named - found == {name for name in named if ".stem.norm" in name and ".norm4" not in name}
        assert found <= named
    else:
        assert found == named


def test_retinanet_decays_all() -> None:
    assert detector_no_decay(on_meta("retinanet", "efficient_vmamba_tiny"), "efficient_vmamba_tiny") == set()


# As counted from the published keys; SparX with one scale for each aggregator.
PARAMETERS = {
    ("vmamba_tiny", "mask-rcnn"): 49_755_312,
    ("vmamba_tiny_s2l5", "mask-rcnn"): 50_212_080,
    ("vmamba_small", "mask-rcnn"): 69_654_000,
    ("vmamba_base", "mask-rcnn"): 107_931_376,
    ("sparx_mamba_tiny", "mask-rcnn"): 46_731_994 + 7,
    ("sparx_mamba_small", "mask-rcnn"): 67_103_168 + 9,
    ("sparx_mamba_base", "mask-rcnn"): 103_162_296 + 9,
    ("efficient_vmamba_tiny", "mask-rcnn"): 26_198_916,
    ("efficient_vmamba_small", "mask-rcnn"): 30_912_608,
    ("efficient_vmamba_base", "mask-rcnn"): 53_223_384,
    ("efficient_vmamba_tiny", "retinanet"): 15_990_664,
    ("efficient_vmamba_small", "retinanet"): 20_995_172,
    ("efficient_vmamba_base", "retinanet"): 43_887_580,
}
# Rows whose published cost cannot be that of the network, and which say so.
MISFITS = {
    ("vmamba_small", "mask-rcnn"): ["flops"],
    ("efficient_vmamba_tiny", "mask-rcnn"): ["parameters", "flops"],
    ("efficient_vmamba_tiny", "retinanet"): ["parameters"],
    ("efficient_vmamba_small", "retinanet"): ["parameters"],
}
UNCOUNTED = {("group_mamba_tiny", "mask-rcnn"), ("vim2_tiny", "mask-rcnn"), ("vim2_small", "mask-rcnn")}


@pytest.mark.parametrize(("model", "detector"), PARAMETERS, ids=str)
def test_parameters_and_flops_of_what_is_published(model: str, detector: str) -> None:
    made = on_meta(detector, model)
    assert sum(p.numel() for p in made.parameters()) == PARAMETERS[model, detector]
    result = next(r for r in PUBLISHED_DETECTORS if (r.model, r.detector) == (model, detector))
    fits = {}
    if result.parameters:
        fits["parameters"] = PARAMETERS[model, detector] / 1e6 == pytest.approx(result.parameters, rel=0.01)
    if result.flops and not model.endswith("_base"):  # counting takes seconds
        counted = complexity(made, (3, 800, 1280)).paper_ops / 1e9
        fits["flops"] = counted == pytest.approx(result.flops, rel=0.01)
    assert [name for name, fit in fits.items() if not fit] == MISFITS.get((model, detector), [])
    assert (result.note is not None) == ((model, detector) in MISFITS)


def test_published_results() -> None:
    kinds = {(result.model, result.detector) for result in PUBLISHED_DETECTORS}
    assert kinds == PARAMETERS.keys() | UNCOUNTED
    facts = {entry["checkpoint"]: entry for entry in goldens.load("maskrcnn").facts["published"]}
    found = {result.weights: result for result in PUBLISHED_DETECTORS if result.weights}
    assert found.keys() == facts.keys()
    for url, result in found.items():
        entry = facts[url]
        assert (result.box_ap, result.mask_ap) == (entry["box_ap"], entry["mask_ap"])
        assert result.schedule == entry["schedule"]


# UPerNet, in the same way.
SEGMENTERS = {
    "vmamba_tiny": 61_902_572,
    "vmamba_tiny_s2l5": 62_359_340,
    "vmamba_small": 81_801_260,
    "vmamba_base": 122_069_292,
    "sparx_mamba_tiny": 57_077_014,
    "sparx_mamba_small": 77_673_468,
    "sparx_mamba_base": 114_513_908,
    "efficient_vmamba_tiny": 35_360_192,
    "efficient_vmamba_small": 41_069_212,
    "efficient_vmamba_base": 65_370_644,
}


@pytest.mark.parametrize("model", SEGMENTERS)
def test_parameters_and_flops_of_published_segmenters(model: str) -> None:
    made = on_meta("upernet", model)
    assert sum(p.numel() for p in made.parameters()) == SEGMENTERS[model]
    (result,) = (r for r in PUBLISHED_SEGMENTERS if r.model == model)
    if result.parameters is not None:
        fits = SEGMENTERS[model] / 1e6 == pytest.approx(result.parameters, rel=0.01)
        assert fits == (result.note is None)
    if model == "vmamba_tiny":
        assert complexity(made, (3, 512, 2048)).paper_ops / 1e9 == pytest.approx(result.flops, rel=0.01)


def test_published_results_of_segmenters() -> None:
    uncounted = {"group_mamba_tiny", "vim2_tiny", "vim2_small"}
    assert {result.model for result in PUBLISHED_SEGMENTERS} == SEGMENTERS.keys() | uncounted
    facts = {entry["checkpoint"]: entry for entry in goldens.load("upernet").facts["published"]}
    found = {result.weights: result for result in PUBLISHED_SEGMENTERS if result.weights}
    assert found.keys() == facts.keys()
    for url, result in found.items():
        assert (result.miou, result.miou_ms) == (facts[url]["miou_single"], facts[url]["miou_multi"])
