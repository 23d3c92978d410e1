"""Gates in Hugging Face transformers' networks: what ``from_pretrained`` does not find starts as it should.

A network that calls :func:`ecanet.insert_gates_` in its constructor has gates that a plain checkpoint lacks.
``from_pretrained`` gives missing tensors memory and then initialises the modules they belong to, each layer for itself.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from ecanet.nn.events import GATE_GETS_FACTOR
from ecanet.nn.gate import Gate

#: What transformers sets on a tensor, and older versions on a module, whose values come from a file.
_FLAG = "_is_hf_initialized"


@GATE_GETS_FACTOR.subscribe
def keep_gates() -> None:
    """Let ``from_pretrained`` make gates that start as 1 so again where a checkpoint lacks them.

    A gate that gets a factor calls this, and :func:`ecanet.insert_gates_`; where transformers is not imported, it does
    nothing. Other modules are initialised as ever;
    calling it twice does no more than calling it once.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    network: Any = getattr(modeling, "PreTrainedModel", None)
    for name, with_gates in (("_initialize_weights", _with_gates), ("_adjust_missing_and_unexpected_keys", _checked)):
        function = getattr(network, name, None)
        if function is not None and not getattr(function, "keeps_gates", False):
            setattr(network, name, with_gates(function))


def _with_gates(initialize: Callable[..., None]) -> Callable[..., None]:
    """Transformers' ``PreTrainedModel._initialize_weights``, which is called on every module after its children."""

    @functools.wraps(initialize)
    def initialize_with_gates(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        is_new = isinstance(module, Gate) and not getattr(module, _FLAG, False)
        # Asked before: transformers flags what it has initialised, too.
        loaded = is_new and _comes_from_a_file(module)
        initialize(self, module, *args, **kwargs)
        if is_new and not loaded:
            module.reset_parameters()

    initialize_with_gates.keeps_gates = True  # type: ignore[attr-defined]
    return initialize_with_gates


def _checked(adjust: Callable[..., Any]) -> Callable[..., Any]:
    """Transformers' look at what a file has and the network lacks, which it would only warn of."""

    @functools.wraps(adjust)
    def adjust_with_gates(self: Any, loading: Any, *args: Any, **kwargs: Any) -> Any:
        gates = {name for name, module in self.named_modules() if isinstance(module, Gate) and module.scale is None}
        found = [key for key in getattr(loading, "unexpected_keys", ()) if key.removesuffix(".scale") in gates]
        if found:
            raise ValueError(
                f"the checkpoint has gates with a factor ({found[0]} and {len(found) - 1} more), and this network's "
                "have none: insert them with preserve=True and without fold"
            )
        return adjust(self, loading, *args, **kwargs)

    adjust_with_gates.keeps_gates = True  # type: ignore[attr-defined]
    return adjust_with_gates


def _comes_from_a_file(gate: Gate) -> bool:
    """Whether a checkpoint has the weights of a gate.

    Raises:
        ValueError: it has, but not the factor that belongs to them.
    """
    weights: list[Any] = list(gate.parameters()) or [gate.scale]
    found = any(getattr(weight, _FLAG, False) for weight in weights)
    if found and gate.scale is not None and not getattr(gate.scale, _FLAG, False):
        raise ValueError(
            f"the checkpoint has weights of a {type(gate).__name__} gate without a factor, and this network's gates "
            f"have one, {gate.extra_repr()}: insert them with preserve=False"
        )
    return found
