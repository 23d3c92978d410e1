"""Finds ECA weights in a state dict, the authors' checkpoints included."""

import re

from ecanet.files.state_dicts import StateDict


def eca_kernel_sizes(state: StateDict) -> dict[str, int]:
    """Kernel size of every ECA weight, by the name of its block."""
    # No other tensor of these networks has the shape (1, 1, k).
    # The gate's name is removed from the key: "eca" in the ResNets, its index in "conv" in MobileNetV2.
    return {
        re.sub(r"\.[^.]+\.conv\.weight$", "", key): value.shape[-1]
        for key, value in state.items()
        if key.endswith(".conv.weight") and value.dim() == 3 and value.shape[:2] == (1, 1)
    }
