"""``vision-ssm ablate``: variants trained with several seeds."""

import csv
import json

import pytest

from short_runs import interrupt
from vision_ssm import recipes
from vision_ssm.cli import main
from vision_ssm.cli.ablate import change

TINY = "--model test_convnext --img-size 32 --batch-size 4 --num-workers 0 --device cpu --warmup-epochs 0 --epochs 1"
TINY += " --seconds 0.01"


def ablate(capsys, *words):
    code = main(["ablate", *map(str, words)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_runs_go_on_where_they_stopped(images, tmp_path, capsys):
    words = ("small", "--data", images, *TINY.split(), "--over", "drop_rate=0.0,0.5", "--seeds", 2, "--out", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 0, 1)
        code, out, err = ablate(capsys, *words)
        assert (code, out) == (130, "")
        assert err.endswith("\nStopped. The same command continues.\n")
    code, out, err = ablate(capsys, *words)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split(": accuracy")[0] for line in lines[:4]] == [
        *("1/4 drop_rate=0.0 seed 0", "2/4 drop_rate=0.5 seed 0"),
        *("3/4 drop_rate=0.0 seed 1", "4/4 drop_rate=0.5 seed 1"),
    ]
    assert "difference to the first" in lines[4]
    assert lines[5].split()[:2] == ["drop_rate=0.0", "0.207"]
    rows = list(csv.DictReader((tmp_path / "ablation.csv").open()))
    assert [(row["drop_rate"], row["seed"], row["error"]) for row in rows[:3]] == [
        *(("0.0", "0", ""), ("0.5", "0", ""), ("0.0", "1", ""))
    ]
    assert float(rows[0]["images_per_second"]) > 0
    assert (tmp_path / "ablation.png").stat().st_size > 10_000
    config = json.loads((tmp_path / "drop_rate=0.5-seed1" / "config.json").read_text())
    assert (config["recipe"], config["config"]["model_args"], config["config"]["seed"]) == (
        "small",
        {"drop_rate": 0.5},
        1,
    )

    weights = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/best.safetensors")}
    code, out, _ = ablate(capsys, *words, "--json")
    values = json.loads(out)
    assert code == 0
    assert [str(run["accuracy"]) for run in values["runs"]] == [row["accuracy"] for row in rows]
    assert weights == {path: path.stat().st_mtime_ns for path in weights}
    code, _, err = ablate(capsys, *words, "--lr", 1e-3)
    assert code == 2
    assert "it was started with --lr 0.002, not 0.001" in err


def test_a_run_that_fails_is_recorded(images, tmp_path, capsys):
    words = ("small", "--data", images, *TINY.split(), "--over", "lr=1e30,1e-3", "--seeds", 1, "--out", tmp_path)
    code, out, err = ablate(capsys, *words)
    assert code == 2
    assert "1/2 lr=1e+30 seed 0: failed: " in out
    assert "2/2 lr=0.001 seed 0: accuracy " in out
    assert f"1 of 2 runs failed; {tmp_path / 'ablation.csv'} says why" in err
    rows = list(csv.DictReader((tmp_path / "ablation.csv").open()))
    assert [bool(row["error"]) for row in rows] == [True, False]


def test_costs_alone_need_no_images(tmp_path, capsys):
    words = "small --measure-only --model-args dims=(8,8,16,16) --img-size 16 --num-classes 7 --seconds 0.01 --json"
    code, out, _ = ablate(capsys, *words.split(), "--over", "depths=(1,1,1,1),(1,1,2,1)", "--out", tmp_path / "new")
    one, two = json.loads(out)["variants"]
    assert code == 0
    assert (one["variant"], two["variant"]) == ("depths=(1,1,1,1)", "depths=(1,1,2,1)")
    assert one["parameters"] < two["parameters"]
    assert one["macs"] < two["macs"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["ablation.csv", "ablation.png"]


def test_named_variants_change_several_values(tmp_path, capsys):
    words = "small --measure-only --img-size 16 --num-classes 7 --seconds 0.01 --json"
    variants = ("--variant", "as it is:", "--variant", "ViM2, deep: model=vim2_atto, depths=(1,1,2,1)")
    code, out, _ = ablate(capsys, *words.split(), *variants, "--out", tmp_path)
    first, second = json.loads(out)["runs"]
    assert code == 0
    assert (first["variant"], first["model"], first["depths"]) == ("as it is", "", "")
    assert (second["variant"], second["model"], second["depths"]) == ("ViM2, deep", "vim2_atto", "(1,1,2,1)")
    assert first["parameters"] != second["parameters"]


def test_names_of_the_model_and_of_options():
    config = change(recipes.small(model="sparx_mamba_atto"), {"steps": 2, "windows": None, "lr": 1})
    assert (config.model_args, config.steps, config.lr) == ({"steps": 2, "windows": None}, None, 1)
    config = change(recipes.small(model_args={"dims": 8}), {"steps": 2, "drop_path_rate": 0.1, "model": "vmamba_atto"})
    assert (config.model_args, config.steps, config.drop_path_rate) == ({"dims": 8}, 2, 0.1)
    assert change(recipes.small(), {"model": "sparx_mamba_atto", "steps": 2}).model_args == {"steps": 2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param("smal --over lr=1", "no recipe smal", id="unknown-recipe"),
        pytest.param("small --seeds 2", "either --over or --variant", id="nothing-to-compare"),
        pytest.param("small --over lr=1 --variant a:lr=1", "either --over or --variant", id="both"),
        pytest.param("small --variant lr=1", '--variant lr=1: expected "TITLE: NAME=VALUE', id="no-title"),
        pytest.param("small --variant a!:lr=1 --variant a?:lr=2", "each title once", id="titles-of-one-folder"),
        pytest.param("small --variant a:lr=1,2", "--variant a:lr=1,2: expected NAME=VALUE", id="no-list"),
        pytest.param("small --variant a:lr=1,lr=2", "each name once", id="value-twice"),
        pytest.param("small --over lr", "--over lr: expected NAME=VALUE", id="no-values"),
        pytest.param(
            "small --over lr=1 --over lr=2", "--over lr=2: expected NAME=VALUE,..., each name once", id="twice"
        ),
        pytest.param("small --over seed=1,2", "seeds come from --seeds", id="seeds"),
        pytest.param("small --over depths=(1,2", "cannot read the value in depths=(1,2", id="broken"),
        pytest.param("small --over lr=1,1", "lr takes one or more values, each once", id="equal-values"),
        pytest.param("small --over lr=1e-3,0", "--lr must be above 0, got 0", id="limits"),
        pytest.param("small --over lr=fast", "lr must be float, got 'fast'", id="type"),
        pytest.param(
            "small --over colour=1,2 --measure-only", "colour=1: cannot make vmamba_atto", id="unknown-argument"
        ),
        pytest.param("small --over lr=1e-3", "--data", id="no-data"),
        pytest.param("small --over lr=1e-3 --devices 2", "trains in one process", id="processes"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(words, message, tmp_path, capsys):
    code, _, err = ablate(capsys, *words.split(), "--device", "cpu", "--out", tmp_path / "new")
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "new").exists()
