"""Runs in processes of this machine, each with one thread."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from ecanet.study.job import Job

#: The end of messages about a script that starts a study when it is imported.
GUARD = 'it needs if __name__ == "__main__": around the call, as every worker imports it'


def default_size() -> int:
    """How many runs execute at a time by default: one for each core, or one on a machine with a GPU."""
    import torch

    from ecanet.ops.build import available_cores

    return 1 if torch.cuda.is_available() else available_cores()


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    job: Job | None = None
    is_ready: bool = False

    def send_job(self) -> None:
        with contextlib.suppress(OSError):  # it died, which the next look at the workers notices
            self.pipe.send(self.job)

    def close(self) -> None:
        # Kill it: a worker that is only asked to stop would finish its run first. Checkpoints survive a kill.
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Processes:
    """Runs in worker processes; implements :class:`ecanet.study.engine.Workers`.

    Args:
        max_runs: Runs at a time; None means one for each core, or a single one on a machine with a GPU.
    """

    def __init__(self, max_runs: int | None = None) -> None:
        self.size = max_runs or default_size()
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._context = multiprocessing.get_context("spawn")  # fork is not safe once torch has started threads

    def start(self, job: Job) -> None:
        """Give a job to a process that has none, or to a new one."""
        worker = next((worker for worker in self._workers if worker.job is None), None) or self._new_worker()
        worker.job = job
        if worker.is_ready:
            worker.send_job()

    def ended(self) -> list[tuple[Job, str | None]]:
        """Wait up to half a second for runs to end; return each with None, or with how its process died.

        Raises:
            RuntimeError: no process starts.
        """
        # A dead process may leave children that hold its pipe open, so wait for the process itself as well.
        wait([*(worker.pipe for worker in self._workers), *(w.process.sentinel for w in self._workers)], timeout=0.5)
        return [end for worker in list(self._workers) if (end := self._poll(worker)) is not None]

    def close(self) -> None:
        """Kill the processes."""
        for worker in self._workers:
            worker.close()

    def _new_worker(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs,))
        with _one_thread():
            process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours))
        return self._workers[-1]

    def _poll(self, worker: _Worker) -> tuple[Job, str | None] | None:
        """The job that a worker ended, if any, with how the worker died, if it did."""
        # Ask before reading the pipe: whatever a dead process had sent is in the pipe then.
        is_alive = worker.process.is_alive()
        try:
            if not worker.pipe.poll():
                return None if is_alive else self._handle_death(worker)
            succeeded = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(timeout=5)
            return None if worker.process.is_alive() else self._handle_death(worker)
        if not worker.is_ready:
            worker.is_ready, self._failed_starts = True, 0
            worker.send_job()
            return None
        job, worker.job = worker.job, None
        assert job is not None
        if not succeeded:  # a failed run may have broken its process, as CUDA errors do
            self._dismiss(worker)
        return job, None

    def _handle_death(self, worker: _Worker) -> tuple[Job, str] | None:
        status = worker.process.exitcode
        self._dismiss(worker)
        death = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
        if worker.is_ready:
            return None if worker.job is None else (worker.job, death)
        self._failed_starts += 1
        if self._failed_starts > 1:
            raise RuntimeError(
                f"no worker process starts: the last one {death}, and its own error is above. In a script, {GUARD}"
            )
        assert worker.job is not None
        self.start(worker.job)  # the job never ran, so this does not count as an attempt
        return None

    def _dismiss(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.close()


def _work(pipe: Connection) -> None:
    """A worker: take jobs from the pipe until it closes, and send back after each whether it succeeded."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    pipe.send(True)
    while True:
        try:
            job = pipe.recv()
        except (EOFError, ConnectionError):  # the parent has gone
            return
        succeeded = job.run()
        with contextlib.suppress(ConnectionError):
            pipe.send(succeeded)


def _exit_with_parent() -> None:
    # If the parent is killed it cannot tell its workers, which would go on writing into the folders of the runs.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
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
