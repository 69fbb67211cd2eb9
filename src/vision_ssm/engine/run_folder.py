import csv
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vision_ssm.engine.files import read_json, temporary
from vision_ssm.errors import InputError
from vision_ssm.recipes import CONFIGS, TrainConfig, from_dict, to_dict
from vision_ssm.recipes.config import FREE_ON_RESUME, option

try:
    import fcntl
except ImportError:  # on Windows, folders are not locked
    fcntl = None  # type: ignore[assignment]


_NAMES = ["confusion.png", "predictions.png"]
"""Files of a run; those that `RunFolder` names are added."""


def _file(name: str, doc: str) -> Any:
    _NAMES.append(name)
    return property(lambda folder: folder.path / name, doc=doc)


@dataclass(frozen=True)
class RunFolder:
    """Where a training run keeps its files.

    Args:
        path: The folder.
    """

    path: Path

    config = _file("config.json", "The full configuration, as JSON.")
    model = _file("model.json", "The description of the model, for people; each weights file holds its own copy.")
    state = _file("last.ckpt", "All that is needed to resume: weights, optimizer, schedule, average, progress.")
    best = _file("best.safetensors", "Weights of the best epoch.")
    last = _file("last.safetensors", "Weights of the latest checkpoint.")
    metrics = _file("metrics.csv", "One row of metrics per epoch.")
    unreadable = _file("unreadable.txt", "The training images that cannot be read, and why; only where there are some.")
    results = _file("results.json", "Metrics of the best weights on the validation images.")
    curves = _file("curves.png", "Learning curves.")
    logger = _file("logger", "What TensorBoard or Weights & Biases keeps, if it is used.")

    def check_free(self, *, overwrite: bool) -> None:
        """Refuse a folder that must not be written to.

        Raises:
            InputError: It has content and `overwrite` is off, or the content is not that of a run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file, not a folder")
        if self.path.is_dir() and any(self.path.iterdir()) and not self.is_unused():
            if not overwrite:
                raise InputError(f"{self.path} is not empty; add --overwrite, or --resume to continue the run in it")
            if not self.is_run():
                raise InputError(f"{self.path} does not hold a run; not overwriting it")

    def is_run(self) -> bool:
        """Whether the configuration of a run is here, and not that of something else."""
        try:
            return bool(self.read_config())
        except InputError:
            return False

    def is_unused(self) -> bool:
        """Whether a run was begun here but stopped, or killed, before it saved its state."""
        begun = (self.config, self.model, self.best, self.last, self.logger, self.unreadable, self.state)
        names = {temporary(path).name for path in begun} | {".lock"}
        names |= {path.name for path in begun[:-1]} if self.is_run() else set()
        return {entry.name for entry in self.path.iterdir()} <= names

    def clear(self) -> None:
        """Make the folder, without the files of a run but with all others; call `check_free` first."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self.is_run() and self.read_config().logger:
            shutil.rmtree(self.logger, ignore_errors=True)
        for name in reversed(_NAMES) if self.is_run() else ():  # the configuration, which marks a run, late
            if name != self.logger.name:
                (self.path / name).unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing to the folder; the lock ends with the process, however it ends.

        Raises:
            InputError: Another process writes to it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a") as file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"another process is writing to {self.path}") from None
            yield

    def read_config(self) -> TrainConfig:
        """The configuration the run was started with.

        Raises:
            InputError: There is no run in the folder, or its configuration is damaged.
        """
        if not self.path.is_dir():
            raise InputError(f"no such run folder: {self.path}")
        if not self.config.is_file():
            raise InputError(f"{self.path} is not a run folder (it has no config.json)")
        try:
            values: dict[str, Any] = read_json(self.config)
            return from_dict(CONFIGS[values["task"]], values["config"])
        except (InputError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"cannot read {self.config}: {type(error).__name__}: {error}") from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """The metrics of each epoch.

        Raises:
            InputError: There are none yet, or the file is damaged.
        """
        if not self.metrics.is_file():
            raise InputError(f"{self.path} has no {self.metrics.name}; its first epoch was never finished")
        try:
            with self.metrics.open(newline="") as file:
                rows = [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]
            return [row | {name: int(row[name]) for name in ("epoch", "step")} for row in rows]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"cannot read {self.metrics}: {type(error).__name__}: {error}") from error

    def check_resumable(self, config: TrainConfig) -> None:
        """Refuse to resume under a configuration that would lead elsewhere.

        Raises:
            InputError: There is no run, or nothing saved of it yet, or `config` differs from its configuration in
                what changes the outcome.
        """
        saved = self.read_config()
        if saved.task != config.task:
            raise InputError(f"{self.path} is a run of {saved.task}, not {config.task}")
        old, new = (json.loads(json.dumps(to_dict(each))) for each in (saved, config))  # tuples are lists in files
        for name, value in new.items():
            if old[name] != value and name not in FREE_ON_RESUME and (name, value) != ("monitor", None):
                raise InputError(
                    f"cannot resume {self.path}: it was started with {option(name)} {old[name]}, not {value}"
                )
        if not self.state.is_file():
            raise InputError(f"{self.path} was stopped before anything was saved; start it again")


def rank(row: Mapping[str, Any], monitor: str) -> tuple[float, float]:
    """What is larger for a better epoch: the monitored metric, then minus the loss."""
    return row[f"val_{monitor}"], -row.get("val_loss", 0.0)


def weights_file(path: Path, which: Literal["best", "last"] | None = None) -> Path:
    """The weights in a run (the best by default) or in a folder that `export hub` wrote; a file stands for itself.

    Raises:
        InputError: It is neither, the run has no such weights yet, or there is nothing to choose from.
    """
    if path.suffix == ".pt2":
        raise InputError(f"{path}: programs are for torch.export.load; give the run, or an ONNX file")
    if path.suffix in (".onnx", ".safetensors") and not path.exists():
        raise InputError(f"no such file: {path}")
    exported = path / "model.safetensors"
    if path.is_file() or exported.is_file():
        if which:
            raise InputError(f"--weights {which} is for the folder of a run; {path} has one set of weights")
        return path if path.is_file() else exported
    folder = RunFolder(path)
    folder.read_config()
    weights = folder.last if which == "last" else folder.best
    if not weights.is_file():
        raise InputError(f"{path} has no {weights.name}; its first epoch was never finished")
    return weights
