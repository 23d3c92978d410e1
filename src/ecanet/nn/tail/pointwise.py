"""The channel means of a 1 x 1 convolution's output, computed from its input, for a compiler's graph.

A mean over positions commutes with a convolution that looks at one position: ``mean(W u + b) = W mean(u) + b``. In a
network, u comes from a norm and an activation. The kernel that torch.compile writes for these also sums up u. So the
squeeze reads no map at all (``python -m benchmarks.traffic``).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecanet.nn.hooks import called_differently
from ecanet.ops import reference
from ecanet.private_torch import is_exporting

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Convolutions with larger matrices have small maps, which are read as quickly as the matrix. The size of the map is
#: not asked for: with dynamic shapes that would be one more reason to compile again.
_LARGEST_MATRIX = 2**20


def is_pointwise(layer: nn.Module) -> bool:
    """Whether the layer is a convolution whose output at a position follows from its input at that position."""
    if type(layer) not in _CONVOLUTIONS:
        return False
    conv: Any = layer
    if called_differently(conv):
        return False
    all_ones = all(size == 1 for size in (*conv.kernel_size, *conv.stride))
    return all_ones and conv.groups == 1 and (isinstance(conv.padding, str) or not any(conv.padding))


def means_before(conv: nn.Module, x: Tensor) -> Tensor | None:
    """Channel means of ``conv(x)`` from those of x, for a compiler's graph.

    None if they are better computed from the output: if the convolution looks at more than one position or has a large
    matrix, if a gradient is needed, outside compilation, and in an export.

    Args:
        conv: Any module.
        x: Its input, ``(N, C_in, *spatial)``.

    Returns:
        ``(N, C_out)``, float32 for half types.

    Raises:
        ValueError: ``x`` has a number of channels that ``conv`` does not take.

    Source:
        This library's.
    """
    if not torch.compiler.is_compiling() or is_exporting() or not is_pointwise(conv):
        return None
    weight: Any = conv.weight
    bias: Any = conv.bias
    if x.dim() != weight.dim() or weight.numel() > _LARGEST_MATRIX:
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return None
    means = reference.squeeze(x, weight.shape[1])
    with reference.no_autocast(x.device.type):
        return F.linear(means, weight.flatten(1).to(means.dtype), None if bias is None else bias.to(means.dtype))
