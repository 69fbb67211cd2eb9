from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vision_ssm.recipes.config import FolderConfig, to_dict


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named configuration for folders of images, and where its values come from."""

    name: str
    """As the command line calls it."""
    text: str
    """What it is for, in one line."""
    make: Callable[[Path], FolderConfig]
    """The configuration for a folder of images."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where the value of a field comes from, such as optim.lr; what is not named is this package's choice."""
    notes: tuple[str, ...] = ()
    """How the published training differed from what a configuration can say."""

    def values(self) -> dict[str, Any]:
        """All fields of the configuration but the data, by their dotted names."""
        plain = to_dict(self.make(Path()))
        del plain["data"]
        return dict(_flat(plain))


def cite(sources: Mapping[str, str]) -> dict[str, str]:
    """The source of every field, from the names of the fields (separated by spaces) that each source gives."""
    return {name: source for source, names in sources.items() for name in names.split()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        nested = isinstance(value, dict) and name != "model_args"
        pairs += _flat(value, f"{prefix}{name}.") if nested else [(prefix + name, value)]
    return pairs
