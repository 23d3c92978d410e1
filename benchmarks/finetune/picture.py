"""Figure of ``benchmarks.finetune``: what a trained network still knows after insertion, and how it then learns."""

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from benchmarks import results
from benchmarks.finetune.runs import KEPT, PLAIN, RANDOM, WAYS
from benchmarks.finetune.tables import runs_of, summary
from ecanet.inspect.style import DARK, FONT_SIZE, SMALL_FONT_SIZE, looks, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {way: colour for way, (colour, _) in looks(WAYS).items()}
#: The baseline is dashed and on top: if the function is kept, the lines lie on top of each other.
_DASHES = {PLAIN: "--", KEPT: "-", RANDOM: "-"}
_TICKS = {PLAIN: "no\ngate", KEPT: "function\nkept", RANDOM: "random\ngate"}


def draw(document: results.Document) -> "Figure":
    """Photographs still right after insertion; accuracy by step, its difference from no gate, and the training loss.

    Args:
        document: A result file, with at least one seed that all ways were run with.

    Raises:
        ImportError: matplotlib is missing.
    """
    data = summary(document)
    seeds = len(data["seeds"])
    figure = new_figure(6.8)
    (photographs, curves), (losses, differences) = figure.subplots(2, 2, width_ratios=(1, 1.25))
    _draw_photographs(photographs, data["photographs_right"], document["settings"]["photographs"])

    _style(curves, f"Evaluation (mean, and band of {seeds} seeds)", data["steps"], "top-1, held-out pictures (%)")
    for way in (KEPT, RANDOM, PLAIN):
        by_step = list(zip(*(run["top1"] for run in runs_of(document, way)), strict=True))
        mean = [statistics.fmean(values) for values in by_step]
        _line(curves, way, data["steps"], mean, [min(v) for v in by_step], [max(v) for v in by_step])
    curves.set_ylim(bottom=0)
    curves.legend(loc="lower right", frameon=False, fontsize=SMALL_FONT_SIZE)

    _style(losses, f"Training, batch statistics (mean of {seeds} seeds)", data["steps"], "training loss")
    for way in (KEPT, RANDOM, PLAIN):
        mean = [statistics.fmean(v) for v in zip(*(run["train_loss"] for run in runs_of(document, way)), strict=True)]
        losses.plot(range(1, 1 + len(mean)), mean, color=_COLOURS[way], linestyle=_DASHES[way], linewidth=1.5)
    losses.set_ylim(bottom=0)

    _style(differences, "Paired by seed (mean, and 95 % interval)", data["steps"], f"top-1 - that of {PLAIN} (points)")
    differences.axhline(0, color=DARK, linewidth=1, linestyle="--", zorder=3)
    for way in (KEPT, RANDOM):
        cells = [data["difference"][f"{way} - {PLAIN}"][str(step)] for step in data["steps"]]
        low, high = [c["low"] for c in cells], [c["high"] for c in cells]
        _line(differences, way, data["steps"], [c["mean"] for c in cells], low, high)
    return figure


def _draw_photographs(axes: "Axes", right: Mapping[str, Sequence[int]], count: int) -> None:
    from matplotlib.ticker import MaxNLocator

    style_axes(axes, "", f"ImageNet photographs right, of {count}")
    for i, way in enumerate(WAYS):
        mean = statistics.fmean(right[way])
        axes.bar(i, mean, 0.65, color=_COLOURS[way])
        axes.annotate(
            f"{mean:g}",
            (i, mean),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            color=_COLOURS[way],
            fontsize=FONT_SIZE,
            fontweight="bold",
        )
    axes.set_xticks(range(len(WAYS)), [_TICKS[way] for way in WAYS])
    axes.set_ylim(0, count)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axes.set_title("Right after insertion", fontsize=FONT_SIZE, loc="left")


def _style(axes: "Axes", title: str, steps: Sequence[int], ylabel: str) -> None:
    style_axes(axes, "steps of fine-tuning", ylabel)
    axes.set_title(title, fontsize=FONT_SIZE, loc="left")
    axes.set_xlim(-0.02 * steps[-1], 1.02 * steps[-1])


def _line(
    axes: "Axes",
    way: str,
    steps: Sequence[int],
    mean: Sequence[float],
    low: Sequence[float | None],
    high: Sequence[float | None],
) -> None:
    """Draw a mean with its band; a single seed has no band."""
    if None not in (*low, *high):
        axes.fill_between(steps, low, high, color=_COLOURS[way], alpha=0.15, linewidth=0)
    axes.plot(
        steps, mean, color=_COLOURS[way], linestyle=_DASHES[way], linewidth=2, marker="o", markersize=3.5, label=way
    )
