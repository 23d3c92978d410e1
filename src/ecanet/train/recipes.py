"""Reads recipes: YAML from untrusted sources, read only as data."""

import json
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import yaml

from ecanet.train.config import Recipe, model_of_a_file
from ecanet.untrusted import check_file, check_plain, listed, shown

#: Largest file, in bytes; the recipes of this repository have about 1 kB.
_MAX_BYTES = 2**16
#: Deepest nesting; a recipe has 4 levels: blocks, their keys, ``options``, a list.
_MAX_DEPTH = 8
#: Names of the fields of each block.
_BLOCKS = {name: [f.name for f in fields(block)] for name, block in get_type_hints(Recipe).items()}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2: 1e-4 is a number, 1:30 and 2001-01-01 are strings."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A mapping without repeated keys, as PyYAML would silently drop one of two."""
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise ValueError(f"line {key_node.start_mark.line + 1}: the key {shown(key)} is repeated")
                seen.add(key)
        return mapping


for _tag, _pattern, _first in (
    ("null", r"^(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?\d+$", list("-+0123456789")),
    ("float", r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$", list("-+0123456789.")),
    ("float", r"^([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)

#: Fields whose values may be texts: paths, and names that are checked by the block.
_TEXTS = {
    *("model.name", "model.gate", "model.kernel_size", "model.where", "model.weights", "data.source", "data.root"),
    *("data.augment", "data.val_root", "data.image_column", "data.label_column", "data.label_separator"),
    *("optim.name", "optim.no_decay", "optim.freeze", "optim.schedule"),
    *("trainer.accelerator", "trainer.devices", "trainer.strategy", "trainer.precision", "trainer.loggers"),
}
#: Those of them that may be any text: folders and files may have any name, and patterns have stars.
_PATHS = {"data.root", "data.val_root", "model.weights", "optim.freeze"}
#: Names, but no text that the parser could read a second time as YAML.
_NO_YAML = re.compile(r"[^\[\]{}&*!|>\n]*")
#: Names and patterns of modules.
_PATTERN = re.compile(r"[\w.*?,-]*")


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    """A text, in which a pair of surrogates, JSON's form of a character beyond 16 bits, becomes one character."""
    return loader.construct_scalar(node).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


_Loader.add_constructor("tag:yaml.org,2002:str", _text)


def load_plain(text: str) -> Any:
    """Read plain values from YAML without anchors, tags and deep nesting.

    Raises:
        yaml.YAMLError, ValueError, ArithmeticError, RecursionError: the text is anything else.
    """
    _check_events(text)
    return yaml.load(text, _Loader)


#: The errors that :func:`load_plain` raises.
NOT_PLAIN = (yaml.YAMLError, ValueError, ArithmeticError, RecursionError)


def read_recipe(path: str | Path, build: bool = False) -> dict[str, dict[str, Any]]:
    """Read a recipe: blocks of names and plain values.

    Nothing in it is built, called or followed. Anchors, tags and ``class_path`` are refused before they have an effect,
    and so is a file that is larger or nested deeper than a recipe can be.

    Args:
        path: The file.
        build: Whether the user gives ``model.build``. That of the file is then ignored; otherwise it is refused.

    Returns:
        Those of the blocks ``model``, ``data``, ``optim`` and ``trainer`` that it has.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a recipe; the message names the file and the mistake.

    Example:
        >>> read_recipe("recipes/small/fashion_mnist.yaml")["optim"]["lr"]  # doctest: +SKIP
        0.1
    """
    recipe = read_plain(path, "recipe")
    if build and isinstance(recipe, dict) and isinstance(recipe.get("model"), dict):
        recipe["model"].pop("build", None)
    return check_blocks(recipe, shown(str(path), 200))


def read_plain(path: str | Path, kind: str) -> Any:
    """Read plain values from a YAML file, within the limits of a recipe.

    Args:
        path: The file.
        kind: What the file should be, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too large or not plain YAML; the message names it.
    """
    path = Path(path)
    check_file(path, _MAX_BYTES)
    try:
        return load_plain(path.read_text(encoding="utf-8"))
    except NOT_PLAIN as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{shown(str(path), 200)} is not a {kind}: {shown(reason, 300)}") from error


def _check_events(text: str) -> None:
    """Raise ValueError, before anything is built, for YAML that could expand or build objects."""
    depth = documents = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ValueError(f"line {event.start_mark.line + 1} has an anchor or alias (& or *): write the value out")
        if getattr(event, "tag", None):
            raise ValueError(f"line {event.start_mark.line + 1} has a tag, {shown(event.tag)}: write a plain value")
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ValueError(f"line {event.start_mark.line + 1} is nested deeper than {_MAX_DEPTH} levels")
        if documents > 1:
            raise ValueError("it holds more than one document")


def check_blocks(recipe: object, source: str) -> dict[str, dict[str, Any]]:
    """Check the content of a recipe's file: blocks of known names and plain values; former names are replaced.

    Args:
        recipe: Content of the file.
        source: Name of the file, for the message.

    Raises:
        ValueError: it is anything else.
    """
    if not isinstance(recipe, dict):
        raise ValueError(f"{source} is not a recipe: it must hold the blocks {', '.join(_BLOCKS)}, got {shown(recipe)}")
    checked = {}
    for block, values in recipe.items():
        if block == "class_path":
            raise ValueError(_no_class_path(source))
        if block not in _BLOCKS:
            raise ValueError(f"{source}: a recipe has only the blocks {', '.join(_BLOCKS)}, got {shown(block)}")
        if not isinstance(values, dict):
            raise ValueError(f"{source}: {block} must hold names and values, got {shown(values)}")
        known = _BLOCKS[block]
        if "class_path" in values:
            raise ValueError(_no_class_path(f"{source}: {block}"))
        if block == "model":
            values = _checked_model(values, source)
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"{source}: {block} has no {listed(map(str, unknown), 5)}; it has {', '.join(known)}")
        for name, value in values.items():
            _check_value(f"{block}.{name}", value, f"{source}: {block}.{name}")
        checked[block] = values
    return checked


def _checked_model(values: dict[str, Any], source: str) -> dict[str, Any]:
    """The block ``model`` with former names of fields replaced; ValueError if it names a function to call."""
    if values.get("build") is not None:
        raise ValueError(
            f"{source}: model.build is never taken from a file, which could call any function: if you trust it, give "
            f"--model.build {shown(values['build'])} yourself"
        )
    return model_of_a_file(values, source)


def _check_value(key: str, value: object, where: str) -> None:
    if key == "model.options":
        _check_options(value, where)
        return
    _check_plain_value(value, where)
    allowed = _PATTERN if key == "model.where" else _NO_YAML
    if isinstance(value, str) and key not in _PATHS and not (key in _TEXTS and allowed.fullmatch(value)):
        raise ValueError(f"{where} cannot be this text, got {shown(value)!r}")


def _check_options(options: object, where: str) -> None:
    if not isinstance(options, dict):
        raise ValueError(f"{where} must hold names and values, got {shown(options)}")
    if "class_path" in options:
        raise ValueError(_no_class_path(where))
    for option, setting in options.items():
        if not isinstance(option, str):
            raise ValueError(f"{where} must have names for its values, got {shown(option)}")
        _check_plain_value(setting, f"{where}.{shown(option)}")
        if isinstance(setting, str):
            raise ValueError(f"{where}.{shown(option)} must be a number, true or false, got {shown(setting)!r}")


def _check_plain_value(value: object, where: str) -> None:
    if any(isinstance(v, dict) and "class_path" in v for v in (value if isinstance(value, list) else [value])):
        raise ValueError(_no_class_path(where))
    try:
        check_plain(value, where)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _no_class_path(where: str) -> str:
    return f"{where} holds class_path: a recipe cannot name classes, and none is built from it"


def with_own_recipe(args: list[str], out: str | Path) -> list[str]:
    """Add the recipe of the run to a command line that has ``--resume`` and no recipe.

    Args:
        args: The command line, as :func:`with_recipes_read` returns it; options after a recipe override it.
        out: Folder of the run if the command line has no ``--out``.

    Raises:
        OSError, ValueError: the run's recipe is missing, cannot be read or is not a recipe; or there is no run, and the
            command line has no options for a new one.
    """
    words = [word.partition("=")[0] for word in args]
    if "--resume" not in words or {"--config", "--help", "-h"} & set(words):
        return args
    for word, following in zip(args, [*args[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == "--out":
            out = value if equals else following
    if not out:  # the parser will report it
        return args
    own, last = Path(out) / "recipe.json", Path(out) / "last.ckpt"
    if not os.path.lexists(own):
        is_begun = os.path.lexists(last)
        # Options of optim and trainer alone, such as more epochs, are for a run that exists.
        blocks = tuple(_BLOCKS) if is_begun else ("model", "data")
        if any(word.startswith(tuple(f"--{block}." for block in blocks)) for word in words):
            return args
        if not is_begun:
            where = shown(str(out), 200)
            raise ValueError(
                f"there is no run in {where} to resume: give its folder with --out, or a new run's recipe with --config"
            )
    try:
        return ["--config", for_parser(read_recipe(own, "--model.build" in words)), *args]
    except (OSError, ValueError) as error:
        raise type(error)(
            f"{error}; it should hold the recipe of the run there: pass that recipe with --config"
        ) from error


def with_source_named(args: list[str]) -> list[str]:
    """Add ``--data.source`` to a command line that has ``--data.root`` but no source: csv for a .csv file, or a folder.

    Args:
        args: The command line, as :func:`with_recipes_read` returns it. If it has a recipe, nothing is added.
    """
    words = [word.partition("=")[0] for word in args]
    if "--data.root" not in words or {"--data.source", "--config"} & set(words):
        return args
    place = len(words) - 1 - words[::-1].index("--data.root")
    root = args[place].partition("=")[2] or "".join(args[place + 1 : place + 2])
    return [*args, "--data.source", "csv" if root.lower().endswith(".csv") else "image_folder"]


#: Options whose values the parser would read as files.
_WHOLE_BLOCKS = tuple(f"--{block}" for block in _BLOCKS)


def with_recipes_read(args: list[str]) -> list[str]:
    """Replace ``--config FILE`` in a command line by the checked content of the file; the parser checks the options.

    Raises:
        FileNotFoundError, ValueError: as in :func:`read_recipe`; or an option names a whole block or a class.
    """
    result: list[str] = []
    build = any(word.partition("=")[0] == "--model.build" for word in args)
    words = iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        if name in _WHOLE_BLOCKS:
            raise ValueError(
                f"{name} is not an option: --config FILE reads a recipe, and {name}.NAME VALUE sets one value"
            )
        if "class_path" in word:
            raise ValueError(f"{shown(word)}: no class is built from the command line, so there is no class_path")
        if name != "--config" or (not equals and (value := next(words, "")) == ""):
            result.append(word)
            continue
        result += ["--config", for_parser(read_recipe(value, build))]
    return result


def for_parser(recipe: dict[str, dict[str, Any]]) -> str:
    """A recipe as JSON for the parser. It reads texts again as YAML, so folders such as 2 become ``./2``."""
    data = recipe.get("data", {})
    roots = {name: os.path.join(".", data[name]) for name in ("root", "val_root") if isinstance(data.get(name), str)}
    return json.dumps(recipe | {"data": data | roots} if roots else recipe)
