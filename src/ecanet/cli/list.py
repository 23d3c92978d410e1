"""``ecanet list``: the names of all networks."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from ecanet.models import MODELS
from ecanet.surgery.networks import classifies_pictures, has_timm, known_networks, weights_names


def add(parser: ArgumentParser) -> Callable[[Namespace], None]:
    """Add the options to a parser, and return the function that runs the verb."""
    parser.add_argument("words", nargs="*", metavar="WORD", help="Only names that contain all of these.")

    def run(args: Namespace) -> None:
        known = known_networks()
        matching = [name for name in (*MODELS, *known) if all(word.lower() in name.lower() for word in args.words)]
        for name in matching:
            library = f"torchvision/{name.removeprefix('eca_')}" if name in MODELS else name
            weights = weights_names(library) if library in known else []
            use = "" if name in MODELS or classifies_pictures(name) else "  (only for insert)"
            print(f"{name}{use}{'  weights: ' if weights else ''}{', '.join(weights)}")
        if not has_timm():
            print("timm, which has more networks, is not installed: pip install 'ecanet[timm]'", file=sys.stderr)
        if not matching:
            raise ValueError(
                f"none of the {len(MODELS) + len(known)} names contains {' and '.join(map(repr, args.words))}"
            )

    return run
