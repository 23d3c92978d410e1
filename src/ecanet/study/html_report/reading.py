"""Read a study's folder: runs, how it was made, costs and gates. The files are untrusted, so everything is checked."""

import csv
import io
import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecanet.study.about import About, read_about, read_json
from ecanet.study.costs import Cost
from ecanet.study.results import FailedRun, FinishedRun, Study, slug, why_not_counted
from ecanet.study.run_files import is_number, read_run
from ecanet.untrusted import check_file, listed, shown

#: Files in a study's folder: what a training step of each condition costs, the gates that it learned, and the table of
#: ``ecanet profile``.
COSTS, GATES, PROFILE = "costs.json", "gates.json", "profile.csv"
#: Largest size of these files in bytes, and largest numbers of cells in all heat maps and of classes in one.
_MAX_BYTES, MAX_CELLS, MAX_CLASSES = 2**24, 400_000, 40
_MAX_RUNS = 100_000
_COST_FIELDS = ("parameters", "multiply_adds", "seconds")


@dataclass
class LearnedGates:
    """The gates of one network, class by class.

    Attributes:
        seed: Seed of the run that learned them.
        classes: Names of the classes.
        values: Mean gates (classes, C) by the gate's name; NaN if a class has no images.
    """

    seed: int
    classes: list[str]
    values: dict[str, Tensor]


@dataclass
class StudyFolder:
    """What is in a study's folder.

    Attributes:
        folder: The folder.
        study: Its runs, and their comparison.
        about: How it was made; empty if an earlier version made it.
        to_come: Condition and seed of runs that have not ended.
        costs: What a training step costs, by condition; empty if it was not measured.
        gates: What the gates learned, by condition.
        profile: The table that ``ecanet profile --out`` wrote into the folder: the names of the columns, then the rows.
    """

    folder: Path
    study: Study
    about: About
    to_come: list[tuple[str, int]] = field(default_factory=list)
    costs: dict[str, Cost] = field(default_factory=dict)
    gates: dict[str, LearnedGates] = field(default_factory=dict)
    profile: list[list[str]] = field(default_factory=list)

    @property
    def conditions(self) -> list[str]:
        """Names of all conditions, the baseline first."""
        return list(self.study.runs)

    def settings(self, condition: str) -> Any:
        """Settings of a condition, from ``study.json`` or else from the recipe that a run keeps; None if unknown."""
        settings = self.about.conditions.get(condition)
        if settings is None and self.study.runs[condition]:
            return self.study.runs[condition][0].details.get("recipe")
        return settings


def read_folder(folder: Path, metric: str | None = None) -> StudyFolder:
    """Read a study's folder.

    Args:
        folder: Folder that :func:`ecanet.study.run`, ``compare`` or ``ecanet study`` wrote, even if it is unfinished.
        metric: What to compare; by default what the study compared.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no study, no run has the metric, or a file is damaged that is not the file of a run.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {shown(folder, 200)}")
    about, summary = read_about(folder), read_json(folder / "summary.json")
    files = list(itertools.islice((folder / "runs").glob("*.json"), _MAX_RUNS))
    runs, damaged = _read_runs(sorted(files))
    if about.seeds:  # there may be files of more seeds than the study has
        runs = {key: run for key, run in runs.items() if key[1] in about.seeds}
    lost = [
        FailedRun(name, seed, reason, folder / "runs" / f"{slug(name)}-seed{seed}.json")
        for name, seed, reason in about.lost
        if (name, seed) not in runs and name in about.conditions
    ]
    names = _names(about, summary, runs)
    if not (runs or lost) or not names:
        raise ValueError(f"{shown(folder, 200)} holds no study: it has no finished run in runs/, or no summary.json")
    study = _compared(runs, [*damaged, *lost], names, metric or _metric(about, summary))
    if metric is not None and not any(study.runs.values()):
        have = listed(dict.fromkeys(name for stored, _ in runs.values() for name in stored["metrics"])) or "no numbers"
        raise ValueError(f"metric must be one that the runs in {shown(folder, 200)} have ({have}), got {study.metric}")
    ended = runs.keys() | {(run.condition, run.seed) for run in study.failed}
    to_come = [(name, seed) for seed in about.seeds for name in about.conditions if (name, seed) not in ended]
    costs, gates = read_costs(folder, list(study.runs)), _gates(folder, list(study.runs))
    return StudyFolder(folder, study, about, to_come, costs, gates, _profile(folder))


_Runs = dict[tuple[str, int], tuple[dict[str, Any], Path]]


def _read_runs(files: Sequence[Path]) -> tuple[_Runs, list[FailedRun]]:
    """The runs that ended, by condition and seed, and the files that hold none."""
    runs: _Runs = {}
    damaged = []
    for file in files:
        match = re.fullmatch(r"(.+)-seed(\d{1,20})", file.stem)
        try:
            run = read_run(file)
            name, seed = run.get("condition", match and match[1]), run.get("seed", match and int(match[2]))
            if not (isinstance(name, str) and name and type(seed) is int and 0 <= seed < 2**63):
                raise ValueError(f"{file} does not say its condition and seed")
            if (name, seed) in runs:
                raise ValueError(f"{file} has the condition and seed of {runs[name, seed][1].name}")
            runs[name, seed] = run, file
        except ValueError as error:
            name, seed = (match[1], int(match[2])) if match else (file.stem, 0)
            damaged.append(FailedRun(name, seed, shown(str(error).replace(str(file), file.name), 500), file))
    return runs, damaged


def _names(about: About, summary: Any, runs: _Runs) -> list[str]:
    """The conditions in order, with those that only runs name at the end; empty if the baseline is unknown."""
    in_summary = summary.get("conditions") if isinstance(summary, dict) else None
    known = [name for name in (about.conditions or in_summary or {}) if isinstance(name, str)]
    return list(dict.fromkeys([*known, *(name for name, _ in runs)])) if known else []


def _metric(about: About, summary: Any) -> str:
    in_summary = summary.get("metric") if isinstance(summary, dict) else None
    metric = in_summary if isinstance(in_summary, str) and in_summary else about.metric
    if not metric:
        raise ValueError("metric must be given: neither summary.json nor study.json says what is compared")
    return metric


def _compared(runs: _Runs, others: list[FailedRun], names: Sequence[str], metric: str) -> Study:
    finished: dict[str, list[FinishedRun]] = {name: [] for name in names}
    failed = list(others)
    for (name, seed), (stored, file) in sorted(runs.items(), key=lambda item: item[0][1]):
        if reason := why_not_counted(stored, metric):
            failed.append(FailedRun(name, seed, reason, file))
            continue
        about = {key: stored[key] for key in ("metrics", "details", "seconds")}
        finished[name].append(FinishedRun(name, seed, folder=file.with_suffix(""), **about))
    return Study(metric, finished, failed)


def read_costs(folder: Path, names: Sequence[str]) -> dict[str, Cost]:
    """Read what a training step costs for the conditions that were measured.

    Args:
        folder: Folder of the study.
        names: Its conditions.

    Raises:
        ValueError: the file is damaged.
    """
    content = read_json(folder / COSTS, _MAX_BYTES)
    costs: dict[str, Cost] = {}
    for name, cost in content.items() if isinstance(content, dict) else ():
        numbers: list[Any] = [cost.get(key) if isinstance(cost, dict) else None for key in _COST_FIELDS]
        if not all(is_number(number) and math.isfinite(number) and abs(number) < 1e18 for number in numbers):
            raise ValueError(f"{folder / COSTS} does not say what {shown(name)} costs: delete it")
        costs[name] = Cost(int(numbers[0]), int(numbers[1]), float(numbers[2]))
    return {name: costs[name] for name in names if name in costs and costs[name].seconds > 0}


def _profile(folder: Path) -> list[list[str]]:
    file = folder / PROFILE
    if not os.path.lexists(file):
        return []
    try:
        check_file(file, _MAX_BYTES)
        rows = [row for row in csv.reader(io.StringIO(file.read_bytes().decode(), newline="")) if row]
        if not rows or {len(row) for row in rows} != {len(rows[0])}:
            raise ValueError("its rows have different numbers of cells")
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{file} is not a table of ecanet profile ({error}): delete it") from error
    return rows


def _gates(folder: Path, names: Sequence[str]) -> dict[str, LearnedGates]:
    content = read_json(folder / GATES, _MAX_BYTES)
    stored = content if isinstance(content, dict) else {}
    cells = 0
    learned: dict[str, LearnedGates] = {}
    for name in names:
        if stored.get(name) is None:  # it has no gates, or they were not measured
            continue
        try:
            learned[name] = _learned(stored[name])
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(
                f"{folder / GATES} does not say what {shown(name)} learned ({error}): delete it"
            ) from error
        cells += sum(values.numel() for values in learned[name].values.values())
        if cells > MAX_CELLS:
            raise ValueError(f"{folder / GATES} has more than {MAX_CELLS:,} gates: delete it")
    return learned


def _learned(stored: Any) -> LearnedGates:
    if not isinstance(stored, dict) or type(stored.get("seed")) is not int:
        raise ValueError("no seed")
    classes, gates = stored.get("classes"), stored.get("gates")
    if not (isinstance(classes, list) and classes and all(isinstance(each, str) for each in classes)):
        raise ValueError("its classes are not texts")
    if len(classes) > MAX_CLASSES:
        raise ValueError(f"more than {MAX_CLASSES} classes")
    if not isinstance(gates, dict) or not gates:
        raise ValueError("no gates")
    values = {}
    for name, rows in gates.items():
        values[name] = torch.tensor(
            [[math.nan if value is None else value for value in row] for row in rows], dtype=torch.float64
        )
        if values[name].dim() != 2 or len(values[name]) != len(classes) or not values[name].shape[1]:
            raise ValueError("a gate does not have one row for each class")
        if values[name].nan_to_num().abs().max() > 1e6:
            raise ValueError("a gate is larger than 1e6")
    return LearnedGates(stored["seed"], classes, values)
