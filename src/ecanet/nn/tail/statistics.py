"""Running statistics, and the statistics of a batch that several processes share.

Processes share them by the protocol of :class:`torch.nn.SyncBatchNorm`. Every process has to take part in the same
collectives, whatever hooks, backend or library it has. So kernels, plain PyTorch and torch's module on a GPU all send
the same::

    forward     all_gather  mean, 1 / sqrt(var + eps), count      2 C + 1 numbers
    backward    all_reduce  sum dy, sum dy (x - mean)             2 C numbers, if the input needs a gradient

Here dy is the gradient of the norm's output. The numbers are float32, and float64 for maps in float64. An empty batch
sends zeros.

Source: ``torch/nn/modules/_functions.py``, class SyncBatchNorm.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ecanet.ops import statistics
from ecanet.private_torch import name_of_backend


def process_group(norm: nn.Module) -> Any:
    """The processes that a norm in training shares its statistics with, or None if there are no others."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def share_statistics(mean: Tensor, var: Tensor, count: int, eps: float, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean, biased variance and number of values in a channel over all processes.

    Args:
        mean: ``(C,)`` of this process; ignored if ``count`` is 0.
        var: ``(C,)`` of this process, biased; likewise.
        count: Number of values in a channel in this process.
        eps: Of the norm.
        group: The processes.

    Returns:
        ``(C,)``, ``(C,)`` and ``(1,)``; zeros if no process has a value.
    """
    channels = mean.numel()
    if count == 0:
        mine = mean.new_zeros(2 * channels + 1)
    else:  # new_full, since a copy from the CPU would wait for the GPU
        mine = torch.cat([mean, torch.rsqrt(var + eps), mean.new_full((1,), count)])
    world = dist.get_world_size(group)
    if name_of_backend(group) == "gloo":  # as in torch: the two calls are different collectives
        parts = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(parts, mine, group=group)
        gathered = torch.stack(parts)
    else:
        gathered = mine.new_empty(world, mine.numel())
        dist.all_gather_into_tensor(gathered, mine, group=group)
    gathered = gathered.double()
    counts = gathered[:, 2 * channels :]
    has_values = counts > 0
    means = torch.where(has_values, gathered[:, :channels], 0)
    variances = gathered[:, channels : 2 * channels].square().reciprocal() - eps
    variances = torch.where(has_values, variances, 0).clamp_min(0)
    total = counts.sum(0)
    divisor = total.clamp_min(1)
    mean_of_all = (means * counts).sum(0) / divisor
    var_of_all = ((variances + torch.where(has_values, means - mean_of_all, 0).square()) * counts).sum(0) / divisor
    return mean_of_all.to(mean.dtype), var_of_all.to(var.dtype), total


def share_gradients(
    grad_weight: Tensor, grad_bias: Tensor, var: Tensor, weight: Tensor | None, eps: float, group: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of the shared mean and variance, from this process's gradients of weight and bias.

    Args:
        grad_weight: ``(C,)``, ``sum dy (x - mean) / sqrt(var + eps)`` of this process; zeros if its batch is empty.
        grad_bias: ``(C,)``, ``sum dy`` of this process, likewise.
        var: ``(C,)`` of all processes.
        weight: ``(C,)`` or None for ones.
        eps: Of the norm.
        group: The processes.

    Returns:
        ``(C,)`` both, summed over the processes.
    """
    inverse = torch.rsqrt(var + eps)
    sums = torch.cat([grad_bias, grad_weight / inverse])
    dist.all_reduce(sums, group=group)
    sum_dy, sum_dy_centered = sums.chunk(2)
    a = inverse if weight is None else inverse * weight.to(inverse.dtype)
    return -a * sum_dy, -0.5 * a * inverse.square() * sum_dy_centered


def update_running_statistics(norm: Any, mean: Tensor, var: Tensor, count: int | Tensor, ops: Any = statistics) -> None:
    """Move running statistics by those of a batch, as torch's BatchNorm does.

    Args:
        norm: A BatchNorm. Nothing happens if it keeps no statistics or is in evaluation.
        mean: ``(C,)`` of the batch.
        var: ``(C,)`` of the batch, biased.
        count: Number of values in a channel.
        ops: Kernels, or plain PyTorch for a compiler.
    """
    if not (norm.training and norm.track_running_stats):
        return
    with torch.no_grad():
        momentum: Any = norm.momentum
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if momentum is None:  # cumulative average
                momentum = 1.0 / norm.num_batches_tracked.to(mean.dtype)
        if norm._buffers.get("running_mean") is None:  # removed: torch still counts the batch
            return
        momentum = 0.0 if momentum is None else momentum  # torch, too, treats None as 0 here
        ops.update_running(norm.running_mean, norm.running_var, mean, var, momentum, count)
