import importlib.util

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from vision_ssm.errors import InputError
from vision_ssm.recipes import Tracker
from vision_ssm.tasks.run_folder import RunFolder


def check_tracker(tracker: Tracker | None) -> None:
    """Refuse a tracker whose package is missing.

    Raises:
        InputError: Naming the package.
    """
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        raise InputError(f"--tracker {tracker} needs a package that is not installed: pip install {tracker}")


def make_loggers(tracker: Tracker | None, folder: RunFolder) -> list[Logger]:
    """What sends the figures of every epoch elsewhere, beside the table in the folder of the run.

    Args:
        tracker: Where to.
        folder: The folder of the run; its name is that of the run.
    """
    if tracker == "tensorboard":
        return [TensorBoardLogger(folder.path, name="", version=folder.tracker.name)]
    if tracker == "wandb":
        folder.tracker.mkdir(exist_ok=True)
        name = folder.path.name
        return [WandbLogger(name, folder.tracker, project="vision-ssm", group=name)]
    return []
