"""What the tail knows of a norm and of a gate: tensors, numbers and a function, no modules to be called."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn


class NormMaths(NamedTuple):
    """A BatchNorm; without ``mean`` and ``var`` it takes those of the batch.

    Attributes:
        module: Whose running statistics move.
        mean: ``(C,)``, given, as in evaluation.
        var: ``(C,)``, biased, given.
        weight: ``(C,)`` or None for ones.
        bias: ``(C,)`` or None for zeros.
        eps: Added to the variance.
        group: Processes whose batches count as one.
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
        function: ``(N, C)`` means to ``(N, C)`` gates, the factor included.
        parameters: All that it depends on and that may want a gradient.
        is_band: Whether it is ECA's, of the one kernel in ``parameters``: the kernels compute it themselves.
        circular: Of the band.
        factor: Of the band's gate, for those who compute it themselves.
    """

    function: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    is_band: bool = False
    circular: bool = False
    factor: float = 1.0

    @property
    def band(self) -> tuple[Tensor | None, bool, float]:
        """Kernel, circular and factor as the operations take them; no kernel where the gate is no band."""
        return (self.parameters[0], self.circular, self.factor) if self.is_band else NO_BAND


#: Kernel, circular and factor where there is no gate, or one that the kernels do not compute.
NO_BAND: tuple[Tensor | None, bool, float] = (None, False, 1.0)
