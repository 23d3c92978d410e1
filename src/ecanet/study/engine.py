"""Runs a study's jobs on workers: a run that ended leaves a file, and one whose process died is tried once more."""

import importlib.util
import math
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from ecanet.study.job import Job
from ecanet.study.processes import GUARD, Processes
from ecanet.untrusted import shown

#: Where runs execute: processes of this machine, or a Ray cluster.
ENGINES = ("processes", "ray")
#: How often a run is tried if its process dies; a run that raises is not tried again.
_MAX_ATTEMPTS = 2


class Workers(Protocol):
    """Places where jobs run. They do not decide which job runs, in which order or how often."""

    @property
    def size(self) -> int:
        """How many jobs run at a time."""

    def start(self, job: Job) -> None:
        """Start a job; it is called only while fewer than :attr:`size` are running."""

    def ended(self) -> list[tuple[Job, str | None]]:
        """Wait up to half a second for runs to end.

        Returns:
            Each job that ended, with None if it has written its file, or with how its process died.
        """

    def close(self) -> None:
        """Kill the jobs that still run."""


def check_engine(on: str, workers: int | None) -> None:
    """Raise if the engine cannot be used, or cannot have that number of workers.

    Raises:
        ImportError: it needs a package that is not installed.
        RuntimeError: this process is a worker that is starting.
        ValueError: there is no such engine, or ``workers`` is below 1.
    """
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise ValueError(f"workers must be 1 or more, or None, got {workers!r}")
    if on not in ENGINES:
        raise ValueError(f"on must be one of {', '.join(ENGINES)}, got {shown(on)!r}")
    if on == "ray" and importlib.util.find_spec("ray") is None:
        raise ImportError("on='ray' needs Ray: pip install 'ecanet[ray]'")
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # the flag that multiprocessing itself checks
        raise RuntimeError(f"this script starts a study whenever a worker of the study imports it: {GUARD}")


def workers_on(on: str, workers: int | None) -> Workers:
    """The workers of an engine.

    Args:
        on: One of :data:`ENGINES`.
        workers: Runs at a time; None for as many as the engine has room for.

    Raises:
        ConnectionError: there is no Ray cluster at ``RAY_ADDRESS``.
        ImportError, RuntimeError, ValueError: as in :func:`check_engine`.
    """
    check_engine(on, workers)
    if on == "ray":
        from ecanet.study.on_ray import OnRay

        return OnRay(workers)
    return Processes(workers)


def run_all(
    jobs: Sequence[Job],
    workers: int | None,
    on: str,
    progress: bool,
    why_failed: Callable[[dict[str, Any]], str],
    begin: Callable[[], None],
) -> dict[Path, str]:
    """Run jobs, so that each leaves its file.

    Args:
        jobs: The jobs, in the order in which they start.
        workers: As in :func:`workers_on`.
        on: As in :func:`workers_on`.
        progress: Show a bar: runs done, running, left, and the time left.
        why_failed: Returns why a run that ended counts as failed, or an empty text if it does not.
        begin: Called when there are workers, before the first run starts.

    Returns:
        Why jobs have no file, by their folders: the processes of each died twice.

    Raises:
        RuntimeError: no worker process starts.
        ConnectionError, ImportError: as in :func:`workers_on`.
    """
    if not jobs:
        return {}
    team = _Team(jobs, workers_on(on, workers), progress, why_failed)
    try:
        begin()
        while team.is_busy():
            team.step()
    except BaseException:
        team.tell(f"Stopped: finished runs are kept in {jobs[0].folder.parent}; the same call goes on from there.")
        raise
    finally:
        team.close()
    return team.lost


class _LineStream:
    """A stream for the progress bar if stderr is not a terminal: each new state of the bar is a line of the log."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._last = stream, ""

    def write(self, text: str) -> int:
        line = text.strip()
        if line and line != self._last:
            self._stream.write(f"{line}\n")
            self._last = line
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


class _Team:
    """Keeps track of a study's runs: which run, which are left, how often each was tried, and how long they take."""

    def __init__(
        self, jobs: Sequence[Job], workers: Workers, progress: bool, why_failed: Callable[[dict[str, Any]], str]
    ) -> None:
        self.waiting = deque(jobs)
        self.workers, self.why_failed = workers, why_failed
        self.running: dict[Path, tuple[Job, float]] = {}
        self.attempts: dict[Path, int] = {}
        self.lost: dict[Path, str] = {}
        self.ended = 0
        self.seconds: dict[str, list[float]] = {}
        self._last_shown, self._interval = -math.inf, 1 if sys.stderr.isatty() else 60  # seconds
        layout = "{desc}: {n_fmt}/{total_fmt} done |{bar}| {elapsed}{postfix}"
        self._bar = tqdm(
            total=len(jobs),
            desc="runs",
            disable=not progress,
            bar_format=layout,
            mininterval=1,
            file=sys.stderr if sys.stderr.isatty() else _LineStream(sys.stderr),
        )

    def is_busy(self) -> bool:
        return bool(self.waiting or self.running)

    def tell(self, line: str) -> None:
        """Print a line, without breaking the bar if there is one."""
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        self.workers.close()
        self._bar.refresh()
        self._bar.close()

    def step(self) -> None:
        """Start what can start, wait for something to happen, and deal with it."""
        size = self.workers.size
        while self.waiting and len(self.running) < size:
            job = self.waiting.popleft()
            self.attempts[job.folder] = self.attempts.get(job.folder, 0) + 1
            self.running[job.folder] = job, time.monotonic()
            self.workers.start(job)
        for job, death in self.workers.ended():
            _, started = self.running.pop(job.folder)
            if death is None or os.path.lexists(job.file):  # a process may die just after it wrote the file
                self._finish(job, time.monotonic() - started)
            else:
                self._try_again(job, death)
        self._show(size)

    def _finish(self, job: Job, seconds: float) -> None:
        self.seconds.setdefault(job.condition, []).append(seconds)
        stored = job.read()
        if stored is not None and (why := self.why_failed(stored)):
            trace = f"; see {job.folder / 'error.txt'}" if stored["error"] else ""
            self.tell(f"{job.name} failed: {why}{trace}")
        self.ended += 1

    def _try_again(self, job: Job, death: str) -> None:
        """Put a run whose process died first in the queue, unless that was its last attempt."""
        if self.attempts[job.folder] < _MAX_ATTEMPTS:
            self.tell(f"{job.name}: its process {death}; it is tried once more.")
            self.waiting.appendleft(job)
        else:
            self.lost[job.folder] = f"its process {death}, for the second time"
            self.tell(f"{job.name} failed: {self.lost[job.folder]}.")
            self.ended += 1

    def _show(self, size: int) -> None:
        is_due = time.monotonic() - self._last_shown > self._interval
        left = f"{len(self.running)} running, {len(self.waiting)} left, time left {self._time_left(size)}"
        # Set before the bar moves, so that done, running and left always add up to the total.
        self._bar.set_postfix_str(left, refresh=False)
        if self.ended > self._bar.n:
            self._bar.update(self.ended - self._bar.n)
        if is_due:
            self._bar.refresh()
            self._last_shown = time.monotonic()

    def _time_left(self, size: int) -> str:
        all_seconds = [seconds for of_condition in self.seconds.values() for seconds in of_condition]
        if not all_seconds:
            return "unknown"

        def expected(job: Job) -> float:
            known = self.seconds.get(job.condition, all_seconds)
            return sum(known) / len(known)

        now = time.monotonic()
        running = [max(0.0, expected(job) - (now - started)) for job, started in self.running.values()]
        left = (sum(running) + sum(map(expected, self.waiting))) / size
        return tqdm.format_interval(max([left, *running]))
