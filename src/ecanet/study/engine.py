"""Runs a study's jobs on workers: a run that ended is a file, and one whose process died is tried once more."""

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

#: Where runs run: processes of this machine, or a Ray cluster.
ENGINES = ("processes", "ray")
#: A run is tried so often where its process dies; one that raises is not tried again.
_ATTEMPTS = 2


class Workers(Protocol):
    """Where runs run. They do not decide what runs, in which order or how often."""

    @property
    def size(self) -> int:
        """Runs at a time."""

    def start(self, job: Job) -> None:
        """Start a job; it is called while fewer than :attr:`size` are running."""

    def ended(self) -> list[tuple[Job, str | None]]:
        """Wait up to half a second for runs to end.

        Returns:
            Jobs that have their files now; or whose process died, with a text that says how.
        """

    def close(self) -> None:
        """Kill what still runs."""


def check_engine(on: str, most: int | None) -> None:
    """Raise unless runs can run there, so many at a time.

    Raises:
        ImportError: it needs a package that is not installed.
        RuntimeError: this process is a worker that is starting.
        ValueError: there is no such engine, or ``most`` is below 1.
    """
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise ValueError(f"workers must be 1 or more, or None, got {most!r}")
    if on not in ENGINES:
        raise ValueError(f"on must be one of {', '.join(ENGINES)}, got {shown(on)!r}")
    if on == "ray" and importlib.util.find_spec("ray") is None:
        raise ImportError("on='ray' needs Ray: pip install 'ecanet[ray]'")
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # what multiprocessing itself looks at
        raise RuntimeError(f"a worker of a study imports this script, which starts a study then: {GUARD}")


def workers_on(on: str, most: int | None) -> Workers:
    """The workers of an engine.

    Args:
        on: One of :data:`ENGINES`.
        most: Runs at a time; None for what the engine has room for.

    Raises:
        ConnectionError: there is no Ray cluster at ``RAY_ADDRESS``.
        ImportError, ValueError: as in :func:`check_engine`.
    """
    check_engine(on, most)
    if on == "ray":
        from ecanet.study.on_ray import OnRay

        return OnRay(most)
    return Processes(most)


def run_all(
    jobs: Sequence[Job],
    workers: int | None,
    on: str,
    progress: bool,
    why_failed: Callable[[dict[str, Any]], str],
    begin: Callable[[], None],
) -> dict[Path, str]:
    """Run jobs, each of which then has its file.

    Args:
        jobs: What to run, in this order.
        workers: As in :func:`workers_on`.
        on: As in :func:`workers_on`.
        progress: Show a bar: runs done, running, left, and the time left.
        why_failed: Says why a run that ended counts as failed; an empty text where it does not.
        begin: Called when there are workers, before the first run starts.

    Returns:
        By their folders, why jobs have no file: their processes died, each twice.

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


class _Lines:
    """A stream for the bar where stderr is no terminal: each state is a line, as a log has no place to draw in."""

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
    """The runs of a study: which are running, which are left, how often each was tried, and how long they take."""

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
        self._shown, self._every = -math.inf, 1 if sys.stderr.isatty() else 60  # seconds
        layout = "{desc}: {n_fmt}/{total_fmt} done |{bar}| {elapsed}{postfix}"
        self._bar = tqdm(
            total=len(jobs),
            desc="runs",
            disable=not progress,
            bar_format=layout,
            mininterval=1,
            file=sys.stderr if sys.stderr.isatty() else _Lines(sys.stderr),
        )

    def is_busy(self) -> bool:
        return bool(self.waiting or self.running)

    def tell(self, line: str) -> None:
        """Say something, with a bar or without one."""
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
        for job, how in self.workers.ended():
            _, started = self.running.pop(job.folder)
            if how is None or os.path.lexists(job.file):  # it may have died just after
                self._finish(job, time.monotonic() - started)
            else:
                self._try_again(job, how)
        self._show(size)

    def _finish(self, job: Job, seconds: float) -> None:
        self.seconds.setdefault(job.condition, []).append(seconds)
        stored = job.read()
        if stored is not None and (why := self.why_failed(stored)):
            trace = f"; see {job.folder / 'error.txt'}" if stored["error"] else ""
            self.tell(f"{job.name} failed: {why}{trace}")
        self.ended += 1

    def _try_again(self, job: Job, how: str) -> None:
        """Let the run of a process that died start once more, as the next one."""
        if self.attempts[job.folder] < _ATTEMPTS:
            self.tell(f"{job.name}: its process {how}; it is tried once more.")
            self.waiting.appendleft(job)
        else:
            self.lost[job.folder] = f"its process {how}, for the second time"
            self.tell(f"{job.name} failed: {self.lost[job.folder]}.")
            self.ended += 1

    def _show(self, size: int) -> None:
        is_time = time.monotonic() - self._shown > self._every
        left = f"{len(self.running)} running, {len(self.waiting)} left, time left {self._time_left(size)}"
        self._bar.set_postfix_str(left, refresh=False)  # before the bar moves: done, running and left make the total
        if self.ended > self._bar.n:
            self._bar.update(self.ended - self._bar.n)
        if is_time:
            self._bar.refresh()
            self._shown = time.monotonic()

    def _time_left(self, size: int) -> str:
        every = [seconds for found in self.seconds.values() for seconds in found]
        if not every:
            return "unknown"

        def expected(job: Job) -> float:
            known = self.seconds.get(job.condition, every)
            return sum(known) / len(known)

        now = time.monotonic()
        running = [max(0.0, expected(job) - (now - started)) for job, started in self.running.values()]
        left = (sum(running) + sum(map(expected, self.waiting))) / size
        return tqdm.format_interval(max([left, *running]))
