"""``ecanet fit``: train by a recipe."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.utilities import rank_zero_only

from ecanet.cli.options import CONFIG_HELP
from ecanet.files.atomic import write_whole
from ecanet.inspect.style import new_figure
from ecanet.train.config import Recipe
from ecanet.train.find_lr import find_learning_rate
from ecanet.train.fit import fit
from ecanet.train.progress import accuracy
from ecanet.train.recipes import with_own_recipe, with_source_named

_OUT = "runs/fit"


def add(parser: ArgumentParser) -> Callable[[Namespace], None]:
    """Add the options to a parser, and return the function that runs the verb."""
    parser.add_argument("--config", action="config", help=CONFIG_HELP)
    parser.add_argument("--out", type=Path, default=Path(_OUT), help="Folder for checkpoints and logs.")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Go on from last.ckpt in --out, if there is one; without --config, by the recipe.json there.",
    )
    parser.add_argument(
        "--find-lr",
        action="store_true",
        help="Do not train: suggest a learning rate, and draw the loss against it in learning_rate.png in --out.",
    )
    parser.add_class_arguments(Recipe)

    def run(args: Namespace) -> None:
        recipe = Recipe(args.model, args.data, args.optim, args.trainer)
        if args.find_lr:
            if args.resume:
                raise ValueError("--find-lr searches before a run: leave out --resume")
            _find_rate(recipe, args.out)
            return
        is_first = getattr(rank_zero_only, "rank", 0) == 0  # the first process of a distributed run
        if is_first and args.resume and not os.path.lexists(last := Path(args.out) / "last.ckpt"):
            print(f"there is no {last}: this run starts from the beginning", file=sys.stderr)
        result = fit(recipe, args.out, resume=args.resume)
        if not is_first:
            return
        if (done := len(result.history)) < recipe.optim.epochs:
            print(f"stopped early, after {done} of {recipe.optim.epochs} epochs")
        reached = accuracy(result.history[-1])
        print(f"{reached} after the last epoch, {result.best_top1:.2f} % at best; see {args.out}")
        print(f"next: ecanet predict {args.out} IMAGE ...")

    return run


def _find_rate(recipe: Recipe, out: Path) -> None:
    new_figure(1.0)  # fail before the search if matplotlib is missing
    search = find_learning_rate(recipe)
    picture = out / "learning_rate.png"
    content = io.BytesIO()
    search.plot().savefig(content)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(picture, content.getvalue())
    print(f"wrote {picture}")
    print(f"suggested: --optim.lr {search.suggestion:.2g}, where the training loss fell most steeply")


def prepare(words: list[str]) -> list[str]:
    """Add the recipe of the run's folder if only ``--resume`` is given, and the source if only ``--data.root`` is."""
    return with_source_named(words if "--find-lr" in words else with_own_recipe(words, _OUT))
