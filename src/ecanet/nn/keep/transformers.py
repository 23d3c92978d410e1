"""Gates in Hugging Face transformers' networks: gates that a checkpoint lacks are initialised correctly.

A network that calls :func:`ecanet.insert_gates_` in its constructor has gates that a plain checkpoint lacks.
``from_pretrained`` allocates missing tensors and then initialises their modules, each layer separately.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from ecanet.nn.events import GATE_GETS_FACTOR
from ecanet.nn.gate import Gate

#: The attribute that transformers sets on tensors, and older versions on modules, whose values come from a file.
_LOADED_FLAG = "_is_hf_initialized"


@GATE_GETS_FACTOR.subscribe
def keep_gates() -> None:
    """Let ``from_pretrained`` make gates that start as 1 equal to 1 again if a checkpoint lacks them.

    A gate that gets a factor calls this, and so does :func:`ecanet.insert_gates_`. It does nothing if transformers is
    not imported. Other modules are initialised as usual. Calling it again has no effect.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    network: Any = getattr(modeling, "PreTrainedModel", None)
    for name, patch in (
        ("_initialize_weights", _initializing_gates),
        ("_adjust_missing_and_unexpected_keys", _refusing_lost_factors),
    ):
        function = getattr(network, name, None)
        if function is not None and not getattr(function, "keeps_gates", False):
            setattr(network, name, patch(function))


def _initializing_gates(initialize: Callable[..., None]) -> Callable[..., None]:
    """Patch transformers' ``PreTrainedModel._initialize_weights``, called on every module after its children."""

    @functools.wraps(initialize)
    def initialize_with_gates(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        is_new = isinstance(module, Gate) and not getattr(module, _LOADED_FLAG, False)
        # Checked first, because transformers also flags what it has initialised.
        is_loaded = is_new and _comes_from_a_file(module)
        initialize(self, module, *args, **kwargs)
        if is_new and not is_loaded:
            module.reset_parameters()

    initialize_with_gates.keeps_gates = True  # type: ignore[attr-defined]
    return initialize_with_gates


def _refusing_lost_factors(adjust: Callable[..., Any]) -> Callable[..., Any]:
    """Patch transformers' check for keys that the network lacks: it would only warn about lost factors."""

    @functools.wraps(adjust)
    def adjust_with_gates(self: Any, loading: Any, *args: Any, **kwargs: Any) -> Any:
        gates = {name for name, module in self.named_modules() if isinstance(module, Gate) and module.scale is None}
        factors = [key for key in getattr(loading, "unexpected_keys", ()) if key.removesuffix(".scale") in gates]
        if factors:
            raise ValueError(
                f"the checkpoint has gates with a factor ({factors[0]} and {len(factors) - 1} more), and this "
                "network's gates have none: insert them with preserve=True and without fold"
            )
        return adjust(self, loading, *args, **kwargs)

    adjust_with_gates.keeps_gates = True  # type: ignore[attr-defined]
    return adjust_with_gates


def _comes_from_a_file(gate: Gate) -> bool:
    """Whether a checkpoint has the weights of a gate.

    Raises:
        ValueError: it has the weights, but not the factor that belongs to them.
    """
    weights: list[Any] = list(gate.parameters()) or [gate.scale]
    is_loaded = any(getattr(weight, _LOADED_FLAG, False) for weight in weights)
    if is_loaded and gate.scale is not None and not getattr(gate.scale, _LOADED_FLAG, False):
        raise ValueError(
            f"the checkpoint has weights of a {type(gate).__name__} gate without a factor, and this network's gates "
            f"have one, {gate.extra_repr()}: insert them with preserve=False"
        )
    return is_loaded
