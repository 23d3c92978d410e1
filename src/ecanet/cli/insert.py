"""``ecanet insert``: gates into a network of another library."""

import argparse
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from ecanet.nn import GATES
from ecanet.surgery.insertion_file import Insertion, check_path, save
from ecanet.surgery.networks import classifies_pictures


def add(parser: ArgumentParser) -> Callable[[Namespace], None]:
    """Add the options to a parser, and return the function that runs the verb."""
    parser.add_argument("--model", required=True, help="torchvision/NAME or timm/NAME; ecanet list prints them.")
    parser.add_argument("--gate", default="eca", help=f"One of {', '.join(GATES)}, or timm:NAME.")
    parser.add_argument("--kernel-size", type=_kernel_size, default="adaptive", help="An odd integer, or adaptive.")
    parser.add_argument(
        "--where", nargs="+", default=["block"], help="block, stage, conv, or names and patterns of modules."
    )
    parser.add_argument("--no-preserve", action="store_true", help="Fresh gates instead of neutral ones.")
    parser.add_argument(
        "--fold", action="store_true", help="Fold the gates' factors into the norms: the keys become the authors'."
    )
    parser.add_argument("--weights", help="Weights to start from: a file, or the library's own name, such as DEFAULT.")
    parser.add_argument("--num-classes", type=int, help="Number of classes of the head, by default the library's.")
    parser.add_argument("--input-size", type=int, help="Height and width for which multiply-adds are counted.")
    parser.add_argument("--fuse", action="store_true", help="Let the blocks run on the fused tail, too.")
    parser.add_argument("--report", action="store_true", help="Print the table; without --save it is always printed.")
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="Write the network; ecanet fit trains it, ecanet.surgery.load reads it.",
    )

    def run(args: Namespace) -> None:
        if args.save is not None:
            check_path(args.save)
        insertion = Insertion(
            model=args.model,
            gate=args.gate,
            where=args.where[0] if len(args.where) == 1 else tuple(args.where),
            kernel_size=args.kernel_size,
            preserve=not args.no_preserve,
            fold=args.fold,
            num_classes=args.num_classes,
            input_size=args.input_size,
            fuse=args.fuse,
        )
        model, reports = insertion.build(args.weights)
        full = args.report or args.save is None
        print("\n\n".join(str(report) if full else str(report).splitlines()[-1] for report in reports))
        if args.save is not None:
            save(model, insertion, args.save)
            values = "random weights" if args.weights is None else f"the weights {args.weights}"
            print(f"wrote {args.save}: {args.model} with {values}")
            load = f"model = ecanet.surgery.load({str(args.save)!r})"
            if classifies_pictures(args.model):
                words = f"--model.name {shlex.quote(str(args.save))} --data.root PHOTOS"
                print(f"next: ecanet fit {words} --out runs/photos\nor in Python: {load}")
            else:
                print(f"next, in Python: {load}")

    return run


def _kernel_size(text: str) -> int | str:
    if text == "adaptive":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an odd integer nor adaptive") from None
