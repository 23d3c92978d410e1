"""Figure: one image, its most probable classes, and the gates of each layer."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ecanet.inspect.per_class import gates_to_draw
from ecanet.inspect.style import (
    DARK,
    FONT_SIZE,
    GREY,
    LIGHT,
    OTHERS,
    SMALL_FONT_SIZE,
    diverging,
    new_figure,
    style_axes,
)
from ecanet.untrusted import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Largest number of gates, and of named channels in each; longest name of a class or file, in characters.
_MAX_GATES, _MAX_STRONGEST, _MAX_CHARACTERS = 8, 5, 32
#: Inches: heights of the row of the image, and of a gate's row.
_TOP, _ROW = 2.3, 1.55
_HERE, _STRONG = OTHERS[0], OTHERS[1]


def plot_explanation(
    image: Tensor,
    name: str,
    classes: Sequence[str],
    probabilities: Sequence[float],
    gates: Mapping[str, Tensor],
    means: Mapping[str, Tensor] | None = None,
    images: int = 0,
) -> "Figure":
    """Draw an image, its most probable classes, and what each gate multiplies the channels by.

    Each gate has a row: on the left all channels in ascending order of their mean over images of the class, with the
    mean as a line and this image's gates as dots; on the right the channels with the largest gates. If there are more
    than six gates, only the last of each stage is drawn, at most eight in all.

    Args:
        image: uint8 ``(3, H, W)``.
        name: Name of the image in the figure.
        classes: The most probable classes, in descending order.
        probabilities: Their probabilities, from 0 to 1.
        gates: What each gate multiplies the channels by, ``(C,)``, by the name of the gate.
        means: Means over images of the first class, in the form of ``gates``; None draws none.
        images: The number of images that the means are of.

    Returns:
        A figure to ``.savefig("explained.png")``. The axes of a gate carry its name as label.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there are no gates or no classes, not one probability for each class, or means of other gates.

    Example:
        >>> import torch
        >>> figure = plot_explanation(
        ...     torch.zeros(3, 28, 28, dtype=torch.uint8), "bag.png", ["Bag"], [0.97], {"layer1.eca": torch.rand(64)}
        ... )
        >>> figure.axes[2].get_label(), figure.axes[1].get_title(loc="left")
        ('layer1.eca', 'Bag: 97.0 %')
    """
    if not classes or len(classes) != len(probabilities):
        raise ValueError(f"probabilities must be one for each of the {len(classes)} classes, got {len(probabilities)}")
    if means is not None and {k: v.shape for k, v in means.items()} != {k: v.shape for k, v in gates.items()}:
        raise ValueError(f"means must be of the same gates, {', '.join(gates)}, got {', '.join(means)}")
    drawn = gates_to_draw(gates, None)
    if len(drawn) > _MAX_GATES:
        drawn = [drawn[round(i * (len(drawn) - 1) / (_MAX_GATES - 1))] for i in range(_MAX_GATES)]
    figure = new_figure(_TOP + _ROW * len(drawn) + 0.3)
    grid = figure.add_gridspec(len(drawn) + 1, 2, height_ratios=[_TOP, *[_ROW] * len(drawn)], width_ratios=[2.4, 1])
    top = grid[0, :].subgridspec(1, 2, width_ratios=[1, 1.6])
    _draw_image(figure.add_subplot(top[0]), image, name)
    _draw_classes(figure.add_subplot(top[1]), classes, probabilities)
    for row, gate in enumerate(drawn, start=1):
        mean = None if means is None else means[gate]
        _draw_gate(figure.add_subplot(grid[row, 0]), gate, gates[gate], mean, row == len(drawn))
        _draw_strongest(figure.add_subplot(grid[row, 1]), gates[gate], mean, row == 1)
    of_class = None if means is None else f"{images:,} validation images of {shown(classes[0], _MAX_CHARACTERS)}"
    _draw_legend(figure, of_class, None if len(drawn) == len(gates) else f"{len(drawn)} of {len(gates)} gates drawn")
    return figure


def _draw_image(axes: "Axes", image: Tensor, name: str) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), cmap=diverging(), interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(shown(name, _MAX_CHARACTERS), fontsize=FONT_SIZE, parse_math=False)


def _draw_classes(axes: "Axes", classes: Sequence[str], probabilities: Sequence[float]) -> None:
    style_axes(axes, grid="x")
    names = [shown(name, _MAX_CHARACTERS) for name in classes]
    axes.barh(range(len(names)), probabilities, color=[_STRONG, *[GREY] * (len(names) - 1)], height=0.6)
    axes.set_yticks(range(len(names)), names, fontsize=SMALL_FONT_SIZE, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    title = f"{names[0]}: {100 * probabilities[0]:.1f} %"
    axes.set_title(title, fontsize=FONT_SIZE, loc="left", parse_math=False)


def _draw_gate(axes: "Axes", name: str, gate: Tensor, mean: Tensor | None, is_last: bool) -> None:
    style_axes(axes, ylabel="gate")
    axes.set_label(name)
    order = (gate if mean is None else mean).nan_to_num().argsort(stable=True)
    places = range(1, len(gate) + 1)
    if mean is not None:
        axes.plot(places, mean[order].tolist(), color=GREY, linewidth=1.8)
    axes.plot(places, gate[order].tolist(), ".", color=_HERE, markersize=3.5)
    strong = {int(i) for i in _strongest(gate)}
    marked = [(place, float(gate[i])) for place, i in zip(places, order.tolist(), strict=True) if i in strong]
    axes.plot(*zip(*marked, strict=True) if marked else ([], []), ".", color=_STRONG, markersize=7)
    axes.set_xticks(sorted({1, len(gate)}))
    axes.set_title(f"{name}: C = {len(gate):,}", fontsize=SMALL_FONT_SIZE, loc="left", parse_math=False)
    if is_last:
        order_of = "their gate" if mean is None else "the class's mean"
        axes.set_xlabel(f"channels, in ascending order of {order_of}", fontsize=SMALL_FONT_SIZE)


def _strongest(gate: Tensor) -> list[int]:
    """The channels with the largest gates, the largest first; none if all gates are the same."""
    values = gate.nan_to_num(-float("inf"))
    finite = gate[gate.isfinite()]
    if not len(finite) or float(finite.max() - finite.min()) < 1e-6:
        return []
    return values.topk(min(_MAX_STRONGEST, len(finite))).indices.tolist()


def _draw_strongest(axes: "Axes", gate: Tensor, mean: Tensor | None, is_first: bool) -> None:
    style_axes(axes, grid="x")
    channels = _strongest(gate)
    if is_first:
        axes.set_title("channels with the strongest gates", fontsize=SMALL_FONT_SIZE, loc="left")
    if not channels:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "all gates are the same", transform=axes.transAxes, ha="center", fontsize=SMALL_FONT_SIZE)
        return
    places = range(len(channels))
    axes.barh(places, [float(gate[i]) for i in channels], color=_STRONG, height=0.6)
    if mean is not None:
        axes.plot([float(mean[i]) for i in channels], places, "|", color=GREY, markersize=9, markeredgewidth=2.2)
    axes.set_yticks(places, [str(i + 1) for i in channels], fontsize=SMALL_FONT_SIZE)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()


def _draw_legend(figure: "Figure", of_class: str | None, note: str | None) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker=".", linestyle="", color=_HERE, label="this image")]
    if of_class is not None:
        handles.append(Line2D([], [], color=GREY, linewidth=1.8, label=f"mean of {of_class}"))
    if note is not None:
        handles.append(Line2D([], [], linestyle="", color=LIGHT, label=note))
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=3, fontsize=SMALL_FONT_SIZE, frameon=False, labelcolor=DARK
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
