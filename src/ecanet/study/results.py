"""What a study found: its finished runs, those that failed, and why a run is not counted."""

import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ecanet.study.conclusions import summary_table, verdict
from ecanet.study.statistics import Summary, summarise
from ecanet.untrusted import listed

#: Larger metrics are not counted: their squares may overflow.
_LARGEST = 1e100


@dataclass
class FinishedRun:
    """A run that ended with its metric.

    Attributes:
        condition: Name of its condition.
        seed: Its seed.
        metrics: Numbers by name.
        details: Anything else that its function returned.
        seconds: Its duration; if it went on from a checkpoint, only since its last start.
        folder: The folder it wrote into.
    """

    condition: str
    seed: int
    metrics: dict[str, float]
    details: dict[str, Any]
    seconds: float
    folder: Path


@dataclass
class FailedRun:
    """A run that is not counted.

    Attributes:
        condition: Name of its condition.
        seed: Its seed.
        reason: What it raised, or what is wrong with its metric.
        file: Its file, which does not exist if its process died. A run without a file runs again.
    """

    condition: str
    seed: int
    reason: str
    file: Path


@dataclass
class Study:
    """Every run of a study.

    Attributes:
        metric: What is compared.
        runs: Finished runs by condition, the baseline first.
        failed: Runs that are not counted.
    """

    metric: str
    runs: dict[str, list[FinishedRun]]
    failed: list[FailedRun]

    @cached_property
    def summary(self) -> Summary:
        """Differences, intervals and tests of all conditions."""
        values = {name: {run.seed: run.metrics[self.metric] for run in runs} for name, runs in self.runs.items()}
        return summarise(values, self.metric)

    def __str__(self) -> str:
        """The table, what it means, and which runs failed."""
        lines = [summary_table(self.summary), "", verdict(self.summary)]
        for run in self.failed:
            failed = f"Failed and not counted: {run.condition}, seed {run.seed}: {run.reason}."
            again = f"Delete {run.file} to run it again." if run.file.exists() else "The same call runs it again."
            lines.append(f"{failed} {again}")
        return "\n".join(lines)


def why_not_counted(stored: Mapping[str, Any], metric: str | None) -> str:
    """Why a run that ended is not counted; an empty text if it is.

    Args:
        stored: Content of its file.
        metric: The metric that is compared; None if the caller has not named it.
    """
    if stored["error"] is not None:
        return stored["error"]
    metrics = stored["metrics"]
    if metric is None and len(metrics) != 1:  # if there are several, it is not known yet which one is compared
        return "" if metrics else "it returned no numbers"
    metric = next(iter(metrics)) if metric is None else metric
    if metric not in metrics:
        return f"it returned no {metric!r}, only {listed(metrics) or 'no numbers'}"
    value = metrics[metric]
    if not (math.isfinite(value) and abs(value) <= _LARGEST):
        return f"its {metric} is {float(value):g}"
    return ""


def slug(name: str) -> str:
    """Turn a name into a part of a file's name: letters and digits of any script, with hyphens between them."""
    return re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", name).lower()).strip("-") or "condition"
