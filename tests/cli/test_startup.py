"""What the program imports, each time in a process of its own."""

import subprocess
import sys

import pytest
from PIL import Image

from vision_ssm.engine.weights import save_weights
from vision_ssm.recipes import small
from vision_ssm.tasks.classification import Classification, ClassifierSpec

ENTRY = "from vision_ssm_program import main; sys.exit(main())"


def run(code, *words):
    """Exit code, what was printed, and the names of the modules that were loaded in the end."""
    code = f"import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); {code}"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    *printed, loaded = (done.stdout + done.stderr).splitlines()
    return done.returncode, "\n".join(printed), set(loaded.split())


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("--help", 0, "usage: vision-ssm"),
        ("--version", 0, "vision-ssm "),
        ("trian", 2, "no command trian"),
        ("recipes", 0, "vmamba-tiny-in1k"),
        ("recipes vmamba-tiny-in1k", 0, "--lr"),
        ("train classify --help", 0, "--lr"),
        ("train digits --epoch 3", 2, "--epochs INT"),
        ("train --resume nowhere", 2, "nowhere"),
        ("eval --help", 0, "--pretrained"),
        ("predict nowhere x.png", 2, "no such run folder: nowhere"),
        ("models --nope", 2, "--nope"),
        ("report nowhere", 2, "no such run folder: nowhere"),
        ("convert --help", 0, "--verify"),
        ("demo --help", 0, "--max-megabytes"),
        ("demo nowhere", 2, "no such run folder: nowhere"),
    ],
    ids=str,
)
def test_help_recipes_and_typos_import_neither_torch_nor_timm(words, code, says):
    returned, printed, loaded = run(ENTRY, *words.split())
    assert returned == code
    assert says in printed
    assert not loaded & {"torch", "timm", "lightning", "matplotlib", "sklearn", "numpy"}


def test_only_training_imports_lightning():
    words = ("bench", "vmamba_atto", "--size", "32", "--batch", "1", "--seconds", "0.01")
    returned, printed, loaded = run(ENTRY, *words)
    assert returned == 0, printed
    assert "vision_ssm.models.create" in loaded
    assert not loaded & {"lightning", "torchmetrics", "matplotlib", "sklearn", "datasets"}


def test_prediction_imports_neither_lightning_nor_torchmetrics(tmp_path):
    spec = ClassifierSpec.from_config(small(model="test_convnext"), ("cat", "dog"))
    save_weights(tmp_path / "best.safetensors", Classification.create_model(spec).state_dict(), "classification", spec)
    Image.new("RGB", (40, 30)).save(tmp_path / "x.png")
    code = "import vision_ssm; print(vision_ssm.load(sys.argv[1]).predict([sys.argv[2]])[0].label in ('cat', 'dog'))"
    returned, printed, loaded = run(code, str(tmp_path / "best.safetensors"), str(tmp_path / "x.png"))
    assert (returned, printed) == (0, "True")
    assert not loaded & {"lightning", "torchmetrics", "matplotlib", "sklearn", "datasets", "rich", "tyro"}


def test_importing_the_package_registers_the_models():
    returned, printed, _ = run("import vision_ssm, timm; sys.exit(not timm.is_model('vmamba_atto'))")
    assert returned == 0, printed
