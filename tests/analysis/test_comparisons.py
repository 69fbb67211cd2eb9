"""Models compared: memory of a step, other sizes, variants with several seeds."""

from pathlib import Path

import pytest
import torch

from vision_ssm.analysis import Ablation, Bench, BenchEntry, Speed, Variant, ablate, grid, measure_resolutions
from vision_ssm.analysis.speed import peak_memory
from vision_ssm.data import read_images
from vision_ssm.errors import InputError
from vision_ssm.recipes import small
from vision_ssm.tasks.classification import Classification, ClassifierSpec

CPU = torch.device("cpu")
MIB = 2**18  # float32 numbers


def test_peak_memory_is_the_largest_sum_of_what_is_held_at_a_time():
    def step():
        first, second = torch.zeros(4 * MIB), torch.ones(8 * MIB)
        del first
        third = torch.ones(2 * MIB)
        del second, third
        torch.zeros(11 * MIB)

    assert peak_memory(step, CPU) == pytest.approx(12, abs=0.01)
    assert peak_memory(lambda: None, CPU) == 0


def bench(training=False):
    speeds = (Speed(2, 10.0, 0.1, 200.0, 30.0, "cpu"), Speed(2, 40.0, 0.1, 50.0, None, None))
    entries = [BenchEntry("a", size, size, 2, 3_000_000, 10**9, s) for size, s in zip((32, 64), speeds, strict=True)]
    return Bench((*entries, BenchEntry("a", 32, 128, 2, 3_000_000, error="no memory")), training)


def test_bench_has_timms_columns_and_draws_what_was_measured():
    row = bench().rows()[0]
    assert (row["infer_samples_per_sec"], row["infer_step_time"], row["infer_batch_size"]) == (200, 10, 2)
    assert (row["infer_img_size"], row["infer_gmacs"], row["param_count"]) == (32, 1, 3)
    failed = bench(training=True).rows()[2]
    assert (failed["train_samples_per_sec"], failed["train_img_size"], failed["error"]) == (None, 128, "no memory")
    time, memory = bench().plot().axes
    assert time.lines[0].get_xydata().tolist() == [[32, 10], [64, 40]]
    assert memory.lines[0].get_ydata()[0] == 30
    assert [label.get_text() for label in time.get_xticklabels()] == ["32", "64"]


@pytest.fixture
def task(images):
    spec = ClassifierSpec.from_config(small(model="test_vit", img_size=160), ("blue", "green", "red"))
    return Classification(Classification.create_model(spec).eval(), spec)


def test_other_sizes_are_measured_without_changing_the_model(task, images):
    few = read_images(images, task.spec.classes).subset(range(4))
    seen = []
    found = measure_resolutions({"vit": (task, few)}, (99, 160), seconds=0.01, workers=0, on_point=seen.append)
    assert tuple(seen) == found.points
    bad, good = found.rows()
    assert bad["accuracy"] is None
    assert "99" in bad["error"]
    assert (good["size"], good["own_size"], good["batch"]) == (160, 160, 1)
    assert good["accuracy"] == task.evaluate(few).metrics()["accuracy"]
    assert good["peak_memory_mib"] > 0
    assert [len(axes.lines) for axes in found.plot().axes] == [3, 2, 2]
    assert task.spec.img_size == 160


def test_sizes_that_cannot_be(task, images):
    few = read_images(images, task.spec.classes).subset(range(2))
    with pytest.raises(InputError, match="no size can be measured; vit fails at 99"):
        measure_resolutions({"vit": (task, few)}, (99,))
    with pytest.raises(InputError, match="--img-size must be at least 1 and at most 8192, got 9000"):
        measure_resolutions({"vit": (task, few)}, (9000,))
    with pytest.raises(InputError, match="models of one task"):
        measure_resolutions({}, (32,))


def test_a_grid_has_all_combinations():
    assert grid({"steps": [1, (1, 2)], "windows": [None, 3]}) == {
        "steps=1 windows=none": {"steps": 1, "windows": None},
        "steps=1 windows=3": {"steps": 1, "windows": 3},
        "steps=(1,2) windows=none": {"steps": (1, 2), "windows": None},
        "steps=(1,2) windows=3": {"steps": (1, 2), "windows": 3},
    }
    with pytest.raises(InputError, match="lr takes one or more values, each once"):
        grid({"lr": [1e-3, 0.001]})


def test_differences_are_paired_by_seed(tmp_path: Path):
    variants = [Variant(name, {"width": width}, 10 * width, 100, 2.0) for name, width in (("a", 1), ("b", 2), ("c", 3))]
    accuracy = {"a": (0.5, 0.7, 0.9), "b": (0.6, 0.9, None), "c": (None, None, None)}

    def train(variant, seed):
        if (value := accuracy[variant.name][seed]) is None:
            raise InputError("loss is\nnot finite")
        return value, 100.0 * (seed + 1)

    seen = []
    found = ablate(variants, range(3), train, on_run=seen.append)
    assert [len(each.runs) for each in seen] == list(range(1, 10))
    assert [(run.variant, run.seed) for run in found.runs[:4]] == [("a", 0), ("b", 0), ("c", 0), ("a", 1)]
    a, b, c = found.summary()
    # The sample variance of 0.5, 0.7, 0.9 is 0.04, and sqrt(0.04 / 3) = 0.11547.
    assert (a["accuracy"], a["standard_error"], a["difference"]) == (
        pytest.approx(0.7),
        pytest.approx(0.11547, 1e-4),
        None,
    )
    # b - a is 0.1 and 0.2, of variance 0.005, and sqrt(0.005 / 2) = 0.05; unpaired it would be 0.75 - 0.7.
    assert (b["seeds"], b["accuracy"], b["standard_error"]) == (2, pytest.approx(0.75), pytest.approx(0.15))
    assert (b["difference"], b["difference_error"]) == (pytest.approx(0.15), pytest.approx(0.05))
    assert (c["seeds"], c["accuracy"], c["difference"]) == (0, None, None)
    assert found.rows()[2] == {
        **{"variant": "c", "width": "3", "parameters": 30, "macs": 100, "milliseconds": 2.0},
        **{"seed": 0, "accuracy": None, "images_per_second": None, "error": "loss is not finite"},
    }
    assert [line["images_per_second"] for line in (a, b, c)] == [200, 150, None]
    assert found.plot().axes[2].get_title() == "Time"  # one that all variants have
    picture, table = found.save(tmp_path / "found")
    assert picture.stat().st_size > 10_000
    assert table.read_text().count("\n") == 10
    assert found.plot().axes[0].get_legend_handles_labels()[1] == ["a", "b", "c"]
    trained = Ablation("accuracy", tuple(variants[:2]), found.runs).plot().axes[2]
    assert trained.get_title() == "Time of training"
    assert trained.lines[0].get_xdata() == [5.0]  # ms per image


def test_a_legend_of_long_names_stays_inside_of_the_picture():
    variants = [Variant(f"atrous={a} conv_branch={b}", {}, 1, 2, 3.0) for a in (True, False) for b in (True, False)]
    figure = Ablation("accuracy", tuple(variants)).plot()
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_without_runs_there_are_costs_only():
    found = Ablation("accuracy", (Variant("a", {"width": 1}, 10, 100, 2.0),))
    assert found.rows() == [{"variant": "a", "width": "1", "parameters": 10, "macs": 100, "milliseconds": 2.0}]
    assert len(found.plot().axes) == 3
