"""Every operation of a channel-attention module in plain PyTorch.

Shapes: ``x`` is a feature map ``(N, C, *spatial)`` with 0 to 3 spatial dimensions, ``s`` holds its channel means
``(N, C)``, and a gate is ``(N, C)`` too. The maths on ``(N, C)`` runs in float32 for float16 and bfloat16 and in the
input's own type otherwise. It runs outside autocast: precision costs nothing here, and a gate rounded early makes the
whole map wrong.

The functions are opaque to :mod:`torch.fx` (which torchvision's feature extraction uses), because they check their
arguments. Call them as ``reference.squeeze(x, channels)``: fx finds them by their name in this module.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_SPATIAL_DIMS = 3


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which means and gates are computed: float64 for float64, otherwise float32."""
    return torch.promote_types(dtype, torch.float32)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context without autocast, so that the maths on ``(N, C)`` keeps its type."""
    # Not torch.amp.is_autocast_available: torch.compile of torch 2.10 cannot trace it.
    if not isinstance(device_type, str) or device_type == "meta":  # while torch.fx traces, it is not a string
        return nullcontext()
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device_type):
        return nullcontext()  # entering a context takes as long as a small map
    return torch.autocast(device_type, enabled=False)


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
    x = check_map(x, channels)
    dtype = accumulation_dtype(x.dtype)
    return x.to(dtype) if x.dim() == 2 else x.mean(dim=tuple(range(2, x.dim())), dtype=dtype)


@torch.fx.wrap
def check_map(x: Tensor, channels: int) -> Tensor:
    """Check a feature map and return it.

    Args:
        x: As :func:`squeeze` takes it.
        channels: The C that the caller expects.

    Raises:
        TypeError, ValueError: as :func:`squeeze`.
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
    return x


@torch.fx.wrap
def variances(x: Tensor) -> Tensor:
    """Biased variance of every channel over the positions of a map.

    Args:
        x: Feature map ``(N, C, *spatial)``, floating point; N may be 0.

    Returns:
        ``(N, C)``, float32 for half types, otherwise in the type of ``x``; 0 for a map of one position.
    """
    x = x.to(accumulation_dtype(x.dtype))
    if x.dim() == 2:
        return x - x  # NaN and Inf give NaN
    return x.var(_spatial(x), correction=0) if x.shape[0] > 0 else x.sum(_spatial(x))


@torch.fx.wrap
def unbiased(variances: Tensor, positions: int) -> Tensor:
    """Biased variances over ``positions`` positions, with Bessel's correction; those of one position stay 0."""
    return variances * (positions / _degrees_of_freedom(positions))


def _degrees_of_freedom(positions: int) -> int:
    """``positions - 1``, but at least 1."""
    others = positions - 1  # while torch.jit traces, a tensor
    return others.clamp(min=1) if isinstance(others, Tensor) else max(others, 1)


@torch.fx.wrap
def root(squares: Tensor) -> Tensor:
    """The square root, with a slope of 0 at 0, as torch's norm has at zeros."""
    if not squares.requires_grad:
        return squares.sqrt()
    nonzero = squares != 0  # NaN stays NaN
    return squares.where(nonzero, 1).sqrt().where(nonzero, 0)


@torch.fx.wrap
def positions(x: Tensor) -> int:
    """The number of positions of a map ``(N, C, *spatial)``; 1 without spatial dimensions."""
    return math.prod(x.shape[2:])  # while torch.jit traces, these are tensors, and an ONNX file may take other sizes


@torch.fx.wrap
def scale(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply every channel's map by its gate.

    Args:
        x: Feature map ``(N, C, *spatial)``.
        gate: ``(N, C)``, rounded to the type of ``x`` before the product.

    Returns:
        The shape, type, device and memory format of ``x``.
    """
    return x * gate.to(x.dtype).reshape(*gate.shape, *(1 for _ in range(x.dim() - 2)))


@torch.fx.wrap
def check_means(s: Tensor, channels: int) -> Tensor:
    """Check channel means and return them in the type in which gates are computed.

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

    It is written as products of windows, because a cuDNN convolution may round float32 to TF32.

    ``out[n, i] = sum_j weight[j] * s[n, i + j - (k - 1) / 2]``, with s = 0 outside the channels, or wrapped around.

    Args:
        s: Channel means ``(N, C)``.
        weight: ``(1, 1, k)``, k odd: the layout of ``torch.nn.Conv1d(1, 1, k)``.
        circular: Wrap around at both ends instead of padding with zeros.

    Returns:
        ``(N, C)``.
    """
    if torch.jit.is_tracing():  # becomes a single Conv in an ONNX file
        margin = (weight.shape[-1] - 1) // 2
        means = pad(s, weight.shape[-1], circular) if circular else s
        kernel = weight.reshape(1, 1, -1).to(s.dtype)
        return F.conv1d(means.unsqueeze(1), kernel, padding=0 if circular else margin).squeeze(1)
    return band_non_shared(s, weight.reshape(1, -1), circular)


@torch.fx.wrap
def band_non_shared(s: Tensor, weight: Tensor, circular: bool = False) -> Tensor:
    """ECA-NS's band matrix, where every channel has its own k weights, times the channel means (Eq. 6, 7, centred).

    ``out[n, i] = sum_j weight[i, j] * s[n, i + j - (k - 1) / 2]``.

    Args:
        s: Channel means ``(N, C)``.
        weight: ``(C, k)``, k odd; ``(1, k)`` is shared by all channels.
        circular: Wrap around at both ends instead of padding with zeros.

    Returns:
        ``(N, C)``.
    """
    k = weight.shape[-1]
    padded = pad(s, k, circular)
    if torch.jit.is_tracing():  # torch.onnx.export(dynamo=False) cannot unfold maps of dynamic size
        windows = torch.stack([padded[:, j : padded.shape[1] - k + 1 + j] for j in range(k)], dim=-1)
    else:
        windows = padded.unfold(1, k, 1)  # (N, C, k)
    return (windows * weight.to(s.dtype)).sum(-1)


def pad(s: Tensor, kernel_size: int, circular: bool) -> Tensor:
    """Channel means with the ``(kernel_size - 1) / 2`` neighbours that both ends lack: zeros, or wrapped around."""
    margin = (kernel_size - 1) // 2
    if circular and margin:
        return torch.cat([s[:, -margin:], s, s[:, :margin]], dim=1)
    return F.pad(s, (margin, margin))


@torch.fx.wrap
def grouped_linear(s: Tensor, weight: Tensor) -> Tensor:
    """A block-diagonal matrix times the channel means (Eq. 5); a single block is a full matrix (Eq. 4).

    Args:
        s: Channel means ``(N, C)``.
        weight: ``(G, D, C / G)``: G blocks, each of which maps C / G means to D values.

    Returns:
        ``(N, G * D)``.
    """
    groups, out, inside = weight.shape
    with no_autocast(s.device.type):
        blocks = torch.einsum("ngi,goi->ngo", s.reshape(-1, groups, inside), weight.to(s.dtype))
    return blocks.reshape(-1, groups * out)


# Parts of the gates that see the map itself. Their results are not yet rounded to a half type.


@torch.fx.wrap
def maxima(x: Tensor) -> Tensor:
    """The largest value of every channel over the positions of a map.

    Args:
        x: Feature map ``(N, C, *spatial)``; N may be 0.

    Returns:
        ``(N, C)``, float32 for half types, otherwise in the type of ``x``.
    """
    largest = x.amax(_spatial(x)) if x.dim() > 2 else x
    return largest.to(accumulation_dtype(x.dtype))


@torch.fx.wrap
def scale_exactly(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply every channel's map by its gate, in the type of the gate.

    Args:
        x: Feature map ``(N, C, *spatial)``.
        gate: ``(N, C)``, float32 for half types.
    """
    return x.to(gate.dtype) * over_positions(gate, x)


@torch.fx.wrap
def over_channels(x: Tensor) -> Tensor:
    """Mean and largest value of every position over the channels, as a batch of 2-D maps.

    Args:
        x: Feature map ``(N, C, *spatial)``. One spatial dimension gives width 1; three are a stack of slices.

    Returns:
        ``(N, 2, *spatial)`` with 2 spatial dimensions, or ``(N D, 2, H, W)`` for maps of D slices.
    """
    both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    if x.dim() == 5:
        return both.transpose(1, 2).flatten(0, 1)
    return both.reshape(*both.shape, *(1 for _ in range(4 - x.dim())))


@torch.fx.wrap
def conv_over_positions(x: Tensor, weight: Tensor) -> Tensor:
    """A convolution of 2-D maps that keeps their size, outside autocast.

    Args:
        x: ``(N, inputs, H, W)``.
        weight: ``(outputs, inputs, k, k)``, k odd.
    """
    with no_autocast(x.device.type):
        return F.conv2d(x, weight.to(x.dtype), padding=(weight.shape[2] // 2, weight.shape[3] // 2))


@torch.fx.wrap
def scale_positions(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply every position of a map by its gate.

    Args:
        x: Feature map ``(N, C, *spatial)``.
        gate: One value per position, in the order of :func:`over_channels`.
    """
    if x.dim() == 5:
        return x * gate.reshape(x.shape[0], x.shape[2], 1, *x.shape[3:]).transpose(1, 2)
    return x * gate.reshape(x.shape[0], 1, *x.shape[2:])


@torch.fx.wrap
def simam(x: Tensor, e_lambda: float) -> Tensor:
    """SimAM: every value times the sigmoid of its squared distance from its channel's mean, relative to the variance.

    ``x * sigmoid(d / (4 (sum of d / (S - 1) + e_lambda)) + 1/2)`` with ``d = (x - mean)^2`` and S positions.

    Args:
        x: Feature map ``(N, C, *spatial)``; for one position d is 0.
        e_lambda: Added to the variance.

    Returns:
        The shape of ``x``; float32 for half types.
    """
    y = x.to(accumulation_dtype(x.dtype))
    if x.dim() == 2:
        return y * torch.sigmoid(torch.full_like(y, 0.5))
    d = (y - y.mean(_spatial(x), keepdim=True)).square()
    variance = d.sum(_spatial(x), keepdim=True) / _degrees_of_freedom(positions(x))
    return y * torch.sigmoid(d / (4 * (variance + e_lambda)) + 0.5)


# The parts of the fused tail: `out = act(scale * x + shift + residual)`, with scale and shift of shape (N, C). The
# functions below are the plain twins of the operations of the same names in ecanet.ops.

#: Activations; the operations take the index. None is the identity.
ACTS: tuple[str | None, ...] = (None, "relu", "relu6", "silu", "hardswish")
_ACT_FUNCTIONS = (lambda y: y, F.relu, F.relu6, F.silu, F.hardswish)


def activate(y: Tensor, act: int) -> Tensor:
    """The activation ``ACTS[act]``."""
    return _ACT_FUNCTIONS[act](y)


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


def over_positions(t: Tensor, x: Tensor) -> Tensor:
    """``(N, C)`` or ``(C,)``, reshaped to broadcast over the positions of ``x``, ``(N, C, *spatial)``."""
    return t.reshape(*t.shape, *(1 for _ in _spatial(x)))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of every map, and the sum of squared deviations from it.

    Args:
        x: ``(N, C, *spatial)``.

    Returns:
        ``mean`` and ``m2``, both ``(N, C)``; float32 for half types.
    """
    x = x.to(accumulation_dtype(x.dtype))
    # Not torch.var_mean: its mean of a map with an infinite value is NaN.
    means = x.mean(_spatial(x)) if x.dim() > 2 else x.clone()
    return means, variances(x) * positions(x)


@torch.fx.wrap
def apply(x: Tensor, scale: Tensor, shift: Tensor | None, residual: Tensor | None, act: int) -> Tensor:
    """``act(x * scale + shift + residual)``, computed in float32 for half types and rounded once.

    Args:
        x: ``(N, C, *spatial)``.
        scale: ``(N, C)``.
        shift: ``(N, C)``.
        residual: Shape and type of ``x``.
        act: Index in :data:`ACTS`.
    """
    y = _before_act(x, scale, shift, residual)
    return activate(y, act).to(x.dtype)


def _before_act(x: Tensor, scale: Tensor, shift: Tensor | None, residual: Tensor | None) -> Tensor:
    y = x.to(accumulation_dtype(x.dtype)) * over_positions(scale, x)
    if shift is not None:
        y = y + over_positions(shift, x)
    return y if residual is None else y + residual


def _upstream(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor | None, saved: Tensor | None, act: int) -> Tensor:
    """Gradient of the activation's input."""
    grad = grad.to(accumulation_dtype(x.dtype))
    if act == 0:
        return grad
    if ACTS[act] in ("silu", "hardswish"):  # their slope depends on the activation's input
        y = _before_act(x, scale, shift, saved)
        if ACTS[act] == "silu":
            gate = torch.sigmoid(y)
            return grad * gate * (1 + y * (1 - gate))
        slope = torch.where(y <= -3, 0, torch.where(y < 3, y / 3 + 0.5, 1))
        return torch.where(y <= -3, 0, grad * slope)
    assert saved is not None
    blocked = saved <= 0
    if ACTS[act] == "relu6":
        blocked = blocked | (saved >= 6)
    return torch.where(blocked, 0, grad)


def apply_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    center: Tensor | None,
    saved: Tensor | None,
    act: int,
    needs_d: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """First pass of the backward: d, the gradient of the activation's input, and its sums.

    Args:
        grad: Gradient of ``out``, shape and type of ``x``.
        x: ``(N, C, *spatial)``.
        scale: As in the forward; SiLU and Hardswish need it to recompute their input.
        shift: As ``scale``.
        center: ``(C,)``, or None for zeros: subtracted from x, so that large means cost no digits.
        saved: ``out`` for ReLU and ReLU6, ``residual`` for SiLU and Hardswish.
        act: Index in :data:`ACTS`.
        needs_d: Whether to return d, which is the gradient of the residual.

    Returns:
        ``d`` (of size 0 without ``needs_d``); ``p``, the sums of d over the positions; ``q``, the sums of
        d (x - center). ``p`` and ``q`` are ``(N, C)``.
    """
    d = _upstream(grad, x, scale, shift, saved, act)
    centered = x.to(d.dtype) if center is None else x.to(d.dtype) - over_positions(center, x)
    p, q = (t.flatten(2).sum(2) if x.dim() > 2 else t for t in (d, d * centered))
    return (d.to(x.dtype, copy=True) if needs_d else x.new_empty(0)), p.clone(), q


def input_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    saved: Tensor | None,
    act: int,
    offset: Tensor,
    slope: Tensor | None,
    center: Tensor | None,
) -> Tensor:
    """Second pass of the backward: the gradient of x, ``scale * d + offset + slope * (x - center)``.

    Args:
        grad: As in :func:`apply_backward`; or the d that it returns, with ``act=0``.
        x: As in :func:`apply_backward`.
        scale: As in the forward.
        shift: As in :func:`apply_backward`.
        saved: As in :func:`apply_backward`.
        act: As in :func:`apply_backward`.
        offset: ``(N, C)``.
        slope: ``(N, C)``, or ``(C,)`` if it is the same for all samples; None for zeros, for example if the norm does
            not use statistics of the batch and the gate does not use variances.
        center: ``(C,)`` or None for zeros.
    """
    d = _upstream(grad, x, scale, shift, saved, act)
    g = d * over_positions(scale, x) + over_positions(offset, x)
    if slope is not None:
        centered = x.to(d.dtype) if center is None else x.to(d.dtype) - over_positions(center, x)
        g = g + over_positions(slope, x) * centered
    return g.to(x.dtype)


def batch_moments(x: Tensor, needs_m2: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean of every map, and mean and biased variance of every channel over the batch.

    The kernels read x once and merge the :func:`moments` of the maps in float64 (Chan et al., 1979). Even a mean of
    10,000 standard deviations then costs the variance no digits.

    Args:
        x: ``(N, C, *spatial)``; mean and var of an empty batch are NaN.
        needs_m2: Whether to return the maps' own sums of squared deviations, too.

    Returns:
        ``map_means`` ``(N, C)``, ``norm_mean`` and ``norm_var`` ``(C,)``, and ``m2`` as :func:`moments` returns it, of
        size 0 x C unless ``needs_m2``; float32 for half types.
    """
    x = x.to(accumulation_dtype(x.dtype))
    map_means = x.mean(_spatial(x)) if x.dim() > 2 else x.clone()
    batch = (0, *_spatial(x))
    mean = x.mean(batch)
    m2 = moments(x)[1] if needs_m2 else x.new_empty(0, x.shape[1])
    return map_means, mean, x.var(batch, correction=0) if x.shape[0] > 0 else mean.clone(), m2
