"""Makes networks start with gates that are 1, so that they compute what they compute without gates."""

import copy
from collections.abc import Iterator
from typing import Protocol

from torch import nn

from ecanet.nn.absent_gates import keep_loading_
from ecanet.nn.folding import check_foldable, fold_factors_
from ecanet.nn.neutral import make_identity_


class Gated(Protocol):
    """A network that can list its gates and the norms before them."""

    def gated_norms(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Pairs of a norm and the gate that scales its output."""
        ...


def make_neutral_(model: Gated, *, fold: bool = False) -> None:
    """Make a network with gates compute what it computes without them: every gate becomes 1, nothing else changes.

    Plain state dicts then load strictly and make the gates 1 again.

    Args:
        model: One of :mod:`ecanet.models`.
        fold: Fold the gates' factors into the norms before them: :func:`ecanet.fold_factors_`.

    Raises:
        ValueError: a gate cannot be constant (SE-Var1 has no weights), or with ``fold``, a norm cannot take its factor.
            The network is then unchanged.
    """
    assert isinstance(model, nn.Module)
    if fold:
        check_foldable(model)
    gates = [gate for _, gate in model.gated_norms()]
    for gate in gates:
        try:
            make_identity_(copy.deepcopy(gate))
        except ValueError as error:
            raise ValueError(
                f"gate {error}, so the network cannot start as its plain twin: take another gate, or neutral=False"
            ) from error
    for gate in gates:
        make_identity_(gate)
    keep_loading_(model)
    if fold:
        fold_factors_(model)
