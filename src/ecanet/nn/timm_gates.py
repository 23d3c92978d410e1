"""timm's attention layers as gates: ``timm:cbam`` is timm's own class, beside this library's ``cbam``."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ecanet.nn.inner_layers import zero_
from ecanet.nn.maps import MapGate
from ecanet.nn.tail.maths import ScaleAndShift
from ecanet.ops import reference

PREFIX = "timm:"


class _Layer(NamedTuple):
    """A layer of timm that scales a map, or adds something to it.

    Attributes:
        formula: What it computes.
        source: The publication or code that it is from.
        zeroed: Inner layers whose weights and biases are 0 in a neutral start.
        neutral: The gate's value after a neutral start, without the factor.
        adds: Whether it adds to the map instead of scaling it.
    """

    formula: str
    source: str
    zeroed: tuple[str, ...]
    neutral: float = 0.5
    adds: bool = False


_ECA = "Wang et al., ECA-Net, CVPR 2020, arXiv:1910.03151"
_GC = "Cao et al., GCNet, arXiv:1904.11492"
_CBAM = "Woo et al., CBAM, ECCV 2018, arXiv:1807.06521"
_BOTH_HALVES = ("channel.fc2", "spatial.conv.bn")
_COORDINATE = "Hou et al., Coordinate Attention, CVPR 2021, arXiv:2103.02907"

#: By the name that ``timm.layers.create_attn`` takes. s: channel means; rows, columns: means along the other axis.
LAYERS: dict[str, _Layer] = {
    "se": _Layer("x sigmoid(W2 relu(W1 s + b1) + b2)", "Hu et al., SE, CVPR 2018", ("fc2",)),
    "ese": _Layer("x hard_sigmoid(W s + b)", "Lee and Park, CenterMask, arXiv:1911.06667", ("fc",)),
    "eca": _Layer("x sigmoid(conv1d_k(s))", _ECA, ("conv",)),
    "ecam": _Layer("x sigmoid(conv1d_k(relu(w s + b)) + b2), an experiment of timm's", _ECA, ("conv2",)),
    "ceca": _Layer("x sigmoid(circular conv1d_k(s))", _ECA, ("conv",)),
    "ge": _Layer("x sigmoid(mlp(s))", "Hu et al., Gather-Excite, NeurIPS 2018, arXiv:1810.12348", ("mlp.fc2",)),
    "gc": _Layer("x sigmoid(mlp(mean of x weighted by attention))", _GC, ("mlp_scale.fc2",)),
    "gca": _Layer("x + mlp(mean of x weighted by attention)", _GC, ("mlp_add.fc2",), 1.0, adds=True),
    "cbam": _Layer("y sigmoid(bn(conv7x7(mean y, max y))), y by channel", _CBAM, _BOTH_HALVES, 0.25),
    "lcbam": _Layer("as timm:cbam, of mean + max", _CBAM, _BOTH_HALVES, 0.25),
    "coord": _Layer("x sigmoid(of rows) sigmoid(of columns)", _COORDINATE, ("conv_h", "conv_w"), 0.25),
    "scoord": _Layer("x sigmoid(of rows + of columns)", _COORDINATE, ("fc_h", "fc_w")),
    "ela": _Layer("x sigmoid(of rows) sigmoid(of columns), by channel", "arXiv:2403.01123", ("norm_h", "norm_w"), 0.25),
    "strip": _Layer("x sigmoid(of rows + of columns), by channel", "timm", ("conv_h", "conv_w")),
    "nl": _Layer("x + bn(W softmax(t(x) p(x)) g(x))", "Wang et al., arXiv:1711.07971", ("norm",), 1.0, adds=True),
}
#: Layers of timm that are not gates, and why.
_NOT_GATES = {
    **dict.fromkeys(("sk", "splat", "lambda", "bottleneck", "halo"), "it takes the place of a convolution"),
    "bat": "it only takes maps that divide into blocks of 7 x 7",
}


class TimmGate(MapGate):
    """An attention layer of timm, built as timm builds it, with the factor and the neutral start of every gate.

    The tail calls it. Its keys are timm's, with the prefix ``layer.``. It runs in the type of its weights; autocast
    treats it as it treats timm's own layer. A map of one dimension counts as one of width 1.

    Args:
        channels: Number of channels C.
        name: A name in :data:`LAYERS`.
        factor: Multiplies what it returns.

    Raises:
        ImportError: timm is not installed.
        TypeError: ``channels`` is not an integer, ``factor`` is not a number.
        ValueError: ``channels`` below 1, ``factor`` not finite and above 0; timm has no such layer, or cannot build it
            for this number of channels; in a call, a map of three dimensions; torch's BatchNorm, in training on a
            single position.

    Example:
        >>> gate, x = TimmGate(64, "cbam"), torch.randn(2, 64, 14, 14)
        >>> gate.make_identity_()
        >>> gate.factor, torch.equal(gate(x), x)
        (4.0, True)
    """

    def __init__(self, channels: int, name: str, *, factor: float = 1.0) -> None:
        super().__init__(channels, factor=factor)
        self.name = name
        self.neutral_value = LAYERS[name].neutral
        self.layer = _build(name, channels)

    def scale_map(self, x: Tensor) -> Tensor:
        """What timm's layer returns."""
        if x.ndim > 4:
            raise ValueError(f"timm's layers take maps of at most two dimensions, got the shape {tuple(x.shape)}")
        if not x.numel():
            return x
        as_map = x.reshape(*x.shape[:2], *(*x.shape[2:], 1, 1)[:2])
        if not torch.is_autocast_enabled(x.device.type):
            as_map = as_map.to(next(self.layer.parameters()).dtype)
        return self.layer(as_map).reshape(x.shape)

    def answer(self, x: Tensor) -> ScaleAndShift:
        """As :meth:`MapGate.answer`; for a layer that adds: 1 and the mean of what it adds, times :attr:`factor`."""
        if not LAYERS[self.name].adds:
            return super().answer(x)
        x = reference.check_map(x, self.channels).to(reference.accumulation_dtype(x.dtype))
        added = (self.scale_map(x).to(x.dtype) - x).reshape(*x.shape[:2], -1).mean(2)
        return self.scaled(torch.ones_like(added)), self.scaled(added)

    def reset_parameters(self) -> None:
        """Draw the layers' weights again, as torch and timm do."""
        for layer in reversed(list(self.layer.modules())):  # a layer may reset those inside it: it comes after them
            if callable(reset := getattr(layer, "reset_parameters", None)):
                reset()
        super().reset_parameters()

    @torch.no_grad()
    def make_neutral_(self) -> float:
        """Set the weights and biases of its last layers to 0."""
        for path in LAYERS[self.name].zeroed:
            zero_(self.layer.get_submodule(path), "weight", "bias")
        return LAYERS[self.name].neutral

    def is_neutral(self) -> bool:
        """Whether the weights and biases of its last layers are 0."""
        last = [self.layer.get_submodule(path) for path in LAYERS[self.name].zeroed]
        return not any(bool(t.any()) for layer in last for t in layer.parameters())

    def _options(self) -> list[str]:
        return [repr(self.name)]


#: The gates by name, as in :data:`ecanet.nn.GATES`.
TIMM_GATES = {PREFIX + name: partial(TimmGate, name=name) for name in LAYERS}


def why_not_a_gate(name: str) -> str:
    """Why a layer of timm is not a gate; an empty text if it is one, or if timm has no layer of this name."""
    return _NOT_GATES.get(name.removeprefix(PREFIX).lower(), "")


def _build(name: str, channels: int) -> nn.Module:
    try:
        import timm.layers
    except ImportError as error:
        raise ImportError(f"the gate {PREFIX}{name} needs timm: pip install 'ecanet[timm]'") from error
    try:
        if name == "ge":
            return _gather_excite(channels)
        return timm.layers.create_attn(name, channels)
    except AssertionError as error:  # create_attn has no other error for an unknown name
        version = timm.__version__
        raise ValueError(f"timm {version} has no attention {name!r} for {channels} channels: {error}") from error


def _gather_excite(channels: int) -> nn.Module:
    # In timm 1.0.31, GatherExcite passes ConvMlp its arguments in the wrong order and cannot be built with one.
    from timm.layers import ConvMlp, GatherExcite
    from timm.layers.helpers import make_divisible

    layer = GatherExcite(channels, use_mlp=False)
    layer.mlp = ConvMlp(channels, make_divisible(channels / 16, 1, round_limit=0.0))
    return layer
