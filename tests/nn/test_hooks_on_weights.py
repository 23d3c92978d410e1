"""Hooks on a gate's weights run once a backward, as in the modules called one after another."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ecanet
from ecanet.nn import GATES, Gate, build_gate, norm_gate_add_act

C = 32
GATES_WITH_WEIGHTS = [name for name in GATES if any(True for _ in build_gate(name, C).parameters())]


def step(gate: nn.Module, fused: bool) -> tuple[list[int], list[torch.Tensor]]:
    """How often each weight's hook ran, which doubles the gradient, and the gradients."""
    norm, calls = nn.BatchNorm2d(C).double(), []
    for i, parameter in enumerate(gate.parameters()):
        parameter.register_hook(lambda grad, i=i: calls.append(i) or 2 * grad)
    x = torch.randn(3, C, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with ecanet.backend("auto" if fused else "reference"):
        norm_gate_add_act(x, norm, gate, x, "relu").square().sum().backward()
    return sorted(calls), [parameter.grad for parameter in gate.parameters()]


@pytest.mark.parametrize("name", GATES_WITH_WEIGHTS)
def test_a_hook_on_a_weight_runs_once_and_changes_the_gradient_once(name) -> None:
    gate = build_gate(name, C).double()
    calls, grads = step(copy.deepcopy(gate), fused=True)
    want_calls, want = step(gate, fused=False)
    assert calls == want_calls == [*range(len(want))]
    torch.testing.assert_close(grads, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", GATES_WITH_WEIGHTS)
def test_a_hook_on_several_weights_at_once_runs_once(name) -> None:
    gate, seen = build_gate(name, C), []
    torch.autograd.graph.register_multi_grad_hook(tuple(gate.parameters()), seen.append)
    gate(torch.randn(2, C, 3, 3)).sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize("name", GATES_WITH_WEIGHTS)
def test_where_the_gradient_of_x_alone_is_asked_for_no_hook_on_a_weight_runs(name) -> None:
    gate, seen = build_gate(name, C), []
    for parameter in gate.parameters():
        parameter.register_hook(seen.append)
    x = torch.randn(2, C, 3, 3, requires_grad=True)
    torch.autograd.grad(gate(x).sum(), x)
    assert seen == []


@pytest.mark.parametrize("name", GATES_WITH_WEIGHTS)
def test_the_weights_are_the_modules_own_again_after_a_call_that_fails(name) -> None:
    gate = build_gate(name, C)
    before = dict(gate.named_parameters())

    class FailsError(Exception):
        pass

    method = "scale_map" if gate.sees_map else "scale_and_shift"

    def fail(*args: object) -> torch.Tensor:
        getattr(type(gate), method)(gate, *args)
        raise FailsError

    setattr(gate, method, fail)
    with pytest.raises(FailsError):
        norm_gate_add_act(torch.randn(2, C, 3, 3), nn.BatchNorm2d(C), gate)
    after = dict(gate.named_parameters())
    assert all(after[key] is parameter for key, parameter in before.items())


class Recurrent(Gate):
    """Its weights are read from a list of the layer, not from where modules keep parameters."""

    def __init__(self) -> None:
        super().__init__(C)
        self.rnn = nn.GRU(1, 1)

    def logits(self, s: torch.Tensor) -> torch.Tensor:
        return self.rnn(s.T.float().unsqueeze(2))[0].squeeze(2).T.to(s.dtype)


class Checkpointed(Gate):
    """Computes its logits a second time in the backward."""

    def __init__(self) -> None:
        super().__init__(C)
        self.fc = nn.Linear(C, C)

    def logits(self, s: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.fc, s, use_reentrant=False)


@pytest.mark.parametrize("make", [Recurrent, Checkpointed])
def test_gates_that_read_their_weights_in_their_own_way_get_the_same_gradients(make) -> None:
    gate = make()
    other = copy.deepcopy(gate)
    x = torch.randn(3, C, 4, 5)
    for module, backend in ((gate, "auto"), (other, "reference")):
        with ecanet.backend(backend):
            norm_gate_add_act(x, nn.BatchNorm2d(C), module, x, "relu").square().sum().backward()
    for got, want in zip(gate.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-4)
