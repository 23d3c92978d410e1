"""The data of the report's charts, from a study: paired differences, curves, costs and a sweep of kernel sizes."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ecanet.study.html_report.reading import StudyFolder
from ecanet.study.results import FinishedRun
from ecanet.study.run_files import is_number

#: Largest number of curves, and of values in a curve.
_MAX_CURVES, _MAX_EPOCHS = 4, 1_000_000
#: Columns of a record that are not curves.
_NO_CURVE = {"epoch", "step", "seconds", "time", "iteration"}
#: Largest number of settings that are shown, and of characters in one.
_MAX_SETTINGS, _MAX_CHARACTERS = 200, 300
#: Settings that are nested deeper are shown as one text.
_MAX_DEPTH = 8


def paired(contents: StudyFolder) -> dict[str, dict[int, float]]:
    """The metric minus the baseline's for each condition but the baseline, by seed."""
    metric = contents.study.metric
    baseline, *others = contents.conditions
    base = {run.seed: run.metrics[metric] for run in contents.study.runs[baseline]}
    return {
        name: {run.seed: run.metrics[metric] - base[run.seed] for run in contents.study.runs[name] if run.seed in base}
        for name in others
    }


@dataclass
class CostOfRuns:
    """The cost of every run, in the same unit for all.

    Attributes:
        title: What the cost is, with its unit.
        is_measured: Whether it is the measured time of a training step, equal for all runs of a condition; otherwise it
            is the time that each run took.
        values: Costs by condition and seed.
    """

    title: str
    is_measured: bool
    values: dict[tuple[str, int], float]


def cost_of_runs(contents: StudyFolder) -> CostOfRuns:
    """The time of a training step if it was measured for all conditions, otherwise the time of each run."""
    runs = [run for of_condition in contents.study.runs.values() for run in of_condition]
    if contents.costs and all(run.condition in contents.costs for run in runs):
        values = {(run.condition, run.seed): 1000 * contents.costs[run.condition].seconds for run in runs}
        return CostOfRuns("training step (ms)", True, values)
    return CostOfRuns("time of the run (s)", False, {(run.condition, run.seed): run.seconds for run in runs})


def curves(contents: StudyFolder) -> dict[str, dict[str, dict[int, list[float]]]]:
    """The curves of the runs. The metric's own curve comes first.

    A curve is a list of numbers that a run returned, or a column of a list of records, such as ``fit``'s history. A
    curve that is the same in all runs, such as a learning rate, is left out.

    Returns:
        A value for each epoch, by name of the curve, condition and seed.
    """
    found_curves: dict[str, dict[str, dict[int, list[float]]]] = {}
    for name, runs in contents.study.runs.items():
        for run in runs:
            for curve, values in _curves_of(run):
                found_curves.setdefault(curve, {}).setdefault(name, {})[run.seed] = values
    is_alone = len([run for runs in contents.study.runs.values() for run in runs]) == 1
    differing = [
        curve
        for curve, by_name in found_curves.items()
        if is_alone or len({tuple(map(repr, run)) for by_seed in by_name.values() for run in by_seed.values()}) > 1
    ]
    metric = contents.study.metric
    # The metric itself, then losses, then the rest.
    differing.sort(key=lambda curve: (curve != metric, _last_part(curve) != metric, "loss" not in curve, curve))
    return {curve: found_curves[curve] for curve in differing[:_MAX_CURVES]}


def _last_part(curve: str) -> str:
    return re.split(r"[/.]", curve)[-1]


def _curves_of(run: FinishedRun) -> Iterator[tuple[str, list[float]]]:
    for name, value in run.details.items():
        if not isinstance(value, list) or not 2 <= len(value) <= _MAX_EPOCHS:
            continue
        if all(map(is_number, value)):
            yield name, [float(number) for number in value]
        elif all(isinstance(record, dict) for record in value):
            prefix = "" if name == "history" else f"{name}/"
            for column in value[0]:
                numbers = [record.get(column) for record in value]
                if _last_part(column) not in _NO_CURVE and all(map(is_number, numbers)):
                    yield f"{prefix}{column}", [float(number) for number in numbers]


def mean_curve(runs: Sequence[Sequence[float]]) -> list[float]:
    """The mean over runs, for the epochs that all of them have."""
    return [math.fsum(values) / len(values) if _are_finite(values) else math.nan for values in zip(*runs, strict=False)]


def _are_finite(values: Sequence[float]) -> bool:
    return all(math.isfinite(value) and abs(value) < 1e100 for value in values)


def kernel_sweep(contents: StudyFolder) -> dict[str, str]:
    """Find three or more conditions that differ only in their kernel size.

    Returns:
        Names of conditions by kernel size, the numbers first, in ascending order; empty if there are fewer than three.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in contents.conditions:
        settings = flat_settings(contents.settings(name))
        keys = [key for key in settings if key.rpartition(".")[2] in ("kernel_size", "k_size")]
        if len(keys) == 1 and contents.study.runs[name]:
            size = settings.pop(keys[0])
            groups.setdefault(repr(sorted(settings.items())), {})[size] = name
    widest = max(groups.values(), key=len, default={})
    if len(widest) < 3:
        return {}
    return dict(sorted(widest.items(), key=lambda item: (not item[0].isdigit(), item[0].zfill(9))))


def flat_settings(settings: Any) -> dict[str, str]:
    """Nested settings as texts by dotted name, without the seed, which differs from run to run."""
    flat: dict[str, str] = {}

    def add(name: str, value: Any, depth: int) -> None:
        if len(flat) >= _MAX_SETTINGS or name.rpartition(".")[2] == "seed":
            return
        if isinstance(value, Mapping) and value and depth < _MAX_DEPTH:
            for key, item in value.items():
                add(f"{name}.{key}" if name else str(key), item, depth + 1)
        elif name:
            flat[name] = _as_text(value)

    add("" if isinstance(settings, Mapping) else "value", settings, 0)
    return flat


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        is_flat = all(not isinstance(item, (list, dict)) for item in value)
        text = f"[{', '.join(map(_as_text, value))}]" if is_flat else "[...]"
    elif isinstance(value, bool) or value is None:
        text = {None: "none", True: "true", False: "false"}[value]
    else:
        text = str(value)
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 3] + "..."


def split_settings(contents: StudyFolder) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """The settings that all conditions share, and those in which they differ.

    Returns:
        The shared settings as texts by name; and, for each condition that has settings, the others.
    """
    settings = {name: contents.settings(name) for name in contents.conditions}
    flat = {name: flat_settings(nested) for name, nested in settings.items() if nested is not None}
    if not flat:
        return {}, {}
    first = next(iter(flat.values()))
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in flat.values())}
    if len(flat) == 1:
        return shared, {}
    return shared, {name: {k: v for k, v in own.items() if k not in shared} for name, own in flat.items()}
