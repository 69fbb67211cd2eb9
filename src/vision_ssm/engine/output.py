import os
import sys
from typing import Any

from vision_ssm.engine.files import to_json


def make_table(*columns: str, header: bool = True) -> Any:
    """A rich table without lines.

    Args:
        columns: The headings; what starts with `>` is aligned to the right and not broken.
        header: Show the headings.
    """
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=header, header_style="dim")
    for column in columns:
        table.add_column(
            column.removeprefix(">"),
            justify="right" if column.startswith(">") else "left",
            overflow="fold",
            no_wrap=column.startswith(">") or column == "model",
        )
    return table


def make_console(*, stderr: bool = False) -> Any:
    """A rich console that does not wrap what is piped."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() or "COLUMNS" in os.environ else 1000)


def print_json(values: Any) -> None:
    """Print indented JSON on standard output."""
    sys.stdout.write(to_json(values))
