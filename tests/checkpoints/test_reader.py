"""Reading checkpoint files: every published form, and files that are damaged or hostile."""

from __future__ import annotations

import argparse
import builtins
import collections
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vision_ssm.checkpoints import CheckpointError, load_checkpoint_file, read_checkpoint, take_backbone

STATE = {"patch_embed.0.weight": torch.randn(4, 3, 3, 3), "layers.0.blocks.0.op.A_logs": torch.randn(8, 1)}


def saved(folder: Path, content: Any, name: str = "weights.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def assert_state(found: dict[str, Tensor], expected: dict[str, Tensor] = STATE) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in STATE.items()}


@pytest.mark.parametrize(
    ("content", "source"),
    [
        (STATE, ""),
        (collections.OrderedDict(STATE), ""),
        ({"model": STATE, "epoch": 3, "best": 82.5}, "model"),
        ({"state_dict": STATE, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}, "state_dict"),
        ({"module": STATE}, "module"),
        ({"state_dict": {"model": STATE}}, "state_dict.model"),
        (prefixed("module."), ""),
        ({"model": prefixed("module._orig_mod.")}, "model"),
        ({"model": {}, "state_dict": STATE}, "state_dict"),
        ({"model_ema": STATE}, "model_ema"),
        ({"ema_model": prefixed("module.module.")}, "ema_model"),
        ({"state_dict": prefixed("backbone."), "meta": {"epoch": 12}}, "state_dict"),
        (STATE | {"epoch": 7}, ""),
    ],
    ids=[
        "bare",
        "ordered",
        "model",
        "state_dict",
        "module",
        "nested",
        "data-parallel",
        "compiled",
        "empty-first",
        "ema-only",
        "ema-of-data-parallel",
        "backbone",
        "loose-epoch",
    ],
)
def test_wrappings(tmp_path: Path, content: Any, source: str) -> None:
    checkpoint = read_checkpoint(saved(tmp_path, content))
    assert_state(checkpoint.state)
    assert checkpoint.source == source
    assert checkpoint.placeholders == ()


AVERAGED = {key: value + 1 for key, value in STATE.items()}
N_AVERAGED = torch.tensor(3)


def named(prefix: str, state: dict[str, Tensor] = AVERAGED) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        "model.",
        "model._orig_mod.",
        "_orig_mod.model.",
        "module.model._orig_mod.module.",
        "_orig_mod.module.",
        "model.model.",
        "ema.module.",
        "module.ema_model.module.",
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_prefixes_in_any_order(tmp_path: Path, prefix: str, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pth" else save_file)(prefixed(prefix), path)
    checkpoint = read_checkpoint(path)
    assert_state(checkpoint.state)
    assert checkpoint.prefix == prefix


def test_compiled_parts(tmp_path: Path) -> None:
    state = {key.replace("blocks.", "_orig_mod.blocks.").replace(".op", ".op._orig_mod"): x for key, x in STATE.items()}
    assert_state(read_checkpoint(saved(tmp_path, named("model.", state))).state)


@pytest.mark.parametrize(
    ("content", "expected", "source", "other"),
    [
        ({"state_dict": prefixed("model.") | named("ema.module.")}, AVERAGED, "state_dict.ema", "state_dict.model"),
        (
            {"state_dict": prefixed("model.") | named("model_ema.module.")},
            AVERAGED,
            "state_dict.model_ema",
            "state_dict.model",
        ),
        ({"state_dict": prefixed("model.") | {"criterion.weight": torch.ones(3)}}, STATE, "state_dict.model", None),
        (named("module.") | {"n_averaged": N_AVERAGED}, AVERAGED, "", None),
        (named("module._orig_mod.") | {"n_averaged": N_AVERAGED}, AVERAGED, "", None),
        (
            {"state_dict": prefixed("model.") | named("ema_model.module.") | {"ema_model.n_averaged": N_AVERAGED}},
            AVERAGED,
            "state_dict.ema_model",
            "state_dict.model",
        ),
        ({"state_dict": STATE, "state_dict_ema": named("module.")}, STATE, "state_dict", "state_dict_ema"),
        ({"ema": {"module": AVERAGED, "decay": 0.999}}, AVERAGED, "ema.module", None),
    ],
    ids=["own-run", "ema", "loss", "averaged", "averaged-compiled", "lightning-averaged", "timm", "ema-only"],
)
def test_training_modules(
    tmp_path: Path, content: Any, expected: dict[str, Tensor], source: str, other: str | None
) -> None:
    checkpoint = read_checkpoint(saved(tmp_path, content, "last.ckpt"))
    assert_state(checkpoint.state, expected)
    assert checkpoint.source == source
    assert checkpoint.other == other
    assert checkpoint.averaged == ("ema" in source)


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = {"state_dict": prefixed("model.") | {"loss.\x1b[31mscale": torch.ones(3)}}
    path = saved(tmp_path, content, "last.ckpt")
    assert_state(read_checkpoint(path).state)
    assert f"{path}: left out, not of the model: loss.\\x1b[31mscale" in caplog.text


def test_two_names_of_one_weight(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a._orig_mod.weight": torch.ones(1), "a.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"a\._orig_mod\.weight and a\.weight are both a\.weight"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.eye(3).to_sparse(),
    ],
    ids=["quantized", "sparse"],
)
def test_tensors_that_are_not_dense(tmp_path: Path, make: Any) -> None:
    path = saved(tmp_path, {"model": STATE | {"head.weight": make()}})
    with pytest.raises(CheckpointError, match=r"head\.weight is no dense tensor, but made by torch\._utils\._rebuild_"):
        read_checkpoint(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols_and_views(tmp_path: Path, protocol: int) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    state = {
        "tied": whole,
        "tied too": whole,
        "column": whole[:, 2],
        "transposed": whole.T,
        "empty": whole[:0],
        "scalar": torch.tensor(5),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "eighth": torch.ones(3).to(torch.float8_e4m3fn),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save({"model": state, "args": {1, 2}}, tmp_path / "w.pth", pickle_protocol=protocol)
    found = read_checkpoint(tmp_path / "w.pth").state
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key].float(), value.float())
    assert found["column"].stride() == (6,)


def test_control_characters_are_escaped(tmp_path: Path) -> None:
    path = saved(tmp_path, {"\x1b[2J\u202e": 1, "model": {}})
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["model_ema", "ema_model", "state_dict_ema", "ema"])
def test_averaged_weights_on_request(tmp_path: Path, name: str) -> None:
    averaged = {key: value + 1 for key, value in STATE.items()}
    path = saved(tmp_path, {"model": STATE, name: {f"module.{key}": value for key, value in averaged.items()}})
    plain = read_checkpoint(path)
    assert_state(plain.state)
    assert (plain.source, plain.other, plain.averaged, plain.prefix) == ("model", name, False, "")
    found = read_checkpoint(path, ema=True)
    assert_state(found.state, averaged)
    assert (found.source, found.other, found.averaged, found.prefix) == (name, "model", True, "module.")


def test_the_only_weights(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": STATE})
    for ema in (False, True):
        checkpoint = read_checkpoint(path, ema=ema)
        assert (checkpoint.source, checkpoint.other, checkpoint.averaged) == ("model", None, False)


def test_backbone_of_a_detector() -> None:
    heads = {
        "neck.convs.0.weight": torch.ones(1),
        "roi_head.fc.weight": torch.ones(1),
        "roi_head.fc.bias": torch.ones(1),
    }
    backbone, others = take_backbone(prefixed("backbone.") | heads)
    assert_state(backbone)
    assert others == {"neck": 1, "roi_head": 2}
    whole, others = take_backbone(STATE)
    assert_state(whole)
    assert others == {}


def test_safetensors(tmp_path: Path) -> None:
    save_file(prefixed("module."), tmp_path / "weights.safetensors")
    assert_state(load_checkpoint_file(tmp_path / "weights.safetensors"))


@pytest.fixture
def vanished(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module of configuration classes that is gone when the file is read."""
    module = types.ModuleType("their_project")
    source = """
import enum
class Plain:
    def __init__(self): self.lr = 1e-3
class Node(dict):
    def __init__(self, **kw): super().__init__(kw); self.__dict__["frozen"] = True
class Slots:
    __slots__ = ("a",)
    def __init__(self): self.a = 1
class Reduced:
    def __reduce__(self): return (Reduced, (), {"x": 1})
class Kind(enum.Enum):
    A = 1
class Bag(set):
    pass
class Items(list):
    pass
"""
    exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, "their_project", module)
    return module


@pytest.mark.parametrize("kind", ["Plain", "Node", "Slots", "Reduced", "Kind", "Bag", "Items"])
def test_unknown_classes_are_inert(tmp_path: Path, vanished: types.ModuleType, kind: str) -> None:
    cls = getattr(vanished, kind)
    for name, value in vanished.__dict__.items():
        if isinstance(value, type):
            value.__module__, value.__qualname__ = "their_project", name
    contents = {"Kind": [1], "Bag": [{1, 2}], "Items": [[1, 2]]}.get(kind, [])
    thing = cls(lr=0.1, nested=cls(depth=2)) if kind == "Node" else cls(*contents)
    path = saved(
        tmp_path, {"model": STATE, "config": thing, "history": [thing, {thing: 1} if thing.__hash__ else thing]}
    )
    del sys.modules["their_project"]
    checkpoint = read_checkpoint(path)
    assert_state(checkpoint.state)
    assert checkpoint.placeholders == (f"their_project.{kind}",)
    assert "their_project" not in sys.modules


@pytest.mark.parametrize(
    "thing",
    [
        argparse.Namespace(lr=0.1),
        collections.deque([1, 2]),
        np.float64(82.5),
        np.arange(3),
        Path("runs/1"),
        torch.optim.SGD([torch.zeros(1)]),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_what_training_scripts_keep_beside_the_weights(tmp_path: Path, thing: Any) -> None:
    assert_state(read_checkpoint(saved(tmp_path, {"model": STATE, "args": thing})).state)


class Attack:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("place", ["beside", "instead", "as-key", "within"])
@pytest.mark.parametrize("function", ["system", "exec", "eval", "open", "getattr", "mkdir", "import"])
def test_nothing_is_executed(tmp_path: Path, function: str, place: str) -> None:
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w').close()"
    attack = {
        "system": Attack(os.system, f"touch {marker}"),
        "exec": Attack(builtins.exec, code),
        "eval": Attack(builtins.eval, code),
        "open": Attack(builtins.open, str(marker), "w"),
        "getattr": Attack(builtins.getattr, Attack(builtins.__import__, "os"), "system"),
        "mkdir": Attack(os.mkdir, str(marker)),
        "import": Attack(builtins.__import__, "antigravity"),
    }[function]
    content: Any = {
        "beside": {"model": STATE, "config": attack},
        "instead": attack,
        "as-key": {"model": STATE, "config": [(attack, 1)]},
        "within": {"model": STATE | {"bias": attack}},
    }[place]
    path = saved(tmp_path, content)
    # An object of no known class among the weights is dropped, and missed by strict loading.
    if place == "instead":
        with pytest.raises(CheckpointError, match=r"holds no weights|not a readable"):
            read_checkpoint(path)
    else:
        checkpoint = read_checkpoint(path)
        assert_state(checkpoint.state)
        assert checkpoint.placeholders
    assert not marker.exists()
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "target", [torch._utils._rebuild_tensor_v2, collections.OrderedDict], ids=["function", "class"]
)
def test_known_names_cannot_be_changed(tmp_path: Path, target: Any) -> None:
    before = dict(vars(target))
    # GLOBAL, then BUILD with (state, slot state): unpickling sets these as attributes of what it found
    name = f"c{target.__module__}\n{target.__qualname__}\n".encode()
    build = b"\x80\x02" + name + b"(N}X\x04\x00\x00\x00evilK\x01stb."
    path = saved(tmp_path, {"model": STATE})
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for record, content in records.items():
            archive.writestr(record, build if record.endswith("data.pkl") else content)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert vars(target) == before


def test_attacks_would_work_without_the_reader(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    torch.load(saved(tmp_path, Attack(os.mkdir, str(marker))), weights_only=False)
    assert marker.exists()


def test_stand_ins_do_not_outlive_the_reading(tmp_path: Path, vanished: types.ModuleType) -> None:
    vanished.Plain.__module__ = "their_project"
    vanished.Plain.__qualname__ = "Plain"
    path = saved(tmp_path, {"model": STATE, "config": vanished.Plain()})
    read_checkpoint(path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def bad_files(folder: Path) -> dict[str, tuple[str, bytes]]:
    whole = saved(folder, {"model": STATE}).read_bytes()
    torch.save({"model": STATE}, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(STATE, folder / "whole.safetensors")
    tensors = (folder / "whole.safetensors").read_bytes()
    return {
        "empty": ("a.pth", b""),
        "garbage": ("a.pth", bytes(range(256)) * 20),
        "page": ("a.pth", b"<!doctype html><title>404</title>"),
        "truncated": ("a.pth", whole[: len(whole) // 2]),
        "last-byte": ("a.pth", whole[:-1]),
        "legacy": ("a.pth", (folder / "old.pth").read_bytes()),
        "pickle": ("a.pth", pickle.dumps({"model": [1, 2]})),
        "tensors-empty": ("a.safetensors", b""),
        "tensors-truncated": ("a.safetensors", tensors[: len(tensors) // 2]),
        "tensors-garbage": ("a.safetensors", bytes(range(256)) * 20),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "garbage",
        "page",
        "truncated",
        "last-byte",
        "legacy",
        "pickle",
        "tensors-empty",
        "tensors-truncated",
        "tensors-garbage",
    ],
)
def test_damaged_files(tmp_path: Path, kind: str) -> None:
    name, content = bad_files(tmp_path)[kind]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is not a readable ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 250
    if kind == "legacy":
        assert "before PyTorch 1.6" in message


@pytest.mark.parametrize("flipped", range(0, 100, 10), ids=lambda n: f"{n}%")
def test_a_flipped_byte_never_escapes(tmp_path: Path, flipped: int) -> None:
    path = saved(tmp_path, {"model": STATE})
    content = bytearray(path.read_bytes())
    content[len(content) * flipped // 100] ^= 0xFF
    path.write_bytes(content)
    try:
        read_checkpoint(path)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("content", "found"),
    [({"model": {}, "epoch": 1}, "'model', 'epoch'"), ([1, 2], "list"), (torch.zeros(3), "Tensor"), ({}, "nothing")],
    ids=["empty-model", "list", "tensor", "nothing"],
)
def test_files_without_weights(tmp_path: Path, content: Any, found: str) -> None:
    path = saved(tmp_path, content)
    with pytest.raises(CheckpointError, match=f"holds no weights; looked under model, state_dict, .*, found {found}"):
        read_checkpoint(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint file"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="no such checkpoint file"):
        read_checkpoint(tmp_path)
