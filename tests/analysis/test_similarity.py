"""Linear CKA: the estimator against its published form, and blocks of models."""

import numpy as np
import pytest
import timm
import torch

from vision_ssm.analysis.similarity import cka, linear_cka
from vision_ssm.cli import main
from vision_ssm.errors import InputError


def features(images, channels, seed):
    return torch.randn(images, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hsic(x, y):
    """HSIC_1 as Song et al. 2012 write it (equation 5)."""
    n = len(x)
    k, m = (z @ z.T * (1 - torch.eye(n, dtype=z.dtype)) for z in (x, y))
    one = torch.ones(n, dtype=x.dtype)
    last = one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    return (torch.trace(k @ m) + last) / (n * (n - 3))


def test_closed_form_of_small_features():
    x, y = features(6, 3, 0), features(6, 5, 1)
    y[:, 0] += 2 * x[:, 0] + 3
    assert linear_cka(x, y) == pytest.approx((hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()).item(), abs=1e-12)


def test_invariant_to_rotation_scale_and_shift_and_to_nothing_else():
    x, y = features(20, 7, 0), features(20, 4, 1) + features(20, 7, 0)[:, :4]
    rotation = torch.linalg.qr(features(7, 7, 2)).Q
    value = linear_cka(x, y)
    assert linear_cka(-3 * x @ rotation + 5, y) == pytest.approx(value, abs=1e-12)
    assert linear_cka(x, x @ rotation) == pytest.approx(1, abs=1e-12)
    assert abs(linear_cka(x @ torch.diag(torch.arange(1.0, 8).double() ** 2), y) - value) > 0.01


def test_about_0_for_independent_features_in_spite_of_many_channels():
    assert abs(np.mean([linear_cka(features(16, 300, i), features(16, 300, 1000 + i)) for i in range(40)])) < 0.02


class Net(torch.nn.Module):
    """Two blocks; the second one is a fixed random layer."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(12, 12))

    def forward(self, x):
        return torch.relu(self.blocks(x.flatten(1)))


def test_batches_are_averaged_close_to_the_whole():
    net, images = Net().eval(), torch.randn(512, 12) * torch.linspace(0.2, 3, 12)
    whole, parts = cka(net, [images]), cka(net, images.split(16))
    with torch.no_grad():
        expected = linear_cka(images, net.blocks(images))
    assert whole.values[0, 1] == pytest.approx(expected, abs=1e-5)
    assert parts.values[0, 1] == pytest.approx(expected, abs=0.03)
    assert (parts.images, parts.batch_size) == (512, 16)


@pytest.mark.parametrize("name", ["vmamba_atto", "vim2_atto", "test_convnext"])
def test_a_model_with_itself(name):
    model = timm.create_model(name).train()
    result = cka(model, [torch.randn(6, 3, 32, 32)], names=(name, ""))
    assert result.values.diagonal() == pytest.approx(1)
    assert np.allclose(result.values, result.values.T)
    assert result.models == (name, name)
    assert model.training
    assert len(result.rows()) == len(result.blocks[0]) ** 2
    assert not any(row["block"] == row["most_similar"] for row in result.nearest())


def test_two_models_with_inputs_of_their_own():
    first, second = timm.create_model("vmamba_atto"), timm.create_model("test_convnext")
    x = torch.randn(8, 3, 32, 32)
    larger = torch.nn.functional.interpolate(x, (48, 48))
    result = cka(first, x.split(4), second, larger.split(4), names=("a", "b"))
    assert result.values.shape == (len(result.blocks[0]), len(result.blocks[1]))
    axes = result.plot().axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("block of a", "block of b")
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(result.blocks[0])


@pytest.mark.parametrize(
    ("batches", "problem"),
    [([torch.randn(3, 3, 32, 32)], "at least 4 images in every batch, got 3"), ([], "no images")],
    ids=["batch of 3", "nothing"],
)
def test_refused(batches, problem):
    with pytest.raises(InputError, match=problem):
        cka(timm.create_model("vmamba_atto"), batches)


def test_features_of_other_images_are_refused():
    with pytest.raises(InputError, match="got 5 and 6"):
        linear_cka(torch.randn(5, 2), torch.randn(6, 2))


def test_command(images, tmp_path, capsys):
    words = ["analyze", "cka", "vmamba_atto=random", "vim2_atto=random", "--device", "cpu"]
    assert main([*words, "--data", str(images), "--images", "9", "--batch-size", "4", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "most_similar" in shown
    assert str(tmp_path / "cka.png") in shown
    lines = (tmp_path / "cka.csv").read_text().splitlines()
    assert lines[0] == "block,other_block,cka"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["a=random", "b=random", "c=random"], "takes one or two models or runs, got 3"),
        (["vmamba_atto=random", "--images", "3"], "at least 4 images, got 3"),
        (["vmamba_atto=random", "--batch-size", "2"], "--batch-size must be at least 4, got 2"),
    ],
    ids=["three models", "three images", "batch of 2"],
)
def test_command_refuses(images, words, problem, tmp_path, capsys):
    assert main(["analyze", "cka", *words, "--data", str(images), "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert problem in capsys.readouterr().err
