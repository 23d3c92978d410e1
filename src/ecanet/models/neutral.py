"""Networks that start as their plain twins: constant gates, undone by the norms before them."""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Neutralisable(Protocol):
    """A gate that can be made constant: :meth:`ecanet.nn.Gate.make_neutral_`."""

    def make_neutral_(self) -> float:
        """Make the gate a constant and return it."""
        ...


class Gated(Protocol):
    """A network that can name its gates and the norms before them."""

    def gated_norms(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        """Pairs of a norm and the gate that scales its output."""
        ...


@torch.no_grad()
def make_neutral_(model: Gated) -> None:
    """Make a network with gates compute what it computes without them, on norms that were trained without them.

    Every gate becomes a constant c (1/2 for all gates with weights) and the norm before it takes 1/c: its weight and
    bias are doubled. In floating point the two cancel exactly.

    Args:
        model: A network whose norms hold a plain network's values: call it once, after building or loading them.

    Raises:
        ValueError: a gate cannot be constant (SE-Var1 has no weights), or a norm has no weight and bias.
    """
    pairs: list[tuple[Tensor, Tensor, Neutralisable]] = []
    for norm, gate in model.gated_norms():
        if not isinstance(gate, Neutralisable):
            raise ValueError(
                f"gate {type(gate).__name__} has no make_neutral_(), so the network cannot start as its plain twin: "
                "subclass ecanet.nn.Gate and define it, or load without the plain weights"
            )
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
            raise ValueError(
                f"the norm before the gate, {type(norm).__name__}, has no weight and bias to undo a constant gate: "
                "use one with affine=True"
            )
        pairs.append((weight, bias, gate))
    for weight, bias, neutralisable in pairs:
        constant = neutralisable.make_neutral_()
        weight.div_(constant)
        bias.div_(constant)
