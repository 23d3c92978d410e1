"""Runs of two processes of which none is a new interpreter: importing takes longer there than the run itself."""

import os
import pickle
import runpy
import signal
import subprocess
import sys
import types
import warnings

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies.launchers import subprocess_script


def as_python_does(fork_the_second: bool) -> None:
    """Run what ``python`` is told by the words in ``sys.argv``: a file or ``-m`` and a module, and their arguments."""
    words = (_prepare_a_fork() if fork_the_second else None) or sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in the background ignore
    warnings.simplefilter("ignore")
    what, *sys.argv[1:] = words
    if what == "-m":
        runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = what
        runpy.run_path(what, run_name="__main__")


def _prepare_a_fork() -> list[str] | None:
    """Fork, while nothing has run yet, a process that Lightning then starts as the second one.

    Returns:
        None in this process; what ``python`` would have been told in the fork, once it is started.
    """
    reading, writing = os.pipe()
    second = os.fork()
    if second == 0:
        os.close(writing)
        with open(reading, "rb") as pipe:
            told = pipe.read()
        if not told:  # the first has ended before it came to that
            os._exit(0)
        command, environment = pickle.loads(told)
        os.environ.clear()
        os.environ.update(environment)
        rank_zero_only.rank = int(environment["LOCAL_RANK"])  # Lightning reads it when it is imported
        with open("/proc/self/comm", "w") as name:
            name.write("second")
        return command[1:]
    os.close(reading)

    class StartTheFork(subprocess.Popen):
        def _execute_child(self, command, executable, preexec_fn, close_fds, pass_fds, cwd, environment, *_):
            self.pid, self._child_created = second, True
            with open(writing, "wb") as pipe:
                pickle.dump((command, environment), pipe)

    subprocess_script.subprocess = types.SimpleNamespace(**vars(subprocess) | {"Popen": StartTheFork})
    return None
