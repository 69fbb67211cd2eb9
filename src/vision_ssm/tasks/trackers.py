import importlib.util
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from vision_ssm.errors import InputError
from vision_ssm.recipes import Tracker


def check_tracker(tracker: Tracker | None) -> None:
    """Refuse a tracker whose package is missing.

    Raises:
        InputError: Naming the package.
    """
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        raise InputError(f"--tracker {tracker} needs a package that is not installed: pip install {tracker}")


def make_loggers(tracker: Tracker | None, folder: Path) -> list[Logger]:
    """What sends the figures of every epoch elsewhere, beside the table in the folder of the run.

    Args:
        tracker: Where to.
        folder: The folder of the run; its name is that of the run. What a tracker writes is put into `tracker` there.
    """
    if tracker == "tensorboard":
        return [TensorBoardLogger(folder, name="", version="tracker")]
    if tracker == "wandb":
        (folder / "tracker").mkdir(exist_ok=True)
        # The same id continues the same curves when a run is resumed.
        return [WandbLogger(folder.name, folder / "tracker", id=folder.name, project="vision-ssm", resume="allow")]
    return []
