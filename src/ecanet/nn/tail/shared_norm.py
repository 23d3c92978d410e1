"""A SyncBatchNorm that is called on a CPU: it takes part in the same collectives as the kernels in other processes."""

from typing import Any

import torch
from torch import Tensor, nn

from ecanet.nn.hooks import called_differently
from ecanet.nn.tail.second_derivatives import OTHER_PROCESSES, no_second_derivative
from ecanet.nn.tail.statistics import process_group, share_gradients, share_statistics, update_running_statistics
from ecanet.ops import reference
from ecanet.private_torch import check_rank

#: Saved at import, because user code may replace it later.
_FORWARD_OF_TORCH = nn.SyncBatchNorm.forward


def needs_our_forward(norm: nn.SyncBatchNorm, x: Tensor) -> bool:
    """Whether torch's own forward would fail, or break the protocol.

    It does not run on a CPU, and for an empty batch of a half type it sends another type than the other processes do.

    Args:
        norm: A SyncBatchNorm that is called.
        x: Its input.
    """
    return (
        type(norm).forward is _FORWARD_OF_TORCH  # a subclass may be a parametrized one
        and isinstance(vars(norm).get("forward"), _SharedForward | None)
        and isinstance(x, Tensor)  # torch.fx passes proxies
        and (x.is_cpu or (not torch.compiler.is_compiling() and x.numel() == 0))
        and process_group(norm) is not None
    )


def call_with_our_forward(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)``, hooks and all, with a ``forward`` that has the same collectives as torch's.

    Args:
        norm: A SyncBatchNorm that :func:`needs_our_forward`.
        x: Its input.
    """
    assert isinstance(norm, nn.SyncBatchNorm)
    if not called_differently(norm):
        return _SharedForward(norm)(x)
    own = vars(norm)
    if not getattr(own.get("forward"), "is_running", False):
        own["forward"] = _SharedForward(norm)  # so that the call runs every hook on the module itself
    try:
        return norm(x)
    finally:
        own.pop("forward", None)


def call_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)`` for a norm inside a gate; a SyncBatchNorm runs on a CPU as well.

    Args:
        norm: Any norm.
        x: Its input.
    """
    if isinstance(norm, nn.SyncBatchNorm) and needs_our_forward(norm, x):
        return call_with_our_forward(norm, x)
    return norm(x)


def call_norm_in_type_of(x: Tensor, norm: nn.Module) -> Tensor:
    """``norm(x)`` in the type of ``x``: the norm's tensors are converted, instead of rounding x to their type.

    Args:
        x: What the norm is called on.
        norm: Any module of floating-point parameters and buffers.
    """
    if not isinstance(x, Tensor):  # torch.fx passes proxies
        return call_norm(norm, x)
    slots: list[tuple[dict[str, Any], str, Tensor]] = [
        (held, name, t)
        for held in (norm._parameters, norm._buffers)
        for name, t in held.items()
        if t is not None and t.is_floating_point() and t.dtype != x.dtype
    ]
    if not slots:
        return call_norm(norm, x)
    converted = [t.to(x.dtype) for _, _, t in slots]
    try:
        for (held, name, _), t in zip(slots, converted, strict=True):
            held[name] = t
        return call_norm(norm, x)
    finally:
        for (held, name, t), now in zip(slots, converted, strict=True):
            held[name] = t
            if norm.training and held is norm._buffers:
                t.copy_(now)


class _SharedForward:
    """The ``forward`` of a SyncBatchNorm during one call, so that its hooks run around it.

    A hook may copy the norm during the call. In the copy, this object removes itself at the first call.
    """

    def __init__(self, norm: nn.SyncBatchNorm) -> None:
        self.norm, self.is_running = norm, True

    def __getstate__(self) -> dict[str, Any]:
        return {"norm": self.norm, "is_running": False}

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not self.is_running:
            vars(norm).pop("forward", None)
            return norm.forward(x)
        check_rank(norm, x)
        if x.shape[1] == 0 or norm.num_features != x.shape[1]:
            raise ValueError(f"x must have the {norm.num_features} channels of its norm, got shape {tuple(x.shape)}")
        return _SharedNorm.apply(x, norm.weight, norm.bias, norm)


class _SharedNorm(torch.autograd.Function):
    """The norm in plain PyTorch, with the collectives of the kernels. An empty batch takes part with zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: nn.SyncBatchNorm) -> Tensor:
        channels = x.shape[1]
        if x.numel() == 0:
            mean = var = x.new_zeros(channels, dtype=reference.accumulation_dtype(x.dtype))
        else:
            _, mean, var, _ = reference.batch_moments(x)
        ctx.group = process_group(norm)
        mean, var, count = share_statistics(mean, var, x.numel() // channels, norm.eps, ctx.group)
        update_running_statistics(norm, mean, var, count)
        ctx.save_for_backward(x, weight, bias, mean, var, count)
        ctx.eps = norm.eps
        y = _normalised(x, mean, var, norm.eps)
        y = y if weight is None else y * reference.over_positions(weight.to(mean.dtype), x)
        return (y if bias is None else y + reference.over_positions(bias.to(mean.dtype), x)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise no_second_derivative("tail", OTHER_PROCESSES)
        x, weight, bias, mean, var, count = ctx.saved_tensors
        batch = (0, *range(2, x.dim()))
        grad = grad.to(mean.dtype)
        grad_weight, grad_bias = (grad * _normalised(x, mean, var, ctx.eps)).sum(batch), grad.sum(batch)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_mean, grad_var = share_gradients(grad_weight, grad_bias, var, weight, ctx.eps, ctx.group)
            a = torch.rsqrt(var + ctx.eps)
            a = a if weight is None else a * weight.to(a.dtype)
            parts = a, grad_mean / count, grad_var * (2 / count), mean
            a, offset, slope, center = (reference.over_positions(t, x) for t in parts)
            grad_x = (a * grad + offset + slope * (x.to(mean.dtype) - center)).to(x.dtype)
        pairs = ((weight, grad_weight), (bias, grad_bias))
        small = (None if t is None else gt.to(t.dtype) for t, gt in pairs)
        return grad_x, *small, None


def _normalised(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    centered = x.to(mean.dtype) - reference.over_positions(mean, x)
    return centered * reference.over_positions(torch.rsqrt(var + eps), x)
