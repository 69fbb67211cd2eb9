"""Counting operations against the published counts, drawing, and timing."""

import json
from pathlib import Path

import pytest
import timm
import torch

from vision_ssm.analysis import complexity, draw_routes, feature_shapes, machine_settings, measure_speed
from vision_ssm.scan import ATROUS_SCAN, CROSS_SCAN, Diagonal, Shifted, Snake, available_backends

GOLDENS = Path(__file__).parents[1] / "goldens"
PUBLISHED = {
    "vmamba_tiny": "vmamba_tiny_s1l8",
    "vmamba_small": "vmamba_small_s2l15",
    "vmamba_base": "vmamba_base_s2l15",
    "vmamba_tiny_s2l5": "vmamba_tiny_s2l5",
    "vmamba_small_s1l20": "vmamba_small_s1l20",
    "vmamba_base_s1l20": "vmamba_base_s1l20",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_published_code(name):
    golden = json.loads((GOLDENS / f"{PUBLISHED[name]}.json").read_text())
    cost = complexity(timm.create_model(name, device="meta"))
    assert cost.parameters == golden["num_params"]
    assert cost.macs == golden["flops"]["mac"]
    assert cost.paper_ops == golden["flops"]["flops_fvcore"]


def test_the_three_counts_of_a_known_network():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1)
    )
    cost = complexity(network, (3, 6, 5), batch=2)
    macs = 2 * 30 * 4 * 27
    assert (cost.parameters, cost.macs, cost.flops) == (120, macs, 2 * macs)
    assert cost.paper_ops == macs + 2 * 30 * 4 * (2 + 1)


def test_counting_leaves_the_model_alone():
    model = timm.create_model("vmamba_atto")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    complexity(model, (3, 32, 32))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_feature_shapes_of_an_odd_image():
    assert feature_shapes(timm.create_model("vmamba_atto"), (3, 33, 50)) == [
        (32, 17, 25),
        (64, 9, 13),
        (96, 5, 7),
        (128, 3, 4),
    ]


def test_draw_routes(tmp_path):
    figure = draw_routes((*CROSS_SCAN, *ATROUS_SCAN, Diagonal(), Shifted(Snake())), 5, 6, columns=5)
    assert [axes.get_title() for axes in figure.axes][-2:] == ["Diagonal", "Shifted(Snake)"]
    figure.savefig(tmp_path / "routes.png")
    assert (tmp_path / "routes.png").stat().st_size > 10_000


@pytest.mark.parametrize(("paths", "height"), [((), 4), (CROSS_SCAN, 0)], ids=["no paths", "empty map"])
def test_draw_routes_refuses(paths, height):
    with pytest.raises(ValueError, match=r"at least (one|1)"):
        draw_routes(paths, height, 4)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_measure_speed(training):
    speed = measure_speed(timm.create_model("vmamba_atto"), 2, 32, 32, training=training, seconds=0.05)
    assert speed.images_per_second == pytest.approx(2 / speed.milliseconds * 1e3)
    assert speed.peak_memory_mib > 0
    assert speed.backend in available_backends()
    assert speed.backend != "cpu"  # but with its instruction set
    assert measure_speed(timm.create_model("test_vit"), 1, 160, 160, seconds=0.01).backend is None
    assert {"device", "threads", "torch", "vision_ssm"} <= set(machine_settings(torch.device("cpu")))
