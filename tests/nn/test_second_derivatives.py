"""Gradients of gradients (gradient penalties, implicit and meta learning) through gates and tails."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import ecanet
from ecanet.nn import ECA, GATES, SE, Gate, build_gate, norm_gate_add_act
from ecanet.nn.attached import attach_
from tests.kernels_here import needs_kernels

C = 16
ACTS = [None, "relu", "relu6", "silu", "hardswish", nn.GELU()]
NORMS: dict[str, Any] = {
    "no norm": lambda: None,
    "training": lambda: nn.BatchNorm2d(C),
    "evaluation": lambda: nn.BatchNorm2d(C).eval(),
    "not affine": lambda: nn.BatchNorm2d(C, affine=False),
    "no running statistics": lambda: nn.BatchNorm2d(C, track_running_stats=False),
}


def randomised(norm: Any) -> Any:
    if norm is not None and norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return norm if norm is None else norm.double()


def gradients(backend: str, f: Any, inputs: list[Tensor], order: int = 2) -> list[Tensor]:
    """First, second and so on: of a scalar of f, of a scalar of its gradients, and so on."""
    found: list[Tensor] = []
    with ecanet.backend(backend):
        y = f()
        for i in range(order):
            grads = torch.autograd.grad(
                y.sin().sum() if i == 0 else y, inputs, create_graph=i < order - 1, allow_unused=True
            )
            found += [torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True)]
            y = sum(g.square().sum() for g in grads if g is not None)
    return found


def assert_alike(f: Any, inputs: list[Tensor], order: int = 2, tolerance: float = 1e-9) -> None:
    got, want = (gradients(backend, f, inputs, order) for backend in ("auto", "reference"))
    assert max(float(w.detach().abs().max()) for w in want[len(inputs) :]) > 1e-6
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance)


def map_of(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shape", [(3, C, 4, 5), (3, C), (2, C, 7), (2, C, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("name", [name for name in GATES if name != "srm"])  # whose norm keeps more than weights
def test_a_gate_alone(name, shape) -> None:
    gate, x = build_gate(name, C).double(), map_of(*shape)
    gate.factor = 2.0
    assert_alike(lambda: gate(x), [x, *gate.parameters()])


@pytest.mark.parametrize("name", ["eca", "se"])
def test_a_gate_alone_passes_gradgradcheck(name) -> None:
    gate = build_gate(name, 4).double()
    assert torch.autograd.gradgradcheck(gate, (map_of(2, 4, 3, 2),))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("gate", [None, "eca", "se", "se_var1", "eca_ns"], ids=str)
def test_a_tail(gate, act, norm) -> None:
    norm, module = randomised(NORMS[norm]()), None if gate is None else build_gate(gate, C).double()
    x, residual = map_of(3, C, 4, 5), map_of(3, C, 4, 5)
    parameters = [p for m in (norm, module) if m is not None for p in m.parameters()]
    if norm is None and module is None and act in (None, "relu", "relu6"):
        act = "silu"  # the others have no second derivative
    assert_alike(lambda: norm_gate_add_act(x, norm, module, residual, act), [x, residual, *parameters])


@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("gate", ["eca", "se"])
def test_third_derivatives(gate, act) -> None:
    module, x = build_gate(gate, C).double(), map_of(3, C, 4, 5)  # torch's batch_norm itself has none
    assert_alike(lambda: norm_gate_add_act(x, None, module, x, act), [x, *module.parameters()], 3, tolerance=1e-7)


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_a_residual_that_is_computed_from_x_and_a_gate_that_is_used_twice(act) -> None:
    norm, gate, x = randomised(nn.BatchNorm2d(C)), SE(C, 4).double(), map_of(3, C, 4, 5)

    def two_tails() -> Tensor:
        y = norm_gate_add_act(x, norm, gate, 0.5 * x, act)
        return norm_gate_add_act(y, norm, gate, y, act)

    assert_alike(two_tails, [x, *norm.parameters(), *gate.parameters()])


def test_a_gate_that_hangs_on_the_norm() -> None:
    norm, x = randomised(nn.BatchNorm2d(C)), map_of(3, C, 4, 5)
    attach_(norm, ECA(C).double())
    assert_alike(lambda: norm_gate_add_act(x, norm, None, x, "relu"), [x, *norm.parameters()])


@pytest.mark.parametrize("gate", ["eca", "se"])
def test_a_step_of_meta_learning_through_functional_call(gate) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.gate = nn.BatchNorm2d(C), build_gate(gate, C)

        def forward(self, x: Tensor) -> Tensor:
            return norm_gate_add_act(x, self.norm, self.gate, x, "silu")

    model, x = Network().double(), map_of(3, C, 4, 5)
    weights = dict(model.named_parameters())

    def outer_loss(backend: str) -> list[Tensor]:
        with ecanet.backend(backend):
            inner = torch.func.functional_call(model, weights, (x,)).square().mean()
            grads = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
            stepped = {n: p - 0.5 * g for (n, p), g in zip(weights.items(), grads, strict=True)}
            again = torch.func.functional_call(model, stepped, (x,)).square().mean()
            second = torch.autograd.grad(again, list(stepped.values()), create_graph=True)
            loss = again + sum(g.square().sum() for g in second)
        return list(torch.autograd.grad(loss, list(weights.values())))

    for got, want in zip(outer_loss("auto"), outer_loss("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_penalty_of_a_critic_in_smaller_types(dtype) -> None:
    gate, x = ECA(C).to(dtype), torch.randn(3, C, 4, 5).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        [g] = torch.autograd.grad(gate(x).float().square().sum(), x, create_graph=True)
    penalty = (g.float().flatten(1).norm(dim=1) - 1).square().mean()
    penalty.backward()
    assert x.grad.dtype == dtype
    assert gate.conv.weight.grad.abs().max() > 0


class WithDropout(Gate):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.ones(channels))

    def logits(self, s: Tensor) -> Tensor:
        return torch.dropout(s * self.weight, 0.5, True)


class WithAverage(Gate):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.ones(channels))
        self.average: Tensor
        self.register_buffer("average", torch.zeros(channels))

    def logits(self, s: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * s.detach().mean(0)
        return s * self.weight + self.average


class Pruned(ecanet.nn.SEVar2):
    """Its weight is computed before each call, from another."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        prune.random_unstructured(self, "weight", amount=0.5)


@pytest.mark.parametrize("make", [WithDropout, WithAverage, Pruned])
@pytest.mark.parametrize("what", ["gate", "tail"])
@needs_kernels
def test_what_cannot_be_differentiated_twice_is_named_with_the_remedy(what, make) -> None:
    gate, x = make(C), torch.randn(3, C, 4, 5, requires_grad=True)
    norm = None if what == "gate" else nn.BatchNorm2d(C)
    y = norm_gate_add_act(x, norm, gate)
    message = rf"fused ({what}|gate) cannot be differentiated twice.* gate .*ecanet\.backend\('reference'\)"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with ecanet.backend("reference"):
        [g] = torch.autograd.grad(norm_gate_add_act(x, norm, gate).square().sum(), x, create_graph=True)
        g.sum().backward()


def test_weights_that_changed_since_the_forward_pass_are_an_error() -> None:
    gate, x = SE(C, 4), torch.randn(3, C, 4, 5, requires_grad=True)
    y = gate(x)
    with torch.no_grad():
        gate.fc1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


class Random(Gate):
    """1/2 whatever is dropped, as long as the weights are 0."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.zeros(channels))

    def logits(self, s: torch.Tensor) -> torch.Tensor:
        return self.weight * nn.functional.dropout(s, 0.5, self.training)


@needs_kernels
def test_a_gate_that_draws_random_numbers_says_so() -> None:
    gate = Random(8).double()
    y = gate(torch.rand(2, 8, 3, 2, dtype=torch.float64) + 1)
    if ecanet.ops.cpu.why_not() is None:
        with pytest.raises(RuntimeError, match="its Random gate draws random numbers"):
            torch.autograd.grad(y.sum(), gate.weight, create_graph=True)
