import ast
import importlib
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from vision_ssm.errors import InputError

Size = Annotated[tuple[int, ...], arg(metavar="HEIGHT [WIDTH]", help_behavior_hint="(default: the model's own)")]


def split_values(text: str) -> list[str]:
    """Split a list at its commas, but not at those within brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _integers(words: list[str]) -> tuple[int, ...]:
    values = [value for word in words for value in split_values(word) if value]
    if wrong := [value for value in values if not value.strip().isdecimal()]:
        raise ValueError(f"expected whole numbers, such as 224,512, not {wrong[0]}")
    return tuple(map(int, values))


Integers = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="INT,...",
        instance_from_str=_integers,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))] if value else [],
    ),
]
"""Whole numbers with commas or spaces between them."""


def run_named(
    command: str, synopsis: str, functions: Mapping[str, tuple[str, str]], words: Sequence[str], note: str
) -> int:
    """Run the function that the first word names, with the others; or print which there are.

    Args:
        command: Name of the command.
        synopsis: What follows it.
        functions: By name, where each one is in this package and what it does.
        words: What was given.
        note: A line below the functions.

    Raises:
        InputError: There is none of that name.
    """
    if not words or words[0] in ("-h", "--help"):
        kind, width = synopsis.split()[0], max(map(len, functions))
        lines = "".join(f"  {name:<{width}}  {text}\n" for name, (_, text) in functions.items())
        (sys.stdout if words else sys.stderr).write(
            f"usage: vision-ssm {command} {synopsis} [OPTIONS]\n\nvalues of {kind}:\n{lines}\n{note}\n"
            f"`vision-ssm {command} {kind} --help` lists the options.\n"
        )
        return 0 if words else 2
    if words[0] not in functions:
        raise InputError(f"{command} what? {', '.join(functions)}, not {words[0]}")
    module, function = functions[words[0]][0].split(":")
    return getattr(importlib.import_module(f"vision_ssm.cli.{module}"), function)(words[1:])


def parse_options(kind: Any, words: Sequence[str], command: str, *, pairs: bool = False, **options: Any) -> Any:
    """Turn words into an instance of a dataclass; `--help` prints the help and exits, so do words that do not fit.

    A field that is a mapping takes KEY=VALUE words; a value is a Python literal, or else a string. A field that is a
    flag or a path is a flag that a path or `off` may follow.

    Args:
        kind: The dataclass.
        words: What follows the command.
        command: Its name, such as `eval`.
        pairs: Whether every flag has a form that turns it off, because defaults differ.
        options: Further arguments of `tyro.cli`.
    """
    registry = ConstructorRegistry()
    registry.primitive_rule(_key_values)
    registry.primitive_rule(_flag_or_path)
    config: tuple[Any, ...] = (OmitArgPrefixes,) if pairs else (OmitArgPrefixes, FlagCreatePairsOff)
    return tyro.cli(kind, args=list(words), prog=f"vision-ssm {command}", config=config, registry=registry, **options)


def _key_values(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Mapping[str, Any]] | None:
    if typing.get_origin(info.type) is not Mapping:
        return None

    def parse(words: list[str]) -> Mapping[str, Any]:
        pairs = [word.partition("=") for word in words if words != ["none"]]
        if wrong := [key for key, equals, _ in pairs if not equals]:
            raise ValueError(f"expected KEY=VALUE, not {wrong[0]}")
        return {pair[0]: read_literal(pair[2], "".join(pair)) for pair in pairs}

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[KEY=VALUE ...]",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda value: [f"{k}={v}" for k, v in value.items()] or ["none"],
    )


def read_literal(text: str, word: str) -> Any:
    """Read a Python literal, true, false or none; any other text stands for itself, unless there are brackets in it.

    Args:
        text: The text.
        word: What to show of the command line where it cannot be read.

    Raises:
        ValueError: What is in brackets is no Python literal.
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if any(bracket in text for bracket in "()[]{}"):
            raise ValueError(f"cannot read the value in {word}") from None
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _flag_or_path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool | Path] | None:
    if set(typing.get_args(info.type)) != {bool, Path}:
        return None

    def parse(words: list[str]) -> bool | Path:
        if len(words) > 1:
            raise ValueError(f"expected one path, not {' '.join(words)}")
        return words != ["off"] and (Path(words[0]) if words else True)

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[PATH|off]",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, (bool, Path)),
        str_from_instance=lambda value: [str(value) if isinstance(value, Path) else "off"],
    )


def height_and_width(given: tuple[int, ...], default: Sequence[int]) -> tuple[int, int]:
    """Return height and width as `--size` gives them, or the default, whose last two numbers they are."""
    if len(given) > 2:
        raise InputError(f"--size takes one or two numbers, got {' '.join(map(str, given))}")
    height, width = given or default[-2:] if len(given) != 1 else given * 2
    return height, width
