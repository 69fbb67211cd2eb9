import dataclasses

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import goldens
import vision_ssm.engine.fit as engine
from goldens import fill
from vision_ssm.engine.module import TrainingModule
from vision_ssm.engine.recorder import RunRecorder, Stopped
from vision_ssm.engine.run_folder import RunFolder
from vision_ssm.engine.weights import save_weights
from vision_ssm.errors import InputError
from vision_ssm.recipes import ClassificationConfig, small
from vision_ssm.recipes.config import LossConfig
from vision_ssm.tasks import load, train
from vision_ssm.tasks.classification import Classification, ClassifierSpec, first_model, load_teacher
from vision_ssm.tasks.distillation import Teacher, distillation_loss


@pytest.fixture
def config(images):
    return small(
        data=str(images),
        model="group_mamba_atto",
        epochs=2,
        batch_size=6,
        grad_accum=3,
        num_workers=0,
        device="cpu",
        mixup=0.5,
        cutmix=0.5,
        color_jitter=0.0,
        lr=1e-3,
        warmup_epochs=0,
        ema_decay=0.8,
    )


@pytest.fixture
def teacher_file(config, tmp_path):
    """A weights file as a run leaves it, of a model whose inputs are normalized otherwise."""
    spec = ClassifierSpec.from_config(
        dataclasses.replace(config, model="test_vit", model_args={"img_size": 32}), ("blue", "green", "red")
    )
    path = tmp_path / "teacher.safetensors"
    save(path, spec)
    return path


def save(path, spec):
    """Write a file of random weights as a run leaves it."""
    save_weights(path, Classification.create_model(spec).state_dict(), "classification", spec)


def taught(config, path, **options):
    return dataclasses.replace(config, teacher=str(path), **options)


@pytest.mark.parametrize("name", [k for k in goldens.load("groupmamba_mini").arrays if k.startswith("distill/")])
def test_loss_is_the_published_one(name):
    logits, logits_dist, teacher = (
        3 * torch.from_numpy(fill.value(f"distill.{part}", (4, 10))) for part in ("head", "dist", "teacher")
    )
    targets = (3 * torch.from_numpy(fill.value("distill.target", (4, 10)))).softmax(1)
    kind, alpha, tau = name.removeprefix("distill/").split("_")
    loss = nn.CrossEntropyLoss()(logits, targets)
    if kind != "none":
        how = LossConfig(distill_type=kind, distill_tau=float(tau.lstrip("tau")))
        weight = float(alpha.lstrip("alph"))
        loss = (1 - weight) * loss + weight * distillation_loss(logits_dist, teacher, how)
    torch.testing.assert_close(loss.item(), float(goldens.load("groupmamba_mini").arrays[name]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("model", ["group_mamba_atto", "vmamba_atto"], ids=["two-classifiers", "one"])
def test_step_teaches_the_second_classifier_or_the_only_one(model, config, teacher_file):
    student = timm.create_model(model, num_classes=3)
    spec = ClassifierSpec.from_config(dataclasses.replace(config, model=model), ("blue", "green", "red"))
    teacher = load_teacher(str(teacher_file), spec)
    config = ClassificationConfig(ema_decay=0.9, label_smoothing=0.0, distill_alpha=0.3)
    task = TrainingModule(Classification(student, spec, config, teacher), config).train()
    images, targets = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    outputs = []
    student.register_forward_hook(lambda module, args, output: outputs.append(output))
    loss = task.training_step({"image": images, "label": targets, "id": list("abcd")}, 0)
    logits, logits_dist = outputs[0] if model.startswith("group") else (outputs[0], outputs[0])
    said = teacher(images).argmax(1)
    expected = 0.7 * nn.functional.cross_entropy(logits, targets) + 0.3 * nn.functional.cross_entropy(logits_dist, said)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    assert not teacher.model.training
    assert not any("teacher" in key for key in task.state_dict())
    assert isinstance(task.eval().evaluated_model(images), torch.Tensor)


def test_teacher_sees_images_as_it_was_trained(config, teacher_file):
    student = ClassifierSpec.from_config(config, ("blue", "green", "red"))
    student = dataclasses.replace(student, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    own = load(teacher_file, "cpu").spec
    teacher = load_teacher(str(teacher_file), student)
    plain = torch.rand(2, 3, 32, 32)

    def normal(spec):
        return (plain - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(3, 1, 1)

    statistics = own.mean, own.std
    same = Teacher(teacher.model, "same", statistics, statistics)(normal(own))
    torch.testing.assert_close(teacher(normal(student)), same)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(normal(student)), teacher(normal(student).float()))
        assert teacher(normal(student)).dtype == torch.float32


def test_stopped_and_resumed_distillation_is_bit_identical(config, teacher_file, tmp_path, monkeypatch, stop_at):
    config = taught(config, teacher_file, distill_type="soft", distill_tau=2.0)
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    train(config, whole)
    stop_at(1, 3)
    with pytest.raises(Stopped):
        train(config, parts)
    monkeypatch.setattr(engine, "RunRecorder", RunRecorder)
    with pytest.raises(InputError, match=r"--teacher .*teacher.safetensors, not None"):
        train(dataclasses.replace(config, teacher=None), parts, resume=True)
    spec = load(teacher_file, "cpu").spec
    kept = teacher_file.read_bytes()
    save(teacher_file, spec)  # other weights under the same name
    with pytest.raises(InputError, match="cannot resume: the teacher changed"):
        train(config, parts, resume=True)
    teacher_file.write_bytes(kept)
    train(config, parts, resume=True)
    one, other = (safetensors.torch.load_file(folder.last) for folder in (whole, parts))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not any("teacher" in key for key in torch.load(whole.state, weights_only=True)["state_dict"])


def test_a_run_teaches_the_next_and_gives_it_its_weights(config, teacher_file, tmp_path):
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    config = dataclasses.replace(config, epochs=1)
    train(config, first)
    train(dataclasses.replace(taught(config, first.path), pretrained=first.path), second)
    assert second.best.is_file()
    # The same number of other classes begins with a new classifier.
    names = ("cat", "dog", "owl")
    model = first_model(dataclasses.replace(config, pretrained=first.path), ClassifierSpec.from_config(config, names))
    old = safetensors.torch.load_file(first.best)
    state = model.state_dict()
    changed = {key for key in old if not torch.equal(old[key], state[key])}
    assert changed == {f"head.{name}.{part}" for name in ("fc", "fc_dist") for part in ("weight", "bias")}


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("test_convnetx", "--teacher: unknown model test_convnetx; did you mean test_convnext"),
        ("regnety_160.deit_in1k", "has 1000 classes, but the images have 3; train a teacher on them"),
        ("{images}", "is not a run folder"),
        ("{images}/red/0.png", "was not written by a vision-ssm run"),
        ("{others}", r"has 3 classes \(cat, dog, owl\), but the images have 3 classes \(blue, green, red\)"),
        ("{large}", "cannot take images of 32x32"),
    ],
    ids=["unknown", "other-number", "no-run", "no-weights", "other-classes", "other-size"],
)
def test_teachers_that_cannot_teach(teacher, message, config, images, teacher_file, tmp_path):
    spec = load(teacher_file, "cpu").spec
    others, large = tmp_path / "others.safetensors", tmp_path / "large.safetensors"
    save(others, dataclasses.replace(spec, classes=("cat", "dog", "owl")))
    wide = dataclasses.replace(spec, model_args={"img_size": 64, "dynamic_img_size": False})
    save(large, wide)
    name = teacher.format(images=images, others=others, large=large)
    with pytest.raises(InputError, match=message):
        train(taught(config, name), RunFolder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_teacher_without_published_weights(config, tmp_path):
    student = dataclasses.replace(
        ClassifierSpec.from_config(config, ("a", "b", "c")), classes=tuple(map(str, range(1000)))
    )
    with pytest.raises(InputError, match="vmamba_atto has no published weights"):
        load_teacher("vmamba_atto", student)
