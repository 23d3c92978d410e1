"""Activations: functions from a gate's logits to its values."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

#: The values of an ``activation=`` argument; both functions are 1/2 at 0.
Activation = Literal["sigmoid", "hard_sigmoid"]

#: The functions by name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": lambda logits: F.relu6(logits + 3) / 6,  # torch's own has a float32 1/6, in float64 too
    "exp": torch.exp,  # fixed by the class of a gate; not an argument
}


def check_activation(activation: str) -> str:
    """Return a gate's activation if it is one that users may choose.

    Raises:
        ValueError: ``activation`` is neither ``"sigmoid"`` nor ``"hard_sigmoid"``.
    """
    if activation not in ("sigmoid", "hard_sigmoid"):
        raise ValueError(f"activation must be 'sigmoid' or 'hard_sigmoid', got {activation!r}")
    return activation
