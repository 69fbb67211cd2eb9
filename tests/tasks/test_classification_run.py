import csv
import dataclasses
import json

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

import vision_ssm.tasks.train as training
from vision_ssm.errors import InputError
from vision_ssm.recipes import Augmentation, Optimisation, from_dict, to_dict
from vision_ssm.tasks.classifier import evaluate, load_classifier
from vision_ssm.tasks.recorder import RunRecorder, Stopped
from vision_ssm.tasks.run_folder import RunFolder


def test_run_leaves_a_folder_that_is_enough_to_use_it(config, tmp_path):
    folder = RunFolder(tmp_path / "run")
    result = training.train(config, folder)
    assert result.accuracy == 1.0
    assert folder.read_config() == config
    assert folder.check_resumable(config) is None
    with folder.metrics.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_balanced_accuracy"} <= set(rows[0])
    assert json.loads(folder.results.read_text())["accuracy"] == 1.0
    assert json.loads(folder.model.read_text())["classes"] == ["blue", "green", "red"]
    for picture in folder.pictures:
        assert Image.open(picture).size > (300, 300)
    # The weights file alone, elsewhere.
    alone = folder.best.rename(tmp_path / "moved.safetensors")
    classifier = load_classifier(alone, "cpu")
    path = tmp_path / "dark.png"
    Image.new("RGB", (200, 100), (10, 120, 10)).save(path)
    assert classifier.spec.classes[int(classifier.predict([path]).argmax())] == "green"
    splits = training.load_splits(config)
    assert evaluate(classifier, splits.val).summary() == result.summary()


@pytest.mark.parametrize(
    "stops", [[(0, 2)], [(1, 0), (1, 3)], [(0, 5), (2, 5)]], ids=["early", "twice-in-one-epoch", "at-an-epoch-end"]
)
def test_stopped_and_resumed_run_is_bit_identical(stops, config, tmp_path, monkeypatch, stop_at):
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    training.train(config, whole)
    for i, stop in enumerate(stops):
        stop_at(*stop)
        if stop == (2, 5):  # nothing is left to do then, so the run ends
            break
        with pytest.raises(Stopped):
            training.train(config, parts, resume=i > 0)
    monkeypatch.setattr(training, "RunRecorder", RunRecorder)
    training.train(dataclasses.replace(config, workers=1), parts, resume=True)
    for name in ("last", "best"):
        one, other = (safetensors.torch.load_file(getattr(f, name)) for f in (whole, parts))
        assert all(torch.equal(one[key], other[key]) for key in one), name
    states = [torch.load(f.state, weights_only=True) for f in (whole, parts)]
    for one, other in zip(*(s["optimizer_states"][0]["state"].values() for s in states), strict=True):
        assert torch.equal(one["exp_avg"], other["exp_avg"])
    histories = [
        [{k: v for k, v in row.items() if k not in ("images_per_second", "data_wait_ms")} for row in _rows(f)]
        for f in (whole, parts)
    ]
    assert histories[0] == histories[1]


def _rows(folder):
    with folder.metrics.open() as file:
        return list(csv.DictReader(file))


def test_resume_under_other_settings_is_refused(config, tmp_path, stop_at):
    folder = RunFolder(tmp_path / "run")
    stop_at(0, 1)
    with pytest.raises(Stopped):
        training.train(config, folder)
    with pytest.raises(InputError, match="--model test_convnext, not test_vit"):
        training.train(dataclasses.replace(config, model="test_vit"), folder, resume=True)
    optim = dataclasses.replace(config.optim, lr=0.5)
    with pytest.raises(InputError, match=r"--optim.lr 0.003, not 0.5"):
        training.train(dataclasses.replace(config, optim=optim), folder, resume=True)


def test_auxiliary_loss_is_added(config):
    class WithAux(torch.nn.Linear):
        def forward(self, x):
            self.aux_loss = self.weight.square().sum() * 100
            return super().forward(x.mean((2, 3)))

    model = WithAux(3, 3)
    task = training.ClassificationTask(model, 3, augment=Augmentation(), optim=Optimisation())
    batch = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    loss = task.training_step(batch, 0)
    plain = task.loss(torch.nn.Linear.forward(model, batch[0].mean((2, 3))), batch[1])
    assert loss.item() == pytest.approx((plain + model.aux_loss).item())


def test_balance_loss_of_a_model_is_added():
    model = timm.create_model("vim2_atto", num_classes=3)
    task = training.ClassificationTask(model, 3, augment=Augmentation(), optim=Optimisation(ema=0.9)).train()
    logits = []
    model.register_forward_hook(lambda module, args, output: logits.append(output))
    batch = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    loss = task.training_step(batch, 0)
    assert model.aux_loss.item() == pytest.approx(0.01)
    assert loss.item() == pytest.approx((task.loss(logits[0], batch[1]) + model.aux_loss).item())
    task.eval().validation_step(batch, 0)
    assert task.evaluated_model.aux_loss is None


def test_weight_decay_spares_what_the_model_exempts(config, tmp_path, monkeypatch, stop_at):
    seen = {}
    original = training.ClassificationTask.configure_optimizers

    def spy(self):
        out = original(self)
        names = {p: n for n, p in self.model.named_parameters()}
        seen.update({names[p]: g["weight_decay"] for g in out["optimizer"].param_groups for p in g["params"]})
        return out

    monkeypatch.setattr(training.ClassificationTask, "configure_optimizers", spy)
    monkeypatch.setattr(training, "create_model", lambda *a, **k: _exempting())
    stop_at(0, 0)
    with pytest.raises(Stopped):
        training.train(config, RunFolder(tmp_path / "run"))
    assert seen == {"head.weight": 0.05, "head.bias": 0.0, "A_log": 0.0}


def _exempting():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(3, 3)
            self.A_log = torch.nn.Parameter(torch.ones(3, 3))

        def no_weight_decay(self):
            return {"A_log"}

        def forward(self, x):
            return self.head(x.mean((2, 3)) @ self.A_log)

    return Model()


def test_pretrained_file_of_other_classes_gets_a_new_head(config, images, tmp_path):
    import timm

    source = timm.create_model("test_convnext", num_classes=7)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "seven.safetensors")
    model = training.create_from_file("test_convnext", {}, 3, tmp_path / "seven.safetensors")
    assert torch.equal(model.state_dict()["stem.0.weight"], source.state_dict()["stem.0.weight"])
    assert model.num_classes == 3
    with pytest.raises(InputError, match=r"missing: .*and \d+ more.*unexpected: "):
        training.create_from_file("test_vit", {}, 3, tmp_path / "seven.safetensors")


def test_configuration_survives_json(config):
    changed = dataclasses.replace(config, model_args={"a": 1}, pretrained=config.data.root / "x.pth")
    assert from_dict(type(changed), json.loads(json.dumps(to_dict(changed)))) == changed
