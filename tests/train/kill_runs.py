"""Kills training on two processes at random moments, and goes on with it on one, two and three.

    python -m tests.train.kill_runs --kills 40

Each time the other process has to end within seconds. On two processes the run has to go on to the very bits of one
that nobody killed; on another number of them it has to be refused, and the folder left as it was.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ecanet.train.checkpoint import read_checkpoint
from tests.fresh import FreshProcess

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EPOCHS, IMAGES = 4, 37
#: So many checkpoints a run writes, about: one every two of its 56 steps, and one more each epoch.
SAVES = 30
GOES_ON = re.compile(r"with the same command and --resume|run the same command again")
_BAR = re.compile(r"(Epoch|Training|Validation)[^|]*\|[^|]*\|[^\]]*\]|\x1b\[A")
#: Seconds in which all processes must have ended after one was killed.
BOUND = 10.0


def make_pictures(root: Path) -> None:
    """A folder of small pictures of three classes."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for label, name in enumerate(("bag", "boot", "coat")):
            (root / split / name).mkdir(parents=True)
            for i in range(IMAGES):
                noise = torch.randint(0, 60, (3, 12, 12), generator=generator)
                noise[label] += 120
                picture = Image.fromarray(noise.to(torch.uint8).permute(1, 2, 0).numpy())
                picture.save(root / split / name / f"{i:02}.png")


def command(root: Path, out: Path, processes: int, *more: str) -> list[str]:
    """``ecanet fit`` on so many processes of a CPU."""
    words = ["-m", "ecanet.cli", "fit", "--out", str(out), "--data.source", "image_folder"]
    words += ["--data.root", str(root), "--data.batch_size", "4", "--data.image_size", "12", "--data.resize", "12"]
    words += ["--model.options", '{"widths": [8, 16]}', "--optim.epochs", str(EPOCHS), "--optim.mixup", "0.2"]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", str(processes), "--trainer.checkpoint_steps", "2"]
    return [*words, *more]


def start(words: Sequence[str], fork_the_second: bool = False) -> FreshProcess:
    """Start what ``python`` is told by these words in a session of its own.

    The second process is a new interpreter, which Lightning starts, or a fork, where thousands of modules need not be
    imported again.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    code = f"from tests.train.launching import as_python_does; as_python_does({fork_the_second})"
    return FreshProcess(code, *words, environment=environment)


def _processes() -> Iterator[tuple[int, str, int, int]]:
    """Number, state, parent and session of every process, as /proc has them."""
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, parent, _, session = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[:4]
            yield int(name), state, int(parent), int(session)


def processes_of(session: int) -> list[int]:
    """The living processes of a session: there, and not only with their exit status."""
    return [process for process, state, _, its_session in _processes() if its_session == session and state not in "ZX"]


def second_of(first: int) -> int | None:
    """The second process of a run, once its first has started it."""
    for child, _, parent, _ in _processes():
        with contextlib.suppress(OSError):
            if parent == first and (  # not a helper of an import
                b"LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                or Path(f"/proc/{child}/comm").read_text() == "second\n"
            ):
                return child
    return None


@dataclass
class Killed:
    """What became of a run after a signal.

    Attributes:
        seconds: Until its last process ended.
        output: All that its processes said.
        code: Exit status of the first.
    """

    seconds: float
    output: str
    code: int


def kill(run: FreshProcess, rank: int, signum: int) -> Killed:
    """Send a signal to one process of a run and wait for the end of all."""
    while run.returncode is None and (victim := run.pid if rank == 0 else second_of(run.pid)) is None:
        time.sleep(0.05)  # it is about to be started
    if run.returncode is None and victim is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signum)
    return end_of(run)


def end_of(run: FreshProcess) -> Killed:
    """Wait for the end of all processes of a run; kill them where they do not end."""
    begun = time.monotonic()
    while (left := processes_of(run.pid)) and time.monotonic() < begun + 3 * BOUND:
        time.sleep(0.05)
    seconds = time.monotonic() - begun
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return Killed(seconds, said(run), run.returncode)


def said(run: FreshProcess) -> str:
    """What a run said beside its progress."""
    pieces = re.split(r"[\r\n]+", "\n".join(run.communicate(timeout=300)))
    return "\n".join(shown for piece in pieces if (shown := _BAR.sub("", piece).strip()))


def go_on(root: Path, out: Path, processes: int, fork_the_second: bool = False) -> tuple[int, str]:
    """Exit status and output of the run that goes on."""
    run = start(command(root, out, processes, "--resume"), fork_the_second)
    output = said(run)
    return run.returncode, output


def wait_for(file: Path, run: FreshProcess) -> None:
    """Wait until a run has written a file, or ended."""
    while not file.exists() and run.returncode is None:
        time.sleep(0.01)


def wait_for_saves(file: Path, run: FreshProcess, number: int) -> None:
    """Wait until a run has written a checkpoint so many times, or ended."""
    seen = set()
    while len(seen) < number and run.returncode is None:
        with contextlib.suppress(FileNotFoundError):
            seen.add(file.stat().st_mtime_ns)
        time.sleep(0.003)


def progress(out: Path) -> tuple[int, bool]:
    """Steps that the last checkpoint of a run has done, and whether that is all."""
    if not (out / "last.ckpt").exists():
        return 0, False
    checkpoint = read_checkpoint(out / "last.ckpt")
    return checkpoint["global_step"], len(checkpoint["ecanet"]["history"]) == EPOCHS


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Those at the end of a run."""
    checkpoint = read_checkpoint(out / "last.ckpt")
    assert len(checkpoint["ecanet"]["history"]) == EPOCHS
    return checkpoint["state_dict"]


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two networks are the same."""
    return a.keys() == b.keys() and all(torch.equal(t, b[key]) for key, t in a.items())


def problems_after(
    root: Path,
    out: Path,
    whole: dict[str, torch.Tensor],
    others: Sequence[int] = (1, 3),
    fork_the_second: bool = False,
) -> list[str]:
    """What is wrong with a killed run when it goes on: on other numbers of processes first, on two last."""
    problems = []
    last = out / "last.ckpt"
    if last.exists() and not progress(out)[1]:
        before = last.read_bytes()
        for processes in others:
            code, output = go_on(root, out, processes)
            if code == 0 or "it was started on 2 processes" not in output or last.read_bytes() != before:
                problems.append(f"on {processes} processes it was not refused: {output[-2000:]}")
    code, output = go_on(root, out, 2, fork_the_second)
    if code != 0:
        problems.append(f"on 2 processes it failed: {output[-2000:]}")
    elif not same_bits(weights(out), whole):
        problems.append("on 2 processes it went on to other bits")
    return problems


def main() -> None:
    """Kill and report; exit status 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance, failed = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "pictures"
        make_pictures(root)
        run, begun = start(command(root, Path(folder) / "whole", 2)), time.monotonic()
        wait_for(Path(folder) / "whole" / "recipe.json", run)
        starting = time.monotonic() - begun
        print(said(run), flush=True)
        whole = weights(Path(folder) / "whole")
        for i in range(args.kills):
            signum, rank, out = chance.choice(SIGNALS), chance.randrange(2), Path(folder) / f"run{i}"
            run = start(command(root, out, 2))
            if chance.random() < 0.2:
                time.sleep(chance.uniform(0.2, 1.5) * starting)
            else:  # not by the clock: on a machine with other work, most of the time goes into starting
                wait_for_saves(out / "last.ckpt", run, chance.randrange(1, SAVES))
                time.sleep(chance.uniform(0, 0.05))
            killed = kill(run, rank, signum)
            problems = [f"still there after {killed.seconds:.0f} s"] if killed.seconds > BOUND else []
            steps, is_done = progress(out)
            if (out / "recipe.json").exists() and not is_done and not GOES_ON.search(killed.output):
                problems.append(f"nobody said how to go on: {killed.output[-2000:]}")
            problems += problems_after(root, out, whole)
            failed += bool(problems)
            what = f"{signal.Signals(signum).name} to process {rank} at step {steps}"
            print(f"{i + 1:3} {what}, ended in {killed.seconds:.1f} s:", "; ".join(problems) or "ok", flush=True)
            shutil.rmtree(out, ignore_errors=True)
    print(f"{args.kills - failed} of {args.kills} went well")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
