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
    """Raise unless the gate is 1: a subclass with maths of its own may leave out the factor."""
    cls = type(gate)
    own = next((name for name in ("scale_and_shift", "gate") if getattr(cls, name) is not getattr(Gate, name)), None)
    is_known = own is None or cls.forward is not Gate.forward
    if is_known or any(t.is_meta for t in (*gate.parameters(), *gate.buffers())):
        return
    scale, shift = gate.try_out()
    if not bool(((scale - 1).abs() < 1e-2).all()) or (shift is not None and not bool((shift.abs() < 1e-2).all())):
        raise ValueError(
            f"{cls.__name__}.{own}() does not return 1{'' if shift is None else ' and no shift'} after "
            "make_identity_(): it must return self.scaled(...) of its gates"
        )
