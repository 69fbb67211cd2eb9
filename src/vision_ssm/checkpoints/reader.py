"""Reading checkpoint files without ever executing code from them."""

from __future__ import annotations

import dataclasses
import io
import logging
import math
import os
import pickle
import re
import struct
import sys
import zipfile
from collections import Counter, namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickletools import genops, markobject
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vision_ssm.errors import InputError, printable, shorten

_logger = logging.getLogger(__name__)

# Where checkpoints keep their weights; the first one present is used.
_WRAPPERS = ("model", "state_dict", "module", "model_state", "net")
_EMA_WRAPPERS = ("model_ema", "state_dict_ema", "ema_model", "ema")
_BACKBONE = "backbone."  # the prefix of the backbone in detectors and segmenters of OpenMMLab
_PREFIX = re.compile(r"(?:module\.|_orig_mod\.|model\.|backbone\.)*")
_COMPILED = re.compile(r"(?<![^.])(?:_orig_mod\.)+")  # of a part of the model
# The first bytes of files from before torch.save wrote zip archives: a pickled magic number.
_LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


class CheckpointError(InputError):
    """A file without usable weights, or with weights of another model.

    Args:
        message: One line.
        keys: All wrong keys, grouped by the problem; the message may name only the first ones.
    """

    def __init__(self, message: str, keys: Mapping[str, list[str]] | None = None) -> None:
        super().__init__(printable(message[:4000]))  # it may have names from the file
        self.keys: dict[str, list[str]] = dict(keys or {})


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint file.

    Args:
        state: The weights by name.
        source: The key under which they were found; empty at the top level.
        placeholders: Names of the pickled classes that were not loaded.
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


# A class or function that the file names, or what the file makes with it; neither is looked up or called.
_Name = namedtuple("_Name", "name")
# Where the file keeps a tensor, whose numbers are not read yet; without a dtype, the function that makes a sparse one.
_Tensor = namedtuple("_Tensor", "record dtype offset size stride")


def read_checkpoint(path: str | Path, ema: bool = False) -> Checkpoint:
    """Read the weights from a ``.safetensors`` file or a PyTorch checkpoint.

    Wrapping keys (``model``, ``state_dict``, ...) are removed, and so are prefixes that all names have (``module.``,
    ``_orig_mod.``, ``model.``, ``backbone.``). Where one state dict holds a whole training module, as Lightning's do,
    its moving average is taken if there is one, and its model otherwise.

    Nothing in the file is executed: objects of unknown classes, such as a pickled configuration, are passed over and
    reported. Time and memory are bounded by the size of the file, whatever is in it.

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
    kind = "safetensors file" if path.suffix == ".safetensors" else "PyTorch checkpoint"
    with path.open("rb") as file:
        try:
            if kind == "PyTorch checkpoint":
                return _Archive(path, file).read(ema)
            if int.from_bytes(file.read(8), "little") > _longest_directory(file):
                raise ValueError("its header is too long")
            return _choose(path, load_file(path))
        except CheckpointError:
            raise
        except Exception as error:  # a damaged or hostile file can fail in any way
            reason = re.split(r"\. |\n", str(error).strip())[0] or type(error).__name__
            raise CheckpointError(f"{path} is not a readable {kind}: {reason}") from None


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


def _longest_directory(file: IO[bytes]) -> int:
    # Reading one takes some 20 times its length.
    return 2**20 + os.fstat(file.fileno()).st_size // 100


class _ShortReads(io.FileIO):
    def read(self, size: int | None = -1, /) -> bytes:
        # zipfile reads the directory of an archive at once, and finds that it is cut off.
        return super().read(min((size or 0) % 2**64, _longest_directory(self)))


class _Archive:
    """What ``torch.save`` writes: a zip archive with one pickle, and the numbers of each storage as they are.

    Neither ``torch.load`` nor :class:`pickle.Unpickler` bounds what a file can make it do, and PyTorch's weights-only
    unpickler rejects the objects that published checkpoints carry along.
    """

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self.file, self.size = path, file, path.stat().st_size
        if file.read(len(_LEGACY_START)) == _LEGACY_START:
            raise ValueError("it is from before PyTorch 1.6; load and save it again with a newer PyTorch")
        with _ShortReads(path) as short, zipfile.ZipFile(short) as archive:
            self.records = {info.filename: info for info in archive.infolist()}
        self.root = next((name[: -len("data.pkl")] for name in self.records if name.endswith("/data.pkl")), "")
        if f"{self.root}byteorder" in self.records and bytes(self._load("byteorder", 6)) != b"little":
            raise ValueError("its numbers are not little-endian")

    def read(self, ema: bool) -> Checkpoint:
        # Text takes up to six times its length until it is passed over.
        pickled = bytes(self._load("data.pkl", 2**22 + self.size // 3).numpy())
        content, unknown = _interpret(pickled, most=200_000 + self.size // 300)
        orders = (*_WRAPPERS, *_EMA_WRAPPERS), (*_EMA_WRAPPERS, *_WRAPPERS)
        (state, source), (others, where) = (_unwrap(content, orders[which], set()) for which in (ema, not ema))
        if not state:
            found = ", ".join(map(repr, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
            looked = f"looked under {', '.join(_WRAPPERS)}, found {found.lstrip('_') or 'nothing'}"
            raise CheckpointError(f"{self.path} holds no weights; {looked}")
        chosen = _choose(self.path, state, source)
        other = where if others and where != source else chosen.other
        return dataclasses.replace(chosen, state=self._tensors(chosen.state), placeholders=unknown, other=other)

    def _tensors(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        total, left = 0, self.size
        for key, tensor in state.items():
            if not isinstance(tensor.dtype, torch.dtype) or not isinstance(tensor.record, str):
                raise ValueError(f"{key} is no dense tensor, but made by {tensor.record}")
            total += math.prod(tensor.size) * tensor.dtype.itemsize
            if total > 2 * self.size:  # with tied weights, that is; expanded ones may have any size
                raise ValueError(f"it stores far fewer numbers than {key} has, whose shape is {tensor.size}")
        storages: dict[str, Any] = {}
        for record in dict.fromkeys(tensor.record for tensor in state.values()):
            storages[record] = self._load(f"data/{record}", left).untyped_storage()
            left -= len(storages[record])
        return {key: torch.empty(0, dtype=x.dtype).set_(storages[x.record], *x[2:]) for key, x in state.items()}

    def _load(self, name: str, most: int) -> Tensor:
        """Return the bytes of a record, of which there may be so many."""
        if (info := self.records.get(f"{self.root}{name}")) is None:
            raise ValueError(f"it has no {name}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
            raise ValueError(f"{name} is compressed, or longer than the file allows; save it again with PyTorch")
        self.file.seek(info.header_offset + 26)
        self.file.seek(sum(struct.unpack("<HH", self.file.read(4))), os.SEEK_CUR)
        buffer = torch.empty(info.file_size, dtype=torch.uint8)
        if self.file.readinto(buffer.numpy()) < len(buffer):
            raise ValueError(f"{name} ends early")
        return buffer


def _interpret(pickled: bytes, most: int) -> tuple[Any, tuple[str, ...]]:
    """Return what a pickle describes, and the names in it that have no meaning here.

    Only what leads to weights is made: dicts with text as keys, tuples, numbers, short text and places of tensors.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []
    memo: dict[int, Any] = {}
    unknown: dict[str, None] = {}
    arg: Any
    for count, (opcode, arg, _) in enumerate(genops(pickled)):
        before, leaves = opcode.stack_before, len(opcode.stack_after)
        items: list[Any] = []
        start = len(stack) - len(before)
        if markobject in before:  # all objects above the last mark
            items, stack = stack, below.pop()
            start = len(stack) - before.index(markobject)
        if count > most or start < 0:
            raise ValueError("it holds too many objects for its size" if count > most else "it takes what is not there")
        taken, stack[start:] = stack[start:], []
        result = taken[0] if taken else arg  # what is taken first is what is changed
        match opcode.name:
            case "BINPUT" | "LONG_BINPUT" | "PUT" if arg <= count:
                memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                result = memo[arg]
            case "MEMOIZE":
                memo[len(memo)] = result
            case "MARK":
                below.append(stack)
                stack, leaves = [], 0
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                result = (*taken, *items)
            case "EMPTY_LIST" | "LIST":
                result = []
            case "EMPTY_DICT" | "DICT" | "SETITEM" | "SETITEMS":
                result, *pairs = *(taken or [{}]), *items
                if isinstance(result, dict):  # other keys can take any time to hash
                    result |= {key: x for key, x in zip(pairs[::2], pairs[1::2], strict=True) if isinstance(key, str)}
            case "GLOBAL" | "STACK_GLOBAL":
                result = _find(".".join(taken) or arg.replace(" ", ".", 1), unknown)
            case "REDUCE":
                result = _make(*taken)
            case "STOP":
                return result, tuple(unknown)
            case _ if sys.getsizeof(arg) > 5000:
                result = None
        stack += [result] * leaves
    raise ValueError("it ends early")


def _find(name: str, unknown: dict[str, None]) -> Any:
    module, _, attribute = name.rpartition(".")
    if module == "torch" and attribute.endswith("Storage"):
        return torch.serialization.StorageType(attribute).dtype
    if module == "torch" and isinstance(dtype := vars(torch).get(attribute), torch.dtype):
        return dtype
    name = printable(name[:100])
    if not name.startswith(("torch._utils._rebuild_", "torch.storage.UntypedStorage", "collections.OrderedDict")):
        unknown[name] = None
    return _Name(name)


def _make(function: Any, args: Any) -> Any:
    """Return what one of the functions that PyTorch's own pickles call makes; anything else stays a name."""
    match function:
        case _Name("collections.OrderedDict") if not args:
            return {}
        case _Name("torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state"):
            return args[0]
        case _Name("torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor_v3" as name):
            (_, dtype, record), (offset, size, stride) = args[0][:3], args[1:4]
            dtype = args[6] if name.endswith("_v3") else dtype
            numbers = (offset, *size[:65], *stride[:65])
            if len(numbers) < 130 and all(isinstance(number, int) and 0 <= number < 2**63 for number in numbers):
                return _Tensor(record, dtype, offset, size, stride)
            raise ValueError("it describes a tensor wrongly")
        case _Name(name) if "._rebuild_" in name:
            return _Tensor(name, None, 0, (), ())
    return function


def _unwrap(content: Any, wrappers: Sequence[str], seen: set[int]) -> tuple[dict[str, Any], str]:
    """Return the tensors in the first wrapper that has some, and its name; ``seen`` are the dicts that have none."""
    if not isinstance(content, dict) or id(content) in seen:
        return {}, ""
    seen.add(id(content))  # it may hold itself
    for key in wrappers:
        state, source = _unwrap(content.get(key), wrappers, seen)
        if state:
            return state, f"{key}.{source}".strip(".")
    return {key: x for key, x in content.items() if isinstance(x, _Tensor)}, ""


def _choose(path: Path, state: Mapping[str, Any], source: str = "") -> Checkpoint:
    """Return the weights of the model alone, without the prefixes that others put before all of their names."""
    names = [key for key in state if key.rpartition(".")[2] != "n_averaged"]  # of torch's AveragedModel
    prefix, other = _common_prefix(names), None
    sides = [f"{prefix}{side}." for side in (*_EMA_WRAPPERS, "model")]
    if sides := [side for side in sides if any(key.startswith(side) for key in names)]:
        if left_out := [key for key in names if not key.startswith(tuple(sides))]:
            _logger.warning("%s: left out, not of the model: %s", path, printable(shorten(left_out)))
        names = [key for key in names if key.startswith(sides[0])]
        prefix = sides[0] + _common_prefix([key[len(sides[0]) :] for key in names])
        source, other, *_ = *(f"{source}.{side}".strip(".") for side in sides), None
    ours: dict[str, str] = {}
    for key in names:
        name = _COMPILED.sub("", key[len(prefix) :])
        if ours.setdefault(name, key) != key:
            raise ValueError(f"{ours[name]} and {key} are both {name}")
    return Checkpoint({name: state[key] for name, key in ours.items()}, source, prefix=prefix, other=other)


def _common_prefix(names: list[str]) -> str:
    return _PREFIX.findall(os.path.commonprefix(names))[0]  # noqa: RUF071  (characters, not folders)
