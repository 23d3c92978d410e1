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
#: Inches: smallest heights of both panels, height of a line of text, and of a panel's axis labels and title.
_CURVES, _DIFFERENCES, _LINE, _AROUND = 3.4, 2.7, 0.19, 0.8
#: Largest number of epochs with differences: evenly spaced in the second half, including the last.
_MAX_EPOCHS = 4


class _End(NamedTuple):
    """A label at the right of a panel, and the point to which its line leads."""

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
    """Draw one value per epoch for several variants, and the differences from the first variant in late epochs.

    Upper panel: the mean of the runs as a thick line, each run as a thin one. The mean covers the epochs that every run
    of the variant has. If a run is NaN, so is the mean, and the line has a gap. Every mean is labelled at its end.

    Lower panel: the mean of the differences from the first variant, with a 95 % interval by Student's t and a dot for
    every pair, at up to four epochs of the second half of training, where the curves above overlap. Runs are paired by
    position, so the i-th run of every variant must have the same seed. Variants with a different number of runs than
    the first have no differences; if none has any, the panel is left out. A single pair has no interval.

    Args:
        curves: The runs (seeds) of each variant by name; a run is a sequence of values for the epochs 1, 2, ..., and
            runs may differ in length. A name that mentions no gate, ECA, SE, a neutral gate, ... has the colour that
            all figures use for it.
        ylabel: What is drawn, with its unit.
        xlabel: Label of the horizontal axis.
        title: Title above the axes.
        ylim: Lowest and highest value of the upper panel; by default those of the data.

    Returns:
        A figure to ``.savefig("curves.png")``. A mean's line has the variant's name as label; lines of runs have none.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: a variant holds numbers instead of runs.
        ValueError: there are no variants, a variant has no run, or a run is empty.

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
    """Differences of each pair of runs by variant and epoch, and the numbers of these epochs, from 1."""
    (_, base), *others = curves.items()
    paired = {name: runs for name, runs in others if len(runs) == len(base)}
    if not paired:
        return {}, []
    last = min(len(run) for runs in (base, *paired.values()) for run in runs)
    first = last // 2 + 1
    count = min(_MAX_EPOCHS, last - first + 1)
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
    note = f" (mean, 95 % interval, dots: {len(seeds)} seeds)" if len(seeds) > 1 else " (one seed: no interval)"
    axes.set_title(f"Difference from {baseline!r}, paired by seed{note}", fontsize=SMALL_FONT_SIZE, loc="left")
    ends = []
    step = 0.7 / len(differences)
    for i, (name, by_epoch) in enumerate(differences.items()):
        colour, dashes = looks(list(curves))[name]
        end = None
        for place, pairs in enumerate(by_epoch):
            if not all(map(math.isfinite, pairs)):
                continue
            x, difference = place + (i - (len(differences) - 1) / 2) * step, paired_difference(pairs)
            if difference.low is not None and difference.high is not None:
                axes.plot([x, x], [difference.low, difference.high], color=colour, linewidth=1.8, linestyle=dashes)
                axes.plot([x + step / 6] * len(pairs), pairs, ".", color=colour, markersize=4)
            axes.plot(x, difference.mean, "o", color=colour, markersize=6.5)
            end = _End(f"{name}\n{_as_text(difference)}", colour, x, difference.mean)
        if end:
            ends.append(end)
    axes.set_xlim(-0.5, len(epochs) - 0.5)
    axes.set_xticks(range(len(epochs)), [str(epoch) for epoch in epochs])
    axes.margins(y=0.08)
    _label(axes, ends, height)


def _as_text(difference: Difference) -> str:
    interval = "" if difference.low is None else f" ({difference.low:+.2f} to {difference.high:+.2f})"
    return f"{difference.mean:+.2f}{interval}"


def _label(axes: "Axes", ends: Sequence[_End], height: float) -> None:
    """Write labels in a column on the right, without overlaps, each with a line to what it labels.

    Args:
        axes: The axes, with their final limits.
        ends: The labels; those of points outside the limits are left out.
        height: Approximate height of the axes, in inches.
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
