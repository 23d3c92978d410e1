"""The backward of norm, gate, residual and activation: two passes over the maps, ``(N, C)``-sized maths between them.

It is written once for all implementations: ``ops`` is an entry of :data:`ecanet.ops.kernels.KERNELS` in eager code, and
``torch.ops.ecanet`` where a compiler's graph shows the operations. ``docs/how-it-works.md`` derives it.
"""

from typing import Any, NamedTuple

from torch import Tensor

from ecanet.ops import reference


class Saved(NamedTuple):
    """What the forward pass saves: x, one more map if the activation needs it, and small tensors.

    Attributes:
        x: ``(N, C, *spatial)``, the norm's input.
        for_act: What the activation's slope is read from (:func:`for_slope`).
        weight: ``(C,)`` of the norm, or None.
        bias: ``(C,)`` of the norm, or None.
        map_means: ``(N, C)``, means of the maps of x.
        norm_mean: ``(C,)``, the mean that the norm subtracts, or None without a norm.
        norm_var: ``(C,)``, its variance, likewise.
        m2: ``(N, C)``, sums of squared deviations of the maps of x, for a gate that sees variances.
        norm_scale: ``(1, C)`` of the norm alone; set only if there is a gate other than ECA's.
        gate: ``(N, C)``, what the gate multiplies the norm's output by, or None.
        scale: ``(N, C)``: ``out = act(scale * x + shift + residual)``.
        shift: ``(N, C)``; None if the activation's slope does not depend on it.
    """

    x: Tensor
    for_act: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    map_means: Tensor
    norm_mean: Tensor | None
    norm_var: Tensor | None
    m2: Tensor | None
    norm_scale: Tensor | None
    gate: Tensor | None
    scale: Tensor
    shift: Tensor | None


class Upstream(NamedTuple):
    """The gradient of what went into the activation, and its sums.

    Attributes:
        grad: This gradient, with ``act`` 0; or the gradient of out: the second pass then goes through ``act`` again.
        act: Index in :data:`ecanet.ops.reference.ACTS`.
        p: ``(N, C)``, its sums over the positions.
        q: ``(N, C)``, sums of its products with ``x - norm_mean``.
    """

    grad: Tensor
    act: int
    p: Tensor
    q: Tensor


class SmallGradients(NamedTuple):
    """The gradients that follow from the sums.

    Attributes:
        offset: ``(N, C)``, the squeeze's part of the gradient of x.
        weight: ``(C,)``.
        bias: ``(C,)``.
        kernel: ``(k,)`` of ECA's band; of size 0 without one.
        norm_mean: ``(C,)``.
        norm_var: ``(C,)``.
        slope: ``(N, C)``, the variances' part of the gradient of x; of size 0 x C for a gate that sees no variances.
    """

    offset: Tensor
    weight: Tensor
    bias: Tensor
    kernel: Tensor
    norm_mean: Tensor
    norm_var: Tensor
    slope: Tensor


def for_slope(act: int, out: Tensor, residual: Tensor | None) -> Tensor | None:
    """The map that an activation's slope is read from: its output, or for SiLU and Hardswish what was added before."""
    name = reference.ACTS[act]
    return out if name in ("relu", "relu6") else residual if name is not None else None


def needs_shift(act: int) -> bool:
    """Whether an activation's slope depends on ``scale * x + shift``, as SiLU's and Hardswish's do."""
    return reference.ACTS[act] in ("silu", "hardswish")


def first_pass(ops: Any, saved: Saved, grad: Tensor, act: int, needs_residual: bool) -> Upstream:
    """Read the gradient of out, and x; write the residual's gradient if it is needed.

    Args:
        ops: The implementation.
        saved: What the forward pass saved.
        grad: Gradient of out.
        act: Index in :data:`ecanet.ops.reference.ACTS`.
        needs_residual: Whether the residual needs its gradient: it is then kept, and the second pass reads it.
    """
    keep = needs_residual and act != 0
    d, p, q = ops.apply_backward(
        grad, saved.x, saved.scale, saved.shift, saved.norm_mean, saved.for_act, act, keep
    )  # fmt: skip
    return Upstream(d, 0, p, q) if keep else Upstream(grad, act, p, q)


def between_passes(
    ops: Any,
    saved: Saved,
    up: Upstream,
    eps: float,
    band: tuple[Tensor | None, bool, float],
    grad_s: Tensor | None = None,
    grad_v: Tensor | None = None,
) -> SmallGradients:
    """Compute the gradients of all small tensors from the sums.

    Args:
        ops: The implementation.
        saved: What the forward pass saved.
        up: The result of :func:`first_pass`.
        eps: Of the norm.
        band: Kernel ``(k,)``, circular and factor of ECA's gate. Without a kernel, the gate is of another kind, or
            there is none.
        grad_s: ``(N, C)``, gradient of the means that a gate of another kind sees: :func:`gradient_at_other_gate`,
            passed back through that gate.
        grad_v: ``(N, C)``, likewise of the variances.
    """
    kernel, circular, factor = band
    positions = saved.x.shape[2:].numel()
    return SmallGradients(
        *ops.eca_coefficients_backward(
            up.p, up.q, saved.map_means, saved.gate, grad_s, saved.norm_mean, saved.norm_var, saved.weight, saved.bias,
            eps, kernel, circular, positions, factor, saved.m2 if grad_v is not None else None, grad_v,
        )
    )  # fmt: skip


def gradient_at_other_gate(saved: Saved, up: Upstream) -> Tensor:
    """``(N, C)``: gradient of the scale of a gate other than ECA's, ``a q + bias p``; of its shift it is p."""
    assert saved.norm_scale is not None
    grad = saved.norm_scale * up.q
    return grad if saved.bias is None else grad + saved.bias * up.p


def second_pass(
    ops: Any, saved: Saved, up: Upstream, small: SmallGradients, batch: tuple[Tensor, Tensor, int | Tensor] | None
) -> Tensor:
    """Read the gradient and x once more, and write the gradient of x.

    Args:
        ops: The implementation.
        saved: What the forward pass saved.
        up: The result of :func:`first_pass`.
        small: The result of :func:`between_passes`; its offset and slope are overwritten.
        batch: Gradients of mean and variance, ``(C,)`` both, and the number of values that they are computed from;
            None if the norm's statistics are given.
    """
    offset, slope = small.offset, small.slope if small.slope.shape[0] else None
    if batch is not None:  # in place: all of these were just created and are not used elsewhere
        grad_mean, grad_var, count = batch
        offset.add_(grad_mean / count)
        batch_slope = grad_var.mul_(2 / count)
        slope = batch_slope if slope is None else slope.add_(batch_slope)
    for_act = saved.for_act if up.act else None
    return ops.input_backward(
        up.grad, saved.x, saved.scale, saved.shift, for_act, up.act, offset, slope, saved.norm_mean
    )
