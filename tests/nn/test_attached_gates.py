"""A gate that is attached to a module scales what it returns; on a norm it rides in the fused tail."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ecanet.nn import ECA, SE, norm_gate_add_act
from ecanet.nn.attached import attach_, attached_gate, detach_
from ecanet.nn.tail import eager
from tests.kernels_here import needs_kernels

N, C = 4, 16


def pair(gate: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    """A norm and a gate."""
    norm = nn.BatchNorm2d(C).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm, (gate or ECA(C)).double()


def attached(norm: nn.Module, gate: nn.Module) -> nn.Module:
    """A copy of the norm that carries a copy of the gate."""
    norm = copy.deepcopy(norm)
    attach_(norm, copy.deepcopy(gate))
    return norm


def maps() -> tuple[Tensor, Tensor]:
    x, residual = torch.randn(2, N, C, 5, 3, dtype=torch.float64).unbind()
    return x.requires_grad_(), residual.requires_grad_()


def test_an_attached_gate_scales_what_its_host_returns() -> None:
    norm, gate = pair()
    host, (x, _) = attached(norm, gate), maps()
    assert attached_gate(norm) is None
    assert torch.equal(host(x), gate(norm(x)))
    assert list(host.state_dict()) == [*norm.state_dict(), "gate.conv.weight"]
    detach_(host)
    assert attached_gate(host) is None
    assert torch.equal(host.eval()(x), norm.eval()(x))
    assert list(host.state_dict()) == list(norm.state_dict())


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("gate", [ECA(C), SE(C)], ids=["eca", "se"])
def test_the_tail_takes_it_along_with_the_norm(gate, training) -> None:
    norm, gate = pair(gate)
    host, (x, residual) = attached(norm, gate), maps()
    for module in (norm, gate, host):
        module.train(training)
    want = torch.relu(gate(norm(x)) + residual)
    got = norm_gate_add_act(x, host, None, residual, "relu")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    dout = torch.randn_like(want)
    wanted = torch.autograd.grad(want, [x, residual, *norm.parameters(), *gate.parameters()], dout)
    found = torch.autograd.grad(got, [x, residual, *host.parameters()], dout)
    for g, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(host.running_var, norm.running_var, rtol=1e-12, atol=1e-12)


@needs_kernels
def test_the_kernels_run_both_as_one(monkeypatch) -> None:
    calls = []
    compute = eager.norm_gate_add_act

    def see(backend, x, norm, gate, *rest):
        calls.append((norm, gate))
        return compute(backend, x, norm, gate, *rest)

    monkeypatch.setattr(eager, "norm_gate_add_act", see)
    x, residual = maps()
    norm_gate_add_act(x, attached(*pair()), None, residual, "relu")
    (norm_maths, gate_maths), *others = calls
    assert not others
    assert norm_maths is not None
    assert gate_maths.is_band


def test_another_gate_follows_the_one_that_hangs() -> None:
    norm, gate = pair()
    second, host, (x, residual) = ECA(C).double(), attached(norm, gate), maps()
    want = second(gate(norm(x))) + residual
    torch.testing.assert_close(norm_gate_add_act(x, host, second, residual), want, rtol=1e-12, atol=1e-12)


def test_a_users_hook_on_the_host_fires() -> None:
    norm, gate = pair()
    host, seen, (x, residual) = attached(norm, gate), [], maps()
    host.register_forward_hook(lambda module, args, output: seen.append(output))
    want = torch.relu(gate(norm(x)) + residual)
    torch.testing.assert_close(norm_gate_add_act(x, host, None, residual, "relu"), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(seen[0], gate(copy.deepcopy(norm)(x)))


def test_compiled_in_one_graph() -> None:
    norm, gate = pair()
    host, (x, residual) = attached(norm, gate), maps()
    want = torch.relu(gate(norm(x)) + residual)
    compiled = torch.compile(norm_gate_add_act, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, host, None, residual, "relu"), want, rtol=1e-10, atol=1e-10)


def test_a_gate_with_a_scale_is_scaled_in_every_path() -> None:
    norm, gate = pair()
    x, residual = maps()
    want = torch.relu(3 * gate(norm(x)) + residual)
    gate.register_buffer("scale", torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(torch.relu(gate(norm(x)) + residual), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm_gate_add_act(x, norm, gate, residual, "relu"), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        norm_gate_add_act(x, attached(norm, gate), None, residual, "relu"), want, rtol=1e-12, atol=1e-12
    )
    compiled = torch.compile(norm_gate_add_act, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, norm, gate, residual, "relu"), want, rtol=1e-10, atol=1e-10)


def test_what_a_gate_cannot_hang_on() -> None:
    with pytest.raises(ValueError, match="cannot be attached to a Sequential, which runs its children"):
        attach_(nn.Sequential(nn.ReLU()), ECA(C))
    host = attached(*pair())
    with pytest.raises(ValueError, match="with its own attribute 'gate'"):
        attach_(host, ECA(C))


@pytest.mark.parametrize("gate", [ECA(C), SE(C)], ids=["eca", "se"])
def test_a_neutral_gate_knows_its_constant(gate) -> None:
    assert gate.constant() is None
    gate.make_neutral_()
    assert gate.constant() == 0.5
    gate.register_buffer("scale", torch.tensor(2.0))
    assert gate.constant() == 1.0
    x = torch.randn(2, C, 3, 3)
    assert torch.equal(gate(x), x)
    assert gate.to("meta").constant() is None
