"""Kinds of value: how a flag or a line of YAML is read, and the rule that it obeys."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import os
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

_NEAREST, _FLOAT32 = "did you mean", "float32 holds"  # how the hints of a kind begin
# A smaller probability rounds to zero: heads use the smallest instead, whose loss is 87.3, not infinite.
SMALLEST_FLOAT32, _LARGEST_FLOAT32 = 1.1754944e-38, 3.4028235e38


def key_of(name: str) -> str:
    """A name as flags have it: ``Hidden_Size`` -> ``hidden-size``."""
    return name.strip().lower().replace("_", "-")


@dataclass(frozen=True)
class Kind:
    """How a value is read and which rule it obeys.

    Parameters
    ----------
    read : callable
        Takes the string of a flag, a YAML value or an already read value, returns the value, and raises
        ``ValueError`` or ``TypeError`` where the rule is broken. ``read(read(x)) == read(x)``.
    rule : str
        The rule in words, as it follows "must be".
    metavar : str
        The value's placeholder in ``--help``; empty for a switch.
    nargs : str, optional
        As in `argparse`: ``'+'`` for a flag with several values.
    """

    read: Callable[[Any], Any]
    rule: str
    metavar: str = ""
    nargs: str | None = None

    @property
    def is_switch(self) -> bool:
        """Whether its flag takes no value."""
        return not self.metavar


def integer(low: int = 1, high: int | None = None) -> Kind:
    """Whole numbers from `low` to `high`, both included."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, (numbers.Integral, str)):
            raise TypeError
        number = int(value)
        if number < low or (high is not None and number > high):
            raise ValueError
        return number

    return Kind(read, f"a whole number from {low} to {high}" if high else f"a whole number, {low} or more", "N")


def real(low: float, below: float = math.inf, *, above: bool = False) -> Kind:
    """Numbers in [low, below), or in (low, below) where `above` is set; float32 must hold them, for MXNet."""

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (numbers.Real, str)):
            raise TypeError
        number = float(value)
        if abs(number) < SMALLEST_FLOAT32 and not above:
            number = 0.0
        if number and not SMALLEST_FLOAT32 <= abs(number) <= _LARGEST_FLOAT32:
            raise ValueError(f"{_FLOAT32} {SMALLEST_FLOAT32:.2g} to {_LARGEST_FLOAT32:.2g}")
        if number < low or (above and number == low) or number >= below:
            raise ValueError
        return number

    rule = f"a number above {low:g}" if above else f"a number, {low:g} or more"
    return Kind(read, rule if below == math.inf else f"{rule} and below {below:g}", "X")


def choice(*names: str) -> Kind:
    """One of `names`; case does not matter, and ``-`` and ``_`` are the same."""
    by_key = {key_of(name): name for name in names}

    def read(value: Any) -> str:
        try:
            return by_key[key_of(value)]
        except (KeyError, AttributeError):
            near = difflib.get_close_matches(key_of(str(value)), by_key, n=1)
            raise ValueError(f"{_NEAREST} {by_key[near[0]]}?" if near else "") from None

    return Kind(read, f"one of {', '.join(names)}", "{" + ",".join(names) + "}")


def text(metavar: str) -> Kind:
    """A text that is not blank."""

    def read(value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError
        if not value.strip():
            raise ValueError
        return value

    return Kind(read, "a text that is not blank", metavar)


def pathname(metavar: str) -> Kind:
    """A name or a path. Expands ``~``, which a shell leaves in ``--save=~/run``, and which YAML may have too."""
    one = text(metavar).read

    def read(value: Any) -> str:
        return os.path.expanduser(one(os.fspath(value) if isinstance(value, os.PathLike) else value))

    return Kind(read, "a name or a path", metavar)


def pathnames(*counts: int, rule: str, metavar: str) -> Kind:
    """A tuple of names or paths, as many as one of `counts`."""
    one = pathname(metavar).read

    def read(value: Any) -> tuple[str, ...]:
        if not isinstance(value, (str, os.PathLike, list, tuple)):
            raise TypeError
        items = tuple(one(item) for item in (value if isinstance(value, (list, tuple)) else [value]))
        if len(items) not in counts:
            raise ValueError
        return items

    return Kind(read, rule, metavar, "+")


def integers(low: int, rule: str, nargs: str | None = None) -> Kind:
    """A tuple of different whole numbers, `low` or more: ``0,1,2``, ``[0, 1, 2]`` or ``0``."""
    one = integer(low).read

    def read(value: Any) -> tuple[int, ...]:
        items = value if isinstance(value, (list, tuple)) else [value]
        numbers = tuple(one(part) for item in items for part in str(item).split(","))
        if len(set(numbers)) != len(numbers) or not numbers:
            raise ValueError
        return numbers

    return Kind(read, rule, "N" if nargs else "N,N", nargs)


def ascending(low: int, rule: str) -> Kind:
    """A tuple of whole numbers, `low` or more, each above the one before it: ``2000 20000`` or ``2000,20000``."""
    different = integers(low, rule, "+")

    def read(value: Any) -> tuple[int, ...]:
        numbers: tuple[int, ...] = different.read(value)
        if list(numbers) != sorted(numbers):
            raise ValueError
        return numbers

    return dataclasses.replace(different, read=read)


def optional(kind: Kind, *also: object) -> Kind:
    """`kind`, or None, written ``none`` (a flag), ``null`` (YAML) or as one of `also`."""
    nothing = {"none", "null", *map(str, also)}

    def read(value: Any) -> Any:
        single = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
        return None if single is None or str(single).lower() in nothing else kind.read(value)

    return dataclasses.replace(kind, read=read, rule=f"{kind.rule}, or none")


def switch() -> Kind:
    """On or off: ``--name`` and ``--no-name``, in YAML true and false."""

    def read(value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError
        return value

    return Kind(read, "true or false")


def option(default: Any, kind: Kind, help: str, *aliases: str, keep: str = "") -> Any:
    """Declare a field of a section: its default, its `Kind`, its help and its other names (snake_case).

    `keep` is the YAML key under which OpenSeq2Seq has the same dropout, as the probability of keeping an element.
    """
    return field(default=default, metadata={"kind": kind, "help": help, "aliases": aliases, "keep": keep})


def keep_probability(field_name: str) -> Kind:
    """Numbers in (0, 1], read as the probability ``1 - value`` that `field_name` holds."""

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError
        keep = Decimal(str(value))
        if not 0 < keep <= 1 or float(1 - keep) == 1:
            raise ValueError
        return float(1 - keep)

    return Kind(read, f"a number above 0, at most 1 (it sets {field_name} to 1 - value)", "X")


def read_value(
    declared: dataclasses.Field[Any], raw: Any, label: str, problems: list[str], kind: Kind | None = None
) -> Any:
    """Read one value by its field's rule or `kind`; if it breaks the rule, add to `problems`, return the default."""
    own = kind is None
    kind = kind or declared.metadata["kind"]
    try:
        return kind.read(raw)
    except (ValueError, TypeError, OverflowError, InvalidOperation) as error:
        hint = str(error) if str(error).startswith((_NEAREST, _FLOAT32)) else ""
        if own and not hint and declared.default is not None and not kind.is_switch:
            hint = f"for example {show(declared.default)}"
        shown = repr(raw) if isinstance(raw, float) else show(raw)
        line = f"{label} {shown}".rstrip() + f": must be {kind.rule}"
        problems.append(f"{line}; {hint}" if hint else line)
        return declared.default


def show(value: Any) -> str:
    """A value as a user would write it, on one line, shortened where it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, (list, tuple)) and all(isinstance(item, (str, int, float)) for item in value):
        shown = (" " if any(isinstance(item, str) for item in value) else ",").join(map(str, value))
    else:
        shown = value if isinstance(value, str) else reprlib.repr(value)
    shown = shown if shown.isprintable() and shown.strip() else repr(shown)
    return shown if len(shown) <= 80 else shown[:77] + "..."
