"""Tables of ``benchmarks.finetune``."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.finetune.runs import KEPT, PLAIN, RANDOM, WAYS
from ecanet.study import Comparison, Difference, Run, paired_difference
from ecanet.text_table import text_table

#: What is compared, the first minus the second.
PAIRS = ((KEPT, PLAIN), (RANDOM, PLAIN), (KEPT, RANDOM))
#: Key of the mean over all evaluations but the first, before which no way has learned anything.
AVERAGE = "average"


def key(way: str, seed: int) -> str:
    """The key of a run in a result file."""
    return f"{way}/seed {seed}"


def seeds_of(document: results.Document) -> list[int]:
    """Seeds that every way was run with."""
    seeds = [{int(name.rpartition(" ")[2]) for name in document["cases"] if name.startswith(f"{way}/")} for way in WAYS]
    return sorted(set.intersection(*seeds))


def summary(document: results.Document) -> dict[str, Any]:
    """Means, spreads and paired differences with their intervals, from the runs of a result file.

    Args:
        document: A result file with at least one seed that all ways were run with.
    """
    seeds = seeds_of(document)
    steps = runs_of(document, PLAIN)[0]["steps"]
    points = [*steps, AVERAGE]
    return {
        "seeds": seeds,
        "steps": steps,
        "photographs_right": {way: [run["photographs_right"] for run in runs_of(document, way)] for way in WAYS},
        "logits_moved": {way: [run["logits_moved"] for run in runs_of(document, way)] for way in WAYS},
        "top1": {
            way: {
                str(point): {"mean": _round(c.mean(way)), "spread": _round(c.spread(way))}
                for point in points
                for c in [comparison(document, point, PLAIN)]
            }
            for way in WAYS
        },
        "train_loss": {
            way: {str(step): round(loss, 4) for step, loss in _train_loss(document, way).items()} for way in WAYS
        },
        "train_loss_difference": {
            f"{way} - {baseline}": {name: _round(value, 4) for name, value in vars(difference).items()}
            for way, baseline in PAIRS
            for difference in [_train_loss_difference(document, way, baseline)]
        },
        "difference": {
            f"{way} - {baseline}": {
                str(point): {
                    name: _round(value) for name, value in vars(_difference(document, point, way, baseline)).items()
                }
                for point in points
            }
            for way, baseline in PAIRS
        },
    }


def comparison(document: results.Document, point: int | str, baseline: str) -> Comparison:
    """Every way after a number of steps, or on average over the evaluations, paired by seed.

    Args:
        document: The result file.
        point: A number of steps after which there was an evaluation, or :data:`AVERAGE`.
        baseline: The way that the others are compared with.
    """
    ways = [baseline, *(way for way in WAYS if way != baseline)]
    return Comparison(
        {
            way: [
                Run(way, seed, _value(run, point), [], Path())
                for seed, run in zip(seeds_of(document), runs_of(document, way), strict=True)
            ]
            for way in ways
        }
    )


def report(document: results.Document) -> str:
    """The tables: what insertion did, accuracy by step, differences by step."""
    data = summary(document)
    points = [*data["steps"], AVERAGE]
    photographs, seeds = document["settings"]["photographs"], len(data["seeds"])
    right = [
        [
            way,
            from_to(data["photographs_right"][way]),
            from_to([round(100 * v, 1) for v in data["logits_moved"][way]]),
        ]
        for way in WAYS
    ]
    accuracy = [[way, *(f"{data['top1'][way][str(point)]['mean']:.1f}" for point in points)] for way in WAYS]
    losses = [["to step", *map(str, data["steps"][1:])]]
    losses += [[way, *(f"{loss:.2f}" for loss in data["train_loss"][way].values())] for way in WAYS]
    differences = [
        [pair, *(cell for point in points for cell in [_interval(data["difference"][pair][str(point)])])]
        for pair in data["difference"]
    ]
    head = ["steps", *map(str, points)]
    n = f"{seeds} seed{'' if seeds == 1 else 's'}"
    return "\n\n".join(
        [
            f"Right after insertion, {photographs} photographs of ImageNet\n"
            + text_table([["", "right", "logits moved, %"], *right]),
            f"Top-1 on {document['settings']['held_out']} held-out pictures in per cent, mean of {n}\n"
            + text_table([head, *accuracy]),
            f"Training loss since the previous evaluation, with norms on batch statistics, mean of {n}\n"
            + text_table(losses),
            "Difference in training loss over all steps, paired by seed, with 95 % intervals\n"
            + "\n".join(f"{pair}: {_interval(d, 3)}" for pair, d in data["train_loss_difference"].items()),
            f"Differences in points, paired by seed, with 95 % intervals (Student's t, {n})\n"
            + text_table(list(zip(*[head, *differences], strict=True))),
        ]
    )


def runs_of(document: results.Document, way: str) -> list[dict[str, Any]]:
    """The runs of one way, by seed."""
    return [document["cases"][key(way, seed)] for seed in seeds_of(document)]


def _value(run: Mapping[str, Any], point: int | str) -> float:
    if point == AVERAGE:
        return statistics.fmean(run["top1"][1:])
    return run["top1"][run["steps"].index(point)]


def _train_loss(document: results.Document, way: str) -> dict[int, float]:
    """Mean over runs and over the steps between two evaluations, by the step of the later one."""
    losses = [
        statistics.fmean(values) for values in zip(*(r["train_loss"] for r in runs_of(document, way)), strict=True)
    ]
    return {b: statistics.fmean(losses[a:b]) for a, b in pairwise(runs_of(document, way)[0]["steps"])}


def _train_loss_difference(document: results.Document, way: str, baseline: str) -> Difference:
    """The paired difference of the mean training loss over all steps."""
    pairs = zip(runs_of(document, way), runs_of(document, baseline), strict=True)
    return paired_difference([statistics.fmean(a["train_loss"]) - statistics.fmean(b["train_loss"]) for a, b in pairs])


def _difference(document: results.Document, point: int | str, way: str, baseline: str) -> Difference:
    return comparison(document, point, baseline).difference(way)


def _round(value: float | None, digits: int = 2) -> float | None:
    return None if value is None else round(value, digits)


def from_to(values: Sequence[Any]) -> str:
    """The one value, or the smallest and the largest."""
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def _interval(difference: Mapping[str, float | None], digits: int = 1) -> str:
    mean, low, high = (
        None if value is None else f"{value:+.{digits}f}" for value in map(difference.get, ("mean", "low", "high"))
    )
    return f"{mean}" if low is None else f"{mean} ({low} to {high})"
