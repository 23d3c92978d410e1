"""Runs in worker processes. A run that ended is a file; a worker that dies costs no more than its run in progress."""

import contextlib
import errno
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ecanet.files.atomic import write_whole
from ecanet.study.run_files import is_number, read_run, write_run
from ecanet.untrusted import shown

#: A run is tried so often where its process dies; one that raises is not tried again.
_ATTEMPTS = 2
#: A full disk ends the process, as a folder that another process has locked does, and another one tries again.
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Job:
    """One run of a study.

    Attributes:
        condition: Name of its condition.
        seed: Its seed.
        folder: Where it may write; its file is beside it.
        work: Called with the folder; returns metrics and whatever else JSON can hold, by name.
        fingerprint: Tells it from the same condition and seed of another study.
        check: As in :func:`ecanet.study.run_files.read_run`.
    """

    condition: str
    seed: int
    folder: Path
    work: Callable[[Path], Mapping[str, Any]]
    fingerprint: str
    check: Callable[[dict[str, Any]], None] | None = None

    @property
    def file(self) -> Path:
        """Its file, once it ended."""
        return self.folder.with_name(self.folder.name + ".json")

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.condition}, seed {self.seed}"

    def read(self) -> dict[str, Any] | None:
        """What the run left, or None if it did not end yet.

        Raises:
            ValueError: its file is damaged, or of another study.
        """
        if not os.path.lexists(self.file):
            return None
        stored = read_run(self.file, self.check)
        if stored["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{self.file} was made by another recipe, function or version: "
                f"choose another folder, or delete it with {self.folder}"
            )
        return stored

    def run(self) -> bool:
        """Run it and write its file; False if it failed, which the file then says."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = {"condition": self.condition, "seed": self.seed, "fingerprint": self.fingerprint}
        (self.folder / "error.txt").unlink(missing_ok=True)  # of an earlier try
        start = time.perf_counter()
        try:
            metrics, details = _sorted_out(self.work(self.folder))
            about["seconds"] = time.perf_counter() - start
            write_run(self.file, {**about, "metrics": metrics, "details": details, "error": None})
        except Exception as error:
            if isinstance(error, BlockingIOError) or (isinstance(error, OSError) and error.errno in _FULL_DISK):
                raise
            about["seconds"] = time.perf_counter() - start
            write_whole(self.folder / "error.txt", traceback.format_exc().encode(errors="backslashreplace"))
            why = shown(" ".join(f"{type(error).__name__}: {error}".split()), 500)
            write_run(self.file, {**about, "metrics": {}, "details": {}, "error": why})
            return False
        return True


def _sorted_out(returned: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """Numbers, those of torch and NumPy included, and the rest, which JSON has to hold."""
    if not isinstance(returned, Mapping):
        raise TypeError(f"the training function must return a dict of metrics, got {shown(returned)}")
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}
    for name, value in returned.items():
        if not isinstance(name, str):
            raise TypeError(f"names of metrics must be texts, got {shown(name)}")
        if callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
            value = value.item()
        if is_number(value):
            metrics[name] = value
            continue
        try:
            details[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(
                f"{shown(name)} must be a number, or something that JSON can hold, got {shown(value)}"
            ) from error
    return metrics, details


def run_all(
    jobs: Sequence[Job], workers: int | None, progress: bool, why_failed: Callable[[dict[str, Any]], str]
) -> dict[Path, str]:
    """Run jobs, each of which then has its file.

    Args:
        jobs: What to run, in this order.
        workers: Runs at a time, each in a process of its own with one thread; None for one for each core, or a single
            one on a machine with a GPU.
        progress: Show a bar: runs done, running, left, and the time left.
        why_failed: Says why a run that ended counts as failed; an empty text where it does not.

    Returns:
        By their folders, why jobs have no file: their processes died, each twice.

    Raises:
        RuntimeError: no worker process starts.
    """
    if not jobs:
        return {}
    team = _Team(jobs, min(workers or default_workers(), len(jobs)), progress, why_failed)
    try:
        with _one_thread_per_process():
            while team.is_busy():
                team.step()
    except BaseException:
        team.tell(f"Stopped: finished runs are kept in {jobs[0].folder.parent}; the same call goes on from there.")
        raise
    finally:
        team.close()
    return team.lost


def default_workers() -> int:
    """Runs at a time if nobody says: one for each core, or one on a machine with a GPU."""
    import torch

    from ecanet.ops.build import available_cores

    return 1 if torch.cuda.is_available() else available_cores()


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    job: Job | None = None
    is_ready: bool = False
    started: float = field(default_factory=time.monotonic)

    def close(self) -> None:
        # Killed: a worker that is only asked to stop goes on with its run. Checkpoints survive a kill.
        self.process.kill()
        self.process.join()
        self.pipe.close()


class _Team:
    """The workers of a study, what they do, and what is left."""

    def __init__(
        self, jobs: Sequence[Job], size: int, progress: bool, why_failed: Callable[[dict[str, Any]], str]
    ) -> None:
        self.waiting = deque(jobs)
        self.size, self.why_failed = size, why_failed
        self.attempts: dict[Path, int] = {}
        self.lost: dict[Path, str] = {}
        self.seconds: dict[str, list[float]] = {}
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._shown, self._every = -math.inf, 1 if sys.stderr.isatty() else 60  # seconds
        self._context = multiprocessing.get_context("spawn")  # fork is not safe once torch has started threads
        layout = "{desc}: {n_fmt}/{total_fmt} done |{bar}| {elapsed}{postfix}"
        self._bar = tqdm(total=len(jobs), desc="runs", disable=not progress, bar_format=layout, mininterval=1)

    def is_busy(self) -> bool:
        return bool(self.waiting) or any(worker.job for worker in self._workers)

    def tell(self, line: str) -> None:
        """Say something, with a bar or without one."""
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        self._bar.refresh()
        self._bar.close()

    def step(self) -> None:
        """Start what can start, wait for something to happen, and deal with it."""
        busy = sum(worker.job is not None for worker in self._workers)
        while len(self._workers) < min(self.size, busy + len(self.waiting)):
            self._workers.append(self._start())
        for worker in self._workers:
            if worker.is_ready and worker.job is None and self.waiting:
                self._give(worker, self.waiting.popleft())
        # A process may leave children that hold its pipe open, so its end is looked for as well.
        wait([*(worker.pipe for worker in self._workers), *(w.process.sentinel for w in self._workers)], timeout=0.5)
        for worker in list(self._workers):
            is_alive = worker.process.is_alive()  # asked first: what it sent before its end is in the pipe
            heard = self._hear(worker)
            if not heard and not is_alive:
                self._bury(worker)
        self._show()

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs,))
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _give(self, worker: _Worker, job: Job) -> None:
        worker.job, worker.started = job, time.monotonic()
        self.attempts[job.folder] = self.attempts.get(job.folder, 0) + 1
        with contextlib.suppress(OSError):  # it died: its end is noticed as that of any other
            worker.pipe.send(job)

    def _hear(self, worker: _Worker) -> bool:
        try:
            if not worker.pipe.poll():
                return False
            succeeded = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(timeout=5)
            if not worker.process.is_alive():
                self._bury(worker)
            return True
        if not worker.is_ready:
            worker.is_ready, self._failed_starts = True, 0
            return True
        assert worker.job is not None
        self._finish(worker.job, time.monotonic() - worker.started)
        worker.job = None
        if not succeeded:  # what failed may have broken the process, as an error of CUDA does
            self._dismiss(worker)
        return True

    def _finish(self, job: Job, seconds: float) -> None:
        self.seconds.setdefault(job.condition, []).append(seconds)
        stored = job.read()
        if stored is not None and (why := self.why_failed(stored)):
            trace = f"; see {job.folder / 'error.txt'}" if stored["error"] else ""
            self.tell(f"{job.name} failed: {why}{trace}")
        self._bar.update()

    def _bury(self, worker: _Worker) -> None:
        """Give the run of a worker that died to another one, once."""
        job, status = worker.job, worker.process.exitcode
        self._dismiss(worker)
        how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
        if job is None:
            if not worker.is_ready:
                self._failed_starts += 1
            if self._failed_starts > 1:
                raise RuntimeError(
                    f"no worker process starts: the last one {how}, and its own error is above. A script needs "
                    'if __name__ == "__main__": around the call, as every worker imports it'
                )
            return
        if os.path.lexists(job.file):  # it ended just before
            self._finish(job, time.monotonic() - worker.started)
        elif self.attempts[job.folder] < _ATTEMPTS:
            self.tell(f"{job.name}: its process {how}; it is tried once more.")
            self.waiting.appendleft(job)
        else:
            self.lost[job.folder] = f"its process {how}, for the second time"
            self.tell(f"{job.name} failed: {self.lost[job.folder]}.")
            self._bar.update()

    def _dismiss(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.close()

    def _show(self) -> None:
        busy = [worker for worker in self._workers if worker.job is not None]
        left = f"{len(busy)} running, {len(self.waiting)} left, time left {self._time_left(busy)}"
        self._bar.set_postfix_str(left, refresh=time.monotonic() - self._shown > self._every)
        if time.monotonic() - self._shown > self._every:
            self._shown = time.monotonic()

    def _time_left(self, busy: Sequence[_Worker]) -> str:
        every = [seconds for found in self.seconds.values() for seconds in found]
        if not every:
            return "unknown"

        def expected(job: Job) -> float:
            known = self.seconds.get(job.condition, every)
            return sum(known) / len(known)

        now = time.monotonic()
        running = [max(0.0, expected(w.job) - (now - w.started)) for w in busy if w.job is not None]
        left = (sum(running) + sum(map(expected, self.waiting))) / self.size
        return tqdm.format_interval(max([left, *running]))


def _work(pipe: Connection) -> None:
    """A worker: takes jobs from the pipe until it closes, and says after each whether it succeeded."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    pipe.send(True)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(job.run())


def _exit_with_parent() -> None:
    # A parent that is killed cannot tell its workers, and they would go on training into the same folders.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _one_thread_per_process() -> Iterator[None]:
    # OpenMP reads its settings when a process starts; several runs at once share the cores.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
