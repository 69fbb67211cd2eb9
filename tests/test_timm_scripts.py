"""``python -m vision_ssm.timm``: scripts that import timm alone."""

import os
import subprocess
import sys

import pytest

from vision_ssm.timm import main

SCRIPT = """
import argparse
import pathlib
import sys

import timm

import beside

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    model = timm.create_model(parser.parse_args().model, num_classes=3)
    print(type(model).__name__, model.num_classes, beside.WORD, sys.argv, pathlib.Path(__file__).name)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "beside.py").write_text("WORD = 'found'")
    path = tmp_path / "scripts" / "train.py"
    path.write_text(SCRIPT)
    return path


def test_a_script_has_the_models(script, tmp_path):
    words = ("scripts/train.py", "--model", "vmamba_atto")
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-m", "vision_ssm.timm", *words]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.stdout == f"VMamba 3 found {[*words]} train.py\n", run.stderr


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        ([], 2, "usage: python -m vision_ssm.timm SCRIPT.py"),
        (["--help"], 0, "usage: python -m vision_ssm.timm SCRIPT.py"),
        (["no.py", "--model", "vmamba_atto"], 2, "vision_ssm.timm: error: no such script: no.py"),
    ],
    ids=["no script", "help", "missing script"],
)
def test_what_is_no_script(words, code, line, capsys):
    assert main(words) == code
    shown = capsys.readouterr()
    text = shown.out if code == 0 else shown.err
    assert text.startswith(line)
    assert text.count("\n") == 1
