"""Read a study's folder again: runs, how it was made, costs and gates. What the files say is data, and checked."""

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

#: Files beside the runs: what a training step of each condition costs, and the gates that it learned.
COSTS, GATES, PROFILE = "costs.json", "gates.json", "profile.csv"
#: Bytes of these files, cells of all heat maps, and classes of one, at most.
_MAX_BYTES, MOST_CELLS, MOST_CLASSES = 2**24, 400_000, 40
_MAX_RUNS = 100_000
_OF_A_COST = ("parameters", "multiply_adds", "seconds")


@dataclass
class LearnedGates:
    """The gates of one network, class by class.

    Attributes:
        seed: Seed of the run that learned them.
        classes: Names of the classes.
        values: Mean gates (classes, C) by the gate's name; NaN where a class has no images.
    """

    seed: int
    classes: list[str]
    values: dict[str, Tensor]


@dataclass
class StudyFolder:
    """What is in a study's folder.

    Attributes:
        folder: The folder.
        study: Its runs, compared.
        about: How it was made; empty where an earlier version made it.
        to_come: Condition and seed of runs that did not end yet.
        costs: What a training step costs, by condition; empty where it was not measured.
        gates: What the gates learned, by condition.
        profile: What ``ecanet profile --out`` wrote into the folder: the names of the columns, then the rows.
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
        """What sets a condition apart, from the study's file or else from the recipe that a run keeps; or None."""
        said = self.about.conditions.get(condition)
        if said is None and self.study.runs[condition]:
            return self.study.runs[condition][0].details.get("recipe")
        return said


def read_folder(folder: Path, metric: str | None = None) -> StudyFolder:
    """Read a study's folder.

    Args:
        folder: What :func:`ecanet.study.run`, ``compare`` or ``ecanet study`` wrote, finished or not.
        metric: What to compare; by default what the study compared.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it holds no study, no run has the metric, or one of its files but a run's is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {shown(folder, 200)}")
    about, summary = read_about(folder), read_json(folder / "summary.json")
    files = list(itertools.islice((folder / "runs").glob("*.json"), _MAX_RUNS))
    runs, damaged = _read_runs(sorted(files))
    if about.seeds:  # a study of fewer seeds than there are files
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
    """The runs that ended, by condition and seed, and the files that are none."""
    runs: _Runs = {}
    damaged = []
    for file in files:
        of = re.fullmatch(r"(.+)-seed(\d{1,20})", file.stem)
        try:
            run = read_run(file)
            name, seed = run.get("condition", of and of[1]), run.get("seed", of and int(of[2]))
            if not (isinstance(name, str) and name and type(seed) is int and 0 <= seed < 2**63):
                raise ValueError(f"{file} does not say its condition and seed")
            if (name, seed) in runs:
                raise ValueError(f"{file} is of a condition and seed that {runs[name, seed][1].name} is of")
            runs[name, seed] = run, file
        except ValueError as error:
            name, seed = (of[1], int(of[2])) if of else (file.stem, 0)
            damaged.append(FailedRun(name, seed, shown(str(error).replace(str(file), file.name), 500), file))
    return runs, damaged


def _names(about: About, summary: Any, runs: _Runs) -> list[str]:
    """The conditions in order, last those that only runs name; empty if the baseline is unknown."""
    said = summary.get("conditions") if isinstance(summary, dict) else None
    known = [name for name in (about.conditions or said or {}) if isinstance(name, str)]
    return list(dict.fromkeys([*known, *(name for name, _ in runs)])) if known else []


def _metric(about: About, summary: Any) -> str:
    said = summary.get("metric") if isinstance(summary, dict) else None
    metric = said if isinstance(said, str) and said else about.metric
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
    """What a training step costs, of the conditions that were measured.

    Args:
        folder: Folder of the study.
        names: Its conditions.

    Raises:
        ValueError: the file is damaged.
    """
    content = read_json(folder / COSTS, _MAX_BYTES)
    found: dict[str, Cost] = {}
    for name, cost in content.items() if isinstance(content, dict) else ():
        said: list[Any] = [cost.get(key) if isinstance(cost, dict) else None for key in _OF_A_COST]
        if not all(is_number(each) and math.isfinite(each) and abs(each) < 1e18 for each in said):
            raise ValueError(f"{folder / COSTS} does not say what {shown(name)} costs: delete it")
        found[name] = Cost(int(said[0]), int(said[1]), float(said[2]))
    return {name: found[name] for name in names if name in found and found[name].seconds > 0}


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
        raise ValueError(f"{file} is no table of a profile ({error}): delete it") from error
    return rows


def _gates(folder: Path, names: Sequence[str]) -> dict[str, LearnedGates]:
    content = read_json(folder / GATES, _MAX_BYTES)
    found = content if isinstance(content, dict) else {}
    cells = 0
    learned: dict[str, LearnedGates] = {}
    for name in names:
        if found.get(name) is None:  # without gates, or not looked at
            continue
        try:
            learned[name] = _learned(found[name])
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(
                f"{folder / GATES} does not say what {shown(name)} learned ({error}): delete it"
            ) from error
        cells += sum(values.numel() for values in learned[name].values.values())
        if cells > MOST_CELLS:
            raise ValueError(f"{folder / GATES} has more than {MOST_CELLS:,} gates: delete it")
    return learned


def _learned(said: Any) -> LearnedGates:
    if not isinstance(said, dict) or type(said.get("seed")) is not int:
        raise ValueError("no seed")
    classes, gates = said.get("classes"), said.get("gates")
    if not (isinstance(classes, list) and classes and all(isinstance(each, str) for each in classes)):
        raise ValueError("its classes are not texts")
    if len(classes) > MOST_CLASSES:
        raise ValueError(f"more than {MOST_CLASSES} classes")
    if not isinstance(gates, dict) or not gates:
        raise ValueError("no gates")
    values = {}
    for name, rows in gates.items():
        values[name] = torch.tensor(
            [[math.nan if value is None else value for value in row] for row in rows], dtype=torch.float64
        )
        if values[name].dim() != 2 or len(values[name]) != len(classes) or not values[name].shape[1]:
            raise ValueError("a gate has not one row for each class")
        if values[name].nan_to_num().abs().max() > 1e6:
            raise ValueError("a gate is not a number of its kind")
    return LearnedGates(said["seed"], classes, values)
