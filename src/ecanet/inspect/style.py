"""The style that the figures share: one table of colours, figures without pyplot, labels that do not overlap."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

#: One colour for each idea, the same in every figure: those of Okabe and Ito, which are safe for the colour-blind.
IDEAS = {
    "none": "#4D4D4D",
    "ECA": "#0072B2",
    "SE": "#E69F00",
    "timm": "#D55E00",
    "fresh": "#CC79A7",
    "neutral": "#009E73",
    "plain": "#56B4E9",
}
#: Colours for anything else, such as networks: some of Paul Tol's that differ from those above.
OTHERS = ("#332288", "#882255", "#999933", "#AA4499", "#7A4A1E", "#117733")
DARK, GREY, LIGHT = "#333333", "#9A9A9A", "#D9D9D9"
#: Colours from the lowest value to the highest, with grey for the middle: weight 0, or gate one half.
DIVERGING = ("#08306B", "#2171B5", "#7FB2DA", "#CFCFCF", "#F2A35E", "#D1570F", "#7A2A02")
DASHES = ("-", "--", ":", "-.")
#: Width in inches, and dots per inch: twice the width of a README's column, so that text is sharp.
WIDTH, DPI = 9.0, 200
FONT_SIZE, SMALL_FONT_SIZE = 10, 9

#: Patterns of names for each idea; the first one that matches counts.
_WORDS = {
    "neutral": r"\bneutral\b|\bfunction kept\b",
    "fresh": r"\bfresh\b|\brandom (gate|start)s?\b",
    "timm": r"\btimm\b",
    "plain": r"\bplain pytorch\b",
    "none": r"^none$|^(no|without) (a )?(gate|attention)s?\b",
    "SE": r"\bse\b(?!-)|\bsqueeze-and-excitation\b",
    "ECA": r"\beca\b(?!-ns)|\becanet\b",
}


def looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and dashes for each name: an idea has its own colour, any other name gets the next of :data:`OTHERS`.

    Names with the same colour differ in their dashes. The colours of a neutral and a fresh start are for the first gate
    with such a start; a gate is recognised by the first word of a name.

    Example:
        >>> looks(["none", "ECA", "ECA, k = 9", "ECA, neutral start", "mine"])["ECA, k = 9"]
        ('#0072B2', '--')
        >>> looks(["ECA, neutral start", "GCT, neutral start"])["GCT, neutral start"][0] == OTHERS[0]
        True
    """
    styles: dict[str, tuple[str, str]] = {}
    starts: dict[str, str] = {}
    other = 0
    for name in names:
        idea, gate = idea_of(name), re.split(r"\W", name.lower())[0]
        if idea is None or (idea in ("neutral", "fresh") and starts.setdefault(idea, gate) != gate):
            colour, other = OTHERS[other % len(OTHERS)], other + 1
        else:
            colour = IDEAS[idea]
        same = sum(used == colour for used, _ in styles.values())
        styles[name] = colour, DASHES[same % len(DASHES)]
    return styles


def idea_of(name: str) -> str | None:
    """The idea that a name mentions, or None.

    Example:
        >>> [idea_of(name) for name in ("no gate", "ecanet", "timm's EcaModule", "SE", "SE-Var2")]
        ['none', 'ECA', 'timm', 'SE', None]
    """
    return next((idea for idea, words in _WORDS.items() if re.search(words, name, re.IGNORECASE)), None)


def contrast(one: str, other: str) -> float:
    """Contrast of two colours by WCAG 2, from 1 to 21.

    Example:
        >>> contrast("#FFFFFF", "#000000"), round(contrast(IDEAS["SE"], "#FFFFFF"), 2)
        (21.0, 2.25)
    """
    dark, light = sorted(map(_luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    """Relative luminance of #RRGGBB in sRGB."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def on_dark(colour: str, paper: str, least: float = 4.5) -> str:
    """A colour for a dark background: mixed with as much white as the contrast needs.

    Args:
        colour: #RRGGBB, as in :data:`IDEAS`.
        paper: Colour of the background.
        least: Smallest contrast with the background.

    Example:
        >>> on_dark(IDEAS["SE"], "#14171A") == IDEAS["SE"], on_dark(IDEAS["none"], "#14171A")
        (True, '#828282')
    """
    white = 0.0
    while contrast(mixed := _with_white(colour, white), paper) < least:
        white += 0.02
    return mixed


def _with_white(colour: str, white: float) -> str:
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (255 - part) * min(1.0, white)):02X}" for part in parts)


def diverging() -> "Colormap":
    """The colour map of weights and gates, with white for missing values."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("blue-grey-orange", DIVERGING).with_extremes(bad="white")


def new_figure(height: float, width: float = WIDTH, layout: Literal["constrained"] | None = "constrained") -> "Figure":
    """A figure of this size in inches, made without pyplot: it needs no display, and pyplot does not keep it in memory.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the figures of ecanet.inspect need matplotlib: pip install 'ecanet[plot]'") from error
    return Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")


def style_axes(axes: "Axes", xlabel: str = "", ylabel: str = "", grid: Literal["x", "y", ""] = "y") -> None:
    """Give axes an open frame, a light grid behind the data, small ticks, and labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(DARK)
    axes.tick_params(colors=DARK, labelsize=SMALL_FONT_SIZE)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=LIGHT, linewidth=0.6)
    axes.set_xlabel(xlabel, fontsize=FONT_SIZE)
    axes.set_ylabel(ylabel, fontsize=FONT_SIZE)


def bare_axes(figure: "Figure", width: float, height: float) -> "Axes":
    """Axes without a frame over the whole figure, with one unit per inch, for drawings of boxes and arrows."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)  # downwards
    return axes


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move positions as little as possible (least squares) until all are ``gap`` apart, keeping their order.

    Args:
        positions: Positions in any order.
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
