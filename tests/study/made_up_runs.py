"""Training functions of milliseconds, for tests of studies: worker processes import this file."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any


def accuracy(condition: float, seed: int) -> float:
    """Decided by condition and seed."""
    return 90 + condition + random.Random(f"{condition} {seed}").gauss(0, 0.3)


def train(condition: float, seed: int, folder: Path) -> dict[str, Any]:
    """An accuracy that condition and seed decide; counts its calls in the folder."""
    with (folder / "calls").open("a") as calls:
        calls.write(".")
    return {"acc": accuracy(condition, seed), "loss": 0.5, "curve": [1, 2.5]}


def one_number(condition: float, seed: int, folder: Path) -> dict[str, Any]:
    """A single metric, and something else."""
    return {"acc": train(condition, seed, folder)["acc"], "curve": [1]}


def no_number(condition: float, seed: int, folder: Path) -> dict[str, Any]:
    """Nothing that can be compared."""
    return {"curve": [1]}


def seconds_of_its_own(condition: float, seed: int, folder: Path) -> dict[str, Any]:
    """A metric with the name of a column."""
    return {"seconds": 3.5}


def train_slowly(condition: float, seed: int, folder: Path) -> dict[str, Any]:
    """Takes a twentieth of a second."""
    time.sleep(0.05)
    return train(condition, seed, folder)


def train_and_be_killed_once(condition: float, seed: int, folder: Path) -> dict[str, Any]:
    """As ``train_slowly``, by a process that is killed in the first try of the fifth seed."""
    if seed == 5 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return train_slowly(condition, seed, folder)


def of_the_folder_alone(folder: Path) -> dict[str, Any]:
    """As a job calls it."""
    return {"acc": 1.0}


def on_a_cluster(condition: float, seed: int, folder: Path) -> dict[str, Any]:
    """The first runs of seed 0 wait for one another; then ECA's process is killed once. Seed 1 of ECA fails."""
    if seed == 1 and condition:
        raise ValueError("no such layer")
    (folder / "here").touch()
    others = list(folder.parent.glob(f"*-seed{seed}/here"))
    until = time.monotonic() + 30
    while seed == 0 and len(others) < 2 and time.monotonic() < until:
        time.sleep(0.05)
        others = list(folder.parent.glob(f"*-seed{seed}/here"))
    if seed == 0 and condition and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"acc": accuracy(condition, seed), "process": str(os.getpid()), "met": len(others) == 2}


def die_always(condition: str, seed: int, folder: Path) -> dict[str, Any]:
    """The process ends in every try of seed 1; it leaves a child behind that holds all its pipes open."""
    with (folder / "calls").open("a") as calls:
        calls.write(".")
    if seed == 1:
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        os._exit(3)
    return {"acc": 1.0 if condition == "none" else 2.0 + seed}


def fail(condition: str, seed: int, folder: Path) -> Any:
    """Seed 0 works; the others are what ``FAILURES`` says."""
    with (folder / "calls").open("a") as calls:
        calls.write(".")
    if condition == "none" or seed == 0:
        return {"acc": 1.0 + seed}
    if seed == 1:
        raise ValueError("no such\nlayer")
    return [
        {"acc": math.nan},
        {"acc": math.inf},
        {"loss": 1.0},
        None,
        {"acc": 1.0, "model": Fraction(1, 3)},
        {3: 1.0},
        {"acc": True},
        {"acc": -(2**500)},
    ][seed - 2]


FAILURES = {
    1: "ValueError: no such layer",
    2: "its acc is nan",
    3: "its acc is inf",
    4: "it returned no 'acc', only loss",
    5: "TypeError: the training function must return a dict of metrics, got None",
    6: "TypeError: model must be a number, or something that JSON can hold, got a Fraction",
    7: "TypeError: names of metrics must be texts, got 3",
    8: "it returned no 'acc', only no numbers",
    9: "its acc is -3.27339e+150",
}


def numbers(condition: str, seed: int, folder: Path) -> dict[str, Any]:
    """Numbers of every kind, and another working folder."""
    import numpy as np

    os.chdir("/")

    return {"acc": np.float32(0.5), "int": np.int64(3), "array": np.array(2.0), "history": [{"loss": 1.5}], "ok": True}


def run_a_child(condition: str, seed: int, folder: Path) -> dict[str, Any]:
    """A training function may start processes of its own."""
    from multiprocessing import get_context

    with get_context("fork").Pool(1) as pool:
        value = pool.apply(abs, (-4,))
    return {"acc": value + float(subprocess.check_output([sys.executable, "-c", "print(1)"]))}
