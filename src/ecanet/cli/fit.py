"""``ecanet fit``: train by a recipe."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.utilities import rank_zero_only

from ecanet.cli.options import CONFIG_HELP
from ecanet.train.config import Recipe
from ecanet.train.fit import fit
from ecanet.train.progress import accuracy
from ecanet.train.recipes import with_own_recipe

_OUT = "runs/fit"


def add(parser: ArgumentParser) -> Callable[[Namespace], None]:
    """Add the options to a parser; what is returned runs the verb."""
    parser.add_argument("--config", action="config", help=CONFIG_HELP)
    parser.add_argument("--out", type=Path, default=Path(_OUT), help="Folder for checkpoints and logs.")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Go on from last.ckpt in --out, if there is one; without --config, by the recipe.json there.",
    )
    parser.add_class_arguments(Recipe)

    def run(args: Namespace) -> None:
        recipe = Recipe(args.model, args.data, args.optim, args.trainer)
        is_first = getattr(rank_zero_only, "rank", 0) == 0  # of the processes of a distributed run
        if is_first and args.resume and not os.path.lexists(last := Path(args.out) / "last.ckpt"):
            print(f"there is no {last}: this run starts from the beginning", file=sys.stderr)
        result = fit(recipe, args.out, resume=args.resume)
        if not is_first:
            return
        reached = accuracy(result.history[-1])
        print(f"{reached} after the last epoch, {result.best_top1:.2f} % at best; see {args.out}")
        print(f"next: ecanet predict {args.out} IMAGE ...")

    return run


def prepare(words: list[str]) -> list[str]:
    """With ``--resume`` alone, the recipe of the run's folder goes first."""
    return with_own_recipe(words, _OUT)
