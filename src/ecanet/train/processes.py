"""The processes of a run end together: what is left of a run that lost one waits for it in a collective, for ever.

Lightning starts them and, on a CPU or a GPU, they meet in collectives of gloo or NCCL. There the main thread hears of
nothing: not of a signal, and with NCCL not of a process that died. A thread beside it does.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from subprocess import Popen, TimeoutExpired
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback

#: Names the process that started this one, which may be gone before this one can ask for it.
_PARENT = "ECANET_PARENT_PROCESS"
#: Seconds between two looks; for the main thread to end by itself, after a signal or another process's end.
_PAUSE, _PATIENCE = 0.1, 3.0
#: Seconds for those that were told to end; to leave Python after another process was lost, or this one told to end.
_LEAVE, _EXIT = 2.0, 3.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: What gloo and NCCL say where the other end is gone.
_GONE = ("closed by peer", "reset by peer", "Broken pipe", "NCCL communicator was aborted", "remote process exited")

#: What this process started, and what started this one: for its next run, for which Lightning starts nothing anew.
_children: list[Popen[bytes]] = []
_parent: int | None = None

if hasattr(os, "register_at_fork"):  # a loading process that is told to end must not tell this one
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


class EndTogether(Callback):
    """While the context lasts, the end of one process of a run is the end of all, within seconds.

    Where this process is told to end (SIGTERM, SIGINT), those that it started are told, too. Where one of them ends
    before its time, or the one that started this one, this one ends. It does so by an exception in its main thread, or
    where that waits in a collective, without one.

    Args:
        trainer: Of a run; for a single process nothing is done.
        how_to_go_on: What to tell the user.
    """

    def __init__(self, trainer: L.Trainer, how_to_go_on: Callable[[], str]) -> None:
        self._trainer, self._how_to_go_on = trainer, how_to_go_on
        self._several = trainer.world_size > 1
        self._started = [process for process in _children if process.poll() is None]
        self._stop = threading.Event()
        self._wakeup: tuple[int, int, int] | None = None
        self._handler: Any = None
        environment = getattr(trainer.strategy, "cluster_environment", None)
        launched = isinstance(environment, LightningEnvironment) and environment.creates_processes_externally
        global _parent
        if launched and _PARENT in os.environ:
            _parent = int(os.environ[_PARENT])
        self._parent = _parent if launched else None

    def __enter__(self) -> "EndTogether":
        if not self._several:
            return self
        if (lost := self._who_is_lost()) is not None:
            raise RuntimeError(f"{lost}: {self._how_to_go_on()}")
        os.environ[_PARENT] = str(os.getpid())
        if os.name == "posix" and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, _leave)  # those that it is about to start would not hear
            reading, writing = os.pipe()
            for end in (reading, writing):
                os.set_blocking(end, False)
            self._wakeup = reading, writing, signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="end-together")
        self._thread.start()
        return self

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take SIGTERM back from Lightning, whose handler starts a collective in the middle of another."""
        if self._wakeup is not None:
            signal.signal(signal.SIGTERM, _leave)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self._several:
            return
        try:
            if error is None:
                self._wait_for_all()
            else:
                self._end_all(error)
        finally:
            self._take_over()
            self._end_watch()
            _children[:] = self._started
            os.environ.pop(_PARENT, None)

    def _wait_for_all(self) -> None:
        """Until all are here, the end of one is the end of all."""
        try:
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
        except BaseException as error:
            self._end_all(error)
            raise

    def _end_all(self, error: BaseException) -> None:
        """End those that this process started, those that answer nothing by SIGKILL.

        Raises:
            RuntimeError: the error is the echo of another process's end.
        """
        self._take_over()
        try:
            lost = self._behind(error)
            if (lost or isinstance(error, (SystemExit, KeyboardInterrupt))) and hasattr(signal, "setitimer"):
                atexit.register(_leave_in_time)
            self._tell(signal.SIGTERM)
            self._wait(_LEAVE)
        finally:  # at once where another signal came meanwhile
            self._tell(signal.SIGKILL)
        if lost is not None:
            raise RuntimeError(f"{lost}: {self._how_to_go_on()}") from error

    def _end_watch(self) -> None:
        self._stop.set()
        self._thread.join()
        if self._wakeup is not None:
            reading, writing, before = self._wakeup
            if self._handler is not None:  # which Python did not set
                signal.signal(signal.SIGTERM, self._handler)
            signal.set_wakeup_fd(before)
            os.close(reading)
            os.close(writing)

    def _behind(self, error: BaseException) -> str | None:
        """What became of another process of the run, where an error of this one is the echo of that."""
        says_so = isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in _GONE)
        if not says_so or isinstance(error, OSError):  # of a file or a connection of the user's
            return None
        deadline = time.monotonic() + 1  # the end of a connection is heard of before the end of a process
        while (lost := self._who_is_lost()) is None and time.monotonic() < deadline:
            time.sleep(_PAUSE)
        return lost or "another process of this run ended, or cannot be reached"

    def _who_is_lost(self) -> str | None:
        self._take_over()
        for process in self._started:
            if process.poll():
                return f"another process of this run ended {_how(process.returncode)}"
        if self._parent is not None and os.getppid() != self._parent:
            return "the first process of this run ended"
        return None

    def _take_over(self) -> None:
        """Take those that Lightning started from it: it would end this process by SIGKILL, without a word."""
        started = getattr(self._trainer.strategy.launcher, "procs", None)
        if started and isinstance(started[0], Popen):
            self._started = [*started]
            started.clear()

    def _tell(self, signum: int) -> None:
        for process in self._started:
            with contextlib.suppress(OSError):
                process.send_signal(signum)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for process in self._started:
            with contextlib.suppress(TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))

    def _watch(self) -> None:
        deadline, reason, code = float("inf"), "", 1
        while not self._stop.wait(_PAUSE):
            if not reason and (signum := self._signalled()) is not None:
                self._take_over()
                self._tell(signum)
                deadline, reason, code = time.monotonic() + _PATIENCE, "this run was told to end", 128 + signum
            if not reason and (lost := self._who_is_lost()) is not None:
                deadline, reason = time.monotonic() + _PATIENCE, lost
            if time.monotonic() > deadline:
                self._tell(signal.SIGKILL)
                # The main thread waits in a collective for what will not come, and cannot be woken.
                print(f"ecanet: {reason}: {self._how_to_go_on()}", file=sys.stderr, flush=True)
                os._exit(code)

    def _signalled(self) -> int | None:
        if self._wakeup is None:
            return None
        try:
            seen = os.read(self._wakeup[0], 4096)
        except BlockingIOError:
            return None
        return next((signum for signum in _SIGNALS if signum in seen), None)


def _how(status: int) -> str:
    """A process ended, as :attr:`Popen.returncode` says it."""
    if status > 0:
        return f"with exit status {status} (what it said stands above)"
    names = {each.value: each.name for each in signal.Signals}  # which those for real time lack
    return f"by {names.get(-status, f'signal {-status}')}"


def _leave_in_time() -> None:
    """Have the system end this process: at its end, a collective that was begun is waited for."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, _EXIT)


def _leave(signum: int, frame: FrameType | None) -> Any:
    raise SystemExit(128 + signum)
