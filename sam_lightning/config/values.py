"""What a type annotation allows as a value, and how to say it in words.

OmegaConf's structured configs would take nan for a number, 2 for a switch and "1" for a number, and
have no unions with lists. Here a value has the annotated type already, and every number is finite.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf

from sam_lightning.config.errors import ConfigError

ABSENT: Any = object()  # the value of a key that may be left out
MOST = 2**32 - 1  # of whole numbers
NAMES = {
    **{bool: "true, false", int: "a whole number", float: "a number", str: "a text"},
    NoneType: "null",
}


class Rule(NamedTuple):
    """In ``Annotated``: which values of the type are allowed; ``{}`` in the words is the type."""

    words: str
    holds: Callable[[Any], bool]


def within(
    low: float,
    high: float | None = None,
    note: str = "",
    *,
    above: bool = False,
    below: bool = False,
) -> Rule:
    """Numbers from ``low`` to ``high``, without ``low`` if ``above``, without ``high`` if so."""
    most = sys.float_info.max if high is None else high
    excluded = {low} if above else {high} if below else set()
    if high is None:
        words = f"{{}} >{'' if above else '='} {low}"
    else:
        words = f"{{}} from {'above ' * above}{low} to {'below ' * below}{high}"
    return Rule(words + note, lambda v: low <= v <= most and v not in excluded)


def distinct(values: Any) -> bool:
    """Whether a list has elements, and each once."""
    return 0 < len(values) == len({*map(str, values)})


Count = Annotated[int, within(1)]
Seed = Annotated[int, within(0, 2**32 - 1)]
Index = Annotated[int, within(0)]
NonNegative = Annotated[float, within(0)]
Positive = Annotated[float, within(0, above=True)]
Fraction = Annotated[float, within(0, 1)]
BelowOne = Annotated[float, within(0, 1, below=True)]
Text = Annotated[str, Rule("{}", bool)]
Folder = Annotated[str, Rule("the path of a folder", bool)]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a configuration is allowed by an annotation; any is by unknown ones."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return fits(value, arguments[0]) and all(rule.holds(value) for rule in arguments[1:])
    if kind in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if kind is Literal:
        return any(type(value) is type(a) and value == a for a in arguments)
    if kind in (list, tuple, Sequence):
        each = arguments if kind is tuple and ... not in arguments else None
        if not (OmegaConf.is_list(value) or isinstance(value, list | tuple)):
            return False
        hints = each or [arguments[0]] * len(value)
        return len(hints) == len(value) and all(map(fits, value, hints))
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if hint is int:
        return type(value) is int and abs(value) <= MOST
    if hint in NAMES:
        return type(value) is hint
    return hint is Any or not is_class(hint) or isinstance(value, hint)


def is_class(hint: Any) -> bool:
    """Whether an annotation is a class; Python 3.10 takes ``list[int]`` for one."""
    return isinstance(hint, type) and get_origin(hint) is None


def words(hint: Any) -> str:
    """The values that an annotation allows, as the end of ``key=value: allowed is ...``."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Annotated:
        said = words(arguments[0])
        for rule in arguments[1:]:
            said = rule.words.format(said)
        return said
    if kind in (Union, UnionType):
        typed = [a for a in arguments if a in NAMES or not is_class(a)]
        *parts, last = sorted(map(words, typed), key="null".__eq__)
        described = any(part.startswith(("a ", "an ", "the ")) for part in [*parts, last])
        return ", ".join([*parts, f"or {last}" if described and parts else last])
    if kind is Literal:
        plain = {True: "true", False: "false"}
        return ", ".join(str(plain.get(a, a) if isinstance(a, bool) else a) for a in arguments)
    if kind in (list, tuple, Sequence):
        many = "two" if kind is tuple and ... not in arguments else "a list of"
        of = words(arguments[0]).removeprefix("a ").replace("number", "numbers", 1)
        return f"{many} {of}"
    return NAMES.get(hint, "something else")


def check_value(key: str, value: Any, hint: Any) -> None:
    """Refuse a value that an annotation does not allow."""
    if not fits(value, hint):
        too_large = type(value) is int and value > MOST and fits(MOST, hint)
        most = f", up to {MOST}" if too_large else ""
        value = "null" if value is None else value
        raise ConfigError(f"{key}={value}: allowed is {words(hint)}{most}")


def check_values(cfg: DictConfig, hints: Mapping[str, Any]) -> None:
    """Refuse the first value that its key's annotation does not allow; any key may be absent."""
    for key, hint in hints.items():
        value = OmegaConf.select(cfg, key, default=ABSENT)
        if value is not ABSENT:
            check_value(key, value, hint)
