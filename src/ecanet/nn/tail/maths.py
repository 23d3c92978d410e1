"""What a norm and a gate compute: tensors, numbers and a function. No module has to be called."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn


class NormMaths(NamedTuple):
    """A BatchNorm. Without ``mean`` and ``var`` it uses those of the batch.

    Attributes:
        module: The norm itself, for its running statistics.
        mean: ``(C,)`` in evaluation; None if that of the batch is used.
        var: ``(C,)``, biased; None likewise.
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


class Statistics(NamedTuple):
    """What a gate sees of a map ``(N, C, *spatial)``.

    Attributes:
        means: ``(N, C)``, over the positions of each channel; float32 for half types.
        variances: ``(N, C)``, biased; None for a gate that does not ask for them.
        positions: S, the number of positions of a map. The sum of squares is ``S (variances + means^2)``.
    """

    means: Tensor
    variances: Tensor | None = None
    positions: int = 1


#: The scale of a map, ``(N, C)``, and what is added to it, ``(N, C)`` or None.
ScaleAndShift = tuple[Tensor, Tensor | None]


def check_scale_and_shift(returned: Any) -> ScaleAndShift:
    """Return what a gate's ``scale_and_shift`` returned, if it is a scale and a shift.

    Raises:
        TypeError: it is not a pair, or the scale is not a tensor. A lone scale of two samples would unpack as a pair.
    """
    if not isinstance(returned, tuple) or len(returned) != 2 or isinstance(returned[0], float | int | None):
        what = ", ".join(type(t).__name__ for t in returned) if isinstance(returned, tuple) else ""
        raise TypeError(
            "a gate's scale_and_shift must return two values, a tensor for the scale and a tensor or None for the "
            f"shift, got {type(returned).__name__}{what and f' of {what}'}"
        )
    return returned


class GateGradients(NamedTuple):
    """What a gate's closed form returns.

    Attributes:
        means: ``(N, C)``.
        variances: ``(N, C)``, or None.
        parameters: One for each of the gate's parameters.
    """

    means: Tensor
    variances: Tensor | None
    parameters: tuple[Tensor, ...]


class GateMaths(NamedTuple):
    """A gate: a function of a map's statistics.

    Attributes:
        function: Computes scale and shift from the statistics. The factor is in the scale.
        parameters: Every tensor that the function depends on and that may need a gradient.
        is_band: Whether it is ECA's band, and ``parameters`` its one weight: the kernels then compute it themselves.
        circular: Whether the band wraps around.
        factor: The gate's factor, for code that computes the gate or its gradients itself.
        needs_variances: Whether the statistics must hold variances.
        backward: Computes the gradients in closed form, from the statistics, the parameters, the gradient of the scale
            without its factor and that of the shift. None for a gate that autograd goes through.
    """

    function: Callable[[Statistics], ScaleAndShift]
    parameters: tuple[Tensor, ...]
    is_band: bool = False
    circular: bool = False
    factor: float = 1.0
    needs_variances: bool = False
    backward: Callable[[Statistics, tuple[Tensor, ...], Tensor, Tensor], GateGradients] | None = None

    @property
    def band(self) -> tuple[Tensor | None, bool, float]:
        """Weight, circular and factor as the operations take them. The weight is None if the gate is not a band."""
        return (self.parameters[0], self.circular, self.factor) if self.is_band else NO_BAND


#: Weight, circular and factor where there is no gate, or one that the kernels do not compute.
NO_BAND: tuple[Tensor | None, bool, float] = (None, False, 1.0)
