"""Measure on the CPU: ``python -m benchmarks.cpu --help``."""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch._inductor.config

from benchmarks import results, run
from benchmarks.cases import Case, map_cases
from benchmarks.gates import gate_cases
from benchmarks.machine import describe
from benchmarks.measure import fault_of_environment
from benchmarks.networks import network_cases
from benchmarks.report import show
from ecanet.ops import cpu

GROUPS = ("op", "module", "inference", "training", "network", "surgery", "gates")
_QUICK_ROUNDS = 3
#: Load average from which on a warning is printed.
_BUSY = 0.3


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON and a picture."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.quick:
        fault = cpu.why_not() or fault_of_environment(args.threads, os.environ, os.cpu_count() or 1)
        if fault is not None:
            parser.exit(2, f"python -m benchmarks.cpu: {fault}\n")
    torch.set_num_threads(args.threads)
    rounds = _QUICK_ROUNDS if args.quick else args.rounds
    header = {
        "command": "",
        "settings": {
            "rounds": rounds,
            "quick": args.quick,
            "compiled": args.compile,
            "dtype": "float32",
            **({"matching": args.matching} if args.matching else {}),
        },
        **describe(args.threads),
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
    path = args.out or Path(f"benchmarks/results/{'quick' if args.quick else 'cpu'}-{args.threads}-threads.json")
    try:
        done = results.resume(path, header)["cases"] if args.resume else {}
    except ValueError as error:
        parser.exit(2, f"python -m benchmarks.cpu: {error}\n")
    document = {**header, "cases": done}
    if header["load_average_at_start"][0] > _BUSY:
        run.say(f"load average {header['load_average_at_start'][0]}: other processes disturb the measurement")
    if args.compile:
        torch._inductor.config.compile_threads = 1  # no other processes while this one measures
    run.measure_all(_cases(args), document, path, _command)
    run.finish(document, path)
    show(document, args.plot)


def _cases(args: argparse.Namespace) -> list[Case]:
    cases = [*map_cases(args.quick, args.compile), *network_cases(args.quick, args.compile), *gate_cases(args.quick)]
    return [case for case in cases if case.group in args.only and args.matching in case.key]


def _command(document: results.Document) -> str:
    """The command that makes the file again in one run, however many runs it took."""
    settings, threads = document["settings"], document["machine"]["threads"]
    groups = {key.partition("/")[0] for key in document["cases"]}
    words = [
        *(["OMP_PROC_BIND=true"] if threads > 1 else []),
        f"OMP_NUM_THREADS={threads} python -m benchmarks.cpu --threads {threads}",
        "--quick" if settings["quick"] else f"--rounds {settings['rounds']}",
        *(["--no-compile"] if not settings["compiled"] else []),
        *([f"--only {','.join(group for group in GROUPS if group in groups)}"] if groups != set(GROUPS) else []),
        *([f"--matching {settings['matching']}"] if "matching" in settings else []),
    ]
    return " ".join(words)


def _groups(value: str) -> tuple[str, ...]:
    names = tuple(value.split(","))
    if unknown := [name for name in names if name not in GROUPS]:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)!r}: some of {','.join(GROUPS)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description="Time ECA by this library, by timm, in plain PyTorch and under torch.compile against the same "
        "without a gate. Run nothing else meanwhile.",
        epilog="Example: OMP_NUM_THREADS=1 python -m benchmarks.cpu --plot cost.png; "
        "OMP_PROC_BIND=true OMP_NUM_THREADS=2 python -m benchmarks.cpu --threads 2",
    )
    parser.add_argument("--threads", type=run.positive, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--rounds", type=run.positive, default=20, help="turns of each competitor (default: 20)")
    parser.add_argument(
        "--only", type=_groups, default=GROUPS, metavar="GROUPS", help=f"some of {','.join(GROUPS)} (default: all)"
    )
    parser.add_argument(
        "--matching", default="", metavar="TEXT", help="only cases whose key contains TEXT, such as /inference/"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see if it runs; the numbers mean nothing")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="default: benchmarks/results/cpu-THREADS-threads.json"
    )
    parser.add_argument("--resume", action="store_true", help="keep the cases in the file, measure the others")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the picture")
    return parser


if __name__ == "__main__":
    main()
