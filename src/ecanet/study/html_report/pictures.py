"""The report's charts as pictures for papers and slides, in the colours and dashes of all figures of the library."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ecanet.inspect import plot_gates_per_class, plot_training_curves
from ecanet.inspect.paired import paired_difference
from ecanet.inspect.style import DARK, DASHES, FONT_SIZE, GREY, SMALL_FONT_SIZE, looks, new_figure, style_axes
from ecanet.study.conclusions import shown_number
from ecanet.study.html_report.reading import StudyFolder
from ecanet.study.html_report.series import cost_of_runs, curves, kernel_sweep, paired
from ecanet.study.results import slug
from ecanet.untrusted import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Largest number of conditions in a picture, as more cannot be distinguished, and of characters in a label.
_MAX_CONDITIONS, _MAX_LABEL = 24, 40
#: Height of a row of differences, and of everything above and below the rows, in inches.
_ROW, _AROUND = 0.42, 1.1
#: Marker for each dash pattern: conditions of the same colour differ in both.
_MARKERS = dict(zip(DASHES, "os^D", strict=True))


def draw(contents: StudyFolder) -> Iterator[tuple[str, "Figure"]]:
    """The pictures that the study has data for, each with the name of its file.

    Args:
        contents: What is in the study's folder.
    """
    names = {name: label for name, label in _labels(contents.conditions).items() if contents.study.runs[name]}
    pairs = {names[name]: list(runs.values()) for name, runs in paired(contents).items() if runs and name in names}
    if pairs:
        yield "differences.png", _differences(contents, pairs, list(names.values()))
    if names:
        yield "cost.png", _cost(contents, names)
    sizes = {size: name for size, name in kernel_sweep(contents).items() if name in names}
    if sizes:
        yield "kernel_sweep.png", _sweep(contents, sizes)
    for curve, by_name in list(curves(contents).items())[:1]:  # the first is the metric's curve, if it has one
        drawn = {names[name]: _by_seed(contents, runs) for name, runs in by_name.items() if name in names}
        yield f"curve-{slug(curve)}.png", plot_training_curves(drawn, ylabel=_safe(curve))
    for name, learned in contents.gates.items():
        values = {_safe(gate): value for gate, value in learned.values.items()}
        yield f"gates-{slug(name)}.png", plot_gates_per_class(values, [_safe(each, 24) for each in learned.classes])


def _by_seed(contents: StudyFolder, runs: dict[int, list[float]]) -> list[list[float]]:
    """Curves in the order of their seeds, only for seeds that the baseline has, so that they pair up."""
    base = {run.seed for run in contents.study.runs[contents.conditions[0]]}
    return [run for seed, run in sorted(runs.items()) if seed in base] or list(runs.values())


def _labels(names: Sequence[str]) -> dict[str, str]:
    """Labels of the first names: short, different from each other, and not read as formulas by matplotlib."""
    labels: dict[str, str] = {}
    for name in names[:_MAX_CONDITIONS]:
        label = _safe(name)
        labels[name] = label if label not in labels.values() else f"{label} ({len(labels) + 1})"
    return labels


def _safe(text: str, max_characters: int = _MAX_LABEL) -> str:
    return shown(text, max_characters).replace("$", r"\$")


def _differences(contents: StudyFolder, pairs: dict[str, list[float]], names: list[str]) -> "Figure":
    figure = new_figure(_AROUND + _ROW * len(pairs))
    axes = figure.subplots()
    metric, baseline = _safe(contents.study.metric), names[0]
    style_axes(axes, f"difference in {metric} from {baseline!r}, paired by seed", grid="x")
    axes.axvline(0, color=GREY, linewidth=1.5)
    styles = looks(names)
    for place, (name, values) in enumerate(pairs.items()):
        (colour, dashes), mean = styles[name], paired_difference(values)
        margin = None if mean.low is None or mean.high is None else (mean.high - mean.low) / 2
        text = shown_number(mean.mean, margin, "+")
        if mean.low is not None and mean.high is not None:
            text += f" ({shown_number(mean.low, margin, '+')} to {shown_number(mean.high, margin, '+')})"
            axes.plot([mean.low, mean.high], [place, place], color=colour, linewidth=3, solid_capstyle="round")
        axes.plot(values, [place + 0.27] * len(values), _MARKERS[dashes], color=colour, markersize=4, alpha=0.7)
        axes.plot(mean.mean, place, _MARKERS[dashes], color=colour, markersize=8)
        transform = axes.get_yaxis_transform()
        axes.text(1.02, place, text, transform=transform, va="center", fontsize=SMALL_FONT_SIZE, color=DARK)
    axes.set_yticks(range(len(pairs)), list(pairs), fontsize=FONT_SIZE)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.set_title("Large mark, bar: mean, 95 % interval; small: every seed", fontsize=SMALL_FONT_SIZE, loc="left")
    return figure


def _cost(contents: StudyFolder, names: dict[str, str]) -> "Figure":
    figure = new_figure(4.2)
    axes, cost, metric = figure.subplots(), cost_of_runs(contents), contents.study.metric
    style_axes(axes, cost.title, _safe(metric))
    styles = looks(list(names.values()))
    for name, label in names.items():
        colour, dashes = styles[label]
        x = [cost.values[name, run.seed] for run in contents.study.runs[name]]
        y = [run.metrics[metric] for run in contents.study.runs[name]]
        axes.plot(x, y, _MARKERS[dashes], color=colour, markersize=4.5, alpha=0.6)
        mean = sum(x) / len(x), sum(y) / len(y)
        axes.plot(*mean, _MARKERS[dashes], color=colour, markersize=9, markeredgecolor=DARK, label=label)
    axes.margins(0.06)
    _legend(figure)
    axes.set_title("Large marks: mean of each condition; small marks: every run", fontsize=SMALL_FONT_SIZE, loc="left")
    return figure


def _sweep(contents: StudyFolder, sizes: dict[str, str]) -> "Figure":
    figure = new_figure(3.8)
    axes, metric = figure.subplots(), contents.study.metric
    style_axes(axes, "kernel size k", _safe(metric))
    colour = looks([next(iter(sizes.values()))]).popitem()[1][0]
    baseline = [run.metrics[metric] for run in contents.study.runs[contents.conditions[0]]]
    if baseline:
        label = f"mean of {_safe(contents.conditions[0])}"
        axes.axhline(sum(baseline) / len(baseline), color=DARK, linewidth=1.5, linestyle="--", label=label)
    for place, name in enumerate(sizes.values()):
        values = [run.metrics[metric] for run in contents.study.runs[name]]
        mean = paired_difference(values)
        if mean.low is not None and mean.high is not None:
            axes.plot([place, place], [mean.low, mean.high], color=colour, linewidth=3, solid_capstyle="round")
        axes.plot([place + 0.15] * len(values), values, "o", color=colour, markersize=4, alpha=0.6)
        axes.plot(place, mean.mean, "o", color=colour, markersize=9, label="" if place else "mean, 95 % interval")
    axes.set_xticks(range(len(sizes)), [_safe(size, 12) for size in sizes])
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    _legend(figure)
    return figure


def _legend(figure: "Figure") -> None:
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=SMALL_FONT_SIZE)
