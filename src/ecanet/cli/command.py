"""``ecanet VERB [options]``: finds the verb, parses its options, runs it, and says an error in one line."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import Any

from ecanet.cli.verbs import VERBS


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb.

    Args:
        argv: Arguments, by default the command line's.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return
    if args[0] == "--version":
        from ecanet import __version__

        print(__version__)
        return
    if args[0] not in VERBS:
        sys.exit(f"ecanet: unknown verb {args[0]!r}: one of {', '.join(VERBS)}; see ecanet --help")
    try:
        _run(args[0], args[1:])
    except (ImportError, OSError, TypeError, ValueError, RuntimeError, LookupError, ArithmeticError) as error:
        if os.environ.get("ECANET_TRACEBACK"):
            raise
        recipes = "".join(f"; the recipe: {path}" for path in _recipe_files(args) if path not in str(error))
        rank = os.environ.get("LOCAL_RANK", "0")
        process = "" if rank == "0" else f", process {rank}"
        said = f"{type(error).__name__}: {_one_line(error)}{recipes}"
        sys.exit(f"ecanet {args[0]}{process}: {said}\n(ECANET_TRACEBACK=1 shows where)")
    except KeyboardInterrupt:
        sys.exit(130)


def _one_line(error: Exception) -> str:
    """An error's message without line breaks, and without the quotes that a KeyError adds."""
    text = str(error.args[0]) if isinstance(error, KeyError) and len(error.args) == 1 else str(error)
    return " ".join(text.split())


def _recipe_files(args: Sequence[str]) -> list[str]:
    """The files that a command line names by ``--config``, for an error message: the mistake may be in one of them."""
    from ecanet.untrusted import shown

    following = [value for name, value in pairwise(args) if name == "--config"]
    return [shown(path, 4096) for path in (*following, *(word[9:] for word in args if word.startswith("--config=")))]


def _run(name: str, words: list[str]) -> None:
    if VERBS[name].needs_extras:
        run, options = _parse_recipes(name, words)
    else:
        parser = argparse.ArgumentParser(**_about(name))
        run = _module(name).add(parser)
        options = parser.parse_args(words)
    run(options)


def _about(name: str) -> dict[str, Any]:
    return {"prog": f"ecanet {name}", "description": f"{VERBS[name].what} Example: {VERBS[name].example}"}


def _module(name: str) -> ModuleType:
    return import_module(f"ecanet.cli.{name}")


def _parse_recipes(name: str, words: list[str]) -> tuple[Callable[[Any], None], Any]:
    try:
        from jsonargparse import ArgumentParser, set_loader
    except ImportError as error:
        raise ImportError("the command line needs jsonargparse: pip install 'ecanet[train]'") from error
    from ecanet.train.recipes import NOT_PLAIN, load_plain, with_recipes_read

    words = with_recipes_read(words)
    module = _module(name)
    if hasattr(module, "prepare"):
        words = module.prepare(words)
    set_loader("plain", load_plain, NOT_PLAIN)
    # No abbreviations: an option under another name would be read without a check.
    parser: Any = ArgumentParser(**_about(name), allow_abbrev=False, parser_mode="plain")
    run = module.add(parser)
    return run, parser.instantiate(parser.parse_args(words))


def _overview() -> str:
    lines = ["usage: ecanet VERB [options]", "", "Efficient Channel Attention: train, compare, use.", ""]
    lines += [f"  {name:9} {verb.what}" for name, verb in VERBS.items()]
    lines += ["", "ecanet VERB --help shows the options. Example:", f"  {VERBS['demo'].example}"]
    return "\n".join(lines)
