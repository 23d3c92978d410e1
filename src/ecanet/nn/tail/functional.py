"""The functions that users call: norm, gate, residual and activation at once, without the convolution or with it."""

from torch import Tensor, nn

from ecanet.nn.tail import compiled, eager
from ecanet.nn.tail.plan import Plan, plan
from ecanet.nn.tail.pointwise import means_before
from ecanet.nn.tail.reading import check_arguments, same_kind
from ecanet.nn.tail.shared_norm import call_with_our_forward
from ecanet.ops import reference


def norm_gate_add_act(
    x: Tensor,
    norm: nn.Module | None = None,
    gate: nn.Module | None = None,
    residual: Tensor | None = None,
    act: str | nn.Module | None = None,
) -> Tensor:
    """``act(gate(norm(x)) + residual)``, in the passes over the data that ``act(norm(x) + residual)`` takes.

    Values, gradients and running statistics are those of the modules called one after another. The gate's squeeze needs
    no pass of its own, because the means of ``a x + b`` follow from those of x, which the norm computes::

        A[n, c] = gate[n, c] * a[c]        B[n, c] = gate[n, c] * b[c]
        out = act(A x + B + residual)

    The fused kernels run for a BatchNorm (in training or not, SyncBatchNorm, torchvision's FrozenBatchNorm2d) and a
    subclass of :class:`ecanet.nn.Gate`. Other modules are called, and the rest is fused. A module with a hook is
    called, so that the hook fires. Under :mod:`torch.fx` and the transforms of :mod:`torch.func` all modules are
    called. A gate attached to the norm (:func:`ecanet.insert_gates_`) counts as ``gate``. Under :func:`torch.compile`
    the tail with ECA is one operation of the graph. With other gates, and without kernels, Inductor fuses the same
    formulas in plain PyTorch. :func:`conv_norm_gate_add_act` includes the convolution before the norm.
    :func:`ecanet.nn.explain` says what computes a call, and why.

    Args:
        x: ``(N, C, *spatial)`` with 0 to 3 spatial dimensions.
        norm: The norm, or None.
        gate: The gate, or None.
        residual: A tensor of the shape and type of ``x``, or one that can be added to it, or None.
        act: ``"relu"``, ``"relu6"``, ``"silu"``, ``"hardswish"``, an activation module, or None for none.

    Returns:
        The shape, type and memory format of ``x``; where ``residual`` has another shape or type, those of the sum.

    Raises:
        TypeError: ``x`` is not floating point, or ``norm``, ``gate`` or ``act`` is not a module.
        ValueError: unknown ``act``, or what the modules raise: wrong number of channels, a batch of one value.
        RuntimeError: the backend asked for by :func:`ecanet.backend` cannot run, or the gate computes with a tensor
            that requires a gradient and is not among its ``parameters()``. In the backward pass: x was written to after
            the forward pass; or, with ``"silu"`` or ``"hardswish"``, the residual, which is read again for the slope.

    Source:
        The identity above is this library's; moments are merged as by Chan, Golub and LeVeque, 1979.

    Example:
        >>> import torch
        >>> from ecanet.nn import ECA
        >>> x, norm, eca = torch.randn(8, 64, 7, 7), nn.BatchNorm2d(64), ECA(64)
        >>> out = norm_gate_add_act(x, norm, eca, residual=x, act="relu")
        >>> torch.allclose(out, torch.relu(eca(norm(x)) + x), atol=1e-5)
        True
    """
    check_arguments(x, norm, gate, act)
    return run_plan(plan(x, norm, gate, residual, act), x, norm, gate, residual, act)


def conv_norm_gate_add_act(
    x: Tensor,
    conv: nn.Module,
    norm: nn.Module | None = None,
    gate: nn.Module | None = None,
    residual: Tensor | None = None,
    act: str | nn.Module | None = None,
) -> Tensor:
    """``norm_gate_add_act(conv(x), norm, gate, residual, act)``, with a squeeze that need not read ``conv(x)``.

    The values are the same up to rounding. For inference, where :func:`torch.compile` gets a formula, the gate's means
    of a 1 x 1 convolution's output are computed from its input (:mod:`ecanet.nn.tail.pointwise`). Norm, gate, addition
    and activation then take the one pass over ``conv(x)`` that norm, addition and activation take.

    Args:
        x: ``(N, C_in, *spatial)``, the input of the convolution.
        conv: The convolution, or any module that turns x into a map ``(N, C, *spatial)``.
        norm: The norm of C channels, or None.
        gate: The gate of C channels, or None.
        residual: A tensor of the shape and type of ``conv(x)``, or one that can be added to it, or None.
        act: As :func:`norm_gate_add_act` takes it.

    Returns:
        The shape, type and memory format of ``conv(x)``; where ``residual`` has others, those of the sum.

    Raises:
        TypeError: As :func:`norm_gate_add_act`; and ``conv`` is not a module.
        ValueError: As :func:`norm_gate_add_act`.
        RuntimeError: As :func:`norm_gate_add_act`.

    Source:
        This library's.

    Example:
        >>> import torch
        >>> from ecanet.nn import ECA
        >>> conv, norm, eca = nn.Conv2d(16, 64, 1), nn.BatchNorm2d(64).eval(), ECA(64)
        >>> x = torch.randn(8, 16, 7, 7)
        >>> out = conv_norm_gate_add_act(x, conv, norm, eca, act="relu")
        >>> torch.allclose(out, torch.relu(eca(norm(conv(x)))), atol=1e-5)
        True
    """
    if not isinstance(conv, nn.Module):
        raise TypeError(f"conv must be a module, got {type(conv).__name__}")
    # Before the convolution, so that a compiler fuses this with what writes x; it drops means that the plan ignores.
    means = means_before(conv, x)
    y = conv(x)
    check_arguments(y, norm, gate, act)
    tail_plan = plan(y, norm, gate, residual, act, means is not None)
    return run_plan(tail_plan, y, norm, gate, residual, act, means if tail_plan.takes_means else None)


def run_plan(
    tail_plan: Plan,
    x: Tensor,
    norm: nn.Module | None,
    gate: nn.Module | None,
    residual: Tensor | None,
    act: str | nn.Module | None,
    map_means: Tensor | None = None,
) -> Tensor:
    """Compute a tail as its plan says.

    Args:
        tail_plan: What :func:`ecanet.nn.tail.plan.plan` returns for the same arguments.
        x: As :func:`norm_gate_add_act` takes it.
        norm: As above.
        gate: As above.
        residual: As above.
        act: As above.
        map_means: ``(N, C)``, the means of x, if the plan takes them.
    """
    if tail_plan.executor == "modules":
        return _activate(_add(_call(tail_plan, x, norm, gate), residual), act)
    fused_residual = residual if tail_plan.adds else None
    code = 0 if tail_plan.act is None else tail_plan.act
    if tail_plan.executor == "kernels":
        y = x
        if tail_plan.calls_norm or tail_plan.calls_gate:
            y = _call_some(tail_plan, x, norm, gate)
            if not same_kind(y, x):  # the plan was made for maps like x
                y = y if tail_plan.calls_gate or gate is None else gate(y)
                return _activate(_add(y, residual), act)
        norm_maths = None if tail_plan.calls_gate else tail_plan.norm  # then it is in y already
        y = eager.norm_gate_add_act(tail_plan.backend, y, norm_maths, tail_plan.gate, fused_residual, code)
    else:
        assert tail_plan.gate is not None
        if tail_plan.executor == "operation":
            assert tail_plan.norm is not None
            y = compiled.operation(x, tail_plan.norm, tail_plan.gate, fused_residual, code)
        else:
            y = compiled.formula(x, tail_plan.norm, tail_plan.gate, fused_residual, code, map_means)
    y = y if tail_plan.adds else _add(y, residual)
    return y if tail_plan.act is not None else _activate(y, act)


def _call(tail_plan: Plan, x: Tensor, norm: nn.Module | None, gate: nn.Module | None) -> Tensor:
    """Call norm and gate."""
    if norm is not None:
        x = call_with_our_forward(norm, x) if tail_plan.norm_is_ours else norm(x)
    return x if gate is None else gate(x)


def _call_some(tail_plan: Plan, x: Tensor, norm: nn.Module | None, gate: nn.Module | None) -> Tensor:
    """Run what comes before the part that the kernels compute: the norm, and the gate if it is called."""
    if not tail_plan.calls_norm and tail_plan.norm is not None:  # and the gate is called
        x = eager.norm_gate_add_act(tail_plan.backend, x, tail_plan.norm, None, None, 0)
    return _call(tail_plan, x, norm if tail_plan.calls_norm else None, gate if tail_plan.calls_gate else None)


def _add(y: Tensor, residual: Tensor | None) -> Tensor:
    return y if residual is None else y + residual


def _activate(y: Tensor, act: str | nn.Module | None) -> Tensor:
    return act(y) if isinstance(act, nn.Module) else reference.activate(y, reference.ACTS.index(act))
