"""Figure: training curves of several variants, each with several seeds."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ecanet.inspect.style import COLOURS, FONT_SIZE, new_figure, spread, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEIGHT = 4.5


def plot_training_curves(
    curves: Mapping[str, Sequence[Sequence[float]]],
    *,
    ylabel: str = "top-1 accuracy (%)",
    xlabel: str = "epoch",
    title: str = "",
    ylim: tuple[float, float] | None = None,
) -> "Figure":
    """Draw one value per epoch for several variants: the mean of the runs thick, every run thin.

    The mean covers the epochs that every run of the variant has. If a run is NaN, so is the mean, and the line has a
    gap. Every line is labelled at its end.

    Args:
        curves: The runs (seeds) of each variant by name; a run is a sequence of values for the epochs 1, 2, ..., and
            runs may differ in length.
        ylabel: What is drawn, with its unit.
        xlabel: Label of the horizontal axis.
        title: Title above the axes.
        ylim: Lowest and highest value to show, for a closer look at the end of training; by default all values.

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
    """
    _check_curves(curves)
    figure = new_figure(_HEIGHT)
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    seeds = sorted({len(runs) for runs in curves.values()})
    if seeds[-1] > 1:
        count = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else seeds[0]
        xlabel += f"   (thick: mean of {count} runs, thin: each run)"
    style_axes(axes, xlabel, ylabel)
    axes.set_title(title, fontsize=FONT_SIZE + 1, loc="left")
    ends = []
    for i, (name, runs) in enumerate(curves.items()):
        colour, dashes = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
        mean = [sum(values) / len(runs) for values in zip(*runs, strict=False)]
        dot = "o" if len(mean) == 1 else None  # a line with one point is invisible
        if len(runs) > 1:
            for run in runs:
                axes.plot(range(1, len(run) + 1), run, color=colour, linewidth=0.7, alpha=0.45, linestyle=dashes)
        axes.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=2, label=name, linestyle=dashes, marker=dot)
        finite = [(epoch, value) for epoch, value in enumerate(mean, start=1) if math.isfinite(value)]
        ends.append((name, colour, *(finite[-1] if finite else (1, math.nan))))
    last = max(len(run) for runs in curves.values() for run in runs)
    axes.set_xlim((1, last) if last > 1 else (0.5, 1.5))
    ticks = MaxNLocator(integer=True, steps=[1, 2, 5, 10]).tick_values(1, last)
    axes.set_xticks([1, *(int(tick) for tick in ticks if 1 < tick <= last)])
    axes.set_ylim(ylim)

    # The labels are in a column on the right, at least one line of text apart.
    bottom, top = axes.get_ylim()
    ends = [end for end in ends if bottom <= end[3] <= top]  # drops NaN, too
    gap = 1.35 * FONT_SIZE / 72 / (_HEIGHT - 0.9)
    heights = spread([(end[3] - bottom) / (top - bottom) for end in ends], gap, 0.0, 1.0)
    for (name, colour, epoch, value), height in zip(ends, heights, strict=True):
        axes.annotate(
            name,
            xy=(epoch, value),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=colour,
            fontsize=FONT_SIZE,
            fontweight="bold",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "shrinkA": 1,
                "shrinkB": 1,
                "relpos": (0, 0.5),
                "alpha": 0.6,
            },
            annotation_clip=False,
        )
    return figure


def _check_curves(curves: Mapping[str, Sequence[Sequence[float]]]) -> None:
    if not curves:
        raise ValueError("curves must have at least one entry, such as {'ECA': [[60.0, 70.0]]}, got none")
    for name, runs in curves.items():
        if not all(isinstance(run, Sequence) for run in runs):
            raise TypeError(f"curves[{name!r}] must hold one sequence for every run: for a single run write [run]")
        if not runs or not all(runs):
            raise ValueError(f"curves[{name!r}] must hold at least one run and every run at least one value")
