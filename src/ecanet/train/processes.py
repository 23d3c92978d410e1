"""Ends all processes of a run together: if one died, the others would wait for it in a collective forever.

Lightning starts the processes. They communicate by collectives of gloo (CPU) or NCCL (GPU). While the main thread waits
in a collective, it handles no signals and, with NCCL, does not notice that a process died. A second thread does.
"""

import atexit
import contextlib
import gc
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
from lightning.fabric.utilities import distributed as connections
from lightning.pytorch.callbacks import Callback

#: Environment variable with the parent's id, since the parent may have ended before this process can ask.
_PARENT = "ECANET_PARENT_PROCESS"
#: Seconds between two checks; seconds that the main thread has to end by itself after a signal or a lost process.
_PAUSE, _PATIENCE = 0.1, 3.0
#: Seconds that child processes have to end after a signal.
_GRACE = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Parts of gloo's and NCCL's messages if the other end of a connection is gone.
_GONE = ("closed by peer", "reset by peer", "Broken pipe", "NCCL communicator was aborted", "remote process exited")

#: The children and the parent of this process, kept for the next run, for which Lightning starts no new ones.
_children: list[Popen[bytes]] = []
_parent: int | None = None

if hasattr(os, "register_at_fork"):  # a signal to a loading process must not reach this one
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


class EndTogether(Callback):
    """Inside the context, all processes of a run end within seconds after one of them ends.

    If this process gets SIGTERM or SIGINT, it passes the signal on to its children. If a child or the parent ends too
    early, this process ends: by an exception in its main thread, or immediately if that thread waits in a collective.

    Args:
        trainer: The run's trainer; with a single process nothing is done.
        how_to_go_on: Returns the end of the error message: how to go on with the run.
    """

    def __init__(self, trainer: L.Trainer, how_to_go_on: Callable[[], str]) -> None:
        self._trainer, self._how_to_go_on = trainer, how_to_go_on
        self._has_several = trainer.world_size > 1
        self._children_of_run = [process for process in _children if process.poll() is None]
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._wakeup: tuple[int, int, int] | None = None
        self._signal: signal.Signals | None = None
        self._handler: Any = None
        environment = getattr(trainer.strategy, "cluster_environment", None)
        launched = isinstance(environment, LightningEnvironment) and environment.creates_processes_externally
        global _parent
        if launched and _PARENT in os.environ:
            _parent = int(os.environ[_PARENT])
        self._parent = _parent if launched else None

    def __enter__(self) -> "EndTogether":
        if not self._has_several:
            return self
        if (lost := self._lost_process()) is not None:
            raise RuntimeError(f"{lost}: {self._how_to_go_on()}")
        os.environ[_PARENT] = str(os.getpid())
        if os.name == "posix" and threading.current_thread() is threading.main_thread():
            # By default SIGTERM would end this process but not the children that it is about to start.
            self._handler = signal.signal(signal.SIGTERM, _raise_exit)
            reading, writing = os.pipe()
            for end in (reading, writing):
                os.set_blocking(end, False)
            self._wakeup = reading, writing, signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="end-together")
        self._thread.start()
        return self

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace Lightning's handler of SIGTERM, which starts a collective in the middle of another one."""
        if self._wakeup is not None:
            signal.signal(signal.SIGTERM, _raise_exit)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self._has_several:
            return
        try:
            if error is None:
                self._wait_for_all()
            else:
                self._end_all(error)
        finally:
            self._take_children()
            self._stop_watching()
            _children[:] = self._children_of_run
            os.environ.pop(_PARENT, None)

    def _wait_for_all(self) -> None:
        """Wait until all processes are done; if one ends with an error meanwhile, end all."""
        try:
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
        except BaseException as error:
            self._end_all(error)
            raise

    def _end_all(self, error: BaseException) -> None:
        """End the child processes, by SIGKILL if they do not react.

        Raises:
            KeyboardInterrupt: this process got SIGINT, whatever the error was.
            SystemExit: it got SIGTERM, whatever the error was.
            RuntimeError: the error was caused by the end of another process.
        """
        if self._parent is not None and self._wakeup is not None:
            for signum in _SIGNALS:  # it is ending already, and the first process passes on the terminal's signals
                signal.signal(signum, signal.SIG_IGN)
            self._handler = None
        self._take_children()
        try:
            received = self._received_signal()
            lost = None if received else self._cause_of(error)
            if received or lost or isinstance(error, (SystemExit, KeyboardInterrupt)):
                _speed_up_exit()
            self._send_to_children(signal.SIGTERM)
            self._wait_for_children(_GRACE)
        finally:  # at once if another signal interrupts the wait
            self._send_to_children(signal.SIGKILL)
        if received == signal.SIGINT:
            raise KeyboardInterrupt from error
        if received == signal.SIGTERM:
            raise SystemExit(128 + received) from error
        if lost is not None:
            raise RuntimeError(f"{lost}: {self._how_to_go_on()}") from error

    def _stop_watching(self) -> None:
        self._stop.set()
        self._thread.join()
        if self._wakeup is not None:
            reading, writing, before = self._wakeup
            if self._handler is not None:  # None: the handler was not set by Python, or this process ends
                signal.signal(signal.SIGTERM, self._handler)
            signal.set_wakeup_fd(before)
            os.close(reading)
            os.close(writing)

    def _cause_of(self, error: BaseException) -> str | None:
        """How another process of the run ended, if that caused an error of this one; otherwise None."""
        is_lost = isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in _GONE)
        if not is_lost or isinstance(error, OSError):  # an OSError is about the user's files or connections
            return None
        deadline = time.monotonic() + 1  # a connection ends before its process does
        while (lost := self._lost_process()) is None and time.monotonic() < deadline:
            time.sleep(_PAUSE)
        return lost or "another process of this run ended, or cannot be reached"

    def _lost_process(self) -> str | None:
        self._take_children()
        for process in self._children_of_run:
            if process.poll():
                return f"another process of this run ended {_how_it_ended(process.returncode)}"
        if self._parent is not None and os.getppid() != self._parent:
            return "the first process of this run ended"
        return None

    def _take_children(self) -> None:
        """Take over the child processes from Lightning, which would end this process by SIGKILL without a message."""
        started = getattr(self._trainer.strategy.launcher, "procs", None)
        with self._lock:  # both threads come here, while Lightning may still start the next one
            while started and isinstance(started[0], Popen):
                self._children_of_run.append(started.pop(0))

    def _send_to_children(self, signum: int) -> None:
        for process in self._children_of_run:
            with contextlib.suppress(OSError):
                process.send_signal(signum)

    def _wait_for_children(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for process in self._children_of_run:
            with contextlib.suppress(TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))

    def _watch(self) -> None:
        deadline, reason, code = float("inf"), "", 1
        while not self._stop.wait(_PAUSE):
            if not reason and (signum := self._received_signal()) is not None:
                self._take_children()
                self._send_to_children(signum)
                deadline, reason, code = time.monotonic() + _PATIENCE, "this run got a signal to end", 128 + signum
            if not reason and (lost := self._lost_process()) is not None:
                deadline, reason = time.monotonic() + _PATIENCE, lost
            if time.monotonic() > deadline:
                self._send_to_children(signal.SIGKILL)
                # The main thread waits in a collective that never ends and cannot be interrupted.
                print(f"ecanet: {reason}: {self._how_to_go_on()}", file=sys.stderr, flush=True)
                os._exit(code)

    def _received_signal(self) -> signal.Signals | None:
        """SIGTERM or SIGINT if this process got it, otherwise None."""
        with self._lock:
            if self._signal is None and self._wakeup is not None:
                with contextlib.suppress(BlockingIOError):
                    received = os.read(self._wakeup[0], 4096)
                    self._signal = next((signum for signum in _SIGNALS if signum in received), None)
            return self._signal


def _how_it_ended(status: int) -> str:
    """How a process ended, from its :attr:`subprocess.Popen.returncode`."""
    if status > 0:
        return f"with exit status {status} (its own message is above)"
    names = {known.value: known.name for known in signal.Signals}  # real-time signals have no name
    return f"by {names.get(-status, f'signal {-status}')}"


def _speed_up_exit() -> None:
    """Let Python exit without steps that take long or forever, so that the exit status is that of this process."""
    if (destroy := getattr(connections, "_destroy_dist_connection", None)) is not None:
        atexit.unregister(destroy)  # Lightning's, for NCCL, which would wait for collectives that have started
    atexit.register(gc.freeze)  # otherwise Python collects garbage in all of torch, for seconds on a busy machine


def _raise_exit(signum: int, frame: FrameType | None) -> Any:
    raise SystemExit(128 + signum)
