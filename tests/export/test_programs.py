"""Programs of torch.export: that they load without the network and compute the same, and what is refused."""

import json
import shutil

import pytest
import timm
import torch

from vision_ssm.cli import main
from vision_ssm.engine.weights import save_weights
from vision_ssm.recipes import small
from vision_ssm.tasks.classification import Classification, ClassifierSpec


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    args = dict(depths=(1,), dims=(8,))
    spec = ClassifierSpec.from_config(small(model="vmamba_atto", model_args=args), ("cat", "dog"))
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(path, Classification.create_model(spec).state_dict(), "classification", spec)
    return path


def export(capsys, *words):
    assert main(["export", "program", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_program_takes_any_size_and_says_what_it_is(weights, tmp_path, capsys, monkeypatch):
    done = export(capsys, weights, tmp_path / "x.pt2")
    assert (done["images"], len(done["checks"])) == ("any batch, any height and width", 6)
    model, images = Classification.load(weights, "cpu", optimized=False).model, torch.randn(2, 3, 45, 70)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("a network is built"))
    about = {"vision_ssm": ""}
    program = torch.export.load(tmp_path / "x.pt2", extra_files=about).module()
    torch.testing.assert_close(program(images)["logits"], model(images))
    assert json.loads(about["vision_ssm"])["classes"] == ["cat", "dog"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt2"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_package_takes_one_shape(weights, tmp_path, capsys):
    done = export(capsys, weights, tmp_path / "x.pt2", "--compiled", "--size", 32, 40, "--batch-size", 2)
    assert done["checks"] == [{"images": "2×3×32×40", "difference": pytest.approx(0, abs=1e-5)}]
    package = torch._inductor.aoti_load_package(str(tmp_path / "x.pt2"))
    assert json.loads(package.get_metadata()["vision_ssm"])["classes"] == ["cat", "dog"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{file} {out}.onnx", "must end in .pt2, got"),
        ("{file} {out}.pt2 --size 64", "--size and --batch-size belong to --compiled"),
        ("{file} {out}/no/x.pt2", "no such folder"),
        ("{file} {out}.pt2 --compiled --size 31", "--size must be at least 32, got 31 31"),
        ("{file} {out}.pt2 --compiled --size 1 2 3", "--size takes one or two numbers, got 1 2 3"),
    ],
    ids=["suffix", "size", "folder", "small", "sizes"],
)
def test_bad_input_is_one_line(words, message, weights, tmp_path, capsys):
    assert main(["export", "program", *words.format(file=weights, out=tmp_path / "x").split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not [*tmp_path.iterdir()]
