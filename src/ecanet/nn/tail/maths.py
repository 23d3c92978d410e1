"""What a norm and a gate compute: tensors, numbers and a function. No module has to be called."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn


class NormMaths(NamedTuple):
    """A BatchNorm. Without ``mean`` and ``var`` it takes those of the batch.

    Attributes:
        module: The norm itself, for its running statistics.
        mean: ``(C,)`` in evaluation; None where that of the batch is taken.
        var: ``(C,)``, biased, likewise.
        weight: ``(C,)`` or None for ones.
        bias: ``(C,)`` or None for zeros.
        eps: Added to the variance.
        group: The processes that share their statistics, or None.
    """

    module: nn.Module
    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    group: Any = None

    @property
    def takes_batch_statistics(self) -> bool:
        """Whether mean and variance are those of the batch."""
        return self.mean is None


class GateMaths(NamedTuple):
    """A gate: a function of the channel means.

    Attributes:
        function: Computes ``(N, C)`` gates from ``(N, C)`` means. The factor is in it.
        parameters: Every tensor that the function depends on and that may need a gradient.
        is_band: Whether it is ECA's band, and ``parameters`` its one weight: the kernels then compute it themselves.
        circular: Whether the band wraps around.
        factor: The factor of a band's gate, for the kernels.
    """

    function: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    is_band: bool = False
    circular: bool = False
    factor: float = 1.0

    @property
    def band(self) -> tuple[Tensor | None, bool, float]:
        """Weight, circular and factor as the operations take them. The weight is None if the gate is no band."""
        return (self.parameters[0], self.circular, self.factor) if self.is_band else NO_BAND


#: Weight, circular and factor where there is no gate, or one that the kernels do not compute.
NO_BAND: tuple[Tensor | None, bool, float] = (None, False, 1.0)
