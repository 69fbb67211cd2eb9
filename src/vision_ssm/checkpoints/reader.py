"""Reading checkpoint files without ever executing code from them."""

from __future__ import annotations

import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vision_ssm.errors import InputError

# Where checkpoints keep their weights; the first one present is used.
_WRAPPERS = ("model", "state_dict", "module", "model_state", "net")
_EMA_WRAPPERS = ("model_ema", "state_dict_ema", "ema_model", "ema")
_BACKBONE = "backbone."  # the prefix of the backbone in detectors and segmenters of OpenMMLab
_PREFIXES = ("module.", "_orig_mod.", _BACKBONE)
# The first bytes of files from before torch.save wrote zip archives: a pickled magic number.
_LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


class CheckpointError(InputError):
    """A file without usable weights, or with weights of another model.

    Args:
        message: One line.
        keys: All wrong keys, grouped by the problem; the message may name only the first ones.
    """

    def __init__(self, message: str, keys: Mapping[str, list[str]] | None = None) -> None:
        super().__init__(message)
        self.keys: dict[str, list[str]] = dict(keys or {})


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint file.

    Args:
        state: The weights by name.
        source: The key under which they were found; empty at the top level.
        placeholders: Names of the pickled classes that were not loaded; inert objects stood in for them.
        prefix: The prefix that all names had, and that was removed.
        other: The key of the weights that were not taken: the averaged ones, or with ``ema`` the plain ones.
    """

    state: dict[str, Tensor]
    source: str = ""
    placeholders: tuple[str, ...] = ()
    prefix: str = ""
    other: str | None = None

    @property
    def averaged(self) -> bool:
        """Whether the weights were found where averaged ones are kept."""
        return not set(_EMA_WRAPPERS).isdisjoint(self.source.split("."))


class _Inert(dict):
    """A placeholder for a pickled object whose class is not loaded; accepts any contents and does nothing."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a key, or be in a set

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return _Inert()

    def _ignore(self, *items: Any) -> None:
        pass

    append = extend = add = __setstate__ = _ignore


# The only names that are resolved; any other becomes an inert placeholder.
_KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": torch.Size,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
}


class _InertUnpickler(pickle.Unpickler):
    # Python's own unpickler calls nothing but what find_class returns. PyTorch's weights-only unpickler does not work
    # here: it rejects placeholders that are filled like a dict, and published checkpoints hold such configurations.

    unknown: dict[str, None]

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _KNOWN:
            function = _KNOWN[full]
            # A new wrapper each time: a file may set attributes of what it gets.
            return lambda *args: function(*args)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        self.unknown[full] = None
        return type("_Inert", (_Inert,), {})


def read_checkpoint(path: str | Path, ema: bool = False) -> Checkpoint:
    """Read the weights from a ``.safetensors`` file or a PyTorch checkpoint.

    Wrapping keys (``model``, ``state_dict``, ...) are removed, and so are prefixes that all names have (``module.``,
    ``_orig_mod.``, ``backbone.``). Nothing in the file is executed: objects of unknown classes, such as a pickled
    configuration, are read as inert placeholders and reported.

    Args:
        path: The file.
        ema: Take the averaged weights if the file has both.

    Raises:
        FileNotFoundError: If the file does not exist.
        CheckpointError: If the file is damaged, of another kind, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint file: {path}")
    if path.suffix == ".safetensors":
        try:
            state, prefix = _strip(load_file(path))
            return Checkpoint(state, prefix=prefix)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None
    content, placeholders = _load_inert(path)
    state, source = _unwrap(content, ema)
    if not state:
        found = ", ".join(map(repr, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"{path} holds no weights; looked under {', '.join(_WRAPPERS)}, found {found or 'nothing'}"
        )
    other, where = _unwrap(content, not ema)
    state, prefix = _strip(state)
    return Checkpoint(state, source, placeholders, prefix, where if other and where != source else None)


def load_checkpoint_file(path: str | Path) -> dict[str, Tensor]:
    """Return the weights that :func:`read_checkpoint` finds in a file."""
    return read_checkpoint(path).state


def take_backbone(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Split the weights of a detector or segmenter of OpenMMLab, whose backbone has the prefix ``backbone.``.

    Returns:
        The weights of the backbone without that prefix, and the number of all others by the first part of their names.
        A state dict without the prefix is returned whole.
    """
    ours = {key[len(_BACKBONE) :]: value for key, value in state.items() if key.startswith(_BACKBONE)}
    if not ours:
        return dict(state), {}
    return ours, dict(Counter(key.split(".")[0] for key in state if not key.startswith(_BACKBONE)))


def _load_inert(path: Path) -> tuple[Any, tuple[str, ...]]:
    with path.open("rb") as file:
        if file.read(len(_LEGACY_START)) == _LEGACY_START:
            raise CheckpointError(
                f"{path} is not a readable PyTorch checkpoint: its format is the one from before PyTorch 1.6; "
                "load and save it again with a newer PyTorch"
            )
    unknown: dict[str, None] = {}
    reading = ModuleType("reading")
    vars(reading)["Unpickler"] = type("_Unpickler", (_InertUnpickler,), {"unknown": unknown})
    try:
        # Rejects other archives, and TorchScript programs, which torch.load would pass to torch.jit.
        torch.serialization.get_unsafe_globals_in_checkpoint(path)
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=reading)
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile file can fail in any way
        reason = re.split(r"\. |\n", str(error).strip())[0] or type(error).__name__
        raise CheckpointError(f"{path} is not a readable PyTorch checkpoint: {reason}") from None
    return content, tuple(unknown)


def _unwrap(content: Any, ema: bool) -> tuple[dict[str, Tensor], str]:
    if not isinstance(content, Mapping):
        return {}, ""
    for key in (*_EMA_WRAPPERS, *_WRAPPERS) if ema else (*_WRAPPERS, *_EMA_WRAPPERS):
        if isinstance(content.get(key), Mapping):
            state, source = _unwrap(content[key], ema)
            if state:
                return state, f"{key}.{source}" if source else key
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}, ""


def _strip(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    stripped, removed = dict(state), ""
    while stripped and (prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in stripped)), None)):
        stripped = {key[len(prefix) :]: value for key, value in stripped.items()}
        removed += prefix
    return stripped, removed
