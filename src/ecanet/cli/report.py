"""``ecanet report``: the report of a study, written again."""

from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from ecanet.study.html_report import write_report


def add(parser: ArgumentParser) -> Callable[[Namespace], None]:
    """Add the options to a parser, and return the function that runs the verb."""
    parser.add_argument("folder", type=Path, help="Folder of a study, finished or not.")
    parser.add_argument("--metric", type=str | None, default=None, help="What to compare; by default as the study did.")

    def run(args: Namespace) -> None:
        print(f"wrote {write_report(args.folder, args.metric)}")

    return run
