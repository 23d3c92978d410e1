"""Figure: the time of every implementation over that of the same network part without a gate."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks import results
from benchmarks.measure import geometric_mean
from benchmarks.report import ratio
from ecanet.inspect.style import COLOURS, DARK, FONT_SIZE, SMALL_FONT_SIZE, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Case, label, what is 1, and what is compared with it.
_GROUPS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("module/forward", "module\n(1: copying the map)", "clone", ("ecanet", "timm", "plain")),
    ("inference/tail", "tail, inference\n(1: add, ReLU)", "no gate", ("ecanet", "timm")),
    ("training/tail", "tail, training\n(1: norm, add, ReLU)", "no gate", ("ecanet", "timm")),
    ("network/inference", "ResNet-50, inference\n(1: no gate)", "no gate", ("ecanet", "timm")),
    ("network/inference", "optimised for inference\n(1: no gate, too)", "no gate optimised", ("ecanet optimised",)),
    ("network/training", "ResNet-50, training\n(1: no gate)", "no gate", ("ecanet", "timm")),
    ("network/memory", "saved for backward\n(1: no gate)", "no gate", ("ecanet", "timm")),
)
_LABELS = {
    "ecanet": "ecanet",
    "timm": "timm's EcaModule",
    "plain": "plain PyTorch",
    "no gate": "no gate",
}
_BAR = 0.16


def draw(document: results.Document) -> "Figure":
    """Bars: geometric means over the shapes; whiskers: the smallest and the largest; hatched: under torch.compile.

    Raises:
        ImportError: matplotlib is missing.
    """
    cases: Mapping[str, Mapping[str, Any]] = document["cases"]
    figure = new_figure(4.2, width=13.0)
    axes = figure.subplots()
    machine = document["machine"]
    style_axes(axes, ylabel="ratio to the same without a gate")
    centre, ticks, seen = 0.0, [], {}
    for case, label, one, names in _GROUPS:
        keys = [key for key in cases if key.startswith(case + "/")]
        measured = [cases[key].get("seconds", cases[key].get("saved_bytes")) for key in keys]
        names = tuple(n for name in names for n in (name, f"{name} compiled")) + (f"{one} compiled",)
        names = tuple(name for name in names if measured and all({name, one} <= set(m) for m in measured))
        if not names:
            continue
        width = _BAR * len(names)
        for i, name in enumerate(names):
            ratios = [ratio(cases, [key], name, one).value for key in keys]
            mean = geometric_mean(ratios)
            kind = name.removesuffix(" compiled").removesuffix(" optimised")
            bars = axes.bar(
                centre + _BAR * (i + 0.5),
                mean,
                _BAR * 0.9,
                color=COLOURS[list(_LABELS).index(kind)],
                hatch="///" if name.endswith("compiled") else None,
                edgecolor="white",
                yerr=[[mean - min(ratios)], [max(ratios) - mean]],
                error_kw={"ecolor": DARK, "elinewidth": 0.8, "capsize": 2},
            )
            seen[_LABELS[kind] + (", compiled" if name.endswith("compiled") else "")] = bars[0]
            axes.annotate(
                f"{mean:.2f}",
                (centre + _BAR * (i + 0.5), max(ratios)),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=SMALL_FONT_SIZE - 1,
                color=DARK,
            )
        ticks.append((centre + width / 2, label))
        centre += width + 1.6 * _BAR
    axes.axhline(1.0, color=DARK, linewidth=1.0)
    axes.set_xticks([tick for tick, _ in ticks], [label for _, label in ticks])
    axes.set_ylim(0, None)
    axes.set_title(
        f"{machine['cpu']}, {machine['threads']} thread(s), float32: geometric mean, smallest and largest over shapes "
        "and memory formats",
        fontsize=FONT_SIZE,
        loc="left",
    )
    axes.legend(seen.values(), seen.keys(), fontsize=SMALL_FONT_SIZE, frameon=False, ncols=len(seen))
    return figure
