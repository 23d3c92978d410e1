"""Checks on a file's content before it is trusted: how large it may make things; how messages quote and count it."""

import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: Longest text from a file that a message quotes.
_MAX_CHARACTERS = 80


def shown(value: object, most: int = _MAX_CHARACTERS) -> str:
    r"""Text from a file, safe to quote in a message: shortened in the middle, line breaks and escape codes escaped.

    Args:
        value: A text, a path or an error; anything else is shown by its ``repr`` or type.
        most: Longest result, in characters, not counting what escaping adds.

    Example:
        >>> print(shown("layer1.0" + chr(27) + "[2J"), shown("a" * 10**6, most=9))
        layer1.0\x1b[2J aaa...aaa
    """
    text = str(value) if isinstance(value, (str, os.PathLike, Exception)) else _short_repr(value)
    if len(text) > most:
        start = most // 3
        text = f"{text[:start]}...{text[start + 3 - most :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _short_repr(value: object) -> str:
    """The ``repr`` of a number, bool or None; of anything else only the type, because containers may be endless."""
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() < 256 else f"a number of {value.bit_length()} bits"
    return f"a {type(value).__name__}"


def check_file(path: Path, most_bytes: int | None = None) -> None:
    """Raise unless a path is a regular file: reading a device or a pipe might never end.

    Args:
        path: The file.
        most_bytes: Largest size, or None for any.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a regular file, or it is larger.
    """
    try:
        about = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"no such file: {shown(path, 200)}") from error
    if not stat.S_ISREG(about.st_mode):
        kind = "a folder" if stat.S_ISDIR(about.st_mode) else "not a regular file"
        raise ValueError(f"{shown(path, 200)} is {kind}")
    if most_bytes is not None and about.st_size > most_bytes:
        raise ValueError(f"{shown(path, 200)} has {about.st_size:,} bytes, more than the {most_bytes:,} allowed")


def check_number(value: object, what: str, low: float, high: float) -> None:
    """Raise unless a value is a finite number in a range.

    Raises:
        TypeError: it is not a number.
        ValueError: it is outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what} must be a number, got {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, got {value}")
    if value < low:
        raise ValueError(f"{what} must be {low:,} or more, got {shown(value)}")
    if value > high:
        raise ValueError(f"{what} must be at most {high:,}, got {shown(value)}")


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names from a file, joined for a message: the first ones, each shortened, and how many more there are."""
    every = list(names)
    text = ", ".join(shown(name) for name in every[:most])
    return text if len(every) <= most else f"{text} and {len(every) - most} more"


def counted(count: int, noun: str) -> str:
    """A number and its noun: ``1 run``, ``2 runs``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def check_plain(value: Any, what: str) -> None:
    """Raise unless a value is a scalar or a list of scalars, each finite and short.

    Raises:
        TypeError: it is something else, such as a mapping, which could describe an object to build.
        ValueError: a number is not finite, or a text or list is too long.
    """
    items = value if isinstance(value, (list, tuple)) else [value]
    if len(items) > 1000:
        raise ValueError(f"{what} must be a list of at most 1000 values, got {len(items)}")
    for item in items:
        if item is None or isinstance(item, bool):
            continue
        if isinstance(item, str):
            if len(item) > 1000:
                raise ValueError(f"{what} must be a text of at most 1000 characters, got {len(item)}")
        elif isinstance(item, (int, float)):
            check_number(item, what, -1e12, 1e12)
        else:
            raise TypeError(f"{what} must be a number, a text, true, false, null or a list of these, got {shown(item)}")
