"""Check and measure on a GPU, within a budget of seconds: ``python -m benchmarks.gpu --help``."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import results, run
from benchmarks.cases import Case
from benchmarks.gpu import correctness
from benchmarks.gpu.device import DTYPES, configure, setup_of
from benchmarks.gpu.networks import NAMES, other_form
from benchmarks.gpu.stages import STAGES, Stage
from benchmarks.gpu.workers import Job, Workers, heavy_jobs_at_a_time
from benchmarks.machine import describe, describe_gpu
from benchmarks.report import show
from ecanet.ops import gpu

_QUICK_ROUNDS = 3
_COPY_BYTES, _MATRIX = 2**30, 8192
#: Stages that compile ahead when their turn comes, not during the checks.
_LAST = ("more", "tuning")
#: Share of the remaining budget that checks and compiling ahead may take.
_SHARE_OF_WORKERS = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, print tables, write JSON and a picture; 1 where a check or a measurement failed."""
    start = time.monotonic()
    parser = _parser()
    args = parser.parse_args(argv)
    fault = gpu.why_not() or (
        "the interpreter is not a GPU: use --quick" if gpu.interpreting() and not args.quick else None
    )
    if fault is not None:
        parser.exit(2, f"python -m benchmarks.gpu: {fault}\n")
    path = args.out or Path(f"benchmarks/results/{'quick-gpu' if args.quick else 'gpu'}-{args.dtype}.json")
    header = _header(args)
    try:
        before = results.resume(path, header) if args.resume else {"cases": {}}
    except ValueError as error:
        parser.exit(2, f"python -m benchmarks.gpu: {error}\n")
    document = {**header, "checks": before.get("checks", {}), "cases": before["cases"]}
    with tempfile.TemporaryDirectory(prefix="ecanet-benchmark-", ignore_cleanup_errors=True) as folder:
        # An empty cache, so that the time of compilation can be reported; workers find the folder in these variables.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
        os.environ.setdefault("TRITON_CACHE_DIR", f"{folder}/triton")
        configure()
        _Run(args, document, path, start + args.budget).run_stages()
    run.finish(document, path)
    show(document, args.plot)
    wrong = any(check["failures"] for check in document["checks"].values())
    wrong |= any("disagreements" in case for case in document["cases"].values())
    return 1 if wrong or document.get("failed") else 0


def _header(args: argparse.Namespace) -> results.Document:
    machine = describe(torch.get_num_threads())
    if not gpu.interpreting():
        machine["machine"]["gpu"] = describe_gpu(_COPY_BYTES, _MATRIX)
    return {
        "command": "",
        "settings": {
            "device": "cuda",
            "interpreted": gpu.interpreting(),
            "rounds": _QUICK_ROUNDS if args.quick else args.rounds,
            "quick": args.quick,
            "compiled": args.compile,
            "dtype": args.dtype,
        },
        **machine,
        "kernels": "loaded",
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


class _Run:
    """The stages, one after another, within the budget."""

    def __init__(self, args: argparse.Namespace, document: results.Document, path: Path, deadline: float) -> None:
        self.args, self.document, self.path, self.deadline = args, document, path, deadline
        self.setup = setup_of(args.dtype)
        self.stages = document["stages"] = {}

    def run_stages(self) -> None:
        for stage in STAGES:
            start = time.monotonic()
            if stage.name not in self.args.stages:
                continue
            if start > self.deadline:
                self._record(stage, "skipped: the budget is spent")
                continue
            try:
                what = self._run_stage(stage)
            except Exception as error:
                what = f"FAILED, {type(error).__name__}: {error}".splitlines()[0]
                self.document.setdefault("failed", {})[stage.name] = what
            self._record(stage, f"{what}, {time.monotonic() - start:.0f} s")

    def _run_stage(self, stage: Stage) -> str:
        if stage.name == "environment":
            machine, versions = self.document["machine"], self.document["versions"]
            return f"{machine.get('gpu', 'the interpreter')}; torch {versions['torch']}, triton {versions['triton']}"
        if stage.name == "correctness":
            return self._run_checks()
        cases = self._cases(stage)
        if stage.name in _LAST:
            self._compile_ahead(cases)
        run.measure_all(cases, self.document, self.path, command, self.deadline)
        keys = {case.key for case in cases}
        counts = {
            "measured": len(keys & self.document["cases"].keys()),
            "failed": len(keys & self.document.get("failed", {}).keys()),
            "skipped": len(keys & set(self.document.get("skipped", ()))),
        }
        return ", ".join(f"{count} {word}" for word, count in counts.items() if count or word == "measured")

    def _cases(self, stage: Stage) -> list[Case]:
        cases = stage.cases(self.args.quick, self.args.compile, self.setup)
        return [case for case in cases if self.args.matching in case.key]

    def _run_checks(self) -> str:
        """Run every operation's checks, and meanwhile compile for the stages before "more"."""
        checks = self.document["checks"]
        jobs = [Job("check", (name,)) for name in correctness.names() if name not in checks]
        ahead = [stage for stage in STAGES if stage.name in self.args.stages and stage.name not in _LAST]
        cases = [case for stage in ahead for case in self._cases(stage) if case.key not in self.document["cases"]]
        results_of_jobs = self._run_jobs([*_jobs_to_compile(cases, self.document["settings"]), *jobs])
        for job in jobs:
            checks[job.names[0]] = results_of_jobs.get(str(job), {"failures": ["not reached"]})
        results.write(self.path, self.document)
        failures = [failure for name in checks for failure in checks[name]["failures"]]
        for failure in failures:
            run.say(f"  WRONG: {failure}")
        done = sum(check.get("checks", 0) for check in checks.values())
        return f"{done} checks, {len(failures)} failed"

    def _compile_ahead(self, cases: Sequence[Case]) -> None:
        pending = [case for case in cases if case.key not in self.document["cases"]]
        self._run_jobs(_jobs_to_compile(pending, self.document["settings"]))

    def _run_jobs(self, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
        """Run jobs for as long as they may take; record what they compiled."""
        at_a_time = self.args.workers or os.cpu_count() or 1
        heavy = 1 if self.setup.device == "cpu" else heavy_jobs_at_a_time()
        workers = Workers(jobs, self.document["settings"], at_a_time, min(heavy, at_a_time))
        workers.wait(max(0.0, self.deadline - time.monotonic()) * _SHARE_OF_WORKERS)
        compiled = {name: result for name, result in workers.results.items() if name.startswith("compile")}
        self.document.setdefault("compiled_ahead", {}).update(compiled)
        for name, result in compiled.items():
            for failure in result["failures"]:
                run.say(f"  {name}: {failure}")
        return workers.results

    def _record(self, stage: Stage, what: str) -> None:
        self.stages[stage.name] = what
        results.write(self.path, self.document)
        run.say(f"== {stage.name} ({stage.what}): {what}")


def _jobs_to_compile(cases: Sequence[Case], settings: dict[str, Any]) -> list[Job]:
    """Jobs that compile one competitor of a network, one case of a tail, or one operation on maps each."""
    if not settings["compiled"]:
        return []
    jobs = []
    operations: dict[str, list[str]] = {}
    for case in cases:
        if case.group == "op":
            operations.setdefault(case.name, []).append(case.key)
        elif case.group != "network":
            jobs.append(Job("compile", (case.key,)))
        elif not case.name.endswith("-eager"):
            training = "-training-" in case.name
            names = (*NAMES, other_form("training" if training else "inference"))
            jobs += [Job("compile", (case.key,), (name,), heavy=training) for name in names]
    return [*jobs, *(Job("compile", tuple(keys)) for keys in operations.values())]


def command(document: results.Document) -> str:
    """The command that makes the file again in one run, however many runs it took."""
    settings = document["settings"]
    words = [
        *(["TRITON_INTERPRET=1"] if settings["interpreted"] else []),
        f"python -m benchmarks.gpu --dtype {settings['dtype']}",
        "--quick" if settings["quick"] else f"--rounds {settings['rounds']}",
        *(["--no-compile"] if not settings["compiled"] else []),
    ]
    return " ".join(words)


def _some_stages(value: str) -> tuple[str, ...]:
    given, names = tuple(value.split(",")), [stage.name for stage in STAGES]
    if unknown := [name for name in given if name not in names]:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)!r}: some of {','.join(names)}")
    return given


def _parser() -> argparse.ArgumentParser:
    stages = "\n".join(f"  {stage.name:12} {stage.what}" for stage in STAGES)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Check every Triton kernel and time kernels, tail and whole networks on a GPU, against the same\n"
        "without a gate, with timm's EcaModule and with squeeze-and-excitation. The most valuable first:\n\n"
        f"{stages}\n\nThe file is written after every case. No case starts once the budget is spent.",
        epilog="Example: python -m benchmarks.gpu --budget 420 --plot cost_gpu.png\n"
        "Without a GPU: TRITON_INTERPRET=1 python -m benchmarks.gpu --quick",
    )
    parser.add_argument("--budget", type=run.positive, default=420, metavar="SECONDS", help="default: 420")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of the maps (default: bfloat16)")
    parser.add_argument("--rounds", type=run.positive, default=20, help="turns of each competitor (default: 20)")
    names = tuple(stage.name for stage in STAGES if not stage.on_request)
    parser.add_argument(
        "--stages", type=_some_stages, default=names, metavar="STAGES", help="some, separated by commas (default: all)"
    )
    parser.add_argument("--matching", default="", metavar="TEXT", help="time only cases whose key contains TEXT")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--workers", type=run.positive, help="processes that check and compile (default: cores)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see if it runs; the numbers mean nothing")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: benchmarks/results/gpu-DTYPE.json")
    parser.add_argument("--resume", action="store_true", help="keep what is in the file, do the rest")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the picture")
    return parser


if __name__ == "__main__":
    sys.exit(main())
