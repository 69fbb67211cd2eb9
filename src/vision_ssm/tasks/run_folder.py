import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vision_ssm.errors import InputError
from vision_ssm.recipes import DigitsConfig, FolderConfig, TimmConfig, TrainConfig, from_dict, to_dict
from vision_ssm.tasks.files import temporary, write_json

# They change neither weights nor figures.
_FREE_ON_RESUME = ("device", "workers", "max_skipped", "tracker", "data.max_unreadable", "data.strict")

KINDS: dict[str, type[TrainConfig]] = {"digits": DigitsConfig, "folder": FolderConfig, "timm": TimmConfig}
"""The commands of `vision-ssm train`, and their configurations."""


@dataclass(frozen=True)
class RunFolder:
    """Where a training run keeps its files.

    Args:
        path: The folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The full configuration, as JSON."""
        return self.path / "config.json"

    @property
    def model(self) -> Path:
        """The `ModelSpec`, as JSON for people; each weights file holds its own copy."""
        return self.path / "model.json"

    @property
    def state(self) -> Path:
        """All that is needed to resume: weights, optimiser, schedule, average, progress."""
        return self.path / "last.ckpt"

    @property
    def best(self) -> Path:
        """Weights of the epoch with the highest validation accuracy."""
        return self.path / "best.safetensors"

    @property
    def last(self) -> Path:
        """Weights of the latest checkpoint."""
        return self.path / "last.safetensors"

    @property
    def metrics(self) -> Path:
        """One row of figures per epoch."""
        return self.path / "metrics.csv"

    @property
    def unreadable(self) -> Path:
        """The training images that could not be read, with the reasons; only where there are some."""
        return self.path / "unreadable.txt"

    @property
    def results(self) -> Path:
        """Figures of the best weights on the validation images."""
        return self.path / "results.json"

    @property
    def pictures(self) -> tuple[Path, Path, Path]:
        """Learning curves, confusion matrix and sheet of predictions."""
        return self.path / "curves.png", self.path / "confusion.png", self.path / "predictions.png"

    @property
    def tracker(self) -> Path:
        """What a tracker keeps, if there is one."""
        return self.path / "tracker"

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
            if not self.config.is_file():
                raise InputError(f"{self.path} holds something else than a run; not overwriting it")

    def is_unused(self) -> bool:
        """Whether a run was begun here but stopped, or killed, before it saved its state."""
        begun = (self.config, self.model, self.best, self.last, self.tracker, self.unreadable)
        names = {path.name for path in begun} | {temporary(path).name for path in (*begun, self.state)}
        return {entry.name for entry in self.path.iterdir()} <= names

    def clear(self) -> None:
        """Make the folder, empty; call `check_free` first."""
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)

    def write_config(self, config: TrainConfig) -> None:
        """Write `config.json`."""
        kind = next(name for name, kind in KINDS.items() if isinstance(config, kind))
        write_json(self.config, {"train": kind, **to_dict(config)})

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
            values: dict[str, Any] = json.loads(self.config.read_text())
            return from_dict(KINDS[values.pop("train")], values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"cannot read {self.config}: {error}") from error

    def check_resumable(self, config: TrainConfig) -> None:
        """Refuse to resume under a configuration that would lead elsewhere.

        Raises:
            InputError: There is no run, or nothing saved of it yet, or `config` differs from its configuration in
                what changes the outcome.
        """
        saved = self.read_config()
        if type(saved) is not type(config):
            raise InputError(f"{self.path} was started with other data; resume it with --resume {self.path} alone")
        for name, before, now in _differences(to_dict(saved), to_dict(config)):
            if name not in _FREE_ON_RESUME:
                option = name.replace("_", "-")
                raise InputError(f"cannot resume {self.path}: it was started with --{option} {before}, not {now}")
        if not self.state.is_file():
            raise InputError(f"{self.path} was stopped before anything was saved; start it again")


def weights_file(path: Path, which: Literal["best", "last"] = "best") -> Path:
    """The weights in the folder of a run; a file stands for itself.

    Raises:
        InputError: It is neither, or the run has no such weights yet.
    """
    if path.is_file():
        return path
    folder = RunFolder(path)
    folder.read_config()
    weights = folder.best if which == "best" else folder.last
    if not weights.is_file():
        raise InputError(f"{path} has no {weights.name}; its first epoch was never finished")
    return weights


def _differences(old: Any, new: Any, prefix: str = "") -> Sequence[tuple[str, Any, Any]]:
    if not (isinstance(old, dict) and isinstance(new, dict)) or prefix == "model_args.":
        return [] if old == new else [(prefix.rstrip("."), old, new)]
    names = dict.fromkeys([*old, *new])
    return [d for name in names for d in _differences(old.get(name), new.get(name), f"{prefix}{name}.")]
