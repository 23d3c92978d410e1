"""A study of any training function: conditions paired by seed, a file for each run, one summary."""

import contextlib
import csv
import hashlib
import importlib
import inspect
import io
import json
import pickle
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ecanet.files.atomic import remove_partial_files, write_whole
from ecanet.files.folder_lock import lock_folder, unlock_folder
from ecanet.study.about import write_about
from ecanet.study.conclusions import notes_on_duplicates
from ecanet.study.engine import check_engine, run_all
from ecanet.study.job import Job
from ecanet.study.results import FailedRun, FinishedRun, Study, slug, why_not_counted
from ecanet.study.statistics import plan
from ecanet.untrusted import listed, shown

#: Files beside the runs.
_TABLES = ("study.json", "results.csv", "summary.json", "costs.json", "gates.json", "results.parquet", "report.html")
#: Longest name of a condition, in bytes: it is part of the names of files.
_MAX_NAME_BYTES = 150
#: Signature of a user's training function: condition, seed, folder -> metrics by name.
Train = Callable[[Any, int, Path], Mapping[str, Any]]


def run(
    train: Train,
    conditions: Mapping[str, Any] | Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    metric: str | None = None,
    workers: int | None = None,
    progress: bool = True,
    on: str = "processes",
) -> Study:
    """Run a training function for every condition and seed, and compare the conditions with the first one.

    A run that ended leaves a file ``out/runs/CONDITION-seedK.json``; a second call reads it and does not repeat the
    run. A killed study loses at most the runs in progress. They start again with the same folder,
    ``out/runs/CONDITION-seedK``, where ``train`` may keep checkpoints to go on from. A run that raises, or whose metric
    is missing or NaN, has failed and is not tried again while its file exists; one whose process dies is tried once
    more. The study goes on in both cases. At the end it writes ``out/results.csv``, a row for each run,
    ``out/summary.json``, and ``out/report.html``, one file that shows everything (:func:`ecanet.study.write_report`).

    Args:
        train: ``train(condition, seed, folder)`` returns a dict. Its numbers are metrics; anything else that JSON can
            hold is kept with them. It runs in other processes, so it must be defined at the top level of a file, and a
            script needs ``if __name__ == "__main__":`` around the call.
        conditions: What ``train`` gets as its condition, by name, the baseline first; or a list of names, each of which
            ``train`` gets as its condition.
        seeds: Different integers.
        out: Folder for the study.
        metric: The metric that is compared, by default the only number that ``train`` returns. A second call with
            another metric compares without training.
        workers: Runs at a time, each with one thread. By default one for each core, or a single run at a time on a
            machine with a GPU.
        progress: Print first what the seeds can show; then show how many runs are done, running and left, and the time
            left.
        on: ``"processes"`` of this machine, or ``"ray"``: the Ray cluster that ``RAY_ADDRESS`` names, otherwise one
            that is started here. On Ray each run has a GPU of its own if the cluster has any, otherwise a CPU.

    Returns:
        Finished and failed runs; ``print`` shows a table and what it means.

    Raises:
        TypeError: ``train`` does not take three arguments, or it or a condition cannot be handed to another process.
        ValueError: there is no condition, two have one name, there are no seeds or repeated ones, no run has the
            metric, or ``out`` holds another study or damaged files; or, after the runs, ``metric`` is not given and
            runs have several. The runs are kept.
        BlockingIOError: another study is writing into ``out``.
        ConnectionError, ImportError: there is no Ray cluster at ``RAY_ADDRESS``, or no Ray.
        RuntimeError: worker processes do not start; or ``metric`` is not given and no run returned a number.

    Example:
        >>> def train(condition, seed, folder):
        ...     return {"accuracy": 90.0 + 0.1 * (condition == "eca") + 0.01 * seed}
        >>> run(train, ["none", "eca"], range(6), "out", "accuracy")  # doctest: +SKIP
    """
    if not isinstance(conditions, Mapping):
        conditions = _by_name(conditions)
    check_names(conditions)
    check_seeds(seeds)
    if metric is not None and (not isinstance(metric, str) or not metric):
        raise ValueError(f"metric must name what train returns, such as 'accuracy', or be None, got {shown(metric)!r}")
    _check_train(train, conditions)
    if progress:
        same: dict[str, list[str]] = {}
        for name, condition in conditions.items():
            same.setdefault(fingerprint(condition), []).append(name)
        for line in notes_on_duplicates(list(same.values())):
            print(line, file=sys.stderr)
    folder = Path(out).absolute() / "runs"  # a training function may change the working folder
    function = f"{getattr(train, '__module__', '')}.{getattr(train, '__qualname__', type(train).__qualname__)}"
    # Seed by seed, so that after an early stop the finished runs form pairs.
    jobs = [
        Job(
            name,
            seed,
            folder / f"{slug(name)}-seed{seed}",
            partial(train, condition, seed),
            fingerprint([function.removeprefix("__main__."), name, condition, seed]),
        )
        for seed in map(int, seeds)
        for name, condition in conditions.items()
    ]
    settings = {name: _plain(value) for name, value in conditions.items()}
    study = run_jobs(jobs, out, metric, workers, progress, on, settings)
    report(out, progress)
    return study


def report(out: str | Path, progress: bool) -> None:
    """Write the report of a study, and print its path."""
    from ecanet.study.html_report import write_report  # imports torch, which not every worker needs

    path = write_report(out)
    if progress:
        print(f"report: {path}", file=sys.stderr)


def run_jobs(
    jobs: Sequence[Job],
    out: str | Path,
    metric: str | None,
    workers: int | None,
    progress: bool,
    on: str,
    settings: Mapping[str, Any],
) -> Study:
    """Run the jobs that have not ended, and write the study's tables.

    Args:
        jobs: All runs of the study, each with a folder in ``out/runs``.
        out: Folder of the study.
        metric: What is compared; None for the only metric that the runs have.
        workers: As in :func:`run`.
        progress: As in :func:`run`.
        on: As in :func:`run`.
        settings: Settings of each condition, for the report: anything JSON can hold.

    Raises:
        ValueError, BlockingIOError, ConnectionError, ImportError, RuntimeError: as in :func:`run`.
    """
    check_engine(on, workers)
    importlib.import_module("ecanet.study.html_report")  # if a package is missing, fail now and not after all runs
    folder = Path(out)
    check_folder(jobs, folder)
    with _study_folder(folder):
        remove_partial_files(folder, _TABLES)  # left by a killed study
        remove_partial_files(folder / "runs", {job.file.name for job in jobs})
        return _run_jobs(jobs, folder, metric, workers, progress, on, settings)


@contextlib.contextmanager
def _study_folder(folder: Path) -> Iterator[None]:
    """Create and lock the folder of a study; at the end, remove created folders that stayed empty."""
    created = [path for path in (folder / "runs", folder, *folder.parents) if not path.exists()]
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    try:
        handle = lock_folder(folder)
    except BlockingIOError as error:
        raise BlockingIOError(
            f"another study is writing into {folder}: wait until it ends, or choose another folder"
        ) from error
    try:
        yield
    finally:
        unlock_folder(handle)
        for path in created:
            with contextlib.suppress(OSError):  # a folder that is not empty stays
                path.rmdir()


def _run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    metric: str | None,
    workers: int | None,
    progress: bool,
    on: str,
    settings: Mapping[str, Any],
) -> Study:
    ended = {job.folder: stored for job in jobs if (stored := job.read()) is not None}
    _metric_of(ended.values(), metric, folder)
    pending = [job for job in jobs if job.folder not in ended]
    names = list(dict.fromkeys(job.condition for job in jobs))
    seeds = list(dict.fromkeys(job.seed for job in jobs))
    if not pending:
        write_about(folder, metric, seeds, settings, is_start=False)
    if progress and pending and len(names) > 1:
        print(plan(len(names), len(jobs) // len(names)), file=sys.stderr)
    begin = partial(write_about, folder, metric, seeds, settings)
    lost = run_all(pending, workers, on, progress, partial(why_not_counted, metric=metric), begin)
    ended |= {job.folder: stored for job in pending if (stored := job.read()) is not None}
    if metric is None:
        try:
            metric = _metric_of(ended.values(), None, folder)
        except ValueError:  # there are several: the table shows which the caller can choose
            write_whole(folder / "results.csv", _results(_finished_and_failed(jobs, ended, lost, None)[0], jobs))
            raise
    runs, failed = _finished_and_failed(jobs, ended, lost, metric)
    if unwritten := [(run.condition, run.seed, run.reason) for run in failed if not run.file.exists()]:
        write_about(folder, metric, seeds, settings, unwritten)
    write_whole(folder / "results.csv", _results(runs, jobs))
    if metric is None:
        reasons = [f"{run.condition}, seed {run.seed}: {run.reason}" for run in failed[:5]]
        raise RuntimeError(f"no run returned a number, so there is nothing to compare: {'; '.join(reasons)}")
    study = Study(metric, runs, failed)
    write_whole(folder / "summary.json", json.dumps(asdict(study.summary), indent=2, allow_nan=False) + "\n")
    return study


def _finished_and_failed(
    jobs: Sequence[Job], ended: Mapping[Path, dict[str, Any]], lost: Mapping[Path, str], metric: str | None
) -> tuple[dict[str, list[FinishedRun]], list[FailedRun]]:
    runs: dict[str, list[FinishedRun]] = {job.condition: [] for job in jobs}
    failed: list[FailedRun] = []
    for job in jobs:
        stored = ended.get(job.folder)
        reason = lost.get(job.folder, "it left no file") if stored is None else why_not_counted(stored, metric)
        if stored is None or reason:
            failed.append(FailedRun(job.condition, job.seed, reason, job.file))
            continue
        about = {name: stored[name] for name in ("metrics", "details", "seconds")}
        runs[job.condition].append(FinishedRun(job.condition, job.seed, folder=job.folder, **about))
    return runs, failed


def _metric_of(ended: Iterable[Mapping[str, Any]], metric: str | None, folder: Path) -> str | None:
    """The metric to compare; None if the caller named none and no run has any.

    Raises:
        ValueError: no finished run has the metric; or the caller named none, and the runs have several.
    """
    finished = [stored["metrics"] for stored in ended if stored["error"] is None]
    names = list(dict.fromkeys(name for metrics in finished for name in metrics))
    if metric is None and len(names) > 1:
        raise ValueError(
            f"metric must be one of {listed(names)}, which the finished runs in {folder} have: the same call with "
            f"metric={names[0]!r} compares them without training"
        )
    if metric is not None and finished and metric not in names:
        have = listed(names) or "no numbers"
        raise ValueError(f"metric must be one that the finished runs in {folder} have ({have}), got {shown(metric)!r}")
    return names[0] if metric is None and names else metric


def _results(runs: Mapping[str, Sequence[FinishedRun]], jobs: Sequence[Job]) -> str:
    """The table of runs as CSV; a failed run has no metrics."""
    finished = {(run.condition, run.seed): run for of_condition in runs.values() for run in of_condition}
    metrics = list(dict.fromkeys(name for run in finished.values() for name in run.metrics))
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    own_columns = ("condition", "seed", "seconds")
    headers = [f"{name} (metric)" if name in own_columns else name for name in metrics]
    writer.writerow([*own_columns[:2], *headers, own_columns[2]])
    for job in jobs:
        run = finished.get((job.condition, job.seed))
        cells = [run.metrics.get(name, "") for name in metrics] if run else [""] * len(metrics)
        writer.writerow([job.condition, job.seed, *cells, f"{run.seconds:.3f}" if run else ""])
    return table.getvalue()


def check_names(conditions: Mapping[str, Any]) -> None:
    """Raise ValueError unless there is at least one name and each gives a different file name."""
    if not conditions:
        raise ValueError("conditions must name at least one, the baseline, got none")
    files: dict[str, str] = {}
    for name in conditions:
        if not isinstance(name, str) or not name:
            raise ValueError(f"conditions must have texts for names, got {shown(name)}")
        if len(slug(name).encode()) > _MAX_NAME_BYTES:
            raise ValueError(f"conditions need names of at most {_MAX_NAME_BYTES} bytes, got {shown(name)}")
        if slug(name) in files:
            raise ValueError(f"conditions need names that differ in letters and digits, got {listed(conditions)}")
        files[slug(name)] = name


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError unless the seeds are one or more different integers from 0 to 2^63 - 1."""
    given = list(seeds) if isinstance(seeds, Collection) and not isinstance(seeds, str) else None
    if (
        not given
        or len(set(given)) != len(given)
        or not all(hasattr(seed, "__index__") and not isinstance(seed, bool) and 0 <= seed < 2**63 for seed in given)
    ):
        shown_seeds = seeds if given is None else given
        raise ValueError(
            f"seeds must be one or more different integers from 0 to 2^63 - 1, such as range(9), got {shown_seeds}"
        )


def fingerprint(what: Any) -> str:
    """A hash of plain values, dataclasses, functions and classes: sixteen hexadecimal digits."""
    return hashlib.sha256(json.dumps(_plain(what), sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if hasattr(value, "__qualname__"):
        return value.__qualname__
    # An object's default repr holds its address, which differs between processes.
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _by_name(names: Sequence[str]) -> dict[str, str]:
    if isinstance(names, str | Set) or not isinstance(names, Iterable):  # a set has no first one
        raise ValueError(f"conditions must be a list of names or a dict, got {shown(names)}")
    given = list(names)
    if wrong := [name for name in given if not isinstance(name, str)]:
        raise ValueError(f"conditions must have texts for names, got {shown(wrong[0])}")
    if len(set(given)) != len(given):
        raise ValueError(f"conditions need different names, got {listed(map(str, given))}")
    return {name: name for name in given}


def _check_train(train: Train, conditions: Mapping[str, Any]) -> None:
    if not callable(train):
        raise TypeError(f"train must be a function of condition, seed and folder, got {shown(train)}")
    try:
        inspect.signature(train).bind(None, 0, Path())
    except ValueError:  # some callables have no signature
        pass
    except TypeError as error:
        raise TypeError(f"train must take condition, seed and folder: {error}") from error
    for what, value in (("train", train), *((f"conditions[{name!r}]", value) for name, value in conditions.items())):
        try:
            pickle.dumps(value)
        except Exception as error:
            raise TypeError(
                f"{what} must be something that another process can import, such as a function at the top level of a "
                f"file, got {shown(repr(value))} ({type(error).__name__}: {shown(error)})"
            ) from error


def check_folder(jobs: Sequence[Job], out: Path) -> None:
    """Raise ValueError if ``out`` cannot be this study's folder: it is a file, or has runs of other conditions."""
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"out must be a folder, got {out}: {nearest} is a file")
    ours = {slug(job.condition) for job in jobs}
    runs = {match[1]: file for file in out.glob("runs/*.json") if (match := re.fullmatch(r"(.+)-seed\d+", file.stem))}
    if others := [file for name, file in sorted(runs.items()) if name not in ours]:
        raise ValueError(
            f"{out} holds another study: {others[0].name} belongs to none of the conditions "
            f"{listed(dict.fromkeys(job.condition for job in jobs))}; choose another folder"
        )
