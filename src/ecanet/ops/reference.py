"""Every operation of a channel-attention module in plain PyTorch.

Shapes: ``x`` is a feature map ``(N, C, *spatial)`` with 0 to 3 spatial dimensions, ``s`` holds its channel means
``(N, C)``, a gate is ``(N, C)`` too. The maths on ``(N, C)`` runs in float32 for float16 and bfloat16 and in the
input's own type otherwise, and autocast does not reach it: it costs nothing, and a gate rounded early is wrong for
the whole map.

The functions are opaque to :mod:`torch.fx` (torchvision's feature extraction traces with it), because they check
their arguments. Call them as ``reference.squeeze(x, channels)``: fx finds them by the name in this module.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_SPATIAL_DIMS = 3


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which means and gates are computed: float64 for float64, float32 for everything smaller."""
    return torch.promote_types(dtype, torch.float32)


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    # Not torch.amp.is_autocast_available: torch.compile of torch 2.10 cannot trace it.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


@torch.fx.wrap
def squeeze(x: Tensor, channels: int) -> Tensor:
    """Channel means: global average pooling over every spatial position.

    Args:
        x: Feature map ``(N, C, *spatial)``, 0 to 3 spatial dimensions, floating point; N may be 0.
        channels: The C that the caller expects.

    Returns:
        ``(N, C)``, float32 for half types, otherwise in the type of ``x``.

    Raises:
        TypeError: ``x`` is not a real floating-point tensor.
        ValueError: wrong rank, wrong C, or no spatial position to average over.

    Example:
        >>> squeeze(torch.tensor([[[1.0, 3.0], [2.0, 2.0]]]), channels=2)
        tensor([[2., 2.]])
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor of shape (N, {channels}, *spatial), got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}: convert it first, e.g. x.float()")
    if not 2 <= x.dim() <= 2 + _MAX_SPATIAL_DIMS:
        raise ValueError(
            f"x must have shape (N, {channels}, *spatial) with 0 to {_MAX_SPATIAL_DIMS} spatial dimensions, "
            f"got {tuple(x.shape)}: {'a single sample needs x.unsqueeze(0)' if x.dim() < 2 else 'flatten some of them'}"
        )
    if x.shape[1] != channels:
        raise ValueError(
            f"x has {x.shape[1]} channels in dimension 1, shape {tuple(x.shape)}, but the gate was built for "
            f"{channels}: build it with channels={x.shape[1]}, or permute x to (N, C, *spatial)"
        )
    if 0 in x.shape[2:]:
        raise ValueError(
            f"x has no spatial position to average over, shape {tuple(x.shape)}: every spatial size must be 1 or more"
        )
    dtype = accumulation_dtype(x.dtype)
    return x.to(dtype) if x.dim() == 2 else x.mean(dim=tuple(range(2, x.dim())), dtype=dtype)


@torch.fx.wrap
def scale(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply every channel's map by its gate.

    Args:
        x: Feature map ``(N, C, *spatial)``.
        gate: ``(N, C)``, rounded to the type of ``x`` before the product.

    Returns:
        The shape, type, device and memory format of ``x``.

    Example:
        >>> scale(torch.ones(1, 2, 3), torch.tensor([[0.5, 2.0]]))
        tensor([[[0.5000, 0.5000, 0.5000],
                 [2.0000, 2.0000, 2.0000]]])
    """
    return x * gate.to(x.dtype).reshape(*gate.shape, *(1 for _ in range(x.dim() - 2)))


@torch.fx.wrap
def check_means(s: Tensor, channels: int) -> Tensor:
    """Return channel means in the type gates are computed in, after checking them.

    Args:
        s: ``(N, C)``, floating point; N may be 0.
        channels: The C that the caller expects.

    Raises:
        TypeError: ``s`` is not a real floating-point tensor.
        ValueError: ``s`` is not ``(N, channels)``.
    """
    if not isinstance(s, Tensor) or not s.is_floating_point():
        got = s.dtype if isinstance(s, Tensor) else type(s).__name__
        raise TypeError(f"s must be a floating-point tensor of channel means (N, {channels}), got {got}")
    if s.dim() != 2 or s.shape[1] != channels:
        raise ValueError(
            f"s must hold channel means of shape (N, {channels}), got {tuple(s.shape)}: "
            "call the module itself on a feature map"
        )
    return s.to(accumulation_dtype(s.dtype))


@torch.fx.wrap
def band(s: Tensor, weight: Tensor, circular: bool = False) -> Tensor:
    """ECA's shared band matrix times the channel means: a 1-D convolution over the channels (Eq. 8, centred).

    Written as products of windows, since a cuDNN convolution may round float32 to TF32.

    ``out[n, i] = sum_j weight[j] * s[n, i + j - (k - 1) / 2]``, with s = 0 outside the channels, or wrapped around.

    Args:
        s: Channel means ``(N, C)``.
        weight: ``(1, 1, k)``, k odd: the layout of ``torch.nn.Conv1d(1, 1, k)``.
        circular: Wrap around at both ends instead of padding with zeros.

    Returns:
        ``(N, C)``.
    """
    return band_non_shared(s, weight.reshape(1, -1), circular)


@torch.fx.wrap
def band_non_shared(s: Tensor, weight: Tensor, circular: bool = False) -> Tensor:
    """ECA-NS's band matrix, k weights of its own for every channel, times the channel means (Eq. 6, 7, centred).

    ``out[n, i] = sum_j weight[i, j] * s[n, i + j - (k - 1) / 2]``.

    Args:
        s: Channel means ``(N, C)``.
        weight: ``(C, k)``, k odd; ``(1, k)`` is shared by all channels.
        circular: Wrap around at both ends instead of padding with zeros.

    Returns:
        ``(N, C)``.
    """
    windows = _pad(s, weight.shape[-1], circular).unfold(1, weight.shape[-1], 1)  # (N, C, k)
    return (windows * weight.to(s.dtype)).sum(-1)


def _pad(s: Tensor, kernel_size: int, circular: bool) -> Tensor:
    margin = (kernel_size - 1) // 2
    if circular and margin:
        return torch.cat([s[:, -margin:], s, s[:, :margin]], dim=1)
    return F.pad(s, (margin, margin))


@torch.fx.wrap
def grouped_linear(s: Tensor, weight: Tensor) -> Tensor:
    """A block-diagonal matrix times the channel means (Eq. 5); one block is a full matrix (Eq. 4).

    Args:
        s: Channel means ``(N, C)``.
        weight: ``(G, D, C / G)``: G blocks, each maps C / G means to D values.

    Returns:
        ``(N, G * D)``.
    """
    groups, out, inside = weight.shape
    with _no_autocast(s.device.type):
        blocks = torch.einsum("ngi,goi->ngo", s.reshape(-1, groups, inside), weight.to(s.dtype))
    return blocks.reshape(-1, groups * out)
