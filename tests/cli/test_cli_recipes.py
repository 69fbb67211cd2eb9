import json

import pytest

from vision_ssm.cli import main
from vision_ssm.recipes import RECIPES


def test_list_and_full_recipe(capsys):
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in RECIPES)
    assert main(["recipes", "efficient-vmamba-*-in1k", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["model"], row["batch"], row["lr"]) for row in rows] == [
        ("efficient_vmamba_tiny", 2048, 0.002),
        ("efficient_vmamba_small", 2048, 0.002),
        ("efficient_vmamba_base", 1024, 0.002),
    ]
    assert main(["recipes", "vmamba-base-in1k"]) == 0
    shown = capsys.readouterr().out
    assert "MzeroMiko/VMamba@" in shown
    assert "--warmup-lr                5e-07" in shown
    assert "--mixup-prob               1\n" in shown
    assert "--warmup-prefix\n" in shown
    assert main(["recipes", "vmamba-base-in1k", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["lr"] == 1e-3
    assert values["values"]["lr"]["value"] == 5e-4
    assert values["values"]["drop_path_rate"]["source"].endswith("vmambav2_base_224.yaml")
    assert values["values"]["seed"] == {"value": 0, "source": None}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("recipes vmamba-tiny", "no recipe vmamba-tiny; did you mean vmamba-tiny-in1k"),
        ("recipes x*", "no recipe matches x*"),
        ("train classify --recipe finetun", "did you mean finetune"),
        ("train classify --recipe zzz", "vision-ssm recipes lists them"),
    ],
    ids=str,
)
def test_unknown_recipes(words, message, capsys):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_shows_the_defaults_of_the_recipe(capsys):
    assert main(["train", "classify", "--recipe", "sparx-mamba-base-in1k", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "SparX-Mamba as its published weights were trained" in shown
    assert "(default: sparx_mamba_base)" in shown
    assert "--no-published-decay" in shown
