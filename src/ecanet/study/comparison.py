"""Paired comparison of recipes over seeds. Each finished run is a file, so a killed comparison loses none."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import queue
import re
import signal
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import ecanet
from ecanet.ops.build import available_cores
from ecanet.study.run_files import read_run, write_run
from ecanet.study.statistics import Difference, Summary, paired_difference, summarise
from ecanet.train.config import Recipe, to_plain
from ecanet.train.fit import fit


@dataclass
class Run:
    """One finished training run.

    Attributes:
        entry: Name of its recipe in the comparison.
        seed: Its seed.
        top1: Validation top-1 after the last epoch, in per cent.
        history: One record for each epoch: ``val/top1``, ``train/loss``, ``seconds``, ...
        folder: Folder of its checkpoints and logs.
    """

    entry: str
    seed: int
    top1: float
    history: list[dict[str, float]]
    folder: Path


@dataclass
class Comparison:
    """Every run of every entry, in the order given.

    Attributes:
        runs: Runs by entry, one for each seed.
    """

    runs: dict[str, list[Run]]

    @property
    def baseline(self) -> str:
        """The first entry, with which the others are compared."""
        return next(iter(self.runs))

    def top1(self, entry: str) -> list[float]:
        """Top-1 of each seed, in per cent."""
        return [run.top1 for run in self.runs[entry]]

    def mean(self, entry: str) -> float:
        """Mean top-1 over the seeds, in per cent."""
        return statistics.fmean(self.top1(entry))

    def spread(self, entry: str) -> float | None:
        """Sample standard deviation of top-1 over the seeds, in percentage points; None with one seed."""
        values = self.top1(entry)
        return statistics.stdev(values) if len(values) > 1 else None

    def difference(self, entry: str) -> Difference:
        """The entry minus the baseline, paired by seed."""
        pairs = zip(self.top1(entry), self.top1(self.baseline), strict=True)
        return paired_difference([a - b for a, b in pairs])

    @property
    def summary(self) -> Summary:
        """Differences, intervals and tests of all entries."""
        return summarise({entry: {run.seed: run.top1 for run in runs} for entry, runs in self.runs.items()}, "top1")


def compare(
    entries: Mapping[str, Recipe],
    seeds: Sequence[int],
    out: str | Path,
    workers: int | None = None,
    progress: bool = True,
) -> Comparison:
    """Train every recipe with every seed; the same seed means the same backbone weights and order of images.

    A finished run is a file ``out/runs/ENTRY-seedK.json``, with its checkpoints and logs in the folder
    ``out/runs/ENTRY-seedK``. A second call reads finished runs and does not repeat them. An interrupted run goes on
    from its last checkpoint; a run by another recipe is refused. If a run goes on with other versions of torch or
    ecanet, it warns, and its file names all of them.

    Args:
        entries: Recipes by name, the baseline first, each for one device; their own seeds are not used.
        seeds: Seeds, at least one.
        out: Folder for the results.
        workers: Runs at a time, each in its own process with one thread. By default one for each core, or a single run
            at a time on a machine with a GPU.
        progress: Show a bar with the time left.

    Returns:
        All runs.

    Raises:
        ValueError: no entry, no or repeated seeds, names that give the same file, a recipe for several devices, or
            results in ``out`` that are damaged or by another recipe.
        Exception: the error of a run that failed; the finished ones are kept.
    """
    _check_entries_and_seeds(entries, seeds)
    folder = Path(out) / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    # Seed by seed, so that after an early stop the finished runs form pairs.
    jobs = [
        _Job(
            name,
            seed,
            replace(recipe, trainer=replace(recipe.trainer, seed=seed, devices=1)),
            folder / f"{_slug(name)}-seed{seed}",
        )
        for seed in seeds
        for name, recipe in entries.items()
    ]
    finished = {job.folder: run for job in jobs if (run := job.read()) is not None}
    todo = [job for job in jobs if job.folder not in finished]
    if todo:
        count = workers or (1 if torch.cuda.is_available() else available_cores())
        for run in _run_all(todo, min(count, len(todo)), progress):
            finished[run.folder] = run
    runs: dict[str, list[Run]] = {name: [] for name in entries}
    for job in jobs:
        runs[job.entry].append(finished[job.folder])
    return Comparison(runs)


def _check_entries_and_seeds(entries: Mapping[str, Recipe], seeds: Sequence[int]) -> None:
    if not entries:
        raise ValueError("entries must name at least one recipe, got none")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be one or more different integers, got {list(seeds)}")
    for name, recipe in entries.items():
        devices, nodes = recipe.trainer.devices, recipe.trainer.nodes
        if devices not in ("auto", 1) or nodes != 1:  # Lightning would start the whole comparison once more for each
            raise ValueError(
                f"entries[{name!r}] must train on one device, got trainer.devices={devices}, trainer.nodes={nodes}: "
                "several runs at a time keep the others busy, with workers"
            )
    slugs = [_slug(name) for name in entries]
    if len(set(slugs)) != len(slugs):
        raise ValueError(f"entries need names that differ in letters and digits, got {list(entries)}")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "entry"


@dataclass
class _Job:
    entry: str
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder.with_name(self.folder.name + ".json")

    @property
    def fingerprint(self) -> str:
        what_decides = {"recipe": to_plain(self.recipe), "torch": torch.__version__, "ecanet": ecanet.__version__}
        return hashlib.sha256(json.dumps(what_decides, sort_keys=True).encode()).hexdigest()[:16]

    def read(self) -> Run | None:
        if not self.file.exists():
            return None
        stored = read_run(self.file, self.recipe.optim.epochs)
        if stored["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{self.file} was made by another recipe or version: "
                f"choose another folder, or delete it with {self.folder}"
            )
        return Run(self.entry, self.seed, stored["top1"], stored["history"], self.folder)

    def run(self, on_epoch: Any) -> Run:
        result = fit(self.recipe, self.folder, resume=True, progress=False, on_epoch=on_epoch)
        finished = {
            "entry": self.entry,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "top1": result.top1,
            "history": result.history,
            "recipe": to_plain(self.recipe),
            "versions": result.versions,
        }
        write_run(self.file, finished)
        return Run(self.entry, self.seed, result.top1, result.history, self.folder)


_reports: Any = None


def _start_worker(reports: Any) -> None:
    global _reports
    _reports = reports
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # A parent that is killed cannot tell its workers, and they would go on training into the same folders.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_job(job: _Job) -> Run:
    return job.run(lambda record: _reports.put((job.entry, job.seed, record)))


def _run_all(jobs: Sequence[_Job], workers: int, progress: bool) -> Iterator[Run]:
    context = multiprocessing.get_context("spawn")  # fork is not safe once torch has started threads
    reports = context.Queue()
    epochs = sum(job.recipe.optim.epochs for job in jobs)
    with (
        _one_thread_per_process(),
        ProcessPoolExecutor(workers, context, _start_worker, (reports,)) as pool,
        tqdm(total=epochs, desc=f"{len(jobs)} runs", unit="epoch", disable=not progress) as bar,
    ):
        waiting: set[Future[Run]] = {pool.submit(_run_job, job) for job in jobs}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                with contextlib.suppress(queue.Empty):
                    while True:
                        entry, seed, record = reports.get_nowait()
                        bar.set_postfix_str(f"{entry}, seed {seed}: {record['val/top1']:.1f} %")
                        bar.update()
                for future in done:
                    yield future.result()
        except BaseException:
            # Kill them: a worker that is only asked to stop goes on with the next run. Checkpoints survive a kill.
            for process in list(pool._processes.values()):
                process.kill()
            bar.write(f"Stopped: finished runs are kept in {jobs[0].folder.parent}; the same call goes on from there.")
            raise


@contextlib.contextmanager
def _one_thread_per_process() -> Iterator[None]:
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
