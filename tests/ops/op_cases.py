"""What the tests of the operations share: formulas in float64, arguments, layouts, and how close is close enough."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv1d

from ecanet.ops import coefficients, reference

NONE, RELU, RELU6, SILU, HARDSWISH = range(5)
ACTS = (NONE, RELU, RELU6, SILU, HARDSWISH)

# Relative error of a map: half types are rounded once, by half of their eps.
MAP_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# Error, relative to what is added up, where the maths runs in that type.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6}

DTYPES = list(MAP_TOLERANCE)
HALF_TYPES = [torch.bfloat16, torch.float16]


# --- the formulas, in float64 and with the arguments of the operations --------------------------------------------


def double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def over_positions(t: Tensor, x: Tensor) -> Tensor:
    return t.double().reshape(*t.shape, *[1] * (x.dim() - 2))


def sum_positions(t: Tensor) -> Tensor:
    return t.reshape(*t.shape[:2], math.prod(t.shape[2:])).sum(2)


def into_act(x: Tensor, scale: Tensor, shift: Tensor | None, residual: Tensor | None) -> Tensor:
    y = x.double() * over_positions(scale, x)
    if shift is not None:
        y = y + over_positions(shift, x)
    return y if residual is None else y + residual.double()


def activation(y: Tensor, act: int) -> Tensor:
    zero = torch.zeros((), dtype=y.dtype)
    return {
        NONE: lambda: y,
        RELU: lambda: torch.where(y > 0, y, zero),
        RELU6: lambda: torch.where(y > 6, zero + 6, torch.where(y > 0, y, zero)),
        SILU: lambda: y / (1 + torch.exp(-y)),
        HARDSWISH: lambda: torch.where(y > 3, y, torch.where(y > -3, y * (y + 3) / 6, zero)),
    }[act]()


def upstream(grad: Tensor, x: Tensor, scale: Tensor, shift: Any, saved: Any, act: int) -> Tensor:
    if act == NONE:
        return grad.double()
    if act in (RELU, RELU6):
        passes = (saved > 0) & (saved < 6) if act == RELU6 else saved > 0
        return torch.where(passes, grad.double(), 0.0)
    y = into_act(x, scale, shift, saved).detach().requires_grad_()
    (d,) = torch.autograd.grad(activation(y, act), y, grad.double())
    return d


def naive_squeeze(x: Tensor) -> Tensor:
    return sum_positions(x.double()) / math.prod(x.shape[2:])


def naive_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = naive_squeeze(x)
    return mean, sum_positions((x.double() - over_positions(mean, x)) ** 2)


def naive_apply(x: Tensor, scale: Tensor, shift: Any, residual: Any, act: int) -> Tensor:
    return activation(into_act(x, scale, shift, residual), act)


def naive_apply_backward(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Any, center: Any, saved: Any, act: int, needs_d: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d = upstream(grad, x, scale, shift, saved, act)
    away = x.double() if center is None else x.double() - over_positions(center, x)
    return d if needs_d else torch.empty(0, dtype=torch.float64), sum_positions(d), sum_positions(d * away)


def naive_input_backward(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Any, saved: Any, act: int, offset: Tensor, slope: Any, center: Any
) -> Tensor:
    g = upstream(grad, x, scale, shift, saved, act) * over_positions(scale, x) + over_positions(offset, x)
    if slope is None:
        return g
    away = x.double() if center is None else x.double() - over_positions(center, x)
    return g + over_positions(slope, x) * away


def naive_batch_moments(x: Tensor, needs_m2: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values = x.double().transpose(0, 1).flatten(1)
    means, m2 = naive_moments(x)
    return means, values.mean(1), values.var(1, correction=0), m2 if needs_m2 else m2[:0]


def naive_norm(means: Tensor, mean: Any, var: Any, weight: Any, bias: Any, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Slope and shift of a BatchNorm, and the means of its output."""
    slope = torch.ones(means.shape[1], dtype=torch.float64) if var is None else 1 / (var.double() + eps).sqrt()
    slope = slope if weight is None else slope * weight.double()
    shift = torch.zeros_like(slope) if bias is None else bias.double()
    shift = shift if mean is None else shift - slope * mean.double()
    return slope, shift, slope * means.double() + shift


def naive_coefficients(
    means: Tensor,
    mean: Any,
    var: Any,
    weight: Any,
    bias: Any,
    eps: float,
    kernel: Any,
    circular: bool,
    factor: float = 1.0,
) -> tuple[Tensor, ...]:
    slope, shift, s = naive_norm(means, mean, var, weight, bias, eps)
    if kernel is None:
        return s, s.new_empty(0, s.shape[1]), slope.expand_as(s), shift.expand_as(s)
    margin = kernel.numel() // 2
    ends = (s[:, s.shape[1] - margin :], s[:, :margin]) if circular else (s.new_zeros(s.shape[0], margin),) * 2
    padded = torch.cat([ends[0], s, ends[1]], 1)
    logits = conv1d(padded.unsqueeze(1), kernel.double().reshape(1, 1, -1)).squeeze(1)
    gate = factor / (1 + torch.exp(-logits))
    return s, gate, gate * slope, gate * shift


def naive_coefficients_backward(
    p: Tensor,
    q: Tensor,
    means: Tensor,
    gate: Any,
    grad_s: Any,
    mean: Any,
    var: Any,
    weight: Any,
    bias: Any,
    eps: float,
    kernel: Any,
    circular: bool,
    positions: int,
    factor: float,
    m2: Any = None,
    grad_v: Any = None,
) -> tuple[Tensor, ...]:
    """By autograd: the sum of d (scale x + shift), with p = sum d and q = sum d (x - mean), plus grad_s s + grad_v v.

    A map of S positions, its mean and its m2 give x the gradient ``g_mean / S + 2 g_m2 (x - its mean)``, which is
    written as ``offset + slope (x - mean)``.
    """
    ones = torch.ones(means.shape[1], dtype=torch.float64)
    leaves = {
        "means": means,
        "weight": ones if weight is None else weight,
        "bias": 0 * ones if bias is None else bias,
        "kernel": ones[:0] if kernel is None else kernel,
        "mean": 0 * ones if mean is None else mean,
        "var": ones - eps if var is None else var,
        "m2": torch.zeros_like(means) if m2 is None else m2,
    }
    leaf = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    dx = q.double() + leaf["mean"].detach() * p.double()
    s, _, scale, shift = naive_coefficients(
        leaf["means"],
        leaf["mean"],
        leaf["var"],
        leaf["weight"],
        leaf["bias"],
        eps,
        None if kernel is None else leaf["kernel"],
        circular,
        factor,
    )
    if gate is not None and kernel is None:
        scale, shift = scale * gate.double(), shift * gate.double()
    loss = (scale * dx + shift * p.double()).sum() + leaf["kernel"].sum() * 0 + s.sum() * 0
    if grad_s is not None:
        loss = loss + (s * grad_s.double()).sum()
    slope, _, _ = naive_norm(leaf["means"], leaf["mean"], leaf["var"], leaf["weight"], leaf["bias"], eps)
    variances = slope**2 * leaf["m2"] / positions
    loss = loss + (variances * (0 if grad_v is None else grad_v.double())).sum()
    found = dict(zip(leaf, torch.autograd.grad(loss, list(leaf.values())), strict=True))
    of_x = 2 * found["m2"]
    offset = found["means"] / positions + of_x * (leaf["mean"] - leaf["means"]).detach()
    small = (found[name] for name in ("weight", "bias", "kernel", "mean", "var"))
    return offset, *small, of_x[:0] if grad_v is None else of_x


def naive_norm_eca_add_act(x: Tensor, residual: Any, *norm_and_band: Any) -> Tensor:
    *norm_and_band, act, factor = norm_and_band
    _, _, scale, shift = naive_coefficients(naive_squeeze(x), *norm_and_band, factor)
    return naive_apply(x, scale, shift, residual, act)


NAIVE: dict[str, Callable[..., Any]] = {
    "squeeze": naive_squeeze,
    "moments": naive_moments,
    "apply": naive_apply,
    "apply_backward": naive_apply_backward,
    "input_backward": naive_input_backward,
    "batch_moments": naive_batch_moments,
    "eca_coefficients": naive_coefficients,
    "eca_coefficients_backward": naive_coefficients_backward,
    "norm_eca_add_act": naive_norm_eca_add_act,
}
ON_MAPS = ["squeeze", "moments", "batch_moments", "apply", "apply_backward", "input_backward", "norm_eca_add_act"]
ON_MEANS = ["eca_coefficients", "eca_coefficients_backward"]
OUT_OF_PLACE = [*ON_MAPS, *ON_MEANS]
IN_PLACE = ["apply_", "norm_eca_add_act_"]
EVERY = [*OUT_OF_PLACE, *IN_PLACE]
#: Triton's kernels that go from one end of a map to the other.
WALKS = {"moments", "apply", "reduce", "input_grad"}
# Outputs with the shape and the type of the map; all others are sums in the type to compute in.
MAP_OUTPUTS = {("apply", 0), ("apply_backward", 0), ("input_backward", 0), ("norm_eca_add_act", 0)}


# --- arguments ----------------------------------------------------------------------------------------------------


class Options(NamedTuple):
    """What an operation is given of its optional arguments."""

    act: int = NONE
    shift: bool = True
    residual: bool = True
    center: bool = True
    slope: bool = True
    d: bool = True
    norm: str = "affine"  # "affine", "statistics", "weights of the type of x", "none"
    kernel: int | None = 3
    circular: bool = False
    gate: bool = True
    factor: float = 1.0
    variances: bool = False  # whether a gate sees them


EVERY_ACT = [Options(act) for act in ACTS]
FEW = [Options(RELU), Options(SILU, residual=False, d=False)]
WITH_AND_WITHOUT = [
    Options(act, shift, residual, center, slope, d, variances=variances)
    for act in ACTS
    for shift, residual, center, slope, d, variances in [
        (True, True, True, True, True, False),
        (False, False, False, False, False, False),
        (True, False, True, False, True, False),
        (False, True, False, True, False, True),
        (True, True, True, True, True, True),
    ]
]
NORMS_AND_BANDS = [
    *(
        Options(norm=norm, kernel=kernel, circular=circular, factor=factor)
        for norm in ("affine", "statistics", "none")
        for kernel, circular, factor in (
            (3, False, 1.0),
            (3, True, 2.0),
            (1, True, 1 / 3),
            (9, False, 2.5),
            (None, False, 2.0),
        )
    ),
    Options(kernel=None, gate=False),
    *(Options(kernel=None, variances=True, norm=norm) for norm in ("affine", "statistics", "none")),
]


def acts(name: str, *wanted: int) -> tuple[int, ...]:
    """These activations; one alone for an operation that has none, and for which they are all the same."""
    return wanted[:1] if name in ("squeeze", "moments", "batch_moments") else wanted


def every_option(name: str) -> list[Options]:
    """All that make a difference to the operation."""
    if name == "batch_moments":
        return [Options(), Options(variances=True)]
    if name in ("squeeze", "moments"):
        return [Options()]
    return NORMS_AND_BANDS if name.startswith("eca") else WITH_AND_WITHOUT


def random_small(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=reference.accumulation_dtype(dtype))


def norm_and_band(c: int, dtype: torch.dtype, o: Options) -> list[Any]:
    mean, var, weight, bias = (random_small(c, dtype=dtype) for _ in range(4))
    var = var.square() + 0.1
    if o.norm == "weights of the type of x":
        weight, bias = weight.to(dtype), bias.to(dtype)
    mean, var = (None, None) if o.norm == "none" else (mean, var)
    weight, bias = (weight, bias) if o.norm in ("affine", "weights of the type of x") else (None, None)
    k = o.kernel
    circular = o.circular and k is not None and k <= c
    return [mean, var, weight, bias, 1e-3, None if k is None else random_small(k, dtype=dtype), circular]


def saved_for_backward(map_: Callable[[], Tensor], o: Options) -> Tensor | None:
    """Of ReLU and ReLU6 the output, which is often 0 or 6; of others the residual."""
    if o.act in (RELU, RELU6):
        return 3 * map_().relu().clamp(max=2)
    return map_() if o.residual else None


def arguments(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[..., Tensor], o: Options
) -> list[Any]:
    """Random arguments for an operation, the maps of this shape made by ``make(shape, dtype)``."""
    n, c = shape[:2]
    small = reference.accumulation_dtype(dtype)

    def map_() -> Tensor:
        return make(shape, dtype)

    def factor() -> Tensor:
        return make((n, c), small)

    def channel(wanted: bool) -> Tensor | None:
        return random_small(c, dtype=dtype) if wanted else None

    match name.rstrip("_"):
        case "squeeze" | "moments":
            return [map_()]
        case "batch_moments":
            return [map_(), o.variances]
        case "apply":
            return [map_(), factor(), factor() if o.shift else None, map_() if o.residual else None, o.act]
        case "apply_backward":
            shift = factor() if o.shift else None
            return [map_(), map_(), factor(), shift, channel(o.center), saved_for_backward(map_, o), o.act, o.d]
        case "input_backward":
            shift = factor() if o.shift else None
            slope = factor() if o.variances and o.slope else channel(o.slope)
            saved = saved_for_backward(map_, o)
            return [map_(), map_(), factor(), shift, saved, o.act, factor(), slope, channel(o.center)]
        case "eca_coefficients":
            return [factor(), *norm_and_band(c, small, o), o.factor]
        case "eca_coefficients_backward":
            norm_band = norm_and_band(c, small, o)
            with_band = norm_band[-2] is not None
            means = factor()
            gate = naive_coefficients(means, *norm_band, o.factor)[1].to(small) if with_band else factor().sigmoid()
            gate = gate if o.gate else None
            grad_s = factor() if o.gate and not with_band else None
            sees = o.variances and not with_band
            of_variances = [factor().square(), factor()] if sees else [None, None]
            return [factor(), factor(), means, gate, grad_s, *norm_band, 49, o.factor, *of_variances]
        case "norm_eca_add_act":
            return [map_(), map_() if o.residual else None, *norm_and_band(c, dtype, o), o.act, o.factor]
    raise AssertionError(name)


def dense(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``(N, *spatial, C)`` in memory, for maps of any rank."""
    last = [shape[0], *shape[2:], shape[1]]
    return dense(tuple(last), dtype).movedim(-1, 1)


def sliced(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Every second of everything, from the second on."""
    return dense(tuple(2 * size + 1 for size in shape), dtype)[tuple(slice(1, None, 2) for _ in shape)]


def half_of_the_channels(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What ``x.chunk(2, dim=1)`` gives of a channels-last map: positions with gaps between them."""
    return channels_last((shape[0], 2 * shape[1], *shape[2:]), dtype)[:, shape[1] :]


def transposed(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return dense(shape[::-1], dtype).permute(*reversed(range(len(shape))))


def expanded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Positions, or channels where there are none, share their memory."""
    kept = shape[:2] if len(shape) > 2 else shape[:1]
    return dense((*kept, *[1] * (len(shape) - len(kept))), dtype).expand(shape)


# Vectors hold 4 to 16 numbers; a lone row is shorter than one; sums are merged every 4096 positions, and channels are
# walked in blocks of 512.
SHAPES = {
    0: [(3, 5), (1, 1), (2, 16), (2, 519)],
    1: [(2, 3, 7), (1, 1, 1), (1, 2, 4101), (2, 517, 3)],
    2: [(2, 3, 5, 7), (1, 1, 1, 1), (3, 1, 4, 4), (2, 17, 1, 3), (2, 33, 1, 1), (1, 3, 63, 67), (1, 531, 2, 3)],
    3: [(2, 5, 3, 2, 5), (1, 9, 1, 1, 2), (1, 2, 17, 16, 16)],
}
LAYOUTS = {
    "2-D": (0, dense),
    "2-D sliced": (0, sliced),
    "2-D transposed": (0, transposed),
    "3-D": (1, dense),
    "3-D channels last": (1, channels_last),
    "4-D": (2, dense),
    "4-D channels last": (2, channels_last),
    "4-D sliced": (2, sliced),
    "4-D half of the channels": (2, half_of_the_channels),
    "4-D transposed": (2, transposed),
    "4-D expanded": (2, expanded),
    "5-D": (3, dense),
    "5-D channels last": (3, channels_last),
    "5-D sliced": (3, sliced),
}


def cases(
    name: str, dtype: torch.dtype, rank: int, make: Callable[..., Tensor], few: bool = False
) -> Iterator[tuple[str, list[Any]]]:
    """Arguments of every size, and for the first size with every choice of optional arguments."""
    options = every_option(name)
    for i, shape in enumerate(SHAPES[rank]):
        some = FEW if few or math.prod(shape) > 1000 else EVERY_ACT
        for o in options if i == 0 and not few else some[: len(options)]:
            yield f"{shape} {o}", arguments(name, shape, dtype, make, o)


def call(name: str, args: list[Any]) -> Any:
    return getattr(torch.ops.ecanet, name)(*args)


def call_reference(name: str, args: list[Any]) -> Any:
    """The function of the same name; of an in-place operation, the one that is out of place."""
    if name == "squeeze":
        return reference.squeeze(args[0], args[0].shape[1])
    name = name.rstrip("_")
    module = reference if hasattr(reference, name) else coefficients
    return getattr(module, name)(*args)


def without_data(a: Any) -> Any:
    """The same strides on the meta device."""
    return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta") if isinstance(a, Tensor) else a


def significant(t: Tensor) -> tuple[Any, ...]:
    """Shape, type and strides, except the strides of what has size 1: they say nothing."""
    return (
        t.shape,
        t.dtype,
        [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1 and t.numel()],
    )


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def assert_close(got: Tensor, want: Tensor, tolerance: float, added_up: float = 1, case: str = "") -> None:
    """Within ``tolerance``, relative to the result or, where more cancels, to what was added up."""
    torch.testing.assert_close(
        got.double(),
        want.double(),
        rtol=tolerance,
        atol=min(tolerance, 1e-5) * added_up,
        equal_nan=True,
        msg=lambda text: f"{case}: {text}",
    )
