"""make_neutral_: a gate of one exact constant for every input, from which training goes on."""

import pytest
import torch
from equations import GATES, NEVER_NEUTRAL
from torch.nn.utils import prune

from ecanet.nn import ESE, SE, SEShift

CHANNELS = 32
can_be_neutral = pytest.mark.parametrize("name", [name for name in GATES if name not in NEVER_NEUTRAL])
#: What neutral weights make of a gate: a sigmoid of 0, two of them, or a gate around 1.
CONSTANT = {"gct": 1.0, "grn": 1.0, "cbam": 0.25}


@can_be_neutral
def test_every_gate_is_exactly_the_returned_constant(name) -> None:
    gate = GATES[name](CHANNELS)
    constant = gate.make_neutral_()
    assert constant == gate.constant() == CONSTANT.get(name, 0.5)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for scale in (0, 1e-3, 1, 1e4):
            x = (scale * torch.randn(2, CHANNELS, 3, 3)).to(dtype)
            if not gate.sees_map:
                of_x, shift = gate.scale_and_shift(gate.statistics(x))
                assert (of_x == constant).all()
                assert shift is None or not shift.any()
            assert torch.equal(gate(x), x * constant)


@can_be_neutral
def test_gradients_still_reach_the_weights_and_move_the_gates(name) -> None:
    gate = GATES[name](CHANNELS)
    with torch.no_grad():
        for weight in gate.parameters():
            weight.abs_()  # with positive means, no hidden channel of SE and its like is silent
    constant = gate.make_neutral_()
    assert all(weight.requires_grad for weight in gate.parameters())
    x = torch.randn(4, CHANNELS, 3, 3) + 1
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (gate(x) * torch.randn_like(x)).sum().backward()
        optimizer.step()
    assert all(weight.grad.abs().sum() > 0 for weight in gate.parameters())
    assert (gate(x) != x * constant).any()
    assert gate.constant() is None


def test_the_same_parameters_stay_in_place_for_an_optimizer_that_holds_them() -> None:
    for name, build in GATES.items():
        if name not in NEVER_NEUTRAL:
            gate = build(CHANNELS)
            before = list(gate.parameters())
            gate.make_neutral_()
            assert all(a is b for a, b in zip(gate.parameters(), before, strict=True))


@can_be_neutral
def test_a_gate_with_pruned_weights_is_neutral_at_its_next_call_too(name) -> None:
    """The call computes a pruned weight anew from the parameter behind it."""
    x = torch.randn(2, CHANNELS, 3, 3)
    for key, _ in GATES[name](CHANNELS).named_parameters():
        gate = GATES[name](CHANNELS)
        with torch.no_grad():
            for weight in gate.parameters():
                torch.nn.init.normal_(weight)
        layer, _, weight_name = key.rpartition(".")
        prune.random_unstructured(gate.get_submodule(layer), weight_name, amount=0.25)
        constant = gate.make_neutral_()
        assert torch.equal(gate(x), x * constant)


@pytest.mark.parametrize("cls", [SE, SEShift])
def test_se_keeps_its_first_layer(cls) -> None:
    gate = cls(CHANNELS)
    before = gate.fc1.weight.detach().clone()
    gate.make_neutral_()
    assert torch.equal(gate.fc1.weight, before)
    assert before.abs().sum() > 0


def test_a_bias_alone_makes_a_gate_no_constant_one_half() -> None:
    for gate in (ESE(CHANNELS), SEShift(CHANNELS)):
        gate.make_neutral_()
        bias = gate.fc.bias if isinstance(gate, ESE) else gate.fc2.bias
        torch.nn.init.normal_(bias)
        assert gate.constant() is None


@pytest.mark.parametrize("name", NEVER_NEUTRAL)
def test_gates_that_no_weights_make_constant_say_so(name) -> None:
    gate = GATES[name](CHANNELS)
    with pytest.raises(ValueError, match=rf"{type(gate).__name__} cannot be made neutral.*no choice of its weights"):
        gate.make_neutral_()
    assert gate.constant() is None
