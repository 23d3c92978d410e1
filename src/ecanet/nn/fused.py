"""Norm, gate, residual and activation in the passes over the data that norm, residual and activation take.

``y = a x + b`` is the norm and ``s = a m + b`` the means of its output, m being those of x; so ``out = act(g y +
residual) = act(scale x + shift + residual)`` with ``(N, C)``-sized ``scale = g a`` and ``shift = g b``: one pass over
x for its moments, one for out. The backward takes two passes too (:mod:`ecanet.ops.reference` has the formulas).

:func:`ecanet.nn.norm_gate_add_act` decides what comes here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from ecanet.nn.sync import share_gradients, share_statistics
from ecanet.ops import backend, gpu, reference


class _Kernels:
    """The operations, called below autograd: what they compute is differentiated here or not at all.

    It saves the ten microseconds a call that a derivative registered in Python costs, which small maps would notice.
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = getattr(torch.ops.ecanet, name).default._op  # what calling the overload comes down to
        below_autograd = torch._C._AutoDispatchBelowAutograd
        launch = getattr(gpu, name)

        def run(x: Tensor, *args: Any) -> Any:
            if backend.current() == "triton" or not x.is_cpu:
                return launch(x, *args)
            with below_autograd():
                return operation(x, *args)

        setattr(self, name, run)
        return run


_kernels = _Kernels()
# By their own names: what is looked up on the way to a small map takes as long as the map.
_is_tracing, _are_transforms_active = torch._C._is_tracing, torch._C._are_functorch_transforms_active
#: Tensors that are what they seem: no shard, no quantised weight, nothing with operations of its own.
PLAIN_TENSORS = (Tensor, nn.Parameter)


class Norm(NamedTuple):
    """What the tail needs to know of a BatchNorm; without ``mean`` and ``var`` it takes those of the batch."""

    module: nn.Module
    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    group: Any = None  # of processes that share the statistics
    later: "_Later | None" = None  # where the backward goes on with these


class GateMaths(NamedTuple):
    """What the tail needs to know of a gate: a function of the channel means; if ``band``, ECA's, of one kernel.

    ``function`` contains the factor; ``factor`` is for those who compute the band's gate themselves.
    """

    function: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    band: bool = False
    circular: bool = False
    factor: float = 1.0


class _Coefficients(NamedTuple):
    means: Tensor  # (N, C) of x
    mean: Tensor | None  # (C,) of the norm
    var: Tensor | None
    values: int | Tensor | None  # behind mean and var, where they are the batch's
    a: Tensor | None  # (N, C) of the norm, for that gate
    gate: Tensor | None  # (N, C)
    scale: Tensor  # (N, C)
    shift: Tensor  # (N, C)
    graph: tuple[Tensor, Tensor] | None = None  # s and the gate that autograd can go back through


#: What torch.compile is given of the tail on a GPU: the ``operation``, whose kernels Inductor launches, or the
#: ``formula`` in plain PyTorch, which it fuses. Measured: python -m benchmarks.gpu.
FORMS_ON_GPU = {"training": "operation", "inference": "operation"}


def kernels_run(x: Tensor) -> bool:
    """Whether the kernels can take x as it comes, now.

    Not where somebody wants to see plain PyTorch: torch.compile and export, torch.fx, torch.jit.trace, transforms of
    torch.func, forward-mode derivatives, tensor subclasses.

    Args:
        x: A map.

    Raises:
        RuntimeError: the backend asked for by :func:`ecanet.backend` cannot run.
    """
    return (
        not is_compiling()
        and not _is_tracing()
        and type(x) in PLAIN_TENSORS
        and x.layout is torch.strided
        and backend.choose(x) != "reference"
        and 2 <= x.dim() <= 5
        and x.numel() > 0
        and not _are_transforms_active()
        and forward_ad._current_level < 0
    )


def is_plain(x: Tensor) -> bool:
    """Whether x is a tensor with values of its own that no tracer and no transform looks at; a compiler may."""
    return (
        not _is_tracing()
        and type(x) in PLAIN_TENSORS
        and x.layout is torch.strided
        and not _are_transforms_active()
        and forward_ad._current_level < 0
    )


def is_exporting() -> bool:
    """Whether :func:`torch.export.export` looks on.

    What :func:`torch.compiler.is_exporting` returns. That says True under torch.compile, too, in torch 2.11.
    """
    return torch.compiler._is_exporting_flag


def called_differently(module: nn.Module, known_hooks: int = 0) -> bool:
    """Whether calling the module does more than its class says: hooks, its own or global, or another ``forward``.

    Args:
        module: The module.
        known_hooks: So many forward hooks are known and accounted for.
    """
    return bool(
        len(module._forward_hooks) > known_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def is_identity(module: nn.Module | None) -> bool:
    """Whether a module may as well not be called: it returns its input, and nobody looks on."""
    return module is None or (type(module) is nn.Identity and not called_differently(module))


def formula(x: Tensor, norm: Norm, gate: GateMaths, residual: Tensor | None) -> Tensor:
    """``gate(norm(x)) + residual`` with the statistics of the batch, in plain PyTorch that a compiler can fuse."""
    means, m2 = reference.moments(x)
    positions = x.shape[2:].numel()
    mean = means.mean(0)
    var = (m2 / positions + (means - mean).square()).mean(0)
    update_running_statistics(norm.module, mean.detach(), var.detach(), x.shape[0] * positions)
    found = Norm(norm.module, mean, var, norm.weight, norm.bias, norm.eps)
    return formula_given_means(x, found, gate, residual, 0, means)


def formula_given_means(
    x: Tensor, norm: Norm | None, gate: GateMaths, residual: Tensor | None, act: int, means: Tensor
) -> Tensor:
    """The tail with given statistics and means of ``x``, in plain PyTorch: one pass when a compiler has fused it."""
    if norm is None:
        return reference.apply(x, gate.function(means), None, residual, act)
    s, a, b = reference.normalise(means, norm.mean, norm.var, norm.weight, norm.bias, norm.eps)
    g = gate.function(s)
    return reference.apply(x, g * a, g * b, residual, act)


def is_operation_in_graph(x: Tensor, training: bool) -> bool:
    """Whether a compiler's graph gets the tail of x as one operation, where the gate is ECA.

    Args:
        x: A map.
        training: Whether the norm takes the statistics of the batch.
    """
    if x.is_cpu:
        return backend.current() in ("auto", "cpu") and backend.choose(x) == "cpu"
    form = FORMS_ON_GPU["training" if training else "inference"]
    may_run = backend.current() in ("auto", "triton") and gpu.IS_COMPLETE and x.dtype in gpu.DTYPES
    return x.is_cuda and form == "operation" and may_run


def in_graph(x: Tensor, norm: Norm, gate: GateMaths, residual: Tensor | None, act: int) -> Tensor | None:
    """The tail as one operation in a compiler's graph, or None where the compiler does better with plain PyTorch.

    On a CPU the C++ kernels take a quarter of the time of what Inductor makes of the same formulas
    (``python -m benchmarks.cpu --only training``). What is exported must run without this library.
    """
    if not gate.band or is_exporting() or x.numel() == 0:
        return None
    if not is_operation_in_graph(x, training=norm.mean is None):
        return None
    kernel, circular = gate.parameters[0], gate.circular
    if norm.mean is None:
        weights = norm.weight, norm.bias, norm.eps
        out, _, mean, var, *_ = torch.ops.ecanet.train_tail(x, residual, *weights, kernel, circular, act, gate.factor)
        update_running_statistics(norm.module, mean.detach(), var.detach(), x.shape[0] * x.shape[2:].numel())
        return out
    if torch.is_grad_enabled():
        return None
    if x.is_cuda:
        return torch.ops.ecanet.eca_tail(x, residual, *_at_once(norm, gate), act, gate.factor)
    out = x.clone()  # which a compiler leaves out where nobody else reads x: the tail then writes over it
    torch.ops.ecanet.eca_tail_(out, residual, *_at_once(norm, gate), act, gate.factor)
    return out


def tail(x: Tensor, norm: Norm | None, gate: GateMaths | None, residual: Tensor | None, act: int) -> Tensor:
    """``act(gate(norm(x)) + residual)``.

    Args:
        x: ``(N, C, *spatial)``, not empty.
        norm: A BatchNorm, or None.
        gate: A gate, or None.
        residual: Shape and type of ``x``, or None.
        act: Index in :data:`ecanet.ops.reference.ACTS`.
    """
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    parameters = () if gate is None else gate.parameters
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, residual, weight, bias, *parameters)
    ):
        if norm is None and gate is None:  # no use for x in the backward, so torch's own operations save less
            return reference.activate(x if residual is None else x + residual, act)
        if norm is not None and norm.group is not None:
            norm = norm._replace(later=_Later())
            x = _WithTheOthers.apply(x, weight, bias, norm.later)
        return _Tail.apply(x, residual, weight, bias, norm, gate, act, *parameters)
    if (gate is None or gate.band) and (norm is None or norm.mean is not None):
        return _kernels.eca_tail(x, residual, *_at_once(norm, gate), act, 1.0 if gate is None else gate.factor)
    c = _coefficients(x, norm, gate, differentiate=False)
    return _kernels.apply(x, c.scale, c.shift, residual, act)


def shared_norm(x: Tensor, norm: Norm) -> Tensor:
    """The norm in plain PyTorch, among processes that share its statistics; x may be empty here and not elsewhere.

    They wait for this one in the same collectives as :func:`tail` runs, forward and backward.

    Args:
        x: ``(N, C, *spatial)``, C not 0.
        norm: A norm with a group.
    """
    return _SharedNorm.apply(x, norm.weight, norm.bias, norm)


def tail_(x: Tensor, gate: GateMaths | None, residual: Tensor | None, act: int) -> Tensor:
    """Write ``act(gate(x) + residual)`` into x; for inference."""
    if gate is None or gate.band:
        _kernels.eca_tail_(x, residual, *_at_once(None, gate), act, 1.0 if gate is None else gate.factor)
    else:
        c = _coefficients(x, None, gate, differentiate=False)
        _kernels.apply_(x, c.scale, c.shift, residual, act)
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)
    return x


def _at_once(norm: Norm | None, gate: GateMaths | None) -> tuple[Any, ...]:
    kernel, circular = (None, False) if gate is None else (gate.parameters[0], gate.circular)
    if norm is None:
        return None, None, None, None, 0.0, kernel, circular
    return norm.mean, norm.var, norm.weight, norm.bias, norm.eps, kernel, circular


def _coefficients(x: Tensor, norm: Norm | None, gate: GateMaths | None, differentiate: bool) -> _Coefficients:
    mean = var = weight = bias = count = None
    eps = 0.0
    if norm is not None:
        mean, var, weight, bias, eps = norm.mean, norm.var, norm.weight, norm.bias, norm.eps
    if norm is not None and mean is None:
        means, mean, var = _kernels.batch_moments(x)
        count = x.numel() // mean.numel()
        if norm.group is not None:
            mean, var, count = share_statistics(mean, var, count, norm.eps, norm.group)
    elif gate is not None:
        means = _kernels.squeeze(x)
    else:  # nothing looks at them
        means = x.new_zeros(x.shape[:2], dtype=reference.accumulation_dtype(x.dtype))
    kernel, circular, factor = None, False, 1.0
    if gate is not None and gate.band:
        kernel, circular, factor = gate.parameters[0], gate.circular, gate.factor
    s, g, scale, shift = _kernels.eca_coefficients(means, mean, var, weight, bias, eps, kernel, circular, factor)
    graph = None
    a = None
    if gate is not None and not gate.band:
        graph = _run_gate(gate, s, differentiate)
        a, g = scale, graph[1].detach().to(s.dtype)
        scale, shift = g * scale, g * shift
    if norm is not None and count is not None:  # after the gate, which may raise
        assert mean is not None
        assert var is not None
        update_running_statistics(norm.module, mean, var, count)
    return _Coefficients(means, mean, var, count, a, None if gate is None else g, scale, shift, graph)


def _run_gate(gate: GateMaths, s: Tensor, differentiate: bool) -> tuple[Tensor, Tensor]:
    """Call the gate once; if ``differentiate``, with a graph that no hook on saved tensors takes away.

    Raises:
        RuntimeError: the gate depends on a tensor whose gradient nobody would get.
    """
    with torch.autocast(s.device.type, enabled=False):
        if not differentiate:
            g = gate.function(s)
            if g.requires_grad:
                _check_leaves(None, g, gate.parameters)
            return s, g
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_with_version, _of_that_version):
            leaf = s.detach().requires_grad_()
            g = gate.function(leaf.clone())  # which may write into what it gets
    _check_leaves(leaf, g, gate.parameters)
    return leaf, g


def _with_version(t: Tensor) -> tuple[Tensor, int]:
    # Detached: an output that an operation saves, as sigmoid does, would keep the graph that keeps it.
    return t.detach(), t._version


def _of_that_version(saved: tuple[Tensor, int]) -> Tensor:
    t, version = saved
    if t._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(t.shape)} that a gate needs for its gradient has been modified by an inplace "
            "operation"
        )
    return t


def _check_leaves(leaf: Tensor | None, gate: Tensor, parameters: tuple[Tensor, ...]) -> None:
    """Raise where a gate depends on a tensor whose gradient nobody would get."""
    known = {id(leaf), *map(id, parameters)}
    seen = {parameter.grad_fn for parameter in parameters}  # those may be computed from others
    to_do = [gate.grad_fn]
    while to_do:
        node = to_do.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise RuntimeError(
                f"the gate depends on a tensor of shape {tuple(variable.shape)} that requires a gradient and is not "
                "among its parameters(): register it as one, or run under ecanet.backend('reference')"
            )
        to_do.extend(function for function, _ in node.next_functions)


def update_running_statistics(norm: Any, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
    """What torch's BatchNorm does with the statistics of a batch of ``count`` values a channel."""
    if not (norm.training and norm.track_running_stats):
        return
    with torch.no_grad():
        momentum: Any = norm.momentum
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if momentum is None:  # cumulative average
                momentum = 1.0 / norm.num_batches_tracked.to(mean.dtype)
        if momentum is None:  # torch takes this one, too
            momentum = 0.0
        if norm._buffers.get("running_mean") is None:  # somebody took them away: torch counts the batch, and trains
            return None
        by_kernel = (mean.is_cuda or backend.current() == "triton") and not is_compiling()
        # Numbers reach a Triton kernel in float32, too few digits for statistics in float64.
        by_kernel = by_kernel and mean.dtype is torch.float32
        if by_kernel and not isinstance(momentum, Tensor) and not isinstance(count, Tensor):
            return gpu.update_running(norm.running_mean, norm.running_var, mean, var, momentum, count)
        keep = 1.0 - momentum
        unbiased = momentum * (count / (count - 1))
        for running, new in ((norm.running_mean, momentum * mean), (norm.running_var, unbiased * var)):
            running.copy_(keep * running.to(new.dtype) + new)  # rounded once


class _Later:
    """What is left of a backward until other processes have been heard: from :class:`_Tail` to _WithTheOthers."""

    finish: Callable[[bool], tuple[Tensor | None, Tensor | None, Tensor | None]]


class _WithTheOthers(torch.autograd.Function):
    """The part of a tail's backward that waits for other processes, as a node of its own.

    A norm that is called is one, too: gradients of gate and residual are there before its collective, those of x and
    the norm after. DistributedDataParallel starts collectives of its own as gradients come.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, later: _Later) -> Tensor:
        ctx.later = later
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.later.finish(ctx.needs_input_grad[0])
        del ctx.later.finish  # which holds maps
        return *grads, None


class _Tail(torch.autograd.Function):
    """Saves x, and out (or the residual, for SiLU and Hardswish), as norm and activation alone do.

    With ``norm.later``, x comes from :class:`_WithTheOthers`, and the gradients of x, weight and bias do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: Norm | None,
        gate: GateMaths | None,
        act: int,
        *parameters: Tensor,
    ) -> Tensor:
        c = _coefficients(x, norm, gate, differentiate=True)
        out = _kernels.apply(x, c.scale, c.shift, residual, act)
        name = reference.ACTS[act]
        for_act = out if name in ("relu", "relu6") else residual if name is not None else None
        ctx.save_for_backward(
            x, for_act, weight, bias, c.means, c.mean, c.var, c.a, c.gate, c.scale, c.shift, *parameters
        )
        ctx.norm, ctx.gate, ctx.act, ctx.count, ctx.graph = norm, gate, act, c.values, c.graph
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_backward(ctx, grad)
        x, for_act, weight, bias, means, mean, var, a, g, scale, shift, *parameters = ctx.saved_tensors
        gate, act = ctx.gate, ctx.act
        needs_x, needs_residual = ctx.needs_input_grad[:2]
        # d is the residual's gradient; where nobody needs it, the second pass computes it again.
        keep_d = needs_residual and act != 0
        d, p, q = _kernels.apply_backward(grad, x, scale, shift, mean, for_act, act, keep_d)
        if keep_d:
            grad, act = d, 0
        kernel, circular, factor, grad_s = None, False, 1.0, None
        grad_parameters: list[Tensor | None] = [None] * len(parameters)
        if gate is not None and gate.band:
            kernel, circular, factor = parameters[0], gate.circular, gate.factor
        elif gate is not None:
            grad_gate = a * q if bias is None else a * q + bias * p
            grad_s, grad_parameters = _gate_backward(ctx.graph[0], ctx.graph[1], gate.parameters, grad_gate)
        eps = 0.0 if ctx.norm is None else ctx.norm.eps
        offset, grad_weight, grad_bias, grad_kernel, grad_mean, grad_var = _kernels.eca_coefficients_backward(
            p, q, means, g, grad_s, mean, var, weight, bias, eps, kernel, circular, x.numel() // means.numel(), factor
        )
        if kernel is not None:
            grad_parameters = [grad_kernel.reshape(kernel.shape)]
        keep = grad if needs_residual else None
        if ctx.norm is not None and ctx.norm.later is not None:
            sums = grad_weight, grad_bias
            ctx.norm.later.finish = partial(
                _finish,
                ctx.norm,
                sums,
                ctx.count,
                offset,
                (grad, x, scale, shift, for_act, act),
                mean,
                var,
                weight,
                bias,
            )
            of_parameters = [
                None if gt is None else gt.to(t.dtype) for t, gt in zip(parameters, grad_parameters, strict=True)
            ]
            return x.new_zeros(()).expand_as(x), keep, None, None, None, None, None, *of_parameters
        slope = None
        if ctx.count is not None:
            offset.add_(grad_mean / ctx.count)
            slope = grad_var.mul_(2 / ctx.count)
        grad_x = None
        if needs_x:
            grad_x = _kernels.input_backward(grad, x, scale, shift, for_act, act, offset, slope, mean)
        inputs = [(weight, grad_weight), (bias, grad_bias), *zip(parameters, grad_parameters, strict=True)]
        small = [None if t is None or gt is None else gt.to(t.dtype) for t, gt in inputs]
        return grad_x, keep, small[0], small[1], None, None, None, *small[2:]


def _finish(
    norm: Norm,
    sums: tuple[Tensor, Tensor],
    count: Tensor,
    offset: Tensor,
    upstream: tuple[Any, ...],
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The end of :class:`_Tail`'s backward, with the sums of all processes: gradients of x, weight and bias."""
    grad_x = None
    if needs_x:  # else nobody looks at them, nor do processes without a batch
        grad_mean, grad_var = share_gradients(*sums, var, weight, norm.eps, norm.group)
        offset = offset + grad_mean / count
        grad_x = _kernels.input_backward(*upstream, offset, grad_var * (2 / count), mean)
    of_weight, of_bias = (None if t is None else gt.to(t.dtype) for t, gt in zip((weight, bias), sums, strict=True))
    return grad_x, of_weight, of_bias


class _SharedNorm(torch.autograd.Function):
    """The norm alone, with the collectives of :class:`_Tail`; an empty batch takes part with zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> Tensor:
        channels = x.shape[1]
        if x.numel() == 0:
            mean = var = x.new_zeros(channels, dtype=reference.accumulation_dtype(x.dtype))
        else:
            _, mean, var = reference.batch_moments(x)
        mean, var, count = share_statistics(mean, var, x.numel() // channels, norm.eps, norm.group)
        update_running_statistics(norm.module, mean, var, count)
        ctx.save_for_backward(x, weight, bias, mean, var, count)
        ctx.norm = norm
        y, a = _normalised(x, mean, var, norm.eps), None if weight is None else weight.to(mean.dtype)
        y = y if a is None else y * reference.over_positions(a, x)
        return (y if bias is None else y + reference.over_positions(bias.to(mean.dtype), x)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise _no_second_derivative("tail", _OTHER_PROCESSES)
        x, weight, bias, mean, var, count = ctx.saved_tensors
        norm, batch = ctx.norm, (0, *range(2, x.dim()))
        grad = grad.to(mean.dtype)
        grad_weight, grad_bias = (grad * _normalised(x, mean, var, norm.eps)).sum(batch), grad.sum(batch)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_mean, grad_var = share_gradients(grad_weight, grad_bias, var, weight, norm.eps, norm.group)
            a = torch.rsqrt(var + norm.eps)
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


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The backward in operations that can be differentiated again: through the formulas in plain PyTorch.

    Raises:
        RuntimeError: the tail shares its statistics with other processes, or its gate cannot be called once more.
    """
    x, for_act, weight, bias, _, mean, var, _, g, _, _, *parameters = ctx.saved_tensors
    norm, gate, act = ctx.norm, ctx.gate, ctx.act
    if norm is not None and norm.group is not None:
        raise _no_second_derivative("tail", _OTHER_PROCESSES)
    residual, code = for_act, act
    if reference.ACTS[act] in ("relu", "relu6"):  # whose slope is constant around out: nothing to differentiate
        blocked = for_act <= 0 if reference.ACTS[act] == "relu" else (for_act <= 0) | (for_act >= 6)
        grad, residual, code = grad.masked_fill(blocked, 0), None, 0
    elif act == 0:
        residual = None
    # Aliases: one of these may be computed from another, and what is asked for is how out depends on each alone.
    x = x.view_as(x)
    residual, weight, bias = (None if t is None else t.view_as(t) for t in (residual, weight, bias))
    parameters = [t.view_as(t) for t in parameters]
    with torch.autocast(x.device.type, enabled=False):
        means, m2 = reference.moments(x)
        if ctx.count is not None:  # statistics of the batch
            mean = means.mean(0)
            var = (m2 / x.shape[2:].numel() + (means - mean).square()).mean(0)
        s, a, b = reference.normalise(means, mean, var, weight, bias, 0.0 if norm is None else norm.eps)
        if gate is not None:
            gates = _gate_again(gate, s, parameters, g, "gate" if norm is None else "tail").to(s.dtype)
            a, b = gates * a, gates * b
        out = reference.apply(x, a.expand_as(s), None if norm is None else b.expand_as(s), residual, code)
    inputs = [x, residual, weight, bias, *parameters]
    needed = [*ctx.needs_input_grad[:4], *ctx.needs_input_grad[7:]]
    wanted = [t for t, needs in zip(inputs, needed, strict=True) if needs and t is not None]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True) if wanted else ())
    grads = [next(found) if needs and t is not None else None for t, needs in zip(inputs, needed, strict=True)]
    if any(needs and g is None for needs, g in zip(needed[4:], grads[4:], strict=True)):
        raise _no_second_derivative(
            "gate" if norm is None else "tail", "its gate computes with other weights than its own"
        )
    if residual is None:
        grads[1] = grad if ctx.needs_input_grad[1] else None
    return *grads[:4], None, None, None, *grads[4:]


def _gate_again(gate: GateMaths, s: Tensor, parameters: list[Tensor], before: Tensor, what: str) -> Tensor:
    """The gate once more, in a graph that reaches s and the parameters of the forward pass.

    Raises:
        RuntimeError: that is another gate than in the forward pass, or calling it leaves a trace.
    """
    if gate.band:
        return torch.sigmoid(reference.band(s, parameters[0], gate.circular)) * gate.factor
    owner = getattr(gate.function, "__self__", None)
    modules = list(owner.modules()) if isinstance(owner, nn.Module) else []
    slots = [(m._parameters, key, p) for m in modules for key, p in m._parameters.items() if p is not None]
    own = dict.fromkeys(id(p) for _, _, p in slots)
    if owner is None or len(own) != len(parameters) or any(key != "scale" for key, _ in owner.named_buffers()):
        raise _no_second_derivative(what, f"its {type(owner).__name__} gate keeps more than weights")
    now = dict(zip(own, parameters, strict=True))
    chance = _state_of_chance(s)
    try:
        for held, key, p in slots:
            held[key] = now[id(p)]  # type: ignore[assignment]
        again = gate.function(s)
    finally:
        for held, key, p in slots:
            held[key] = p
    if not torch.equal(chance, _state_of_chance(s)):  # at a neutral start its value does not show that
        raise _no_second_derivative(what, f"its {type(owner).__name__} gate draws random numbers")
    close = 1e-9 if before.dtype is torch.float64 else 1e-4
    if not torch.allclose(again.detach().to(before.dtype), before, rtol=close, atol=close, equal_nan=True):
        raise _no_second_derivative(what, f"its {type(owner).__name__} gate returns something else when called again")
    return again


def _state_of_chance(s: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(s.device) if s.is_cuda else torch.get_rng_state()


_OTHER_PROCESSES = "its norm shares statistics with other processes"


def _no_second_derivative(what: str, why: str) -> RuntimeError:
    return RuntimeError(
        f"this fused {what} cannot be differentiated twice (create_graph=True), for {why}: run its forward pass under "
        "ecanet.backend('reference')"
    )


def _gate_backward(
    s: Tensor, gate: Tensor, parameters: tuple[Tensor, ...], grad_gate: Tensor
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of s and of the gate's parameters, through the graph of the forward pass."""
    if not gate.requires_grad:
        return None, [None] * len(parameters)
    wanted = [s, *(parameter for parameter in parameters if parameter.requires_grad)]
    grad_s, *found = torch.autograd.grad(gate, wanted, grad_gate.to(gate.dtype), retain_graph=True, allow_unused=True)
    remaining = iter(found)
    grads = [next(remaining) if parameter.requires_grad else None for parameter in parameters]
    return None if grad_s is None else grad_s.to(grad_gate.dtype), grads
