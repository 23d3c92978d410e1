"""make_neutral_: a gate of exactly one half for every input, from which training goes on."""

import pytest
import torch
from equations import GATES

from ecanet.nn import SE, SEVar1
from ecanet.ops import reference

CHANNELS = 32
with_weights = pytest.mark.parametrize("name", [name for name in GATES if name != "se_var1"])


@with_weights
def test_every_gate_is_exactly_the_returned_constant(name) -> None:
    gate = GATES[name](CHANNELS)
    assert gate.make_neutral_() == 0.5
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for scale in (0, 1e-3, 1, 1e4):
            x = (scale * torch.randn(2, CHANNELS, 3, 3)).to(dtype)
            assert (gate.gate(reference.squeeze(x, CHANNELS)) == 0.5).all()
            assert torch.equal(gate(x), x * 0.5)


@with_weights
def test_gradients_still_reach_the_weights_and_move_the_gates(name) -> None:
    gate = GATES[name](CHANNELS)
    gate.make_neutral_()
    assert all(weight.requires_grad for weight in gate.parameters())
    x = torch.randn(4, CHANNELS, 3, 3) + 1
    optimizer = torch.optim.SGD(gate.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        (gate(x) * torch.randn_like(x)).sum().backward()
        optimizer.step()
    assert all(weight.grad.abs().sum() > 0 for weight in gate.parameters())
    assert (gate.gate(reference.squeeze(x, CHANNELS)) != 0.5).any()


def test_the_same_parameters_stay_in_place_for_an_optimizer_that_holds_them() -> None:
    for name, build in GATES.items():
        if name != "se_var1":
            gate = build(CHANNELS)
            before = list(gate.parameters())
            gate.make_neutral_()
            assert all(a is b for a, b in zip(gate.parameters(), before, strict=True))


def test_se_keeps_its_first_layer() -> None:
    gate = SE(CHANNELS)
    before = gate.fc1.weight.detach().clone()
    gate.make_neutral_()
    assert torch.equal(gate.fc1.weight, before)
    assert before.abs().sum() > 0


def test_se_var1_has_no_weights_that_could_make_it_neutral() -> None:
    with pytest.raises(ValueError, match=r"SEVar1 cannot be made neutral.*weights"):
        SEVar1(CHANNELS).make_neutral_()
