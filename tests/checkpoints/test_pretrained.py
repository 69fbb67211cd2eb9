"""``pretrained=True`` and ``checkpoint_path``: a small model's official file, served over HTTP from this machine."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import vision_ssm  # noqa: F401  (registers the models)
from official_names import official
from vision_ssm.checkpoints import CheckpointError
from vision_ssm.checkpoints.vmamba import convert_vmamba
from vision_ssm.engine.weights import save_weights

NAME = "vmamba_atto"


@pytest.fixture(scope="module")
def source() -> nn.Module:
    torch.manual_seed(3)
    return timm.create_model(NAME).eval()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """Return the address of a server and the folder it serves; downloads land in an empty cache."""
    for variable in ("TORCH_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}", folder
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def address(server: tuple[str, Path], source: nn.Module) -> str:
    url, folder = server
    torch.save({"model": official(source.state_dict()), "epoch": 300}, folder / "weights.pth")
    return f"{url}/weights.pth"


def create(address: str, **options: Any) -> nn.Module:
    overlay = {"url": address} | options.pop("overlay", {})
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()


def test_the_served_file_has_official_names(source: nn.Module) -> None:
    theirs = official(source.state_dict())
    assert not set(theirs) & set(source.state_dict())
    again = convert_vmamba(theirs)
    assert again.keys() == source.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in source.state_dict().items())


def test_same_outputs(address: str, source: nn.Module) -> None:
    model = create(address)
    x = torch.randn(2, 3, 32, 48)
    assert torch.equal(model(x), source(x))
    assert model.pretrained_cfg["url"] == address
    assert not model.pretrained_cfg.get("state_dict")


def test_downloaded_once(address: str, server: tuple[str, Path], tmp_path: Path) -> None:
    create(address)
    assert [path.name for path in (tmp_path / "cache").rglob("*.pth")] == ["weights.pth"]
    (server[1] / "weights.pth").unlink()
    create(address)


def test_other_classes(address: str, source: nn.Module) -> None:
    model = create(address, num_classes=5)
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 5)
    assert torch.equal(model.forward_features(x), source.forward_features(x))
    pooled = create(address, num_classes=0)
    assert torch.equal(pooled(x), source.forward_head(source.forward_features(x), pre_logits=True))


def test_other_channels(address: str, source: nn.Module) -> None:
    model = create(address, in_chans=1)
    x = torch.randn(2, 1, 32, 32)
    # timm adds up the weights of the colors, which is the same as a gray image
    torch.testing.assert_close(model(x), source(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    assert create(address, in_chans=5)(torch.randn(1, 5, 32, 32)).isfinite().all()


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1,)], ids=str)
def test_features_only(address: str, source: nn.Module, out_indices: tuple[int, ...]) -> None:
    model = create(address, features_only=True, out_indices=out_indices)
    x = torch.randn(1, 3, 64, 32)
    expected = source.forward_intermediates(x, indices=list(out_indices), intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(model(x), expected, strict=True))


@pytest.fixture
def backbone(server: tuple[str, Path]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A segmenter's backbone, with output norms and neither final norm nor classifier, and its official state dict."""
    model = timm.create_model(NAME, features_only=True, feature_norm=True)
    for norm in model.model.feature_norms:
        nn.init.normal_(norm.weight)
    return model.eval(), official(model.model.state_dict())


@pytest.mark.parametrize("form", ["official", "ours"])
def test_backbone_of_a_segmenter(server: tuple[str, Path], backbone: Any, form: str) -> None:
    expected, state = backbone
    torch.save(state if form == "official" else convert_vmamba(state), server[1] / "w.pth")
    model = create(f"{server[0]}/w.pth", features_only=True, feature_norm=True)
    x = torch.randn(1, 3, 64, 32)
    assert all(torch.equal(a, b) for a, b in zip(model(x), expected(x), strict=True))


@pytest.mark.parametrize("key", ["outnorm2.weight", "layers.3.blocks.0.op.Ds"])
def test_a_backbone_with_gaps_is_an_error(server: tuple[str, Path], backbone: Any, key: str) -> None:
    _, state = backbone
    torch.save({name: value for name, value in state.items() if name != key}, server[1] / "w.pth")
    with pytest.raises(CheckpointError, match="1 missing"):
        create(f"{server[0]}/w.pth", features_only=True, feature_norm=True, out_indices=(0,))


def test_a_backbone_is_no_classifier(server: tuple[str, Path], backbone: Any) -> None:
    torch.save(backbone[1], server[1] / "w.pth")
    with pytest.raises(CheckpointError, match=r"4 missing: norm\.weight"):
        create(f"{server[0]}/w.pth", feature_norm=True)


FAMILIES = {
    **{f"{name}_atto": {} for name in ("vmamba", "efficient_vmamba", "vim2", "viqs", "sparx_swin")},
    "group_mamba_atto": {},  # whose classifier has the only norm that its features lack otherwise
    "sparx_mamba_atto": dict(learnable_scale=True),
}


def classifier_file(folder: Path, model: nn.Module, form: str) -> dict[str, Any]:
    """Return the overlay that names a classifier's weights: a file of a run, an official one, or the weights."""
    if form == "run":
        save_weights(folder / "last.safetensors", model.state_dict(), "classification", Spec())
        return {"file": str(folder / "last.safetensors")}
    if form == "official":
        torch.save({"model": official(model.state_dict())}, folder / "w.pth")
        return {"file": str(folder / "w.pth")}
    return {"state_dict": model.state_dict()}


@dataclasses.dataclass
class Spec:
    model: str = ""


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in FAMILIES for form in ("run", "given")] + [("vmamba_atto", "official")],
    ids=str,
)
def test_features_from_a_classifier(tmp_path: Path, name: str, form: str, caplog: pytest.LogCaptureFixture) -> None:
    classifier = timm.create_model(name, num_classes=7).eval()
    overlay = classifier_file(tmp_path, classifier, form)
    options = dict(features_only=True, feature_norm=True, **FAMILIES[name])
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
    own, theirs = model.model.state_dict(), classifier.state_dict()
    first = timm.create_model(name, **options).model.state_dict()
    untrained = [key for key in own if key not in theirs]
    assert all(torch.equal(value, (theirs if key in theirs else first)[key]) for key, value in own.items())
    assert all(key.startswith("feature_norms.") or key.endswith(".attention.scale") for key in untrained)
    said = [record.message for record in caplog.records if "these keep their initial values" in record.message]
    assert len(said) == (len(untrained) > 0) == (name != "group_mamba_atto")
    assert all(line.startswith(f"{overlay.get('file', 'the given weights')}: without ") for line in said)
    assert all(key in line for line in said for key in untrained)
    assert any(key.endswith(".scale") for key in untrained) == ("learnable_scale" in options)
    assert model.pretrained_cfg.get("state_dict") is None


@pytest.mark.parametrize(
    "left_out", ["feature_norms.2.weight", "stages.3.blocks.1.dmca.attention.scale", "stem.conv1.weight"]
)
def test_some_of_what_classifiers_lack_is_an_error(left_out: str) -> None:
    options = dict(features_only=True, feature_norm=True, learnable_scale=True, depths=(1, 1, 2, 2))
    state = timm.create_model("sparx_mamba_atto", **options).model.state_dict()
    del state[left_out]
    with pytest.raises(CheckpointError, match=rf"1 missing: {left_out}$"):
        timm.create_model("sparx_mamba_atto", pretrained=True, pretrained_cfg_overlay={"state_dict": state}, **options)


def test_safetensors(server: tuple[str, Path], source: nn.Module) -> None:
    save_file(official(source.state_dict()), server[1] / "w.safetensors")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(create(f"{server[0]}/w.safetensors")(x), source(x))


def test_local_file(address: str, server: tuple[str, Path], source: nn.Module) -> None:
    path = server[1] / "weights.pth"
    x = torch.randn(1, 3, 32, 32)
    model = create("", overlay={"file": str(path)})
    assert torch.equal(model(x), source(x))


def fine_tuned(folder: Path, form: str, classes: int = 10) -> tuple[nn.Module, str]:
    """Return a classifier of few classes and its file, with our names or with official ones."""
    model = timm.create_model(NAME, num_classes=classes).eval()
    state = model.state_dict() if form == "ours" else official(model.state_dict())
    save_file(state, folder / "ten.safetensors")
    return model, str(folder / "ten.safetensors")


@pytest.mark.parametrize("form", ["ours", "official"])
@pytest.mark.parametrize("options", [{"num_classes": 10}, {}], ids=["asked", "default"])
def test_the_classifier_of_a_fine_tuned_file(
    tmp_path: Path, form: str, options: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    source, path = fine_tuned(tmp_path, form)
    model = create("", overlay={"file": path}, **options)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), source(x))
    assert (model.num_classes, model.pretrained_cfg["num_classes"]) == (10, 10)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("classes", [7, 1000, 0])
def test_a_classifier_that_is_left_out(tmp_path: Path, classes: int, caplog: pytest.LogCaptureFixture) -> None:
    source, path = fine_tuned(tmp_path, "ours")
    model = create("", overlay={"file": path}, num_classes=classes)
    x = torch.randn(2, 3, 32, 32)
    assert model.num_classes == classes
    assert torch.equal(model.forward_features(x), source.forward_features(x))
    said = f"{path}: its classifier of 10 classes was left out; that of the model, for {classes}, is not trained"
    assert (said in caplog.text) == (classes > 0)  # with 0 classes none is wanted


def test_no_more_classes_than_are_stored(tmp_path: Path, source: nn.Module) -> None:
    state = source.state_dict() | {"head.fc.weight": torch.zeros(10**12, 0)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of another shape: head\.fc\.weight"):
        create("", overlay={"file": str(tmp_path / "w.safetensors")})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int32], ids=str)
def test_weights_that_are_no_floats(tmp_path: Path, source: nn.Module, dtype: torch.dtype) -> None:
    state = official(source.state_dict())
    torch.save(state | {(key := "layers.0.blocks.0.op.Ds"): state[key].to(dtype)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=rf"1 not floats: stages\.0\.blocks\.0\.ss2d\.D \({dtype}\)"):
        create("", overlay={"file": str(tmp_path / "w.pth")})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_floats(tmp_path: Path, source: nn.Module, dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) for key, value in source.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    model = create("", overlay={"file": str(tmp_path / "w.pth")})
    assert all(torch.equal(value, state[key].float()) for key, value in model.state_dict().items())


def test_two_names_of_one_weight(tmp_path: Path, source: nn.Module) -> None:
    state = official(source.state_dict())
    torch.save(state | {"stem.conv1.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"patch_embed\.0\.weight and stem\.conv1\.weight give the same stem"):
        create("", overlay={"file": str(tmp_path / "w.pth")})


@pytest.mark.parametrize("damage", ["truncated", "page"])
def test_damaged_download(address: str, server: tuple[str, Path], damage: str) -> None:
    path = server[1] / "weights.pth"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"<html>moved</html>")
    with pytest.raises(CheckpointError, match=r"weights\.pth is not a readable PyTorch checkpoint: ") as caught:
        create(address)
    assert "\n" not in str(caught.value)


def test_weights_of_another_model(address: str) -> None:
    with pytest.raises(CheckpointError, match=r"stem\.conv1\.weight"):
        create(address, dims=(16, 32, 64, 128))
    with pytest.raises(CheckpointError, match=r"stages\.3\.blocks\.1"):
        create(address, depths=(1, 2, 3, 2))


def test_missing_keys_are_an_error_even_with_other_classes(server: tuple[str, Path], source: nn.Module) -> None:
    state = official(source.state_dict())
    del state["layers.1.blocks.0.op.Ds"]
    torch.save({"model": state}, server[1] / "w.pth")
    with pytest.raises(CheckpointError, match=r"stages\.1\.blocks\.0\.ss2d\.D"):
        create(f"{server[0]}/w.pth", num_classes=5)


def test_no_weights_published() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist for vmamba_atto"):
        timm.create_model(NAME, pretrained=True)
