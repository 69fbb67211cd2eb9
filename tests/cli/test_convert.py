"""`vision-ssm convert`, as a user calls it."""

import re

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

import goldens
import vision_ssm  # noqa: F401  (registers the models)
from official_names import official
from vision_ssm.cli import main

NAME = "vmamba_atto"


@pytest.fixture
def convert(capsys, tmp_path):
    """Save a checkpoint and convert it to `tmp_path / "ours.safetensors"`; return code, output and errors."""

    def run(content, *words, model=NAME):
        torch.save(content, tmp_path / "theirs.pth")
        code = main(
            ("convert", str(tmp_path / "theirs.pth"), str(tmp_path / "ours.safetensors"), "--model", model, *words)
        )
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        assert len(output.err.splitlines()) == (code != 0) or "Value error" in output.err  # the parser's frame
        assert (tmp_path / "ours.safetensors").exists() == (code == 0)
        return code, " ".join(output.out.split()), output.err

    return run


@pytest.fixture
def picture(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def source(**options):
    return timm.create_model(NAME, **options).eval()


def backbone_of_a_segmenter():
    """A segmenter's backbone, and the file that OpenMMLab writes of the whole."""
    model = source(features_only=True, feature_norm=True)
    for norm in model.model.feature_norms:
        torch.nn.init.normal_(norm.weight)
    state = {f"backbone.{key}": value for key, value in official(model.model.state_dict()).items()}
    heads = {"decode_head.conv.weight": torch.ones(2), "decode_head.conv.bias": torch.ones(2), "neck.w": torch.ones(1)}
    return model, {"meta": {"epoch": 1}, "state_dict": state | heads}


def load_as_printed(out):
    """Run the call that the command has printed."""
    return eval(re.search(r"timm\.create_model\(.*?\)(?= |$)", out)[0], {"timm": timm}).eval()


@pytest.mark.parametrize("classes", [1000, 10])
def test_a_converted_file_gives_the_same_model(convert, classes, tmp_path):
    model = source(num_classes=classes)
    code, out, _ = convert({"model": official(model.state_dict()), "epoch": 3})
    assert code == 0
    assert f"{len(model.state_dict())} tensors in {tmp_path / 'theirs.pth'} under 'model'" in out
    found = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert found.keys() == model.state_dict().keys()
    again = load_as_printed(out)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(x), model(x))


def test_where_the_tensors_went(convert):
    out = convert(official(source().state_dict()))[1]
    # 8 tensors of the stem; the first downsampling ends a stage there and begins the next one here
    for row in ("patch_embed 8 stem 8 5,184", "layers.0 4 stages.1 4 18,624", "classifier 2 norm 2 256"):
        assert row in out
    assert "not needed" not in out


def test_an_existing_file_stays(convert, capsys, tmp_path):
    state = official(source().state_dict())
    convert(state)
    before = (tmp_path / "ours.safetensors").read_bytes()
    assert main(("convert", str(tmp_path / "theirs.pth"), str(tmp_path / "ours.safetensors"), "--model", NAME)) == 2
    assert "exists; --overwrite replaces it" in capsys.readouterr().err
    assert (tmp_path / "ours.safetensors").read_bytes() == before
    assert convert({key: value + 1 for key, value in state.items()}, "--overwrite")[0] == 0
    assert (tmp_path / "ours.safetensors").read_bytes() != before


@pytest.mark.parametrize("name", ["model_ema", "ema_model", "state_dict_ema"])
def test_averaged_weights(convert, tmp_path, name):
    plain, averaged = source().state_dict(), source().state_dict()
    content = {
        "model": official(plain),
        name: {f"module.module.{key}": value for key, value in official(averaged).items()},
    }
    out = convert(content)[1]
    assert f"also holds averaged weights under '{name}'; --ema takes those" in out
    found = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert all(torch.equal(found[key], value) for key, value in plain.items())
    out = convert(content, "--ema", "--overwrite")[1]
    assert f"under '{name}', all names without 'module.module.'" in out
    assert "also holds plain weights under 'model'" in out
    found = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert all(torch.equal(found[key], value) for key, value in averaged.items())


def test_verify_names_the_likeliest_classes(convert, picture, tmp_path):
    model = source()
    out = convert(official(model.state_dict()), "--verify", str(picture))[1]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        best = model(transform(Image.open(picture))[None])[0].softmax(0).topk(5)
    names = timm.data.ImageNetInfo()
    for rank, (value, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True), start=1):
        assert f"{rank}. {value:.1%} {index} {names.index_to_description(index)}" in out
    assert "6." not in out.partition(str(picture))[2]


def test_verify_without_names_of_the_classes(convert, picture):
    out = convert(official(source(num_classes=3).state_dict()), "--verify", str(picture))[1]
    assert re.search(r"3\. +\d+\.\d% [012] -", out)


def test_the_backbone_of_a_segmenter(convert):
    model, content = backbone_of_a_segmenter()
    code, out, _ = convert(content, "--backbone")
    assert code == 0
    assert "left out, not of the backbone: 3 besides (decode_head 2, neck 1)" in out
    assert "outnorm3 2 feature_norms 2 256" in out
    x = torch.randn(1, 3, 64, 40)
    again = load_as_printed(out)
    assert again.model.feature_norms is not None
    assert all(torch.equal(a, b) for a, b in zip(again(x), model(x), strict=True))


def test_a_backbone_alone_needs_no_option(convert):
    model, content = backbone_of_a_segmenter()
    content = {key: value for key, value in content["state_dict"].items() if key.startswith("backbone.")}
    code, out, _ = convert(content)
    assert code == 0
    assert "all names without 'backbone.'" in out
    x = torch.randn(1, 3, 64, 40)
    assert all(torch.equal(a, b) for a, b in zip(load_as_printed(out)(x), model(x), strict=True))


def test_sizes_of_no_named_variant(convert):
    model = source(depths=(1, 1, 1, 1), stem_stride=4)
    state = official(model.state_dict())
    assert convert(state)[0] == 2
    code, out, _ = convert(state, "--model-args", "depths=(1,1,1,1)", "stem_stride=4")
    assert code == 0
    assert torch.equal(load_as_printed(out)(x := torch.randn(1, 3, 32, 32)), model(x))


def in_ema_wrapper(state):
    return {"epoch": 300, "state_dict": {f"module.module.{key}": value for key, value in state.items()}}


def in_segmenter(state):
    return {
        "meta": {},
        "state_dict": {
            **{f"backbone.{key}": value for key, value in state.items()},
            "head.w": state[next(iter(state))],
        },
    }


@pytest.mark.parametrize(
    ("golden", "model", "wrapped", "words"),
    [
        ("vmamba_tiny_s1l8", "vmamba_tiny", lambda state: {"model": state}, ()),
        ("efficientvmamba_tiny", "efficient_vmamba_tiny", in_ema_wrapper, ()),
        ("groupmamba_t", "group_mamba_tiny", dict, ()),
        ("sparx_mamba_t", "sparx_mamba_tiny", dict, ()),
        ("sparx_mamba_t_detection", "sparx_mamba_tiny", in_segmenter, ("--backbone",)),
        ("sparx_mamba_t_segmentation", "sparx_mamba_tiny", in_segmenter, ("--backbone",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_family_in_its_published_form(convert, tmp_path, golden, model, wrapped, words):
    official_state = goldens.load(golden).state_dict()
    code, out, _ = convert(wrapped(official_state), *words, model=model)
    assert code == 0
    found = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    loaded = load_as_printed(out)
    state = loaded.model.state_dict() if words else loaded.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(state[key], value) for key, value in found.items())
    assert sum(value.numel() for value in found.values()) == sum(value.numel() for value in official_state.values())


@pytest.mark.parametrize(
    ("golden", "model", "fitting"),
    [
        ("groupmamba_t", "vmamba_tiny", "group_mamba_tiny"),
        ("efficientvmamba_tiny", "sparx_mamba_tiny", "efficient_vmamba_tiny"),
        ("sparx_mamba_t_segmentation", "group_mamba_tiny", "sparx_mamba_tiny"),
    ],
)
def test_a_file_of_another_family(convert, golden, model, fitting):
    code, out, err = convert(goldens.load(golden).state_dict(), model=model)
    assert code == 2
    assert not out
    assert f"theirs.pth is no {model}; it fits {fitting}" in err


def test_a_file_of_no_model_is_told_in_a_few_names(convert):
    code, out, err = convert({f"layer{i}.weight": torch.ones(2) for i in range(100)})
    assert code == 2
    assert not out
    assert "100 unexpected: layer0.weight, " in err
    assert "layer7.weight and 92 more" in err


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (
            lambda state: without(state, "layers.1.blocks.0.op.Ds"),
            (),
            "the weights do not fit VMamba: 1 missing: stages.1.blocks.0.ss2d.D",
        ),
        (
            lambda state: state | {"classifier.head.bias": torch.ones(7)},
            (),
            "1 of another shape: head.fc.bias (file (7,), model (1000,))",
        ),
        (lambda state: {"resnet.conv1.weight": torch.ones(2)}, (), "148 missing"),
        (lambda state: state, ("--model", "vmamba_tiny"), "theirs.pth is no vmamba_tiny; it fits vmamba_atto"),
        (
            lambda state: state,
            ("--model", "group_mamba_tiny"),
            "theirs.pth is no group_mamba_tiny; it fits vmamba_atto",
        ),
        (lambda state: state, ("--model", "vmamba_tinny"), "unknown model vmamba_tinny; did you mean vmamba_tiny"),
        (lambda state: state, ("--model", "resnet18"), "no conversion of official checkpoints for resnet18"),
        (
            lambda state: state,
            ("--model-args", "depth=3"),
            "with depth=3: VMamba has no argument depth; did you mean depths",
        ),
        (
            lambda state: state,
            ("--model-args", "depths=2"),
            "cannot make vmamba_atto with depths=2: depths takes several",
        ),
        (lambda state: state, ("--model-args", "depths=(2,2"), "cannot read the value in depths=(2,2"),
        (lambda state: state, ("--model-args", "num_classes=3"), "the number of classes comes from the file"),
        (lambda state: state, ("--ema",), "theirs.pth keeps no averaged weights apart; leave --ema out"),
        (lambda state: state, ("--backbone",), "has no names that begin with backbone.; leave --backbone out"),
        (
            lambda state: backbone_of_a_segmenter()[1],
            (),
            "3 besides (decode_head 2, neck 1); --task segment takes all,",
        ),
        (lambda state: state, ("--verify", __file__), "cannot read image"),
        (lambda state: state, ("--verify", "none.png"), "cannot read image none.png: No such file"),
    ],
    ids=[
        "missing",
        "shape",
        "foreign",
        "other-variant",
        "other-family",
        "misspelt",
        "no-conversion",
        "arguments",
        "no-sequence",
        "bracket",
        "classes",
        "no-ema",
        "no-backbone",
        "segmenter",
        "no-image",
        "no-file",
    ],
)
def test_what_is_refused(convert, content, words, message):
    code, _, err = convert(content(official(source().state_dict())), *words)
    assert code == 2
    assert message in err


def test_numbers_that_are_not_finite(convert, capsys, picture, tmp_path):
    state = official(source().state_dict())
    for key, value in (("layers.1.blocks.0.op.Ds", torch.nan), ("classifier.head.bias", torch.inf)):
        state[key] = state[key].clone()
        state[key][0] = value
    message = "2 tensors hold numbers that are not finite: layers.1.blocks.0.op.Ds, classifier.head.bias"
    code, _, err = convert(state, "--verify", str(picture))
    assert code == 2
    assert message in err
    words = (str(tmp_path / "theirs.pth"), str(tmp_path / "ours.safetensors"), "--model", NAME)
    assert main(("convert", *words)) == 0
    assert message in capsys.readouterr().err


def test_a_file_without_the_second_classifier(convert):
    state = {k: v for k, v in goldens.load("groupmamba_t").state_dict().items() if not k.startswith("dist_head")}
    code, _, err = convert(state, model="group_mamba_tiny")
    assert code == 2
    assert "--model-args distilled=False makes a model without one" in err
    assert convert(state, "--model-args", "distilled=False", model="group_mamba_tiny")[0] == 0


def test_a_backbone_cannot_be_verified(convert, picture):
    _, content = backbone_of_a_segmenter()
    code, _, err = convert(content, "--backbone", "--verify", str(picture))
    assert code == 2
    assert "holds no classifier" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("none.pth", "o.safetensors"), "no such checkpoint file: none.pth"),
        (("none.pth", "o.bin"), "must end in .safetensors, got o.bin"),
        (("none.pth", "no/o.safetensors"), "no such folder: no"),
        ((__file__, "o.safetensors"), "not a readable PyTorch checkpoint"),
    ],
    ids=["source", "ending", "folder", "no-checkpoint"],
)
def test_wrong_files(capsys, words, message):
    assert main(("convert", *words, "--model", NAME)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
