"""Figure: the time of every implementation over that of the same network part without a gate."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import results
from benchmarks.measure import geometric_mean
from benchmarks.tables import value
from ecanet.inspect.style import COLOURS, DARK, FONT_SIZE, SMALL_FONT_SIZE, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure

#: Case, label, what is 1, and what is compared with it.
_Group = tuple[str, str, str, tuple[str, ...]]
_CPU_GROUPS: tuple[_Group, ...] = (
    ("module/forward", "module\n(1: copying the map)", "clone", ("ecanet", "timm", "plain")),
    ("inference/tail", "tail, inference\n(1: add, ReLU)", "no gate", ("ecanet", "timm")),
    ("training/tail", "tail, training\n(1: norm, add, ReLU)", "no gate", ("ecanet", "timm")),
    ("network/inference", "ResNet-50, inference\n(1: no gate)", "no gate", ("ecanet", "timm")),
    ("network/inference", "inference, optimised\n(1: no gate)", "no gate optimised", ("ecanet optimised",)),
    ("network/training", "ResNet-50, training\n(1: no gate)", "no gate", ("ecanet", "timm")),
    ("network/memory", "training, memory\n(1: no gate)", "no gate", ("ecanet", "timm")),
)
#: Against what is compiled, exactly what is named.
_ON_A_GPU = ("ecanet", "operation compiled", "timm compiled", "SE compiled")
_GPU_GROUPS: tuple[_Group, ...] = (
    *(
        (
            f"{group}/tail/128x{channels}x{size}x{size}",
            f"{label}\n{channels} x {size} x {size}\n(1: no gate,\ncompiled)",
            "no gate compiled",
            _ON_A_GPU,
        )
        for group, label in (("training", "tail,\ntraining"), ("inference", "tail,\ninference"))
        for channels, size in ((256, 56), (512, 28), (1024, 14), (2048, 7))
    ),
    *(
        (
            f"network/{network}-{what}-{mode}",
            f"{label}\n{what}\n{mode}\n(1: no gate)",
            "no gate",
            ("ecanet", "timm", "SE"),
        )
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
)
_LABELS = {
    "ecanet": "ecanet",
    "timm": "timm's EcaModule",
    "plain": "plain PyTorch",
    "no gate": "no gate",
    "SE": "squeeze-and-excitation",
    "operation": "ecanet, one operation",
}
#: A bar's share, and what a group takes at least, for its label.
_BAR, _GROUP = 0.16, 0.5
#: Bars and whiskers above are cut; the number over a bar says how high it is.
_TOP = 6.0


def draw(document: results.Document) -> "Figure":
    """Bars: geometric means over the shapes; whiskers: the smallest and the largest; hatched: under torch.compile.

    Raises:
        ImportError: matplotlib is missing.
    """
    cases: Mapping[str, Mapping[str, Any]] = document["cases"]
    gpu = document["settings"].get("device") == "cuda"
    groups = [
        group for group in (_GPU_GROUPS if gpu else _CPU_GROUPS) if any(k.startswith(group[0] + "/") for k in cases)
    ]
    width = max(13.0, 1.5 * len(groups))
    figure = new_figure(4.6, width=width)
    axes = figure.subplots()
    style_axes(axes, ylabel="ratio to the same without a gate")
    position, ticks, shown = 0.0, [], {}
    for case, label, one, names in groups:
        keys = [key for key in cases if key.startswith(case + "/")]
        present = _present(cases, keys, one, names)
        if not present:
            continue
        taken = max(_GROUP, _BAR * len(present))
        ticks.append((position + taken / 2, label))
        place = position + (taken - _BAR * (len(present) - 1)) / 2
        for name in present:
            bars = _bar(axes, place, name, [value(cases[key], name, one) for key in keys])
            shown[_LABELS[_kind(name)] + (", compiled" if _is_compiled(name) else "")] = bars.patches[0]
            place += _BAR
        position += taken + _BAR
    axes.axhline(1.0, color=DARK, linewidth=1.0)
    axes.set_xticks([tick for tick, _ in ticks], [label for _, label in ticks])
    axes.set_ylim(0, min(_TOP, axes.get_ylim()[1]))
    axes.set_title(
        f"{_where(document)}, {document['settings'].get('dtype', 'float32')}. Bars: geometric mean "
        "over shapes and memory formats; whiskers: smallest and largest",
        fontsize=FONT_SIZE,
        loc="left",
        pad=14,
    )
    handles, labels = list(shown.values()), list(shown)
    columns = int(width // 2.6)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=SMALL_FONT_SIZE, frameon=False)
    return figure


def _where(document: results.Document) -> str:
    machine = document["machine"]
    if document["settings"].get("interpreted"):
        return "Triton's interpreter: the numbers mean nothing"
    if "gpu" in machine:
        return str(machine["gpu"]["name"])
    return f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}"


def _present(
    cases: Mapping[str, Mapping[str, Any]], keys: Sequence[str], one: str, names: Sequence[str]
) -> tuple[str, ...]:
    """Those of the names, plain and compiled, that were measured in every case."""
    if not keys:
        return ()
    measured = set.intersection(*(set(cases[key].get("seconds") or cases[key]["saved_bytes"]) for key in keys))
    if _is_compiled(one):
        return tuple(name for name in names if name in measured)
    wanted = (*(kind for name in names for kind in (name, f"{name} compiled")), f"{one} compiled")
    return tuple(name for name in wanted if one in measured and name in measured)


def _bar(axes: "Axes", position: float, name: str, ratios: Sequence[float]) -> "BarContainer":
    mean, low, high = geometric_mean(ratios), min(ratios), max(ratios)
    bars = axes.bar(
        position,
        mean,
        _BAR * 0.9,
        color=COLOURS[list(_LABELS).index(_kind(name))],
        hatch="///" if _is_compiled(name) else None,
        edgecolor="white",
        yerr=[[mean - low], [high - mean]],
        error_kw={"ecolor": DARK, "elinewidth": 0.8, "capsize": 2},
    )
    axes.annotate(
        f"{mean:.2f}" if mean < _TOP else f"{mean:.3g}",
        (position, min(high, _TOP)),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        fontsize=SMALL_FONT_SIZE - 1,
        color=DARK,
    )
    return bars


def _kind(name: str) -> str:
    return name.removesuffix(" compiled").removesuffix(" optimised")


def _is_compiled(name: str) -> bool:
    return name.endswith(" compiled")
