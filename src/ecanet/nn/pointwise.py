"""The squeeze of a 1 x 1 convolution's output, from its input.

A mean over positions commutes with a convolution that looks at one position: ``mean(W u + b) = W mean(u) + b``. Where
the convolution widens, as the last one of a bottleneck does, its input has fewer values to read than its output: a
quarter of them in a ResNet. And what torch.compile writes reads none of them: u comes from a norm and an activation,
and their kernel sums up what it writes (``python -m benchmarks.traffic`` counts both). The C++ kernels find a sample's
means while it is in the cache anyway.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecanet.nn import fused
from ecanet.ops import backend, reference

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PRODUCTS_PER_READ = 16  # so many take as long as reading a value: an estimate, where both are few


def is_pointwise(layer: nn.Module | None) -> bool:
    """Whether the layer is a convolution whose output at a position follows from its input at that position."""
    if type(layer) not in _CONVOLUTIONS:
        return False
    conv: Any = layer
    if fused.called_differently(conv):
        return False
    all_ones = all(size == 1 for size in (*conv.kernel_size, *conv.stride))
    return all_ones and conv.groups == 1 and (isinstance(conv.padding, str) or not any(conv.padding))


def means_after(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Channel means of the output of a 1 x 1 convolution, or None where they are better found from the output.

    That is where the convolution does not widen, unless a compiler is at work; where its matrix is larger than the map;
    on a CPU; where a gradient is asked for; and where somebody wants to see plain modules.

    Args:
        x: What the convolution is called on, ``(N, C_in, *spatial)``.
        weight: ``(C_out, C_in, 1, ...)``.
        bias: ``(C_out,)`` or None.

    Returns:
        ``(N, C_out)``, float32 for half types.
    """
    if fused.kernels_run(x):
        if backend.choose(x) == "cpu" or _is_tracked(x, weight, bias) or not _is_less_work(x, weight):
            return None
        means = fused.kernels.squeeze(x)
    elif torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not fused.is_operation_in_graph(x):
        if _is_tracked(x, weight, bias) or not _is_less_work(x, weight, is_free=True):
            return None
        means = reference.squeeze(x, weight.shape[1])
    else:
        return None
    with reference.no_autocast(x.device.type):
        bias = None if bias is None else bias.to(means.dtype)
        return F.linear(means, weight.flatten(1).to(means.dtype), bias)


def _is_tracked(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _is_less_work(x: Tensor, weight: Tensor, is_free: bool = False) -> bool:
    """Whether reading x, unless it is free, and the matrix takes less than reading the convolution's output."""
    if x.dim() != weight.dim() or x.numel() == 0:
        return False
    samples, positions = x.shape[0], x.shape[2:].numel()
    outputs, inputs = weight.shape[:2]
    matrix = outputs * inputs + samples * outputs * inputs // _PRODUCTS_PER_READ
    return (0 if is_free else samples * positions * inputs) + matrix < samples * positions * outputs
