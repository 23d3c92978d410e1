"""What every gate costs in a tail in training: ``python -m benchmarks.cpu --only gates``; its table and picture."""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks import results
from benchmarks.cases import MEMORY_FORMATS, QUICK_STAGES, STAGES, Case, FusedTail, SavedBytes, Setup, Tail, Work
from benchmarks.tables import ratio
from ecanet.inspect.style import DARK, FONT_SIZE, IDEAS, SMALL_FONT_SIZE, new_figure, style_axes
from ecanet.nn import GATES
from ecanet.profile.memory import bytes_kept
from ecanet.profile.turns import Competitor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SAMPLES = 8
#: The competitors that are drawn, and their labels.
_DRAWN = {"ecanet": "in ecanet's tail", "plain": "its modules one after another"}


def gate_cases(quick: bool) -> Iterator[Case]:
    """Norm, gate, residual and ReLU, forward and backward, for every gate; then what is saved for the backward.

    Args:
        quick: Tiny shapes.
    """
    shapes = [(_SAMPLES, *stage) for stage in (QUICK_STAGES if quick else STAGES)]
    builders: tuple[tuple[str, Callable[..., Work | SavedBytes]], ...] = (("", _training), ("-saved", _saved))
    for suffix, build in builders:
        for name in GATES:
            for shape in shapes:
                for memory_format in MEMORY_FORMATS:
                    yield Case("gates", name + suffix, shape, memory_format, partial(build, name, shape, memory_format))


def _tails(name: str, shape: tuple[int, ...], memory_format: str) -> tuple[dict[str, Tail], list[Tensor]]:
    """Three tails (fused, module by module, without a gate); and x, the residual and the gradient of the output."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape).contiguous(memory_format=MEMORY_FORMATS[memory_format]) for _ in range(3)]
    norm, gate = nn.BatchNorm2d(shape[1]), GATES[name](shape[1])
    with torch.no_grad():  # as after some training: a gate that starts as the identity or a constant could be cheaper
        for t in (*norm.parameters(), *gate.parameters()):
            t.add_(0.1 * torch.randn_like(t))
    tails = {
        "ecanet": FusedTail(copy.deepcopy(norm), copy.deepcopy(gate)),
        "plain": Tail(copy.deepcopy(norm), gate),
        "no gate": Tail(norm, None),
    }
    return tails, [tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[2]]


def _training(name: str, shape: tuple[int, ...], memory_format: str) -> Work:
    tails, (x, residual, grad) = _tails(name, shape, memory_format)

    def step(tail: Tail) -> tuple[Tensor, ...]:
        out = tail(x, residual)
        # autograd.grad and not backward(): inside a network nothing is a leaf, so no gradient is copied into .grad.
        return (out, *torch.autograd.grad(out, [x, residual, *tail.parameters()], grad))

    def context(kind: str) -> Any:
        return Setup().context(backend="reference" if kind == "plain" else None, grad=True)

    competitors = {kind: Competitor(partial(step, tail), partial(context, kind)) for kind, tail in tails.items()}
    return Work(competitors, (("plain", "ecanet"), ("no gate",)), 2e-2)  # one ReLU that rounds differently is 6e-3


def _saved(name: str, shape: tuple[int, ...], memory_format: str) -> SavedBytes:
    tails, (x, residual, _) = _tails(name, shape, memory_format)

    def count(kind: str, tail: Tail) -> int:
        with Setup().context(backend="reference" if kind == "plain" else None, grad=True):
            return bytes_kept(tail, lambda: tail(x, residual))

    return SavedBytes({kind: partial(count, kind, tail) for kind, tail in tails.items()})


def measured_gates(cases: Mapping[str, Any]) -> list[str]:
    """Names of the gates for which a result file has times."""
    names = (key.split("/")[1] for key in cases if key.startswith("gates/"))
    return list(dict.fromkeys(name for name in names if not name.endswith("-saved")))


def draw_gates(document: results.Document) -> "Figure":
    """A row for each gate: the time of its tail and of its modules, relative to norm, residual and ReLU alone.

    Raises:
        ImportError: matplotlib is missing.
    """
    cases = document["cases"]
    names = measured_gates(cases)
    rows = []
    for name in names:
        keys = [key for key in cases if key.startswith(f"gates/{name}/")]
        rows.append((name, {kind: ratio(cases, keys, kind, "no gate").value for kind in _DRAWN}))
    rows.sort(key=lambda row: -row[1]["ecanet"])
    figure = new_figure(1.3 + 0.42 * len(rows))
    axes = figure.subplots()
    style_axes(axes, xlabel="time of a training step over that without a gate", grid=False)
    for (kind, label), colour, shift in zip(_DRAWN.items(), (IDEAS["ECA"], IDEAS["plain"]), (0.2, -0.2), strict=True):
        values = [row[1][kind] for row in rows]
        bars = axes.barh([i + shift for i in range(len(rows))], values, 0.38, color=colour, label=label)
        numbers = axes.bar_label(bars, [f"{v:.2f}" for v in values], padding=3, fontsize=SMALL_FONT_SIZE, color=DARK)
        for number in numbers:  # the line at 1 runs behind it
            number.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=FONT_SIZE)
    axes.axvline(1.0, color=DARK, linewidth=1.0)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(0, 1.12 * max(max(row[1].values()) for row in rows))
    machine = document["machine"]
    axes.set_title(
        f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}: geometric mean over "
        f"ResNet-50's four stages, {_SAMPLES} samples, two memory formats",
        fontsize=SMALL_FONT_SIZE, loc="left", pad=10,
    )  # fmt: skip
    figure.legend(loc="outside lower center", ncols=2, fontsize=FONT_SIZE, frameon=False)
    return figure
