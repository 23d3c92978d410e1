"""``ecanet VERB [options]``: finds the verb, parses its options, runs it, and prints an error in one line."""

import argparse
import contextlib
import os
import re
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import Any, NoReturn

from ecanet.cli.mistakes import closest, explained
from ecanet.cli.verbs import VERBS


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb.

    Args:
        argv: Arguments, by default the command line's.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            _dispatch(args)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # otherwise Python does it on exit, with its own error message
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # It is no error if a reader such as head closes the pipe; the status is that of a process ended by SIGPIPE.
        sys.exit(141 if isinstance(error, BrokenPipeError) else f"ecanet: {type(error).__name__}: {error}")


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe whose reader has closed it."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _dispatch(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return
    if args[0] == "--version":
        from ecanet import __version__

        print(__version__)
        return
    name = args[0]
    if name not in VERBS:
        what, known = ("option", ["--help", "--version"]) if name.startswith("-") else ("verb", list(VERBS))
        sys.exit(f"ecanet: unknown {what} {name!r}{closest(name, known) or ':'} one of {', '.join(known)}")
    try:
        _run(name, args[1:])
    except (ImportError, OSError, TypeError, ValueError, RuntimeError, LookupError, ArithmeticError) as error:
        if os.environ.get("ECANET_TRACEBACK") or (isinstance(error, BrokenPipeError) and _reader_is_gone()):
            raise
        recipes = "".join(f"; the recipe: {path}" for path in _recipe_files(args) if path not in str(error))
        rank = os.environ.get("LOCAL_RANK", "0")
        process = "" if rank == "0" else f", process {rank}"
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # clears the progress that a verb or another process shows
        message = f"{type(error).__name__}: {explained(_text_of(error))}{recipes}"
        sys.exit(f"{clear}ecanet {name}{process}: {message}\n(ECANET_TRACEBACK=1 shows where)")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _text_of(error: Exception) -> str:
    """An error's message, without the quotes that a KeyError adds."""
    return str(error.args[0]) if isinstance(error, KeyError) and len(error.args) == 1 else str(error)


def _recipe_files(args: Sequence[str]) -> list[str]:
    """The files that a command line names with ``--config``, for an error message: the mistake may be in one."""
    from ecanet.untrusted import shown

    following = [value for name, value in pairwise(args) if name == "--config"]
    return [shown(path, 4096) for path in (*following, *(word[9:] for word in args if word.startswith("--config=")))]


class _OneLineErrors:
    """A parser that prints a mistake in one line; argparse would print all options before it."""

    words: Sequence[str] = ()

    def error(self: Any, message: str, *_: object) -> NoReturn:
        explanation = explained(message, re.findall(r"(?<![\w-])--[a-z][\w.-]*", self.format_help()), self.words)
        print(f"{self.prog}: {explanation}\n({self.prog} --help shows the options)", file=sys.stderr)
        sys.exit(2)


class _PlainParser(_OneLineErrors, argparse.ArgumentParser):
    pass


def _run(name: str, words: list[str]) -> None:
    if VERBS[name].needs_extras:
        run, options = _parse_recipes(name, words)
    else:
        parser = _PlainParser(**_about(name))
        run = _module(name).add(parser)
        parser.words = words
        options = parser.parse_args(words)
    with _plain_warnings():
        run(options)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print warnings as notes in one line, without their place in the code."""
    format_before = warnings.formatwarning
    if not os.environ.get("ECANET_TRACEBACK"):
        warnings.formatwarning = lambda message, *_, **__: f"note: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = format_before


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

    class Parser(_OneLineErrors, ArgumentParser):
        pass

    # No abbreviations: an abbreviated option would not be recognised by the checks and would be read unchecked.
    parser: Any = Parser(**_about(name), allow_abbrev=False, parser_mode="plain")
    run = module.add(parser)
    parser.words = words
    return run, parser.instantiate(parser.parse_args(words))


def _overview() -> str:
    lines = ["usage: ecanet VERB [options]", "", "Efficient Channel Attention: train, compare, use.", ""]
    lines += [f"  {name:9} {verb.what}" for name, verb in VERBS.items()]
    lines += ["", "ecanet VERB --help shows the options. Example:", f"  {VERBS['demo'].example}"]
    return "\n".join(lines)
