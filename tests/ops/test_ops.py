"""Every operation of ``torch.ops.ecanet`` against formulas in float64: values, strides, derivatives, special numbers.

What runs is the C++ library where it is loaded, the reference where it is not; the same must hold for both.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import op_cases as op
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from marks import every_layout, of_type
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ecanet.ops import reference
from tests.kernels_here import needs_kernels

# --- values -------------------------------------------------------------------------------------------------------


@of_type(*op.DTYPES)
@every_layout
@pytest.mark.parametrize("name", op.ON_MAPS)
def test_values_of_operations_on_maps(name, rank, make, dtype) -> None:
    small = reference.accumulation_dtype(dtype)
    for case, args in op.cases(name, dtype, rank, make):
        positions = math.prod(args[0].shape[2:])
        got, want = op.as_tuple(op.call(name, args)), op.as_tuple(op.NAIVE[name](*args))
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            is_map = (name, i) in op.MAP_OUTPUTS
            assert (g.shape, g.dtype) == (w.shape, dtype if is_map else small), case
            if is_map:
                op.assert_close(g, w, op.MAP_TOLERANCE[dtype], 30, case)
            else:
                op.assert_close(g, w, op.TOLERANCE[small], 30 * math.sqrt(positions), case)


@pytest.mark.parametrize("shape", [(2, 48, 152, 152), (1, 67, 181, 181)], ids=["whole vectors", "odd sizes"])
@pytest.mark.parametrize("make", [op.dense, op.channels_last])
@pytest.mark.parametrize("name", ["apply", "apply_backward", "input_backward", "norm_eca_add_act"])
def test_values_of_maps_larger_than_the_caches(name, make, shape) -> None:
    """Nobody finds so large a result in the caches, so the kernels may write past them."""
    args = op.arguments(name, shape, torch.float32, make, op.Options(op.RELU))
    got, want = op.as_tuple(op.call(name, args))[0], op.as_tuple(op.NAIVE[name](*args))[0]
    assert got.numel() * got.element_size() > 8 * 2**20
    assert (got - want).abs().max() <= 30 * op.TOLERANCE[torch.float32]


@of_type(*op.TOLERANCE)
@pytest.mark.parametrize(
    ("rank", "make"), [op.LAYOUTS["2-D"], op.LAYOUTS["2-D transposed"]], ids=["dense", "transposed"]
)
@pytest.mark.parametrize("name", op.ON_MEANS)
def test_values_of_operations_on_means(name, rank, make, dtype) -> None:
    for case, args in op.cases(name, dtype, rank, make):
        promised = op.call(name, [op.without_data(a) for a in args])
        for g, w, p in zip(op.call(name, args), op.NAIVE[name](*args), promised, strict=True):
            assert (g.shape, g.dtype) == (w.shape, dtype), case
            assert op.significant(g) == op.significant(p), case
            op.assert_close(g, w, op.TOLERANCE[dtype], 100, case)


@of_type(*op.DTYPES)
@every_layout
@pytest.mark.parametrize("name", op.IN_PLACE)
def test_in_place_is_out_of_place_written_over_x(name, rank, make, dtype) -> None:
    for case, args in op.cases(name, dtype, rank, make, few=True):
        if make is op.expanded:
            args[0] = args[0].contiguous()
        x = args[0]
        want = op.call(name[:-1], args)
        strides, address = x.stride(), x.data_ptr()
        assert op.call(name, args) is None
        assert (x.stride(), x.data_ptr()) == (strides, address), case
        assert torch.equal(x, want), case


@pytest.mark.parametrize("name", op.IN_PLACE)
def test_in_place_writes_to_nothing_between_the_elements(name) -> None:
    base = torch.randn(5, 9, 7, 9)
    before = base.clone()
    inside = (slice(1, None, 2), slice(None, None, 2), slice(1, 6), slice(None, None, 4))
    args = op.arguments(name, tuple(base[inside].shape), torch.float32, op.dense, op.Options(op.RELU))
    want = op.call(name[:-1], [base[inside], *args[1:]])
    op.call(name, [base[inside], *args[1:]])
    assert torch.equal(base[inside], want)
    base[inside] = before[inside]
    assert torch.equal(base, before)


@pytest.mark.parametrize("make", [op.dense, op.channels_last, op.sliced])
@pytest.mark.parametrize("name", op.IN_PLACE)
def test_the_residual_may_be_the_map_that_is_written(name, make) -> None:
    args = op.arguments(name, (2, 19, 3, 5), torch.float32, make, op.Options(op.RELU))
    x, at = args[0], 3 if name == "apply_" else 1
    args[at] = x.clone()
    want = op.call(name[:-1], args)
    args[at] = x
    op.call(name, args)
    assert torch.equal(x, want)


@pytest.mark.parametrize("overlap", [-7, -1, 1, 8, 200])
@pytest.mark.parametrize("name", op.IN_PLACE)
def test_the_residual_may_lie_partly_under_the_map_that_is_written(name, overlap) -> None:
    args = op.arguments(name, (2, 19, 3, 5), torch.float32, op.dense, op.Options(op.RELU))
    size, at = args[0].numel(), 3 if name == "apply_" else 1
    memory = torch.randn(3 * size)
    x = memory[size : 2 * size].view(2, 19, 3, 5)
    residual = memory[size + overlap : 2 * size + overlap].view(2, 19, 3, 5)
    args[0], args[at] = x.clone(), residual.clone()
    want = op.call(name[:-1], args)
    args[0], args[at] = x, residual
    op.call(name, args)
    assert torch.equal(x, want)


@pytest.mark.parametrize("at", range(5), ids=["mean", "var", "weight", "bias", "kernel"])
def test_norm_and_band_may_lie_under_the_map_that_is_written(at) -> None:
    channels = 300_000  # every sample is a group of its own
    x = torch.rand(3, channels) + 0.5
    args = [x, None, *(torch.rand(channels) + 0.5 for _ in range(4)), 1e-3, torch.randn(3), False, op.RELU]
    place = 2 + at + (at == 4)
    args[place] = x[1] if at < 4 else x[0, :3]
    want = op.call("norm_eca_add_act", [a.clone() if isinstance(a, Tensor) else a for a in args])
    op.call("norm_eca_add_act_", args)
    op.assert_close(x, want, 1e-6)


def test_tensors_of_two_devices_are_an_error_without_data_too() -> None:
    with pytest.raises(RuntimeError, match=r"all tensors must be on one device, got \['cpu', 'meta'\]"):
        op.call("apply", [torch.ones(1, 2, 2), torch.ones(1, 2, device="meta"), None, None, op.NONE])


@pytest.mark.parametrize("name", op.IN_PLACE)
def test_in_place_says_that_it_has_no_derivative(name) -> None:
    args = op.arguments(name, (2, 3, 4, 4), torch.float32, op.dense, op.Options(op.RELU))
    tensors = [a for a in args if isinstance(a, Tensor)]
    for tensor in tensors:
        before = args[0].detach().clone()
        tensor.requires_grad_()
        with pytest.raises(RuntimeError, match=rf"ecanet::{name} works in place and has no derivative"):
            op.call(name, args)
        assert torch.equal(args[0], before)
        with torch.no_grad():
            op.call(name, args)
        tensor.requires_grad_(False)


@pytest.mark.parametrize("name", op.IN_PLACE)
def test_in_place_tells_autograd_that_x_has_changed(name) -> None:
    weight = torch.ones(2, 3, 4, 4, requires_grad=True)
    args = op.arguments(name, (2, 3, 4, 4), torch.float32, op.dense, op.Options(op.RELU))
    product = args[0] * weight
    op.call(name, args)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("name", op.IN_PLACE)
def test_in_place_refuses_a_map_whose_elements_share_memory(name) -> None:
    args = op.arguments(name, (2, 3, 4, 4), torch.float32, op.expanded, op.Options())
    with pytest.raises(RuntimeError, match="single memory location"):
        op.call(name, args)


@pytest.mark.parametrize("name", op.ON_MAPS)
def test_maps_may_each_have_their_own_strides(name) -> None:
    layouts = [op.dense, op.channels_last, op.sliced, op.transposed, op.expanded]
    shape = (2, 19, 3, 5)
    for i, o in enumerate(op.EVERY_ACT * 2):
        turn = itertools.cycle(layouts[i % 5 :] + layouts[: i % 5])
        args = op.arguments(name, shape, torch.float32, lambda s, d, turn=turn: next(turn)(s, d), o)
        plain = [a.contiguous() if isinstance(a, Tensor) else a for a in args]
        for g, w in zip(op.as_tuple(op.call(name, args)), op.as_tuple(op.call(name, plain)), strict=True):
            op.assert_close(g, w, op.TOLERANCE[torch.float32], 30)


@pytest.mark.parametrize("name", op.EVERY)
def test_the_inputs_are_not_written_to(name) -> None:
    for make, o in itertools.product([op.dense, op.channels_last], op.every_option(name.rstrip("_"))):
        args = op.arguments(name, (2, 19, 3, 5), torch.float32, make, o)
        inputs = args[1:] if name in op.IN_PLACE else args
        before = [a.clone() if isinstance(a, Tensor) else a for a in inputs]
        op.call(name, args)
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True) if isinstance(a, Tensor))


@of_type(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("name", op.EVERY)
def test_an_empty_batch_is_an_empty_result(name, dtype) -> None:
    for make, shape in [
        (op.dense, (0, 5)),
        (op.dense, (0, 5, 4)),
        (op.dense, (0, 5, 3, 4)),
        (op.channels_last, (0, 5, 3, 4)),
    ]:
        args = op.arguments(name, shape, dtype, make, op.Options(op.RELU))
        for outputs in (op.call(name, args), op.call_reference(name, args)):
            if name == "batch_moments":  # of nothing
                assert outputs[0].numel() == 0
                assert all(t.shape == (5,) and t.isnan().all() for t in outputs[1:3])
                assert outputs[3].shape == (0, 5)
            elif name == "eca_coefficients_backward":
                assert outputs[0].shape == (0, 5)
                assert all(not t.any() for t in outputs[1:])
            elif outputs is not None:
                assert all(t.numel() == 0 for t in op.as_tuple(outputs))


# --- what is promised without data --------------------------------------------------------------------------------


@of_type(torch.float32, torch.bfloat16)
@every_layout
@pytest.mark.parametrize("name", op.ON_MAPS)
def test_shapes_strides_and_types_are_those_of_the_fake(name, rank, make, dtype) -> None:
    for case, args in op.cases(name, dtype, rank, make, few=True):
        got = op.as_tuple(op.call(name, args))
        promised = op.call(name, [op.without_data(a) for a in args])
        for g, p in zip(got, op.as_tuple(promised), strict=True):
            assert op.significant(g) == op.significant(p), case


@pytest.mark.parametrize(
    ("make", "same"),
    [
        (op.dense, True),
        (op.channels_last, True),
        (op.sliced, False),
        (op.transposed, False),
        (op.half_of_the_channels, False),
    ],
)
def test_contiguous_and_channels_last_stay_so_and_other_strides_become_contiguous(make, same) -> None:
    for shape in [(2, 3, 4, 5), (2, 3, 4, 5, 2)]:
        x = make(shape, torch.float32)
        out = op.call("apply", [x, *op.arguments("apply", shape, torch.float32, op.dense, op.Options())[1:]])
        assert out.stride() == (x.stride() if same else x.contiguous().stride())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("name", op.EVERY)
def test_opcheck(name) -> None:
    operation = getattr(torch.ops.ecanet, name).default
    args = op.arguments(name, (2, 5, 3, 2), torch.float32, op.channels_last, op.Options(op.HARDSWISH))
    if name in op.OUT_OF_PLACE:
        args = [a.requires_grad_() if isinstance(a, Tensor) else a for a in args]
    torch.library.opcheck(operation, args)
    without = op.Options(op.RELU, False, False, False, False, False, "none", None, gate=False)
    for shape in [(2, 5), (2, 5, 3, 2)]:
        args = op.arguments(name, shape, torch.bfloat16, op.sliced, without)
        torch.library.opcheck(operation, args, test_utils=("test_schema", "test_faketensor"))


# --- derivatives --------------------------------------------------------------------------------------------------


def away_from_kinks(args: list[Any], act: int) -> list[Any]:
    """Every tensor to be differentiated, except an output of ReLU: its derivative is 0 or has no value."""
    return [
        a.clone().requires_grad_(not (act in (op.RELU, op.RELU6) and i in (4, 5) and a.dim() == 4))
        if isinstance(a, Tensor)
        else a
        for i, a in enumerate(args)
    ]


def differentiable(name: str, args: list[Any]) -> tuple[Callable[..., Any], list[Tensor]]:
    """The operation as a function of the tensors that require a gradient, and those."""
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]

    def function(*tensors: Tensor) -> Any:
        inputs = list(args)
        for i, t in zip(places, tensors, strict=True):
            inputs[i] = t
        outputs = op.as_tuple(op.call(name, inputs))
        return tuple(t for t in outputs if t.requires_grad)

    return function, [args[i] for i in places]


GRADIENT_OPTIONS = {
    "squeeze": [op.Options()],
    "moments": [op.Options()],
    "batch_moments": [op.Options(), op.Options(variances=True)],
    "eca_coefficients": [
        op.Options(factor=2.5),
        op.Options(norm="none", circular=True),
        op.Options(norm="statistics", kernel=None),
    ],
    "eca_coefficients_backward": [
        op.Options(factor=2.5),
        op.Options(kernel=None),
        op.Options(kernel=None, variances=True),
        op.Options(norm="none", circular=True),
    ],
    "norm_eca_add_act": [*op.EVERY_ACT, op.Options(residual=False, norm="none", factor=2.5), op.Options(kernel=None)],
}


def gradient_cases(name: str, options: list[op.Options]) -> Iterator[tuple[Callable[..., Any], list[Tensor]]]:
    for make, o in itertools.product([op.dense, op.channels_last], options):
        args = op.arguments(name, (2, 3, 2, 1), torch.float64, make, o)
        yield differentiable(name, away_from_kinks(args, o.act))


@pytest.mark.parametrize("name", op.OUT_OF_PLACE)
def test_first_derivatives(name) -> None:
    fallback = [
        *op.EVERY_ACT,
        op.Options(op.SILU, False, False, False, False),
        op.Options(op.RELU, d=False, residual=False),
    ]
    for function, inputs in gradient_cases(name, GRADIENT_OPTIONS.get(name, fallback)):
        assert gradcheck(function, inputs)


@pytest.mark.parametrize("name", ["squeeze", "moments", "apply", "eca_coefficients", "norm_eca_add_act"])
def test_second_derivatives(name) -> None:
    for function, inputs in gradient_cases(name, [op.Options(op.SILU)]):
        assert gradgradcheck(function, inputs)


@of_type(*op.HALF_TYPES, torch.float32)
def test_gradients_have_the_types_of_their_inputs(dtype) -> None:
    for name in ("squeeze", "moments", "apply", "norm_eca_add_act"):
        args = op.arguments(name, (2, 3, 4, 5), dtype, op.channels_last, op.Options(op.RELU))
        function, inputs = differentiable(name, [a.requires_grad_() if isinstance(a, Tensor) else a for a in args])
        grads = torch.autograd.grad([t.sum() for t in function(*inputs)], inputs)
        assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in inputs]


# --- any shape, strides and options -------------------------------------------------------------------------------


@st.composite
def maps_and_options(
    draw: Callable[..., Any],
) -> tuple[torch.dtype, tuple[int, ...], Callable[..., Tensor], op.Options]:
    spatial = draw(st.lists(st.integers(1, 9), min_size=0, max_size=3))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 40)), *spatial)
    rank = len(shape)

    def make(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Any order of the dimensions in memory, gaps, and a start inside."""
        if len(size) != rank:
            return op.dense(size, dtype)
        order = draw(st.permutations(range(rank)))
        steps = [draw(st.sampled_from([1, 1, 2])) for _ in size]
        starts = [draw(st.sampled_from([0, 0, 1])) for _ in size]
        whole = [starts[i] + steps[i] * size[i] for i in order]
        base = op.dense(tuple(whole), dtype).permute([list(order).index(i) for i in range(rank)])
        view = base[tuple(slice(start, None, step) for start, step in zip(starts, steps, strict=True))]
        return view[tuple(slice(0, n) for n in size)]

    flags = [draw(st.booleans()) for _ in range(6)]
    options = op.Options(
        draw(st.sampled_from(op.ACTS)),
        *flags[:5],
        norm=draw(st.sampled_from(["affine", "statistics", "weights of the type of x", "none"])),
        kernel=draw(st.sampled_from([None, 1, 3, 5, 45])),
        circular=flags[5],
    )
    return draw(st.sampled_from(op.DTYPES)), shape, make, options


@pytest.mark.parametrize("name", op.EVERY)
def test_any_map_gives_what_the_reference_gives(name) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(drawn=maps_and_options(), seed=st.integers(0, 2**16))
    def check(drawn: tuple[torch.dtype, tuple[int, ...], Callable[..., Tensor], op.Options], seed: int) -> None:
        dtype, shape, make, o = drawn
        torch.manual_seed(seed)
        args = op.arguments(name, shape, dtype, make, o)
        x, want = args[0], op.as_tuple(op.call_reference(name, args))
        promised = op.call(name, [op.without_data(a) for a in args])
        got = op.call(name, args)
        if name in op.IN_PLACE:
            got = promised = x
        for g, w, p in zip(op.as_tuple(got), want, op.as_tuple(promised), strict=True):
            assert op.significant(g) == op.significant(p)
            tolerance = 2 * op.MAP_TOLERANCE[g.dtype] if g.dtype in op.HALF_TYPES else op.TOLERANCE[g.dtype]
            op.assert_close(g, w, tolerance, 100)

    check()


# --- special numbers ----------------------------------------------------------------------------------------------


SPECIAL = {"NaN": math.nan, "Inf": math.inf, "-Inf": -math.inf}
# Of a map of 40 positions, and 20 channels: vectors and what is left over of them.
PLACES = {
    "first": lambda t: t[1, 17].flatten()[:1],
    "second": lambda t: t[1, 17].flatten()[1:2],
    "in the middle": lambda t: t[0, 3].flatten()[20:21],
    "last": lambda t: t[1, 19].flatten()[-1:],
    "whole map": lambda t: t[1, 2].flatten(),
}


def with_special(t: Tensor, place: str, value: float) -> Tensor:
    """The same, and the same strides, with a special number somewhere."""
    special = t.contiguous().clone()
    PLACES[place](special).fill_(value)
    return t.clone().copy_(special)


@of_type(torch.float64, torch.float32, torch.bfloat16)
@pytest.mark.parametrize("make", [op.dense, op.channels_last])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", op.ON_MAPS)
def test_nan_and_inf_propagate_as_in_the_reference(name, place, make, dtype) -> None:
    shape = (2, 20, 5, 8)
    for value, o in itertools.product(SPECIAL.values(), op.EVERY_ACT[: len(op.every_option(name))]):
        args = op.arguments(name, shape, dtype, make, o)
        for i in [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.shape == shape]:
            mine = list(args)
            mine[i] = with_special(args[i], place, value)
            got = op.as_tuple(op.call(name, mine))
            want = op.as_tuple(op.call_reference(name, mine))
            for g, w in zip(got, want, strict=True):
                tolerance = 2 * op.MAP_TOLERANCE[dtype] if g.dtype == dtype else op.TOLERANCE[g.dtype]
                op.assert_close(g, w, tolerance, 100, f"{value} in argument {i}, {o}")


@of_type(torch.float64, torch.float32, torch.bfloat16)
@pytest.mark.parametrize("run", [op.call, op.call_reference])
@pytest.mark.parametrize("make", [op.dense, op.channels_last])
def test_a_map_with_an_infinite_value_has_the_mean_that_torch_gives_a_batch(make, run, dtype) -> None:
    for value, place in itertools.product(SPECIAL.values(), ["first", "in the middle", "last"]):
        x = with_special(make((2, 20, 5, 8), dtype), place, value)
        running_mean, running_var = torch.zeros(20, dtype=dtype), torch.ones(20, dtype=dtype)
        torch.batch_norm(x, None, None, running_mean, running_var, True, 1.0, 1e-5, False)
        mean, m2 = run("moments", [x])
        torch.testing.assert_close(mean.mean(0).isinf(), running_mean.isinf())
        torch.testing.assert_close(mean.mean(0).isnan(), running_mean.isnan())
        torch.testing.assert_close(m2.sum(0).isnan(), running_var.isnan())


@of_type(torch.float64, torch.float32)
@pytest.mark.parametrize("value", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize("name", ["eca_coefficients", "eca_coefficients_backward"])
def test_nan_and_inf_among_the_means_propagate_as_in_the_reference(name, value, dtype) -> None:
    args = op.arguments(name, (3, 19), dtype, op.dense, op.Options())
    for i in [i for i, a in enumerate(args) if isinstance(a, Tensor)]:
        mine = list(args)
        mine[i] = args[i].clone()
        mine[i].flatten()[-1].fill_(value)
        for g, w in zip(op.call(name, mine), op.call_reference(name, mine), strict=True):
            op.assert_close(g, w, op.TOLERANCE[dtype], 100, f"argument {i}")


@of_type(*op.DTYPES)
@pytest.mark.parametrize("act", op.ACTS)
def test_large_and_small_numbers_go_through_the_activations(act, dtype) -> None:
    limits = torch.finfo(dtype)
    values = [0.0, 3, -3, 6, -6, 20, -20, 88, -88, 89, -89, 104, -104, 300, -300, 710, -710, 750, -750]
    values += [limits.max, limits.min, limits.tiny, -limits.tiny, limits.smallest_normal / 2, 1e30, -1e30]
    x = torch.tensor(values, dtype=torch.float64).to(dtype).repeat(2, 3, 1).contiguous()
    ones = torch.ones(2, 3, dtype=reference.accumulation_dtype(dtype))
    for map_ in (x, x.unsqueeze(-1).to(memory_format=torch.channels_last)):
        got = op.call("apply", [map_, ones, None, None, act])
        want = reference.apply(map_, ones, None, None, act)
        op.assert_close(got, want, 2 * op.MAP_TOLERANCE[dtype], torch.finfo(ones.dtype).tiny)
        saved = want if act in (op.RELU, op.RELU6) else None
        got = op.call("apply_backward", [torch.ones_like(map_), map_, ones, None, None, saved, act, True])[0]
        want = reference.apply_backward(torch.ones_like(map_), map_, ones, None, None, saved, act, True)[0]
        op.assert_close(got, want, 2 * op.MAP_TOLERANCE[dtype])


@of_type(*op.DTYPES)
@pytest.mark.parametrize("make", [op.dense, op.channels_last])
def test_negative_zero_stays_negative_where_nothing_is_added(make, dtype) -> None:
    shape = (2, 19, 3, 5)
    x = torch.zeros_like(make(shape, dtype)).neg_()
    ones = torch.ones(2, 19, dtype=reference.accumulation_dtype(dtype))
    for act in (op.NONE, op.RELU, op.RELU6, op.SILU, op.HARDSWISH):
        for shift, residual in [(None, None), (-0 * ones, None), (None, x), (0 * ones, None)]:
            got = op.call("apply", [x, ones, shift, residual, act])
            want = reference.apply(x, ones, shift, residual, act)
            assert torch.equal(got, torch.zeros_like(x))
            assert torch.equal(got.signbit(), want.signbit()), (act, shift is None, residual is None)


# --- half types ---------------------------------------------------------------------------------------------------


def every_half(dtype: torch.dtype) -> Tensor:
    """All 65536 bit patterns."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def near_every_half(dtype: torch.dtype) -> Tensor:
    """Every finite half number as float32, the middle to the next one, and the floats beside these."""
    finite = every_half(dtype)
    finite = finite[finite.isfinite()].double().sort().values
    middle = ((finite[:-1] + finite[1:]) / 2).float()
    both = torch.cat([finite.float(), middle])
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    limits = torch.finfo(dtype)
    beyond = torch.tensor([limits.max * (1 + limits.eps / 8 * i) for i in range(1, 17)]).clamp(max=3.4e38)
    ends = torch.tensor([math.inf, -math.inf, math.nan, 3.4028234e38, -3.4028234e38, 1e-45, -1e-45])
    floats = torch.cat([both, torch.nextafter(both, up), torch.nextafter(both, down), beyond, -beyond, ends])
    return floats[floats.signbit().logical_not() | (floats != 0)]


@of_type(*op.HALF_TYPES)
@pytest.mark.parametrize("channels_in", ["rows", "lines", "a long line"])
def test_results_are_rounded_to_nearest_even_as_torch_does(channels_in, dtype) -> None:
    scale = near_every_half(dtype)
    if channels_in == "rows":  # one row of 9 positions for each channel
        x = torch.ones(1, scale.numel(), 9, dtype=dtype)
        rows = op.call("apply", [x, scale[None], None, None, op.NONE])
        got = rows[0, :, 0]
        assert torch.equal(rows.isnan(), got[None, :, None].isnan().expand_as(rows))
        assert torch.equal(rows.nan_to_num(1), got[None, :, None].nan_to_num(1).expand_as(rows))
    else:
        width = 13 if channels_in == "lines" else scale.numel()
        scale = scale[: scale.numel() // width * width].reshape(-1, width)
        x = torch.ones(*scale.shape, 2, 2, dtype=dtype).to(memory_format=torch.channels_last)
        got = op.call("apply", [x, scale, None, None, op.NONE])[:, :, 1, 0]
    assert_same_numbers(got, scale.to(dtype).reshape(got.shape))


@of_type(*op.HALF_TYPES)
def test_every_half_number_is_read_exactly(dtype) -> None:
    numbers = every_half(dtype)
    for x in (numbers.reshape(2, 2**15), numbers.reshape(8, 2**13, 1), numbers.reshape(8, 2**10, 8)[:, :, :1]):
        assert_same_numbers(op.call("squeeze", [x]).flatten(), x.float().flatten())
    x = numbers.reshape(16, 1, 64, 64)
    ones = torch.ones(16, 1)
    assert_same_numbers(op.call("apply", [x, ones, None, None, op.NONE]), x)
    columns = numbers.reshape(16, 16, 16, 16).to(memory_format=torch.channels_last)
    assert_same_numbers(op.call("apply", [columns, torch.ones(16, 16), None, None, op.NONE]), columns)


def assert_same_numbers(got: Tensor, want: Tensor) -> None:
    """Bit by bit, except the payload of a NaN and the sign of 0."""
    assert got.dtype == want.dtype
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(1), want.nan_to_num(1))


# --- accuracy -----------------------------------------------------------------------------------------------------


@of_type(torch.float32)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"])
@pytest.mark.parametrize("shape", [(8, 16, 28, 28), (2, 8, 80, 80), (32, 8, 3, 3)], ids=str)
def test_a_mean_of_10000_deviations_costs_no_more_digits_than_in_torch(shape, memory_format, dtype) -> None:
    x = (1e4 + torch.randn(shape, dtype=torch.float64)).to(dtype).contiguous(memory_format=memory_format)
    want_mean, want_var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0)
    _, torch_mean, torch_inverse = torch.native_batch_norm(x, None, None, None, None, True, 0.1, 0.0)
    torch_var = torch_inverse.double() ** -2
    _, mean, var, _ = op.call("batch_moments", [x])

    def error(got: Tensor, want: Tensor) -> float:
        return ((got.double() - want) / want).abs().max().item()

    eps = torch.finfo(dtype).eps
    assert error(mean, want_mean) <= max(2 * error(torch_mean, want_mean), eps)
    assert error(var, want_var) <= max(2 * error(torch_var, want_var), 2 * eps)


@pytest.mark.parametrize("make", [op.dense, op.channels_last])
def test_sums_over_many_positions_lose_no_digits(make) -> None:
    x = make((1, 3, 512, 256), torch.float32) + 100
    want_mean, want_m2 = op.naive_moments(x)
    mean, m2 = op.call("moments", [x])
    op.assert_close(mean, want_mean, 2e-7)
    op.assert_close(m2, want_m2, 1e-5)
    op.assert_close(op.call("squeeze", [x]), want_mean, 2e-7)


@pytest.mark.parametrize("make", [op.dense, op.channels_last])
def test_float16_sums_do_not_overflow(make) -> None:
    x = torch.full_like(make((1, 3, 70, 70), torch.float16), 60000)
    op.assert_close(op.call("squeeze", [x]), x[:, :, 0, 0], 1e-6)
    mean, m2 = op.call("moments", [x])
    op.assert_close(mean, x[:, :, 0, 0], 1e-6)
    op.assert_close(m2, torch.zeros(1, 3), 1e-6)


@needs_kernels
@pytest.mark.parametrize("size", [1e37, 1e19, 3e38], ids=str)
@pytest.mark.parametrize("make", [op.dense, op.channels_last])
def test_the_statistics_of_a_batch_overflow_where_their_type_does(make, size) -> None:
    x = torch.randn(make((2, 3, 9, 11), torch.float32).shape).sign() * size
    x[0, 0, 0, 0] = size / 3
    x = x.contiguous(memory_format=torch.channels_last if make is op.channels_last else torch.contiguous_format)
    _, mean, var, _ = op.call("batch_moments", [x])
    op.assert_close(mean / size, x.double().mean((0, 2, 3)) / size, 1e-6)
    want_var = x.double().var((0, 2, 3), correction=0).float()
    assert torch.equal(var.isinf(), want_var.isinf())
    op.assert_close(torch.where(var.isinf(), 0, var / size), torch.where(var.isinf(), 0, want_var / size), 1e-6)


def test_a_nan_of_any_payload_stays_one() -> None:
    payloads = torch.tensor([0x7FFFFFFF, 0x7FFF8001, 0x7F800001, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    x = torch.ones(1, 5, 9, dtype=torch.bfloat16)
    assert op.call("apply", [x, payloads[None], None, None, op.NONE]).isnan().all()


# --- threads ------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("make", [op.dense, op.channels_last])
@pytest.mark.parametrize("name", op.EVERY)
def test_two_threads_give_what_one_gives(name, make, threads) -> None:
    for shape in [(3, 40, 35, 41), (1, 9, 90, 93), (2, 700, 9, 9), (70, 64, 5, 5)]:
        args = op.arguments(name, shape, torch.float32, make, op.Options(op.SILU))
        results = []
        for count in (1, 2):
            threads(count)
            x = args[0].clone()
            outputs = op.call(name, [x, *args[1:]])
            results.append(op.as_tuple(x if name in op.IN_PLACE else outputs))
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True)), shape


# --- wrong arguments ----------------------------------------------------------------------------------------------

X = torch.ones(2, 3, 4, 4)
ONES, C = torch.ones(2, 3), torch.ones(3)
NO_NORM = (None, None, None, None, 0.0)


@needs_kernels
@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("squeeze", [X.long()], "x must be float32, float64, bfloat16 or float16; got int64"),
        ("squeeze", [X[0, 0, 0]], r"x must have shape \(N, C, \*spatial\); got \(4\)"),
        ("squeeze", [torch.ones(2, 3, 0)], r"x has no spatial position .* got shape \(2, 3, 0\)"),
        ("moments", [X.to(torch.complex64)], "x must be float32, .* got complex64"),
        (
            "apply",
            [X, ONES[:1], None, None, op.NONE],
            r"scale must have shape \(2, 3\), on the CPU; got \(1, 3\), on the CPU",
        ),
        ("apply", [X, ONES.T, None, None, op.NONE], r"scale must have shape \(2, 3\).* got \(3, 2\)"),
        ("apply", [X, ONES, C, None, op.NONE], r"shift must have shape \(2, 3\).* got \(3\)"),
        (
            "apply",
            [X, ONES, None, X[:1], op.NONE],
            r"residual must have the shape, the type and the device of x: \(2, 3, 4, 4\), float32, on the CPU; "
            r"got \(1, 3, 4, 4\), float32, on the CPU",
        ),
        ("apply", [X, ONES, None, X[..., 0], op.NONE], r"residual must have the shape.* got \(2, 3, 4\)"),
        ("apply", [X, ONES, None, X.double(), op.NONE], "residual must have .*, float32, .* got .*, float64,"),
        ("apply", [X, ONES, None, None, 5], "act must be 0 to 4, got 5"),
        ("apply", [X, ONES, None, None, -1], "act must be 0 to 4, got -1"),
        ("apply_", [X, ONES[:1], None, None, op.NONE], r"scale must have shape \(2, 3\).* got \(1, 3\)"),
        ("apply_", [X, ONES, None, X.half(), op.NONE], "residual must have .*, float32, .* got .*, float16,"),
        (
            "apply_backward",
            [X[:1], X, ONES, None, None, None, op.NONE, True],
            r"grad must have the shape.* got \(1, 3, 4, 4\)",
        ),
        ("apply_backward", [X, X, ONES, None, None, None, op.RELU, True], "ReLU and ReLU6 need saved=out; got None"),
        (
            "apply_backward",
            [X, X, ONES, None, None, X.half(), op.RELU, True],
            "saved must have the shape.* got .*, float16,",
        ),
        (
            "apply_backward",
            [X, X, ONES, None, ONES, None, op.NONE, True],
            r"center must have shape \(3\).* got \(2, 3\)",
        ),
        (
            "input_backward",
            [X, X, ONES, None, None, op.RELU6, ONES, None, None],
            "ReLU and ReLU6 need saved=out; got None",
        ),
        (
            "input_backward",
            [X, X, ONES, None, None, op.NONE, C, None, None],
            r"offset must have shape \(2, 3\).* got \(3\)",
        ),
        (
            "input_backward",
            [X, X, ONES, None, None, op.NONE, ONES, C[:2], None],
            r"slope must have shape \(3\).* got \(2\)",
        ),
        (
            "input_backward",
            [X, X, ONES, None, None, op.NONE, ONES, ONES.T, None],
            r"slope must have shape \(2, 3\).* got \(3, 2\)",
        ),
        (
            "eca_coefficients_backward",
            [ONES, ONES, ONES, None, None, *NO_NORM, None, False, 16, 1.0, None, ONES],
            "grad_v needs m2; got m2=None",
        ),
        ("eca_coefficients", [X, *NO_NORM, C, False], r"map_means must have shape \(N, C\); got \(2, 3, 4, 4\)"),
        (
            "eca_coefficients",
            [ONES, C, None, None, None, 0.0, C, False],
            r"norm_mean and norm_var .* got norm_mean alone",
        ),
        (
            "eca_coefficients",
            [ONES, None, C, None, None, 0.0, C, False],
            r"norm_mean and norm_var .* got norm_var alone",
        ),
        ("eca_coefficients", [ONES, ONES, C, None, None, 0.0, C, False], r"mean must have shape \(3\).* got \(2, 3\)"),
        ("eca_coefficients", [ONES, *NO_NORM, C[:2], False], "kernel must have an odd size.* got 2"),
        (
            "eca_coefficients",
            [ONES, *NO_NORM, torch.ones(5), True],
            "kernel must have .* at most C = 3 if circular; got 5",
        ),
        (
            "eca_coefficients_backward",
            [ONES, C, ONES, None, None, *NO_NORM, None, False, 16],
            r"q must have shape \(2, 3\).* got \(3\)",
        ),
        (
            "eca_coefficients_backward",
            [ONES, ONES, ONES, None, None, *NO_NORM, C, False, 16],
            "its gate; got gate=None",
        ),
        ("norm_eca_add_act", [X, X[0], *NO_NORM, C, False, op.NONE], r"residual must have the shape.* got \(3, 4, 4\)"),
        (
            "norm_eca_add_act",
            [X, None, C, C, ONES, None, 0.0, C, False, op.NONE],
            r"weight must have shape \(3\).* got \(2, 3\)",
        ),
        ("norm_eca_add_act_", [X, None, *NO_NORM, C, False, 7], "act must be 0 to 4, got 7"),
    ],
)
def test_wrong_arguments_are_refused_with_the_name_what_would_be_right_and_what_was_given(name, args, message) -> None:
    before = X.clone()
    with pytest.raises(RuntimeError, match=message):
        op.call(name, args)
    assert torch.equal(X, before)


# --- the tail in training -----------------------------------------------------------------------------------------


def plain_batch_norm_eca_add_act(
    x: Tensor, residual: Any, weight: Any, bias: Any, eps: float, kernel: Any, circular: bool, act: int, factor: float
) -> Tensor:
    """Norm, ECA, residual and activation by torch's own operations."""
    y = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    if kernel is not None:
        y = reference.scale(y, factor * torch.sigmoid(reference.band(y.mean((2, 3)), kernel, circular)))
    return reference.activate(y if residual is None else y + residual, act)


def batch_norm_eca_add_act_arguments(make: Callable[..., Tensor], with_all: bool, act: int) -> list[Any]:
    x, residual = make((3, 5, 4, 3), torch.float64), make((3, 5, 4, 3), torch.float64)
    weight, bias, kernel = (torch.randn(size, dtype=torch.float64) for size in (5, 5, 3))
    if not with_all:
        return [x, None, None, None, 1e-3, None, False, act, 1.0]
    return [x, residual, weight, bias, 1e-3, kernel.view(1, 1, 3), True, act, 2.5]


@pytest.mark.parametrize("act", op.ACTS)
@pytest.mark.parametrize("with_all", [True, False], ids=["everything", "x alone"])
@pytest.mark.parametrize("make", [op.dense, op.channels_last])
def test_the_tail_in_training_is_norm_gate_addition_and_activation(make, with_all, act) -> None:
    args = batch_norm_eca_add_act_arguments(make, with_all, act)
    results = []
    for function in (lambda *a: torch.ops.ecanet.batch_norm_eca_add_act(*a)[0], plain_batch_norm_eca_add_act):
        inputs = [a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for a in args]
        out = function(*inputs)
        wanted = [a for a in inputs if isinstance(a, Tensor)]
        results.append([out, *torch.autograd.grad(out.square().sum() + out.sum(), wanted)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("act", [op.NONE, op.RELU, op.SILU])
@pytest.mark.parametrize("with_all", [True, False], ids=["everything", "x alone"])
def test_opcheck_of_the_tail_in_training(with_all, act) -> None:
    for make in (op.dense, op.channels_last):
        args = batch_norm_eca_add_act_arguments(make, with_all, act)
        for needed in (False, True):
            inputs = [a.requires_grad_(needed) if isinstance(a, Tensor) else a for a in args]
            torch.library.opcheck(torch.ops.ecanet.batch_norm_eca_add_act.default, inputs)


@pytest.mark.parametrize("act", [op.NONE, op.SILU])
def test_gradcheck_of_the_tail_in_training(act) -> None:
    args = batch_norm_eca_add_act_arguments(op.dense, True, act)
    wanted = [i for i, a in enumerate(args) if isinstance(a, Tensor)]

    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(wanted, tensors, strict=True))
        return torch.ops.ecanet.batch_norm_eca_add_act(*(given.get(i, a) for i, a in enumerate(args)))[0]

    assert gradcheck(function, [args[i].requires_grad_() for i in wanted])
