"""Effective receptive fields: known ones of convolutions, areas by hand, and models."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from short_runs import SEGMENTER
from vision_ssm.analysis.fields import ERF, centered_squares, effective_receptive_field
from vision_ssm.cli import main
from vision_ssm.detectors import create_detector, create_segmenter
from vision_ssm.engine.weights import save_weights
from vision_ssm.errors import InputError
from vision_ssm.recipes import small
from vision_ssm.tasks.classification import Classification, ClassifierSpec


class Convolutions(nn.Module):
    """3x3 convolutions of one channel with weights of 1, each a block."""

    def __init__(self, count, stride=1):
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Conv2d(1, 1, 3, stride, padding=1, padding_mode="zeros", bias=False) for _ in range(count))
        )
        for block in self.blocks:
            nn.init.ones_(block.weight)

    def forward(self, x):
        return self.blocks(x)


@pytest.mark.parametrize("side", [15, 16], ids=["odd", "even"])
def test_field_of_convolutions(side):
    field = effective_receptive_field(Convolutions(3), [torch.rand(2, 1, side, side)], normalization="none").fields[0]
    weights = np.array([1.0])
    for _ in range(3):
        weights = np.convolve(weights, [1, 1, 1])  # 1 3 6 7 6 3 1
    expected = np.zeros((side, side))
    expected[side // 2 - 3 : side // 2 + 4, side // 2 - 3 : side // 2 + 4] = np.outer(weights, weights)
    assert np.array_equal(field.values, expected)
    assert (field.map_size, field.images) == ((side, side), 2)


def test_strides_keep_the_center():
    field = effective_receptive_field(Convolutions(2, stride=2), [torch.rand(1, 1, 32, 32)]).fields[0]
    rows = np.flatnonzero(field.values.sum(1))
    assert (rows[0], rows[-1]) == (16 - 3, 16 + 3)
    assert field.values.max() == 1


def test_fields_of_other_positions():
    how = dict(normalization="none", position=(0.25, 1.0))
    (field,) = effective_receptive_field(Convolutions(1), [torch.rand(1, 1, 16, 12)], **how).fields
    expected = np.zeros((16, 12))
    expected[3:6, 10:] = 1
    assert np.array_equal(field.values, expected)
    # The square of 3x3 pixels ends at the border.
    assert centered_squares(field.values, (0.1, 1), (0.25, 1.0)) == [(1, 1 / 192), (3, 6 / 192)]
    assert "row 25%, column 100%" in ERF((field,), "none").plot().get_suptitle()
    with pytest.raises(InputError, match=r"position must lie between 0 and 1.*got 0 -0.1"):
        effective_receptive_field(Convolutions(1), [torch.rand(1, 1, 9, 9)], position=(0, -0.1))


@pytest.mark.parametrize("normalization", ["max", "sum"])
def test_normalization(normalization):
    (field,) = effective_receptive_field(Convolutions(2), [torch.rand(1, 1, 9, 9)], normalization=normalization).fields
    assert getattr(field.values, normalization)() == pytest.approx(1)


def test_areas_by_hand():
    values = np.zeros((5, 6))
    values[2, 3], values[2, 2], values[4, 0] = 4, 5, 1  # the center is in row 2, column 3
    # Squares of 1, 3x3, 5x5 and 7x7 pixels, the last one beyond the image, whose longer side it is cut to.
    assert centered_squares(values, (0.4, 0.41, 0.9, 0.91, 1)) == [
        (1, 1 / 30), (3, 9 / 30), (3, 9 / 30), (6, 1), (6, 1),
    ]  # fmt: skip
    assert centered_squares(np.ones((5, 5)), (0.2, 0.99)) == [(3, 9 / 25), (5, 1)]


@pytest.mark.parametrize("name", ["vmamba_atto", "group_mamba_atto", "test_convnext"])
def test_stages_of_models(name):
    model = timm.create_model(name)
    erf = effective_receptive_field(model, torch.randn(3, 3, 33, 40).split(2), [0, 2], name=name)
    assert [(field.stage, field.values.shape, field.images) for field in erf.fields] == [
        (0, (33, 40), 3),
        (2, (33, 40), 3),
    ]
    assert model.training
    first, last = (row["area_99"] for row in erf.rows())
    assert 0 < first <= 1
    assert 0 < last <= 1
    assert first <= last or name != "vmamba_atto"
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("create", [create_segmenter, create_detector], ids=["segmenter", "detector"])
def test_backbones_of_dense_models(create):
    args = dict(model=SEGMENTER["model"], model_args=SEGMENTER["model_args"], num_classes=3, width=16)
    model = create({create_segmenter: "upernet", create_detector: "retinanet"}[create], **args)
    erf = effective_receptive_field(model, [torch.randn(1, 3, 64, 64)])
    assert [field.stage for field in erf.fields] == list(range(len(model.backbone.feature_info.channels())))


def test_side_by_side(tmp_path):
    results = [
        effective_receptive_field(timm.create_model("vmamba_atto"), [torch.randn(1, 3, side, side)], name=name)
        for name, side in (("before", 32), ("after", 48))
    ]
    both = ERF(results[0].fields + results[1].fields, "max")
    figure = both.plot()
    assert [axes.get_ylabel() for axes in figure.axes[:8:4]] == ["pixels of before", "pixels of after"]
    assert "maximum" in figure.axes[-1].get_ylabel()
    last = ERF(tuple(field for field in both.fields if field.stage == 3), "max").plot()
    assert [axes.get_ylabel() for axes in last.axes[:2]] == ["pixels of before", "pixels of after"]
    assert last.axes[0].get_subplotspec().rowspan == last.axes[1].get_subplotspec().rowspan
    png, csv, npz = both.save(tmp_path / "erf")
    assert png.exists()
    assert len(csv.read_text().splitlines()) == 9
    assert np.array_equal(np.load(npz)["after stage 3"], both.fields[-1].values)


@pytest.mark.parametrize(
    ("model", "batches", "stages", "problem"),
    [
        (Convolutions(1), [torch.ones(1, 1, 8, 8)], [1], "stages 0 to 0, not 1"),
        (Convolutions(1), [], None, "no images"),
        (Convolutions(1), [torch.ones(1, 1, 8, 8), torch.ones(1, 1, 9, 8)], None, "one size"),
        (nn.Sequential(nn.ReLU()), [torch.zeros(1, 1, 8, 8)], None, "no blocks"),
        (nn.ModuleDict({"x": nn.ReLU()}), [torch.zeros(1, 1, 8, 8)], None, "no blocks"),
    ],
    ids=["stage", "nothing", "sizes", "no maps", "container"],
)
def test_refused(model, batches, stages, problem):
    with pytest.raises(InputError, match=problem):
        effective_receptive_field(model, batches, stages)


def test_command(images, tmp_path, capsys):
    words = ["vmamba_atto=random", "vim2_atto=random", "--data", str(images), "--images", "3", "--size", "24", "32"]
    code = main(["analyze", "erf", *words, "--stages", "1", "3", "--out", str(tmp_path), "--device", "cpu", "--json"])
    assert code == 0
    out = capsys.readouterr().out
    assert '"area_50"' in out
    assert '"input": "24x32"' in out
    assert (tmp_path / "erf.png").stat().st_size > 10_000


def test_command_before_and_after_training(images, tmp_path):
    spec = ClassifierSpec.from_config(small(model="vmamba_atto", img_size=32), ("blue", "green", "red"))
    words = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors", "b.safetensors=random")]
    for seed, file in enumerate(words[:2]):
        torch.manual_seed(seed)
        save_weights(Path(file), Classification.create_model(spec).state_dict(), "classification", spec)
    words += ["--stages", "-2", "--images", "4", "--data", str(images), "--device", "cpu", "--out", str(tmp_path)]
    assert main(["analyze", "erf", *words]) == 0
    fields = np.load(tmp_path / "erf.npz")
    first, second, new = (fields[f"{Path(word).name} stage 2"] for word in words[:3])
    assert np.array_equal(new, first)
    assert not np.array_equal(new, second)


def test_command_refuses(images, tmp_path, capsys):
    words = ["--data", str(images), "--out", str(tmp_path), "--images", "1", "--device", "cpu"]
    assert main(["analyze", "erf", "vmamba_atto=random", "--stages", "7", *words]) == 2
    assert main(["analyze", "erf", *words]) == 2
    assert main(["analyze", "erf", "test_vit=random", "--size", "100", *words]) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert "there are stages 0 to 3, not 7" in first
    assert "name at least one model" in second
    assert "test_vit=random fails on images of 100x100" in third
