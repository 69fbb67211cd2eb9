from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vision_ssm.recipes.config import ClassificationConfig, TrainConfig

OURS = "this package's choice"
"""The source of values that nobody published."""

Sourced = Mapping[str, Mapping[str, Any]]
"""Values of a configuration by the source that they come from."""


@dataclass(frozen=True)
class Recipe:
    """A named configuration whose values stand beside their sources; call it with changes to get the configuration.

    Args:
        name: As the command line calls it.
        text: What it is for, in one line.
        values: Values by source; what is left out is the default of the configuration.
        notes: How the published training differed from what a configuration can express.
        config: The configuration that it makes.
    """

    name: str
    text: str
    values: Sourced
    notes: tuple[str, ...] = ()
    config: type[TrainConfig] = ClassificationConfig

    def __call__(self, **changes: Any) -> Any:
        """The configuration, with other values for some fields.

        Raises:
            InputError: A value is outside its limits.
        """
        given = {name: value for values in self.values.values() for name, value in values.items()}
        return self.config(**given | changes)

    @property
    def sources(self) -> dict[str, str]:
        """The source of each field; fields that are not listed are the package's choice."""
        return {name: source for source, values in self.values.items() for name in values if source != OURS}


def recipe(config: type[TrainConfig] = ClassificationConfig) -> Callable[[Callable[[], Sourced]], Recipe]:
    """Turn a function that returns values by source into a recipe of its name, described by its docstring."""
    return lambda make: Recipe(make.__name__, (make.__doc__ or "").rstrip("."), make(), config=config)
