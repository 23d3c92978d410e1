"""Paired comparison of recipes over seeds. Each finished run is a file, so a killed comparison loses none."""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ecanet
from ecanet.inspect.paired import Difference, paired_difference
from ecanet.study.conclusions import notes_on_duplicates
from ecanet.study.conditions import digest
from ecanet.study.evidence import write_evidence
from ecanet.study.job import Job
from ecanet.study.paired_study import check_names, check_seeds, fingerprint, report, run_jobs
from ecanet.study.results import Study, slug
from ecanet.study.run_files import is_number
from ecanet.study.statistics import Summary, summarise
from ecanet.train.config import Recipe, to_plain
from ecanet.train.data.loading import ImageData, image_size_of
from ecanet.train.fit import fit
from ecanet.train.networks import build_network
from ecanet.untrusted import counted


@dataclass
class Run:
    """One finished training run.

    Attributes:
        condition: Name of its recipe in the comparison.
        seed: Its seed.
        top1: Validation top-1 after the last epoch, in per cent.
        history: One record for each epoch: ``val/top1``, ``train/loss``, ``seconds``, ...
        folder: Folder of its checkpoints and logs.
    """

    condition: str
    seed: int
    top1: float
    history: list[dict[str, float]]
    folder: Path


@dataclass
class Comparison:
    """Every run of every condition, in the order of the recipes.

    Attributes:
        runs: Runs by condition, one for each seed.
    """

    runs: dict[str, list[Run]]

    @property
    def baseline(self) -> str:
        """The first condition, with which the others are compared."""
        return next(iter(self.runs))

    def top1(self, condition: str) -> list[float]:
        """Top-1 of each seed, in per cent."""
        return [run.top1 for run in self.runs[condition]]

    def mean(self, condition: str) -> float:
        """Mean top-1 over the seeds, in per cent."""
        return statistics.fmean(self.top1(condition))

    def spread(self, condition: str) -> float | None:
        """Sample standard deviation of top-1 over the seeds, in percentage points; None with one seed."""
        values = self.top1(condition)
        return statistics.stdev(values) if len(values) > 1 else None

    def difference(self, condition: str) -> Difference:
        """The condition minus the baseline, paired by seed."""
        pairs = zip(self.top1(condition), self.top1(self.baseline), strict=True)
        return paired_difference([a - b for a, b in pairs])

    @property
    def summary(self) -> Summary:
        """Differences, intervals and tests of all conditions."""
        return summarise(
            {condition: {run.seed: run.top1 for run in runs} for condition, runs in self.runs.items()}, "top1"
        )


def compare(
    conditions: Mapping[str, Recipe],
    seeds: Sequence[int],
    out: str | Path,
    workers: int | None = None,
    progress: bool = True,
    on: str = "processes",
) -> Comparison:
    """Train every recipe with every seed; the same seed means the same backbone weights and order of images.

    The engine is that of :func:`ecanet.study.run`. A finished run is a file ``out/runs/CONDITION-seedK.json``, with its
    checkpoints and logs in the folder ``out/runs/CONDITION-seedK``. A second call reads finished runs and does not
    repeat them. An interrupted run goes on from its last checkpoint; a run of another recipe is refused. If a run goes
    on under another version of torch or ecanet, it warns, and its file lists every version it used.

    Args:
        conditions: Recipes by name, the baseline first, each for one device; the seeds in them are not used.
        seeds: Seeds, at least one.
        out: Folder for the results.
        workers: Runs at a time, each in its own process with one thread. By default one for each core, or a single run
            at a time on a machine with a GPU.
        progress: Print first what the seeds can show; then show how many runs are done, running and left, and the time
            left.
        on: As in :func:`ecanet.study.run`.

    Returns:
        All runs.

    Raises:
        ValueError: there is no condition, there are no seeds or repeated ones, two names give the same file, a recipe
            is for several devices, pictures or weights are missing, or a network cannot be built; or results in ``out``
            are damaged, of another recipe or of another study.
        RuntimeError: runs failed; the message says why. The other runs finished and are kept.
    """
    study = study_recipes(conditions, seeds, out, workers, progress, on)
    if study.failed:
        total = len(conditions) * len(seeds)
        raise RuntimeError(
            f"{len(study.failed)} of {counted(total, 'run')} failed, the others are kept in {Path(out) / 'runs'}: "
            + "; ".join(f"{run.condition}, seed {run.seed}: {run.reason}" for run in study.failed)
            + f". Delete {study.failed[0].file} and the like to run them again"
        )
    return Comparison(
        {
            name: [Run(name, run.seed, run.metrics["top1"], run.details["history"], run.folder) for run in runs]
            for name, runs in study.runs.items()
        }
    )


def study_recipes(
    conditions: Mapping[str, Recipe],
    seeds: Sequence[int],
    out: str | Path,
    workers: int | None = None,
    progress: bool = True,
    on: str = "processes",
) -> Study:
    """As :func:`compare`, but failed runs are listed in the result instead of raised.

    Raises:
        ValueError: as in :func:`compare`.
    """
    check_recipes(conditions, seeds)
    jobs = comparison_jobs(conditions, seeds, out)
    if any(job.read() is None for job in jobs):
        notes = check_parts(conditions)
        if progress:
            print("".join(f"{note}\n" for note in notes), file=sys.stderr, end="")
    settings = {name: to_plain(recipe) for name, recipe in conditions.items()}
    study = run_jobs(jobs, out, "top1", workers, progress, on, settings)
    if any(study.runs.values()):
        write_evidence(conditions, study, Path(out), progress)
    report(out, progress)
    return study


def seconds_of_an_epoch(recipe: Recipe) -> float:
    """Train one epoch as a study would, on one thread of a CPU, and return its time; nothing is written.

    Args:
        recipe: What to train; its number of epochs is not used.
    """
    once = replace(recipe, optim=replace(recipe.optim, epochs=1, warmup_epochs=0.0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return fit(once, None, progress=False).history[-1]["seconds"]
    finally:
        torch.set_num_threads(threads)


def check_recipes(conditions: Mapping[str, Recipe], seeds: Sequence[int]) -> None:
    """Raise ValueError if a comparison cannot start with these names, seeds and devices."""
    check_names(conditions)
    check_seeds(seeds)
    _check_devices(conditions)


def comparison_jobs(conditions: Mapping[str, Recipe], seeds: Sequence[int], out: str | Path) -> list[Job]:
    """The runs of a comparison.

    Args:
        conditions: Recipes by name.
        seeds: Seeds.
        out: Folder of the study.
    """
    folder = Path(out).absolute() / "runs"
    jobs = []
    # Seed by seed, so that after an early stop the finished runs form pairs.
    for seed in seeds:
        for name, recipe in conditions.items():
            recipe = replace(recipe, trainer=replace(recipe.trainer, seed=int(seed), devices=1))
            identity = {"recipe": to_plain(recipe), "torch": torch.__version__, "ecanet": ecanet.__version__}
            work = partial(_fit, recipe)
            jobs.append(Job(name, int(seed), folder / f"{slug(name)}-seed{seed}", work, fingerprint(identity), _check))
    return jobs


def _fit(recipe: Recipe, folder: Path) -> dict[str, Any]:
    # The study has verified the pictures already, once for all runs.
    verified = replace(recipe, data=replace(recipe.data, verify=False))
    result = fit(verified, folder, resume=True, progress=False)
    return {"top1": result.top1, "history": result.history, "recipe": to_plain(recipe), "versions": result.versions}


def check_parts(conditions: Mapping[str, Recipe]) -> list[str]:
    """Load the pictures and build the networks once, so that a mistake in a recipe stops the study before it starts.

    Args:
        conditions: Recipes by name.

    Returns:
        A sentence for each group of conditions that are the same under several names.

    Raises:
        ValueError: the pictures cannot be found or a network cannot be built; the message names the condition, unless
            the pictures are missing and all conditions share them.
    """
    classes: dict[str, int] = {}
    has_several_datasets = len({fingerprint(recipe.data) for recipe in conditions.values()}) > 1
    same: dict[tuple[str, str], list[str]] = {}
    for name, recipe in conditions.items():
        try:
            key = fingerprint(recipe.data)
            if key not in classes:
                classes[key] = _classes_of(recipe)
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"conditions[{name!r}]: {error}" if has_several_datasets else str(error)) from error
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                network = build_network(recipe.model, classes[key], image_size_of(recipe.data))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"conditions[{name!r}]: {error}") from error
        other_blocks = fingerprint([recipe.data, recipe.optim, replace(recipe.trainer, seed=0)])
        same.setdefault((other_blocks, digest(network)), []).append(name)
    return notes_on_duplicates(list(same.values()))


def _classes_of(recipe: Recipe) -> int:
    """The number of classes of a recipe's pictures, after these are verified."""
    data = ImageData(recipe.data)
    if data.multi_label:
        raise ValueError(
            "its images have several labels each, and recipes are compared by top-1: give "
            "ecanet.study.run a function that calls ecanet.train.fit, and metric='mAP'"
        )
    data.verify()
    return len(data.classes)


def _check_devices(conditions: Mapping[str, Recipe]) -> None:
    for name, recipe in conditions.items():
        devices, nodes = recipe.trainer.devices, recipe.trainer.nodes
        if devices not in ("auto", 1) or nodes != 1:  # Lightning would start the whole comparison again for each device
            raise ValueError(
                f"conditions[{name!r}] must train on one device, got trainer.devices={devices}, trainer.nodes={nodes}: "
                "to use several devices, run several runs at a time with workers"
            )


def _check(stored: dict[str, Any]) -> None:
    """Raise ValueError, with the reason, if a run succeeded but lacks its accuracy or the record of an epoch."""
    if stored["error"] is not None:
        return
    top1, history = stored["metrics"].get("top1"), stored["details"].get("history")
    if not _is_per_cent(top1):
        raise ValueError("its top1 is not a number from 0 to 100")
    if not (isinstance(history, list) and history and all(map(_is_record, history))):
        raise ValueError("its history is not a list of records of numbers with a val/top1 from 0 to 100")
    if history[-1]["val/top1"] != top1:
        raise ValueError("its top1 is not that of the last epoch")


def _is_record(record: Any) -> bool:
    """Whether a record holds the numbers of an epoch; a loss may be NaN, an accuracy may not."""
    return isinstance(record, dict) and _is_per_cent(record.get("val/top1")) and all(map(is_number, record.values()))


def _is_per_cent(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 100
