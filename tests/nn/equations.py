"""The equations of every gate in float64, from the papers, with none of the code under test.

Those of ECA-Net, (1) to (9), are written entry by entry. Feature maps are x ``(N, C, *spatial)``, their channel means y
``(N, C)``. Weights come as a gate's ``named_parameters()`` gives them; everything is differentiable, so autograd gives
the gradients to compare with.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ecanet.nn import (
    CBAM,
    ECA,
    ECANS,
    ESE,
    GCT,
    GRN,
    LCT,
    SE,
    SRM,
    GaussianGCT,
    SEGroup,
    SEShift,
    SEVar1,
    SEVar2,
    SEVar3,
    SimAM,
    build_gate,
)

#: How to build every gate, the circular ones, those of a hard sigmoid, and the Gaussian with a learnable width.
GATES = {
    "eca": lambda c: build_gate("eca", c),
    "eca circular": lambda c: ECA(c, circular=True),
    "eca_ns": lambda c: build_gate("eca_ns", c),
    "eca_ns circular": lambda c: ECANS(c, circular=True),
    "se": lambda c: build_gate("se", c),
    "se_var1": lambda c: build_gate("se_var1", c),
    "se_var2": lambda c: build_gate("se_var2", c),
    "se_var3": lambda c: build_gate("se_var3", c),
    "se_gc1": lambda c: build_gate("se_gc1", c),
    "se_gc2": lambda c: build_gate("se_gc2", c),
    "se_gc3": lambda c: build_gate("se_gc3", c),
    "eca hard": lambda c: ECA(c, activation="hard_sigmoid"),
    "eca_ns hard": lambda c: ECANS(c, activation="hard_sigmoid"),
    "se hard": lambda c: SE(c, activation="hard_sigmoid"),
    "se_var1 hard": lambda c: SEVar1(c, activation="hard_sigmoid"),
    "ese": lambda c: build_gate("ese", c),
    "ese soft": lambda c: ESE(c, activation="sigmoid"),
    "se_shift": lambda c: build_gate("se_shift", c),
    "lct": lambda c: drawn(build_gate("lct", c)),
    "gct_gauss": lambda c: build_gate("gct_gauss", c),
    "gct_gauss learnable": lambda c: drawn(GaussianGCT(c, "learnable")),
    "srm": lambda c: drawn(build_gate("srm", c)),
    "gct": lambda c: drawn(build_gate("gct", c)),
    "grn": lambda c: drawn(build_gate("grn", c)),
    "cbam": lambda c: drawn(build_gate("cbam", c)),
    "simam": lambda c: build_gate("simam", c),
}
#: Those that have a matrix W.
LINEAR_GATES = [name for name in GATES if name.startswith(("eca", "se_var", "se_gc"))]
#: Those that act on channel means alone: ``gate(s)`` is all there is to them.
GATES_OF_MEANS = [name for name in GATES if name.split()[0] not in ("se_shift", "srm", "gct", "grn", "cbam", "simam")]
#: Those that no weights make constant.
NEVER_NEUTRAL = [name for name in GATES if name.split()[0] in ("se_var1", "gct_gauss", "simam")]
#: Those that normalise over the batch: in training they refuse a single value.
WITH_BATCH_NORM = ("srm", "cbam")

Weights = dict[str, Tensor]


def drawn(gate: nn.Module) -> nn.Module:
    """A gate whose weights and running statistics, 0 or 1 at the start, are drawn at random, away from 0."""
    for t in (*gate.parameters(), *gate.buffers()):
        if t.is_floating_point() and not t.is_meta and bool((t == t.flatten()[0]).all()):
            with torch.no_grad():
                sign = torch.randn_like(t).sign() if not t.any() else 1
                t.copy_((torch.rand_like(t) + 0.5) * sign)
    return gate


def weights_of(gate: nn.Module) -> Weights:
    """A gate's weights in float64 on the CPU, leaves of their own."""
    return {name: p.detach().double().cpu().requires_grad_() for name, p in gate.named_parameters()}


def means(x: Tensor) -> Tensor:
    """Global average pooling, one position after the other."""
    positions = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
    total = positions[:, :, 0]
    for p in range(1, positions.shape[2]):
        total = total + positions[:, :, p]
    return total / positions.shape[2]


def matrix(gate: nn.Module, weights: Weights) -> Tensor:
    """W of Eq. (4) to (6), written into a matrix of zeros one entry at a time."""
    zero = torch.zeros((), dtype=torch.float64)
    W = [[zero] * gate.channels for _ in range(gate.channels)]
    for i, j, value in _entries(gate, *weights.values()):
        W[i][j] = value
    return torch.stack([torch.stack(row) for row in W])


def _entries(gate: nn.Module, w: Tensor | None = None) -> list[tuple[int, int, Tensor]]:
    """Row i, column j and value of every entry of W that is not 0."""
    C = gate.channels
    everywhere = [(i, j) for i in range(C) for j in range(C)]
    match gate:
        case ECA():  # Eq. (8): the k weights of the band are the same in every row
            return [(i, j, w[0, 0, t]) for i, j, t in _band(C, w.shape[2], gate.circular)]
        case ECANS():  # Eq. (6), centred
            return [(i, j, w[i, t]) for i, j, t in _band(C, w.shape[1], gate.circular)]
        case SEVar1():  # Table 2: the identity
            return [(i, i, torch.ones((), dtype=torch.float64)) for i in range(C)]
        case SEVar2():  # Eq. (4): diagonal
            return [(i, i, w[i]) for i in range(C)]
        case SEVar3():  # Eq. (4): full
            return [(i, j, w[0, i, j]) for i, j in everywhere]
        case SEGroup():  # Eq. (5): G blocks of C / G channels on the diagonal
            size = C // w.shape[0]
            return [(i, j, w[i // size, i % size, j % size]) for i, j in everywhere if i // size == j // size]
    raise AssertionError(f"{gate} has no matrix")


def _band(channels: int, k: int, circular: bool) -> list[tuple[int, int, int]]:
    """Row i, column j and weight t of every entry of a centred band."""
    entries = [(i, i + t - k // 2, t) for i in range(channels) for t in range(k)]
    if circular:
        return [(i, j % channels, t) for i, j, t in entries]
    return [(i, j, t) for i, j, t in entries if 0 <= j < channels]


def logits(gate: nn.Module, weights: Weights, y: Tensor) -> Tensor:
    """The sigmoid's input, of a gate of channel means."""
    match gate:
        case SE():  # Eq. (2): W2 ReLU(W1 y)
            hidden = _times(weights["fc1.weight"], y)
            return _times(weights["fc2.weight"], torch.where(hidden > 0, hidden, 0))
        case ESE():  # CenterMask: W_C y
            return _times(weights["fc.weight"], y) + weights["fc.bias"]
        case LCT():  # w v + b, v normalised in each of the groups
            size = gate.channels // gate.groups
            groups = [
                _normalised(y[:, i : i + size], lambda var: (var + 1e-5).sqrt()) for i in range(0, gate.channels, size)
            ]
            return weights["w"] * torch.cat(groups, 1) + weights["b"]
    return _times(matrix(gate, weights), y)


def _normalised(y: Tensor, deviation: Callable[[Tensor], Tensor]) -> Tensor:
    """Means less their mean over the channels, by their deviation over the channels."""
    mean = y.sum(1, keepdim=True) / y.shape[1]
    return (y - mean) / deviation(((y - mean) ** 2).sum(1, keepdim=True) / y.shape[1])


def _root(t: Tensor) -> Tensor:
    """A root whose slope at 0 counts as 0, as that of torch's norms does."""
    return torch.where(t > 0, torch.where(t > 0, t, 1).sqrt(), 0)


def _sigmoid(t: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-t))


def _hard_sigmoid(t: Tensor) -> Tensor:
    return torch.where(t <= -3, 0, torch.where(t >= 3, 1, t / 6 + 0.5))


def _times(weight: Tensor, y: Tensor) -> Tensor:
    return (weight * y.unsqueeze(1)).sum(2)  # sum_j W_ij y_nj


def gates(gate: nn.Module, weights: Weights, y: Tensor) -> Tensor:
    """omega = sigma(logits) (Eq. 1, 3, 9), of a gate of channel means."""
    if isinstance(gate, GaussianGCT):  # Ruan et al., 2021: exp(-z^2 / (2 c^2)), c = alpha sigmoid(theta) + beta
        c = 3 * _sigmoid(weights["theta"]) + 1 if weights else gate.c
        return torch.exp(-(_normalised(y, lambda var: _root(var) + 1e-5) ** 2) / (2 * c**2))
    sigma = _hard_sigmoid if gate.activation == "hard_sigmoid" else _sigmoid
    return sigma(logits(gate, weights, y))


def scale_and_shift(gate: nn.Module, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What every channel of a map is multiplied by, and what is added to it, ``(N, C)``; of gates of statistics."""
    positions = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
    match gate:
        case SEShift():  # sigmoid of the first half, and the second half
            hidden = _times(weights["fc1.weight"], means(x)) + weights["fc1.bias"]
            both = _times(weights["fc2.weight"], torch.where(hidden > 0, hidden, 0)) + weights["fc2.bias"]
            return _sigmoid(both[:, : gate.channels]), both[:, gate.channels :]
        case SRM():  # Lee et al., Eq. (1) to (6): style pooling, channel-wise connection, norm over the batch, sigmoid
            mean = positions.sum(2) / positions.shape[2]
            # As in the authors' code: Eq. (2) has 1 / S, torch.var 1 / (S - 1).
            variance = ((positions - _each(mean)) ** 2).sum(2) / max(positions.shape[2] - 1, 1)
            z = weights["cfc"][:, 0] * mean + weights["cfc"][:, 1] * (variance + 1e-5).sqrt()
            return _sigmoid(_batch_norm(gate.bn, z.T, weights["bn.weight"], weights["bn.bias"]).T), None
        case GCT():  # Yang et al., Eq. (1) to (5): embedding, normalisation over the channels, gating
            e = weights["alpha"] * ((positions**2).sum(2) + 1e-5).sqrt()
            relative = e / ((e**2).sum(1, keepdim=True) / gate.channels + 1e-5).sqrt()
            return 1 + torch.tanh(weights["gamma"] * relative + weights["beta"]), None
        case GRN():  # Woo et al., 2023, Eq. (1) to (3) and Algorithm 1
            norms = _root((positions**2).sum(2))
            relative = norms / (norms.sum(1, keepdim=True) / gate.channels + 1e-6)
            return 1 + weights["weight"] * relative, weights["bias"].expand(relative.shape)
    return gates(gate, weights, means(x)), None


def forward(gate: nn.Module, weights: Weights, x: Tensor) -> Tensor:
    """What a gate makes of a map."""
    if isinstance(gate, CBAM):
        return _cbam(gate, weights, x)
    positions = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
    if isinstance(gate, SimAM):  # Yang et al., 2021, Eq. (5) and (6): x sigmoid(1 / E), of every position
        d = (positions - _each(means(x))) ** 2
        variance = d.sum(2, keepdim=True) / max(positions.shape[2] - 1, 1)
        return (positions * _sigmoid((d + 2 * variance + 2e-4) / (4 * (variance + 1e-4)))).reshape(x.shape)
    scale, shift = scale_and_shift(gate, weights, x)
    return (positions * _each(scale) + (0 if shift is None else _each(shift))).reshape(x.shape)


def _each(t: Tensor) -> Tensor:
    """``(N, C)`` for every position."""
    return t.unsqueeze(2)


def _batch_norm(norm: nn.Module, t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A BatchNorm of t, ``(C, values)``: the batch's statistics in training, otherwise the running ones."""
    if norm.training:
        mean = t.sum(1, keepdim=True) / t.shape[1]
        var = ((t - mean) ** 2).sum(1, keepdim=True) / t.shape[1]
    else:
        mean, var = (s.double().cpu()[:, None] for s in (norm.running_mean, norm.running_var))
    return (t - mean) / (var + 1e-5).sqrt() * weight[:, None] + bias[:, None]


def _cbam(gate: CBAM, weights: Weights, x: Tensor) -> Tensor:
    """Woo et al., 2018, Eq. (2) and (3), with the norm of the authors' code after the convolution.

    A map of one dimension has width 1; of a map of three, every slice counts as a map.
    """

    def mlp(s: Tensor) -> Tensor:
        hidden = _times(weights["channel.fc1.weight"][:, :, 0, 0], s)
        return _times(weights["channel.fc2.weight"][:, :, 0, 0], torch.where(hidden > 0, hidden, 0))

    n, channels, *spatial = x.shape
    depth, height, width = {0: (1, 1, 1), 1: (1, *spatial, 1), 2: (1, *spatial), 3: spatial}[len(spatial)]
    slices = x.reshape(n, channels, depth, height, width)
    of_channels = _sigmoid(mlp(means(x)) + mlp(slices.amax((2, 3, 4))))
    y = slices * of_channels[:, :, None, None, None]
    pooled = torch.stack([y.sum(1) / channels, y.amax(1)])  # mean and maximum, N, D, H, W
    kernel = weights["spatial.conv.conv.weight"][0]
    padded = torch.zeros(2, n, depth, height + 6, width + 6, dtype=x.dtype)
    padded[..., 3 : 3 + height, 3 : 3 + width] = pooled
    convolved = sum(
        kernel[c, i, j] * padded[c, :, :, i : i + height, j : j + width]
        for c in range(2)
        for i in range(7)
        for j in range(7)
    )
    norm = weights["spatial.conv.bn.weight"], weights["spatial.conv.bn.bias"]
    of_positions = _sigmoid(_batch_norm(gate.spatial.conv.bn, convolved.reshape(1, -1), *norm))
    return (y * of_positions.reshape(n, 1, depth, height, width)).reshape(x.shape)
