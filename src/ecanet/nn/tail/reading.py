"""What the tail knows of a norm, a gate and an activation is read off the modules; or why one has to be called."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from ecanet.nn.gate import Gate
from ecanet.nn.hooks import called_differently, is_identity
from ecanet.nn.tail.maths import GateMaths, NormMaths
from ecanet.nn.tail.statistics import process_group
from ecanet.ops import reference
from ecanet.private_torch import BatchNormBase, check_rank

#: In the order of reference.ACTS.
_ACT_MODULES: tuple[type[nn.Module], ...] = (nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def check_arguments(x: object, norm: object, gate: object, act: object) -> None:
    """Refuse what is no map, module or activation.

    Raises:
        TypeError: ``x`` is not floating point, or ``norm``, ``gate`` or ``act`` is no module.
        ValueError: unknown ``act``.
    """
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


def read_act(act: str | nn.Module | None) -> int | None:
    """Index in ``reference.ACTS``, or None for a module to be called."""
    if not isinstance(act, nn.Module):
        return reference.ACTS.index(act)
    return _ACT_MODULES.index(type(act)) if type(act) in _ACT_MODULES and not called_differently(act) else None


def same_kind(t: Tensor, x: Tensor) -> bool:
    """Whether the kernels can take t beside x, or in its place: same shape, type and device."""
    return (
        type(t) is Tensor and t.layout is torch.strided and (t.shape, t.dtype, t.device) == (x.shape, x.dtype, x.device)
    )


def read_gate(gate: nn.Module, x: Tensor) -> GateMaths | str:
    """What the kernels need of the gate, or why it has to be called."""
    if isinstance(gate, Gate) and gate.sees_map:
        return "needs more of the map than means and variances"
    if not isinstance(gate, Gate) or type(gate).forward is not Gate.forward:
        return "is no Gate of this library, or has a forward of its own"
    if called_differently(gate):
        return "has a hook"
    if gate.channels != x.shape[1]:
        return f"has {gate.channels} channels and x {x.shape[1]}"
    maths = gate.maths()
    return "is changed inside, so that autograd has to go through it" if maths is None else maths


def read_norm(norm: nn.Module, x: Tensor, known_hooks: int = 0) -> NormMaths | str:
    """What the kernels need of the norm, or why it has to be called.

    Args:
        norm: Any module.
        x: What it is called on.
        known_hooks: So many forward hooks on it are known and accounted for.

    Raises:
        ValueError: as the norm itself, for a map of another rank than it takes.
    """
    if called_differently(norm, known_hooks):
        return "has a hook"
    if type(norm) is FrozenBatchNorm2d:
        return _read_frozen(norm, x)
    if not isinstance(norm, BatchNormBase) or not (type(norm) in _BATCH_NORMS or _is_plain_of_timm(norm)):
        return "is no BatchNorm of torch"
    if not check_rank(norm, x):
        return "cannot be asked which ranks it takes"
    if norm.num_features != x.shape[1]:
        return f"has {norm.num_features} channels and x {x.shape[1]}"
    buffers = norm._buffers  # a look-up in which takes a part of an attribute's time
    mean, var = buffers.get("running_mean"), buffers.get("running_var")
    types = (x.dtype, reference.accumulation_dtype(x.dtype))
    if not all(t is None or t.dtype in types for t in (norm.weight, norm.bias, mean, var)):
        return f"has tensors of other types than {x.dtype}"
    if (mean is None) != (var is None) or _counts_without_counter(norm):
        return "lacks a running statistic"
    if not norm.training and mean is not None:
        return NormMaths(norm, mean, var, norm.weight, norm.bias, norm.eps)
    group = process_group(norm)
    if group is None and x.numel() == x.shape[1]:
        return "refuses one value a channel"
    return NormMaths(norm, None, None, norm.weight, norm.bias, norm.eps, group)


def _read_frozen(norm: FrozenBatchNorm2d, x: Tensor) -> NormMaths | str:
    mean: Any = norm.running_mean
    if x.dim() != 4 or mean is None or mean.numel() != x.shape[1]:
        return "does not fit x"
    if mean.dtype != x.dtype:
        return f"has {mean.dtype} tensors and returns the larger of two types"
    return NormMaths(norm, mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def _counts_without_counter(norm: Any) -> bool:
    """Whether torch would fail where the number of batches, taken away, is counted."""
    counter = norm._buffers.get("num_batches_tracked")
    return counter is None and norm.track_running_stats and type(norm) is nn.SyncBatchNorm


def _is_plain_of_timm(norm: nn.Module) -> bool:
    """Whether it is timm's BatchNorm with room for an activation, and has none."""
    if type(norm).__qualname__ != "BatchNormAct2d" or not type(norm).__module__.startswith("timm."):
        return False
    return all(is_identity(norm._modules.get(name)) for name in ("drop", "act"))
