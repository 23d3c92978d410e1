"""Tables and picture of ``benchmarks.finetune``'s result file."""

import statistics
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import results
from benchmarks.finetune_runs import KEPT, PLAIN, RANDOM, WAYS
from ecanet.inspect.style import COLOURS, DARK, FONT_SIZE, SMALL_FONT_SIZE, new_figure, style_axes
from ecanet.study import Comparison, Difference, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What is compared, the first minus the second.
PAIRS = ((KEPT, PLAIN), (RANDOM, PLAIN), (KEPT, RANDOM))
_COLOURS = {PLAIN: COLOURS[6], KEPT: COLOURS[0], RANDOM: COLOURS[1]}
#: Of the mean over the evaluations after the first, where no way has learned anything yet.
AVERAGE = "average"


def key(way: str, seed: int) -> str:
    """Under which a result file has a run."""
    return f"{way}/seed {seed}"


def seeds_of(document: results.Document) -> list[int]:
    """Seeds that every way was run with."""
    found = [{int(name.rpartition(" ")[2]) for name in document["cases"] if name.startswith(f"{way}/")} for way in WAYS]
    return sorted(set.intersection(*found))


def summary(document: results.Document) -> dict[str, Any]:
    """Means, spreads and paired differences with their intervals, from the runs of a result file.

    Args:
        document: With at least one seed that all ways were run with.
    """
    seeds = seeds_of(document)
    steps = _runs(document, PLAIN)[0]["steps"]
    points = [*steps, AVERAGE]
    return {
        "seeds": seeds,
        "steps": steps,
        "photographs_right": {way: [run["photographs_right"] for run in _runs(document, way)] for way in WAYS},
        "logits_moved": {way: [run["logits_moved"] for run in _runs(document, way)] for way in WAYS},
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
    """Every way after so many steps, or on average over the evaluations, paired by seed.

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
                for seed, run in zip(seeds_of(document), _runs(document, way), strict=True)
            ]
            for way in ways
        }
    )


def report(document: results.Document) -> str:
    """The tables: what insertion did, accuracy by step, differences by step."""
    found = summary(document)
    points = [*found["steps"], AVERAGE]
    photographs, seeds = document["settings"]["photographs"], len(found["seeds"])
    right = [
        [way, _range(found["photographs_right"][way]), _range([round(100 * v, 1) for v in found["logits_moved"][way]])]
        for way in WAYS
    ]
    accuracy = [[way, *(f"{found['top1'][way][str(point)]['mean']:.1f}" for point in points)] for way in WAYS]
    losses = [["to step", *map(str, found["steps"][1:])]]
    losses += [[way, *(f"{loss:.2f}" for loss in found["train_loss"][way].values())] for way in WAYS]
    differences = [
        [pair, *(cell for point in points for cell in [_interval(found["difference"][pair][str(point)])])]
        for pair in found["difference"]
    ]
    head = ["steps", *map(str, points)]
    n = f"{seeds} seed{'' if seeds == 1 else 's'}"
    return "\n\n".join(
        [
            f"Right after insertion, {photographs} photographs of ImageNet\n"
            + _table([["", "right", "logits moved, %"], *right]),
            f"Top-1 on {document['settings']['held_out']} held-out pictures in per cent, mean of {n}\n"
            + _table([head, *accuracy]),
            f"Training loss since the evaluation before, where norms go by the batch, mean of {n}\n" + _table(losses),
            f"Differences in points, paired by seed, with 95 % intervals (Student's t, {n})\n"
            + _table(list(zip(*[head, *differences], strict=True))),
        ]
    )


def draw(document: results.Document) -> "Figure":
    """What each way leaves of the trained network, how it learns, and how far from the network without a gate.

    Raises:
        ImportError: matplotlib is missing.
    """
    found = summary(document)
    figure = new_figure(3.9)
    photographs, curves, differences = figure.subplots(1, 3, width_ratios=(0.8, 1.5, 1.5))
    _draw_photographs(photographs, found, document["settings"]["photographs"])
    _draw_curves(curves, document, found)
    _draw_differences(differences, found)
    return figure


def _draw_photographs(axes: "Axes", found: Mapping[str, Any], count: int) -> None:
    style_axes(axes, "", f"ImageNet photographs right, of {count}")
    for i, way in enumerate(WAYS):
        mean = statistics.fmean(found["photographs_right"][way])
        axes.bar(i, mean, 0.65, color=_COLOURS[way])
        axes.annotate(
            f"{mean:g}",
            (i, mean),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            color=_COLOURS[way],
            fontsize=FONT_SIZE,
            fontweight="bold",
        )
    axes.set_xticks(range(len(WAYS)), [way.replace(", ", ",\n").replace(" ", "\n") for way in WAYS])
    axes.set_ylim(0, 1.08 * count)
    axes.set_title("Right after insertion", fontsize=FONT_SIZE, loc="left")


def _draw_curves(axes: "Axes", document: results.Document, found: Mapping[str, Any]) -> None:
    style_axes(axes, "steps of fine-tuning", "top-1 on held-out pictures (%)")
    steps = found["steps"]
    for way in WAYS:
        tops = [run["top1"] for run in _runs(document, way)]
        by_step = list(zip(*tops, strict=True))
        if len(tops) > 1:
            low, high = [min(values) for values in by_step], [max(values) for values in by_step]
            axes.fill_between(steps, low, high, color=_COLOURS[way], alpha=0.15, linewidth=0)
        mean = [statistics.fmean(values) for values in by_step]
        axes.plot(steps, mean, color=_COLOURS[way], linewidth=2, marker="o", markersize=3.5, label=way)
    axes.set_xlim(0, steps[-1])
    axes.legend(loc="lower right", frameon=False, fontsize=SMALL_FONT_SIZE)
    axes.set_title(f"Fine-tuning (band: lowest to highest of {len(found['seeds'])})", fontsize=FONT_SIZE, loc="left")


def _draw_differences(axes: "Axes", found: Mapping[str, Any]) -> None:
    style_axes(axes, "steps of fine-tuning", f"difference from {PLAIN} (points)")
    steps = found["steps"]
    axes.axhline(0, color=DARK, linewidth=0.8)
    for way, baseline in PAIRS:
        if baseline != PLAIN:
            continue
        cells = [found["difference"][f"{way} - {baseline}"][str(step)] for step in steps]
        if all(cell["low"] is not None for cell in cells):
            low, high = [cell["low"] for cell in cells], [cell["high"] for cell in cells]
            axes.fill_between(steps, low, high, color=_COLOURS[way], alpha=0.15, linewidth=0)
        mean = [cell["mean"] for cell in cells]
        axes.plot(steps, mean, color=_COLOURS[way], linewidth=2, marker="o", markersize=3.5)
    axes.set_xlim(0, steps[-1])
    axes.set_title("Paired by seed (band: 95 % interval)", fontsize=FONT_SIZE, loc="left")


def _runs(document: results.Document, way: str) -> list[dict[str, Any]]:
    return [document["cases"][key(way, seed)] for seed in seeds_of(document)]


def _value(run: Mapping[str, Any], point: int | str) -> float:
    if point == AVERAGE:
        return statistics.fmean(run["top1"][1:])
    return run["top1"][run["steps"].index(point)]


def _train_loss(document: results.Document, way: str) -> dict[int, float]:
    """Mean over runs and the steps between two evaluations, by the later one."""
    losses = [statistics.fmean(values) for values in zip(*(r["train_loss"] for r in _runs(document, way)), strict=True)]
    return {b: statistics.fmean(losses[a:b]) for a, b in pairwise(_runs(document, way)[0]["steps"])}


def _difference(document: results.Document, point: int | str, way: str, baseline: str) -> Difference:
    return comparison(document, point, baseline).difference(way)


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _range(values: list[Any]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def _interval(difference: Mapping[str, float | None]) -> str:
    if difference["low"] is None:
        return f"{difference['mean']:+.1f}"
    return f"{difference['mean']:+.1f} ({difference['low']:+.1f} to {difference['high']:+.1f})"


def _table(rows: list[Any]) -> str:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            str(cell).ljust(width) if i == 0 else str(cell).rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
