"""``ecanet build``: the kernels for the CPU."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from ecanet.ops.build import LIBRARY, BuildError, NothingToBuildWithError, build


def add(parser: ArgumentParser) -> Callable[[Namespace], None]:
    """Add the options to a parser, and return the function that runs the verb."""
    parser.add_argument("--if-possible", action="store_true", help="No error if the compiler or headers are missing.")

    def run(args: Namespace) -> None:
        try:
            build(Path(torch.__file__).parent, LIBRARY)
        except BuildError as error:
            if error.output:
                print(error.output, file=sys.stderr)
            if args.if_possible and isinstance(error, NothingToBuildWithError):
                print(f"ecanet build: {error}; plain PyTorch runs on the CPU")
                return
            sys.exit(f"ecanet build: {error}")
        print(f"built {LIBRARY}\nnext: ecanet doctor")

    return run
