"""``ecanet doctor``: what runs on this machine."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from ecanet.doctor import doctor


def add(parser: ArgumentParser) -> Callable[[Namespace], None]:
    """Add the options to a parser, and return the function that runs the verb."""

    def run(args: Namespace) -> None:
        report = doctor()
        print("\n".join(report.lines))
        if report.broken:
            sys.exit(1)

    return run
