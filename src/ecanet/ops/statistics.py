"""Batch and running statistics in plain PyTorch: merging the moments of maps, and updating running statistics."""

from torch import Tensor


def merge_moments(map_means: Tensor, m2: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel over the batch, from the moments of its maps (Chan et al., 1979).

    Args:
        map_means: ``(N, C)``, the means that :func:`~ecanet.ops.reference.moments` returns.
        m2: ``(N, C)``, its sums of squares.
        positions: S, the number of positions of a map.

    Returns:
        ``mean`` and ``var``, both ``(C,)``.
    """
    mean = map_means.mean(0)
    return mean, (m2 / positions + (map_means - mean).square()).mean(0)


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    momentum: float | Tensor,
    count: int | Tensor,
) -> None:
    """Move running statistics towards those of a batch, as BatchNorm does, in place.

    Args:
        running_mean: ``(C,)``.
        running_var: ``(C,)``, unbiased.
        mean: ``(C,)`` of the batch.
        var: ``(C,)`` of the batch, biased.
        momentum: Weight of the batch.
        count: Number of values per channel in the batch.
    """
    keep = 1.0 - momentum
    unbiased = momentum * (count / (count - 1))
    for running, new in ((running_mean, momentum * mean), (running_var, unbiased * var)):
        running.copy_(keep * running.to(new.dtype) + new)  # rounded once
