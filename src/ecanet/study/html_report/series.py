"""What the report draws, taken out of a study: paired differences, curves, costs and a sweep of kernel sizes."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ecanet.study.html_report.reading import StudyFolder
from ecanet.study.results import FinishedRun
from ecanet.study.run_files import is_number

#: Curves beside that of the metric, and epochs of one run that are looked at.
_MOST_CURVES, _MOST_EPOCHS = 4, 1_000_000
#: Columns of a record that are no curve.
_NO_CURVE = {"epoch", "step", "seconds", "time", "iteration"}
#: Settings and characters of one that are shown.
_MOST_SETTINGS, _MOST_CHARACTERS = 200, 300
_DEPTH = 8


def paired(found: StudyFolder) -> dict[str, dict[int, float]]:
    """For each condition but the baseline, by seed: its metric minus the baseline's."""
    metric = found.study.metric
    baseline, *others = found.conditions
    base = {run.seed: run.metrics[metric] for run in found.study.runs[baseline]}
    return {
        name: {run.seed: run.metrics[metric] - base[run.seed] for run in found.study.runs[name] if run.seed in base}
        for name in others
    }


@dataclass
class CostOfRuns:
    """What every run cost, all in one unit.

    Attributes:
        title: What it is, with its unit.
        is_measured: Whether it is a training step's time, one for all runs of a condition; otherwise each run's own.
        values: By condition and seed.
    """

    title: str
    is_measured: bool
    values: dict[tuple[str, int], float]


def cost_of_runs(found: StudyFolder) -> CostOfRuns:
    """The time of a training step where it was measured for all conditions, otherwise the time of each run."""
    runs = [run for of in found.study.runs.values() for run in of]
    if found.costs and all(run.condition in found.costs for run in runs):
        values = {(run.condition, run.seed): 1000 * found.costs[run.condition].seconds for run in runs}
        return CostOfRuns("training step (ms)", True, values)
    return CostOfRuns("time of the run (s)", False, {(run.condition, run.seed): run.seconds for run in runs})


def curves(found: StudyFolder) -> dict[str, dict[str, dict[int, list[float]]]]:
    """By name of the curve, condition and seed: a value for each epoch. The metric's own curve comes first.

    A curve is a list of numbers among what a run returned, or a column of a list of records, such as ``fit``'s history.
    One that is the same in all runs, such as a learning rate, is left out.
    """
    found_curves: dict[str, dict[str, dict[int, list[float]]]] = {}
    for name, runs in found.study.runs.items():
        for run in runs:
            for curve, values in _curves_of(run):
                found_curves.setdefault(curve, {}).setdefault(name, {})[run.seed] = values
    several = len([run for runs in found.study.runs.values() for run in runs]) > 1
    differing = [
        curve
        for curve, by_name in found_curves.items()
        if not several or len({tuple(map(repr, run)) for of in by_name.values() for run in of.values()}) > 1
    ]
    metric = found.study.metric
    # The metric itself, then losses, then the rest.
    differing.sort(key=lambda curve: (curve != metric, _last_part(curve) != metric, "loss" not in curve, curve))
    return {curve: found_curves[curve] for curve in differing[:_MOST_CURVES]}


def _last_part(curve: str) -> str:
    return re.split(r"[/.]", curve)[-1]


def _curves_of(run: FinishedRun) -> Iterator[tuple[str, list[float]]]:
    for name, value in run.details.items():
        if not isinstance(value, list) or not 2 <= len(value) <= _MOST_EPOCHS:
            continue
        if all(map(is_number, value)):
            yield name, [float(each) for each in value]
        elif all(isinstance(record, dict) for record in value):
            prefix = "" if name == "history" else f"{name}/"
            for column in value[0]:
                numbers = [record.get(column) for record in value]
                if _last_part(column) not in _NO_CURVE and all(map(is_number, numbers)):
                    yield f"{prefix}{column}", [float(each) for each in numbers]


def mean_curve(runs: Sequence[Sequence[float]]) -> list[float]:
    """The mean over runs, for the epochs that all of them have."""
    return [math.fsum(values) / len(values) if _are_finite(values) else math.nan for values in zip(*runs, strict=False)]


def _are_finite(values: Sequence[float]) -> bool:
    return all(math.isfinite(value) and abs(value) < 1e100 for value in values)


def kernel_sweep(found: StudyFolder) -> dict[str, str]:
    """Conditions that differ in their kernel size alone, three or more, by that size: numbers first, in order.

    Returns:
        Names of conditions by kernel size; empty where there are no such three.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in found.conditions:
        settings = flat_settings(found.settings(name))
        keys = [key for key in settings if key.rpartition(".")[2] in ("kernel_size", "k_size")]
        if len(keys) == 1 and found.study.runs[name]:
            size = settings.pop(keys[0])
            groups.setdefault(repr(sorted(settings.items())), {})[size] = name
    widest = max(groups.values(), key=len, default={})
    if len(widest) < 3:
        return {}
    return dict(sorted(widest.items(), key=lambda item: (not item[0].isdigit(), item[0].zfill(9))))


def flat_settings(settings: Any) -> dict[str, str]:
    """Nested settings as texts by dotted name; the seed, which differs from run to run, is left out."""
    flat: dict[str, str] = {}

    def add(name: str, value: Any, depth: int) -> None:
        if len(flat) >= _MOST_SETTINGS or name.rpartition(".")[2] == "seed":
            return
        if isinstance(value, Mapping) and value and depth < _DEPTH:
            for key, item in value.items():
                add(f"{name}.{key}" if name else str(key), item, depth + 1)
        elif name:
            flat[name] = _as_text(value)

    add("" if isinstance(settings, Mapping) else "value", settings, 0)
    return flat


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        plain = all(not isinstance(each, (list, dict)) for each in value)
        text = f"[{', '.join(map(_as_text, value))}]" if plain else "[...]"
    elif isinstance(value, bool) or value is None:
        text = {None: "none", True: "true", False: "false"}[value]
    else:
        text = str(value)
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 3] + "..."


def split_settings(found: StudyFolder) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Settings that all conditions share, and by condition those in which they differ.

    Returns:
        Shared texts by name; and for each condition with settings, texts by name of what is not shared.
    """
    every = {
        name: flat_settings(settings) for name in found.conditions if (settings := found.settings(name)) is not None
    }
    if not every:
        return {}, {}
    first = next(iter(every.values()))
    shared = {key: value for key, value in first.items() if all(of.get(key) == value for of in every.values())}
    if len(every) == 1:
        return shared, {}
    return shared, {name: {k: v for k, v in of.items() if k not in shared} for name, of in every.items()}
