"""``ecanet validate``: how good a trained network is."""

from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from ecanet.train.checkpoint import load_trained
from ecanet.train.evaluate import data_of, validate


def add(parser: ArgumentParser) -> Callable[[Namespace], None]:
    """Add the options to a parser; what is returned runs the verb."""
    parser.add_argument("run", type=Path, help="A run's folder (its best.ckpt), or a checkpoint.")
    parser.add_argument("--root", type=Path, default=None, help="Folder of the data, if not the run's own.")
    parser.add_argument(
        "--source", type=str, default=None, help="embedded, fashion_mnist or image_folder, if not the run's own."
    )
    parser.add_argument("--accelerator", type=str, default="auto", help="auto, cpu, gpu, mps.")

    def run(args: Namespace) -> None:
        changes = {name: value for name in ("root", "source") if (value := getattr(args, name)) is not None}
        data = data_of(load_trained(args.run), **changes) if changes else None
        for name, value in validate(args.run, data, args.accelerator).items():
            print(f"{name}: {value:.4f}" if name == "val/loss" else f"{name}: {value:.2f} %")

    return run
