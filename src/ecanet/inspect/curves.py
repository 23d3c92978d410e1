"""Figure: training curves of several variants, each with several seeds, and their paired differences."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ecanet.inspect.paired import Difference, paired_difference
from ecanet.inspect.style import DARK, FONT_SIZE, SMALL_FONT_SIZE, looks, new_figure, spread, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Curves = Mapping[str, Sequence[Sequence[float]]]
#: Inches: the panels at least, a line of text, and what axis labels and title take of a panel.
_CURVES, _DIFFERENCES, _LINE, _AROUND = 3.4, 2.7, 0.19, 0.8
#: Most epochs with differences: those of the second half, evenly, with the last.
_EPOCHS = 4


class _End(NamedTuple):
    """A text at the right of a panel, and where its line leads."""

    text: str
    colour: str
    x: float
    y: float


def plot_training_curves(
    curves: _Curves,
    *,
    ylabel: str = "top-1 accuracy (%)",
    xlabel: str = "epoch",
    title: str = "",
    ylim: tuple[float, float] | None = None,
) -> "Figure":
    """Draw one value per epoch for several variants, and how late epochs differ from the first variant's.

    Upper panel: the mean of the runs thick, every run thin. The mean covers the epochs that every run of the variant
    has. If a run is NaN, so is the mean, and the line has a gap. Every line is labelled at its end.

    Lower panel: the mean of the differences from the first variant, with a 95 % interval by Student's t and a dot for
    every pair, at up to four epochs of the second half of training, where the curves above lie on one another. Runs are
    paired by position, so the i-th run of every variant must have the same seed. Variants with another number of runs
    than the first have no differences; without any the panel is left out. One pair has no interval.

    Args:
        curves: The runs (seeds) of each variant by name; a run is a sequence of values for the epochs 1, 2, ..., and
            runs may differ in length. A name that speaks of no gate, ECA, SE, a neutral gate, ... has that idea's
            colour.
        ylabel: What is drawn, with its unit.
        xlabel: Label of the horizontal axis.
        title: Title above the axes.
        ylim: Lowest and highest value of the upper panel; by default all values.

    Returns:
        A figure to ``.savefig("curves.png")``. A mean's line has the variant's name as label; lines of runs have none.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: a variant holds numbers instead of runs.
        ValueError: no variants, or a variant without a run or with an empty one.

    Example:
        >>> figure = plot_training_curves({"none": [[60, 70], [62, 69]], "ECA": [[63, 72], [64, 71]]})
        >>> [(line.get_label(), line.get_ydata().tolist()) for line in figure.axes[0].lines[2:3]]
        [('none', [61.0, 69.5])]
        >>> [text.get_text().splitlines() for text in figure.axes[1].texts]
        [['ECA', '+2.00 (+2.00 to +2.00)']]
    """
    _check_curves(curves)
    differences, epochs = _late_differences(curves)
    heights = [max(_CURVES, _AROUND + _LINE * len(curves))]
    if differences:
        heights.append(max(_DIFFERENCES, _AROUND + 2.2 * _LINE * len(differences)))
    figure = new_figure(sum(heights))
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_curves(panels[0], curves, heights[0] - _AROUND, xlabel, ylabel, ylim)
    panels[0].set_title(title, fontsize=FONT_SIZE + 1, loc="left")
    if differences:
        _draw_differences(panels[1], curves, differences, epochs, heights[1] - _AROUND)
        panels[1].set_xlabel(xlabel, fontsize=FONT_SIZE)
    return figure


def _check_curves(curves: _Curves) -> None:
    if not curves:
        raise ValueError("curves must have at least one entry, such as {'ECA': [[60.0, 70.0]]}, got none")
    for name, runs in curves.items():
        if not all(isinstance(run, Sequence) for run in runs):
            raise TypeError(f"curves[{name!r}] must hold one sequence for every run: for a single run write [run]")
        if not runs or not all(runs):
            raise ValueError(f"curves[{name!r}] must hold at least one run and every run at least one value")


def _draw_curves(
    axes: "Axes", curves: _Curves, height: float, xlabel: str, ylabel: str, ylim: tuple[float, float] | None
) -> None:
    from matplotlib.ticker import MaxNLocator

    seeds = sorted({len(runs) for runs in curves.values()})
    if seeds[-1] > 1:
        count = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else seeds[0]
        xlabel += f"   (thick: mean of {count} runs, thin: each run)"
    style_axes(axes, xlabel, ylabel)
    ends = []
    for name, (colour, dashes) in looks(list(curves)).items():
        runs = curves[name]
        mean = [sum(values) / len(runs) for values in zip(*runs, strict=False)]
        dot = "o" if len(mean) == 1 else None  # a line with one point is invisible
        if len(runs) > 1:
            for run in runs:
                axes.plot(range(1, len(run) + 1), run, color=colour, linewidth=0.7, alpha=0.45, linestyle=dashes)
        axes.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=2, label=name, linestyle=dashes, marker=dot)
        finite = [(epoch, value) for epoch, value in enumerate(mean, start=1) if math.isfinite(value)]
        if finite:
            ends.append(_End(name, colour, *finite[-1]))
    last = max(len(run) for runs in curves.values() for run in runs)
    axes.set_xlim((1, last) if last > 1 else (0.5, 1.5))
    ticks = MaxNLocator(integer=True, steps=[1, 2, 5, 10]).tick_values(1, last)
    axes.set_xticks([1, *(int(tick) for tick in ticks if 1 < tick <= last)])
    axes.set_ylim(ylim)
    _label(axes, ends, height)


def _late_differences(curves: _Curves) -> tuple[dict[str, list[list[float]]], list[int]]:
    """Differences of each pair of runs by variant and epoch, and these epochs, from 1."""
    (_, base), *others = curves.items()
    paired = {name: runs for name, runs in others if len(runs) == len(base)}
    if not paired:
        return {}, []
    last = min(len(run) for runs in (base, *paired.values()) for run in runs)
    first = last // 2 + 1
    count = min(_EPOCHS, last - first + 1)
    epochs = [last - round(i * (last - first) / max(1, count - 1)) for i in reversed(range(count))]
    differences = {
        name: [[run[epoch - 1] - other[epoch - 1] for run, other in zip(runs, base, strict=True)] for epoch in epochs]
        for name, runs in paired.items()
    }
    return differences, epochs


def _draw_differences(
    axes: "Axes",
    curves: _Curves,
    differences: Mapping[str, Sequence[Sequence[float]]],
    epochs: Sequence[int],
    height: float,
) -> None:
    baseline, seeds = next(iter(curves.items()))
    style_axes(axes, ylabel="difference")
    axes.axhline(0, color=looks(list(curves))[baseline][0], linewidth=1.5)
    told = f" (mean, 95 % interval, dots: {len(seeds)} seeds)" if len(seeds) > 1 else " (one seed: no interval)"
    axes.set_title(f"Difference from {baseline!r}, paired by seed{told}", fontsize=SMALL_FONT_SIZE, loc="left")
    ends = []
    step = 0.7 / len(differences)
    for i, (name, by_epoch) in enumerate(differences.items()):
        colour, dashes = looks(list(curves))[name]
        end = None
        for place, pairs in enumerate(by_epoch):
            if not all(map(math.isfinite, pairs)):
                continue
            x, found = place + (i - (len(differences) - 1) / 2) * step, paired_difference(pairs)
            if found.low is not None and found.high is not None:
                axes.plot([x, x], [found.low, found.high], color=colour, linewidth=1.8, linestyle=dashes)
                axes.plot([x + step / 6] * len(pairs), pairs, ".", color=colour, markersize=4)
            axes.plot(x, found.mean, "o", color=colour, markersize=6.5)
            end = _End(f"{name}\n{_in_words(found)}", colour, x, found.mean)
        if end:
            ends.append(end)
    axes.set_xlim(-0.5, len(epochs) - 0.5)
    axes.set_xticks(range(len(epochs)), [str(epoch) for epoch in epochs])
    axes.margins(y=0.08)
    _label(axes, ends, height)


def _in_words(difference: Difference) -> str:
    interval = "" if difference.low is None else f" ({difference.low:+.2f} to {difference.high:+.2f})"
    return f"{difference.mean:+.2f}{interval}"


def _label(axes: "Axes", ends: Sequence[_End], height: float) -> None:
    """Texts in a column on the right, apart from one another, with lines to what they label.

    Args:
        axes: With its final limits.
        ends: What is outside the limits gets no text.
        height: Of the axes in inches, roughly.
    """
    bottom, top = axes.get_ylim()
    ends = [end for end in ends if bottom <= end.y <= top]
    rows = max((end.text.count("\n") + 1 for end in ends), default=1)
    places = spread([(end.y - bottom) / (top - bottom) for end in ends], rows * _LINE / height, 0.04, 0.96)
    for end, place in zip(ends, places, strict=True):
        axes.annotate(
            end.text,
            xy=(end.x, end.y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=end.colour if rows == 1 else DARK,  # small text in a light colour cannot be read
            fontsize=FONT_SIZE if rows == 1 else SMALL_FONT_SIZE,
            fontweight="bold" if rows == 1 else "normal",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": end.colour,
                "linewidth": 0.7 if rows == 1 else 1.5,
                "shrinkA": 1,
                "shrinkB": 1,
                "relpos": (0, 0.5),
                "alpha": 0.6,
            },
            annotation_clip=False,
        )
