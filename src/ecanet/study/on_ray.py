"""Runs on a Ray cluster: Ray chooses where each one executes, the study keeps track of them."""

import logging
import os
import pickle
import re
import socket
import sys
from typing import Any

from ecanet.files.atomic import write_whole
from ecanet.study.job import Job
from ecanet.untrusted import shown

try:
    import ray
except ImportError as error:
    raise ImportError("a study on a cluster needs Ray: pip install 'ecanet[ray]'") from error

#: Memory for the results of runs in a local cluster; by default Ray would take a third of the machine's.
_STORE_BYTES = 2**27


class OnRay:
    """Runs as tasks of a Ray cluster; implements :class:`ecanet.study.engine.Workers`.

    The cluster is the one that this process is connected to, or that ``RAY_ADDRESS`` names; otherwise one is started
    on this machine and ends with the study. Each run has a GPU of its own if the cluster has any, otherwise a CPU; it
    waits in Ray's queue while all of them are in use.

    Args:
        max_runs: Largest number of runs at a time; None for as many as the cluster has GPUs, or CPUs.
    """

    def __init__(self, max_runs: int | None = None) -> None:
        self._max_runs = max_runs
        self._owns_cluster = not ray.is_initialized()
        if self._owns_cluster:
            _connect(max_runs)
        self._kind = "GPU" if ray.cluster_resources().get("GPU", 0) >= 1 else "CPU"
        # Each run has its own process, so that memory it holds on a GPU, or a broken state, ends with it.
        task = ray.remote(num_cpus=1, num_gpus=int(self._kind == "GPU"), max_retries=0, max_calls=1)
        self._task: Any = task(_run)
        self._jobs: dict[Any, Job] = {}

    @property
    def size(self) -> int:
        """How many runs fit in the cluster at a time; it changes as the cluster grows or shrinks."""
        available = int(ray.cluster_resources().get(self._kind, 0))
        return max(1, available if self._max_runs is None else min(self._max_runs, available))

    def start(self, job: Job) -> None:
        """Hand a job to Ray."""
        self._jobs[self._task.remote(ray.cloudpickle.dumps(job), os.getcwd(), sys.path)] = job

    def ended(self) -> list[tuple[Job, str | None]]:
        """Wait up to half a second for runs to end; return each with None, or with how its process died."""
        ended, _ = ray.wait(list(self._jobs), timeout=0.5)
        return [self._receive(task) for task in ended]

    def close(self) -> None:
        """Kill the runs, and disconnect from the cluster unless this process was connected before."""
        for task in self._jobs:
            ray.cancel(task, force=True)
        if self._owns_cluster:
            ray.shutdown()

    def _receive(self, task: Any) -> tuple[Job, str | None]:
        job = self._jobs.pop(task)
        try:
            content = ray.get(task)
        except Exception as error:  # Ray's own error if a process or a machine died, otherwise that of the task
            cause = getattr(error, "cause", None) or error
            reason = f"{type(cause).__name__}: {shown(' '.join(str(cause).split()), 200)}"
            if isinstance(cause, ImportError | AttributeError) or "No module named" in reason:
                raise RuntimeError(
                    f"no run starts on the cluster ({reason}): every machine needs ecanet, and the training function's "
                    "file at the same path as here"
                ) from error
            return job, f"died ({reason})"
        if not os.path.lexists(job.file):  # it ran on a machine that does not share this folder
            write_whole(job.file, content)
        return job, None


def _run(pickled: bytes, folder: str, paths: list[str]) -> bytes:
    """A task: run a job with the working folder and import path of the study, and return the content of its file."""
    sys.path += [path for path in paths if path not in sys.path]
    if os.path.isdir(folder):
        os.chdir(folder)
    job: Job = pickle.loads(pickled)
    job.run()
    return job.file.read_bytes()


def _connect(max_runs: int | None) -> None:
    # The output of runs goes to Ray's logs: on this terminal it would break the progress bar.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address := os.environ.get("RAY_ADDRESS"):
        _check_cluster_answers(address)
        ray.init(address, **quiet)
        return
    from ecanet.ops.build import available_cores

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a study sends nothing anywhere unless its user says so
    cpus = max(available_cores(), max_runs or 0)
    ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=_STORE_BYTES, **quiet)


def _check_cluster_answers(address: str) -> None:
    # Ray itself would try for two minutes. Addresses such as "auto" name no machine and are not checked.
    if match := re.fullmatch(r"(?:ray://)?([^/]+):(\d{1,5})", address):
        try:
            socket.create_connection((match[1], int(match[2])), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise ConnectionError(f"RAY_ADDRESS={shown(address)}: no Ray cluster answers there ({error})") from error
