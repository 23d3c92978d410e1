"""Measure on a GPU: ``python -m benchmarks.gpu --help``."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import results, run
from benchmarks.cases import Case, On, map_cases
from benchmarks.machine import describe, describe_gpu
from benchmarks.networks import NETWORKS, QUICK_NETWORK, gpu_network_cases
from benchmarks.report import report
from ecanet.ops import gpu

GROUPS = ("op", "module", "inference", "training", "network")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_QUICK_ROUNDS = 3
_COPY_BYTES = 2**30


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON and a picture."""
    parser = _parser()
    args = parser.parse_args(argv)
    fault = gpu.why_not() or (
        "the interpreter is no GPU: only --quick" if gpu.interpreting() and not args.quick else None
    )
    if fault is not None:
        parser.exit(2, f"python -m benchmarks.gpu: {fault}\n")
    on = On("cpu" if gpu.interpreting() else "cuda", _DTYPES[args.dtype], "triton")
    rounds = _QUICK_ROUNDS if args.quick else args.rounds
    machine = describe(torch.get_num_threads())
    if on.device == "cuda":
        machine["machine"]["gpu"] = describe_gpu(_COPY_BYTES)
        run.say(f"{machine['machine']['gpu']}")
    header = {
        "command": "",
        "settings": {
            "device": "cuda",
            "interpreted": gpu.interpreting(),
            "rounds": rounds,
            "quick": args.quick,
            "compiled": args.compile,
            "dtype": args.dtype,
        },
        **machine,
        "kernels": "loaded",
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
    path = args.out or Path(f"benchmarks/results/{'quick-gpu' if args.quick else 'gpu'}-{args.dtype}.json")
    try:
        done = results.resume(path, header) if args.resume else {}
    except ValueError as error:
        parser.exit(2, f"python -m benchmarks.gpu: {error}\n")
    document = {**header, "cases": done}
    run.measure_all(_cases(args, on), document, path, _command)
    print(report(document))
    if args.plot:
        from benchmarks.picture import draw

        draw(document).savefig(args.plot)


def _cases(args: argparse.Namespace, on: On) -> list[Case]:
    cases = [*map_cases(args.quick, args.compile, on), *gpu_network_cases(args.quick, args.compile, on)]
    chosen = [case for case in cases if case.group in args.only]
    networks = (*args.networks, *([QUICK_NETWORK] if args.quick else []))
    return [case for case in chosen if case.group != "network" or case.name.partition("-")[0] in networks]


def _command(document: results.Document) -> str:
    """What makes the file again, however many runs it took."""
    settings = document["settings"]
    keys = [key.split("/") for key in document["cases"]]
    groups = {key[0] for key in keys}
    networks = {key[1].partition("-")[0] for key in keys if key[0] == "network"}
    words = [
        *(["TRITON_INTERPRET=1"] if settings["interpreted"] else []),
        f"python -m benchmarks.gpu --dtype {settings['dtype']}",
        "--quick" if settings["quick"] else f"--rounds {settings['rounds']}",
        *(["--no-compile"] if not settings["compiled"] else []),
        *([f"--only {','.join(group for group in GROUPS if group in groups)}"] if groups != set(GROUPS) else []),
        *(
            [f"--networks {','.join(n for n in NETWORKS if n in networks)}"]
            if networks and networks < set(NETWORKS)
            else []
        ),
    ]
    return " ".join(words)


def _some_of(names: Sequence[str]) -> "type[tuple[str, ...]]":
    def parse(value: str) -> tuple[str, ...]:
        given = tuple(value.split(","))
        if unknown := [name for name in given if name not in names]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)!r}: some of {','.join(names)}")
        return given

    return parse  # type: ignore[return-value]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Time the Triton kernels, the tail and whole networks on a GPU against the same without a gate, "
        "with timm's EcaModule and with squeeze-and-excitation; eager, compiled, in CUDA graphs. A copy's bandwidth "
        "first.",
        epilog="Example: python -m benchmarks.gpu --plot cost_gpu.png; python -m benchmarks.gpu --only op,training; "
        "without a GPU: TRITON_INTERPRET=1 python -m benchmarks.gpu --quick",
    )
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="bfloat16", help="of the maps (default: bfloat16)")
    parser.add_argument("--rounds", type=run.positive, default=20, help="turns of each (default: 20)")
    for option, names in (("--only", GROUPS), ("--networks", tuple(NETWORKS))):
        parser.add_argument(
            option, type=_some_of(names), default=names, metavar=option[2:].upper(), help=f"some of {','.join(names)}"
        )
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run? The numbers mean nothing")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: benchmarks/results/gpu-DTYPE.json")
    parser.add_argument("--resume", action="store_true", help="keep the cases that the file has, measure the others")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the picture, too")
    return parser


if __name__ == "__main__":
    main()
