"""The end of a residual branch: norm, gate, addition of the residual, activation."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from ecanet.nn import fused
from ecanet.nn.gate import Gate
from ecanet.nn.hung import hung_gate
from ecanet.nn.pointwise import means_after
from ecanet.nn.sync import process_group
from ecanet.ops import reference

#: In the order of reference.ACTS.
_ACT_MODULES: tuple[type[nn.Module], ...] = (nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


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
    graphs show the modules. A gate that hangs on the norm (:func:`ecanet.insert_gates_`) counts as ``gate``. Under
    :func:`torch.compile` the kernels of ECA are an operation of the graph; for other gates, and where no kernels are,
    the same formulas in plain PyTorch let Inductor fuse them. :func:`conv_norm_gate_add_act` takes the convolution
    before the norm along.

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
        >>> from ecanet.nn import ECA
        >>> x, norm, eca = torch.randn(8, 64, 7, 7), nn.BatchNorm2d(64), ECA(64)
        >>> out = norm_gate_add_act(x, norm, eca, residual=x, act="relu")
        >>> torch.allclose(out, torch.relu(eca(norm(x)) + x), atol=1e-5)
        True
    """
    return _tail(x, norm, gate, residual, act)


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
    of a 1 x 1 convolution's output are found from its input (:mod:`ecanet.nn.pointwise`): norm, gate, addition and
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
        >>> from ecanet.nn import ECA
        >>> conv, norm, eca = nn.Conv2d(16, 64, 1), nn.BatchNorm2d(64).eval(), ECA(64)
        >>> x = torch.randn(8, 16, 7, 7)
        >>> out = conv_norm_gate_add_act(x, conv, norm, eca, act="relu")
        >>> torch.allclose(out, torch.relu(eca(norm(conv(x)))), atol=1e-5)
        True
    """
    if not isinstance(conv, nn.Module):
        raise TypeError(f"conv must be a module, got {type(conv).__name__}")
    asks = hung_gate(norm) if gate is None and norm is not None else gate
    means = None if asks is None else means_after(conv, x, asks)  # before the convolution: next to what writes x
    return _tail(conv(x), norm, gate, residual, act, means)


def _tail(
    x: Tensor,
    norm: nn.Module | None,
    gate: nn.Module | None,
    residual: Tensor | None,
    act: str | nn.Module | None,
    means: Tensor | None = None,
) -> Tensor:
    """:func:`norm_gate_add_act`; ``means`` are the channel means of x, where a compiler has found them already."""
    _check(x, norm, gate, act)
    if not fused.kernels_run(x):
        return _without_kernels(x, norm, gate, residual, act, means)
    # What the kernels cannot take over is called, and the rest starts from there.
    if isinstance(act, nn.Module) and act_code(act) is None:
        return act(_tail(x, norm, gate, residual, None))
    if residual is not None and not same_kind(residual, x):
        return _activate(_tail(x, norm, gate, None, None) + residual, act)
    norm_maths, gate_maths = _maths(norm, gate, x)
    if gate is not None and gate_maths is None:
        return norm_gate_add_act(gate(norm_gate_add_act(x, norm)), None, None, residual, act)
    if norm is not None and norm_maths is None:
        return norm_gate_add_act(_call_norm(norm, x), None, gate, residual, act)
    code = act_code(act)
    assert code is not None
    if norm is None and gate is None and residual is None and code == 0:
        return x
    return fused.tail(x, norm_maths, gate_maths, residual, code)


def _check(x: object, norm: object, gate: object, act: object) -> None:
    if isinstance(x, Tensor) and not x.is_floating_point():  # torch.fx comes with something else
        raise TypeError(f"x must be floating point, got {x.dtype}: convert it first, e.g. x.float()")
    for name, module in (("norm", norm), ("gate", gate)):
        if module is not None and not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be a module or None, got {type(module).__name__}")
    if isinstance(act, str):
        if act not in reference.ACTS:
            names = [name for name in reference.ACTS if name is not None]
            raise ValueError(f"act must be one of {names}, an activation module or None, got {act!r}")
    elif act is not None and not isinstance(act, nn.Module):
        raise TypeError(f"act must be a name, an activation module or None, got {type(act).__name__}")


def act_code(act: str | nn.Module | None) -> int | None:
    """Index in ``reference.ACTS``, or None for a module to be called."""
    if not isinstance(act, nn.Module):
        return reference.ACTS.index(act)
    return _ACT_MODULES.index(type(act)) if type(act) in _ACT_MODULES and not fused.called_differently(act) else None


def _activate(y: Tensor, act: str | nn.Module | None) -> Tensor:
    return act(y) if isinstance(act, nn.Module) else reference.activate(y, reference.ACTS.index(act))


def same_kind(residual: Tensor, x: Tensor) -> bool:
    """Whether the kernels can add the residual to x: same shape, type and device."""
    return type(residual) is Tensor and (residual.shape, residual.dtype, residual.device) == (
        x.shape,
        x.dtype,
        x.device,
    )


def maths_of_gate(gate: nn.Module | None, x: Tensor) -> fused.GateMaths | None:
    """What the kernels need of the gate, or None for one to be called."""
    if not isinstance(gate, Gate) or type(gate).forward is not Gate.forward or fused.called_differently(gate):
        return None
    return gate.maths() if gate.channels == x.shape[1] else None  # None, too, for one that autograd has to go through


def _maths(
    norm: nn.Module | None, gate: nn.Module | None, x: Tensor
) -> tuple[fused.Norm | None, fused.GateMaths | None]:
    """What the kernels need of both; of a gate that hangs on the norm, if the kernels can take the two."""
    if gate is not None or norm is None or (hung := hung_gate(norm)) is None:
        return maths_of_norm(norm, x), maths_of_gate(gate, x)
    gate_maths = maths_of_gate(hung, x)
    norm_maths = None if gate_maths is None else maths_of_norm(norm, x, known_hooks=1)
    return norm_maths, None if norm_maths is None else gate_maths


def maths_of_norm(norm: nn.Module | None, x: Tensor, known_hooks: int = 0) -> fused.Norm | None:
    """What the kernels need of the norm, or None for one to be called."""
    if norm is None or fused.called_differently(norm, known_hooks):
        return None
    if type(norm) is FrozenBatchNorm2d:
        given = _given_statistics(norm)
        fits = given.mean is not None and given.mean.numel() == x.shape[1] and given.mean.dtype == x.dtype
        return given if x.dim() == 4 and fits else None  # it returns the larger of two types
    if not isinstance(norm, _BatchNorm) or not (type(norm) in _BATCH_NORMS or _is_plain_of_timm(norm)):
        return None
    norm._check_input_dim(x)
    if norm.num_features != x.shape[1] or not _types_go_together(norm, x):
        return None
    buffers = norm._buffers
    if (buffers.get("running_mean") is None) != (buffers.get("running_var") is None) or (
        buffers.get("num_batches_tracked") is None and norm.track_running_stats and type(norm) is nn.SyncBatchNorm
    ):
        return None  # torch says what it makes of some without the others
    if not norm.training and buffers.get("running_mean") is not None:
        return _given_statistics(norm)
    group = process_group(norm)
    if group is None and x.numel() == x.shape[1]:  # torch says what is wrong with one value a channel
        return None
    return fused.Norm(norm, None, None, norm.weight, norm.bias, norm.eps, group)


def _is_plain_of_timm(norm: nn.Module) -> bool:
    """Whether it is timm's BatchNorm with room for an activation, and has none."""
    if type(norm).__qualname__ != "BatchNormAct2d" or not type(norm).__module__.startswith("timm."):
        return False
    return all(fused.is_identity(norm._modules.get(name)) for name in ("drop", "act"))


def _types_go_together(norm: Any, x: Tensor) -> bool:
    """Whether torch, too, takes a norm of that type for x; the norm itself says what is wrong."""
    types = (x.dtype, reference.accumulation_dtype(x.dtype))
    buffers = norm._buffers  # a look-up in which takes a part of an attribute's time
    tensors = (norm.weight, norm.bias, buffers.get("running_mean"), buffers.get("running_var"))
    return all(t is None or t.dtype in types for t in tensors)


def _given_statistics(norm: Any) -> fused.Norm:
    return fused.Norm(norm, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def _call_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)``, hooks and all.

    Torch's SyncBatchNorm takes no map on a CPU, and sends an empty batch of a half type in another type than its peers
    send theirs: there its ``forward`` is ours, with the same collectives.
    """
    if (
        isinstance(norm, nn.SyncBatchNorm)
        and type(norm).forward is nn.SyncBatchNorm.forward  # a subclass may be a parametrised one
        and "forward" not in vars(norm)
        and isinstance(x, Tensor)  # torch.fx has others
    ):
        ours = x.is_cpu or (not torch.compiler.is_compiling() and x.numel() == 0)
        if ours and fused.is_plain(x) and (group := process_group(norm)) is not None:
            return _call_shared(norm, x, group)
    return norm(x)


def _call_shared(norm: nn.SyncBatchNorm, x: Tensor, group: Any) -> Tensor:
    def forward(x: Tensor) -> Tensor:
        norm._check_input_dim(x)
        norm._check_non_zero_input_channels(x)
        if norm.num_features != x.shape[1]:
            raise ValueError(f"x must have the {norm.num_features} channels of its norm, got shape {tuple(x.shape)}")
        return fused.shared_norm(x, fused.Norm(norm, None, None, norm.weight, norm.bias, norm.eps, group))

    vars(norm)["forward"] = forward  # so that the call runs every hook, which see the module itself
    try:
        return norm(x)
    finally:
        del vars(norm)["forward"]


def _without_kernels(
    x: Tensor,
    norm: nn.Module | None,
    gate: nn.Module | None,
    residual: Tensor | None,
    act: str | nn.Module | None,
    means: Tensor | None = None,
) -> Tensor:
    if torch.compiler.is_compiling() and not isinstance(norm, nn.SyncBatchNorm):
        norm_maths, gate_maths = _maths(norm, gate, x)
        if gate_maths is not None and (norm is None or norm_maths is not None):
            # A residual of another kind, and an activation that is a module of one's own, come afterwards.
            inside = residual if residual is None or same_kind(residual, x) else None
            code = act_code(act) if inside is residual else None
            y = None if norm_maths is None else fused.in_graph(x, norm_maths, gate_maths, inside, code or 0)
            if y is None and norm_maths is not None and norm_maths.mean is None:
                y, code = fused.formula(x, norm_maths, gate_maths, inside), None
            elif y is None and (means is not None or (x.is_cuda and not fused.is_exporting())):
                means = reference.squeeze(x, x.shape[1]) if means is None else means
                y = fused.formula_given_means(x, norm_maths, gate_maths, inside, code or 0, means)
            if y is not None:
                y = y + residual if residual is not None and inside is None else y
                return y if code is not None else _activate(y, act)
    if norm is not None:
        x = _call_norm(norm, x)
    if gate is not None:
        x = gate(x)
    if residual is not None:
        x = x + residual
    return _activate(x, act)
