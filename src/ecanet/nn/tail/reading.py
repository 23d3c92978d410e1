"""Reads from the modules what a norm, a gate and an activation compute; or says why a module has to be called."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torchvision.ops import FrozenBatchNorm2d

from ecanet.nn.gate import Gate
from ecanet.nn.hooks import called_differently, is_identity, why_called
from ecanet.nn.tail.maths import GateMaths, NormMaths
from ecanet.nn.tail.statistics import process_group
from ecanet.ops import reference
from ecanet.ops.backend import PLAIN_TENSORS
from ecanet.private_torch import BatchNormBase, FakeTensor, FunctionalTensor, check_rank

#: The modules of the activations, in the order of reference.ACTS.
_ACT_MODULES: tuple[type[nn.Module], ...] = (nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
#: Saved at import, because user code may replace it later.
_FORWARD_OF_GATES = Gate.forward


def check_arguments(x: object, norm: object, gate: object, act: object) -> None:
    """Raise if an argument is not a map, a module or an activation.

    Raises:
        TypeError: ``x`` is not floating point, or ``norm``, ``gate`` or ``act`` is not a module.
        ValueError: unknown ``act``.
    """
    if isinstance(x, Tensor) and not x.is_floating_point():  # torch.fx passes proxies
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
        type(t) in PLAIN_TENSORS
        and t.layout is torch.strided
        and (t.shape, t.dtype, t.device) == (x.shape, x.dtype, x.device)
    )


def read_gate(gate: nn.Module, x: Tensor) -> GateMaths | str:
    """What the kernels need of the gate, or why it has to be called."""
    if not isinstance(gate, Gate):
        return f"is {_name(gate)}, not a Gate of this library"
    if gate.sees_map:
        return "needs more of the map than means and variances"
    if type(gate).forward is not _FORWARD_OF_GATES:
        return f"is {_name(gate)}, whose forward is not that of a Gate"
    if (why := why_called(gate)) is not None:
        return why
    if gate.channels != x.shape[1]:
        return f"has {gate.channels} channels, and x has {x.shape[1]}"
    maths = gate.maths()
    return "has changed layers or methods, which autograd has to go through" if maths is None else maths


def read_norm(norm: nn.Module, x: Tensor, known_hooks: int = 0) -> NormMaths | str:
    """What the kernels need of the norm, or why it has to be called.

    Args:
        norm: Any module.
        x: Its input.
        known_hooks: Number of forward hooks on the norm that the caller already accounts for.

    Raises:
        ValueError: the norm's own error, for a map of a rank that it does not take.
    """
    if (why := why_called(norm, known_hooks)) is not None:
        return why
    if type(norm) is FrozenBatchNorm2d:
        return _read_frozen(norm, x)
    if type(norm) not in _BATCH_NORMS and (why := _why_no_batch_norm(norm)) is not None:
        return why
    batch_norm: Any = norm
    if not check_rank(batch_norm, x):
        return "has no check of the rank of its input"
    channels = x.shape[1]
    if batch_norm.num_features != channels:
        return f"has {batch_norm.num_features} channels, and x has {channels}"
    parameters, buffers = batch_norm._parameters, batch_norm._buffers  # faster than access to attributes of a module
    weight, bias = (
        (parameters["weight"], parameters["bias"])
        if "weight" in parameters and "bias" in parameters
        else (batch_norm.weight, batch_norm.bias)
    )
    mean, var = buffers.get("running_mean"), buffers.get("running_var")
    if (why := _why_unfit((weight, bias, mean, var), x)) is not None:
        return why
    if (mean is None) != (var is None) or _counts_without_counter(batch_norm):
        return "lacks a running statistic"
    if not batch_norm.eps > 0:
        return f"has an eps of {batch_norm.eps}, which torch may refuse"
    if mean is not None and not batch_norm.training:
        return NormMaths(norm, mean, var, weight, bias, batch_norm.eps)
    group = process_group(norm)
    if group is None and x.numel() == channels:
        return "refuses a single value per channel"
    return NormMaths(norm, None, None, weight, bias, batch_norm.eps, group)


def _name(module: nn.Module) -> str:
    name = type(module).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _why_unfit(tensors: tuple[Tensor | None, ...], x: Tensor) -> str | None:
    """Why the kernels cannot take weight, bias, mean and variance of a norm beside x; None if they can."""
    size, dtype, device = (x.shape[1],), x.dtype, x.device
    for t in tensors:
        if t is None:
            continue
        if type(t) not in PLAIN_TENSORS and not isinstance(t, (FakeTensor, FunctionalTensor)):
            return f"has a {type(t).__name__}, which sees every operation"
        if t.dtype != dtype and t.dtype != reference.accumulation_dtype(dtype):
            return f"has tensors of other types than {dtype}"
        if t.shape != size or t.device != device:
            return f"has a tensor of shape {tuple(t.shape)} on {t.device}, not ({size[0]},) on {device}"
    return None


def _why_no_batch_norm(norm: nn.Module) -> str | None:
    """Why a norm is not computed as torch's BatchNorm is; None if it is, as timm's without an activation."""
    if not isinstance(norm, BatchNormBase):
        return f"is {_name(norm)}, not a BatchNorm of torch"
    if is_parametrized(norm):
        return "is parametrized: its weight or bias is computed from other tensors"
    cls = type(norm)
    if cls.__qualname__ != "BatchNormAct2d" or not cls.__module__.startswith("timm."):
        return f"is {_name(norm)}, which may compute something other than torch's BatchNorm"
    forward: Any = cls.forward
    if (forward.__module__, forward.__qualname__) != (cls.__module__, "BatchNormAct2d.forward"):
        return f"is a {cls.__name__}, whose forward was replaced"
    inside = [name for name in ("drop", "act") if not is_identity(norm._modules.get(name))]
    return f"is {_name(norm)} with {' and '.join(inside)} inside" if inside else None


def _read_frozen(norm: FrozenBatchNorm2d, x: Tensor) -> NormMaths | str:
    tensors: tuple[Any, ...] = norm.running_mean, norm.running_var, norm.weight, norm.bias
    mean, var, weight, bias = tensors
    if x.dim() != 4 or mean is None:
        return "does not fit x"
    if any(t is not None and t.dtype != x.dtype for t in tensors):
        return f"has {mean.dtype} tensors and returns the larger of two types"
    if (why := _why_unfit(tensors, x)) is not None:
        return why
    return NormMaths(norm, mean, var, weight, bias, norm.eps)


def _counts_without_counter(norm: Any) -> bool:
    """Whether torch would fail to count the batches, because ``num_batches_tracked`` was removed."""
    if type(norm) is not nn.SyncBatchNorm:
        return False
    return norm.track_running_stats and norm._buffers.get("num_batches_tracked") is None
