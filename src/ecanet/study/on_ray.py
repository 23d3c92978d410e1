"""Runs on a Ray cluster: Ray finds a place for each, the study tracks them."""

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

#: For the results of runs, in a local cluster: Ray takes a third of the memory if nobody says.
_STORE_BYTES = 2**27


class OnRay:
    """Tasks of a Ray cluster, as :class:`ecanet.study.engine.Workers` says.

    The cluster is the one that this process is connected to, or that ``RAY_ADDRESS`` names; otherwise one is started
    on this machine and ends with the study. A run has a GPU of its own where the cluster has any, otherwise a CPU; it
    waits in Ray's queue while others have them.

    Args:
        most: Runs at a time, at most; None for as many as the cluster has GPUs, or CPUs.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            _connect(most)
        self._kind = "GPU" if ray.cluster_resources().get("GPU", 0) >= 1 else "CPU"
        # A process of its own for each run: what it leaves on a GPU, or breaks, goes with it.
        task = ray.remote(num_cpus=1, num_gpus=int(self._kind == "GPU"), max_retries=0, max_calls=1)
        self._task: Any = task(_run)
        self._jobs: dict[Any, Job] = {}

    @property
    def size(self) -> int:
        """Runs that have a place at a time; it follows the cluster as that grows or shrinks."""
        there = int(ray.cluster_resources().get(self._kind, 0))
        return max(1, there if self._most is None else min(self._most, there))

    def start(self, job: Job) -> None:
        """Hand a job to Ray."""
        self._jobs[self._task.remote(ray.cloudpickle.dumps(job), os.getcwd(), sys.path)] = job

    def ended(self) -> list[tuple[Job, str | None]]:
        """Wait up to half a second for runs to end; with each, how its process died, if it did."""
        ended, _ = ray.wait(list(self._jobs), timeout=0.5)
        return [self._received(task) for task in ended]

    def close(self) -> None:
        """Kill the runs, and leave the cluster unless this process was in it before."""
        for task in self._jobs:
            ray.cancel(task, force=True)
        if self._is_ours:
            ray.shutdown()

    def _received(self, task: Any) -> tuple[Job, str | None]:
        job = self._jobs.pop(task)
        try:
            content = ray.get(task)
        except Exception as error:  # Ray's own where a process or a machine died, otherwise that of the task
            cause = getattr(error, "cause", None) or error
            said = f"{type(cause).__name__}: {shown(' '.join(str(cause).split()), 200)}"
            if isinstance(cause, ImportError | AttributeError) or "No module named" in said:
                raise RuntimeError(
                    f"no run starts on the cluster ({said}): every machine needs ecanet, and the file of the training "
                    "function under the path that it has here"
                ) from error
            return job, f"died ({said})"
        if not os.path.lexists(job.file):  # it ran on a machine that does not share this folder
            write_whole(job.file, content)
        return job, None


def _run(pickled: bytes, folder: str, paths: list[str]) -> bytes:
    """A task: run a job where the study's own process would, and return the file that it left."""
    sys.path += [path for path in paths if path not in sys.path]
    if os.path.isdir(folder):
        os.chdir(folder)
    job: Job = pickle.loads(pickled)
    job.run()
    return job.file.read_bytes()


def _connect(most: int | None) -> None:
    # What runs print is in Ray's logs: on this terminal it would tear the progress display.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address := os.environ.get("RAY_ADDRESS"):
        _check_that_it_answers(address)
        ray.init(address, **quiet)
        return
    from ecanet.ops.build import available_cores

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a study sends nothing anywhere unless its user says so
    cpus = max(available_cores(), most or 0)
    ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=_STORE_BYTES, **quiet)


def _check_that_it_answers(address: str) -> None:
    # Ray itself tries for two minutes. "auto" and the like are no machines.
    if match := re.fullmatch(r"(?:ray://)?([^/]+):(\d{1,5})", address):
        try:
            socket.create_connection((match[1], int(match[2])), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise ConnectionError(f"RAY_ADDRESS={shown(address)}: no Ray cluster answers there ({error})") from error
