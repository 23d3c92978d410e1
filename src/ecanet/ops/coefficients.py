"""Between the passes over a map, in plain PyTorch: from its means to the scale and shift of norm and ECA, and back.

The functions are the plain twins of the operations of the same names, as those of :mod:`ecanet.ops.reference` are.
"""

import torch
from torch import Tensor

from ecanet.ops.reference import apply, band, pad, squeeze


def normalise(
    map_means: Tensor,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A BatchNorm as ``y = a x + b``, and the means of its output.

    Args:
        map_means: ``(N, C)``, means of the norm's input.
        norm_mean: ``(C,)``; if this and ``norm_var`` are None, there is no norm.
        norm_var: ``(C,)``, biased.
        weight: ``(C,)`` or None for ones.
        bias: ``(C,)`` or None for zeros.
        eps: Added to the variance.

    Returns:
        ``s`` ``(N, C)``, ``a`` ``(C,)``, ``b`` ``(C,)``.
    """
    ones, zeros = map_means.new_ones(map_means.shape[1]), map_means.new_zeros(map_means.shape[1])
    a = ones if norm_var is None else torch.rsqrt(norm_var.to(map_means.dtype) + eps)
    a = a if weight is None else a * weight.to(map_means.dtype)
    beta = zeros if bias is None else bias.to(map_means.dtype)
    norm_mean = zeros if norm_mean is None else norm_mean.to(map_means.dtype)
    return a * (map_means - norm_mean) + beta, a, beta - a * norm_mean


def eca_coefficients(
    map_means: Tensor,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kernel: Tensor | None,
    circular: bool,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the means of a norm's input, compute the scale and shift that apply norm and ECA together.

    Args:
        map_means: As in :func:`normalise`.
        norm_mean: As in :func:`normalise`.
        norm_var: As in :func:`normalise`.
        weight: As in :func:`normalise`.
        bias: As in :func:`normalise`.
        eps: As in :func:`normalise`.
        kernel: ``(k,)``, the band's weights in the type of ``map_means``; None for no gate.
        circular: As in :func:`~ecanet.ops.reference.band`.
        factor: The gate's factor: ``gate = factor * sigmoid(band of s)``.

    Returns:
        ``s``, ``gate`` (of size 0 x C without a kernel), ``scale`` and ``shift``, all ``(N, C)``.
    """
    s, a, b = normalise(map_means, norm_mean, norm_var, weight, bias, eps)
    if kernel is None:
        return s, s.new_empty(0, s.shape[1]), a.expand_as(s).clone(), b.expand_as(s).clone()
    gate = torch.sigmoid(band(s, kernel, circular)) * factor
    return s, gate, gate * a, gate * b


def eca_coefficients_backward(
    p: Tensor,
    q: Tensor,
    map_means: Tensor,
    gate: Tensor | None,
    grad_s: Tensor | None,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kernel: Tensor | None,
    circular: bool,
    positions: int,
    factor: float = 1.0,
    m2: Tensor | None = None,
    grad_v: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Between the two passes of the backward: from the sums of d, compute what the second pass adds.

    With ``out = g (a (x - mean) + bias)`` and ``s = a (m - mean) + bias``:
    ``dg = a q + bias p``, which gives ``ds`` through the gate; then ``da = sum_n g q + ds (m - mean)``,
    ``dbias = sum_n g p + ds``, ``dmean = -a dbias`` and ``dvar = -da weight / (2 (var + eps)^(3/2))``.

    A gate that also sees the variances ``v = a^2 m2 / S`` gives dv. It adds ``sum_n 2 a dv m2 / S`` to ``da``, and
    ``2 a^2 dv / S (x - m)`` to the gradient of x. The second pass multiplies its slope by ``x - mean``, so
    ``2 a^2 dv / S (mean - m)`` goes into the offset.

    Args:
        p: ``(N, C)``, returned by :func:`~ecanet.ops.reference.apply_backward`.
        q: ``(N, C)``, returned by :func:`~ecanet.ops.reference.apply_backward` with ``center=mean``.
        map_means: As in :func:`normalise`.
        gate: ``(N, C)``, or None for no gate.
        grad_s: ``(N, C)``, ds of a gate that is not ECA's band.
        norm_mean: As in :func:`normalise`.
        norm_var: As in :func:`normalise`.
        weight: As in :func:`normalise`.
        bias: As in :func:`normalise`.
        eps: As in :func:`normalise`.
        kernel: As in :func:`eca_coefficients`; with None, ``grad_s`` is used.
        circular: As in :func:`~ecanet.ops.reference.band`.
        positions: S, the number of positions of a map.
        factor: As in :func:`eca_coefficients`.
        m2: ``(N, C)``, as :func:`~ecanet.ops.reference.moments` returns it; needed with ``grad_v``.
        grad_v: ``(N, C)``, dv of a gate that sees variances.

    Returns:
        ``offset`` ``(N, C)``: ds a / S, the squeeze's part of the input's gradient, plus the part of dv; the gradients
        of weight and bias, ``(C,)``; that of the kernel, ``(k,)`` (of size 0 without one); those of norm_mean and
        norm_var, ``(C,)``; ``slope`` ``(N, C)``, 2 a^2 dv / S (of size 0 x C without ``grad_v``).
    """
    s, a, _ = normalise(map_means, norm_mean, norm_var, weight, bias, eps)
    beta = torch.zeros_like(a) if bias is None else bias.to(a.dtype)
    grad_kernel = s.new_empty(0)
    ds = torch.zeros_like(s) if grad_s is None else grad_s
    if kernel is not None:
        assert gate is not None
        k = kernel.numel()
        grad_logits = (a * q + beta * p) * gate * (1 - gate / factor)
        windows = pad(s, k, circular).unfold(1, k, 1)
        grad_kernel = (windows * grad_logits.unsqueeze(-1)).sum((0, 1))
        ds = band(grad_logits, kernel.flip(-1), circular)
    g = torch.ones_like(s) if gate is None else gate
    centered = map_means if norm_mean is None else map_means - norm_mean.to(map_means.dtype)
    grad_a, grad_bias = g * q + ds * centered, (g * p + ds).sum(0)
    offset, slope = ds * a / positions, s.new_empty(0, s.shape[1])
    if grad_v is not None:
        assert m2 is not None
        per_position = 2 * a / positions * grad_v
        grad_a, slope = grad_a + per_position * m2, per_position * a
        offset = offset - slope * centered
    grad_a = grad_a.sum(0)
    inverse = torch.ones_like(a) if norm_var is None else torch.rsqrt(norm_var.to(a.dtype) + eps)
    gamma = torch.ones_like(a) if weight is None else weight.to(a.dtype)
    grad_var = -0.5 * gamma * grad_a * inverse**3
    return offset, grad_a * inverse, grad_bias, grad_kernel, -a * grad_bias, grad_var, slope


def norm_eca_add_act(
    x: Tensor,
    residual: Tensor | None,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kernel: Tensor | None,
    circular: bool,
    act: int,
    factor: float = 1.0,
) -> Tensor:
    """Norm with given statistics, ECA, residual and activation in one call.

    Args:
        x: ``(N, C, *spatial)``.
        residual: Shape and type of ``x``.
        norm_mean: As in :func:`normalise`.
        norm_var: As in :func:`normalise`.
        weight: As in :func:`normalise`.
        bias: As in :func:`normalise`.
        eps: As in :func:`normalise`.
        kernel: As in :func:`eca_coefficients`.
        circular: As in :func:`~ecanet.ops.reference.band`.
        act: Index in :data:`~ecanet.ops.reference.ACTS`.
        factor: As in :func:`eca_coefficients`.
    """
    map_means = squeeze(x, x.shape[1])
    kernel = None if kernel is None else kernel.to(map_means.dtype)
    _, _, scale, shift = eca_coefficients(map_means, norm_mean, norm_var, weight, bias, eps, kernel, circular, factor)
    return apply(x, scale, shift, residual, act)
