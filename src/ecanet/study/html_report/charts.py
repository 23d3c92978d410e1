"""The layout of the report's charts, which are SVG: x is in per cent of the width, y is in pixels from the top.

So a chart fills the width of the page, and its text has the size of the text around it.
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

#: Largest numbers of dots in a chart, and of runs with their own line; with more, only means are drawn.
_MAX_DOTS, _MAX_LINES = 3_000, 150
#: Largest numbers of points in all lines of a chart, and in one line.
_MAX_POINTS, _MAX_POINTS_PER_LINE = 40_000, 200
#: Height of a chart and of a row of differences, in pixels.
_HEIGHT, _ROW = 300, 40
#: Longest name in the text of a dot, in characters.
_MAX_NAME = 60


@dataclass
class Mark:
    """A dot.

    Attributes:
        x: Position from the left, in per cent of the width.
        y: Position from the top, in pixels.
        look: Its condition, by index in the study.
        tip: Text that is shown when the pointer is on it.
        is_mean: Whether it is a mean, which is drawn larger.
    """

    x: float
    y: float
    look: int
    tip: str
    is_mean: bool = False


@dataclass
class Span:
    """An interval, drawn as a bar from one point to another; positions as in :class:`Mark`."""

    x1: float
    y1: float
    x2: float
    y2: float
    look: int


@dataclass
class Line:
    """A curve. ``points`` has a text for each stretch without a gap: x in thousandths of the width, y in pixels."""

    points: list[str]
    look: int
    tip: str
    is_mean: bool = False


@dataclass
class Chart:
    """A chart.

    Attributes:
        label: What it shows, in words, for screen readers.
        x_title: Title below the x axis.
        y_title: Title above the y axis; empty for none.
        x_ticks: Position in per cent, and text.
        y_ticks: Position in pixels, and text.
        height: Height in pixels.
        marks: Dots.
        spans: Intervals.
        lines: Curves.
        looks: Conditions in the legend, by index in the study.
        zero: Position of the vertical line for no difference, in per cent, or of the horizontal line for the baseline's
            mean, in pixels; None for no line.
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
    """A condition's differences from the baseline: its name, the numbers as text, and its part of the chart."""

    name: str
    look: int
    text: str
    chart: Chart


class _Axis:
    """Maps values to positions from 0 to 1, with some room around all values and ticks at round numbers."""

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


def difference_rows(contents: StudyFolder) -> list[DifferenceRow]:
    """A row for each condition that shares a seed with the baseline: interval, mean and every seed, on one axis."""
    pairs = {name: by_seed for name, by_seed in paired(contents).items() if by_seed}
    if not pairs:
        return []
    means = {name: paired_difference(list(by_seed.values())) for name, by_seed in pairs.items()}
    ends = [end for mean in means.values() for end in (mean.low, mean.high) if end is not None]
    axis = _Axis([0.0, *ends, *(value for by_seed in pairs.values() for value in by_seed.values())])
    has_dots = sum(map(len, pairs.values())) <= _MAX_DOTS
    rows = []
    for name, by_seed in pairs.items():
        look, mean = contents.conditions.index(name), means[name]
        margin = None if mean.low is None or mean.high is None else (mean.high - mean.low) / 2
        text = shown_number(mean.mean, margin, "+")
        chart = Chart("", "", "", axis.across_ticks(), height=_ROW, zero=axis.across(0.0))
        if mean.low is not None and mean.high is not None:
            text += f" ({shown_number(mean.low, margin, '+')} to {shown_number(mean.high, margin, '+')})"
            chart.spans = [Span(axis.across(mean.low), 10, axis.across(mean.high), 10, look)]
        if has_dots:
            chart.marks = [
                Mark(axis.across(value), 26 + 4 * (i % 3 - 1), look, f"{_short_name(name)}, seed {seed}: {value:+.4g}")
                for i, (seed, value) in enumerate(by_seed.items())
            ]
        chart.marks.append(Mark(axis.across(mean.mean), 10, look, f"{_short_name(name)}, mean: {text}", is_mean=True))
        pair = f"{_short_name(name)} minus {contents.conditions[0]}"
        chart.label = f"{pair} in {contents.study.metric}: {text}, {len(by_seed)} seeds"
        rows.append(DifferenceRow(name, look, text, chart))
    return rows


def cost_chart(contents: StudyFolder) -> Chart | None:
    """The metric of every run against its cost, with the mean of each condition; None if there is no run."""
    metric, cost = contents.study.metric, cost_of_runs(contents)
    runs = [run for of_condition in contents.study.runs.values() for run in of_condition]
    if not runs:
        return None
    x, y = _Axis(cost.values.values()), _Axis(run.metrics[metric] for run in runs)
    chart = Chart("", cost.title, metric, x.across_ticks(), y.down_ticks())
    mean_texts = []
    for look, (name, of_condition) in enumerate(contents.study.runs.items()):
        if not of_condition:
            continue
        chart.looks.append(look)
        points = [(cost.values[name, run.seed], run.metrics[metric]) for run in of_condition]
        if len(runs) <= _MAX_DOTS:
            chart.marks += [
                Mark(
                    x.across(a),
                    y.down(b),
                    look,
                    f"{_short_name(name)}, seed {run.seed}: {metric} {b:.6g}, {cost.title} {a:.4g}",
                )
                for run, (a, b) in zip(of_condition, points, strict=True)
            ]
        a, b = (_mean(values) for values in zip(*points, strict=True))
        chart.marks.append(
            Mark(
                x.across(a),
                y.down(b),
                look,
                f"{_short_name(name)}, mean: {metric} {b:.6g}, {cost.title} {a:.4g}",
                is_mean=True,
            )
        )
        mean_texts.append(f"{_short_name(name)} {b:.6g} at {a:.4g}")
    chart.label = f"{metric} against {cost.title}, means: {_joined(mean_texts)}"
    return chart


def curve_charts(contents: StudyFolder) -> dict[str, Chart]:
    """A chart for each curve of the runs: the mean of each condition as a thick line, each run as a thin one."""
    return {curve: _curve_chart(contents.conditions, curve, by_name) for curve, by_name in curves(contents).items()}


def _curve_chart(conditions: Sequence[str], curve: str, by_name: Mapping[str, Mapping[int, list[float]]]) -> Chart:
    means = {name: mean_curve(list(runs.values())) for name, runs in by_name.items()}
    runs = [run for by_seed in by_name.values() for run in by_seed.values()]
    thin = runs if len(runs) <= _MAX_LINES else []
    drawn = [*means.values(), *thin]
    values = [value for run in drawn for value in run if _is_drawn(value)] or [0.0]
    last = max(map(len, drawn))
    y = _Axis(values)
    epochs = [tick for tick in MaxNLocator(nbins=6, integer=True).tick_values(1, last) if 1 < tick <= last]
    ticks = [(round(100 * (tick - 1) / max(1, last - 1), 3), f"{tick:g}") for tick in (1, *epochs)]
    points = max(2, min(_MAX_POINTS_PER_LINE, _MAX_POINTS // len(drawn)))
    chart = Chart("", "epoch", curve, ticks, y.down_ticks())

    def line(run: Sequence[float], look: int, title: str, is_mean: bool = False) -> Line:
        return Line(_stretches(run, last, y, points), look, f"{title}: {curve} {run[-1]:.6g} at the end", is_mean)

    for name, by_seed in by_name.items():
        look = conditions.index(name)
        chart.looks.append(look)
        if thin and len(by_seed) > 1:
            chart.lines += [line(run, look, f"{_short_name(name)}, seed {seed}") for seed, run in by_seed.items()]
    ends = []
    for name, mean in means.items():
        chart.lines.append(line(mean, conditions.index(name), f"{_short_name(name)}, mean", True))
        ends.append(f"{_short_name(name)} {mean[0]:.4g} to {mean[-1]:.4g}")
    chart.label = f"{curve} over {last} epochs, mean of each condition, first epoch to last: {_joined(ends)}"
    return chart


def _is_drawn(value: float) -> bool:
    return math.isfinite(value) and abs(value) < 1e100


def _stretches(run: Sequence[float], last: int, y: _Axis, points: int) -> list[str]:
    """At most ``points`` points of a curve, as a text for each stretch without a gap."""
    step = max(1, math.ceil(len(run) / points))
    chosen = sorted({*range(0, len(run), step), len(run) - 1})
    stretches: list[list[str]] = [[]]
    for i in chosen:
        if _is_drawn(run[i]):
            stretches[-1].append(f"{1000 * i / max(1, last - 1):.4g},{y.down(run[i]):.4g}")
        elif stretches[-1]:
            stretches.append([])
    return [" ".join(stretch) for stretch in stretches if len(stretch) > 1]


def sweep_chart(contents: StudyFolder) -> Chart | None:
    """The metric by kernel size: the mean with its 95 % interval, every run, and a line at the baseline's mean."""
    sizes, metric = kernel_sweep(contents), contents.study.metric
    if not sizes:
        return None
    values = {size: [run.metrics[metric] for run in contents.study.runs[name]] for size, name in sizes.items()}
    means = {size: paired_difference(of_size) for size, of_size in values.items()}
    baseline = [run.metrics[metric] for run in contents.study.runs[contents.conditions[0]]]
    ends = [end for mean in means.values() for end in (mean.low, mean.high) if end is not None]
    every_value = [value for of_size in values.values() for value in of_size]
    y = _Axis([*ends, *every_value, *([_mean(baseline)] if baseline else [])])
    places = {size: 100 * (i + 0.5) / len(sizes) for i, size in enumerate(sizes)}
    chart = Chart("", "kernel size k", metric, [(round(x, 3), size) for size, x in places.items()], y.down_ticks())
    chart.zero = y.down(_mean(baseline)) if baseline else None
    mean_texts = []
    for size, name in sizes.items():
        x, look, mean = round(places[size], 3), contents.conditions.index(name), means[size]
        tip = f"k = {size} ({_short_name(name)}), mean: {mean.mean:.6g}"
        if mean.low is not None and mean.high is not None:
            tip += f", 95 % interval {mean.low:.6g} to {mean.high:.6g}"
            chart.spans.append(Span(x, y.down(mean.low), x, y.down(mean.high), look))
        chart.marks += [
            Mark(
                round(x + 100 / len(sizes) / 5, 3),
                y.down(run.metrics[metric]),
                look,
                f"{_short_name(name)}, seed {run.seed}: {run.metrics[metric]:.6g}",
            )
            for run in contents.study.runs[name][: _MAX_DOTS // len(sizes)]
        ]
        chart.marks.append(Mark(x, y.down(mean.mean), look, tip, is_mean=True))
        mean_texts.append(f"{size} {mean.mean:.6g}")
    chart.label = f"Mean {metric} by kernel size: {_joined(mean_texts)}"
    return chart


def _short_name(name: str) -> str:
    """A name, shortened for the text of a dot."""
    return shown(name, _MAX_NAME)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _joined(parts: Sequence[str], max_parts: int = 30) -> str:
    more = len(parts) - max_parts
    return "; ".join(parts[:max_parts]) + (f"; and {more} more" if more > 0 else "")
