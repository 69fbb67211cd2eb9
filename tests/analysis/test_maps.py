"""Pictures of maps, and class activation."""

import csv

import numpy as np
import pytest
import timm
import torch
from torch import nn

from scenes import write_masks
from short_runs import SEGMENTER
from vision_ssm.analysis.maps import (
    class_activation,
    mean_absolute_activation,
    most_varying_channel,
    principal_components,
    stage_maps,
    unnormalize,
)
from vision_ssm.cli import main
from vision_ssm.errors import InputError
from vision_ssm.recipes import segment
from vision_ssm.tasks import train


@pytest.mark.parametrize(
    ("show", "shape"),
    [(mean_absolute_activation, (5, 6)), (most_varying_channel, (5, 6)), (principal_components, (5, 6, 3))],
    ids=["mean", "channel", "components"],
)
def test_stage_maps(show, shape):
    result = stage_maps(timm.create_model("vmamba_atto"), torch.randn(3, 3, 20, 22), [1, 3], show=show, name="x")
    assert [x.shape for x in result.maps[2]] == [shape, (2, 2, *shape[2:])]
    assert all(0 <= x.min() <= x.max() <= 1 for line in result.maps for x in line)
    assert [(row["image"], row["stage"], row["channels"]) for row in result.rows()][:2] == [("0", 1, 64), ("0", 3, 128)]
    figure = result.plot()
    assert len(figure.axes) == 9
    assert show.__name__.replace("_", " ") in figure.get_suptitle()


def test_the_channel_is_that_of_the_largest_variance():
    x = torch.stack([torch.full((4, 4), 9.0), torch.arange(16.0).view(4, 4), torch.rand(4, 4)])
    (picture,) = most_varying_channel([x])
    assert np.corrcoef(picture.ravel(), np.arange(16))[0, 1] > 0.99


def test_components_show_the_directions_in_which_places_differ():
    x = torch.zeros(8, 4, 4)
    x[5, :2] = 10  # the upper half differs from the lower one in one channel
    (picture,) = principal_components([x])
    assert len(np.unique(picture[..., 0].round(3))) == 2
    assert picture[..., 1:].std() < 0.01


def test_unnormalize():
    pixels = np.random.default_rng(0).random((4, 5, 3))
    x = torch.from_numpy(((pixels - 0.4) / 0.2).transpose(2, 0, 1))
    assert unnormalize(x, (0.4,) * 3, (0.2,) * 3) == pytest.approx(pixels, abs=1e-6)


class Bright(nn.Module):
    """A classifier of two classes whose only map is the image: class 1 wins where it is bright."""

    def __init__(self):
        super().__init__()
        self.feature_info = [{"module": "stage"}]
        self.stage = nn.Conv2d(3, 1, 1, bias=False)
        nn.init.ones_(self.stage.weight)

    def forward(self, x):
        mean = self.stage(x).mean((2, 3))
        return torch.cat([-mean, mean], 1)


def test_activation_is_where_the_class_is():
    image = torch.zeros(3, 8, 8)
    image[:, :4, 4:] = 1
    model = Bright().requires_grad_(False)
    ((found,),) = class_activation(model, [image], class_names=("dark", "bright")).activations
    assert (found.class_name, found.label, found.predicted) == ("bright", 1, True)
    assert found.score == pytest.approx(torch.softmax(model(image[None]), 1)[0, 1].item())
    assert found.values == pytest.approx(image[0].numpy(), abs=1e-5)


@pytest.mark.parametrize("name", ["vmamba_atto", "vim2_atto", "test_vit", "resnet10t"])
def test_classifiers(name):
    model = timm.create_model(name, num_classes=5)
    side = {"test_vit": 160, "resnet10t": 64}.get(name, 32)
    result = class_activation(model, torch.randn(2, 3, side, side), [1, 3], name=name)
    assert [row["label"] for row in result.rows()] == [1, 3, 1, 3]
    assert result.activations[0][0].values.shape == (side, side)
    assert any(each.values.max() > 0.9 for line in result.activations for each in line)
    assert model.training


@pytest.mark.parametrize(
    ("model", "how", "problem"),
    [
        ("vmamba_atto", dict(method="GradCam"), "got GradCam; did you mean GradCAM"),
        ("vmamba_atto", dict(classes=[10]), "classes 0 to 9, not 10"),
        ("vmamba_atto", dict(stage=4), "stages 0 to 3, not 4"),
        ("resnet10t", {}, "map of stage 4 of an image of 32x32 has one position"),
        (nn.Conv2d(3, 3, 1), {}, "does not define its stages"),
    ],
    ids=["method", "class", "stage", "one place", "no stages"],
)
def test_activation_refused(model, how, problem):
    model = timm.create_model(model, num_classes=10) if isinstance(model, str) else model
    with pytest.raises(InputError, match=problem):
        class_activation(model, torch.randn(1, 3, 32, 32), **how)


def run(capsys, *words):
    code = main(["analyze", *map(str, words), "--device", "cpu"])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_commands_for_classifiers(images, tmp_path, capsys):
    where = ["--data", images / "red", "--images", 2, "--out", tmp_path]
    assert run(capsys, "features", "sparx_mamba_atto=random", "--show", "components", *where)[0] == 0
    assert run(capsys, "cam", "vmamba_atto=random", "--classes", 3, *where)[0] == 0
    with (tmp_path / "cam.csv").open() as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["3", "3"]
    assert (tmp_path / "features.png").exists()
    code, _, err = run(capsys, "cam", "vmamba_atto=random", "--classes", "tiger", *where)
    assert code == 2
    assert "there is no class tiger among the" in err


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    root = tmp_path_factory.mktemp("segmenter")
    data = write_masks(root / "data")
    train(segment(data=str(data), **SEGMENTER | dict(epochs=1)), root / "run")
    return root / "run"


@pytest.mark.parametrize("analysis", ["features", "cam", "cka"])
def test_commands_for_a_segmenter_on_its_own_images(segmenter, analysis, tmp_path, capsys):
    more = ["--classes", "disc", "ground"] if analysis == "cam" else []
    code, out, err = run(capsys, analysis, segmenter, *more, "--out", tmp_path)
    assert code == 0, err
    assert str(tmp_path / f"{analysis}.png") in out
