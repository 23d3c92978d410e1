"""The gates that a model learned, class by class: their values, and a figure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ecanet.inspect.style import DARK, FONT_SIZE, SMALL_FONT_SIZE, diverging, new_figure, style_axes
from ecanet.networks.running import evaluating, example_tensor, gates, observing
from ecanet.nn import Gate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

#: If there are more gates than this, only the last of each stage is drawn.
_MAX_PANELS = 6
#: Largest number of named rows; height in inches of a row, so that names do not touch, and of the colour bar.
_MAX_NAMES, _LINE, _BAR = 30, 0.17, 0.1
#: How channels can be sorted, and the title of the axis in each case.
_ORDERS = {
    "class": "channels, sorted by the class with the largest gate",
    "mean": "channels, in ascending order of their mean gate",
    "index": "channel",
}


def gate_values(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Mean gate of every channel for every class, for all gates of a model, in one pass over the data.

    A gate's value is what the map is multiplied by; the shift that some gates also add is not included. The model runs
    in eval mode and keeps its mode, weights and statistics. If a gate runs several times in a forward pass, the mean
    covers all of these.

    Args:
        model: Model that takes the images of a batch; it stays on its device.
        batches: Pairs of images ``(N, ...)`` and integer labels ``(N,)``, such as a DataLoader.
        num_classes: Number of classes; labels are 0 to ``num_classes - 1``.
        device: Device to move the images to; by default that of the model's weights.

    Returns:
        Means ``(num_classes, C)`` by the gate's qualified name, float64, on the CPU. Classes without images are NaN.

    Raises:
        ValueError: there are no gates or no batches, labels are not ``(N,)`` or out of range, or a gate does not run.
        TypeError: labels are not integers.

    Example:
        >>> from ecanet.models import small_eca_resnet
        >>> batches = [(torch.randn(4, 3, 28, 28), torch.tensor([0, 1, 1, 0]))]
        >>> {name: tuple(v.shape) for name, v in gate_values(small_eca_resnet(num_classes=2), batches, 2).items()}
        {'layer1.0.eca': (2, 32), 'layer2.0.eca': (2, 64), 'layer3.0.eca': (2, 128)}
    """
    by_name = gates(model)
    if not by_name:
        raise ValueError(f"model must have at least one ecanet.nn.Gate, {type(model).__name__} has none")
    if num_classes < 1:
        raise ValueError(f"num_classes must be 1 or more, got {num_classes}")
    sums = {name: torch.zeros(num_classes, gate.channels, dtype=torch.float64) for name, gate in by_name.items()}
    counts = {name: torch.zeros(num_classes, 1, dtype=torch.float64) for name in by_name}
    labels = torch.empty(0)

    def add_to_sums(name: str, gate: Gate, x: Tensor) -> None:
        values = gate.answer(x)[0].cpu().double()
        if len(values) != len(labels):
            raise ValueError(
                f"labels must have one entry for each of the {len(values)} maps of {name}, got {len(labels)}"
            )
        sums[name].index_add_(0, labels, values)
        counts[name].index_add_(0, labels, torch.ones(len(labels), 1, dtype=torch.float64))

    device = example_tensor(model).device if device is None else device
    with evaluating(model), observing(model, add_to_sums):
        batch = None
        for batch in batches:
            images, labels = batch[0], _check_labels(batch[1], num_classes)
            model(images.to(device))
        if batch is None:
            raise ValueError("batches must give at least one pair of images and labels, got none: is it used up?")
    return {name: sums[name] / counts[name] for name in by_name}  # 0 / 0 is NaN


def _check_labels(labels: Tensor, num_classes: int) -> Tensor:
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.dim() != 1:
        raise ValueError(f"labels must have shape (N,), got {tuple(labels.shape)}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"labels must be 0 to num_classes - 1 = {num_classes - 1}, got {labels.min()} to {labels.max()}"
        )
    return labels.cpu().long()


def plot_gates_per_class(
    values: Mapping[str, Tensor],
    classes: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    order: Literal["class", "mean", "index"] = "class",
) -> "Figure":
    """Draw the mean gate of every channel for every class: a heat map for each gate, a row for each class.

    All panels share one colour scale, with grey in its middle. The spread in a panel's title is the standard deviation
    across classes, averaged over the channels. It is small if the gate treats all classes alike, as in early stages,
    and large if it distinguishes them. Classes without images (NaN) are white and left out of the spread.

    Args:
        values: Means ``(classes, C)`` by the name of the gate, as :func:`gate_values` returns them.
        classes: Names of the classes. If there are more than 30, only some are written.
        names: Gates to draw. By default all of them or, if there are more than 6, the last of each stage; a stage is a
            sequence of gates with the same number of channels.
        order: How the channels of each gate are sorted. ``"class"``: by the class with the largest gate, then by that
            gate, so that the channels that are large for a class are next to each other (this happens even with noise:
            look at the spread first); ``"mean"``: by their mean over the classes; ``"index"``: not sorted.

    Returns:
        A figure to ``.savefig("gates.png")``. The axes of a gate carry its name as label.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there are no gates, a name or the order is unknown, or values are not ``(classes, C)``.

    Source:
        Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, Figure 5; Wang et al., ECA-Net, arXiv:1910.03151.

    Example:
        >>> values = {"layer1.eca": torch.full((2, 64), 0.5), "layer2.eca": torch.tensor([[0.2], [0.8]]).expand(2, 128)}
        >>> [axes.get_title(loc="left") for axes in plot_gates_per_class(values, ["cat", "dog"]).axes[:2]]
        ['layer1.eca: C = 64, spread across classes 0.000', 'layer2.eca: C = 128, spread across classes 0.300']
    """
    if order not in _ORDERS:
        raise ValueError(f"order must be one of {', '.join(map(repr, _ORDERS))}, got {order!r}")
    shown = gates_to_draw(values, names)
    for name in shown:
        if values[name].dim() != 2 or len(values[name]) != len(classes):
            raise ValueError(
                f"values[{name!r}] must have one row for each of the {len(classes)} classes, "
                f"got shape {tuple(values[name].shape)}"
            )
    columns = 1 if len(shown) <= 4 else 2
    rows = -(-len(shown) // columns)
    side = _LINE * min(max(len(classes), 3), _MAX_NAMES)
    figure = new_figure(height=0.8 + (side + 0.55) * rows)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[*[side] * rows, _BAR])
    panels = [figure.add_subplot(grid[divmod(position, columns)]) for position in range(len(shown))]
    bottom, top = scale_of([values[name] for name in shown])
    for position, name in enumerate(shown):
        axes = panels[position]
        image = _draw(axes, name, values[name].detach().double().cpu(), order, bottom, top)
        if position % columns:
            axes.set_yticks([])
        else:
            _name_rows(axes, classes, values[name])
        if position + columns >= len(shown):
            axes.set_xlabel(_ORDERS[order], fontsize=FONT_SIZE)
    bar = figure.colorbar(image, cax=figure.add_subplot(grid[-1, :]), orientation="horizontal")
    bar.set_ticks([bottom, 0 if bottom else top / 2, top])
    bar.ax.tick_params(colors=DARK, labelsize=SMALL_FONT_SIZE, length=2)
    bar.set_label("gate value (mean over the images of a class)", fontsize=SMALL_FONT_SIZE)
    bar.outline.set_visible(False)
    return figure


def _draw(axes: "Axes", name: str, gate: Tensor, order: str, bottom: int, top: int) -> "AxesImage":
    with_images = gate[gate.isfinite().all(1)]
    if len(with_images) and order == "class":
        gate = gate[:, channels_by_class(gate)]
    elif len(with_images) and order == "mean":
        gate = gate[:, with_images.mean(0).argsort()]
    channels = gate.shape[1]
    style_axes(axes, grid="")
    image = axes.imshow(
        gate.numpy(),
        cmap=diverging(),
        vmin=bottom,
        vmax=top,
        interpolation="nearest",
        aspect="auto",
        extent=(0.5, channels + 0.5, len(gate) - 0.5, -0.5),
    )
    axes.set_label(name)
    spread = spread_of(gate)
    spread_text = "unknown" if spread is None else f"{spread:.3f}"
    title = f"{name}: C = {channels}, spread across classes {spread_text}"
    axes.set_title(title, fontsize=SMALL_FONT_SIZE, loc="left")
    axes.set_xticks(sorted({1, channels}))
    return image


def channels_by_class(gate: Tensor) -> list[int]:
    """Channels sorted by the class with the largest gate, then by that gate in descending order.

    Args:
        gate: Means (classes, C); classes without images (NaN) do not count.
    """
    with_images = gate[gate.isfinite().all(1)]
    if not len(with_images):
        return list(range(gate.shape[1]))
    largest = with_images.max(0)
    return sorted(range(gate.shape[1]), key=lambda c: (largest.indices[c].item(), -largest.values[c].item()))


def scale_of(values: Iterable[Tensor]) -> tuple[int, int]:
    """Ends of a colour scale for gates: 0 and 1, or the whole numbers around all values if some lie outside.

    Sigmoid gates lie between 0 and their factor, which is 1 by default; other gates may be below 0.
    """
    gates = [gate.nan_to_num() for gate in values if gate.numel()]
    top = max(1, math.ceil(max((float(gate.max()) for gate in gates), default=0)))
    return min(0, math.floor(min((float(gate.min()) for gate in gates), default=0))), top


def spread_of(gate: Tensor) -> float | None:
    """Standard deviation across classes, averaged over channels; None if no class has images.

    Args:
        gate: Means (classes, C).
    """
    with_images = gate[gate.isfinite().all(1)]
    return float(with_images.std(0, correction=0).mean()) if len(with_images) else None


def _name_rows(axes: "Axes", classes: Sequence[str], gate: Tensor) -> None:
    step = -(-len(classes) // _MAX_NAMES)
    named = range(0, len(classes), step)
    labels = [classes[i] if gate[i].isfinite().all() else f"{classes[i]} (no images)" for i in named]
    axes.set_yticks(named, labels, fontsize=SMALL_FONT_SIZE)
    axes.tick_params(axis="y", length=0)


def gates_to_draw(values: Mapping[str, Tensor], names: Sequence[str] | None) -> list[str]:
    """Names of the gates to draw: ``names``, or else all gates or, if there are more than 6, the last of each stage."""
    if names is not None:
        unknown = [name for name in names if name not in values]
        if unknown:
            raise ValueError(f"names must be among {', '.join(values)}, got {', '.join(unknown)}")
        shown = list(names)
    else:
        shown = list(values)
        if len(shown) > _MAX_PANELS:
            widths = [values[name].shape[-1] for name in shown]
            following = [*widths[1:], None]
            shown = [name for name, c, after in zip(shown, widths, following, strict=True) if c != after]
    if not shown:
        raise ValueError("values must have at least one gate, got none")
    return shown
