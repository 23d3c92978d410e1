"""The values of gates against the statistics of their input maps: samples, and a figure."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ecanet.inspect.per_class import gates_to_draw
from ecanet.inspect.style import FONT_SIZE, OTHERS, SMALL_FONT_SIZE, new_figure, style_axes
from ecanet.networks.running import evaluating, example_tensor, gates, observing
from ecanet.nn import Gate
from ecanet.untrusted import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Largest number of points in a panel; if there are more, evenly spaced ones are drawn.
_MAX_POINTS = 4000


class Responses(NamedTuple):
    """Input statistics and values of a gate. Every tensor is ``(N, C)`` in float64 on the CPU.

    Attributes:
        means: Mean of every channel's map.
        deviations: Biased standard deviation of every channel's map, or None for a gate that does not use it.
        scales: What the map was multiplied by; for a gate with a value at every position, such as CBAM, the mean over
            the positions.
        shifts: What was added to the map, or None.
    """

    means: Tensor
    deviations: Tensor | None
    scales: Tensor
    shifts: Tensor | None


def gate_responses(model: nn.Module, images: Tensor, device: torch.device | str | None = None) -> dict[str, Responses]:
    """Collect the input statistics and the values of every gate of a model for some images.

    The model runs once, in eval mode, and keeps its mode, weights and statistics. If a gate runs several times in a
    forward pass, its samples are concatenated.

    Args:
        model: Model that takes the images; it stays on its device.
        images: ``(N, ...)``.
        device: Device to move the images to; by default that of the model's weights.

    Returns:
        The samples by the gate's qualified name.

    Raises:
        ValueError: there are no gates, or a gate does not run.

    Example:
        >>> from ecanet.models import small_eca_resnet
        >>> seen = gate_responses(small_eca_resnet("gct"), torch.randn(4, 3, 28, 28))
        >>> seen["layer1.0.eca"].deviations.shape, seen["layer1.0.eca"].scales.unique()
        (torch.Size([4, 32]), tensor([1.], dtype=torch.float64))
    """
    if not gates(model):
        raise ValueError(f"model must have at least one ecanet.nn.Gate, {type(model).__name__} has none")
    calls: dict[str, list[tuple[Tensor | None, ...]]] = {}

    def record(name: str, gate: Gate, x: Tensor) -> None:
        statistics = gate.statistics(x)
        scale, shift = gate.answer(x)
        deviations = None if statistics.variances is None else statistics.variances.sqrt()
        calls.setdefault(name, []).append((statistics.means, deviations, scale, shift))

    device = example_tensor(model).device if device is None else device
    with evaluating(model), observing(model, record):
        model(images.to(device))
    return {name: _concatenate(of_gate) for name, of_gate in calls.items()}


def _concatenate(calls: Sequence[tuple[Tensor | None, ...]]) -> Responses:
    parts = [[t.detach().cpu().double() for t in part if t is not None] for part in zip(*calls, strict=True)]
    means, deviations, scales, shifts = (torch.cat(part) if part else None for part in parts)
    assert means is not None
    assert scales is not None
    return Responses(means, deviations, scales, shifts)


def plot_gate_responses(
    responses: Mapping[str, Responses],
    *,
    names: Sequence[str] | None = None,
) -> "Figure":
    """Draw gates against the statistics of their input, a dot for every channel of every sample.

    Each gate has a row: on the left against the channel's mean, on the right against its standard deviation, if the
    gate uses it. The shift of a gate, if it has one, is drawn in a second colour.

    Args:
        responses: As :func:`gate_responses` returns them.
        names: Gates to draw. By default all of them or, if there are more than 6, the last of each stage; a stage is a
            sequence of gates with the same number of channels.

    Returns:
        A figure to ``.savefig("responses.png")``.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there are no gates, or a name is unknown.

    Example:
        >>> from ecanet.models import small_eca_resnet
        >>> seen = gate_responses(small_eca_resnet("grn"), torch.randn(4, 3, 28, 28))
        >>> [axes.get_xlabel() for axes in plot_gate_responses(seen).axes[-2:]]
        ['mean of the channel', 'standard deviation of the channel']
    """
    shown = gates_to_draw({name: samples.scales for name, samples in responses.items()}, names)
    columns = 2 if any(responses[name].deviations is not None for name in shown) else 1
    figure = new_figure(height=0.6 + 2.0 * len(shown))
    panels = figure.subplots(len(shown), columns, squeeze=False, sharey="row")
    labels = ("mean of the channel", "standard deviation of the channel")
    for row, name in zip(panels, shown, strict=True):
        samples = responses[name]
        for axes, statistic, label in zip(row, (samples.means, samples.deviations), labels, strict=False):
            if statistic is None:
                axes.remove()
                continue
            last = name == shown[-1]
            style_axes(axes, label if last else "", "gate value" if axes is row[0] else "")
            for values, colour, what in ((samples.scales, OTHERS[0], "scale"), (samples.shifts, OTHERS[1], "shift")):
                if values is not None:
                    step = -(-values.numel() // _MAX_POINTS)
                    points = (t.flatten()[::step].numpy() for t in (statistic, values))
                    axes.plot(*points, linestyle="", marker=".", markersize=2.5, alpha=0.6, color=colour, label=what)
        maps, channels = samples.scales.shape
        title = f"{name}: C = {channels}, {counted(maps, 'map')}"
        row[0].set_title(title, fontsize=SMALL_FONT_SIZE, loc="left")
    if any(responses[name].shifts is not None for name in shown):
        both = next(row[0] for row, name in zip(panels, shown, strict=True) if responses[name].shifts is not None)
        legend = figure.legend(
            handles=both.get_lines(), loc="outside lower center", ncols=2, frameon=False, fontsize=FONT_SIZE
        )
        for handle in legend.get_lines():
            handle.set(markersize=10, alpha=1)
    return figure
