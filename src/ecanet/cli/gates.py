"""``ecanet gates``: every gate described."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from ecanet.nn.describe import describe_gates, listing, table
from ecanet.nn.timm_gates import TIMM_GATES


def add(parser: ArgumentParser) -> Callable[[Namespace], None]:
    """Add the options to a parser, and return the function that runs the verb."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="Only these gates; timm:NAME is a layer of timm's.")
    parser.add_argument("--markdown", action="store_true", help="Print the table of docs/gates.md.")

    def run(args: Namespace) -> None:
        print((table if args.markdown else listing)(describe_gates(args.names or None)))
        if not args.names and not args.markdown:
            print(f"timm's layers, with 'ecanet[timm]': {', '.join(TIMM_GATES)}")

    return run
