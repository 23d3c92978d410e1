"""The paper's equations (1) to (9) in float64, entry by entry, with none of the code under test.

Feature maps are x ``(N, C, *spatial)``, their channel means y ``(N, C)``. Weights come as a gate's
``named_parameters()`` gives them; everything is differentiable, so autograd gives the gradients to compare with.
"""

import math

import torch
from torch import Tensor, nn

from ecanet.nn import ECA, ECANS, SE, SEGroup, SEVar1, SEVar2, SEVar3, build_gate

#: How to build every gate of Table 2, and the circular ones.
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
}
LINEAR_GATES = [name for name in GATES if name != "se"]

Weights = dict[str, Tensor]


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
    """W y, or W2 ReLU(W1 y) for SE (Eq. 2)."""
    if isinstance(gate, SE):
        hidden = _times(weights["fc1.weight"], y)
        return _times(weights["fc2.weight"], torch.where(hidden > 0, hidden, 0))
    return _times(matrix(gate, weights), y)


def _times(weight: Tensor, y: Tensor) -> Tensor:
    return (weight * y.unsqueeze(1)).sum(2)  # sum_j W_ij y_nj


def gates(gate: nn.Module, weights: Weights, y: Tensor) -> Tensor:
    """omega = sigma(logits) (Eq. 1, 3, 9)."""
    return 1 / (1 + torch.exp(-logits(gate, weights, y)))


def forward(gate: nn.Module, weights: Weights, x: Tensor) -> Tensor:
    """Every channel of x times its gate."""
    omega = gates(gate, weights, means(x))
    return x * omega.reshape(*omega.shape, *[1] * (x.dim() - 2))
