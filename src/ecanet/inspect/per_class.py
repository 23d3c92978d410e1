"""The gates that a model learned, class by class: values and figure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ecanet.inspect.style import COLOURS, FONT_SIZE, SMALL_FONT_SIZE, new_figure, style_axes
from ecanet.networks.running import evaluating, example_tensor, gates, observing
from ecanet.nn import Gate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: If there are more gates than this, only the last of each stage is drawn.
_MAX_PANELS = 6


def gate_values(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Mean gate of every channel for every class, for all gates of a model, in one pass over the data.

    A gate's value is what the map is multiplied by; what some gates add as well is not in it.
    The model runs in eval mode and keeps its own mode, weights and statistics. A gate that runs several times in a
    forward pass is averaged over all of them.

    Args:
        model: Model that takes the images of a batch; it is not moved.
        batches: Pairs of images ``(N, ...)`` and integer labels ``(N,)``, such as a DataLoader.
        num_classes: Number of classes; labels are 0 to ``num_classes - 1``.
        device: Device to move the images to; by default that of the model's weights.

    Returns:
        Means ``(num_classes, C)`` by the gate's qualified name, float64, on the CPU. Classes without images are NaN.

    Raises:
        ValueError: no gates, no batches, labels that are not ``(N,)`` or out of range, or a gate that does not run.
        TypeError: labels are not integers.

    Example:
        >>> from ecanet.models import small_eca_resnet
        >>> batches = [(torch.randn(4, 3, 28, 28), torch.tensor([0, 1, 1, 0]))]
        >>> {name: tuple(v.shape) for name, v in gate_values(small_eca_resnet(num_classes=2), batches, 2).items()}
        {'layer1.0.eca': (2, 32), 'layer2.0.eca': (2, 64), 'layer3.0.eca': (2, 128)}
    """
    found = gates(model)
    if not found:
        raise ValueError(f"model must have at least one ecanet.nn.Gate, {type(model).__name__} has none")
    if num_classes < 1:
        raise ValueError(f"num_classes must be 1 or more, got {num_classes}")
    sums = {name: torch.zeros(num_classes, gate.channels, dtype=torch.float64) for name, gate in found.items()}
    counts = {name: torch.zeros(num_classes, 1, dtype=torch.float64) for name in found}
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
    return {name: sums[name] / counts[name] for name in found}  # 0 / 0 is NaN


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
    by_mean: bool = False,
) -> "Figure":
    """Draw the mean gate of every channel, one line per class, one panel per gate.

    The spread in a panel's title is the standard deviation across classes, averaged over the channels. It is small if
    the gate treats all classes alike, as in early stages, and large if it tells them apart. Classes without images
    (NaN) are left out of the spread and of the panels.

    Args:
        values: Means ``(classes, C)`` by the name of the gate, as :func:`gate_values` returns them.
        classes: Name of every class. About 10 are legible; for fewer, take rows of the values.
        names: Gates to draw. By default all of them or, if there are more than 6, the last of each stage; a stage is a
            run of gates with the same number of channels.
        by_mean: Sort the channels of each gate by their mean over the classes, instead of by index. With a few hundred
            channels or more this is easier to read.

    Returns:
        A figure to ``.savefig("gates.png")``.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no gates, an unknown name, or values that are not ``(classes, C)``.

    Source:
        Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, Figure 5; Wang et al., ECA-Net, arXiv:1910.03151.

    Example:
        >>> values = {"layer1.eca": torch.full((2, 64), 0.5), "layer2.eca": torch.tensor([[0.2], [0.8]]).expand(2, 128)}
        >>> [axes.get_title(loc="left") for axes in plot_gates_per_class(values, ["cat", "dog"]).axes]
        ['layer1.eca: C = 64, spread across classes 0.000', 'layer2.eca: C = 128, spread across classes 0.300']
    """
    shown = gates_to_draw(values, names)
    for name in shown:
        if values[name].dim() != 2 or len(values[name]) != len(classes):
            raise ValueError(
                f"values[{name!r}] must have one row for each of the {len(classes)} classes, "
                f"got shape {tuple(values[name].shape)}"
            )
    columns = 1 if len(shown) <= 4 else 2
    rows = -(-len(shown) // columns)
    figure = new_figure(height=0.9 + 1.75 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in panels.flat[len(shown) :]:
        axes.remove()
    colours = _class_colours(len(classes))
    # A sigmoid is from 0 to 1, or to the gate's factor, such as that of a neutral one; other gates may be below 0.
    seen = [values[name].nan_to_num() for name in shown if values[name].numel()]
    top = max(1, math.ceil(max((float(gate.max()) for gate in seen), default=0)))
    bottom = min(0, math.floor(min((float(gate.min()) for gate in seen), default=0)))
    for position, name in enumerate(shown):
        axes, gate = panels.flat[position], values[name].detach().double().cpu()
        channels = gate.shape[1]
        style_axes(axes, ylabel="" if position % columns else "gate value")
        if position + columns >= len(shown):
            axes.set_xlabel(
                "channel, in ascending order of its mean gate" if by_mean else "channel", fontsize=FONT_SIZE
            )
        with_images = gate[gate.isfinite().all(1)]
        if by_mean:
            gate = gate[:, with_images.mean(0).argsort()]
        # In that order neighbours are unrelated: draw dots, no lines.
        marks = {"linestyle": "", "marker": ".", "markersize": 3 if channels <= 128 else 1.5} if by_mean else {}
        for row, class_name, colour in zip(gate, classes, colours, strict=True):
            label = class_name if row.isfinite().all() else f"{class_name} (no images)"
            width = 1.1 if channels <= 128 else 0.6
            axes.plot(range(1, channels + 1), row.numpy(), color=colour, linewidth=width, label=label, **marks)
        spread = f"{with_images.std(0, correction=0).mean():.3f}" if len(with_images) else "unknown"
        axes.set_title(f"{name}: C = {channels}, spread across classes {spread}", fontsize=SMALL_FONT_SIZE, loc="left")
        axes.set_xlim(1, max(channels, 2))
        axes.set_ylim(bottom, top)
        axes.set_yticks([bottom, 0 if bottom else top / 2, top])
    if len(classes) <= 30:
        handles = panels.flat[0].get_lines()
        legend = figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=min(len(classes), 5),
            frameon=False,
            fontsize=SMALL_FONT_SIZE,
        )
        for handle in legend.get_lines():
            handle.set(linewidth=2.5, linestyle="-", marker="")
    return figure


def gates_to_draw(values: Mapping[str, Tensor], names: Sequence[str] | None) -> list[str]:
    """The named gates or, without names and with more than 6 gates, the last of each stage."""
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


def _class_colours(classes: int) -> Sequence[object]:
    if classes <= len(COLOURS):
        return COLOURS[:classes]
    from matplotlib import colormaps

    return [colormaps["viridis"](i / (classes - 1)) for i in range(classes)]
