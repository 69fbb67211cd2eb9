import os
import time

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from vision_ssm.errors import InputError
from vision_ssm.recipes.config import RunConfig


def process_rank(config: RunConfig) -> int:
    """Which of the run's processes this is; rank 0 writes and prints.

    Raises:
        InputError: torchrun or SLURM started another number of processes than the configuration says.
    """
    found = environment_of(config)
    if isinstance(found, LightningEnvironment):
        return found.node_rank() * config.devices + found.local_rank() if config.processes > 1 else 0
    if found.world_size() != config.processes:
        name = "SLURM" if isinstance(found, SLURMEnvironment) else "torchrun"
        raise InputError(
            f"{name} started {found.world_size()} processes, but --devices {config.devices} times "
            f"--num-nodes {config.num_nodes} is {config.processes}"
        )
    return found.global_rank()


def environment_of(config: RunConfig) -> ClusterEnvironment:
    """What started the processes: torchrun, srun, or Lightning itself."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    # The variables of a job without those of srun: a single process in its allocation.
    if SLURMEnvironment.detect() and "SLURM_STEP_ID" in os.environ and config.processes > 1:
        return SLURMEnvironment()
    return LightningEnvironment()


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
    if config.num_nodes > 1 or not isinstance(environment_of(config), LightningEnvironment):
        raise InputError("several machines, torchrun and SLURM need --out DIR: all processes share the run's folder")
    return os.environ.setdefault("VISION_SSM_RUN", now)  # the processes that this one starts inherit it
