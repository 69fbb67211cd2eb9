"""What keeps a run folder whole, and what a tampered file cannot do."""

import dataclasses
import importlib.metadata
import json
import multiprocessing
import os

import pytest
import safetensors.torch
import torch

from short_runs import SHORT
from vision_ssm.engine.run_folder import RunFolder
from vision_ssm.engine.weights import save_weights
from vision_ssm.errors import InputError
from vision_ssm.recipes import small, to_dict
from vision_ssm.tasks import load, train
from vision_ssm.tasks.classification import Classification, ClassifierSpec


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(small(data=str(images), **SHORT | dict(epochs=1)), folder, about={"recipe": "small", "command": "x"})
    return folder


def test_configuration_records_recipe_command_and_versions(run):
    values = json.loads((run / "config.json").read_text())
    assert (values["recipe"], values["command"], values["task"]) == ("small", "x", "classification")
    assert values["versions"]["torch"] == importlib.metadata.version("torch")


def test_overwriting_removes_only_what_a_run_wrote(images, tmp_path):
    config = small(data=str(images), **SHORT | dict(epochs=1))
    train(config, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train(config, tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def hold(folder, ready, done):
    with RunFolder(folder).lock():
        ready.set()
        done.wait()


def test_a_second_writer_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready, done))
    process.start()
    ready.wait()
    with pytest.raises(InputError, match="another process is writing to"), RunFolder(tmp_path).lock():
        pass
    process.kill()
    process.join()
    with RunFolder(tmp_path).lock():
        pass


def test_folders_of_something_else_are_left_alone(images, tmp_path):
    config = small(data=str(images), **SHORT | dict(epochs=1))
    (tmp_path / "run" / "logger").mkdir(parents=True)
    (tmp_path / "run" / "logger" / "mine.py").write_text("mine")
    with pytest.raises(InputError, match="is not empty; add --overwrite"):
        train(config, tmp_path / "run")
    with pytest.raises(InputError, match="does not hold a run"):
        train(config, tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "logger" / "mine.py").is_file()


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9, 0.9999])
def test_a_flipped_bit_in_the_state_is_found(place, run, images, tmp_path):
    content = bytearray((run / "last.ckpt").read_bytes())
    content[int(place * len(content))] ^= 16
    other = tmp_path / "run"
    other.mkdir()
    for name in ("config.json", "last.safetensors"):
        (other / name).write_bytes((run / name).read_bytes())
    (other / "last.ckpt").write_bytes(content)
    config = RunFolder(run).read_config()
    with pytest.raises(InputError, match=r"last\.ckpt is damaged"):
        train(config, other, resume=True)


@pytest.mark.parametrize(
    "args", [{"checkpoint_path": "/etc/passwd"}, {"pretrained_cfg": {"file": "x"}}, {"cache_dir": "/tmp"}], ids=str
)
def test_a_weights_file_names_no_other_files(args, tmp_path):
    spec = ClassifierSpec.from_config(small(model="test_convnext"), ("a", "b"))
    state = Classification.create_model(spec).state_dict()
    save_weights(tmp_path / "w.safetensors", state, "classification", dataclasses.replace(spec, model_args=args))
    with pytest.raises(InputError, match="is not a model argument here"):
        load(tmp_path / "w.safetensors", "cpu")


@pytest.mark.parametrize(
    "changes", [{"img_size": 10**9}, {"std": (0.0, 1.0, 1.0)}, {"classes": ("cat", "cat")}, {"crop_pct": -1.0}], ids=str
)
def test_tampered_descriptions_get_one_line(changes, tmp_path):
    spec = ClassifierSpec.from_config(small(model="test_convnext"), ("a", "b"))
    path, state = tmp_path / "w.safetensors", Classification.create_model(spec).state_dict()
    values = {"task": "classification", **to_dict(spec), **changes}
    safetensors.torch.save_file(state, path, {"vision_ssm": json.dumps(values)})
    with pytest.raises(InputError, match=r"w\.safetensors does not describe a model for classification: "):
        load(path, "cpu")


def test_the_state_is_no_weights_file(run):
    with pytest.raises(InputError, match=r"its weights are in last\.safetensors beside it"):
        load(run / "last.ckpt", "cpu")


@pytest.mark.parametrize(
    "damage", ["{", "[" * 100_000, '{"task": "classification", "config": {"speed": 1}}', '{"task": "flying"}', "[]"]
)
def test_damaged_configurations_get_one_line(damage, run, tmp_path):
    (tmp_path / "config.json").write_text(damage)
    with pytest.raises(InputError, match=r"cannot read .*config\.json"):
        RunFolder(tmp_path).read_config()


@pytest.mark.parametrize(
    "damage",
    ["[]", '{"task": "classification", "img_size": "x"}', '{"task": "flying"}', "[" * 100_000],
    ids=lambda text: text[:20],
)
def test_damaged_descriptions_get_one_line(damage, tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", {"vision_ssm": damage})
    with pytest.raises(InputError, match=r"w\.safetensors|unknown task flying"):
        load(tmp_path / "w.safetensors", "cpu")


def test_a_bad_configuration_costs_no_run(run, images):
    with pytest.raises(InputError, match="--schedule must be one of"):
        train(small(data=str(images), schedule="foo"), run, overwrite=True)
    assert (run / "best.safetensors").is_file()


def test_stored_classes_are_used_when_a_model_is_measured(run, capsys):
    from vision_ssm.cli import main

    images = RunFolder(run).read_config().data
    words = ["eval", "test_convnext", "--weights", str(run / "best.safetensors"), "--data", images, "--json"]
    assert main([*words, "--device", "cpu"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [row["class"] for row in values["per_class"]] == ["blue", "green", "red"]
    assert main(["eval", str(run), "--data", images, "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(values["loss"])


def test_a_batch_job_without_srun_trains_as_one_process(images, tmp_path, monkeypatch):
    for name, value in dict(SLURM_NTASKS="8", SLURM_JOB_ID="1", SLURM_PROCID="0", SLURM_LOCALID="0").items():
        monkeypatch.setenv(name, value)
    train(small(data=str(images), **SHORT | dict(epochs=1)), tmp_path / "run")
    assert (tmp_path / "run" / "results.json").is_file()


def test_results_are_honest_about_small_and_uneven_data(tmp_path, images):
    from PIL import Image

    for name, count in (("red", 30), ("green", 10)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (i, 0, 90)).save(tmp_path / "data" / name / f"{i}.png")
    config = small(data=str(tmp_path / "data"), class_weights=True, **SHORT | dict(epochs=1))
    results = train(config, tmp_path / "run")
    values = json.loads((tmp_path / "run" / "results.json").read_text())
    assert values["largest_class_share"] == pytest.approx(0.75)
    low, high = values["accuracy_interval"]
    assert 0 <= low < results.accuracy < high <= 1
    assert {"macro_f1", "worst_recall", "last_epoch_balanced_accuracy"} <= values.keys()
    wrong = values["most_confident_mistakes"]
    assert len(wrong) == round((1 - results.accuracy) * results.images)
    assert all(os.sep in row["image"] and row["class"] != row["predicted"] for row in wrong)
    weights = safetensors.torch.load_file(tmp_path / "run" / "best.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
