"""``ecanet predict``: classes of image files."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from ecanet.cli.options import add_accelerator, add_build, check_out, write_out
from ecanet.train.evaluate import predict
from ecanet.untrusted import counted, shown


def add(parser: ArgumentParser) -> Callable[[Namespace], None]:
    """Add the options to a parser, and return the function that runs the verb."""
    parser.add_argument("run", type=Path, help="A run's folder (its best.ckpt), or a checkpoint.")
    parser.add_argument("images", type=Path, nargs="+", help="Image files, or folders of them.")
    parser.add_argument("--top", type=int, default=3, help="Number of classes to print for each image.")
    parser.add_argument("--out", type=Path, default=None, help="Write a CSV file instead of printing.")
    add_accelerator(parser)
    add_build(parser)

    def run(args: Namespace) -> None:
        check_out(args.out)
        predictions = predict(args.run, args.images, args.top, accelerator=args.accelerator, build=args.model.build)
        if args.out is None:
            for prediction in predictions:
                ranked = zip(prediction.classes, prediction.probabilities, strict=True)
                print(
                    f"{shown(prediction.image, 300)}: "
                    + ", ".join(f"{shown(name)} {100 * value:.1f} %" for name, value in ranked)
                )
            return
        table = io.StringIO(newline="")
        writer = csv.writer(table)
        writer.writerow(["image", "rank", "class", "probability"])
        for prediction in predictions:
            ranked = zip(prediction.classes, prediction.probabilities, strict=True)
            for rank, (name, value) in enumerate(ranked, start=1):
                writer.writerow([prediction.image, rank, name, f"{value:.6f}"])
        write_out(args.out, table.getvalue())
        print(f"wrote {args.out}: {counted(len(predictions), 'image')}")

    return run
