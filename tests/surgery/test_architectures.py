"""Every architecture of the table in docs/surgery.md: in, the same function, trained, loaded, out again."""

import copy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from architectures import ARCHITECTURES, OK, Architecture
from networks import assert_same_state, build, images
from torch import Tensor, nn

from ecanet import insert_gates_, remove_gates_
from ecanet.inspect import gates
from ecanet.inspect import parameters as count

#: Gates and parameters by architecture, as the documentation has them.
DOCUMENTED = {
    cells[1]: (int(cells[5]), int(cells[6].replace(",", "")))
    for line in (Path(__file__).parents[2] / "docs" / "surgery.md").read_text().splitlines()
    if len(cells := [cell.strip() for cell in line.split("|")]) == 10 and cells[5].isdecimal() and cells[6]
}


#: With more parameters than these a network takes no step in float64: the others do, and theirs takes half the time.
LARGE = 10_000_000


class Step(NamedTuple):
    """What a network in training gives, and the gradients of all it has but gates, and of the gates."""

    output: Tensor
    gradients: dict[str, Tensor]
    of_gates: dict[str, Tensor | None]


def first_step(model: nn.Module, x: Tensor, training: bool = True) -> Step:
    """A step of training, after which the network is as before; what it drops at random is the same each time."""
    torch.manual_seed(0)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    y = model.train(training)(x)
    y.square().sum().backward()
    inside = tuple(f"{name}." for name in gates(model))
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.eval().zero_grad()
    for name, buffer in model.named_buffers():
        buffer.copy_(statistics[name])
    of_gates = {name: gradients.pop(name) for name in [*gradients] if name.startswith(inside)}
    return Step(y.detach(), gradients, of_gates)


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.expected == OK], ids=lambda a: a.name)
def test_gates_go_in_and_come_out(architecture: Architecture) -> None:
    """In float32; what the network computes then is the same in both types, and in training if it is not large."""
    model = build(architecture.name)
    original = copy.deepcopy(model.state_dict())
    pictures = {dtype: images(architecture.size, dtype=dtype) for dtype in (torch.float64, torch.float32)}
    trained_in = (torch.float64, torch.float32)[count(model) > LARGE :]
    before = {
        dtype: (evaluated(model.to(dtype), x), first_step(model, x) if dtype in trained_in else None)
        for dtype, x in pictures.items()
    }

    report = insert_gates_(model, where=architecture.where)

    assert len(report.rows) == len(gates(model))
    assert (len(report.rows), report.parameters) == DOCUMENTED[architecture.name]
    for dtype, x in reversed(pictures.items()):
        out, step = before[dtype]
        assert torch.equal(evaluated(model.to(dtype), x), out)
        if step is not None:
            step_with_gates = first_step(model, x)
            assert torch.equal(step_with_gates.output, step.output)
            assert_same_state(step_with_gates.gradients, step.gradients)
            assert len(step_with_gates.of_gates) == sum(1 for gate in gates(model).values() for _ in gate.parameters())
            of_gates = step_with_gates.of_gates
            if not all(gradient is None or gradient.any() for gradient in of_gates.values()):
                of_gates = first_step(model, x, training=False).of_gates  # a branch was dropped for both pictures
            for name, gradient in of_gates.items():
                assert gradient is not None, name
                assert gradient.any(), name

    for gate in gates(model).values():
        torch.nn.init.normal_(gate.conv.weight)
    model.load_state_dict(original)  # strict
    assert torch.equal(evaluated(model, x), out)

    assert len(remove_gates_(model).rows) == len(report.rows)
    assert torch.equal(evaluated(model, x), out)
    assert_same_state(model.to(torch.float32).state_dict(), original)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.expected != OK], ids=lambda a: a.name)
def test_what_cannot_take_gates_says_so_and_stays_as_it_was(architecture: Architecture) -> None:
    with torch.device("meta"):
        model = build(architecture.name)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=architecture.expected):
        insert_gates_(model, where=architecture.where)
    assert list(model.state_dict()) == keys
