"""The command ``ecanet VERB``: one function for each verb; a recipe is YAML with the names of the options."""

import argparse
import csv
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

_FIT_OUT = "runs/fit"
_CONFIG_HELP = (
    "A recipe: YAML with the blocks model, data, optim, trainer. Later options on the command line override it."
)


def _add_fit(parser: "ArgumentParser") -> "Callable[[Namespace], None]":
    from lightning.pytorch.utilities import rank_zero_only

    from ecanet.train.config import Recipe
    from ecanet.train.fit import fit

    parser.add_argument("--config", action="config", help=_CONFIG_HELP)
    parser.add_argument("--out", type=Path, default=Path(_FIT_OUT), help="Folder for checkpoints and logs.")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Go on from last.ckpt in --out, if there is one; without --config, by the recipe.json there.",
    )
    parser.add_class_arguments(Recipe)

    def run(args: "Namespace") -> None:
        recipe = Recipe(args.model, args.data, args.optim, args.trainer)
        is_first = getattr(rank_zero_only, "rank", 0) == 0  # of the processes of a distributed run
        if is_first and args.resume and not os.path.lexists(last := Path(args.out) / "last.ckpt"):
            print(f"there is no {last}: this run starts from the beginning", file=sys.stderr)
        result = fit(recipe, args.out, resume=args.resume)
        if not is_first:
            return
        print(f"top-1 {result.top1:.2f} % after the last epoch, {result.best_top1:.2f} % at best; see {args.out}")
        print(f"next: ecanet predict {args.out} IMAGE ...")

    return run


def _add_validate(parser: "ArgumentParser") -> "Callable[[Namespace], None]":
    from ecanet.train.checkpoint import load_trained
    from ecanet.train.evaluate import data_of, validate

    parser.add_argument("run", type=Path, help="A run's folder (its best.ckpt), or a checkpoint.")
    parser.add_argument("--root", type=Path, default=None, help="Folder of the data, if not the run's own.")
    parser.add_argument(
        "--source", type=str, default=None, help="embedded, fashion_mnist or image_folder, if not the run's own."
    )
    parser.add_argument("--accelerator", type=str, default="auto", help="auto, cpu, gpu, mps.")

    def run(args: "Namespace") -> None:
        changes = {name: value for name in ("root", "source") if (value := getattr(args, name)) is not None}
        data = data_of(load_trained(args.run), **changes) if changes else None
        for name, value in validate(args.run, data, args.accelerator).items():
            print(f"{name}: {value:.4f}" if name == "val/loss" else f"{name}: {value:.2f} %")

    return run


def _add_predict(parser: "ArgumentParser") -> "Callable[[Namespace], None]":
    from ecanet.files.atomic import write_whole
    from ecanet.train.evaluate import predict
    from ecanet.untrusted import shown

    parser.add_argument("run", type=Path, help="A run's folder (its best.ckpt), or a checkpoint.")
    parser.add_argument("images", type=Path, nargs="+", help="Image files, or folders of them.")
    parser.add_argument("--top", type=int, default=3, help="Number of classes to name for an image.")
    parser.add_argument("--out", type=Path, default=None, help="Write a CSV file instead of printing.")
    parser.add_argument("--accelerator", type=str, default="auto", help="auto, cpu, gpu, mps.")

    def run(args: "Namespace") -> None:
        predictions = predict(args.run, args.images, args.top, accelerator=args.accelerator)
        if args.out is None:
            for p in predictions:
                ranked = zip(p.classes, p.probabilities, strict=True)
                print(
                    f"{shown(p.image, 300)}: "
                    + ", ".join(f"{shown(name)} {100 * value:.1f} %" for name, value in ranked)
                )
            return
        table = io.StringIO(newline="")
        writer = csv.writer(table)
        writer.writerow(["image", "rank", "class", "probability"])
        for p in predictions:
            for rank, (name, value) in enumerate(zip(p.classes, p.probabilities, strict=True), start=1):
                writer.writerow([p.image, rank, name, f"{value:.6f}"])
        content = table.getvalue().encode(errors="surrogateescape")
        if args.out.exists() and not args.out.is_file():  # a pipe or a device, such as /dev/stdout
            args.out.write_bytes(content)
        else:
            write_whole(args.out.resolve(), content)  # through a link, which stays
        print(f"wrote {args.out}: {len(predictions)} images")

    return run


def _add_demo(parser: "ArgumentParser") -> "Callable[[Namespace], None]":
    from ecanet.study.demo import demo

    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="Folder for runs, tables and pictures.")
    parser.add_argument("--seeds", type=int, default=3, help="Seeds of each network.")
    parser.add_argument("--epochs", type=int, default=6, help="Passes over the 8,000 training pictures.")
    parser.add_argument("--workers", type=int, default=None, help="Runs at a time; by default one for each core.")

    def run(args: "Namespace") -> None:
        demo(args.out, args.seeds, args.epochs, args.workers)

    return run


def _add_study(parser: "ArgumentParser") -> "Callable[[Namespace], None]":
    from tqdm import tqdm

    from ecanet.study.comparison import check_recipes, comparison_jobs, seconds_of_an_epoch, study_recipes
    from ecanet.study.engine import default_workers
    from ecanet.study.statistics import plan
    from ecanet.study.study_file import conditions_and_seeds
    from ecanet.train.config import Recipe

    parser.add_argument("study", type=Path, nargs="?", default=None, help="YAML with conditions, seeds and a recipe.")
    parser.add_argument("--config", action="config", help=_CONFIG_HELP)
    parser.add_argument("--gates", type=str, default=None, help="Gates with commas between, the baseline first.")
    parser.add_argument("--seeds", type=int | None, default=None, help="Number of seeds of each condition.")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="Folder for runs and tables.")
    parser.add_argument(
        "--workers", type=int | None, default=None, help="Runs at a time; by default one for each core."
    )
    parser.add_argument("--dry-run", action="store_true", help="Say how many runs, how long, and what they can show.")
    parser.add_class_arguments(Recipe)

    def run(args: "Namespace") -> None:
        recipe = Recipe(args.model, args.data, args.optim, args.trainer)
        entries, seeds = conditions_and_seeds(recipe, args.study, args.gates, args.seeds)
        if not args.dry_run:
            print(study_recipes(entries, seeds, args.out, args.workers))
            print(f"wrote {args.out / 'results.csv'} and {args.out / 'summary.json'}")
            return
        check_recipes(entries, seeds)
        jobs = comparison_jobs(entries, seeds, args.out)
        left = sum(job.read() is None for job in jobs)
        print(f"{len(entries)} conditions x {len(seeds)} seeds = {len(jobs)} runs, {left} left, into {args.out}")
        if left:
            seconds, workers = seconds_of_an_epoch(recipe), min(args.workers or default_workers(), left)
            total = tqdm.format_interval(math.ceil(left / workers) * recipe.optim.epochs * seconds)
            at_a_time = f"{recipe.optim.epochs} in a run, {workers} runs at a time"
            print(f"an epoch took {seconds:.1f} s: {at_a_time}, about {total} in all if each has a core of its own")
        print(plan(len(entries), len(seeds)))

    return run


def _add_insert(parser: "ArgumentParser") -> "Callable[[Namespace], None]":
    from ecanet.nn import GATES
    from ecanet.surgery.insertion_file import Insertion, check_path, save

    parser.add_argument("--model", required=True, help="torchvision/NAME or timm/NAME.")
    parser.add_argument("--gate", default="eca", help=f"One of {', '.join(GATES)}.")
    parser.add_argument("--kernel-size", type=_kernel_size, default="adaptive", help="An odd integer, or adaptive.")
    parser.add_argument(
        "--where", nargs="+", default=["block"], help="block, stage, conv, or names and patterns of modules."
    )
    parser.add_argument("--no-preserve", action="store_true", help="Fresh gates instead of neutral ones.")
    parser.add_argument(
        "--fold", action="store_true", help="Fold the gates' factors into the norms: the keys of the authors' files."
    )
    parser.add_argument("--weights", type=Path, help="A checkpoint of the network without gates, loaded first.")
    parser.add_argument("--num-classes", type=int, help="Classes of the head, if not the library's number.")
    parser.add_argument("--input-size", type=int, help="Height and width that multiply-adds are counted for.")
    parser.add_argument("--fuse", action="store_true", help="Let the blocks run on the fused tail, too.")
    parser.add_argument("--report", action="store_true", help="Print the table, which is the default without --save.")
    parser.add_argument("--save", type=Path, metavar="FILE", help="Write the network; ecanet.surgery.load reads it.")

    def run(args: "Namespace") -> None:
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
            values = "random weights" if args.weights is None else f"the weights of {args.weights}"
            print(f"wrote {args.save}: {args.model} with {values}")
            print(f"next: model = ecanet.surgery.load({str(args.save)!r})")

    return run


def _kernel_size(text: str) -> int | str:
    if text == "adaptive":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an odd integer nor adaptive") from None


def _add_gates(parser: "ArgumentParser") -> "Callable[[Namespace], None]":
    from ecanet.nn.describe import describe_gates, listing, table

    parser.add_argument("names", nargs="*", metavar="NAME", help="Only these gates.")
    parser.add_argument("--markdown", action="store_true", help="Print the table of docs/gates.md.")

    def run(args: "Namespace") -> None:
        print((table if args.markdown else listing)(describe_gates(args.names or None)))

    return run


def _add_build(parser: "ArgumentParser") -> "Callable[[Namespace], None]":
    import torch

    from ecanet.ops.build import LIBRARY, BuildError, NothingToBuildWithError, build

    parser.add_argument("--if-possible", action="store_true", help="No error if the compiler or headers are missing.")

    def run(args: "Namespace") -> None:
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


def _add_doctor(parser: "ArgumentParser") -> "Callable[[Namespace], None]":
    from ecanet.doctor import doctor

    def run(args: "Namespace") -> None:
        report = doctor()
        print("\n".join(report.lines))
        if report.broken:
            sys.exit(1)

    return run


_VERBS: dict[str, tuple[str, str, "Callable[[ArgumentParser], Callable[[Namespace], None]]"]] = {
    "fit": (
        "Train a network by a recipe.",
        "ecanet fit --config recipes/small/fashion_mnist.yaml --out runs/fashion --optim.epochs 2",
        _add_fit,
    ),
    "validate": ("Top-1 and top-5 of a trained network.", "ecanet validate runs/fashion", _add_validate),
    "predict": ("Classify image files.", "ecanet predict runs/fashion photo.png --top 3", _add_predict),
    "demo": (
        "Train a small ResNet with no gate, SE and ECA on embedded pictures; prints a table and draws pictures.",
        "ecanet demo --seeds 3 --out runs/demo",
        _add_demo,
    ),
    "study": (
        "Train the same network with several gates and seeds: which differences are there?",
        "ecanet study --data.root photos --gates none,se,eca --seeds 9 --out runs/study",
        _add_study,
    ),
    "insert": (
        "Put gates into a network of torchvision or timm: where, how many, at what cost.",
        "ecanet insert --model torchvision/resnet50 --where block --report --save resnet50_eca.pt",
        _add_insert,
    ),
    "gates": (
        "Every gate: its formula, parameters, needs, neutral start and source.",
        "ecanet gates gct grn",
        _add_gates,
    ),
    "build": ("Build the C++ kernels for the CPU, in about a minute.", "ecanet build", _add_build),
    "doctor": ("What runs on this machine, what does not, and why.", "ecanet doctor", _add_doctor),
}
# These work with torch and torchvision alone.
_WITHOUT_EXTRAS = ("insert", "gates", "build", "doctor")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb.

    Args:
        argv: Arguments, by default the command line's.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return
    if args[0] == "--version":
        from ecanet import __version__

        print(__version__)
        return
    if args[0] not in _VERBS:
        sys.exit(f"ecanet: unknown verb {args[0]!r}: one of {', '.join(_VERBS)}; see ecanet --help")
    try:
        _run(args[0], args[1:])
    except (ImportError, OSError, TypeError, ValueError, RuntimeError, LookupError, ArithmeticError) as error:
        if os.environ.get("ECANET_TRACEBACK"):
            raise
        recipes = "".join(f"; the recipe: {path}" for path in _recipe_files(args) if path not in str(error))
        rank = os.environ.get("LOCAL_RANK", "0")
        process = "" if rank == "0" else f", process {rank}"
        said = f"{type(error).__name__}: {_one_line(error)}{recipes}"
        sys.exit(f"ecanet {args[0]}{process}: {said}\n(ECANET_TRACEBACK=1 shows where)")
    except KeyboardInterrupt:
        sys.exit(130)


def _one_line(error: Exception) -> str:
    """An error's message without line breaks, and without the quotes that a KeyError adds."""
    text = str(error.args[0]) if isinstance(error, KeyError) and len(error.args) == 1 else str(error)
    return " ".join(text.split())


def _recipe_files(args: Sequence[str]) -> list[str]:
    """The files that a command line names by ``--config``, for an error message: the mistake may be in one of them."""
    from ecanet.untrusted import shown

    following = [value for name, value in pairwise(args) if name == "--config"]
    return [shown(path, 4096) for path in (*following, *(word[9:] for word in args if word.startswith("--config=")))]


def _run(verb: str, args: Sequence[str]) -> None:
    what, example, add = _VERBS[verb]
    if verb in _WITHOUT_EXTRAS:
        plain: Any = argparse.ArgumentParser(prog=f"ecanet {verb}", description=f"{what} Example: {example}")
        run = add(plain)
        run(plain.parse_args(list(args)))
        return
    try:
        from jsonargparse import ArgumentParser, set_loader
    except ImportError as error:
        raise ImportError("the command line needs jsonargparse: pip install 'ecanet[train]'") from error
    from ecanet.train.recipes import NOT_PLAIN, load_plain, with_own_recipe, with_recipes_read

    words = with_recipes_read(list(args))
    if verb == "fit":
        words = with_own_recipe(words, _FIT_OUT)
    if verb == "study":
        from ecanet.study.study_file import with_study_read

        words = with_study_read(words)
    set_loader("plain", load_plain, NOT_PLAIN)
    # No abbreviations: an option under another name would be read without a check.
    parser: Any = ArgumentParser(
        prog=f"ecanet {verb}",
        description=f"{what} Example: {example}",
        allow_abbrev=False,
        parser_mode="plain",
    )
    run = add(parser)
    run(parser.instantiate(parser.parse_args(words)))


def _overview() -> str:
    lines = ["usage: ecanet VERB [options]", "", "Efficient Channel Attention: train, compare, use.", ""]
    lines += [f"  {verb:9} {what}" for verb, (what, _, _) in _VERBS.items()]
    lines += ["", "ecanet VERB --help shows the options. Example:", f"  {_VERBS['demo'][1]}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
