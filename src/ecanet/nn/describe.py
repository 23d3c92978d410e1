"""What every gate computes, needs and costs: the facts behind ``ecanet gates`` and docs/gates.md."""

import copy
import inspect
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from ecanet.nn.build import GATES, NAMED_GATES, GateFactory, check_gate_name
from ecanet.nn.gate import Gate
from ecanet.nn.timm_gates import LAYERS, PREFIX

#: The number of channels C for which parameters are counted.
CHANNELS = 256


class GateDescription(NamedTuple):
    """One gate of :data:`ecanet.nn.GATES`.

    Attributes:
        name: Its name in :data:`ecanet.nn.GATES`.
        call: The class or function and its arguments without ``factor``.
        formula: What it computes of a map x with channel means s, in one line.
        parameters_of_c: The number of parameters as a formula of the number of channels C.
        parameters: Their number at 256 channels.
        neutral: The gate's value with neutral weights, without the factor; None if it has no neutral weights.
        neutral_weights: Which weights a neutral start sets; or why there is no neutral start.
        needs: ``"means"``, ``"means, variances"`` or ``"the map"``.
        fused: Whether the fused tail computes it; otherwise the tail calls it.
        source: The publication or code that the formula is from.
    """

    name: str
    call: str
    formula: str
    parameters_of_c: str
    parameters: int
    neutral: float | None
    neutral_weights: str
    needs: str
    fused: bool
    source: str

    @property
    def neutral_start(self) -> str:
        """How the gate can start as 1, in a few words."""
        if self.neutral is None:
            return f"none: {self.neutral_weights}"
        return self.neutral_weights if self.neutral == 1 else f"{self.neutral_weights}, factor {1 / self.neutral:g}"


class _Facts(NamedTuple):
    """What a gate object cannot tell about itself."""

    formula: str
    parameters_of_c: str
    neutral_weights: str
    source: str


_ECA_NET = "Wang et al., ECA-Net, CVPR 2020, arXiv:1910.03151"
_TABLE_2 = f"{_ECA_NET}, Table 2"

#: s: channel means; | |: the l2 norm. Means, maxima and norms are over the positions of a channel, unless the formula
#: says otherwise.
_FACTS: dict[str, _Facts] = {
    "eca": _Facts("x sigmoid(conv1d_k(s))", "k", "W = 0", f"{_ECA_NET}, Eq. (8), (9)"),
    "eca_ns": _Facts("x sigmoid(W s), W a band of k", "k C", "W = 0", f"{_ECA_NET}, Eq. (6), (7)"),
    "se": _Facts(
        "x sigmoid(W2 relu(W1 s))", "2 C (C // r)", "W2 = 0", "Hu et al., Squeeze-and-Excitation Networks, CVPR 2018"
    ),
    "se_var1": _Facts("x sigmoid(s)", "0", "it has no weights", _TABLE_2),
    "se_var2": _Facts("x sigmoid(w s), per channel", "C", "w = 0", f"{_TABLE_2}, Eq. (4)"),
    "se_var3": _Facts("x sigmoid(W s), W full", "C^2", "W = 0", f"{_TABLE_2}, Eq. (4)"),
    "se_gc1": _Facts("x sigmoid(W s), W of 16 blocks", "C^2 / 16", "W = 0", f"{_TABLE_2}, Eq. (5)"),
    "se_gc2": _Facts("x sigmoid(W s), W of C / 16 blocks", "16 C", "W = 0", f"{_TABLE_2}, Eq. (5)"),
    "se_gc3": _Facts("x sigmoid(W s), W of C / 8 blocks", "8 C", "W = 0", f"{_TABLE_2}, Eq. (5)"),
    "ese": _Facts(
        "x hard_sigmoid(W s + b)", "C^2 + C", "W = b = 0", "Lee and Park, CenterMask, CVPR 2020, arXiv:1911.06667"
    ),
    "se_shift": _Facts(
        "x sigmoid(l) + b, (l, b) = W2 relu(W1 s + b1) + b2",
        "3 C (C // r) + C // r + 2 C",
        "W2 = b2 = 0",
        "Leela Chess Zero, lczero.org/dev/backend/nn",
    ),
    "lct": _Facts(
        "x sigmoid(w v + b), v = s normalised in its group of channels",
        "2 C",
        "w = b = 0",
        "Ruan et al., Linear Context Transform Block, AAAI 2020, arXiv:1909.03834",
    ),
    "gct_gauss": _Facts(
        "x exp(-v^2 / (2 c^2)), v = s normalised over the channels",
        "0, or 1 with c learnable",
        "no c makes it constant",
        "Ruan et al., Gaussian Context Transformer, CVPR 2021",
    ),
    "srm": _Facts(
        "x sigmoid(bn(w1 s + w2 deviation)), per channel",
        "4 C",
        "w1 = w2 = 0, the norm's bias and running mean 0",
        "Lee et al., SRM, ICCV 2019, arXiv:1903.10829, Eq. (1) to (6)",
    ),
    "gct": _Facts(
        "x (1 + tanh(gamma e / rms(e) + beta)), e = alpha |x|",
        "3 C",
        "gamma = beta = 0",
        "Yang et al., Gated Channel Transformation, CVPR 2020, arXiv:1909.11519, Eq. (1) to (5)",
    ),
    "grn": _Facts(
        "x + w x |x| / mean(|x|) + b",
        "2 C",
        "w = b = 0",
        "Woo et al., ConvNeXt V2, CVPR 2023, arXiv:2301.00808, Eq. (1) to (3)",
    ),
    "cbam": _Facts(
        "y sigmoid(bn(conv7x7(mean y, max y))), y = x sigmoid(mlp(s) + mlp(max x))",
        "2 C (C / r) + 100",
        "W2 = 0, the norm's weight and bias 0",
        "Woo et al., CBAM, ECCV 2018, arXiv:1807.06521, Eq. (1) to (3)",
    ),
    "simam": _Facts(
        "x sigmoid(d / (4 (var + lambda)) + 1/2), d = (x - s)^2",
        "0",
        "it has no weights",
        "Yang et al., SimAM, ICML 2021, Eq. (5), (6)",
    ),
}


def describe_gates(names: Sequence[str] | None = None) -> list[GateDescription]:
    """What every gate computes, needs and costs.

    Args:
        names: Names in :data:`ecanet.nn.GATES`, by default all of them; or layers of timm such as ``timm:cbam``.

    Raises:
        ImportError: a layer of timm is named, and timm is not installed.
        TypeError: ``names`` is one string.
        ValueError: unknown name.

    Example:
        >>> (grn,) = describe_gates(["grn"])
        >>> grn.formula, grn.parameters, grn.needs, grn.neutral_start
        ('x + w x |x| / mean(|x|) + b', 512, 'means, variances', 'w = b = 0')
    """
    if isinstance(names, str):
        raise TypeError(f"names must be a list of names of gates, got {names!r}: write [{names!r}]")
    return [_describe(check_gate_name(name)) for name in (GATES if names is None else names)]


def _describe(name: str) -> GateDescription:
    factory = NAMED_GATES[name]
    with torch.device("meta"):  # no values, so no random numbers are drawn
        gate = factory(CHANNELS)
    facts = _FACTS.get(name) or _facts_of_timm(name) or _Facts(_first_line(factory), "", "", "")  # added by a user
    return GateDescription(
        name,
        _call(factory),
        facts.formula,
        facts.parameters_of_c,
        sum(p.numel() for p in gate.parameters()),
        _neutral_value(gate),
        facts.neutral_weights,
        _needs(gate),
        isinstance(gate, Gate) and gate.maths() is not None,
        facts.source,
    )


def _facts_of_timm(name: str) -> _Facts | None:
    layer = LAYERS.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    return layer and _Facts(layer.formula, "", f"{' and '.join(layer.zeroed)} = 0", layer.source)


def _first_line(factory: GateFactory) -> str:
    return (inspect.getdoc(factory) or "").partition("\n")[0]


def _call(factory: GateFactory) -> str:
    parameters = [p for p in inspect.signature(factory).parameters.values() if p.name != "factor"]
    arguments = ["C", *(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters[1:])]
    function = factory.func if isinstance(factory, partial) else factory
    return f"{getattr(function, '__name__', type(function).__name__)}({', '.join(arguments)})"


def _neutral_value(gate: torch.nn.Module) -> float | None:
    if not callable(make_neutral := getattr(copy.deepcopy(gate), "make_neutral_", None)):
        return None
    try:
        return float(make_neutral())
    except ValueError:
        return None


def _needs(gate: torch.nn.Module) -> str:
    if not isinstance(gate, Gate) or gate.sees_map:
        return "the map"
    return "means, variances" if gate.needs_variances else "means"


def table(gates: Sequence[GateDescription]) -> str:
    """The gates as a table in Markdown, as in docs/gates.md."""
    lines = [
        "| gate | class | formula | needs | parameters | at C = 256 | neutral start | fused | source |",
        "|-|-|-|-|-|-|-|-|-|",
    ]
    lines += [
        f"| `{g.name}` | `{g.call}` | {g.formula.replace('|', chr(92) + '|')} | {g.needs} | {g.parameters_of_c} | "
        f"{g.parameters:,} | {g.neutral_start} | {'yes' if g.fused else 'called'} | {g.source} |"
        for g in gates
    ]
    return "\n".join(lines)


def listing(gates: Sequence[GateDescription]) -> str:
    """The gates as text for a terminal, three lines each."""
    width = max((len(g.name) for g in gates), default=0)
    indent = " " * (width + 2)
    return "\n".join(
        line
        for g in gates
        for line in (
            f"{g.name:{width}}  {g.formula}",
            f"{indent}{g.parameters:,} parameters at C = {CHANNELS}; needs {g.needs}; "
            f"{'fused' if g.fused else 'called by the tail'}; neutral start: {g.neutral_start}",
            *([f"{indent}{g.call}; {g.source}"] if g.source else [f"{indent}{g.call}"]),
        )
    )
