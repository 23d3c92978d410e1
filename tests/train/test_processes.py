"""Runs of two processes: they end together, say how to go on, and go on exactly or not at all.

``python -m tests.train.kill_runs`` kills many at random moments.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ecanet.cli import main
from ecanet.train import load_trained, validate
from ecanet.train.processes import EndTogether
from tests.train import kill_runs
from tests.train.kill_runs import BOUND, GOES_ON

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="looks for processes as Linux shows them, which meet over gloo",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures") / "root"
    kill_runs.make_pictures(root)
    return root


@pytest.fixture(scope="module")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two processes that nobody killed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run = kill_runs.start(kill_runs.command(pictures, out, 2), fork_the_second=True)
    said = kill_runs.said(run)
    assert run.returncode == 0, said
    return out


@pytest.fixture(scope="module")
def whole(finished: Path) -> dict[str, torch.Tensor]:
    """Its weights."""
    return kill_runs.weights(finished)


def test_two_processes_count_every_validation_image_once(finished: Path) -> None:
    metrics = validate(finished / "last.ckpt", accelerator="cpu").metrics
    history = load_trained(finished / "last.ckpt").history
    assert metrics["val/loss"] > 0
    assert history[-1]["val/top1"] == pytest.approx(metrics["val/top1"])
    assert history[-1]["val/loss"] == pytest.approx(metrics["val/loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("rank", "signum", "second_answers"),
    [(1, signal.SIGKILL, True), (0, signal.SIGTERM, False)],
    ids=["KILL to the second", "TERM to the first, and the second answers nothing"],
)
def test_a_killed_run_ends_and_goes_on_to_the_same_bits_or_not_at_all(
    rank, signum, second_answers, pictures, whole, tmp_path
) -> None:
    out = tmp_path / "out"
    run = kill_runs.start(kill_runs.command(pictures, out, 2), fork_the_second=True)
    kill_runs.wait_for(out / "last.ckpt", run)
    if not second_answers:
        second = kill_runs.second_of(run.pid)
        assert second is not None
        os.kill(second, signal.SIGSTOP)
        time.sleep(0.5)  # until the first waits for it in a collective
    killed = kill_runs.kill(run, rank, signum)
    assert killed.seconds < BOUND
    assert killed.code != 0
    assert GOES_ON.search(killed.output), killed.output
    assert not kill_runs.progress(out)[1]
    before = (out / "last.ckpt").read_bytes()
    with pytest.raises(SystemExit) as refused:  # without a word on the recipe: it is in the folder
        main(["fit", "--out", str(out), "--resume", "--trainer.devices", "1"])
    assert "on 1 process: it was started on 2 processes of 4 images per step" in str(refused.value)
    assert "--trainer.devices" in str(refused.value)
    assert (out / "last.ckpt").read_bytes() == before
    assert kill_runs.problems_after(pictures, out, whole, others=(), fork_the_second=True) == []


def test_a_run_told_to_end_while_its_second_process_starts_ends(pictures, tmp_path) -> None:
    run = kill_runs.start(kill_runs.command(pictures, tmp_path / "out", 2), fork_the_second=True)
    while kill_runs.second_of(run.pid) is None:
        time.sleep(0.02)
    killed = kill_runs.kill(run, 0, signal.SIGTERM)
    assert killed.seconds < BOUND
    assert killed.code == 128 + signal.SIGTERM
    assert GOES_ON.search(killed.output), killed.output


FAULTY = """
import os, pathlib, sys, time
from ecanet.cli import main
from ecanet.train.classifier import Classifier
from ecanet.train.data import loading
from torch.utils.data import Subset

rank, here = int(os.environ.get("LOCAL_RANK", 0)), pathlib.Path(__file__).parent
step, read = Classifier.training_step, loading.read_splits

def at_step_5(act):
    def training_step(self, *args):
        if self.trainer.global_step == 5:
            act()
        return step(self, *args)
    Classifier.training_step = training_step

def fail():
    raise ValueError("of the second alone")

def one_fewer(*args):
    splits = read(*args)
    return splits._replace(train=Subset(splits.train, range(100)))

def rest(*_):
    (here / "rests").touch()
    time.sleep(600)

{fault}
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("fault", "signals", "code", "says"),
    [
        (
            "if rank == 1: at_step_5(fail)",
            [],
            1,
            r"ecanet fit, process 1: ValueError: of the second alone\n[^$]*status 1 ",
        ),
        (
            "if rank == 1: loading.read_splits = one_fewer",
            [],
            1,
            "ecanet fit, process 1: ValueError: process 1 has training",
        ),
        (
            "if rank == 1: loading.read_splits = rest",
            [(0, signal.SIGKILL)],
            -signal.SIGKILL,
            "the first process of this run ended",
        ),
        ("if rank == 0: at_step_5(rest)", [(1, signal.SIGSTOP), *[(0, signal.SIGTERM)] * 2], 143, "last save"),
        ("if rank == 1: at_step_5(rest)", [(1, 40)], 1, "another process of this run ended by signal 40: "),
        ("if rank == 1: at_step_5(rest)", [(None, signal.SIGINT)], 130, "^Interrupted: [^\n]*--resume\\.$"),
        ("if rank == 0: at_step_5(rest)", [(None, signal.SIGINT)], 130, "^Interrupted: [^\n]*--resume\\.$"),
        ("if rank == 0: at_step_5(rest)", [(0, signal.SIGTERM)], 143, "^Interrupted: [^\n]*--resume\\.$"),
    ],
    ids=[
        "an error of the second",
        "other pictures of the second",
        "KILL while the second reads pictures",
        "TERM twice",
        "a signal without a name",
        "Ctrl-C while the first waits for the second",
        "Ctrl-C while the second waits for the first",
        "TERM to the first while it does something else",
    ],
)
def test_nothing_stays_of_a_run_and_it_says_what_was_wrong(fault, signals, code, says, pictures, tmp_path) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.replace("{fault}", fault))
    words = kill_runs.command(pictures, tmp_path / "out", 2)
    run = kill_runs.start([str(script), *words[2:]], fork_the_second=True)
    kill_runs.wait_for(tmp_path / ("rests" if signals else "out/last.ckpt"), run)
    processes = {0: run.pid, 1: kill_runs.second_of(run.pid)}
    for rank, signum in signals:
        time.sleep(0.5)  # until the first has heard the one before and waits for the second
        os.killpg(run.pid, signum) if rank is None else os.kill(processes[rank], signum)
    end = kill_runs.end_of(run)
    assert end.seconds < BOUND
    assert end.code == code, end.output
    assert re.search(says, end.output), end.output
    assert GOES_ON.search(end.output), end.output


def test_one_script_may_run_twice(image_folder: Path, tmp_path: Path) -> None:
    """Lightning starts the other process once; both processes meet in both runs, and end as the script ends."""
    script = f"""
import sys
from ecanet.train import DataConfig, ModelConfig, OptimConfig, Recipe, TrainerConfig, fit
recipe = Recipe(
    ModelConfig("small_eca_resnet", options={{"widths": [4, 8], "blocks": 1}}),
    DataConfig("image_folder", root={str(image_folder)!r}, image_size=12, resize=12, batch_size=30),
    OptimConfig(epochs=1),
    TrainerConfig(accelerator="cpu", devices=2, strategy="ddp"),
)
for name in "ab":
    fit(recipe, {str(tmp_path)!r} + "/" + name, progress=False)
print("done")
"""
    path = tmp_path / "twice.py"
    path.write_text(script)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.count("done")) == (0, 2), done.stderr[-2000:]
    assert all((tmp_path / name / "last.ckpt").exists() for name in "ab")


def test_every_process_that_was_started_is_known_even_if_somebody_looks_between_two_starts() -> None:
    """Lightning starts them one by one, while another thread already looks after the first ones."""
    started: list[subprocess.Popen[bytes]] = []
    launcher, environment = SimpleNamespace(procs=started), SimpleNamespace(creates_processes_externally=False)
    strategy = SimpleNamespace(launcher=launcher, cluster_environment=environment)
    together = EndTogether(SimpleNamespace(world_size=4, strategy=strategy), lambda: "")  # type: ignore[arg-type]
    ends = [subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"]) for code in (3, 0, 0)]
    for process in ends:
        process.wait(60)
        started.append(process)
        lost = together._lost_process()
        assert lost is not None
        assert "exit status 3" in lost
    assert started == []
