"""The plain-PyTorch operations against float64 loops written from the equations."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ecanet.ops import reference

DOUBLE = {"dtype": torch.float64}

# Relative error allowed where the maths runs in that type.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}


def test_uninitialised_memory_is_nan_in_every_test() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(3, dtype=torch.float16)).isnan().all()


# --- the equations in loops ---------------------------------------------------------------------------------------


def loop_squeeze(x: Tensor) -> Tensor:
    n, c = x.shape[:2]
    rows = [[x[i, j].double().flatten().tolist() for j in range(c)] for i in range(n)]
    return torch.tensor([[math.fsum(values) / len(values) for values in row] for row in rows], **DOUBLE)


def loop_scale(x: Tensor, gate: Tensor) -> Tensor:
    out = torch.full(x.shape, math.nan, **DOUBLE)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[i, j] = x[i, j].double() * gate[i, j].item()
    return out


def loop_band(s: Tensor, weight_of: Callable[[int, int], float], k: int, circular: bool) -> Tensor:
    """``weight_of(i, t)`` is the weight with which channel i + t - (k - 1) / 2 enters channel i."""
    n, c = s.shape
    out = torch.full((n, c), math.nan, **DOUBLE)
    for sample in range(n):
        for i in range(c):
            total = 0.0
            for t in range(k):
                j = i + t - (k - 1) // 2
                if circular:
                    total += weight_of(i, t) * s[sample, j % c].item()
                elif 0 <= j < c:
                    total += weight_of(i, t) * s[sample, j].item()
            out[sample, i] = total
    return out


def loop_grouped_linear(s: Tensor, weight: Tensor) -> Tensor:
    groups, d, inside = weight.shape
    out = torch.zeros(s.shape[0], groups * d, **DOUBLE)
    for sample in range(s.shape[0]):
        for g in range(groups):
            for o in range(d):
                for i in range(inside):
                    out[sample, g * d + o] += weight[g, o, i].item() * s[sample, g * inside + i].item()
    return out


# --- every operation, contiguous and not --------------------------------------------------------------------------


def dense(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def strided(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same shape, transposed and with holes: dense in no order of its dimensions."""
    base = torch.randn(*[2 * n for n in reversed(shape)], device=device, dtype=dtype)
    view = base[tuple(slice(None, None, 2) for _ in shape)].permute(*reversed(range(len(shape))))
    assert view.shape == shape
    return view


layouts = pytest.mark.parametrize("make", [dense, strided], ids=["contiguous", "strided"])
paddings = pytest.mark.parametrize("circular", [False, True], ids=["zeros", "circular"])
maps = pytest.mark.parametrize("spatial", [(), (1,), (7,), (3, 5), (2, 3, 4)], ids=str)


def assert_matches(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert got.shape == want.shape
    torch.testing.assert_close(got.double().cpu(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@layouts
@maps
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_squeeze_is_the_mean_over_all_positions(spatial, make, dtype, device) -> None:
    x = make(3, 4, *spatial, device=device, dtype=dtype)
    assert_matches(reference.squeeze(x, channels=4), loop_squeeze(x), dtype)


@maps
def test_squeeze_of_a_half_type_is_exact_to_float32(spatial, device) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = (100 + torch.randn(3, 4, *spatial, device=device)).to(dtype)
        assert_matches(reference.squeeze(x, channels=4), loop_squeeze(x), torch.float32)


def test_squeeze_of_many_large_float16_values_does_not_overflow(device) -> None:
    x = torch.full((1, 1, 64, 64), 60000.0, device=device, dtype=torch.float16)
    assert reference.squeeze(x, channels=1).item() == x[0, 0, 0, 0].item()


@layouts
@maps
def test_scale_multiplies_every_map_by_its_gate(spatial, make, device) -> None:
    x, gate = make(3, 4, *spatial, device=device, **DOUBLE), make(3, 4, device=device, **DOUBLE)
    assert_matches(reference.scale(x, gate), loop_scale(x, gate), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_scale_keeps_a_half_type_and_rounds_the_gate_to_it(dtype, device) -> None:
    x, gate = torch.randn(3, 4, 5, device=device, dtype=dtype), torch.rand(3, 4, device=device)
    out = reference.scale(x, gate)
    assert out.dtype == dtype
    assert torch.equal(out.double().cpu(), loop_scale(x, gate.to(dtype)).to(dtype).double())


@layouts
@paddings
@pytest.mark.parametrize(("channels", "k"), [(1, 1), (8, 3), (7, 7)], ids=str)
def test_band_is_a_centred_convolution_over_the_channels(channels, k, circular, make, device) -> None:
    s = make(3, channels, device=device, **DOUBLE)
    weight = make(1, 1, k, device=device, **DOUBLE)
    want = loop_band(s, lambda i, t: weight[0, 0, t].item(), k, circular)
    assert_matches(reference.band(s, weight, circular), want, torch.float64)


@layouts
@paddings
@pytest.mark.parametrize(("channels", "k"), [(1, 1), (8, 3), (7, 7)], ids=str)
def test_band_non_shared_has_a_row_of_weights_for_every_channel(channels, k, circular, make, device) -> None:
    s = make(3, channels, device=device, **DOUBLE)
    weight = make(channels, k, device=device, **DOUBLE)
    want = loop_band(s, lambda i, t: weight[i, t].item(), k, circular)
    assert_matches(reference.band_non_shared(s, weight, circular), want, torch.float64)


@pytest.mark.parametrize(("channels", "k"), [(1, 3), (2, 7), (4, 9)], ids=str)
def test_a_band_wider_than_the_channels_sees_zeros_outside(channels, k, device) -> None:
    s, weight = torch.randn(3, channels, device=device), torch.randn(channels, k, device=device)
    want = loop_band(s, lambda i, t: weight[i, t].item(), k, circular=False)
    assert_matches(reference.band_non_shared(s, weight), want, torch.float32)
    want = loop_band(s, lambda i, t: weight[0, t].item(), k, circular=False)
    assert_matches(reference.band(s, weight[0].reshape(1, 1, k)), want, torch.float32)


@layouts
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 3), (4, 2, 3), (6, 1, 1)], ids=str)
def test_grouped_linear_is_a_block_diagonal_matrix(shape, make, device) -> None:
    s = make(3, shape[0] * shape[2], device=device, **DOUBLE)
    weight = make(*shape, device=device, **DOUBLE)
    assert_matches(reference.grouped_linear(s, weight), loop_grouped_linear(s, weight), torch.float64)


# --- what holds for all of them -----------------------------------------------------------------------------------

# Every operation with shapes for n samples of 6 channels.
OPERATIONS = {
    "squeeze 0-D": (lambda x: reference.squeeze(x, 6), lambda n: [(n, 6)]),
    "squeeze 2-D": (lambda x: reference.squeeze(x, 6), lambda n: [(n, 6, 2, 3)]),
    "scale 0-D": (reference.scale, lambda n: [(n, 6), (n, 6)]),
    "scale 2-D": (reference.scale, lambda n: [(n, 6, 2, 3), (n, 6)]),
    "check_means": (lambda s: reference.check_means(s, 6), lambda n: [(n, 6)]),
    "band": (reference.band, lambda n: [(n, 6), (1, 1, 3)]),
    "band circular": (lambda s, w: reference.band(s, w, True), lambda n: [(n, 6), (1, 1, 5)]),
    "band_non_shared": (reference.band_non_shared, lambda n: [(n, 6), (6, 3)]),
    "band_non_shared circular": (lambda s, w: reference.band_non_shared(s, w, True), lambda n: [(n, 6), (6, 5)]),
    "grouped_linear": (reference.grouped_linear, lambda n: [(n, 6), (2, 4, 3)]),
}
operations = pytest.mark.parametrize(("operation", "shapes"), OPERATIONS.values(), ids=OPERATIONS)


@operations
def test_first_and_second_derivatives(operation, shapes, device) -> None:
    inputs = [torch.randn(shape, device=device, **DOUBLE, requires_grad=True) for shape in shapes(2)]
    assert gradcheck(operation, inputs)
    assert gradgradcheck(operation, inputs)


@operations
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients_of_the_weights(operation, shapes, device) -> None:
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes(0)]
    out = operation(*inputs)
    assert out.shape[0] == 0
    assert out.shape[1:] == operation(*[torch.randn(shape, device=device) for shape in shapes(2)]).shape[1:]
    out.sum().backward()
    for tensor in inputs:
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@operations
def test_the_inputs_are_not_written_to(operation, shapes, device) -> None:
    inputs = [torch.randn(shape, device=device) for shape in shapes(2)]
    before = [tensor.clone() for tensor in inputs]
    operation(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


class EveryOperation(torch.nn.Module):
    def forward(self, x: Tensor, shared: Tensor, rows: Tensor, blocks: Tensor) -> Tensor:
        s = reference.check_means(reference.squeeze(x, 6), 6)
        s = reference.band(s, shared) + reference.band_non_shared(s, rows) + reference.grouped_linear(s, blocks)
        return reference.scale(x, s)


def test_fx_keeps_every_operation_in_one_piece() -> None:
    model = EveryOperation()
    traced = torch.fx.symbolic_trace(model)
    called = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    names = ["squeeze", "check_means", "band", "band_non_shared", "grouped_linear", "scale"]
    assert {getattr(reference, name) for name in names} <= called
    inputs = [torch.randn(shape) for shape in [(2, 6, 3, 3), (1, 1, 3), (6, 3), (2, 3, 3)]]
    assert torch.equal(traced(*inputs), model(*inputs))


@pytest.mark.parametrize(
    ("dtype", "accumulation"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_accumulation_dtype(dtype, accumulation) -> None:
    assert reference.accumulation_dtype(dtype) == accumulation
