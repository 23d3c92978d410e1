"""Figure: the matrices W of Eq. (4) to (6), side by side."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ecanet.inspect.style import DARK, FONT_SIZE, SMALL_FONT_SIZE, WIDTH, diverging, new_figure
from ecanet.nn import ECA, ECANS, SE, LinearGate, SEGroup, SEVar2

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_PANELS_PER_ROW = 5
#: Largest number of cells along a side of a panel; larger matrices are reduced to it.
_MAX_CELLS = 128
#: From 2 * _CORNER channels on, a second panel shows the first _CORNER.
_CORNER = 16
#: Inches of space: left of the panels, above a panel, above its corner, below a panel, for a colour bar.
_LEFT, _TITLE, _CORNER_TITLE, _BELOW, _BAR = 0.6, 0.45, 0.25, 0.42, 0.55
_BAR_HEIGHT = 0.1


def plot_matrices(gates: Mapping[str, LinearGate], *, shared_scale: bool = False) -> "Figure":
    """Draw the matrix W of several gates: ``gate = factor * sigmoid(W @ channel means)``.

    Entries that are zero are white; the smallest weights are grey. From 32 channels on, a second panel below shows
    the first 16. Above 128 channels each cell of the large panel stands for a square of entries and shows the
    first that is not zero, so that a thin band stays visible. SE cannot be drawn: ``W2 relu(W1 s)`` is not linear in s,
    so it has no matrix.

    Args:
        gates: The gates by their names in the figure. :func:`~ecanet.inspect.gates` gives those of a model.
        shared_scale: Use one colour scale for all panels instead of one for each.

    Returns:
        A figure to ``.savefig("matrices.png")``. The axes of a gate's matrix and of its corner carry its name as label.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: a gate has no matrix, such as SE.
        ValueError: there are no gates.

    Source:
        Wang et al., ECA-Net, CVPR 2020, arXiv:1910.03151, Eq. (4) to (6).

    Example:
        >>> from ecanet.nn import SEVar3
        >>> figure = plot_matrices({"ECA": ECA(64), "SE-Var3": SEVar3(64)})
        >>> figure.axes[0].get_title().splitlines()
        ['ECA', 'k = 3 weights, shared']
    """
    _check_linear(gates)
    with torch.no_grad():
        matrices = {name: gate.matrix().float().cpu() for name, gate in gates.items()}
    limits = {name: matrix.abs().max().item() for name, matrix in matrices.items()}
    if shared_scale:
        limits = dict.fromkeys(limits, max(limits.values()))
    layout = _lay_out(gates, shared_scale)
    side = layout.side
    figure = new_figure(layout.height, layout.width, layout=None)
    for position, (name, gate) in enumerate(gates.items()):
        row, column = divmod(position, layout.columns)
        x, y = _LEFT + column * layout.pitch, row * layout.depth + _TITLE
        panels, image = _draw_gate(figure, layout, (x, y), name, gate, matrices[name], limits[name])
        for axes in panels:
            if column == 0:
                axes.set_ylabel("gate i", fontsize=SMALL_FONT_SIZE)
            elif layout.one_size:
                axes.set_yticklabels([])
        if not shared_scale:
            bar = _add_panel(figure, layout, x + 0.1 * side, (row + 1) * layout.depth - _BAR, 0.8 * side, _BAR_HEIGHT)
            _add_scale(figure, image, bar)
    if shared_scale:
        bar = _add_panel(figure, layout, (layout.width - side) / 2, layout.height - _BAR, side, _BAR_HEIGHT)
        _add_scale(figure, image, bar)
    return figure


def _check_linear(gates: Mapping[str, LinearGate]) -> None:
    if not gates:
        raise ValueError("gates must have at least one entry, such as {'ECA': ECA(64)}, got none")
    for name, gate in gates.items():
        if not isinstance(gate, LinearGate):
            raise TypeError(
                f"gates[{name!r}] must be a LinearGate: {type(gate).__name__} has no matrix W{_why(gate)}; "
                "plot_gate_responses draws it against the statistics of its input"
            )


def _why(gate: object) -> str:
    return ", as its ReLU is not linear" if isinstance(gate, SE) else ""


class _Layout(NamedTuple):
    """Sizes in inches, set by hand: matplotlib's layout engines cannot place square panels with colour bars."""

    columns: int
    pitch: float  # from the left edge of a panel to that of the next
    side: float  # of a panel
    depth: float  # of a row of panels with their corners and colour bars
    width: float  # of the figure
    height: float
    one_size: bool  # whether all gates have the same number of channels


def _lay_out(gates: Mapping[str, LinearGate], shared_scale: bool) -> _Layout:
    columns = min(len(gates), _PANELS_PER_ROW)
    rows = -(-len(gates) // columns)
    corners = any(gate.channels >= 2 * _CORNER for gate in gates.values())
    one_size = len({gate.channels for gate in gates.values()}) == 1
    pitch = min(2.4, (WIDTH - _LEFT) / columns)
    side = pitch - (0.2 if one_size else 0.45)
    bar = 0.0 if shared_scale else _BAR
    depth = _TITLE + side + _BELOW + (_CORNER_TITLE + side + _BELOW if corners else 0.0) + bar
    width, height = _LEFT + columns * pitch, rows * depth + (_BAR if shared_scale else 0.0)
    return _Layout(columns, pitch, side, depth, width, height, one_size)


def _add_panel(figure: "Figure", layout: _Layout, x: float, y: float, w: float, h: float) -> "Axes":
    """Axes of width w and height h, in inches; (x, y) is the upper left corner."""
    width, height = layout.width, layout.height
    return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))


def _draw_gate(
    figure: "Figure",
    layout: _Layout,
    place: tuple[float, float],
    name: str,
    gate: LinearGate,
    matrix: Tensor,
    limit: float,
) -> tuple[list["Axes"], "AxesImage"]:
    """Draw a gate's matrix and, if it is large, its corner; return their axes and the image of the matrix."""
    (x, y), side = place, layout.side
    whole = _add_panel(figure, layout, x, y, side, side)
    image = _draw(whole, matrix, limit, name)
    whole.set_title(f"{name}\n{_weights_in_words(gate)}", fontsize=SMALL_FONT_SIZE, linespacing=1.3)
    if gate.channels < 2 * _CORNER:
        return [whole], image
    corner = _add_panel(figure, layout, x, y + side + _BELOW + _CORNER_TITLE, side, side)
    _draw(corner, matrix[:_CORNER, :_CORNER], limit, name)
    corner.set_title(f"first {_CORNER} channels", fontsize=SMALL_FONT_SIZE)
    return [whole, corner], image


def _add_scale(figure: "Figure", image: "AxesImage", axes: "Axes") -> None:
    bar = figure.colorbar(image, cax=axes, orientation="horizontal")
    limit = image.get_clim()[1]
    bar.set_ticks([-limit, 0, limit], labels=[f"{tick:.2g}" for tick in (-limit, 0, limit)])
    axes.tick_params(colors=DARK, labelsize=SMALL_FONT_SIZE - 1, length=2)
    bar.set_label("weight", fontsize=SMALL_FONT_SIZE, labelpad=1)
    bar.outline.set_visible(False)


def _weights_in_words(gate: LinearGate) -> str:
    """The number of weights that the matrix is made of, with its formula."""
    weights, channels = sum(p.numel() for p in gate.parameters()), gate.channels
    if isinstance(gate, ECA):
        return f"k = {weights:,} weights, shared"
    if isinstance(gate, ECANS):
        return f"{gate.kernel_size} C = {weights:,} weights"
    if isinstance(gate, SEVar2):
        return f"C = {weights:,} weights"
    if isinstance(gate, SEGroup):
        return f"C²{f'/{gate.groups}' if gate.groups > 1 else ''} = {weights:,} weights"
    return f"{weights:,} weights, C = {channels:,}" if weights else "no weights"


def _reduce(matrix: Tensor) -> Tensor:
    """The first nonzero entry of every square of entries, ``(C, C)`` to at most ``(_MAX_CELLS, _MAX_CELLS)``."""
    side = -(-len(matrix) // _MAX_CELLS)
    if side == 1:
        return matrix
    padded = F.pad(matrix, (0, -len(matrix) % side) * 2)
    cells = len(padded) // side
    squares = padded.reshape(cells, side, cells, side).transpose(1, 2).flatten(2)  # (cells, cells, side * side)
    return squares.gather(2, (squares != 0).int().argmax(2, keepdim=True)).squeeze(2)


def _draw(axes: "Axes", matrix: Tensor, limit: float, name: str) -> "AxesImage":
    import numpy as np

    shown = _reduce(matrix).numpy()
    side = -(-len(matrix) // _MAX_CELLS)
    edge = len(shown) * side
    image = axes.imshow(
        np.ma.masked_equal(shown, 0),
        cmap=diverging(),
        vmin=-(limit or 1),
        vmax=limit or 1,
        interpolation="nearest",
        extent=(0.5, edge + 0.5, edge + 0.5, 0.5),
    )
    axes.set_label(name)
    axes.spines[:].set(color=DARK, linewidth=0.6)
    axes.set_xlim(0.5, len(matrix) + 0.5)
    axes.set_ylim(len(matrix) + 0.5, 0.5)
    axes.set_xticks(sorted({1, len(matrix)}))
    if len(matrix) >= 100:  # the numbers of neighbouring panels would touch
        first, last = axes.get_xticklabels()
        first.set_horizontalalignment("left")
        last.set_horizontalalignment("right")
    axes.set_yticks(sorted({1, len(matrix)}))
    axes.tick_params(colors=DARK, labelsize=SMALL_FONT_SIZE - 1, length=2)
    axes.set_xlabel("channel j", fontsize=SMALL_FONT_SIZE, labelpad=1)
    if not shown.any():
        axes.text(0.5, 0.5, "all zero", transform=axes.transAxes, ha="center", va="center", fontsize=FONT_SIZE)
    return image
