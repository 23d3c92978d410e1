"""Processes that begin with torch imported and nothing of ecanet: each is a fork, where importing takes seconds.

They are forked from one server for all tests of a session, which imports what :data:`IMPORTED` lists and runs nothing.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.multiprocessing

#: What takes long to import, and imports neither ecanet nor Ultralytics. What is not installed is left out.
IMPORTED = ("pytest", "torch", "torchvision", "torch.distributed.fsdp", "lightning.pytorch", "jsonargparse", "cv2")
IMPORTED += ("scipy.stats", "statsmodels.stats.power", "statsmodels.stats.multitest")

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(list(IMPORTED))


class FreshProcess:
    """Runs code as ``python -c`` does; its output, signals and end are those of a :class:`subprocess.Popen`."""

    def __init__(
        self,
        code: str,
        *arguments: object,
        cwd: Path | None = None,
        environment: Mapping[str, str] = os.environ,
        warnings_are_errors: bool = False,
    ) -> None:
        """Start it, as the leader of a session of its own."""
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(2)]
        outputs = [write for _, write in pipes]
        action = "error" if warnings_are_errors else None
        words = [str(argument) for argument in arguments]
        about = (code, words, str(cwd or Path.cwd()), dict(environment), action, outputs)
        self.args = ["-c", *words]
        self._process = _CONTEXT.Process(target=_run, args=about)
        self._process.start()
        for output in outputs:
            output.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(read.fileno()), errors="surrogateescape") for read, _ in pipes)
        self.pid, self.kill = self._process.pid, self._process.kill

    @property
    def returncode(self) -> int | None:
        """Exit status, or a signal as a negative number; None while it runs."""
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, signum)

    def wait(self, timeout: float = 60) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """All that it still says, once it has ended."""
        with ThreadPoolExecutor(2) as pool:
            said = [pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
            self.wait(timeout)
        self.close()
        return said[0].result(), said[1].result()

    def close(self) -> None:
        self.stdout.close()
        self.stderr.close()


def _run(
    code: str, words: list[str], cwd: str, environment: dict[str, str], action: Any, outputs: list[Connection]
) -> None:
    os.setsid()
    for descriptor, output in enumerate(outputs, start=1):
        os.dup2(output.fileno(), descriptor)
        output.close()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.argv = ["-c", *words]
    if action is not None:
        warnings.simplefilter(action)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        exec(compile(code, "<string>", "exec"), vars(main))
    except KeyboardInterrupt:  # Python itself ends by the signal, and multiprocessing with 1
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def run(code: str, *arguments: object, timeout: float = 60, **how: Any) -> "subprocess.CompletedProcess[str]":
    """What :func:`subprocess.run` gives with ``capture_output``; ``how`` is that of :class:`FreshProcess`."""
    process = FreshProcess(code, *arguments, **how)
    said = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode or 0, *said)


def run_ranks(function: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Call ``function(rank, *arguments)`` in so many processes; an error in one is raised here, and ends the others."""
    torch.multiprocessing.start_processes(function, arguments, count, start_method="forkserver")
