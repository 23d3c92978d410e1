"""``ecanet demo``: three gates compared on embedded pictures."""

from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from ecanet.study.demo import demo


def add(parser: ArgumentParser) -> Callable[[Namespace], None]:
    """Add the options to a parser, and return the function that runs the verb."""
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="Folder for runs, tables and pictures.")
    parser.add_argument("--seeds", type=int, default=3, help="Number of seeds for each network.")
    parser.add_argument("--epochs", type=int, default=6, help="Number of passes over the 8,000 training pictures.")
    parser.add_argument("--workers", type=int, default=None, help="Runs at a time; by default one for each core.")

    def run(args: Namespace) -> None:
        demo(args.out, args.seeds, args.epochs, args.workers)

    return run
