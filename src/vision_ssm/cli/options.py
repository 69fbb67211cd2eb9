import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import Any

import tyro
from tyro.conf import FlagCreatePairsOff

from vision_ssm.errors import InputError


def parse_options(kind: Any, words: Sequence[str], command: str, **options: Any) -> Any:
    """Turn words into an instance of a dataclass; `--help` prints the help and exits.

    Args:
        kind: The dataclass.
        words: What follows the command.
        command: Its name, such as `eval`.
        options: Further arguments of `tyro.cli`.

    Raises:
        InputError: The words do not fit; one line instead of tyro's frame.
    """
    program = f"vision-ssm {command}"
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=list(words), prog=program, config=(FlagCreatePairsOff,), **options)
    except SystemExit as leave:
        if leave.code in (0, None):
            sys.stderr.write(printed.getvalue())
            raise
        raise InputError(f"{_complaint(printed.getvalue())} (see {program} --help)") from None


def _complaint(frame: str) -> str:
    """What tyro's frame says first, and the names of the options that it suggests."""
    lines = [re.sub(r"[│╭╮╰╯|+]", " ", line).strip() for line in frame.splitlines()[1:]]  # the first is a title
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line and not line.strip("─- "):
            paragraphs.append([])
        elif line:
            paragraphs[-1].append(line)
    first, *others = [paragraph for paragraph in paragraphs if paragraph] or [["the options do not fit"]]
    near = [
        line.split()[0]
        for paragraph in others
        if re.search("meant|similar", paragraph[0])
        for line in paragraph
        if line.startswith("--")
    ]
    return " ".join(first) + (f"; did you mean {' or '.join(near)}?" if near else "")
