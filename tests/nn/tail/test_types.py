"""The tail in smaller types, under autocast and in mixed precision."""

import contextlib
import itertools

import pytest
import torch
from tails import (
    LAYOUTS,
    TOLERANCE,
    C,
    Tail,
    assert_equal,
    both_layouts,
    build,
    feature_map,
    plain,
    randomise_,
    relative_error,
    step,
)
from torch import Tensor, nn

import ecanet
from ecanet.nn import ECA, Gate


@pytest.mark.parametrize("weights", ["of the type of x", "of float32"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("gate", [None, "eca", "se"], ids=str)
def test_smaller_types_are_as_close_to_float64_as_the_modules_are(gate, dtype, weights) -> None:
    for layout, act, training in itertools.product(LAYOUTS.values(), [None, "silu"], [True, False]):
        norm, gate_module = randomise_(nn.BatchNorm2d(C)), build(gate)
        tail = Tail(norm, gate_module, act).train(training)
        tail = tail.to(dtype) if weights == "of the type of x" else tail
        x = feature_map(4, C, 7, 7, layout=layout).to(dtype)
        residual, dout = torch.randn_like(x), torch.randn_like(x)
        exact = plain(tail).double()
        other = plain(tail)
        got, modules = step(tail, x, residual, dout), step(other, x, residual, dout)
        want = step(exact, x.double(), residual.double(), dout.double())
        for name, w in want.items():
            if w is None or not w.is_floating_point():
                continue
            assert (got[name].shape, got[name].dtype) == (modules[name].shape, modules[name].dtype), name
            error, error_of_modules = (relative_error(t[name], w) for t in (got, modules))
            assert error <= 1.5 * error_of_modules + TOLERANCE[dtype], f"{name}: {error:.1e}, {error_of_modules:.1e}"


def test_under_autocast_the_maps_stay_in_bfloat16() -> None:
    conv, tail = nn.Conv2d(3, C, 3), Tail(nn.BatchNorm2d(C), ECA(C), "silu")
    other = plain(tail)
    x = torch.randn(3, 3, 8, 8)
    results = []
    for module in (tail, other):
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(x)
            out = module(y, y)
        assert y.dtype == out.dtype == torch.bfloat16
        grads = torch.autograd.grad(out.float().square().sum(), [conv.weight, *module.parameters()])
        assert {g.dtype for g in grads} == {torch.float32}
        results.append({"output": out, **{str(i): g for i, g in enumerate(grads)}})
    assert_equal(*results, 2 * TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("gate", ["se", "se_var3", "eca_ns", "eca"])
def test_autocast_does_not_reach_the_gate(gate) -> None:
    tail = Tail(nn.BatchNorm2d(C), build(gate), "relu")
    x = feature_map(3, C, 5, 4).requires_grad_()
    inputs = [x, *tail.parameters()]
    want = tail(x, x)
    with torch.autocast("cpu", torch.bfloat16):
        got = tail(x, x)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (got, want)]
    torch.testing.assert_close(*grads)


class GateThatAutocastWouldRound(Gate):
    """Linear, by a function that autocast rounds."""

    def __init__(self, channels: int, rounds: bool = False) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.randn(channels, channels))
        self.rounds = rounds

    def logits(self, s: Tensor) -> Tensor:
        with torch.autocast(s.device.type, torch.bfloat16) if self.rounds else contextlib.nullcontext():
            return nn.functional.linear(s, self.weight)


@pytest.mark.parametrize("how", ["eager", "reference", "compiled"])
@pytest.mark.parametrize("rounds", [False, True], ids=["", "its own autocast"])
def test_autocast_reaches_a_gate_of_ones_own_only_from_within(rounds, how) -> None:
    torch._dynamo.reset()
    tail = Tail(nn.BatchNorm2d(C), GateThatAutocastWouldRound(C, rounds), "relu")
    run = torch.compile(tail, backend="eager") if how == "compiled" else tail
    x = feature_map(3, C, 5, 4).requires_grad_()
    want = plain(tail)(x, x)
    with torch.autocast("cpu", torch.bfloat16), ecanet.backend("reference" if how == "reference" else "auto"):
        got = run(x, x)
    assert relative_error(got, want) <= TOLERANCE[torch.float32]
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (got, want)]
    assert relative_error(*grads) <= TOLERANCE[torch.bfloat16 if rounds else torch.float32]


def train_in_float16(
    backend: str, gate: str, scaler: torch.amp.GradScaler, steps: int
) -> tuple[list[float], list[Tensor]]:
    """Losses of a small network under autocast, and its weights before the first step and after each."""
    torch.manual_seed(0)
    network = ecanet.models.small_eca_resnet(gate, widths=[8, 16], num_classes=4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    x, target = torch.randn(16, 3, 12, 12), torch.randint(4, (16,))
    losses, weights = [], [nn.utils.parameters_to_vector(network.parameters()).detach()]
    with ecanet.backend(backend):
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.cross_entropy(network(x), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
            weights.append(nn.utils.parameters_to_vector(network.parameters()).detach())
    return losses, weights


def assert_trained_alike(got: tuple[list[float], list[Tensor]], want: tuple[list[float], list[Tensor]]) -> None:
    """Losses up to what float16 rounds; weights up to 3 % of their way: gradients add up many roundings."""
    assert got[0] == pytest.approx(want[0], rel=2**-12)
    assert torch.equal(got[1][0], want[1][0])
    moved = want[1][-1] - want[1][0]
    assert moved.norm() > 0.1
    assert (got[1][-1] - want[1][-1]).norm() <= 2**-5 * moved.norm()


@pytest.mark.parametrize("gate", ["eca", "se"])
def test_training_in_float16_with_scaled_gradients_follows_the_reference(gate) -> None:
    runs = [
        train_in_float16(backend, gate, torch.amp.GradScaler("cpu", init_scale=2.0**10), steps=5)
        for backend in ("auto", "reference")
    ]
    assert_trained_alike(*runs)
    losses = runs[0][0]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("gate", ["eca", "se"])
def test_gradients_that_overflow_are_seen_by_the_scaler_which_leaves_out_the_step(gate) -> None:
    runs = []
    for backend in ("auto", "reference"):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
        runs.append(train_in_float16(backend, gate, scaler, steps=4))
        assert scaler.get_scale() == 2.0**10  # lowered once
    before, skipped, after = runs[0][1][:3]
    assert torch.equal(skipped, before)
    assert not torch.equal(after, before)
    assert_trained_alike(*runs)


@both_layouts
@pytest.mark.parametrize("gate", [None, "eca", "se"], ids=str)
def test_a_mean_much_larger_than_the_deviation_costs_no_more_digits_than_the_modules_lose(gate, layout) -> None:
    tail = Tail(nn.BatchNorm2d(C), build(gate))
    exact, other = plain(tail).double(), plain(tail)
    x = (1000 + torch.randn(4, C, 14, 14)).contiguous(memory_format=layout)
    dout = torch.randn_like(x)
    got, modules, want = step(tail, x, None, dout), step(other, x, None, dout), step(exact, x.double(), None, dout)
    for name in (name for name in want if want[name] is not None and want[name].is_floating_point()):
        error, error_of_modules = (relative_error(t[name], want[name]) for t in (got, modules))
        assert error <= 2 * error_of_modules + TOLERANCE[torch.float32], f"{name}: {error:.1e}, {error_of_modules:.1e}"
