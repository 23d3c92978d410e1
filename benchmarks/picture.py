"""Figure: the time of every implementation relative to the same without a gate, for operations and whole networks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks import results
from benchmarks.tables import value
from ecanet.inspect.style import DARK, FONT_SIZE, IDEAS, SMALL_FONT_SIZE, idea_of, new_figure, style_axes
from ecanet.profile.turns import geometric_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Case, label, the baseline, and the competitors that are compared with it.
_Group = tuple[str, str, str, tuple[str, ...]]
_OURS_AND_TIMM = ("ecanet", "timm")
_CPU_PANELS: dict[str, tuple[_Group, ...]] = {
    "Whole networks (ResNet-50), 1: no gate": (
        ("network/training", "training step", "no gate", _OURS_AND_TIMM),
        ("network/inference", "inference", "no gate", _OURS_AND_TIMM),
        ("network/inference", "inference,\nboth optimised", "no gate optimised", ("ecanet optimised",)),
        ("network/memory", "bytes kept for\nthe backward", "no gate", _OURS_AND_TIMM),
    ),
    "Operations on one map": (
        ("training/tail", "tail, training\n1: norm, add, ReLU", "no gate", _OURS_AND_TIMM),
        ("inference/tail", "tail, inference\n1: add, ReLU", "no gate", _OURS_AND_TIMM),
        ("module/forward", "module alone\n1: copying the map", "clone", ("ecanet", "timm", "plain")),
    ),
}
#: If the baseline is compiled, exactly these are drawn.
_ON_A_GPU = ("ecanet", "operation compiled", "timm compiled", "SE compiled")
_GPU_PANELS: dict[str, tuple[_Group, ...]] = {
    "Whole networks, 1: no gate": tuple(
        (f"network/{network}-{what}-{mode}", f"{label}\n{what}, {mode}", "no gate", ("ecanet", "timm", "SE"))
        for network, label in (
            ("resnet50", "ResNet-50"),
            ("resnet101", "ResNet-101"),
            ("mobilenet_v2", "MobileNetV2"),
            ("ecaresnet50d", "ECA-ResNet-50-D"),
            ("small_resnet", "small ResNet"),
        )
        for what in ("training", "inference")
        for mode in ("eager", "compiled", "graphs")
    ),
    **{
        f"Tail of a block, {group}, 1: no gate, compiled": tuple(
            (
                f"{group}/tail/128x{channels}x{size}x{size}",
                f"{channels} x {size} x {size}",
                "no gate compiled",
                _ON_A_GPU,
            )
            for channels, size in ((256, 56), (512, 28), (1024, 14), (2048, 7))
        )
        for group in ("training", "inference")
    },
}
_LABELS = {
    "ecanet": "ecanet",
    "timm": "timm's EcaModule",
    "plain": "plain PyTorch",
    "no gate": "no gate",
    "SE": "squeeze-and-excitation",
    "operation": "ecanet, one operation",
}
#: Inches: a bar with the line below it, the space between groups, title and axis of a panel, title and legend.
_BAR, _SPACE, _PANEL, _AROUND = 0.26, 0.16, 0.75, 0.75


@dataclass(frozen=True)
class _Bar:
    """Ratios of one implementation, and where they are drawn, in inches from the top of the panel."""

    name: str
    ratios: Sequence[float]
    place: float


def draw(document: results.Document) -> "Figure":
    """Bars from 1: geometric means over the shapes, on a log axis; below each a line from the smallest to the largest.

    One panel for whole networks and one for operations, each with its own scale. What runs under
    torch.compile is hatched.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the file has none of the cases that are drawn.
    """
    cases: Mapping[str, Mapping[str, Any]] = document["cases"]
    panels = _GPU_PANELS if document["settings"].get("device") == "cuda" else _CPU_PANELS
    drawn = {title: _bars(cases, groups) for title, groups in panels.items()}
    drawn = {title: (bars, ticks) for title, (bars, ticks) in drawn.items() if bars}
    if not drawn:
        groups = sorted({"/".join(key.split("/")[:2]) for key in cases})
        raise ValueError(f"document must have a case of a module, tail or network, got {', '.join(groups) or 'none'}")
    heights = [bars[-1].place + _BAR + _SPACE for bars, _ in drawn.values()]
    figure = new_figure(sum(heights) + _PANEL * len(heights) + _AROUND)
    rows = figure.subplots(len(heights), 1, squeeze=False, height_ratios=[h + _PANEL for h in heights])[:, 0]
    shown: dict[str, Any] = {}
    for axes, (title, (bars, ticks)), height in zip(rows, drawn.items(), heights, strict=True):
        style_axes(axes, grid="x")
        axes.set_title(title, fontsize=FONT_SIZE, loc="left", fontweight="bold")
        axes.set_ylim(height, 0)
        axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
        axes.tick_params(axis="y", length=0)
        _scale(axes, [ratio for bar in bars for ratio in bar.ratios])
        for bar in bars:
            _draw_bar(axes, bar)
            kind = _LABELS[_kind(bar.name)] + (", compiled" if _is_compiled(bar.name) else "")
            shown.setdefault(kind, axes.patches[-1])
        axes.axvline(1.0, color=DARK, linewidth=1.2)
    rows[-1].set_xlabel("ratio to the same without a gate (log scale); left of 1 is less", fontsize=FONT_SIZE)
    several = any(len(bar.ratios) > 1 for bars, _ in drawn.values() for bar in bars)
    explanation = "\nBar and number: geometric mean over shapes and formats. Thin line below: smallest to largest"
    figure.suptitle(
        f"{_where(document)}, {document['settings'].get('dtype', 'float32')}{explanation * several}",
        fontsize=SMALL_FONT_SIZE,
        x=0.01,
        ha="left",
    )
    figure.legend(
        list(shown.values()), list(shown), loc="outside lower center", ncols=4, fontsize=SMALL_FONT_SIZE, frameon=False
    )
    return figure


def _bars(
    cases: Mapping[str, Mapping[str, Any]], groups: Sequence[_Group]
) -> tuple[list[_Bar], list[tuple[float, str]]]:
    """Bars of a panel, and place and label of each group."""
    bars: list[_Bar] = []
    ticks = []
    place = _SPACE
    for case, label, baseline, names in groups:
        keys = [key for key in cases if key.startswith(case + "/")]
        present = _present(cases, keys, baseline, names)
        if not present:
            continue
        ticks.append((place + _BAR * len(present) / 2, label))
        space = max(0.0, 2 * 0.17 - _BAR * len(present))  # a label has two lines
        place += space / 2
        for name in present:
            bars.append(_Bar(name, [value(cases[key], name, baseline) for key in keys], place))
            place += _BAR
        place += space / 2 + _SPACE
        ticks[-1] = (place - _SPACE - (space + _BAR * len(present)) / 2, label)
    return bars, ticks


def _scale(axes: "Axes", ratios: Sequence[float]) -> None:
    """Set a log axis around 1 with room for numbers, and a few round ticks."""
    low, high = min(1.0, *ratios), max(1.0, *ratios)
    room = 0.09 * math.log(high / low) + 0.01
    low, high = low * math.exp(-room), high * math.exp(room)
    steps = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if high / low < 5 else ()
    step = next((step for step in steps if (high - low) / step <= 9), None)
    if step:
        ticks = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    else:
        ticks = [2.0**i for i in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.minorticks_off()


def _draw_bar(axes: "Axes", bar: _Bar) -> None:
    mean = geometric_mean(bar.ratios)
    idea = idea_of(_LABELS[_kind(bar.name)])
    assert idea is not None
    axes.barh(
        bar.place + 0.38 * _BAR,
        mean - 1,
        0.62 * _BAR,
        left=1,
        color=IDEAS[idea],
        hatch="///" if _is_compiled(bar.name) else None,
        edgecolor="white",
        linewidth=0,
    )
    below = bar.place + 0.84 * _BAR
    axes.plot(
        [min(bar.ratios), max(bar.ratios)], [below, below], color=IDEAS[idea], linewidth=1.3, solid_capstyle="butt"
    )
    axes.annotate(
        f"{mean:.2f}",
        (mean, bar.place + 0.38 * _BAR),
        xytext=(4 if mean >= 1 else -4, 0),
        textcoords="offset points",
        ha="left" if mean >= 1 else "right",
        va="center",
        fontsize=SMALL_FONT_SIZE,
        color=DARK,
    )


def _where(document: results.Document) -> str:
    machine = document["machine"]
    if document["settings"].get("interpreted"):
        return "Triton's interpreter: the numbers mean nothing"
    if "gpu" in machine:
        return str(machine["gpu"]["name"])
    return f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}"


def _present(
    cases: Mapping[str, Mapping[str, Any]], keys: Sequence[str], baseline: str, names: Sequence[str]
) -> tuple[str, ...]:
    """The names, plain and compiled, that were measured in every case."""
    if not keys:
        return ()
    measured = set.intersection(*(set(cases[key].get("seconds") or cases[key]["saved_bytes"]) for key in keys))
    if _is_compiled(baseline):
        return tuple(name for name in names if name in measured)
    wanted = (*(kind for name in names for kind in (name, f"{name} compiled")), f"{baseline} compiled")
    return tuple(name for name in wanted if baseline in measured and name in measured)


def _kind(name: str) -> str:
    return name.removesuffix(" compiled").removesuffix(" optimised")


def _is_compiled(name: str) -> bool:
    return name.endswith(" compiled")
