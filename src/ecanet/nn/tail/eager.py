"""The tail in eager code: the kernels run forward, backward, and in place for inference.

The norm is ``y = a x + b``. If m are the means of x, those of y are ``s = a m + b``. With the gate ``g = G(s)``::

    out = act(g y + residual) = act(scale x + shift + residual)        scale = g a        shift = g b

Scale and shift are ``(N, C)``. One pass over x finds its moments, and another computes out. The backward takes two
passes as well (:mod:`ecanet.ops.backward`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecanet.nn.tail.gradients_of_gates import GateGraph, gate_backward, run_gate
from ecanet.nn.tail.maths import NO_BAND, GateMaths, NormMaths, Statistics
from ecanet.nn.tail.second_derivatives import differentiable_backward
from ecanet.nn.tail.statistics import share_gradients, share_statistics, update_running_statistics
from ecanet.ops import reference
from ecanet.ops.backward import (
    Saved,
    SmallGradients,
    Upstream,
    between_passes,
    first_pass,
    for_slope,
    gradient_at_other_gate,
    needs_shift,
    second_pass,
)
from ecanet.ops.kernels import KERNELS, Kernels


def norm_gate_add_act(
    backend: str, x: Tensor, norm: NormMaths | None, gate: GateMaths | None, residual: Tensor | None, act: int
) -> Tensor:
    """``act(gate(norm(x)) + residual)`` by the kernels.

    Args:
        backend: Which kernels run: a key of :data:`ecanet.ops.kernels.KERNELS`.
        x: ``(N, C, *spatial)``, not empty.
        norm: A BatchNorm, or None.
        gate: A gate, or None.
        residual: Shape and type of ``x``, or None.
        act: Index in :data:`ecanet.ops.reference.ACTS`.
    """
    if norm is None and gate is None and residual is None and act == 0:
        return x
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    parameters = () if gate is None else gate.parameters
    ops = KERNELS[backend]
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, residual, weight, bias, *parameters)
    ):
        rest = None
        if norm is not None and norm.group is not None:
            rest = _RestOfTheBackward()
            x = _WaitForOtherProcesses.apply(x, weight, bias, rest)
        return _NormGateAddAct.apply(x, residual, weight, bias, ops, norm, gate, act, rest, *parameters)
    if (gate is None or gate.is_band) and (norm is None or not norm.takes_batch_statistics):
        return ops.norm_eca_add_act(x, residual, *norm_and_band(norm, gate), act, 1.0 if gate is None else gate.factor)
    c = _coefficients(ops, x, norm, gate, differentiate=False)
    return ops.apply(x, c.scale, c.shift, residual, act)


def gate_add_act_(backend: str, x: Tensor, gate: GateMaths | None, residual: Tensor | None, act: int) -> Tensor:
    """Write ``act(gate(x) + residual)`` into x; for inference.

    Args:
        backend: As :func:`norm_gate_add_act` takes it.
        x: As above.
        gate: As above.
        residual: As above.
        act: As above.
    """
    ops = KERNELS[backend]
    if gate is None or gate.is_band:
        ops.norm_eca_add_act_(x, residual, *norm_and_band(None, gate), act, 1.0 if gate is None else gate.factor)
    else:
        c = _coefficients(ops, x, None, gate, differentiate=False)
        ops.apply_(x, c.scale, c.shift, residual, act)
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)
    return x


def norm_and_band(norm: NormMaths | None, gate: GateMaths | None) -> tuple[Any, ...]:
    """The arguments of an operation from ``mean`` to ``circular``: a norm of given statistics and a band, or none."""
    kernel, circular, _ = NO_BAND if gate is None else gate.band
    if norm is None:
        return None, None, None, None, 0.0, kernel, circular
    return norm.mean, norm.var, norm.weight, norm.bias, norm.eps, kernel, circular


class _Coefficients(NamedTuple):
    """Results of the first pass over x and of the ``(N, C)``-sized maths.

    Attributes:
        map_means: ``(N, C)``, the means of the maps of x.
        norm_mean: ``(C,)``, the mean that the norm subtracts, or None without a norm.
        norm_var: ``(C,)``, its variance, likewise.
        values: Number of values in a channel, if mean and variance are those of the batch.
        m2: ``(N, C)``, sums of squared deviations of the maps of x, for a gate that sees variances.
        norm_scale: ``(1, C)``, the scale of the norm alone, if the gate is not a band.
        gate: ``(N, C)``, the gate's scale, or None without a gate.
        scale: ``(N, C)``: ``out = act(scale * x + shift + residual)``.
        shift: ``(N, C)``.
        graph: Autograd's graph of a gate that is not a band and has no closed form.
    """

    map_means: Tensor
    norm_mean: Tensor | None
    norm_var: Tensor | None
    values: int | Tensor | None
    m2: Tensor | None
    norm_scale: Tensor | None
    gate: Tensor | None
    scale: Tensor
    shift: Tensor
    graph: GateGraph | None


def _coefficients(
    ops: Kernels, x: Tensor, norm: NormMaths | None, gate: GateMaths | None, differentiate: bool
) -> _Coefficients:
    """Run the first pass over x and the ``(N, C)``-sized maths of norm and gate; update the running statistics."""
    mean = var = weight = bias = count = m2 = None
    eps, needs_variances = 0.0, gate is not None and gate.needs_variances
    if norm is not None:
        _, mean, var, weight, bias, eps, _ = norm
    if norm is not None and norm.takes_batch_statistics:
        map_means, mean, var, m2 = ops.batch_moments(x, needs_variances)
        count = x.numel() // mean.numel()
        if norm.group is not None:
            mean, var, count = share_statistics(mean, var, count, norm.eps, norm.group)
    elif needs_variances:
        map_means, m2 = ops.moments(x)
    elif gate is not None:
        map_means = ops.squeeze(x)
    else:  # nothing reads them
        map_means = x.new_zeros(x.shape[:2], dtype=reference.accumulation_dtype(x.dtype))
    kernel, circular, factor = NO_BAND if gate is None else gate.band
    s, g, scale, shift = ops.eca_coefficients(map_means, mean, var, weight, bias, eps, kernel, circular, factor)
    graph = norm_scale = None
    if gate is not None and not gate.is_band:
        # All rows are the same; what is kept for the backward must not keep the others.
        norm_scale = scale[:1].clone() if differentiate else scale
        g, gate_shift, graph = run_gate(gate, _statistics(x, s, norm_scale, m2, gate), differentiate)
        scale, shift = g * norm_scale, g * shift
        shift = shift if gate_shift is None else shift.add_(gate_shift)
    if norm is not None and count is not None:  # after the gate, which may raise
        assert mean is not None
        assert var is not None
        update_running_statistics(norm.module, mean, var, count, ops)
    m2 = m2 if needs_variances else None
    return _Coefficients(map_means, mean, var, count, m2, norm_scale, None if gate is None else g, scale, shift, graph)


def _statistics(x: Tensor, s: Tensor, norm_scale: Tensor, m2: Tensor | None, gate: GateMaths) -> Statistics:
    """What a gate sees of the norm's output, whose means are s."""
    positions = x.shape[2:].numel()
    if not gate.needs_variances:
        return Statistics(s, None, positions)
    assert m2 is not None
    return Statistics(s, m2 * (norm_scale.square() / positions), positions)


class _NormGateAddAct(torch.autograd.Function):
    """Norm, gate, residual and activation as one node of autograd's graph.

    It saves x and out, as norm and activation alone do. For SiLU and Hardswish it saves the residual and not out. With
    ``rest``, :class:`_WaitForOtherProcesses` computes the gradients of x, weight and bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        ops: Kernels,
        norm: NormMaths | None,
        gate: GateMaths | None,
        act: int,
        rest: "_RestOfTheBackward | None",
        *parameters: Tensor,
    ) -> Tensor:
        c = _coefficients(ops, x, norm, gate, differentiate=True)
        out = ops.apply(x, c.scale, c.shift, residual, act)
        ctx.save_for_backward(
            x, for_slope(act, out, residual), weight, bias, c.map_means, c.norm_mean, c.norm_var, c.m2, c.norm_scale,
            c.gate, c.scale, c.shift if needs_shift(act) else None, *parameters,
        )  # fmt: skip
        ctx.ops, ctx.norm, ctx.gate, ctx.act, ctx.rest = ops, norm, gate, act, rest
        ctx.values, ctx.graph = c.values, c.graph
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        saved, parameters = Saved._make(tensors[:12]), tensors[12:]
        norm, gate = ctx.norm, ctx.gate
        needs_x, needs_residual, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            needed = (*ctx.needs_input_grad[:4], *ctx.needs_input_grad[9:])
            grads = differentiable_backward(saved, parameters, norm, gate, ctx.act, grad, needed)
            return *grads[:4], None, None, None, None, None, *grads[4:]
        up = first_pass(ctx.ops, saved, grad, ctx.act, needs_residual)
        eps = 0.0 if norm is None else norm.eps
        grads_gate: list[Tensor | None]
        if gate is None or gate.is_band:
            band = NO_BAND if gate is None else (parameters[0], gate.circular, gate.factor)
            small = between_passes(ctx.ops, saved, up, eps, band)
            grads_gate = [small.kernel.reshape(kernel.shape) for kernel in parameters]  # one, or none
        else:
            statistics = _statistics_again(saved, gate)
            at_gate = gradient_at_other_gate(saved, up), up.p
            grad_s, grad_v, grads_gate = gate_backward(gate, ctx.graph, statistics, parameters, *at_gate)
            if saved.x.shape[2:].numel() == 1:  # the variance of one position is 0, and so is its slope
                grad_v = None
            small = between_passes(ctx.ops, saved, up, eps, NO_BAND, grad_s, grad_v)
        grad_residual = up.grad if needs_residual else None
        grads_gate = [_in_type_of(t, g) for t, g in zip(parameters, grads_gate, strict=True)]
        if ctx.rest is not None:
            if needs_x:
                ctx.rest.finish = partial(_finish, ctx.ops, norm, saved, up, small, ctx.values)
            placeholder = saved.x.new_zeros(()).expand_as(saved.x)
            return placeholder, grad_residual, None, None, None, None, None, None, None, *grads_gate
        grad_x = None
        if needs_x:
            batch = None if ctx.values is None else (small.norm_mean, small.norm_var, ctx.values)
            grad_x = second_pass(ctx.ops, saved, up, small, batch)
        grad_weight, grad_bias = _in_type_of(saved.weight, small.weight), _in_type_of(saved.bias, small.bias)
        return grad_x, grad_residual, grad_weight, grad_bias, None, None, None, None, None, *grads_gate


def _statistics_again(saved: Saved, gate: GateMaths) -> Statistics:
    """The statistics that a gate with a closed form saw, from what was saved; other gates have them in their graph."""
    if gate.backward is None:
        return Statistics(saved.map_means)
    assert saved.norm_scale is not None
    s = saved.map_means if saved.norm_mean is None else saved.map_means - saved.norm_mean
    s = s * saved.norm_scale
    return _statistics(saved.x, s if saved.bias is None else s + saved.bias, saved.norm_scale, saved.m2, gate)


def _in_type_of(t: Tensor | None, grad: Tensor | None) -> Tensor | None:
    return None if t is None or grad is None else grad.to(t.dtype)


_Finish = Callable[[bool], tuple[Tensor | None, Tensor | None, Tensor | None]]


class _RestOfTheBackward:
    """Holds the part of a backward that needs other processes' sums, until :class:`_WaitForOtherProcesses` runs it."""

    finish: _Finish


class _WaitForOtherProcesses(torch.autograd.Function):
    """The part of a tail's backward that waits for other processes, as a node of its own.

    As with a norm that is called, the gradients of gate and residual are complete before its collective, and those of
    x and the norm after it. This order matters: DistributedDataParallel starts its own collectives as gradients come.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, rest: _RestOfTheBackward) -> Tensor:
        ctx.rest = rest
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.rest.finish(ctx.needs_input_grad[0])
        del ctx.rest.finish  # it holds maps
        return *grads, None


def _finish(
    ops: Kernels,
    norm: NormMaths,
    saved: Saved,
    up: Upstream,
    small: SmallGradients,
    count: Tensor,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, with the sums of all processes."""
    grad_x = None
    if needs_x:  # otherwise no process takes part in the collective, not even one without a batch
        assert saved.norm_var is not None
        batch = *share_gradients(small.weight, small.bias, saved.norm_var, saved.weight, norm.eps, norm.group), count
        grad_x = second_pass(ops, saved, up, small, batch)
    return grad_x, _in_type_of(saved.weight, small.weight), _in_type_of(saved.bias, small.bias)
