"""The tail in a compiler's graph: one operation, or formulas in plain PyTorch that Inductor fuses."""

import torch
from torch import Tensor

from ecanet.nn.tail.eager import norm_and_band
from ecanet.nn.tail.maths import GateMaths, NormMaths, Statistics, check_scale_and_shift
from ecanet.nn.tail.statistics import update_running_statistics
from ecanet.ops import coefficients, reference
from ecanet.ops.statistics import merge_moments


def operation(x: Tensor, norm: NormMaths, gate: GateMaths, residual: Tensor | None, act: int) -> Tensor:
    """The tail as one operation. The gate is ECA's band.

    Args:
        x: ``(N, C, *spatial)``, not empty.
        norm: A BatchNorm. If its statistics are given, the operation has no gradient.
        gate: A band.
        residual: Shape and type of ``x``, or None.
        act: Index in :data:`ecanet.ops.reference.ACTS`.
    """
    if norm.takes_batch_statistics:
        weights, kernel = (norm.weight, norm.bias, norm.eps), gate.parameters[0]
        out, _, mean, var, *_ = torch.ops.ecanet.batch_norm_eca_add_act(
            x, residual, *weights, kernel, gate.circular, act, gate.factor
        )
        update_running_statistics(norm.module, mean.detach(), var.detach(), x.shape[0] * x.shape[2:].numel())
        return out
    if x.is_cuda:
        return torch.ops.ecanet.norm_eca_add_act(x, residual, *norm_and_band(norm, gate), act, gate.factor)
    out = x.clone()  # a compiler leaves the copy out if nothing else reads x: the operation then writes over x
    torch.ops.ecanet.norm_eca_add_act_(out, residual, *norm_and_band(norm, gate), act, gate.factor)
    return out


def formula(
    x: Tensor, norm: NormMaths | None, gate: GateMaths, residual: Tensor | None, act: int, map_means: Tensor | None
) -> Tensor:
    """The tail in plain PyTorch. If the means are known, a compiler fuses it into one pass.

    Args:
        x: ``(N, C, *spatial)``.
        norm: A BatchNorm or None.
        gate: A gate.
        residual: Shape and type of ``x``, or None.
        act: Index in :data:`ecanet.ops.reference.ACTS`.
        map_means: ``(N, C)``, the means of the maps of x, or None if they have to be computed.
    """
    positions, m2 = reference.positions(x), None
    if norm is not None and norm.takes_batch_statistics:
        map_means, m2 = reference.moments(x)
        mean, var = merge_moments(map_means, m2, x.shape[2:].numel())
        update_running_statistics(norm.module, mean.detach(), var.detach(), x.shape[0] * x.shape[2:].numel())
        norm = norm._replace(mean=mean, var=var)
    elif gate.needs_variances:
        map_means, m2 = reference.moments(x)
    elif map_means is None:
        map_means = reference.squeeze(x, x.shape[1])
    s, a, b = map_means, None, None
    variances = None if m2 is None or not gate.needs_variances else m2 / positions
    if norm is not None:
        s, a, b = coefficients.normalise(map_means, norm.mean, norm.var, norm.weight, norm.bias, norm.eps)
        variances = None if variances is None else variances * a.square()
    with reference.no_autocast(x.device.type):
        scale, shift = check_scale_and_shift(gate.function(Statistics(s, variances, positions)))
    if a is None or b is None:
        return reference.apply(x, scale, shift, residual, act)
    return reference.apply(x, scale * a, scale * b if shift is None else scale * b + shift, residual, act)
