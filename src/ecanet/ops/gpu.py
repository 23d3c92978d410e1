"""Launches the Triton kernels: the operations on a GPU, or on the CPU in Triton's interpreter.

Arguments and results are those of :mod:`ecanet.ops.reference` and :mod:`ecanet.ops.coefficients`;
:mod:`ecanet.ops.gpu_maps` says how a map is walked.
"""

import functools
import importlib
import importlib.util
import os
import shutil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecanet.ops import reference, statistics
from ecanet.ops.gpu_maps import Map, cdiv, index_type, kernels_of_triton, power_of_2, small, type_of_sums
from ecanet.ops.launch import launch
from ecanet.private_torch import FunctionalTensor, why_no_kernels

_MAX_SPLITS = 16  # largest number of splits that the statistics kernel merges itself, one after another


@functools.cache
def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU: if ``TRITON_INTERPRET=1`` is in the environment."""
    asked = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as triton parses it
    return asked and importlib.util.find_spec("triton") is not None


@functools.cache
def why_not() -> str | None:
    """None if the Triton kernels can run on this machine, otherwise one line that says why not and what to do."""
    if (reason := why_no_kernels()) is not None:
        return f"the Triton kernels are not called: {reason}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with torch for NVIDIA and AMD GPUs"
    if not torch.cuda.is_available() and not interpreting():
        return "torch sees no GPU; on the CPU they run only in Triton's interpreter, slowly: TRITON_INTERPRET=1"
    if not interpreting() and not _has_c_compiler():
        return "triton finds no C compiler, which it needs to build kernel launchers: install gcc, or set CC"
    return None


def _has_c_compiler() -> bool:
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


#: Whether the kernels can run on a tensor that is on a GPU: what :func:`why_not` checks. It is a constant, because a
#: compiler cannot trace code that reads the environment: its graph would break there.
IS_COMPLETE = (
    importlib.util.find_spec("triton") is not None
    and (interpreting() or _has_c_compiler())
    and why_no_kernels() is None
)


def _launch(kernel: str, programs: int, on: Tensor, *args: Any, **constants: Any) -> None:
    function = getattr(kernels_of_triton(), kernel)
    if isinstance(on, FunctionalTensor):  # a compiler is tracing: the launch becomes a node in its graph
        torch.library.wrap_triton(function)[(programs,)](*args, **constants)
    elif not on.is_cuda:
        function[(programs,)](*args, **constants)
    elif on.get_device() == torch.cuda.current_device():
        launch(function, programs, args, constants)
    else:
        with torch.cuda.device(on.device):
            launch(function, programs, args, constants)


def _check_act(act: int) -> None:
    if not 0 <= act < len(reference.ACTS):
        raise RuntimeError(f"ecanet: act must be 0 to {len(reference.ACTS) - 1}, got {act}")


def _partial_moments(m: Map, second: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, int, int]:
    walk = m.walk("moments" if second else "squeeze")
    mean = m.new(walk.splits, *m.nc, dtype=dtype)
    m2 = m.new(walk.splits if second else 0, *m.nc)
    _launch(
        "moments", walk.programs, m.x,
        m.x, mean, m2, m.samples, m.channels, m.positions, walk.splits, walk.per_split,
        SECOND=second, OUT=type_of_sums(dtype), **walk.constants,
    )  # fmt: skip
    return mean, m2, walk.splits, walk.per_split


def squeeze(x: Tensor) -> Tensor:
    """Mean of every map; see :func:`ecanet.ops.reference.squeeze`."""
    m = Map.of(x)
    mean, m2, splits, per_split = _partial_moments(m, False, reference.accumulation_dtype(x.dtype))
    if splits == 1:
        return mean[0]
    map_means = m.new(*m.nc)
    _merge(m, mean, m2, map_means, m2, splits, per_split, second=False)
    return map_means


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of maps; see :func:`ecanet.ops.reference.moments`."""
    m = Map.of(x)
    mean, m2, splits, per_split = _partial_moments(m, True, torch.float64)
    map_means, squares = m.new(*m.nc), m.new(*m.nc)
    _merge(m, mean, m2, map_means, squares, splits, per_split, second=True)
    return map_means, squares


def _merge(
    m: Map, mean: Tensor, m2: Tensor, mean_out: Tensor, m2_out: Tensor, splits: int, per_split: int, second: bool
) -> None:
    at_once, block = _merge_block(m.rows, splits)
    _launch(
        "merge", cdiv(m.rows, block), m.x,
        mean, m2, mean_out, m2_out, m.rows, m.positions, splits, per_split,
        SECOND=second, SPLITS=at_once, BLOCK=block, INDEX=index_type(mean.numel()),
    )  # fmt: skip


def _merge_block(rows: int, splits: int) -> tuple[int, int]:
    """How many splits and how many rows one program merges."""
    at_once = power_of_2(splits)
    return at_once, min(power_of_2(rows), max(1, 2048 // at_once), 256)


def batch_moments(x: Tensor, needs_m2: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of a batch; see :func:`ecanet.ops.reference.batch_moments`."""
    m = Map.of(x)
    mean, m2, splits, per_split = _partial_moments(m, True, torch.float64)
    if splits > _MAX_SPLITS:
        whole = torch.empty_like(mean[0]), torch.empty_like(m2[0])
        _merge(m, mean, m2, *whole, splits, per_split, second=True)
        mean, m2, splits, per_split = *whole, 1, m.positions
    map_means, batch_mean, batch_var = m.new(*m.nc), m.new(m.channels), m.new(m.channels)
    own_m2 = m.new(m.samples if needs_m2 else 0, m.channels)
    channels = min(power_of_2(m.channels), 4)  # 32 bytes, one memory transaction
    _launch(
        "statistics", cdiv(m.channels, channels), x,
        mean, m2, map_means, own_m2 if needs_m2 else None, batch_mean, batch_var, m.samples, m.channels, m.positions,
        splits, per_split, SPLITS=power_of_2(splits), SAMPLES=min(power_of_2(m.samples), 512), CHANNELS=channels,
        INDEX=index_type(mean.numel()), num_warps=8,
    )  # fmt: skip
    return map_means, batch_mean, batch_var, own_m2


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    momentum: float | Tensor,
    count: int | Tensor,
) -> None:
    """Move running statistics; see :func:`ecanet.ops.statistics.update_running`."""
    # Numbers reach a kernel as float32, which is too coarse for float64 statistics; reading a tensor would synchronise.
    if mean.dtype is not torch.float32 or isinstance(momentum, Tensor) or isinstance(count, Tensor):
        statistics.update_running(running_mean, running_var, mean, var, momentum, count)
        return
    channels = mean.numel()
    block = min(power_of_2(channels), 512)
    _launch(
        "update_running", cdiv(channels, block), mean,
        running_mean, running_var, mean, var, channels, momentum, momentum * (count / (count - 1)), BLOCK=block,
    )  # fmt: skip


def _apply(x: Tensor, scale: Tensor, shift: Tensor | None, residual: Tensor | None, act: int, over_x: bool) -> Tensor:
    m = Map.of(x)
    _check_act(act)
    read = [
        small(scale, x, m.nc, "scale"),
        m.small(shift, m.nc, "shift"),
        None if residual is None else m.ordered(residual, "residual"),
    ]
    if over_x:
        read = [_without_partial_overlap(t, m.x) for t in read]
    out = m.x if over_x else torch.empty_like(m.x)
    walk = m.walk("elements")
    _launch(
        "apply", walk.programs, x, m.x, *read, out, m.samples, m.channels, m.positions, ACT=act, **walk.constants
    )  # fmt: skip
    return out


def _without_partial_overlap(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A tensor to read while x is overwritten: the tensor itself, or a copy if it overlaps x partly. Both are dense."""
    if t is None or (t.data_ptr() == x.data_ptr() and t.nbytes == x.nbytes):
        return t
    apart = t.data_ptr() + t.nbytes <= x.data_ptr() or x.data_ptr() + x.nbytes <= t.data_ptr()
    return t if apart else t.clone()


def apply(x: Tensor, scale: Tensor, shift: Tensor | None, residual: Tensor | None, act: int) -> Tensor:
    """Scale, shift, add and activate; see :func:`ecanet.ops.reference.apply`."""
    return _apply(x, scale, shift, residual, act, over_x=False)


def apply_(x: Tensor, scale: Tensor, shift: Tensor | None, residual: Tensor | None, act: int) -> None:
    """:func:`apply`, written over ``x``."""
    out = _apply(x, scale, shift, residual, act, over_x=True)
    if out.data_ptr() != x.data_ptr() or out.stride() != x.stride():
        x.copy_(out)


def _upstream(
    m: Map, grad: Tensor, scale: Tensor, shift: Tensor | None, saved: Tensor | None, act: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    _check_act(act)
    if saved is None and reference.ACTS[act] in ("relu", "relu6"):
        raise RuntimeError("ecanet: ReLU and ReLU6 need saved=out; got None")
    saved = None if saved is None else m.ordered(saved, "saved")
    scale = small(scale, m.x, m.nc, "scale")
    return m.ordered(grad, "grad"), scale, m.small(shift, m.nc, "shift"), saved


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
    """First pass of the backward; see :func:`ecanet.ops.reference.apply_backward`."""
    m = Map.of(x)
    grad, scale, shift, saved = _upstream(m, grad, scale, shift, saved, act)
    center = m.small(center, (m.channels,), "center")
    walk = m.walk("reduce")
    splits = walk.splits
    d = torch.empty_like(m.x) if needs_d else None
    p, q = m.new(splits, *m.nc), m.new(splits, *m.nc)
    _launch(
        "reduce", walk.programs, x,
        grad, m.x, scale, shift, center, saved, d, p, q, m.samples, m.channels, m.positions, splits, walk.per_split,
        ACT=act, **walk.constants,
    )  # fmt: skip
    d = x.new_empty(0) if d is None else d
    if splits == 1:
        return d, p[0], q[0]
    p_sum, q_sum = m.new(*m.nc), m.new(*m.nc)
    at_once, block = _merge_block(m.rows, splits)
    _launch(
        "add_splits", cdiv(m.rows, block), x, p, q, p_sum, q_sum, m.rows, splits,
        SPLITS=at_once, BLOCK=block, INDEX=index_type(p.numel()),
    )  # fmt: skip
    return d, p_sum, q_sum


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
    """Second pass of the backward; see :func:`ecanet.ops.reference.input_backward`."""
    m = Map.of(x)
    grad, scale, shift, saved = _upstream(m, grad, scale, shift, saved, act)
    offset = small(offset, x, m.nc, "offset")
    per_sample = slope is not None and slope.dim() == 2
    slope, center = (
        m.small(slope, m.nc if per_sample else (m.channels,), "slope"),
        m.small(center, (m.channels,), "center"),
    )
    out = torch.empty_like(m.x)
    walk = m.walk("elements")
    _launch(
        "input_grad", walk.programs, x,
        grad, m.x, scale, shift, saved, offset, slope, center, out, m.samples, m.channels, m.positions,
        ACT=act, PER_SAMPLE=per_sample, **walk.constants,
    )  # fmt: skip
    return out


class _Norm(NamedTuple):
    norm_mean: Tensor | None
    norm_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def of(like: Tensor, channels: int, *tensors: Tensor | None) -> "_Norm":
        if (tensors[0] is None) != (tensors[1] is None):
            alone = "norm_mean" if tensors[1] is None else "norm_var"
            raise RuntimeError(f"ecanet: norm_mean and norm_var come together; got {alone} alone")
        named = zip(_Norm._fields, tensors, strict=True)
        return _Norm(*(None if t is None else small(t, like, (channels,), name) for name, t in named))


def _check_means(map_means: Tensor) -> tuple[int, int]:
    if map_means.dim() != 2:
        raise RuntimeError(f"ecanet: map_means must have shape (N, C), got {tuple(map_means.shape)}")
    return map_means.shape[0], map_means.shape[1]


def _check_kernel(kernel: Tensor | None, channels: int, circular: bool) -> tuple[Tensor | None, int]:
    if kernel is None:
        return None, 0
    k = kernel.numel()
    if k % 2 == 0 or (circular and k > channels):
        raise RuntimeError(f"ecanet: kernel must have an odd size, and at most C if circular; got {k}")
    return kernel.reshape(-1).contiguous(), k


def eca_coefficients(
    map_means: Tensor,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kernel: Tensor | None,
    circular: bool,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From means to scale and shift; see :func:`ecanet.ops.coefficients.eca_coefficients`."""
    samples, channels = _check_means(map_means)
    norm = _Norm.of(map_means, channels, norm_mean, norm_var, weight, bias)
    kernel, k = _check_kernel(kernel, channels, circular)
    dtype = reference.accumulation_dtype(map_means.dtype)
    s, scale, shift = (map_means.new_empty(samples, channels, dtype=dtype) for _ in range(3))
    gate = map_means.new_empty(samples if k else 0, channels, dtype=dtype)
    block = min(power_of_2(samples * channels), 256)
    _launch(
        "coefficients", cdiv(samples * channels, block), map_means,
        map_means.contiguous(), *norm, kernel, s, gate, scale, shift, samples, channels,
        eps=eps, factor=factor, K=k, CIRCULAR=circular, BLOCK=block,
        INDEX=index_type(map_means.numel()), ACC=type_of_sums(dtype),
    )  # fmt: skip
    return s, gate, scale, shift


def eca_coefficients_backward(
    p: Tensor,
    q: Tensor,
    map_means: Tensor,
    gate: Tensor | None,
    grad_s: Tensor | None,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kernel: Tensor | None,
    circular: bool,
    positions: int,
    factor: float = 1.0,
    m2: Tensor | None = None,
    grad_v: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Between the two passes of the backward; see :func:`ecanet.ops.coefficients.eca_coefficients_backward`."""
    samples, channels = nc = _check_means(map_means)
    norm = _Norm.of(map_means, channels, norm_mean, norm_var, weight, bias)
    kernel, k = _check_kernel(kernel, channels, circular)
    if kernel is not None and gate is None:
        raise RuntimeError("ecanet: a kernel needs its gate; got gate=None")
    p, q = small(p, map_means, nc, "p"), small(q, map_means, nc, "q")
    if grad_v is not None and m2 is None:
        raise RuntimeError("ecanet: grad_v needs m2; got m2=None")
    named = (("gate", gate), ("grad_s", grad_s), ("m2", m2), ("grad_v", grad_v))
    gate, grad_s, m2, grad_v = (None if t is None else small(t, map_means, nc, name) for name, t in named)
    dtype = reference.accumulation_dtype(map_means.dtype)

    def new(*shape: int) -> Tensor:
        return map_means.new_empty(shape, dtype=dtype)

    block, samples_at_a_time = min(power_of_2(channels), 32), min(power_of_2(samples), 8)
    blocks = cdiv(channels, block)
    groups = max(1, min(cdiv(samples, samples_at_a_time), 1024 // blocks, 64))
    per_program = cdiv(cdiv(samples, groups), samples_at_a_time) * samples_at_a_time
    groups = cdiv(samples, per_program)
    taps = max(power_of_2(k), 1)
    offset, slope = new(*nc), new(0 if grad_v is None else samples, channels)
    sum_a, sum_b, kernel_sums = new(groups, channels), new(groups, channels), new(groups * blocks, taps)
    _launch(
        "coefficients_backward", groups * blocks, map_means,
        p, q, map_means.contiguous(), gate, grad_s, m2, grad_v, *norm, kernel, offset, slope, sum_a, sum_b,
        kernel_sums, samples, channels, positions, per_program,
        eps=eps, factor=factor, K=k, CIRCULAR=circular, SAMPLES=samples_at_a_time, CHANNELS=block, TAPS=taps,
        INDEX=index_type(map_means.numel()), ACC=type_of_sums(dtype),
    )  # fmt: skip
    grad_weight, grad_bias, grad_mean, grad_var = (new(channels) for _ in range(4))
    grad_kernel = new(k)
    _launch(
        "finish", cdiv(channels, block), map_means,
        sum_a, sum_b, kernel_sums, norm.norm_var, norm.weight, grad_weight, grad_bias, grad_kernel, grad_mean, grad_var,
        channels, groups, groups * blocks,
        eps=eps, K=k, GROUPS=power_of_2(groups), CHANNELS=block, PROGRAMS=min(power_of_2(groups * blocks), 256),
        TAPS=taps, ACC=type_of_sums(dtype),
    )  # fmt: skip
    return offset, grad_weight, grad_bias, grad_kernel, grad_mean, grad_var, slope


def norm_eca_add_act(
    x: Tensor,
    residual: Tensor | None,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kernel: Tensor | None,
    circular: bool,
    act: int,
    factor: float = 1.0,
) -> Tensor:
    """Norm with given statistics, ECA, residual and activation; see :mod:`ecanet.ops.coefficients`."""
    scale, shift = _scale_and_shift(x, norm_mean, norm_var, weight, bias, eps, kernel, circular, factor)
    return apply(x, scale, shift, residual, act)


def norm_eca_add_act_(
    x: Tensor,
    residual: Tensor | None,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kernel: Tensor | None,
    circular: bool,
    act: int,
    factor: float = 1.0,
) -> None:
    """:func:`norm_eca_add_act`, written over ``x``."""
    scale, shift = _scale_and_shift(x, norm_mean, norm_var, weight, bias, eps, kernel, circular, factor)
    apply_(x, scale, shift, residual, act)


def _scale_and_shift(
    x: Tensor,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kernel: Tensor | None,
    circular: bool,
    factor: float,
) -> tuple[Tensor, Tensor]:
    no_means = kernel is None  # then nothing reads them
    map_means = x.new_zeros(x.shape[:2], dtype=reference.accumulation_dtype(x.dtype)) if no_means else squeeze(x)
    return eca_coefficients(map_means, norm_mean, norm_var, weight, bias, eps, kernel, circular, factor)[2:]
