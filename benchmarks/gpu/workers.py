"""Jobs in processes of their own, several at a time: checks, and compiling ahead into caches on the disk.

A job that crashes, never ends or breaks the GPU's context only loses its own result. The process that measures finds
what was compiled here in the caches: Inductor's code and triton's kernels.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch

from benchmarks.gpu.correctness import check

#: GB of a GPU's memory that one job on a whole network may take.
_HEAVY_GB = 27
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes:
        kind: ``check`` or ``compile``.
        names: What to check, or keys of the cases to compile.
        competitors: The competitors of these cases to compile; None for all.
        heavy: Whether it takes tens of GB.
    """

    kind: str
    names: tuple[str, ...]
    competitors: tuple[str, ...] | None = None
    heavy: bool = False

    def __str__(self) -> str:
        what = self.names[0] if self.kind == "check" or len(self.names) == 1 else self.names[0].rpartition("/")[0]
        return " ".join((self.kind, what.replace("/channels_last", ""), *(self.competitors or ())))


def heavy_jobs_at_a_time() -> int:
    """How many heavy jobs fit into the GPU's memory."""
    return max(1, int(torch.cuda.mem_get_info()[0] / 1e9 // _HEAVY_GB))


class Workers:
    """Runs jobs, each as soon as there is room, and collects their ``results``."""

    def __init__(self, jobs: Sequence[Job], settings: dict[str, Any], at_a_time: int, heavy_at_a_time: int) -> None:
        """Start the jobs, in their order.

        Args:
            jobs: The jobs.
            settings: ``quick``, ``compiled`` and ``dtype`` of the run.
            at_a_time: Number of processes at a time.
            heavy_at_a_time: Number of these that may run heavy jobs.
        """
        self.results: dict[str, dict[str, Any]] = {}
        self._settings = settings
        self._processes: set[subprocess.Popen[str]] = set()
        self._stopped = False
        heavy, light = SimpleQueue[Job](), SimpleQueue[Job]()
        for job in jobs:
            (heavy if job.heavy else light).put(job)
        # Some threads take heavy jobs first, and light ones when these are done; the others take only light ones.
        self._threads = [
            threading.Thread(target=self._work, args=([heavy, light] if i < heavy_at_a_time else [light],), daemon=True)
            for i in range(at_a_time)
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, seconds: float) -> None:
        """Wait until all jobs are done, or for ``seconds`` at most; then stop what still runs."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._stopped = True
        for process in tuple(self._processes):
            process.kill()
        for thread in self._threads:
            thread.join(5)

    def _work(self, queues: Iterable["SimpleQueue[Job]"]) -> None:
        for queue in queues:
            while not self._stopped:
                try:
                    job = queue.get_nowait()
                except Empty:
                    break
                self.results[str(job)] = self._run(job)

    def _run(self, job: Job) -> dict[str, Any]:
        start = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.gpu.workers", json.dumps({**asdict(job), **self._settings})]
        threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4" if job.heavy else "2"}
        process = subprocess.Popen(
            command, cwd=_ROOT, env={**os.environ, **threads}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._processes.add(process)
        out, error = process.communicate()
        self._processes.discard(process)
        took = {"wall_seconds": round(time.monotonic() - start, 1)}
        if process.returncode == 0 and out.strip():
            return {**json.loads(out.splitlines()[-1]), **took}
        last = [line for line in error.splitlines() if line.strip()][-1:] or ["no message"]
        why = "stopped: out of time" if self._stopped else f"exit status {process.returncode}: {last[0]}"
        return {"failures": [why], **took}


def compile_ahead(keys: Sequence[str], competitors: Sequence[str] | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Call each competitor once; returns the seconds of these first calls, and failures."""
    from benchmarks.gpu.device import configure, setup_of  # imports that take seconds, and that a check does not need
    from benchmarks.gpu.stages import STAGES
    from benchmarks.run import free_memory

    configure()
    setup = setup_of(settings["dtype"])
    known = {case.key: case for stage in STAGES for case in stage.cases(settings["quick"], settings["compiled"], setup)}
    seconds, failures = {}, []
    for key in keys:
        work = known[key].build(only=competitors)
        for name, competitor in work.competitors.items():
            start = time.monotonic()
            try:
                with competitor.context():
                    competitor.run()
            except Exception as error:
                failures.append(f"{key} {name}: {type(error).__name__}: {error}".splitlines()[0])
            seconds[f"{key} {name}"] = round(time.monotonic() - start, 2)
        del work, competitor
        free_memory()
    return {"seconds": seconds, "failures": failures}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one job, described in JSON; its result is the last line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.workers", description="Only for benchmarks.gpu.")
    parser.add_argument("job", help="JSON")
    job = json.loads(parser.parse_args(argv).job)
    if job["kind"] == "check":
        result = check(job["names"], job["quick"])
    else:
        result = compile_ahead(job["names"], job["competitors"], job)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
