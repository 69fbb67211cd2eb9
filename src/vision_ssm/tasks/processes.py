import os
import time
from datetime import timedelta

import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy

from vision_ssm.errors import InputError
from vision_ssm.recipes import TrainConfig
from vision_ssm.tasks.sharding import ShardedStrategy

# How long the process that keeps the store waits for the others to ask it.
_PATIENCE = timedelta(seconds=3)


def process_rank(config: TrainConfig) -> int:
    """Which of the run's processes this is; number 0 writes and prints.

    Raises:
        InputError: torchrun or SLURM started another number of processes than the configuration says.
    """
    for kind, name in ((TorchElasticEnvironment, "torchrun"), (SLURMEnvironment, "SLURM")):
        # A single process in the allocation of a batch job is nothing that SLURM counts.
        if kind.detect() and (kind is TorchElasticEnvironment or config.processes > 1):
            environment = kind()
            if environment.world_size() != config.processes:
                raise InputError(
                    f"{name} started {environment.world_size()} processes, but --devices {config.devices} times "
                    f"--nodes {config.nodes} is {config.processes}"
                )
            return environment.global_rank()
    environment = LightningEnvironment()
    return environment.node_rank() * config.devices + environment.local_rank() if config.processes > 1 else 0


def strategy_for(config: TrainConfig) -> Strategy | str:
    """How the processes of a run work together: gradients are averaged, and each has all weights or a share of them."""
    if config.processes == 1:
        return "auto"
    if config.fsdp:
        return ShardedStrategy(config.processes)
    # Buffers differ between processes during an epoch (see `ClassificationTask.on_validation_start`).
    return DDPStrategy(broadcast_buffers=False)


def lost_another(error: BaseException) -> bool:
    """Whether an error only says that another process of the run has ended."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def first_to_say(line: str) -> bool:
    """Whether no other process of the run has asked this about the same line; True where they cannot be asked.

    They can be under torchrun, and otherwise from when training begins.
    """
    store = _store()
    if store is None:
        return True
    key = f"vision-ssm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{line}"
    try:
        asked = int(store.add(key, 1))
        # Without torchrun the first process keeps the store.
        end = time.monotonic() + _PATIENCE.total_seconds()
        keeps = torch.distributed.is_initialized() and not _agent_keeps_store() and torch.distributed.get_rank() == 0
        while keeps and store.add(key, 0) < torch.distributed.get_world_size() and time.monotonic() < end:
            time.sleep(0.05)
    except RuntimeError:  # the process that kept it has ended
        return True
    return asked == 1


def common_name(config: TrainConfig) -> str | None:
    """A name for the run, new and the same in all of its processes; None if they cannot agree on one yet."""
    now = time.strftime("%Y%m%d-%H%M%S")
    if config.processes == 1:
        return now
    if (store := _store()) is not None:
        return str(store.compare_set("vision-ssm/name", "", now), "utf-8")
    if SLURMEnvironment.detect():
        return f"slurm-{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_STEP_ID', 0)}"
    if config.nodes > 1:
        return None
    if not LightningEnvironment().creates_processes_externally:  # no process but this one yet; they inherit it
        os.environ["VISION_SSM_NAME"] = now
    return os.environ.get("VISION_SSM_NAME")


def _agent_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store() -> torch.distributed.Store | None:
    """What all processes can write to and read from, if there is such a thing yet."""
    if torch.distributed.is_initialized():
        return torch.distributed.distributed_c10d._get_default_store()
    if _agent_keeps_store():
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return torch.distributed.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_PATIENCE)
    return None
