from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vision_ssm.errors import InputError

# Those of timm's that take the same steps with shares of the parameters as with all of them, and keep nothing but
# tensors of the parameters' shapes.
SHARDABLE_OPTIMIZERS = (
    *("adam", "adamax", "adamw", "adan", "adopt", "lamb", "laprop", "lars", "lion"),
    *("momentum", "nadam", "nadamw", "radam", "rmsprop", "sgd", "sgdw"),
)


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 by Lightning, with the checkpoints of any other run: one file of whole tensors.

    Args:
        processes: How many share the parameters.
    """

    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Let Lightning restore before it makes the loaders, which begin where the checkpoint was taken."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let Lightning call `load_optimizer_state_dict`."""
        return True

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """What it keeps, whole, in the first process; all have to call it."""
        state = optimizer.state_dict()
        return {**state, "state": {i: gather(values) for i, values in state["state"].items()}}

    def load_checkpoint(self, checkpoint_path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """Read the whole checkpoint in every process."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's share of the weights."""
        own = self.lightning_module.state_dict()
        shares = {name: _share(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(shares, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's share of what the optimisers keep."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            shares = {
                number: {name: _share(value, parameter) for name, value in saved["state"][number].items()}
                for number, parameter in zip(numbers, parameters, strict=True)
                if number in saved["state"]
            }
            optimizer.load_state_dict({**saved, "state": shares})


class ModelAverage(ModelEmaV3):
    """Timm's moving average; of a sharded model, each process averages its shares."""

    module: nn.Module

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Move towards `model`."""
        average = self.module
        self.module = _Shares(average)
        try:
            super().update(_Shares(model), step)
        finally:
            self.module = average


class _Shares(nn.Module):
    """What this process holds of a model, as plain tensors in the same memory."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._shares = {name: local(value) for name, value in model.state_dict().items()}

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        return self._shares


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Leave each process its share of a model's parameters, which are gathered for as long as they are needed.

    Each block (a child of a sequence called `blocks`, as in the models here and most of timm's) is gathered by
    itself, the rest at once.

    Args:
        model: The network.
        mesh: The processes, in one dimension.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 divides no others
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] == "blocks" and isinstance(module, (nn.Sequential, nn.ModuleList)):
            for block in module:
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def check_shardable(model: nn.Module, name: str) -> None:
    """Refuse a model that FSDP2 cannot divide.

    Raises:
        InputError: A parameter has no dimension along which it could be.
    """
    if single := [key for key, parameter in model.named_parameters() if parameter.ndim == 0]:
        raise InputError(f"--fsdp cannot divide {name}: its parameter {single[0]} is a single number")


def gather(state: Mapping[str, Any]) -> dict[str, Any]:
    """Whole tensors on the CPU, in the first process; all have to call it, for as many of the same names."""
    gathered: dict[str, Any] = {}
    for name, value in state.items():
        # One after the other, so that no process ever holds all.
        tensor = whole(value)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            gathered[name] = tensor.detach().cpu() if isinstance(tensor, Tensor) else tensor
    return gathered


def whole(value: Any) -> Any:
    """A tensor with the parts that other processes hold; all have to call it. Anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _share(value: Any, parameter: Tensor | None) -> Any:
    if not (isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
