"""Explains mistakes on the command line: one line that names the mistake, with the closest correct word."""

import difflib
import re
from collections.abc import Iterable

_KINDS = {"int": "an integer", "float": "a number", "bool": "true or false", "NoneType": "null"}
#: jsonargparse's messages about a value that should have one type, and about one that may have several types.
_KEY = r"Parser key \"(?P<key>[\w.]+)\": "
_TYPE = re.compile(_KEY + r"Expected a (?P<types>.*)\. Got value: ?(?P<given>.*)")
_TYPES = re.compile(
    _KEY + r"Does not validate against any of the Union subtypes Subtypes: \[(?P<types>.*)\] Errors: .*"
    r" Given value: ?(?P<given>.*)"
)
_KIND, _WORDS, _LIST = re.compile(r"<class '(?:\w+\.)*(\w+)'>"), re.compile(r"typing\.Literal\[([^\]]*)\]"), "list[int]"
#: Messages about a choice: those of this library, and those of argparse.
_CHOICES = (
    re.compile(r"must be (?:one|some) of (?P<known>.+?), got (?P<given>'[^']*'|[^\s:;]+)"),
    re.compile(r"invalid choice: (?P<given>'[^']*') \(choose from (?P<known>.+)\)"),
)
#: A list of problems, one in each line, as :mod:`ecanet.train.data.verify` writes it.
_LIST_OF_PROBLEMS = re.compile(r"[^\n]+:(\n  [^\n]+;)*\n  [^\n]+")
_UNKNOWN = re.compile(r"unrecognized arguments: (?P<given>-[^\s=]+)")


def closest(given: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown word: the closest known word, or an empty text.

    Example:
        >>> closest("fti", ["fit", "validate"]), closest("xyz", ["fit", "validate"])
        (": did you mean 'fit'?", '')
    """
    near = difflib.get_close_matches(given[:100], list(known), 1, 0.6)
    return f": did you mean {near[0]!r}?" if near else ""


def explained(message: str, options: Iterable[str] = (), words: Iterable[str] = ()) -> str:
    """An error message in one line and in plain words, with the closest correct word if it is known.

    A list of problems keeps its lines.

    Args:
        message: Message of this library, argparse or jsonargparse; others only lose their line breaks.
        options: The options of the verb.
        words: The words of the command line after the verb.

    Example:
        >>> explained("data.augment must be one of auto, crop, none, got 'corp'")
        "data.augment must be one of auto, crop, none, got 'corp': did you mean 'crop'?"
    """
    text, options = " ".join(message.split()), list(options)
    if (value := _TYPE.fullmatch(text) or _TYPES.fullmatch(text)) is not None:
        return _about_value(value["key"], value["types"], value["given"])
    if _LIST_OF_PROBLEMS.fullmatch(message):
        return message
    if "did you mean" in text:
        return text
    if (unknown := _UNKNOWN.search(text)) is not None:
        return text + closest(unknown["given"], options)
    if "arguments are required" in text:  # the argument may be present with a typo
        names = (word.partition("=")[0] for word in words if word.startswith("-"))
        typo = next((name for name in names if name not in options), "")
        return text + (f"; {typo}{near}" if (near := closest(typo, options)) else "")
    for pattern in _CHOICES:
        if (choice := pattern.search(text)) is not None:
            near = closest(choice["given"].strip("'"), (word.strip(" '") for word in choice["known"].split(",")))
            return text[: choice.end()] + near + text[choice.end() :]
    return text


def _about_value(key: str, types: str, given: str) -> str:
    """The message about a wrong value, with Python's names of types in plain words."""
    words = [word.strip(" '") for literal in _WORDS.findall(types) for word in literal.split(",")]
    wanted = _KIND.sub(lambda kind: _KINDS.get(kind[1], kind[1]), types)
    wanted = _WORDS.sub(lambda literal: "one of " + literal[1].replace("'", ""), wanted)
    wanted = wanted.replace(_LIST, "a list of integers").replace(", null", " or null")
    return f"--{key} must be {wanted}, got {given!r}{closest(given, words)}"
