"""``ecanet study``: compare gates over several seeds."""

import math
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from ecanet.cli.options import CONFIG_HELP
from ecanet.study.comparison import check_parts, check_recipes, comparison_jobs, seconds_of_an_epoch, study_recipes
from ecanet.study.conclusions import next_step
from ecanet.study.engine import ENGINES, check_engine, workers_on
from ecanet.study.paired_study import check_folder
from ecanet.study.statistics import plan
from ecanet.study.study_file import conditions_and_seeds, with_study_recipe
from ecanet.train.config import Recipe
from ecanet.untrusted import counted


def add(parser: ArgumentParser) -> Callable[[Namespace], None]:
    """Add the options to a parser, and return the function that runs the verb."""
    parser.add_argument("study", type=Path, nargs="?", default=None, help="YAML with conditions, seeds and a recipe.")
    parser.add_argument("--config", action="config", help=CONFIG_HELP)
    parser.add_argument(
        "--gates",
        type=str,
        default=None,
        help="Gates, separated by commas, the baseline first, such as none,eca,cbam,timm:cbam.",
    )
    parser.add_argument(
        "--kernel-sizes",
        type=str,
        default=None,
        help="Such as 1,3,5,7,9,adaptive: every gate that has a kernel size becomes a condition for each of them.",
    )
    parser.add_argument("--seeds", type=int | None, default=None, help="Number of seeds of each condition.")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="Folder for runs and tables.")
    parser.add_argument(
        "--workers", type=int | None, default=None, help="Runs at a time; by default one for each core."
    )
    parser.add_argument(
        "--on",
        choices=ENGINES,
        default=ENGINES[0],
        help="processes of this machine, or ray: the cluster of RAY_ADDRESS, with one run per GPU if it has any.",
    )
    parser.add_argument("--dry-run", action="store_true", help="Print how many runs, how long, and what they can show.")
    parser.add_class_arguments(Recipe)

    def run(args: Namespace) -> None:
        recipe = Recipe(args.model, args.data, args.optim, args.trainer)
        recipes, seeds = conditions_and_seeds(recipe, args.study, args.gates, args.kernel_sizes, args.seeds)
        if not args.dry_run:
            study = study_recipes(recipes, seeds, args.out, args.workers, on=args.on)
            print(study)
            print(f"wrote {args.out / 'results.csv'}, {args.out / 'summary.json'} and {args.out / 'report.html'}")
            print(next_step(study.summary, seeds))
            return
        check_engine(args.on, args.workers)
        check_recipes(recipes, seeds)
        jobs = comparison_jobs(recipes, seeds, args.out)
        check_folder(jobs, args.out)
        left = sum(job.read() is None for job in jobs)
        size = f"{counted(len(recipes), 'condition')} x {counted(len(seeds), 'seed')} = {counted(len(jobs), 'run')}"
        print(f"{size}, {left} left, into {args.out}")
        if left:
            print("".join(f"{note}\n" for note in check_parts(recipes)), end="")
            seconds = seconds_of_an_epoch(next(iter(recipes.values())))
            workers = min(_runs_at_a_time(args.on, args.workers), left)
            total = tqdm.format_interval(math.ceil(left / workers) * recipe.optim.epochs * seconds)
            at_a_time = f"{recipe.optim.epochs} in a run, {counted(workers, 'run')} at a time"
            print(f"an epoch took {seconds:.1f} s: {at_a_time}, about {total} in all if each has a core of its own")
        print(plan(len(recipes), len(seeds)))

    return run


def _runs_at_a_time(on: str, max_runs: int | None) -> int:
    workers = workers_on(on, max_runs)
    try:
        return workers.size
    finally:
        workers.close()


def prepare(words: list[str]) -> list[str]:
    """Put the recipe of a study's file before the options."""
    return with_study_recipe(words)
