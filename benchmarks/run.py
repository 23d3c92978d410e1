"""Measure cases one after another: what ``benchmarks.cpu`` and ``benchmarks.gpu`` share."""

import argparse
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.cases import Case, SavedBytes, Work
from benchmarks.measure import check_agreement, kernel_seconds, replayed
from benchmarks.tables import summary
from ecanet.profile.turns import Competitor, take_turns

_QUICK_TURN_SECONDS, _TURN_SECONDS = 1e-4, 0.01


def measure_all(
    cases: Sequence[Case],
    document: results.Document,
    path: Path,
    command: Callable[[results.Document], str],
    deadline: float = math.inf,
) -> None:
    """Measure what the document does not have yet, and write it after each case.

    Args:
        cases: What to measure.
        document: Header and cases of the result file; ``failed`` and ``skipped`` cases are recorded in it.
        path: The file.
        command: Returns the command that makes the document again.
        deadline: The time of :func:`time.monotonic` after which no case starts.
    """
    pending = [case for case in cases if case.key not in document["cases"]]
    failed, skipped = document.setdefault("failed", {}), document.setdefault("skipped", [])
    gc.freeze()  # take_turns collects garbage: it need not look through all imported modules each time
    try:
        for i, case in enumerate(pending, start=1):
            prefix = f"[{i:>{len(str(len(pending)))}}/{len(pending)}] {case.key}"
            start = time.monotonic()
            if start > deadline:
                skipped.append(case.key)
                continue
            say(prefix, end="")
            try:
                document["cases"][case.key] = _measure(case, document["settings"], prefix)
            except Exception as error:  # out of memory, or a disagreement: the cases after it are worth measuring
                failed[case.key] = f"{type(error).__name__}: {error}".splitlines()[0]
                say(f"{_restart(prefix)}: FAILED, {failed[case.key]}")
                del error  # and the tensors that its frames hold
                free_memory()
                continue
            document["command"] = command(document)
            results.write(path, document)
            say(f"{_restart(prefix)}: {time.monotonic() - start:.1f} s")
            free_memory()
    finally:
        gc.unfreeze()
    document["command"] = command(document)


def finish(document: results.Document, path: Path) -> None:
    """Summarise what was measured, and write it.

    Raises:
        RuntimeError: all cases failed.
    """
    for name in ("failed", "skipped"):
        if not document.get(name):
            document.pop(name, None)
    cases = document.pop("cases")
    if not cases and document.get("failed"):
        document["cases"] = cases
        raise RuntimeError(f"all {len(document['failed'])} cases failed: {next(iter(document['failed'].items()))}")
    document |= {"summary": summary(cases, document["settings"]), "cases": cases}
    results.write(path, document)


def free_memory() -> None:
    """Free the memory that the last case left on a GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _measure(case: Case, settings: dict[str, Any], prefix: str) -> dict[str, Any]:
    load = round(os.getloadavg()[0], 2)
    work = case.build()
    if isinstance(work, SavedBytes):
        return {"saved_bytes": {name: count() for name, count in work.count.items()}}
    disagreements = _disagreements(work, case.device)
    checked = {name for names in work.agree for name in names} if not disagreements else set()
    for name, competitor in work.competitors.items():
        if name not in checked:
            with competitor.context():
                competitor.run()
    rounds = settings["rounds"]
    turn_seconds = _QUICK_TURN_SECONDS if settings["quick"] else _TURN_SECONDS

    def on_round(done: int) -> None:
        if sys.stderr.isatty():
            say(f"{_restart(prefix)}: round {done} of {rounds}", end="")

    competitors = work.competitors
    if work.replayed and case.device == "cuda":
        competitors = {name: replayed(competitor) for name, competitor in competitors.items()}
    timings = take_turns(competitors, rounds, turn_seconds, on_round, case.device)
    result: dict[str, Any] = {"load_average": load, **({"disagreements": disagreements} if disagreements else {})}
    if work.maps is not None:
        result |= {"maps": work.maps, "map_bytes": work.map_bytes}
    if work.images is not None:
        peaks = {name: _peak(c) if work.peak else None for name, c in work.competitors.items()}
        result |= {"images": work.images, "peak_bytes": peaks}
    if case.group in ("op", "training") and case.device == "cuda":
        result["kernel_seconds"] = kernel_seconds(work.competitors["ecanet"])
    return result | {
        "calls_a_turn": {name: timing.calls for name, timing in timings.items()},
        "page_faults_a_call": {
            name: float(f"{timing.page_faults:.4g}")
            for name, timing in timings.items()
            if timing.page_faults is not None
        },
        "seconds": {name: [float(f"{s / work.sets:.4g}") for s in timing.seconds] for name, timing in timings.items()},
    }


def _disagreements(work: Work, device: str) -> list[str]:
    """Messages about competitors that should agree and do not. On a CPU that is an error.

    On a GPU the case is reported as wrong and timed all the same: its time still says something.
    """
    messages = []
    for names in work.agree:
        try:
            check_agreement(work.competitors, names, work.tolerance, work.poison_bytes)
        except RuntimeError as error:
            if device == "cpu":
                raise
            messages.append(str(error))
    return messages


def _peak(competitor: Competitor) -> int | None:
    """Peak of the GPU's memory during one call, in bytes, above what was allocated before."""
    if not torch.cuda.is_available():
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with competitor.context():
        competitor.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _restart(line: str) -> str:
    """The text that starts the line again on a terminal; empty elsewhere, where the line is already printed."""
    return f"\r\x1b[K{line}" if sys.stderr.isatty() else ""


def say(text: str, end: str = "\n") -> None:
    """Print progress to standard error."""
    print(text, end=end, file=sys.stderr, flush=True)


def positive(value: str) -> int:
    """Parse an option that must be an integer of 1 or more."""
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return int(value)
