"""Figure: the adaptive kernel size of Eq. (12) and the kernel sizes that networks use."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ecanet.inspect.style import DARK, FONT_SIZE, GREY, LIGHT, OTHERS, SMALL_FONT_SIZE, new_figure, style_axes
from ecanet.models.stages import RELEASED
from ecanet.nn import adaptive_kernel_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BASIC, _BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)
_MARKERS = "osD^vP"

#: Kernel size by the output channels of a stage, for the networks with released weights. ResNet-152 has ResNet-101's.
RELEASED_KERNELS: dict[str, dict[int, int]] = {
    "ResNet-18": dict(zip(_BASIC, RELEASED["resnet18"], strict=True)),
    "ResNet-34": dict(zip(_BASIC, RELEASED["resnet34"], strict=True)),
    "ResNet-50": dict(zip(_BOTTLENECK, RELEASED["resnet50"], strict=True)),
    "ResNet-101, 152": dict(zip(_BOTTLENECK, RELEASED["resnet101"], strict=True)),
    "MobileNetV2": dict(zip((16, 24, 32, 64, 96, 160, 320), RELEASED["mobilenet_v2"], strict=True)),
}


def plot_kernel_sizes(
    channels: tuple[int, int] = (8, 4096),
    points: Mapping[str, Mapping[int, int]] | None = None,
    *,
    gamma: float = 2,
    b: float = 1,
) -> "Figure":
    """Draw k against C by :func:`~ecanet.nn.adaptive_kernel_size`, with the kernel sizes of real networks.

    Points off the line are filled, points on it hollow. Equal points of several networks are drawn side by side.

    Args:
        channels: First and last C of the line.
        points: The kernel sizes by number of channels for each network; by default those of the released weights. For
            a model, pass ``{g.channels: g.kernel_size for g in gates(model).values()}`` under its name.
        gamma: Slope of the mapping.
        b: Offset of the mapping.

    Returns:
        A figure to ``.savefig("kernel_sizes.png")``.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the range of channels is empty or does not start at 1 or above.

    Source:
        Wang et al., ECA-Net, CVPR 2020, arXiv:1910.03151, Eq. (12).

    Example:
        >>> plot_kernel_sizes((16, 512), {"mine": {64: 3, 128: 7}}).axes[0].get_title(loc="left")
        '1 of 2 kernel sizes differ from the formula (filled), the others agree (hollow)'
    """
    first, last = channels
    if not 1 <= first < last:
        raise ValueError(f"channels must be a first and a larger last number of at least 1, got {channels}")
    points = RELEASED_KERNELS if points is None else points

    def formula(c: int) -> int:
        return adaptive_kernel_size(c, gamma, b)

    figure = new_figure(4.2)
    axes = figure.subplots()
    style_axes(axes, "channels C   (points side by side share one C)", "kernel size k")
    line = [formula(c) for c in range(first, last + 1)]
    label = f"adaptive k, Eq. (12), $\\gamma$ = {gamma:g}, b = {b:g}"
    axes.plot(range(first, last + 1), line, color=GREY, linewidth=4, drawstyle="steps-post", label=label)

    sharing: dict[tuple[int, int], list[str]] = {}
    for name, kernels in points.items():
        for c, k in kernels.items():
            sharing.setdefault((c, k), []).append(name)
    for i, (name, kernels) in enumerate(points.items()):
        colour, marker = OTHERS[i % len(OTHERS)], _MARKERS[i % len(_MARKERS)]
        for c, k in kernels.items():
            names = sharing[c, k]
            x = c * 2 ** (0.24 * (names.index(name) - (len(names) - 1) / 2))
            fill = "white" if k == formula(c) else colour
            axes.plot(x, k, marker, markersize=8.5, color=colour, markerfacecolor=fill, markeredgewidth=1.7, zorder=3)
        axes.plot([], [], marker, markersize=8.5, color=colour, label=name)

    axes.set_xscale("log", base=2)
    ticks = [2**p for p in range(first.bit_length() - 1, last.bit_length() + 1) if first <= 2**p <= last]
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axes.minorticks_off()
    tops = [k for kernels in points.values() for k in kernels.values()]
    axes.set_yticks(range(1, max(line + tops) + 3, 2))
    axes.set_ylim(0.2, max(line + tops) + 0.8)
    axes.grid(axis="x", color=LIGHT, linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=SMALL_FONT_SIZE, handletextpad=0.6)
    total = sum(len(kernels) for kernels in points.values())
    off = sum(k != formula(c) for kernels in points.values() for c, k in kernels.items())
    if total:
        title = f"{off} of {total} kernel sizes differ from the formula (filled), the others agree (hollow)"
        axes.set_title(title, fontsize=FONT_SIZE, loc="left", color=DARK)
    return figure
