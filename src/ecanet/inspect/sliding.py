"""Figure: ECA's kernel at some positions over the channel means; animations of figures."""

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from ecanet.files.atomic import write_whole
from ecanet.inspect.style import DARK, FONT_SIZE, IDEAS, LIGHT, SMALL_FONT_SIZE, WIDTH, bare_axes, new_figure
from ecanet.nn import ECA

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Padding = Literal["zeros", "circular"]

_TITLES = {
    "zeros": "Zero padding: what is outside counts as 0",
    "circular": "Circular padding: the last channel is the first one's neighbour",
}
#: Inches: height of a padding's title, of a position with the space below, of a cell, and from the cells to the gate.
_TITLE, _POSITION, _CELL, _DOWN = 0.5, 1.2, 0.27, 0.3
#: Up to ``_ALL_MEANS`` means are all drawn. Of a kernel up to size ``_ALL_TAPS`` all taps are always drawn.
_ALL_MEANS, _ALL_TAPS = 24, 5
#: Inches between a gate and its formula; largest width of a letter relative to the font size.
_BESIDE, _LETTER = 0.12, 0.7
#: Dots per inch of an animation.
_ANIMATION_DPI = 100


def plot_sliding_kernel(
    channels: int = 8,
    kernel_size: int | Literal["adaptive"] = "adaptive",
    *,
    positions: Sequence[int] | None = None,
    padding: Sequence[Padding] = ("zeros", "circular"),
) -> "Figure":
    """Draw the kernel of ECA at some positions over the channel means, with the gate that it computes there.

    The same k weights w1 to wk slide over the means s1 to sC. Below the means is the gate of the channel in the middle
    of the kernel. At both ends the kernel extends over the padding, which has dashed cells. If there are many channels,
    only both ends and the neighbourhood of the kernel are shown.

    Args:
        channels: Number of channels C.
        kernel_size: k; ``"adaptive"`` is :func:`~ecanet.nn.adaptive_kernel_size` of C.
        positions: Channels, from 1, whose gates are shown, one below the other; by default the first, the middle one
            and the last.
        padding: ``"zeros"`` and ``"circular"``, one or both.

    Returns:
        A figure to ``.savefig("kernel.png")``; one for every position makes an animation: :func:`save_animation`.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: ``channels`` or ``kernel_size`` is not an integer.
        ValueError: :class:`~ecanet.nn.ECA` does not accept the arguments, such as circular padding with k > C; a
            position is not a channel; or a padding is unknown.

    Source:
        Wang et al., ECA-Net, CVPR 2020, arXiv:1910.03151, Figure 2, Eq. (9).

    Example:
        >>> texts = [text.get_text() for text in plot_sliding_kernel(8, 3, positions=[1]).axes[0].texts]
        >>> [text for text in texts if "sigmoid" in text]
        ['g1 = sigmoid(w1 0 + w2 s1 + w3 s2)', 'g1 = sigmoid(w1 s8 + w2 s1 + w3 s2)']
    """
    if isinstance(padding, str) or not padding or any(kind not in _TITLES for kind in padding):
        raise ValueError(f"padding must hold 'zeros', 'circular' or both, got {padding!r}")
    with torch.device("meta"):
        *_, gate = (ECA(channels, kernel_size, circular=kind == "circular") for kind in padding)
    k = gate.kernel_size
    if positions is None:
        positions = sorted({1, (channels + 1) // 2, channels})
    if not positions or any(type(i) is not int or not 1 <= i <= channels for i in positions):
        raise ValueError(f"positions must be channels from 1 to {channels}, got {positions!r}")
    height = len(padding) * (_TITLE + len(positions) * _POSITION)
    figure = new_figure(height, layout=None)
    axes = bare_axes(figure, WIDTH, height)
    y = 0.0
    for kind in padding:
        axes.text(0.3, y + 0.22, _TITLES[kind], fontsize=FONT_SIZE, fontweight="bold", va="center")
        y += _TITLE
        for position in positions:
            _draw_position(axes, y + 0.2, position, channels, k, kind == "circular")
            y += _POSITION
    return figure


def taps(position: int, channels: int, kernel_size: int, circular: bool) -> list[int | None]:
    """The channels, from 1, whose means the k weights multiply for the gate of a channel; None is zero padding.

    Example:
        >>> taps(1, 8, 3, circular=False), taps(1, 8, 3, circular=True)
        ([None, 1, 2], [8, 1, 2])
    """
    first = position - kernel_size // 2
    return [_mean(place, channels, circular) for place in range(first, first + kernel_size)]


def _mean(place: int, channels: int, circular: bool) -> int | None:
    """The channel at a place, which may lie outside 1 to C; None is zero padding."""
    if circular:
        return (place - 1) % channels + 1
    return place if 1 <= place <= channels else None


def _shown(position: int, channels: int, kernel_size: int) -> list[int | None]:
    """The places between 1 - k // 2 and C + k // 2 that are drawn; None stands for a gap."""
    reach = kernel_size // 2
    every = range(1 - reach, channels + reach + 1)
    if len(every) <= _ALL_MEANS:
        return list(every)
    middle = position if 1 < position < channels else (channels + 1) // 2
    steps = range(-reach, reach + 1) if kernel_size <= _ALL_TAPS else (-reach, -1, 0, 1, reach)
    wanted = sorted({centre + step for centre in (1, middle, channels) for step in steps})
    shown: list[int | None] = []
    for place in wanted:
        before = shown[-1] if shown else None
        if before is not None and place == before + 2:
            shown.append(place - 1)
        elif before is not None and place > before + 2:
            shown.append(None)
        shown.append(place)
    return shown


def _draw_position(axes: "Axes", y: float, position: int, channels: int, k: int, circular: bool) -> None:
    from matplotlib.patches import Polygon, Rectangle

    shown = _shown(position, channels, k)
    width = min(0.55, (WIDTH - 0.6) / len(shown))
    left = (WIDTH - width * len(shown)) / 2
    small = min(SMALL_FONT_SIZE, 72 * width / (_LETTER * len(f"s{channels}")))  # points
    first = position - k // 2
    inside = [i for i, place in enumerate(shown) if place is not None and first <= place < first + k]
    for i, place in enumerate(shown):
        x = left + i * width
        if place is None:
            axes.text(x + width / 2, y + _CELL / 2, "...", fontsize=small, ha="center", va="center")
            continue
        channel, padded = _mean(place, channels, circular), not 1 <= place <= channels
        axes.add_patch(
            Rectangle(
                (x, y),
                width,
                _CELL,
                facecolor=LIGHT if padded else "white",
                edgecolor=DARK,
                linewidth=0.8,
                linestyle="--" if padded else "-",
            )
        )
        mean = "0" if channel is None else f"s{channel}"
        axes.text(x + width / 2, y + _CELL / 2, mean, fontsize=small, ha="center", va="center")
        if i in inside:
            axes.text(
                x + width / 2,
                y - 0.1,
                f"w{place - first + 1}",
                fontsize=small,
                color=IDEAS["ECA"],
                ha="center",
                va="center",
                weight="bold",
            )
    x0, x1 = left + inside[0] * width, left + (inside[-1] + 1) * width
    axes.add_patch(
        Rectangle((x0, y), x1 - x0, _CELL, facecolor=IDEAS["ECA"], alpha=0.3, edgecolor=IDEAS["ECA"], linewidth=2.5)
    )
    gate = left + shown.index(position) * width
    below = y + _CELL + _DOWN
    corners = [(x0, y + _CELL), (x1, y + _CELL), (gate + width, below), (gate, below)]
    axes.add_patch(Polygon(corners, facecolor=IDEAS["ECA"], alpha=0.15))
    axes.add_patch(Rectangle((gate, below), width, _CELL, facecolor=IDEAS["ECA"], edgecolor=DARK, linewidth=0.8))
    middle = below + _CELL / 2
    axes.text(gate + width / 2, middle, f"g{position}", fontsize=small, color="white", ha="center", va="center")
    to_the_left, to_the_right = gate, WIDTH - gate - width
    on_the_right = to_the_right >= to_the_left
    axes.text(
        gate + width + _BESIDE if on_the_right else gate - _BESIDE,
        middle,
        _formula(position, taps(position, channels, k, circular), max(to_the_left, to_the_right) - 2 * _BESIDE),
        fontsize=SMALL_FONT_SIZE,
        ha="left" if on_the_right else "right",
        va="center",
    )


def _formula(position: int, channels: Sequence[int | None], room: float) -> str:
    """The formula of a gate, with dots in the middle if it has many terms or needs more than ``room`` inches."""
    terms = [f"w{j} {'0' if channel is None else f's{channel}'}" for j, channel in enumerate(channels, start=1)]
    whole = f"g{position} = sigmoid({' + '.join(terms)})"
    if len(terms) <= _ALL_TAPS and len(whole) * _LETTER * SMALL_FONT_SIZE / 72 <= room:
        return whole
    return f"g{position} = sigmoid({' + '.join([*terms[:2], '...', terms[-1]])})"


def save_animation(figures: Iterable["Figure"], path: str | Path, *, seconds: float = 0.8) -> None:
    """Write figures as an animation that repeats: GIF or animated PNG, 100 dots per inch.

    Args:
        figures: Figures of the same size, in order; each can be freed after it is drawn.
        path: A path that ends in ``.gif``, ``.png`` or ``.apng``.
        seconds: How long each figure is shown.

    Raises:
        TypeError: ``figures`` holds something else, or ``seconds`` is not a number.
        ValueError: there are no figures, their sizes differ, ``path`` has another ending, or ``seconds`` is not above 0
            and at most 60.

    Example:
        >>> frames = (plot_sliding_kernel(8, 3, positions=[i], padding=["zeros"]) for i in range(1, 9))
        >>> save_animation(frames, "kernel.gif")  # doctest: +SKIP
    """
    path = Path(path)
    kind = {".gif": "GIF", ".png": "PNG", ".apng": "PNG"}.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"path must end in .gif, .png or .apng, got {str(path)!r}")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"seconds must be a number, got {seconds!r}")
    if not (math.isfinite(seconds) and 0 < seconds <= 60):
        raise ValueError(f"seconds must be above 0 and at most 60, got {seconds}")
    from PIL import Image  # comes with matplotlib

    frames: list[Image.Image] = []
    for figure in figures:
        if not hasattr(figure, "savefig"):
            raise TypeError(f"figures must hold figures of matplotlib, got {type(figure).__name__}")
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=_ANIMATION_DPI)
        frame = Image.open(drawn).convert("RGB")
        if frames and frame.size != frames[0].size:
            raise ValueError(
                f"figures must have one size: the first has {frames[0].size} pixels, "
                f"number {len(frames) + 1} has {frame.size}"
            )
        frames.append(frame)
    if not frames:
        raise ValueError("figures must hold at least one figure, got none: is it used up?")
    animation = io.BytesIO()
    frames[0].save(
        animation, kind, save_all=True, append_images=frames[1:], duration=round(1000 * seconds), loop=0, optimize=True
    )
    write_whole(path, animation.getvalue())
