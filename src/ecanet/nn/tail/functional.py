"""What users call: norm, gate, addition of the residual and activation at once, and the convolution before them."""

from torch import Tensor, nn

from ecanet.nn.attached import attached_gate
from ecanet.nn.tail import compiled, eager
from ecanet.nn.tail.plan import Plan, plan
from ecanet.nn.tail.pointwise import means_after
from ecanet.nn.tail.reading import check_arguments, same_kind
from ecanet.nn.tail.shared_norm import call_norm
from ecanet.ops import reference


def norm_gate_add_act(
    x: Tensor,
    norm: nn.Module | None = None,
    gate: nn.Module | None = None,
    residual: Tensor | None = None,
    act: str | nn.Module | None = None,
) -> Tensor:
    """``act(gate(norm(x)) + residual)``, in the passes over the data that ``act(norm(x) + residual)`` takes.

    The same values, gradients and running statistics as calling the modules one after another. The squeeze of the
    gate rides on the norm's own pass, because the means of ``a x + b`` follow from those of x::

        A[n, c] = gate[n, c] * a[c]        B[n, c] = gate[n, c] * b[c]
        out = act(A x + B + residual)

    The fused kernels run for a BatchNorm (in training or not, SyncBatchNorm, torchvision's FrozenBatchNorm2d) and a
    subclass of :class:`ecanet.nn.Gate`. Other modules are called, and what is left is fused. A module that somebody
    put a hook on, or that :mod:`torch.fx` or a transform of :mod:`torch.func` looks at, is called too: hooks fire,
    graphs show the modules. A gate attached to the norm (:func:`ecanet.insert_gates_`) counts as ``gate``. Under
    :func:`torch.compile` the kernels of ECA are an operation of the graph; for other gates, and where no kernels are,
    the same formulas in plain PyTorch let Inductor fuse them. :func:`conv_norm_gate_add_act` takes the convolution
    before the norm along. :func:`explain` says who computes some arguments, and why.

    Args:
        x: ``(N, C, *spatial)`` with 0 to 3 spatial dimensions.
        norm: The norm, or None.
        gate: The gate, or None.
        residual: The shape and type of ``x``, or what can be added to it, or None.
        act: ``"relu"``, ``"relu6"``, ``"silu"``, ``"hardswish"``, an activation module, or None for none.

    Returns:
        The shape, type and memory format of ``x``; where ``residual`` has another shape or type, those of the sum.

    Raises:
        TypeError: ``x`` is not floating point, or ``norm``, ``gate`` or ``act`` is no module.
        ValueError: unknown ``act``, or what the modules raise: wrong number of channels, a batch of one value.
        RuntimeError: the backend asked for by :func:`ecanet.backend` cannot run.

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
    return follow(plan(x, norm, gate, residual, act), x, norm, gate, residual, act)


def conv_norm_gate_add_act(
    x: Tensor,
    conv: nn.Module,
    norm: nn.Module | None = None,
    gate: nn.Module | None = None,
    residual: Tensor | None = None,
    act: str | nn.Module | None = None,
) -> Tensor:
    """``norm_gate_add_act(conv(x), norm, gate, residual, act)``, with a squeeze that need not read ``conv(x)``.

    The same values, to rounding. Where :func:`torch.compile` gets formulas for inference, the means that the gate wants
    of a 1 x 1 convolution's output are found from its input (:mod:`ecanet.nn.tail.pointwise`): norm, gate, addition and
    activation then take the one pass over ``conv(x)`` that norm, addition and activation take.

    Args:
        x: ``(N, C_in, *spatial)``, what the convolution is called on.
        conv: The convolution, or any module that makes a map ``(N, C, *spatial)`` of x.
        norm: The norm of C channels, or None.
        gate: The gate of C channels, or None.
        residual: The shape and type of ``conv(x)``, or what can be added to it, or None.
        act: As :func:`norm_gate_add_act` takes it.

    Returns:
        The shape, type and memory format of ``conv(x)``; where ``residual`` has others, those of the sum.

    Raises:
        TypeError: As :func:`norm_gate_add_act`; and ``conv`` is no module.
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
    asks = attached_gate(norm) if gate is None and norm is not None else gate
    means = None if asks is None else means_after(conv, x, asks)  # before the convolution: next to what writes x
    y = conv(x)
    check_arguments(y, norm, gate, act)
    return follow(plan(y, norm, gate, residual, act, means is not None), y, norm, gate, residual, act, means)


def follow(
    made: Plan,
    x: Tensor,
    norm: nn.Module | None,
    gate: nn.Module | None,
    residual: Tensor | None,
    act: str | nn.Module | None,
    map_means: Tensor | None = None,
) -> Tensor:
    """Compute what a plan was made for.

    Args:
        made: By :func:`ecanet.nn.tail.plan.plan`, of the same arguments.
        x: As :func:`norm_gate_add_act` takes it.
        norm: As above.
        gate: As above.
        residual: As above.
        act: As above.
        map_means: ``(N, C)`` of x, where a compiler has found them already.
    """
    if made.who == "modules":
        return _call_all(x, norm, gate, residual, act)
    inside = residual if made.adds else None
    code = 0 if made.act is None else made.act
    if made.who == "kernels":
        y = x
        if made.calls_norm or made.calls_gate:
            y = _call_some(made, x, norm, gate)
            if not same_kind(y, x):  # the plan was made for maps like x
                return _call_all(y, None, None if made.calls_gate else gate, residual, act)
        of_norm = None if made.calls_gate else made.norm  # then it is in y already
        y = eager.norm_gate_add_act(made.backend, y, of_norm, made.gate, inside, code)
    else:
        assert made.gate is not None
        if made.who == "operation":
            assert made.norm is not None
            y = compiled.operation(x, made.norm, made.gate, inside, code)
        else:
            y = compiled.formula(x, made.norm, made.gate, inside, code, map_means)
    y = y if residual is None or made.adds else y + residual
    return y if made.act is not None else _activate(y, act)


def _call_some(made: Plan, x: Tensor, norm: nn.Module | None, gate: nn.Module | None) -> Tensor:
    """What comes before the first thing that the kernels take over again: the norm, and the gate where it is called."""
    if made.calls_norm:
        assert norm is not None
        x = call_norm(norm, x)
    elif made.norm is not None:  # and the gate is called
        x = eager.norm_gate_add_act(made.backend, x, made.norm, None, None, 0)
    if not made.calls_gate:
        return x
    assert gate is not None
    return gate(x)


def _call_all(
    x: Tensor, norm: nn.Module | None, gate: nn.Module | None, residual: Tensor | None, act: str | nn.Module | None
) -> Tensor:
    """The modules one after another."""
    if norm is not None:
        x = call_norm(norm, x)
    if gate is not None:
        x = gate(x)
    if residual is not None:
        x = x + residual
    return _activate(x, act)


def _activate(y: Tensor, act: str | nn.Module | None) -> Tensor:
    return act(y) if isinstance(act, nn.Module) else reference.activate(y, reference.ACTS.index(act))
