"""The commands about models, as a user calls them."""

import csv
import json

import pytest
import safetensors.torch
import timm
import torch

from vision_ssm.cli import main


def run(capsys, *words):
    code = main(words)
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return code, output.out, output.err


def test_models(capsys):
    code, out, _ = run(capsys, "models", "vmamba_t*", "--json")
    rows = {row["model"]: row for row in json.loads(out)}
    assert code == 0
    assert set(rows) == {"vmamba_tiny", "vmamba_tiny_s2l5"}
    assert rows["vmamba_tiny"]["parameters"] == 30_249_064
    assert run(capsys, "models")[1].count("vmamba_") >= 7
    code, _, err = run(capsys, "models", "resnet*")
    assert code == 2
    assert "no model matches resnet*; there are " in err
    assert "vmamba_atto" in err


def test_info(capsys):
    code, out, _ = run(capsys, "info", "vmamba_tiny", "--size", "97", "130", "--json")
    values = json.loads(out)
    assert code == 0
    assert values["input_size"] == [3, 97, 130]
    assert [(s["height"], s["width"]) for s in values["stages"]] == [(25, 33), (13, 17), (7, 9), (4, 5)]
    assert "30,249,064" in run(capsys, "info", "vmamba_tiny")[1]


def test_bench(capsys, tmp_path):
    code, out, _ = run(
        capsys, "bench", "vmamba_atto", "--batch", "1", "2", "--seconds", "0.01", "--csv", str(tmp_path / "b.csv")
    )
    assert code == 0
    for setting in ("threads:", "precision: 32-true", "torch.compile: off", " cpu "):
        assert setting in out
    with (tmp_path / "b.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["batch"] for row in rows] == ["1", "2"]
    assert rows[0]["torch"] == torch.__version__


def official_atto():
    """A checkpoint of vmamba_atto under the official names, with a pickled wrapper."""
    ours = timm.create_model("vmamba_atto", num_classes=10).state_dict()
    stem = {"conv1": "0", "norm1": "2", "conv2": "5", "norm2": "7"}
    official = {}
    for key, value in ours.items():
        parts = key.split(".")
        if parts[0] == "stem":
            key = f"patch_embed.{stem[parts[1]]}.{parts[2]}"
        elif parts[0] == "stages" and parts[2] == "downsample":
            key = f"layers.{int(parts[1]) - 1}.downsample.{ {'conv': 1, 'norm': 3}[parts[3]] }.{parts[4]}"
        elif parts[0] == "stages":
            key = ".".join(["layers", *parts[1:]]).replace("norm1", "norm").replace("ss2d", "op")
            if key.endswith("dt_weight"):
                key, value = key.replace("dt_weight", "dt_projs_weight"), value.transpose(1, 2)
            elif key.endswith("dt_bias"):
                key = key.replace("dt_bias", "dt_projs_bias")
            elif key.endswith("x_proj.weight"):
                key, value = key.replace("x_proj.weight", "x_proj_weight"), value.unflatten(0, (4, -1))
            elif key.endswith(("A_log", ".D")):
                key, value = key + "s", value.flatten(0, 1)
        elif parts[0] == "head":
            key = f"classifier.head.{parts[2]}"
        else:
            key = f"classifier.norm.{parts[1]}"
        official[key] = value.contiguous()
    return ours, official


def test_convert(capsys, tmp_path):
    ours, official = official_atto()
    torch.save({"model": official, "epoch": 3}, tmp_path / "official.pth")
    out_file = tmp_path / "ours.safetensors"
    words = ("convert", str(tmp_path / "official.pth"), str(out_file), "--model", "vmamba_atto")
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert f"{len(ours)} tensors" in out
    assert "under 'model'" in out
    converted = safetensors.torch.load_file(out_file)
    assert converted.keys() == ours.keys()
    assert all(torch.equal(value, ours[key]) for key, value in converted.items())
    code, _, err = run(capsys, *words)
    assert (code, "exists; --overwrite replaces it" in err) == (2, True)


def test_convert_refuses_another_models_file(capsys, tmp_path):
    _, official = official_atto()
    torch.save(official, tmp_path / "official.pth")
    code, _, err = run(
        capsys, "convert", str(tmp_path / "official.pth"), str(tmp_path / "o.safetensors"), "--model", "vmamba_tiny"
    )
    assert code == 2
    assert "missing" in err
    assert "of another shape" in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("info", "vmamba_tinny"), "unknown model vmamba_tinny; did you mean vmamba_tiny"),
        (("info", "vmamba_tiny", "--size", "0"), "--size takes one or two positive numbers, got 0"),
        (("info", "vmamba_tiny", "--size", "1", "2", "3"), "got 1 2 3"),
        (("bench",), "name at least one model"),
        (("bench", "vmamba_atto", "--batch", "0"), "--batch must be at least 1, got 0"),
        (("bench", "vmamba_atto", "--seconds", "-1"), "--seconds must be positive"),
        (("bench", "vmamba_atto", "--device", "cuda:77"), "no device cuda:77"),
        (("convert", "none.pth", "o.safetensors", "--model", "vmamba_tiny"), "no such checkpoint file: none.pth"),
        (("convert", "none.pth", "o.bin", "--model", "vmamba_tiny"), "must end in .safetensors, got o.bin"),
        (("convert", "none.pth", "no/o.safetensors", "--model", "vmamba_tiny"), "no such folder: no"),
        (("convert", __file__, "o.safetensors", "--model", "vmamba_tiny"), "not a readable PyTorch checkpoint"),
        (("frobnicate",), "no command frobnicate; there are train"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(words, message, capsys):
    code, _, err = run(capsys, *words)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
