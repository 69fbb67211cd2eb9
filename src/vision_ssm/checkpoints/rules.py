"""One table of rules per published model: which of its tensors become which of ours.

A table maps published keys to our keys; the first rule that matches applies. A key that ends in a dot is a prefix: all
keys that start with it keep what follows. The empty key is the prefix of all. In a published key ``#`` is a number, and
``{1,2}`` lists what differs in the keys of tensors that are joined into one. In ours ``#`` is the next number of the
published key, and ``#+1`` or ``#-1`` the one after or before it.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from vision_ssm.checkpoints.reader import CheckpointError
from vision_ssm.errors import shorten

State = dict[str, Tensor]


class To:
    """Our keys for a published tensor that is not merely renamed.

    Args:
        *keys: Several if the tensor is split, none if it is not needed.
        by: Returns our tensor, or a tuple with one tensor per key, given the published tensor, or the list of those
            that are joined. A rule does not apply to tensors for which it raises a ``RuntimeError`` or ``IndexError``,
            as torch does for wrong shapes.
    """

    def __init__(self, *keys: str, by: Callable[[Any], Any] = lambda value: value) -> None:
        self.keys, self.by = keys, by


Rules = Mapping[str, str | To]


def within(theirs: str, ours: str, rules: Rules) -> dict[str, str | To]:
    """Return the rules of a module with the prefixes of its place in a model."""
    targets = {key: _target(to) for key, to in rules.items()}
    return {theirs + key: To(*(ours + name for name in to.keys), by=to.by) for key, to in targets.items()}


def pointwise(weight: Tensor) -> Tensor:
    """Turn the weight of a 1x1 convolution, (d', d, 1, 1), into that of a linear layer; leave others as they are."""
    return weight.flatten(1) if weight.dim() == 4 else weight


def convert(rules: Rules, state: Mapping[str, Tensor]) -> State:
    """Map a published state dict to our keys and shapes.

    Keys without a rule stay as they are, so that our own keys pass through and strict loading lists unknown ones.

    Raises:
        CheckpointError: If tensors that are joined are missing or differ in shape, or two become the same.
    """
    return {key: value for key, (value, _) in apply_rules(rules, state).items()}


def apply_rules(rules: Rules, state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, list[str]]]:
    """Return our tensors like :func:`convert`, each with the published keys it was made of."""
    compiled = [(*_compile(theirs), _target(to)) for theirs, to in rules.items()]
    ours: dict[str, tuple[Tensor, list[str]]] = {}
    used: set[str] = set()
    problems: list[str] = []

    def add(name: str, tensor: Tensor, keys: list[str]) -> None:
        if name in ours:
            raise CheckpointError(f"{' and '.join([*ours[name][1], *keys])} give the same {name}")
        ours[name] = tensor, keys

    for key in (key for key in state if key not in used):
        for pattern, parts, to in compiled:
            if (match := pattern.fullmatch(key)) is None:
                continue
            keys = [key[: match.start("part")] + part + key[match.end("part") :] for part in parts] or [key]
            if problem := _misfit(keys, state):
                problems.append(problem)
            else:
                try:
                    made = to.by([state[each] for each in keys] if parts else state[key])
                except (RuntimeError, IndexError):
                    continue
                tensors = made if isinstance(made, tuple) else (made,)
                for name, tensor in zip((_fill(each, match) for each in to.keys), tensors, strict=False):
                    add(name, tensor, keys)
            used.update(keys)
            break
        else:
            add(key, state[key], [key])
    if problems:
        raise CheckpointError(
            f"groups of tensors that are joined do not fit together: {shorten(problems, separator='; ')}"
        )
    return ours


def invert(rules: Rules, names: Iterable[str]) -> dict[str, list[str]]:
    """Return the published keys of each of our names; a name that no rule makes stays as it is.

    Where several published forms give the same name, that is the form of the first rule, but a rule for a part of a
    module goes before one for all the rest of it. Rules whose published key has a number that ours lacks are left out.
    """
    inverse = []
    for theirs, to in rules.items():
        for ours in _target(to).keys:
            parts = re.split(r"#([+-]1)?", ours)
            literals, steps = parts[::2], [int(step or 0) for step in parts[1::2]]
            if theirs.count("#") == len(steps):
                pattern = r"(\d{1,9})".join(map(re.escape, literals)) + _rest(theirs)
                inverse.append((-ours.count("."), re.compile(pattern), steps, theirs))
    inverse.sort(key=lambda rule: rule[0])
    return {name: _published(inverse, name) for name in names}


def _published(inverse: Sequence[tuple[int, re.Pattern[str], list[int], str]], name: str) -> list[str]:
    for _, pattern, steps, theirs in inverse:
        if match := pattern.fullmatch(name):
            key = theirs
            for number, step in zip(match.groups(), steps, strict=False):
                key = key.replace("#", str(int(number) - step), 1)
            return [re.sub(r"\{.+\}", part, key) + match["rest"] for part in _alternatives(theirs) or [""]]
    return [name]


def _target(to: str | To) -> To:
    return to if isinstance(to, To) else To(to)


def _compile(theirs: str) -> tuple[re.Pattern[str], list[str]]:
    """Return the regular expression of a published key, and the alternatives in its braces."""
    parts = _alternatives(theirs)
    escaped = re.sub(r"\\{.+\\}", f"(?P<part>{'|'.join(parts)})", re.escape(theirs)).replace(r"\#", r"(\d{1,9})")
    return re.compile(escaped + _rest(theirs)), parts


def _alternatives(theirs: str) -> list[str]:
    return found[1].split(",") if (found := re.search(r"\{(.+)\}", theirs)) else []


def _rest(theirs: str) -> str:
    return f"(?P<rest>{'.+' if theirs.endswith('.') or not theirs else ''})"


def _fill(ours: str, match: re.Match[str]) -> str:
    named = match.re.groupindex.values()
    numbers = iter([int(group) for i, group in enumerate(match.groups(), start=1) if i not in named])
    return re.sub(r"#([+-]1)?", lambda m: str(next(numbers) + int(m[1] or 0)), ours) + match["rest"]


def _misfit(keys: Sequence[str], state: Mapping[str, Tensor]) -> str | None:
    """Return which tensors to join are missing, or of another shape than most of them."""
    if missing := [key for key in keys if key not in state]:
        return f"missing {', '.join(missing)}"
    shapes = [tuple(state[key].shape) for key in keys]
    usual = max(shapes, key=shapes.count)
    odd = [f"{key} {shape}" for key, shape in zip(keys, shapes, strict=True) if shape != usual]
    return f"{', '.join(odd)} where the other groups have {usual}" if odd else None
