"""What turns a gate's logits into its values."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

#: What turns logits into gate values, as an argument; both are 1/2 at 0.
Activation = Literal["sigmoid", "hard_sigmoid"]

#: By name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": lambda logits: F.relu6(logits + 3) / 6,  # torch's own has a float32 1/6, in float64 too
    "exp": torch.exp,  # of gates that are made with it, and take no other
}


def check_activation(activation: str) -> str:
    """A gate's activation.

    Raises:
        ValueError: ``activation`` is neither ``"sigmoid"`` nor ``"hard_sigmoid"``.
    """
    if activation not in ("sigmoid", "hard_sigmoid"):
        raise ValueError(f"activation must be 'sigmoid' or 'hard_sigmoid', got {activation!r}")
    return activation
