"""Values, gradients and statistics of the tail are those of its modules called one after another."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from tails import (
    LAYOUTS,
    TOLERANCE,
    C,
    Tail,
    assert_as_one_after_another,
    assert_equal,
    both_layouts,
    build,
    feature_map,
    plain,
    randomise_,
    step,
)
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from ecanet.nn import ECA, SE, explain, norm_gate_add_act
from tests.kernels_here import needs_kernels

NORMS: dict[str, Callable[[], nn.Module | None]] = {
    "none": lambda: None,
    "BatchNorm2d": lambda: nn.BatchNorm2d(C),
    "large eps": lambda: nn.BatchNorm2d(C, eps=0.3),
    "cumulative average": lambda: nn.BatchNorm2d(C, momentum=None),
    "momentum 0": lambda: nn.BatchNorm2d(C, momentum=0.0),
    "momentum 1": lambda: nn.BatchNorm2d(C, momentum=1.0),
    "not affine": lambda: nn.BatchNorm2d(C, affine=False),
    "no bias": lambda: without_bias(nn.BatchNorm2d(C)),
    "no running statistics": lambda: nn.BatchNorm2d(C, track_running_stats=False),
    "evaluation": lambda: nn.BatchNorm2d(C).eval(),
    "evaluation, not affine": lambda: nn.BatchNorm2d(C, affine=False).eval(),
    "evaluation, no running statistics": lambda: nn.BatchNorm2d(C, track_running_stats=False).eval(),
    "frozen weights": lambda: nn.BatchNorm2d(C).requires_grad_(False),
    "FrozenBatchNorm2d": lambda: FrozenBatchNorm2d(C),
    "SyncBatchNorm of one process": lambda: nn.SyncBatchNorm(C),
    "GroupNorm": lambda: nn.GroupNorm(4, C),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(C, affine=True, track_running_stats=True),
}


def without_bias(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.bias = None
    return norm


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "with residual"])
@pytest.mark.parametrize("gate", [None, "eca", "se"], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_three_steps_with_every_norm(name, gate, residual) -> None:
    for layout in LAYOUTS.values():
        norm, gate_module = randomise_(NORMS[name]()), build(gate)
        tail = Tail(norm, gate_module, "relu").double()
        x = feature_map(3, C, 5, 4, layout=layout, dtype=torch.float64)
        assert_as_one_after_another(tail, x, torch.randn_like(x) if residual else None, steps=3)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d, (5, C)),
        (nn.BatchNorm1d, (3, C, 7)),
        (nn.BatchNorm2d, (3, C, 5, 4)),
        (nn.BatchNorm2d, (2, C, 1, 1)),
        (nn.BatchNorm2d, (1, C, 3, 1)),
        (nn.BatchNorm3d, (2, C, 3, 2, 5)),
        (nn.SyncBatchNorm, (5, C)),
    ],
    ids=lambda part: part.__name__ if isinstance(part, type) else str(part),
)
@pytest.mark.parametrize("gate", [None, "eca", "se"], ids=str)
def test_every_rank(norm, shape, gate) -> None:
    for layout, training in itertools.product(LAYOUTS.values(), [True, False]):
        gate_module = build(gate)
        tail = Tail(randomise_(norm(C)), gate_module, "relu").double().train(training)
        x = feature_map(*shape, layout=layout, dtype=torch.float64)
        assert_as_one_after_another(tail, x, torch.randn_like(x))


@both_layouts
def test_a_norm_that_starts_at_zero_learns(layout) -> None:
    """``zero_init_residual`` of ResNets: with gamma = 0 the output knows nothing of x, gamma's gradient must."""
    norm = nn.BatchNorm2d(C)
    nn.init.zeros_(norm.weight)
    for gate in (None, ECA(C), SE(C)):
        tail = Tail(copy.deepcopy(norm), gate, "relu").double()
        x = feature_map(3, C, 5, 4, layout=layout, dtype=torch.float64)
        assert_as_one_after_another(tail, x, torch.randn_like(x))
        assert tail.norm.weight.grad.abs().min() > 0


@both_layouts
def test_evaluation_leaves_the_norm_as_it_is(layout) -> None:
    norm = randomise_(nn.BatchNorm2d(C)).eval()
    before = copy.deepcopy(norm.state_dict())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            norm_gate_add_act(feature_map(2, C, 4, 4, layout=layout), norm, ECA(C))
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("gate", [None, "eca", "se", "se_var1"], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_without_gradients_the_values_and_the_statistics_are_the_same(gate, training, mode) -> None:
    for layout, name in itertools.product(LAYOUTS.values(), ["BatchNorm2d", "none", "cumulative average"]):
        gate_module = build(gate)
        tail = Tail(randomise_(NORMS[name]()), gate_module, "relu").double().train(training)
        other = plain(tail)
        with mode():
            x = feature_map(3, C, 5, 4, layout=layout, dtype=torch.float64)
            residual = torch.randn_like(x)
            got, want = tail(x, residual), other(x, residual)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dict(tail.named_buffers()), dict(other.named_buffers()), rtol=1e-12, atol=1e-12)


def test_a_norm_that_does_not_count_its_batches() -> None:
    norm = nn.BatchNorm2d(C)
    norm.num_batches_tracked = None  # of state dicts older than the counter
    assert_as_one_after_another(Tail(norm.double(), ECA(C).double()), feature_map(2, C, 3, 3, dtype=torch.float64))


class Softsign(nn.Module):
    """An activation that nobody knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.abs())


ACTS = [
    None,
    *("relu", "relu6", "silu", "hardswish"),
    *(nn.Identity(), nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(inplace=True), nn.SiLU(), nn.SiLU(inplace=True)),
    *(nn.Hardswish(), nn.Hardswish(inplace=True), nn.GELU(), nn.LeakyReLU(0.1), nn.PReLU(), Softsign()),
]


@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("gate", [None, "eca", "se"], ids=str)
def test_every_activation(act, gate) -> None:
    for layout, norm in itertools.product(LAYOUTS.values(), [nn.BatchNorm2d(C), None]):
        gate_module = build(gate)
        tail = Tail(norm, gate_module, copy.deepcopy(act)).double()
        x = 3 * feature_map(3, C, 5, 4, layout=layout, dtype=torch.float64)
        if norm is None and gate is None and getattr(act, "inplace", False):
            continue  # it would write into x
        assert_as_one_after_another(tail, x)
        assert_as_one_after_another(tail, x, 3 * torch.randn_like(x))


@both_layouts
@pytest.mark.parametrize(
    ("name", "make"),
    {
        "as x": lambda x: torch.randn_like(x),
        "contiguous": lambda x: torch.randn(x.shape, dtype=x.dtype),
        "channels last": lambda x: torch.randn(x.shape, dtype=x.dtype).to(memory_format=torch.channels_last),
        "one map for all samples": lambda x: torch.randn(1, *x.shape[1:], dtype=x.dtype),
        "one number per channel": lambda x: torch.randn(x.shape[1], 1, 1, dtype=x.dtype),
        "expanded": lambda x: torch.randn(x.shape[1], 1, 1, dtype=x.dtype).expand(x.shape),
        "of a larger type": lambda x: torch.randn_like(x, dtype=torch.float64),
        "of a smaller type": lambda x: torch.randn_like(x, dtype=torch.bfloat16),
        "a slice": lambda x: torch.randn(3 * x.shape[0], *x.shape[1:], dtype=x.dtype)[::3],
    }.items(),
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_every_residual(name, make, layout) -> None:
    for gate in (None, ECA(C), SE(C)):
        tail = Tail(nn.BatchNorm2d(C), gate, "relu")
        x = feature_map(3, C, 5, 4, layout=layout)
        other, dout = plain(tail), torch.randn(x.shape)
        residual = make(x)
        assert_equal(step(tail, x, residual, dout), step(other, x, residual, dout), TOLERANCE[torch.float32])


@needs_kernels
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_a_parameter_is_a_residual_as_any_tensor(act) -> None:
    x, dout = feature_map(3, C, 5, 4), torch.randn(3, C, 5, 4)
    tail = Tail(nn.BatchNorm2d(C), ECA(C), act)
    residual = nn.Parameter(torch.randn(x.shape))
    assert "(norm, gate, residual, " in explain(x, tail.norm, tail.gate, residual, act)
    got = torch.autograd.grad(tail(x, residual), residual, dout)
    want = torch.autograd.grad(plain(tail)(x, residual), residual, dout)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_weight_of_another_shape_that_torch_takes_is_taken(name, training) -> None:
    norm, x = nn.BatchNorm2d(C).train(training), feature_map(3, C, 5, 4)
    setattr(norm, name, nn.Parameter(torch.randn(1, C)))
    tail = Tail(norm, ECA(C), "relu")
    want = plain(tail)(x, x)  # torch has no gradients of it
    torch.testing.assert_close(tail(x, x), want)


@pytest.mark.parametrize("gate", [None, "eca", "se"], ids=str)
@pytest.mark.parametrize("act", [None, "relu", "silu"], ids=str)
def test_only_what_requires_a_gradient_gets_one(gate, act) -> None:
    x, residual = feature_map(3, C, 5, 4, dtype=torch.float64), torch.randn(3, C, 5, 4, dtype=torch.float64)
    for training, x_needs, residual_needs, weights_need in itertools.product([True, False], repeat=4):
        gate_module = build(gate)
        tail = Tail(nn.BatchNorm2d(C), gate_module, act).double().train(training).requires_grad_(weights_need)
        grads = []
        for module in (tail, plain(tail)):
            inputs = [x.clone().requires_grad_(x_needs), residual.clone().requires_grad_(residual_needs)]
            out = module(*inputs)
            assert out.requires_grad == (x_needs or residual_needs or weights_need)
            if out.requires_grad:
                out.square().sum().backward()
            grads.append([t.grad for t in (*inputs, *module.parameters())])
        assert [g is None for g in grads[0]] == [g is None for g in grads[1]]
        for got, want in zip(*grads, strict=True):
            if want is not None:
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_x_may_be_its_own_residual() -> None:
    for act in ("relu", "silu", None):
        tail = Tail(nn.BatchNorm2d(C), ECA(C), act).double()
        other = plain(tail)
        x = feature_map(3, C, 5, 4, dtype=torch.float64).requires_grad_()
        (got,), (want,) = (torch.autograd.grad(m(x, x).square().sum(), x) for m in (tail, other))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_nothing_to_do_is_the_map_itself() -> None:
    x = torch.randn(2, C, 3, 3)
    assert norm_gate_add_act(x) is x
    assert torch.equal(norm_gate_add_act(x, act="relu"), x.relu())
    assert torch.equal(norm_gate_add_act(x, residual=x), 2 * x)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, ::2, 1:],
        lambda x: x.transpose(2, 3),
        lambda x: x.chunk(2, dim=0)[1],
        lambda x: x[:, :, :1, :1].expand_as(x),
        lambda x: x.to(memory_format=torch.channels_last)[:, :, 1:],
    ],
    ids=["sliced", "transposed", "half of the batch", "expanded", "rows of channels last"],
)
def test_any_strides(view) -> None:
    tail = Tail(nn.BatchNorm2d(C), ECA(C), "relu").double()
    other = plain(tail)
    base = feature_map(4, C, 5, 4, dtype=torch.float64).requires_grad_()
    (got,), (want,) = (torch.autograd.grad(m(view(base), view(base)).square().sum(), base) for m in (tail, other))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_an_empty_batch() -> None:
    tail = Tail(nn.BatchNorm2d(C).eval(), ECA(C), "relu")
    x = torch.randn(0, C, 4, 4, requires_grad=True)
    out = tail(x, x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape


def nan_places() -> Iterator[tuple[int, ...]]:
    yield from [(0, 0, 0, 0), (1, 3, 2, 1), (2, C - 1, 4, 3)]


@both_layouts
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("gate", [None, "eca", "se_var1"], ids=str)
@pytest.mark.parametrize("norm", ["BatchNorm2d", "evaluation", "none"])
def test_nan_and_inf_reach_what_they_reach_in_the_modules(norm, gate, value, layout) -> None:
    for place in nan_places():
        gate_module = build(gate)
        tail = Tail(NORMS[norm](), gate_module, "relu")
        x = feature_map(3, C, 5, 4, layout=layout)
        x[place] = value
        other = plain(tail)
        got, want = step(tail, x, x), step(other, x, x)
        for name, w in want.items():
            if w is not None and name in ("output", "norm.running_mean", "norm.running_var"):
                torch.testing.assert_close(got[name], w, rtol=1e-4, atol=1e-4, equal_nan=True, msg=f"{name} {place}")
