import ast
import contextlib
import io
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import tyro
from tyro.conf import FlagCreatePairsOff
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from vision_ssm.errors import InputError


def parse_options(
    kind: Any,
    words: Sequence[str],
    command: str,
    registry: ConstructorRegistry | None = None,
    *,
    pairs: bool = False,
    **options: Any,
) -> Any:
    """Turn words into an instance of a dataclass; `--help` prints the help and exits.

    A field that is a mapping takes KEY=VALUE words; a value is a Python literal, or else a string.

    Args:
        kind: The dataclass.
        words: What follows the command.
        command: Its name, such as `eval`.
        registry: Rules for further types.
        pairs: Whether every flag has a form that turns it off, because defaults differ.
        options: Further arguments of `tyro.cli`.

    Raises:
        InputError: The words do not fit; one line instead of tyro's frame.
    """
    program = f"vision-ssm {command}"
    printed = io.StringIO()
    registry = registry or ConstructorRegistry()
    registry.primitive_rule(_key_values)
    try:
        with contextlib.redirect_stderr(printed):
            config = () if pairs else (FlagCreatePairsOff,)
            return tyro.cli(kind, args=list(words), prog=program, config=config, registry=registry, **options)
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


def _key_values(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Mapping[str, Any]] | None:
    if typing.get_origin(info.type) is not Mapping:
        return None

    def parse(words: list[str]) -> Mapping[str, Any]:
        pairs = [word.partition("=") for word in words if words != ["none"]]
        if wrong := [key for key, equals, _ in pairs if not equals]:
            raise ValueError(f"expected KEY=VALUE, not {wrong[0]}")
        if wrong := ["".join(pair) for pair in pairs if _is_broken(_literal(pair[2]))]:
            raise ValueError(f"cannot read the value in {wrong[0]}")
        return {key: _literal(value) for key, _, value in pairs}

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[KEY=VALUE ...]",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda value: [f"{k}={v}" for k, v in value.items()] or ["none"],
    )


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _is_broken(value: Any) -> bool:
    """Whether a value is a string for the only reason that its brackets make no Python literal."""
    return isinstance(value, str) and any(bracket in value for bracket in "()[]{}")
