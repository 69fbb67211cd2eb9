import csv
import dataclasses
import json

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

import vision_ssm.engine.fit as engine
from vision_ssm.data import load_splits
from vision_ssm.engine.module import TrainingModule
from vision_ssm.engine.recorder import RunRecorder, Stopped
from vision_ssm.engine.run_folder import RunFolder
from vision_ssm.errors import InputError
from vision_ssm.recipes import ClassificationConfig
from vision_ssm.recipes.config import OptimConfig
from vision_ssm.tasks import classification, load, train
from vision_ssm.tasks.classification import Classification, ClassifierSpec, first_model


def test_run_leaves_a_folder_that_is_enough_to_use_it(config, tmp_path):
    folder = RunFolder(tmp_path / "run")
    result = train(config, folder)
    assert result.accuracy == 1.0
    assert folder.read_config() == dataclasses.replace(config, monitor="accuracy")
    assert folder.check_resumable(config) is None
    with folder.metrics.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_balanced_accuracy"} <= set(rows[0])
    assert json.loads(folder.results.read_text())["accuracy"] == 1.0
    assert json.loads(folder.model.read_text())["classes"] == ["blue", "green", "red"]
    for name in ("curves", "confusion", "predictions"):
        assert Image.open(folder.path / f"{name}.png").size > (300, 300)
    # The weights file alone, elsewhere.
    alone = folder.best.rename(tmp_path / "moved.safetensors")
    task = load(alone, "cpu")
    path = tmp_path / "dark.png"
    Image.new("RGB", (200, 100), (10, 120, 10)).save(path)
    (prediction,) = task.predict([path])
    assert (prediction.id, prediction.label) == (str(path), "green")
    assert prediction.row(1) == {
        "image": str(path),
        "answer": "green",
        "predictions": [{"class": "green", "probability": pytest.approx(prediction.confidence)}],
    }
    with Image.open(path) as image:
        others = task.predict([image, np.asarray(image)])
    for other in others:
        torch.testing.assert_close(other.probabilities, prediction.probabilities)
    # What fit, evaluation after it and evaluation of the file alone measure is the same.
    again = load(alone, "cpu", optimized=False).evaluate(load_splits(config).val)
    assert again.metrics() == result.metrics()
    best = rows[json.loads(folder.results.read_text())["best_epoch"] - 1]
    for name, value in again.metrics().items():
        assert float(best[f"val_{name}"]) == pytest.approx(value, abs=1e-5), name
    assert task.evaluate(load_splits(config).val).loss == pytest.approx(result.loss, abs=1e-4)


@pytest.mark.parametrize(
    "stops", [[(0, 2)], [(1, 0), (1, 3)], [(0, 6), (2, 6)]], ids=["early", "twice-in-one-epoch", "at-an-epoch-end"]
)
def test_stopped_and_resumed_run_is_bit_identical(stops, config, tmp_path, monkeypatch, stop_at):
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    train(config, whole)
    for i, stop in enumerate(stops):
        stop_at(*stop)
        if stop == (2, 6):  # nothing is left to do then, so the run ends
            break
        with pytest.raises(Stopped):
            train(config, parts, resume=i > 0)
    monkeypatch.setattr(engine, "RunRecorder", RunRecorder)
    train(dataclasses.replace(config, num_workers=1), parts, resume=True)
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
        train(config, folder)
    with pytest.raises(InputError, match="--model test_convnext, not test_vit"):
        train(dataclasses.replace(config, model="test_vit"), folder, resume=True)
    with pytest.raises(InputError, match=r"--lr 0.003, not 0.5"):
        train(dataclasses.replace(config, lr=0.5), folder, resume=True)


def spec_of(classes):
    return ClassifierSpec.from_config(ClassificationConfig(model="test_convnext"), classes)


def test_auxiliary_loss_is_added():
    class WithAux(torch.nn.Linear):
        def forward(self, x):
            self.aux_loss = self.weight.square().sum() * 100
            return super().forward(x.mean((2, 3)))

    model = WithAux(3, 3)
    module = TrainingModule(Classification(model, spec_of(("a", "b", "c"))), OptimConfig())
    batch = {"image": torch.rand(4, 3, 8, 8), "label": torch.tensor([0, 1, 2, 0]), "id": list("abcd")}
    loss = module.training_step(batch, 0)
    plain = module.task.loss(torch.nn.Linear.forward(model, batch["image"].mean((2, 3))), batch["label"])
    assert loss.item() == pytest.approx((plain + model.aux_loss).item())
    means = module.epoch_means()
    assert means.keys() == {"loss", "loss_labels", "loss_aux", "accuracy"}
    assert means["loss_labels"] == pytest.approx(plain.item())


def test_balance_loss_of_a_model_is_added():
    model = timm.create_model("vim2_atto", num_classes=3)
    module = TrainingModule(Classification(model, spec_of(("a", "b", "c"))), OptimConfig(ema_decay=0.9)).train()
    logits = []
    model.register_forward_hook(lambda module, args, output: logits.append(output))
    batch = {"image": torch.rand(4, 3, 32, 32), "label": torch.tensor([0, 1, 2, 0]), "id": list("abcd")}
    loss = module.training_step(batch, 0)
    assert model.aux_loss.item() == pytest.approx(0.01)
    assert loss.item() == pytest.approx((module.task.loss(logits[0], batch["label"]) + model.aux_loss).item())
    module.eval().validation_step(batch, 0)
    assert module.evaluated_model.aux_loss is None


def test_weight_decay_spares_what_the_model_exempts(config, tmp_path, monkeypatch, stop_at):
    seen = {}
    original = TrainingModule.configure_optimizers

    def spy(self):
        out = original(self)
        names = {p: n for n, p in self.model.named_parameters()}
        seen.update({names[p]: g["weight_decay"] for g in out["optimizer"].param_groups for p in g["params"]})
        return out

    monkeypatch.setattr(TrainingModule, "configure_optimizers", spy)
    monkeypatch.setattr(classification, "create_model", lambda *a, **k: _exempting())
    stop_at(0, 0)
    with pytest.raises(Stopped):
        train(config, RunFolder(tmp_path / "run"))
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


def test_pretrained_file_of_other_classes_gets_a_new_head(tmp_path, caplog):
    source, file = timm.create_model("test_convnext", num_classes=7), tmp_path / "seven.safetensors"
    safetensors.torch.save_file(source.state_dict(), file)
    config = ClassificationConfig(model="test_convnext", pretrained=file)
    model = first_model(config, spec_of(("a", "b", "c")))
    assert torch.equal(model.state_dict()["stem.0.weight"], source.state_dict()["stem.0.weight"])
    assert model.num_classes == 3
    assert "its classifier, for other classes, was not loaded" in caplog.text
    other = dataclasses.replace(config, model="test_vit")
    with pytest.raises(InputError, match=r"missing: .*and \d+ more.*unexpected: "):
        first_model(other, ClassifierSpec.from_config(other, ("a", "b", "c")))
