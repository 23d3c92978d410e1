"""Figure: a confusion matrix, which shows what the images of each class are taken for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ecanet.inspect.style import DARK, FONT_SIZE, LIGHT, SMALL_FONT_SIZE, diverging, new_figure
from ecanet.untrusted import shown as shown_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Largest number of classes that are drawn, and with numbers in the cells; longest name of a class, in characters.
_MAX_CLASSES, _MAX_NUMBERED, _MAX_CHARACTERS = 25, 12, 22
#: Inches: smallest side of a cell, space for names, and for the colour bar with its label.
_CELL, _NAMES, _BAR = 0.27, 1.9, 0.9


def plot_confusion(counts: Tensor, classes: Sequence[str]) -> "Figure":
    """Draw a confusion matrix: a row for each class, a column for each class that its images were taken for.

    Colours show shares of a row: blue for images that were recognised, orange for those taken for another class. If
    there are more than 25 classes, the 25 most often taken for one another are drawn, and a last column has the rest.

    Args:
        counts: Images ``(classes, classes)``, integers of 0 or more, such as
            :meth:`ecanet.train.evaluate.Validation.confusion` returns.
        classes: Names of the classes.

    Returns:
        A figure to ``.savefig("confusion.png")``.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: ``counts`` is not square with a row for each class.

    Example:
        >>> figure = plot_confusion(torch.tensor([[9, 1], [0, 10]]), ["cat", "dog"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['90', '10', '100']
    """
    count = len(classes)
    if not count or tuple(counts.shape) != (count, count):
        raise ValueError(
            f"counts must have a row and a column for each of the {count} classes, got {tuple(counts.shape)}"
        )
    shares = counts.double() / counts.sum(1, keepdim=True)  # NaN without images
    shown = _most_confused(shares) if count > _MAX_CLASSES else list(range(count))
    cells = shares[shown][:, shown]
    right = torch.eye(len(shown), dtype=torch.bool)
    values = torch.where(right, -cells, cells)
    columns = [shown_text(classes[i], _MAX_CHARACTERS) for i in shown]
    rows = [
        name if shares[i].isfinite().all() else f"{name} (no images)" for i, name in zip(shown, columns, strict=True)
    ]
    if len(shown) < count:
        values = torch.cat([values, (1 - cells.sum(1, keepdim=True))], dim=1)
        columns.append("any other")
    side = max(3.2, _CELL * len(shown))
    figure = new_figure(side + _NAMES + _BAR + 0.4)
    axes, bar = figure.subplots(2, height_ratios=[side + _NAMES, 0.12])
    _draw(axes, values, rows, columns)
    if len(shown) < count:
        title = f"{len(shown)} of {count:,} classes, those most often taken for one another"
        axes.set_title(title, fontsize=FONT_SIZE)
    scale = figure.colorbar(axes.images[0], cax=bar, orientation="horizontal")
    scale.set_ticks([-1, 0, 1], labels=["100 %", "0", "100 %"])
    scale.set_label(
        "share of a class's images: recognised (left), taken for another class (right)", fontsize=SMALL_FONT_SIZE
    )
    scale.outline.set_visible(False)
    bar.tick_params(colors=DARK, labelsize=SMALL_FONT_SIZE, length=2)
    return figure


def _most_confused(shares: Tensor) -> list[int]:
    """The classes with the largest shares off the diagonal, in label order."""
    wrong = shares.nan_to_num(0).fill_diagonal_(0)
    largest = wrong.flatten().topk(_MAX_CLASSES**2).indices.tolist()
    both = [index for place in largest for index in divmod(place, len(shares))]
    return sorted(list(dict.fromkeys(both))[:_MAX_CLASSES])


def _draw(axes: "Axes", values: Tensor, rows: Sequence[str], columns: Sequence[str]) -> None:
    import numpy as np

    shares = values.abs()
    cells = np.ma.masked_where(~(shares > 0).numpy(), values.numpy())  # NaN is not above 0
    axes.imshow(cells, cmap=diverging(), vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
    axes.spines[:].set(color=LIGHT, linewidth=0.6)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=SMALL_FONT_SIZE, parse_math=False)
    axes.set_yticks(range(len(rows)), rows, fontsize=SMALL_FONT_SIZE, parse_math=False)
    axes.tick_params(colors=DARK, length=0)
    axes.set_xlabel("taken for", fontsize=FONT_SIZE)
    axes.set_ylabel("class", fontsize=FONT_SIZE)
    if len(rows) > _MAX_NUMBERED:
        return
    for row, column in (shares > 0).nonzero().tolist():
        share = float(shares[row, column])
        text = "<1" if share < 0.01 else f"{100 * share:.0f}"
        colour = "white" if share > 0.4 else DARK
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=SMALL_FONT_SIZE)
