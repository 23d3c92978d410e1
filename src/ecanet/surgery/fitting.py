"""Builds a gate that fits one place of a network."""

from typing import Literal

from torch import Tensor, nn

from ecanet.nn import Gate
from ecanet.nn.build import GateFactory, build_gate
from ecanet.nn.undo import Undo


def arguments_of(gate: nn.Module) -> str:
    """The constructor arguments of a gate without its factor, as ``repr`` shows them."""
    return ", ".join(gate._arguments()) if isinstance(gate, Gate) else gate.extra_repr()


def build_fitting_gate(
    gate: str | GateFactory,
    kernel_size: int | Literal["adaptive"],
    name: str,
    neighbour: nn.Module,
    channels: int | None,
    like: Tensor | None,
    undo: Undo,
) -> nn.Module:
    """Build a gate for one place of a network.

    Args:
        gate: As in :func:`ecanet.insert_gates_`.
        kernel_size: As in :func:`ecanet.insert_gates_`.
        name: Name of the place, for errors.
        neighbour: The module that the gate follows or replaces; the gate gets its mode.
        channels: Number of channels there, or None if it is not known.
        like: A tensor whose type and device the gate gets, if there is one.
        undo: Records the gate before it is changed: a function may return a module that is used elsewhere.

    Raises:
        ValueError: the number of channels is not known, or the gate cannot have it.
    """
    if channels is None:
        raise ValueError(
            f"the number of channels at {name} ({type(neighbour).__name__}) cannot be told from its layers: pass "
            "input_shape=, the shape of an input that the network takes"
        )
    try:
        built = build_gate(gate, channels, kernel_size)
    except ValueError as error:
        raise ValueError(f"{name}, {channels} channels: {error}") from error
    if isinstance(built, Gate) and built.channels != channels:
        raise ValueError(
            f"gate made a {type(built).__name__} of {built.channels} channels for {name}, which has {channels}"
        )
    undo.cover(built)
    if like is not None:
        built = built.to(device=like.device, dtype=like.dtype)
    return built.train(neighbour.training)
