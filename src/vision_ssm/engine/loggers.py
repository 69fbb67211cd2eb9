import importlib.util

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from vision_ssm.engine.run_folder import RunFolder
from vision_ssm.errors import InputError


def check_logger(name: str | None) -> None:
    """Refuse a logger whose package is missing.

    Raises:
        InputError: Naming the package.
    """
    if name is not None and importlib.util.find_spec(name) is None:
        raise InputError(f"--logger {name} needs a package that is not installed: pip install {name}")


def make_loggers(name: str | None, folder: RunFolder) -> list[Logger]:
    """Lightning's logger of that name, for the metrics of every epoch; the run has the name of its folder."""
    if name == "tensorboard":
        return [TensorBoardLogger(folder.path, name="", version=folder.logger.name)]
    if name == "wandb":
        folder.logger.mkdir(exist_ok=True)
        return [WandbLogger(folder.path.name, folder.logger, project="vision-ssm", group=folder.path.name)]
    return []
