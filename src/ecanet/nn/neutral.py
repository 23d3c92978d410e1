"""Gates that start as 1, so that a network that gets them still computes the same function."""

from typing import Protocol, runtime_checkable

from torch import nn

from ecanet.nn.absent_gates import STARTS_AS_IDENTITY
from ecanet.nn.gate import Gate


@runtime_checkable
class Neutralisable(Protocol):
    """A third-party gate that can be 1 for every input."""

    def make_neutral_(self) -> float:
        """Make the gate a constant and return it. It must be 1: there is no factor to undo another one."""
        ...


def make_identity_(gate: nn.Module) -> None:
    """Make a gate 1 for every input, now and whenever a state dict from before the gate is loaded.

    Args:
        gate: A :class:`ecanet.nn.Gate`, or a module with a ``make_neutral_()`` that returns 1.

    Raises:
        ValueError: the gate is neither, or no choice of its weights makes it 1; says why.
    """
    if isinstance(gate, Gate):
        gate.make_identity_()
        _check_is_identity(gate)
        return
    if not isinstance(gate, Neutralisable):
        raise ValueError(f"{type(gate).__name__} has no make_neutral_() and is not an ecanet.nn.Gate")
    constant = gate.make_neutral_()
    if constant != 1:
        raise ValueError(
            f"{type(gate).__name__} is {constant!r} when it is neutral, and has no factor to undo that (an "
            "ecanet.nn.Gate has one)"
        )
    setattr(gate, STARTS_AS_IDENTITY, True)


def _check_is_identity(gate: Gate) -> None:
    """Raise unless the gate is 1: a subclass with its own ``gate`` may leave out the factor."""
    if type(gate).gate is Gate.gate or any(t.is_meta for t in (*gate.parameters(), *gate.buffers())):
        return
    like = next(iter((*gate.parameters(), *gate.buffers())))
    g = gate.gate(like.new_ones(2, gate.channels))
    if not bool(((g - 1).abs() < 1e-2).all()):
        raise ValueError(
            f"{type(gate).__name__}.gate() does not return 1 after make_identity_(): it must return "
            "self.scaled(...) of its gates"
        )
