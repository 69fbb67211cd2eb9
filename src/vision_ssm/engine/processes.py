import os
import time

import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from vision_ssm.errors import InputError
from vision_ssm.recipes.config import RunConfig


def process_rank(config: RunConfig) -> int:
    """Which of the run's processes this is; rank 0 writes and prints.

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
                    f"--num-nodes {config.num_nodes} is {config.processes}"
                )
            return environment.global_rank()
    environment = LightningEnvironment()
    return environment.node_rank() * config.devices + environment.local_rank() if config.processes > 1 else 0


def lost_another(error: BaseException) -> bool:
    """Whether an error only says that another process of the run has ended."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def common_name(config: RunConfig) -> str:
    """A name for the run, new and the same in all of its processes.

    Raises:
        InputError: The processes were started by something else and cannot agree on one.
    """
    now = time.strftime("%Y%m%d-%H%M%S")
    if config.processes == 1:
        return now
    if config.num_nodes > 1 or TorchElasticEnvironment.detect() or SLURMEnvironment.detect():
        raise InputError("several machines, torchrun and SLURM need --out DIR: all processes share the run's folder")
    return os.environ.setdefault("VISION_SSM_RUN", now)  # the processes that this one starts inherit it
