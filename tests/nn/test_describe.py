"""What ``ecanet gates`` and docs/gates.md say of every gate is what the gate does."""

import re
from pathlib import Path

import pytest
import torch

from ecanet.nn import GATES, Gate, build_gate, describe_gates, explain
from ecanet.nn.describe import _FACTS, listing, table
from tests.kernels_here import needs_kernels

DOCS = Path(__file__).parents[2] / "docs/gates.md"
every_gate = pytest.mark.parametrize("gate", describe_gates(), ids=lambda gate: gate.name)


def test_every_gate_has_its_facts_and_its_line_in_the_order_of_the_names() -> None:
    assert list(_FACTS) == list(GATES) == [gate.name for gate in describe_gates()]
    for gate in describe_gates():
        assert all((gate.formula, gate.parameters_of_c, gate.neutral_weights, gate.source)), gate.name


@every_gate
@pytest.mark.parametrize("channels", [64, 256])
def test_the_formula_of_the_parameters_counts_those_that_are_there(gate, channels) -> None:
    built = build_gate(gate.name, channels)
    r, k = getattr(built, "reduction", 1), getattr(built, "kernel_size", 1)
    text = gate.parameters_of_c.partition(",")[0].replace("^", "**")
    text = re.sub(r"(?<=[\dkC)]) (?=[C(])", " * ", text)  # a space is a product
    count = eval(text, {}, {"C": channels, "r": r, "k": k})
    assert count == sum(p.numel() for p in built.parameters())
    assert channels != 256 or gate.parameters == count


@every_gate
def test_the_neutral_start_is_the_one_that_the_gate_has(gate) -> None:
    built = build_gate(gate.name, 64)
    if gate.neutral is None:
        assert gate.neutral_start == f"none: {gate.neutral_weights}"
        with pytest.raises(ValueError, match="neutral"):
            built.make_identity_()
        return
    built.make_identity_()
    assert built.factor == 1 / gate.neutral
    assert (f"factor {built.factor:g}" in gate.neutral_start) == (built.factor != 1)


@every_gate
@needs_kernels
def test_what_it_needs_decides_whether_the_tail_computes_it(gate) -> None:
    said = explain(torch.randn(2, 64, 3, 3), torch.nn.BatchNorm2d(64), build_gate(gate.name, 64))
    assert gate.fused == ("(norm, gate)" in said) == (gate.needs != "the map")


def test_describing_gates_draws_no_random_numbers() -> None:
    state = torch.random.get_rng_state()
    describe_gates()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_some_gates_can_be_asked_for_and_an_unknown_one_is_answered_with_the_closest() -> None:
    assert [gate.name for gate in describe_gates(["grn", "eca"])] == ["grn", "eca"]
    with pytest.raises(ValueError, match=r"gate must be one of .*got 'sma': did you mean 'simam'"):
        describe_gates(["sma"])


def test_a_gate_that_somebody_added_is_listed_by_the_first_line_of_its_docstring(monkeypatch) -> None:
    class Own(Gate):
        """x times the sigmoid of 0."""

        def logits(self, s: torch.Tensor) -> torch.Tensor:
            return 0 * s

    monkeypatch.setitem(GATES, "own", Own)
    *_, own = describe_gates()
    assert (own.name, own.formula, own.parameters, own.needs) == ("own", "x times the sigmoid of 0.", 0, "means")
    assert "x times the sigmoid of 0." in listing([own])


def test_the_page_has_the_table_that_the_command_prints() -> None:
    assert table(describe_gates()) in DOCS.read_text(), "ecanet gates --markdown prints it"


def test_one_name_that_is_no_list_is_not_taken_apart_into_letters() -> None:
    with pytest.raises(TypeError, match=r"names must be a list of names of gates, got 'grn': write \['grn'\]"):
        describe_gates("grn")
