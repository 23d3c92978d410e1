"""Recipes: YAML from anywhere, read as data."""

import json
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import yaml

from ecanet.train.config import Recipe
from ecanet.untrusted import check_file, check_plain, listed, shown

#: Largest file, in bytes; the recipes of this repository have 1 kB.
_LARGEST = 2**16
#: Blocks, their keys, ``options``, a list: nothing in a recipe is nested as deep.
_DEEPEST = 8
#: Names of the fields of each block.
_BLOCKS = {name: [f.name for f in fields(block)] for name, block in get_type_hints(Recipe).items()}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2: 1e-4 is a number, 1:30 and 2001-01-01 are texts."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for _tag, _pattern, _first in (
    ("null", r"^(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?\d+$", list("-+0123456789")),
    ("float", r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$", list("-+0123456789.")),
    ("float", r"^([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)

#: Fields that are texts: paths, and names of which the block says which there are.
_TEXTS = {
    *("model.name", "model.gate", "model.kernel_size", "model.weights", "data.source", "data.root", "data.augment"),
    *("optim.schedule", "trainer.accelerator", "trainer.devices", "trainer.strategy", "trainer.precision"),
}
#: A text that is a name or a path, and no YAML of its own, which a parser could read once more.
_NO_YAML = re.compile(r"[^\[\]{}&*!|>\n]*")


def read_recipe(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read a recipe: blocks of names and plain values.

    Nothing in it is built, called or followed. Anchors, tags and ``class_path`` are refused before anything is made of
    them, and so is what is nested deeper or larger than a recipe can be.

    Args:
        path: The file.

    Returns:
        ``model``, ``data``, ``optim`` and ``trainer``, as far as they are there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no recipe; names the file, and what in it is wrong.

    Example:
        >>> read_recipe("recipes/small/fashion_mnist.yaml")["optim"]["lr"]  # doctest: +SKIP
        0.1
    """
    path = Path(path)
    check_file(path, _LARGEST)
    try:
        text = path.read_text(encoding="utf-8")
        _check_events(text)
        recipe = yaml.load(text, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, ArithmeticError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{shown(str(path), 200)} is no recipe: {shown(reason, 300)}") from error
    _check_blocks(recipe, shown(str(path), 200))
    return recipe


def _check_events(text: str) -> None:
    """Raise ValueError for what could make more of a file than it is, while nothing is made of it yet."""
    depth = documents = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ValueError(f"line {event.start_mark.line + 1} has an anchor or alias (& or *): write the value out")
        if getattr(event, "tag", None):
            raise ValueError(f"line {event.start_mark.line + 1} has a tag, {shown(event.tag)}: write a plain value")
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"line {event.start_mark.line + 1} is nested deeper than {_DEEPEST} levels")
        if documents > 1:
            raise ValueError("it holds more than one document")


def _check_blocks(recipe: object, source: str) -> None:
    if not isinstance(recipe, dict):
        raise ValueError(f"{source} is no recipe: it must hold the blocks {', '.join(_BLOCKS)}, got {shown(recipe)}")
    for block, values in recipe.items():
        if block == "class_path":
            raise ValueError(_class_path(source))
        if block not in _BLOCKS:
            raise ValueError(f"{source}: {shown(block)} is no block of a recipe, which are {', '.join(_BLOCKS)}")
        if not isinstance(values, dict):
            raise ValueError(f"{source}: {block} must hold names and values, got {shown(values)}")
        known = _BLOCKS[block]
        if "class_path" in values:
            raise ValueError(_class_path(f"{source}: {block}"))
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"{source}: {block} has no {listed(map(str, unknown), 5)}; it has {', '.join(known)}")
        for name, value in values.items():
            where = f"{source}: {block}.{name}"
            if name == "options":
                _check_options(value, where)
                continue
            _check_plain(value, where)
            if isinstance(value, str) and not (f"{block}.{name}" in _TEXTS and _NO_YAML.fullmatch(value)):
                raise ValueError(f"{where} must be no such text, got {shown(value)!r}")


def _check_options(options: object, where: str) -> None:
    if not isinstance(options, dict):
        raise ValueError(f"{where} must hold names and values, got {shown(options)}")
    if "class_path" in options:
        raise ValueError(_class_path(where))
    for option, setting in options.items():
        if not isinstance(option, str):
            raise ValueError(f"{where} must have names for its values, got {shown(option)}")
        _check_plain(setting, f"{where}.{shown(option)}")
        if isinstance(setting, str):
            raise ValueError(f"{where}.{shown(option)} must be a number, true or false, got {shown(setting)!r}")


def _check_plain(value: object, where: str) -> None:
    if any(isinstance(v, dict) and "class_path" in v for v in (value if isinstance(value, list) else [value])):
        raise ValueError(_class_path(where))
    try:
        check_plain(value, where)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _class_path(where: str) -> str:
    return f"{where} holds class_path: a recipe names no classes, and none is built from one"


def with_own_recipe(args: list[str], out: str | Path) -> list[str]:
    """A command line that says ``--resume`` and no recipe, with the recipe of the run that it goes on with.

    Args:
        args: The command line, as :func:`with_recipes_read` gives it; what follows a recipe wins over it.
        out: Folder of a run where it does not say ``--out``.

    Raises:
        OSError, ValueError: there is a run, and its recipe is gone, cannot be read or is none.
    """
    words = [word.partition("=")[0] for word in args]
    if "--resume" not in words or "--config" in words:
        return args
    for word, following in zip(args, [*args[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == "--out":
            out = value if equals else following
    own, last = Path(out) / "recipe.json", Path(out) / "last.ckpt"
    options = tuple(f"--{block}." for block in _BLOCKS)
    begins_or_says_it_all = not os.path.lexists(last) or any(word.startswith(options) for word in words)
    if begins_or_says_it_all and not os.path.lexists(own):
        return args
    try:
        return ["--config", json.dumps(read_recipe(own)), *args]
    except (OSError, ValueError) as error:
        raise type(error)(
            f"{error}; it should say by what recipe the run there was begun: give that recipe by --config"
        ) from error


#: What the parser would read as a file of its own.
_WHOLE_BLOCKS = tuple(f"--{block}" for block in _BLOCKS)


def with_recipes_read(args: list[str]) -> list[str]:
    """A command line whose ``--config FILE`` became what the file says, checked; options are left to the parser.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_recipe`; or an option names a class.
    """
    result: list[str] = []
    words = iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        if name in _WHOLE_BLOCKS:
            raise ValueError(f"{name} is no option: --config FILE reads a recipe, and {name}.NAME VALUE sets one value")
        if "class_path" in word:
            raise ValueError(f"{shown(word)}: no class is built from the command line, so there is no class_path")
        if name != "--config" or (not equals and (value := next(words, "")) == ""):
            result.append(word)
            continue
        result += ["--config", json.dumps(read_recipe(value))]
    return result
