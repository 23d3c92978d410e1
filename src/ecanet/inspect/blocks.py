"""Figure: squeeze-and-excitation and ECA side by side, step by step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from ecanet.inspect.style import DARK, FONT_SIZE, GREY, IDEAS, SMALL_FONT_SIZE, WIDTH, bare_axes, new_figure
from ecanet.networks.cost import parameters
from ecanet.nn import ECA, SE
from ecanet.untrusted import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Inches: height of the figure, height of a row of values, width of a row of C values, and its centre.
_HEIGHT, _ROW, _FULL, _CENTRE = 5.7, 0.24, 1.65, 1.15
#: Upper edges of the rows: feature map, channel means, hidden values, gates, scaled map.
_MAP, _MEANS, _HIDDEN, _GATES, _OUT = 0.75, 1.75, 2.85, 3.95, 4.75


class _Column(NamedTuple):
    """Half of the figure."""

    axes: "Axes"
    centre: float
    colour: str


def plot_se_and_eca(
    channels: int = 256,
    kernel_size: int | Literal["adaptive"] = "adaptive",
    reduction: int = 16,
    *,
    spatial: Sequence[int] = (56, 56),
) -> "Figure":
    """Draw the steps of squeeze-and-excitation and of ECA side by side, with the shapes and parameters of each step.

    Both take the mean of every channel, turn the C means into C gates and scale the channels by them. SE squeezes the
    means into C // r values and computes each gate from those. ECA computes each gate from k neighbouring means.
    Widths are to scale: a row of C // r values is narrower by that factor than one of C values, and the cone of ECA is
    as wide as the k channels of its kernel.

    Args:
        channels: Number of channels C.
        kernel_size: k of ECA; ``"adaptive"`` is :func:`~ecanet.nn.adaptive_kernel_size` of C.
        reduction: r of SE.
        spatial: Size of the feature map.

    Returns:
        A figure to ``.savefig("se_and_eca.png")``.

    Raises:
        ImportError: matplotlib is missing.
        TypeError, ValueError: as :class:`~ecanet.nn.ECA` and :class:`~ecanet.nn.SE`, or ``spatial`` is not a sequence
            of integers of 1 or more.

    Source:
        Hu et al., Squeeze-and-Excitation Networks, CVPR 2018; Wang et al., ECA-Net, CVPR 2020, arXiv:1910.03151,
        Figure 2, Eq. (1), (2) and (9).

    Example:
        >>> texts = [text.get_text() for text in plot_se_and_eca(256, reduction=16).axes[0].texts]
        >>> [text for text in texts if "in all" in text]
        ['8,192 parameters in all', '5 parameters in all']
    """
    if not isinstance(spatial, Sequence) or not all(type(size) is int for size in spatial):
        raise TypeError(f"spatial must be a sequence of integers such as (56, 56), got {spatial!r}")
    if not spatial or min(spatial) < 1:
        raise ValueError(f"spatial must have sizes of 1 or more, such as (56, 56), got {spatial!r}")
    with torch.device("meta"):
        se, eca = SE(channels, reduction), ECA(channels, kernel_size)
    figure = new_figure(_HEIGHT, layout=None)
    axes = bare_axes(figure, WIDTH, _HEIGHT)
    shape = " x ".join(map(str, (channels, *spatial)))
    hidden = len(se.fc1.weight)
    left, right = _Column(axes, _CENTRE, IDEAS["SE"]), _Column(axes, WIDTH / 2 + _CENTRE, IDEAS["ECA"])
    for column, title, total in (
        (left, f"SE, r = {reduction}", parameters(se)),
        (right, f"ECA, k = {eca.kernel_size}", parameters(eca)),
    ):
        axes.text(column.centre, 0.3, title, fontsize=FONT_SIZE + 3, fontweight="bold", ha="center", va="center")
        _row(column, _MAP, _FULL, f"x: {shape}", GREY, thick=True)
        _step(column, _MAP + 2 * _ROW, _MEANS, "squeeze: mean over the\npositions, 0 parameters")
        _row(column, _MEANS, _FULL, f"s: {channels:,} means", GREY)
        _row(column, _GATES, _FULL, f"g: {channels:,} gates", column.colour)
        _step(column, _GATES + _ROW, _OUT, "scale: each channel\nby its gate")
        _row(column, _OUT, _FULL, f"g x: {shape}", column.colour, thick=True)
        words = f"{counted(total, 'parameter')} in all"
        axes.text(column.centre - _FULL / 2, _HEIGHT - 0.2, words, fontsize=FONT_SIZE, fontweight="bold", va="center")
    narrow = _FULL * hidden / channels
    _cone(left, (_MEANS + _ROW, _FULL), (_HIDDEN, narrow))
    _row(left, _HIDDEN, narrow, counted(hidden, "value"), left.colour)
    _cone(left, (_HIDDEN + _ROW, narrow), (_GATES, _FULL))
    weights = [" x ".join(f"{n:,}" for n in layer.weight.shape) for layer in (se.fc1, se.fc2)]
    counts = [layer.weight.numel() for layer in (se.fc1, se.fc2)]
    _say(left, (_MEANS + _ROW + _HIDDEN) / 2, f"W1, then ReLU:\n{weights[0]} = {counts[0]:,} parameters")
    _say(left, (_HIDDEN + _ROW + _GATES) / 2, f"W2, then sigmoid:\n{weights[1]} = {counts[1]:,} parameters")
    taps, k = min(eca.kernel_size, channels), eca.kernel_size
    _cone(right, (_MEANS + _ROW, _FULL * taps / channels), (_GATES, _FULL / channels))
    _say(
        right,
        (_MEANS + _ROW + _GATES) / 2,
        f"1-D convolution, then sigmoid:\neach gate from {k} neighbouring\nmean{'s' * (k != 1)}; "
        f"{counted(k, 'parameter')}, shared\nby all gates",
    )
    return figure


def _row(column: _Column, y: float, width: float, words: str, colour: str, thick: bool = False) -> None:
    """Draw a row of values, with a label at its right; its width shows how many there are."""
    from matplotlib.patches import Rectangle

    height = 2 * _ROW if thick else _ROW
    corner = column.centre - width / 2, y
    column.axes.add_patch(Rectangle(corner, width, height, facecolor=colour, edgecolor=DARK, linewidth=0.8))
    _say(column, y + height / 2, words, bold=True)


def _cone(column: _Column, above: tuple[float, float], below: tuple[float, float]) -> None:
    """Draw a cone from the values above to those computed from them; each end is given as (y, width)."""
    from matplotlib.patches import Polygon

    (y0, w0), (y1, w1), x = above, below, column.centre
    corners = [(x - w0 / 2, y0), (x + w0 / 2, y0), (x + w1 / 2, y1), (x - w1 / 2, y1)]
    column.axes.add_patch(Polygon(corners, facecolor=column.colour, alpha=0.35, edgecolor=column.colour, linewidth=1.2))


def _step(column: _Column, top: float, bottom: float, words: str) -> None:
    column.axes.annotate(
        "",
        xy=(column.centre, bottom),
        xytext=(column.centre, top),
        arrowprops={"arrowstyle": "-|>", "color": DARK, "linewidth": 1.2, "shrinkA": 1, "shrinkB": 1},
    )
    _say(column, (top + bottom) / 2, words)


def _say(column: _Column, y: float, words: str, bold: bool = False) -> None:
    """Write a label at the right of a step."""
    x = column.centre + _FULL / 2 + 0.12
    column.axes.text(
        x,
        y,
        words,
        fontsize=SMALL_FONT_SIZE,
        color=DARK,
        va="center",
        fontweight="bold" if bold else "normal",
        linespacing=1.25,
    )
