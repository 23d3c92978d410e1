"""Where everything in the report's charts stands. They are SVG: across in per cent of the width, down in pixels.

A chart is then as wide as the screen, and its text as large as the text around it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ecanet.inspect.paired import paired_difference
from ecanet.study.conclusions import shown_number
from ecanet.study.html_report.reading import StudyFolder
from ecanet.study.html_report.series import cost_of_runs, curves, kernel_sweep, mean_curve, paired
from ecanet.untrusted import shown

try:
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError(f"the report of a study needs {error.name}: pip install 'ecanet[study]'") from error

#: Dots of a chart and runs with a line of their own, at most; beyond, means alone are drawn.
_MOST_DOTS, _MOST_LINES = 3_000, 150
#: Points of all lines of a chart, and of one line, at most.
_MOST_POINTS, _MOST_POINTS_OF_A_LINE = 40_000, 200
#: Height of a chart and of a row of differences, in pixels.
_HEIGHT, _ROW = 300, 40
#: Characters of a name where it stands at every dot.
_LONGEST_NAME = 60


@dataclass
class Mark:
    """A dot: how far to the right (per cent) and down (pixels), whose it is, and what it says when pointed at."""

    x: float
    y: float
    look: int
    tip: str
    is_mean: bool = False


@dataclass
class Span:
    """An interval, from one point to another."""

    x1: float
    y1: float
    x2: float
    y2: float
    look: int


@dataclass
class Line:
    """A curve, its points in thousandths of the width and in pixels; one for each stretch without a gap."""

    points: list[str]
    look: int
    tip: str
    is_mean: bool = False


@dataclass
class Chart:
    """A chart.

    Attributes:
        label: What it shows, in words, for who does not see it.
        x_title: Below the axis.
        y_title: Above the axis that stands; empty for none.
        x_ticks: Place in per cent, and text.
        y_ticks: Place in pixels, and text.
        height: In pixels.
        looks: Conditions in it, by their place in the study.
        zero: Where a line stands for no difference, in per cent; or lies for the baseline's mean, in pixels.
    """

    label: str
    x_title: str
    y_title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    height: int = _HEIGHT
    marks: list[Mark] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    looks: list[int] = field(default_factory=list)
    zero: float | None = None


@dataclass
class DifferenceRow:
    """A condition's differences from the baseline: its name, the numbers in words, and its part of the chart."""

    name: str
    look: int
    says: str
    chart: Chart


class _Axis:
    """Numbers to places from 0 to 1, over round numbers around all values."""

    def __init__(self, values: Iterable[float], pad: float = 0.04) -> None:
        given = list(values)
        low, high = min(given), max(given)
        room = (high - low) * pad or abs(low) * 0.01 or 1.0
        ticks = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(low - room, high + room)
        self.low, self.high = low - room, high + room
        self._ticks = [float(tick) for tick in ticks if self.low <= tick <= self.high]

    def at(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def across(self, value: float) -> float:
        """In per cent of the width."""
        return round(100 * self.at(value), 3)

    def down(self, value: float, height: int = _HEIGHT) -> float:
        """In pixels."""
        return round(height * (1 - self.at(value)), 2)

    def across_ticks(self) -> list[tuple[float, str]]:
        return [(self.across(tick), f"{tick:.6g}") for tick in self._ticks]

    def down_ticks(self) -> list[tuple[float, str]]:
        return [(self.down(tick), f"{tick:.6g}") for tick in self._ticks]


def difference_rows(found: StudyFolder) -> list[DifferenceRow]:
    """A row for each condition but the baseline that has a pair: interval, mean and every seed, all on one axis."""
    pairs = {name: by_seed for name, by_seed in paired(found).items() if by_seed}
    if not pairs:
        return []
    means = {name: paired_difference(list(by_seed.values())) for name, by_seed in pairs.items()}
    ends = [end for mean in means.values() for end in (mean.low, mean.high) if end is not None]
    axis = _Axis([0.0, *ends, *(value for of in pairs.values() for value in of.values())])
    dots = sum(map(len, pairs.values())) <= _MOST_DOTS
    rows = []
    for name, by_seed in pairs.items():
        look, mean = found.conditions.index(name), means[name]
        margin = None if mean.low is None or mean.high is None else (mean.high - mean.low) / 2
        says = shown_number(mean.mean, margin, "+")
        chart = Chart("", "", "", axis.across_ticks(), height=_ROW, zero=axis.across(0.0))
        if mean.low is not None and mean.high is not None:
            says += f" ({shown_number(mean.low, margin, '+')} to {shown_number(mean.high, margin, '+')})"
            chart.spans = [Span(axis.across(mean.low), 10, axis.across(mean.high), 10, look)]
        if dots:
            chart.marks = [
                Mark(axis.across(value), 26 + 4 * (i % 3 - 1), look, f"{_who(name)}, seed {seed}: {value:+.4g}")
                for i, (seed, value) in enumerate(by_seed.items())
            ]
        chart.marks.append(Mark(axis.across(mean.mean), 10, look, f"{_who(name)}, mean: {says}", is_mean=True))
        chart.label = f"{_who(name)} minus {found.conditions[0]} in {found.study.metric}: {says}, {len(by_seed)} seeds"
        rows.append(DifferenceRow(name, look, says, chart))
    return rows


def cost_chart(found: StudyFolder) -> Chart | None:
    """The metric of every run against what it cost, with the mean of each condition; None without a run."""
    metric, cost = found.study.metric, cost_of_runs(found)
    runs = [run for of in found.study.runs.values() for run in of]
    if not runs:
        return None
    x, y = _Axis(cost.values.values()), _Axis(run.metrics[metric] for run in runs)
    chart = Chart("", cost.title, metric, x.across_ticks(), y.down_ticks())
    said = []
    for look, (name, of) in enumerate(found.study.runs.items()):
        if not of:
            continue
        chart.looks.append(look)
        places = [(cost.values[name, run.seed], run.metrics[metric]) for run in of]
        if len(runs) <= _MOST_DOTS:
            chart.marks += [
                Mark(
                    x.across(a),
                    y.down(b),
                    look,
                    f"{_who(name)}, seed {run.seed}: {metric} {b:.6g}, {cost.title} {a:.4g}",
                )
                for run, (a, b) in zip(of, places, strict=True)
            ]
        a, b = (_mean(values) for values in zip(*places, strict=True))
        chart.marks.append(
            Mark(
                x.across(a),
                y.down(b),
                look,
                f"{_who(name)}, mean: {metric} {b:.6g}, {cost.title} {a:.4g}",
                is_mean=True,
            )
        )
        said.append(f"{_who(name)} {b:.6g} at {a:.4g}")
    chart.label = f"{metric} against {cost.title}, means: {_some(said)}"
    return chart


def curve_charts(found: StudyFolder) -> dict[str, Chart]:
    """A chart for each curve that the runs keep: the mean of each condition thick, each run thin."""
    return {curve: _curve_chart(found.conditions, curve, by_name) for curve, by_name in curves(found).items()}


def _curve_chart(conditions: Sequence[str], curve: str, by_name: Mapping[str, Mapping[int, list[float]]]) -> Chart:
    means = {name: mean_curve(list(runs.values())) for name, runs in by_name.items()}
    runs = [run for of in by_name.values() for run in of.values()]
    thin = runs if len(runs) <= _MOST_LINES else []
    drawn = [*means.values(), *thin]
    values = [value for run in drawn for value in run if _is_drawn(value)] or [0.0]
    last = max(map(len, drawn))
    y = _Axis(values)
    epochs = [tick for tick in MaxNLocator(nbins=6, integer=True).tick_values(1, last) if 1 < tick <= last]
    ticks = [(round(100 * (tick - 1) / max(1, last - 1), 3), f"{tick:g}") for tick in (1, *epochs)]
    points = max(2, min(_MOST_POINTS_OF_A_LINE, _MOST_POINTS // len(drawn)))
    chart = Chart("", "epoch", curve, ticks, y.down_ticks())

    def line(run: Sequence[float], look: int, who: str, is_mean: bool = False) -> Line:
        return Line(_stretches(run, last, y, points), look, f"{who}: {curve} {run[-1]:.6g} at the end", is_mean)

    for name, of in by_name.items():
        look = conditions.index(name)
        chart.looks.append(look)
        if thin and len(of) > 1:
            chart.lines += [line(run, look, f"{_who(name)}, seed {seed}") for seed, run in of.items()]
    chart.lines += [line(mean, conditions.index(name), f"{_who(name)}, mean", True) for name, mean in means.items()]
    ends = [f"{_who(name)} {mean[0]:.4g} to {mean[-1]:.4g}" for name, mean in means.items()]
    chart.label = f"{curve} over {last} epochs, mean of each condition from the first epoch to the last: {_some(ends)}"
    return chart


def _is_drawn(value: float) -> bool:
    return math.isfinite(value) and abs(value) < 1e100


def _stretches(run: Sequence[float], last: int, y: _Axis, points: int) -> list[str]:
    """Points of a curve, no more than asked for, each stretch without a gap a text of its own."""
    step = max(1, math.ceil(len(run) / points))
    chosen = sorted({*range(0, len(run), step), len(run) - 1})
    stretches: list[list[str]] = [[]]
    for i in chosen:
        if _is_drawn(run[i]):
            stretches[-1].append(f"{1000 * i / max(1, last - 1):.4g},{y.down(run[i]):.4g}")
        elif stretches[-1]:
            stretches.append([])
    return [" ".join(stretch) for stretch in stretches if len(stretch) > 1]


def sweep_chart(found: StudyFolder) -> Chart | None:
    """The metric by kernel size: the mean with its 95 % interval, every run, and a line at the baseline's mean."""
    sizes, metric = kernel_sweep(found), found.study.metric
    if not sizes:
        return None
    values = {size: [run.metrics[metric] for run in found.study.runs[name]] for size, name in sizes.items()}
    means = {size: paired_difference(of) for size, of in values.items()}
    baseline = [run.metrics[metric] for run in found.study.runs[found.conditions[0]]]
    ends = [end for mean in means.values() for end in (mean.low, mean.high) if end is not None]
    y = _Axis([*ends, *(value for of in values.values() for value in of), *([_mean(baseline)] if baseline else [])])
    places = {size: 100 * (i + 0.5) / len(sizes) for i, size in enumerate(sizes)}
    chart = Chart("", "kernel size k", metric, [(round(x, 3), size) for size, x in places.items()], y.down_ticks())
    chart.zero = y.down(_mean(baseline)) if baseline else None
    said = []
    for size, name in sizes.items():
        x, look, mean = round(places[size], 3), found.conditions.index(name), means[size]
        says = f"k = {size} ({_who(name)}), mean: {mean.mean:.6g}"
        if mean.low is not None and mean.high is not None:
            says += f", 95 % interval {mean.low:.6g} to {mean.high:.6g}"
            chart.spans.append(Span(x, y.down(mean.low), x, y.down(mean.high), look))
        chart.marks += [
            Mark(
                round(x + 100 / len(sizes) / 5, 3),
                y.down(run.metrics[metric]),
                look,
                f"{_who(name)}, seed {run.seed}: {run.metrics[metric]:.6g}",
            )
            for run in found.study.runs[name][: _MOST_DOTS // len(sizes)]
        ]
        chart.marks.append(Mark(x, y.down(mean.mean), look, says, is_mean=True))
        said.append(f"{size} {mean.mean:.6g}")
    chart.label = f"Mean {metric} by kernel size: {_some(said)}"
    return chart


def _who(name: str) -> str:
    """A name short enough to stand at every dot."""
    return shown(name, _LONGEST_NAME)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _some(parts: Sequence[str], most: int = 30) -> str:
    return "; ".join(parts[:most]) + (f"; and {len(parts) - most} more" if len(parts) > most else "")
