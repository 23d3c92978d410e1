"""``ecanet profile``: what networks cost on this machine."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ecanet.nn import GATES
from ecanet.profile import profile_models, table3


def add(parser: ArgumentParser) -> Callable[[Namespace], None]:
    """Add the options to a parser, and return the function that runs the verb."""
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="A network of ecanet, torchvision/NAME, timm/NAME, a model file of Ultralytics such as yolo11n.yaml, a "
        "file of ecanet insert --save, a checkpoint, or a run's folder.",
    )
    parser.add_argument("--table3", action="store_true", help="The networks of the paper's Table 3 instead of MODEL.")
    parser.add_argument(
        "--gates",
        metavar="NAMES",
        help=f"Gates, separated by commas, each of which goes into every MODEL: none, timm:NAME, {', '.join(GATES)}.",
    )
    parser.add_argument("--no-time", action="store_true", help="Only count: measure neither time nor memory.")
    parser.add_argument("--batch-size", type=int, metavar="N", help="Pictures in a batch; 8 by default, 64 on a GPU.")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="Height and width; by default the network's.")
    parser.add_argument("--threads", type=int, metavar="N", help="Number of torch's threads, by default torch's own.")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="Turns of each network, by default 10.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda.")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="Write profile.md, profile.csv and profile.json.")

    def run(args: Namespace) -> None:
        if args.table3 == bool(args.models):
            raise ValueError("give either MODEL ... or --table3: name the networks, or take those of the paper")
        if args.table3 and args.gates is not None:
            raise ValueError("--gates goes with MODEL; --table3 has the gates of the paper's table")
        if args.out is not None and args.out.exists() and not args.out.is_dir():
            raise ValueError(f"--out must be a folder, got the file {args.out}")
        gates = [] if args.gates is None else [name.strip() for name in args.gates.split(",")]
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""
        options = {
            "time": not args.no_time,
            "batch_size": args.batch_size,
            "image_size": args.image_size,
            "threads": args.threads,
            "rounds": args.rounds,
            "device": args.device,
            "on_progress": partial(_show_progress, clear),
        }
        profile = table3(**options) if args.table3 else profile_models(args.models, gates, **options)
        print(clear, end="", file=sys.stderr, flush=True)
        print(profile)
        if args.out is not None:
            profile.write(args.out)
            print(f"\nwrote profile.md, profile.csv and profile.json into {args.out}")

    return run


def _show_progress(clear: str, line: str) -> None:
    """Write to standard error; on a terminal each line replaces the last."""
    print(f"{clear}{line}", end="" if clear else "\n", file=sys.stderr, flush=True)
