"""What the keys of a state dict say of the ECA in it, the authors' checkpoints included."""

import re

from ecanet.files.state_dicts import StateDict


def eca_kernel_sizes(state: StateDict) -> dict[str, int]:
    """Kernel size of every ECA weight, by the name of the block it is in."""
    # No other tensor of these networks is (1, 1, k).
    # The last part of a name is "eca" in the ResNets, the gate's number in the sequence "conv" in MobileNetV2.
    return {
        re.sub(r"\.[^.]+\.conv\.weight$", "", key): value.shape[-1]
        for key, value in state.items()
        if key.endswith(".conv.weight") and value.dim() == 3 and value.shape[:2] == (1, 1)
    }
