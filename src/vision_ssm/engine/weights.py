import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from vision_ssm.checkpoints import CheckpointError, can_convert, convert_official, load_checkpoint_file, load_strict
from vision_ssm.engine.files import atomic_write
from vision_ssm.errors import InputError

_METADATA_KEY = "vision_ssm"


def save_weights(path: Path, weights: Mapping[str, Tensor], task: str, spec: Any) -> None:
    """Write a model's state, the name of its task and its description into one safetensors file, whole or not at all.

    Raises:
        OSError: The disk is full, say.
    """
    # Cloned, because safetensors refuses tensors that share memory.
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(tensors, to_metadata(task, spec)))


def to_metadata(task: str, spec: Any) -> dict[str, str]:
    """The name of a task and the description of its model, as files hold them."""
    return {_METADATA_KEY: json.dumps({"task": task, **dataclasses.asdict(spec)})}


def from_metadata(entries: Mapping[str, str]) -> dict[str, Any]:
    """The name of the task, under `task`, and the description in what a file holds.

    Raises:
        KeyError, TypeError, ValueError, RecursionError: There is none, or it is damaged.
    """
    values = json.loads(entries[_METADATA_KEY])
    return {"task": values["task"], **values}


def read_metadata(path: Path) -> dict[str, Any]:
    """The name of the task, under `task`, and the description inside a file that `save_weights` wrote.

    Raises:
        InputError: The file is missing, damaged or was written by something else.
    """
    if not path.is_file():
        raise InputError(f"no such weights file: {path}")
    if path.suffix == ".ckpt":
        raise InputError(f"{path} is the state to resume a run from; its weights are in last.safetensors beside it")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return from_metadata(file.metadata() or {})
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} was not written by a vision-ssm run, or is damaged") from error


def stored_metadata(path: Path) -> dict[str, Any] | None:
    """What `read_metadata` returns, or None for the files of somebody else."""
    try:
        return read_metadata(path) if path.suffix == ".safetensors" else None
    except InputError:
        return None


def read_weights(path: Path, model_name: str | None = None) -> dict[str, Tensor]:
    """The weights in a checkpoint file. No code in the file is ever run.

    Args:
        path: The file.
        model_name: The model of an official checkpoint, whose names are converted.

    Raises:
        InputError: The file is missing or damaged.
    """
    if not path.is_file():
        raise InputError(f"no such checkpoint file: {path}")
    state = load_checkpoint_file(path)
    # Where there is no conversion, the names can only be the model's own.
    return convert_official(model_name, state) if model_name and can_convert(model_name) else state


def load_weights(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load weights into a model; every key has to match.

    Args:
        model: The model.
        state: The weights.
        path: Where they come from, for messages.

    Raises:
        InputError: They belong to another model; names a few of the differing keys.
    """
    try:
        load_strict(model, dict(state))
    except CheckpointError as error:
        raise InputError(f"{path}: {error}") from None
