import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy

from vision_ssm.errors import InputError
from vision_ssm.recipes import TrainConfig
from vision_ssm.tasks.sharding import ShardedStrategy


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
