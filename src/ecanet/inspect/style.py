"""The look that the figures share: one set of colours, figures without pyplot, labels that do not overlap."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colour-blind safe colours without yellow, then three of Paul Tol's.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#4D4D4D",
    "#882255",
    "#999933",
    "#332288",
)
DARK, LIGHT = "#333333", "#D9D9D9"
#: Inches; at 200 dots per inch twice the width of a README's column, for sharp text.
WIDTH, DPI = 9.0, 200
FONT_SIZE, SMALL_FONT_SIZE = 10, 9


def new_figure(height: float, width: float = WIDTH, layout: Literal["constrained"] | None = "constrained") -> "Figure":
    """A figure of this size in inches, made without pyplot: it needs no display, and nothing else keeps it alive.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the figures of ecanet.inspect need matplotlib: pip install 'ecanet[plot]'") from error
    return Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")


def style_axes(axes: "Axes", xlabel: str = "", ylabel: str = "", grid: bool = True) -> None:
    """Open frame, light grid behind the data, small ticks, labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(DARK)
    axes.tick_params(colors=DARK, labelsize=SMALL_FONT_SIZE)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    axes.set_xlabel(xlabel, fontsize=FONT_SIZE)
    axes.set_ylabel(ylabel, fontsize=FONT_SIZE)


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move positions as little as possible (least squares) until all are ``gap`` apart, keeping their order.

    Args:
        positions: In any order.
        gap: Smallest distance; it is reduced if ``high - low`` is too small for it.
        low: Lower bound.
        high: Upper bound.

    Example:
        >>> spread([2.0, 2.0, 5.0], gap=1.0, low=0.0, high=9.0)
        [1.5, 2.5, 5.0]
        >>> spread([2.0, 2.0, 5.0], gap=1.0, low=2.0, high=4.0)
        [2.0, 3.0, 4.0]
    """
    gap = min(gap, (high - low) / max(1, len(positions) - 1))
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    # With place * gap subtracted, positions only have to ascend: pool neighbours that do not.
    pools: list[tuple[float, int]] = []  # (mean, how many)
    for place, i in enumerate(order):
        mean, count = positions[i] - place * gap, 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean, count = (mean * count + before * many) / (count + many), count + many
        pools.append((mean, count))
    means = [mean for mean, count in pools for _ in range(count)]
    moved = [0.0] * len(positions)
    for place, i in enumerate(order):
        moved[i] = min(max(means[place], low), high - (len(order) - 1) * gap) + place * gap
    return moved
