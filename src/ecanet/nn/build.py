"""From a name, a class or a function to a gate: what every ``gate=`` argument accepts."""

import difflib
import inspect
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Literal

from torch import nn

from ecanet.nn.context import LCT, GaussianGCT
from ecanet.nn.eca import ECA, ECANS
from ecanet.nn.gate import Gate
from ecanet.nn.maps import CBAM, SimAM
from ecanet.nn.moments import GCT, GRN, SRM
from ecanet.nn.se import ESE, SE, SEGroup, SEShift, SEVar1, SEVar2, SEVar3, se_gc2, se_gc3
from ecanet.nn.timm_gates import PREFIX, TIMM_GATES, why_not_a_gate
from ecanet.untrusted import shown

GateFactory = Callable[..., nn.Module]
GateSpec = str | GateFactory | None

#: Every gate by name: the modules of the paper's Table 2, then other gates that see means, variances too, or the map.
GATES: dict[str, GateFactory] = {
    "eca": ECA,
    "eca_ns": ECANS,
    "se": SE,
    "se_var1": SEVar1,
    "se_var2": SEVar2,
    "se_var3": SEVar3,
    "se_gc1": SEGroup,
    "se_gc2": se_gc2,
    "se_gc3": se_gc3,
    "ese": ESE,
    "se_shift": SEShift,
    "lct": LCT,
    "gct_gauss": GaussianGCT,
    "srm": SRM,
    "gct": GCT,
    "grn": GRN,
    "cbam": CBAM,
    "simam": SimAM,
}


#: What a ``gate=`` argument may name: :data:`GATES`, and timm's layers with the prefix ``timm:``.
NAMED_GATES: ChainMap[str, GateFactory] = ChainMap(GATES, dict(TIMM_GATES))


def check_gate_name(name: str, others: str = "") -> str:
    """Return a name if it is in :data:`NAMED_GATES`.

    Args:
        name: The name that was given.
        others: What else the caller accepts, for the error.

    Raises:
        ValueError: unknown name; the message lists the known names and suggests the closest one.
    """
    if name in NAMED_GATES:
        return name
    if name.startswith(PREFIX) and (why := why_not_a_gate(name)):
        raise ValueError(
            f"gate must not be {name!r}, because {why}; layers of timm that are gates: {_known(TIMM_GATES)}"
        )
    known = _known(TIMM_GATES if name.startswith(PREFIX) else GATES)
    more = "" if name.startswith(PREFIX) else f", {PREFIX + 'NAME'!r} for a layer of timm"
    raise ValueError(f"gate must be one of {known}{more}{others}, got {shown(name)!r}{did_you_mean(name)}")


def _known(gates: Mapping[str, object]) -> str:
    return ", ".join(map(repr, gates))


def did_you_mean(name: str) -> str:
    """The end of an error about an unknown gate: the closest name in :data:`NAMED_GATES`, or nothing.

    Example:
        >>> did_you_mean("ECA-NS"), did_you_mean("timm:cbma"), did_you_mean("coord")
        (": did you mean 'eca_ns'?", ": did you mean 'timm:cbam'?", ": did you mean 'timm:coord'?")
    """
    is_timm = name.lower().startswith(PREFIX)
    by_letters = {_letters(known.removeprefix(PREFIX)): known for known in (TIMM_GATES if is_timm else NAMED_GATES)}
    by_letters |= {} if is_timm else {_letters(known): known for known in GATES}  # if both have the name, ours
    close = difflib.get_close_matches(_letters(name[:64].lower().removeprefix(PREFIX)), by_letters, 1, 0.6)
    return f": did you mean {by_letters[close[0]]!r}?" if close else ""


def _letters(name: str) -> str:
    return "".join(c for c in name if c.isalnum())


def gate_factory(gate: str | GateFactory) -> GateFactory:
    """The callable ``(channels, ...) -> module`` behind a ``gate=`` argument.

    Args:
        gate: A name in :data:`GATES`, a layer of timm such as ``timm:cbam``, or a class or function that takes the
            number of channels.

    Raises:
        ValueError: unknown name.
        TypeError: neither a name nor a callable.

    Example:
        >>> gate_factory("se")(64).reduction
        16
    """
    if isinstance(gate, str):
        return NAMED_GATES[check_gate_name(gate, ", a class or a function")]
    if isinstance(gate, nn.Module):
        raise TypeError(
            f"gate must be a name, a class or a function of the number of channels, got {type(gate).__name__}(): "
            "a module, but every block needs a gate of its own"
        )
    if not callable(gate):
        raise TypeError(
            f"gate must be a name, a class or a function of the number of channels, got {type(gate).__name__} {gate!r}"
        )
    return gate


def gate_name(gate: GateSpec) -> GateSpec:
    """The gate's name if it was given by its class, otherwise the argument: a name is easier to print and to save.

    Example:
        >>> gate_name(ECA)
        'eca'
    """
    return next((name for name, factory in NAMED_GATES.items() if factory is gate), gate)


def takes_kernel_size(factory: GateFactory) -> bool:
    """Whether the gate has a kernel size to choose."""
    parameters = inspect.signature(factory).parameters.values()
    return any(p.name == "kernel_size" or p.kind is p.VAR_KEYWORD for p in parameters)


def build_gate(
    gate: str | GateFactory,
    channels: int,
    kernel_size: int | Literal["adaptive"] = "adaptive",
    factor: float = 1.0,
) -> nn.Module:
    """Build one gate.

    Args:
        gate: A name in :data:`GATES`, a layer of timm such as ``timm:cbam``, or a class or function that takes the
            number of channels.
        channels: Number of channels C.
        kernel_size: For gates that have one; ``"adaptive"`` keeps the gate's default, which for ECA and ECA-NS is
            Eq. (12).
        factor: The gate's factor; 1 keeps the one that the class or function sets.

    Raises:
        TypeError: ``gate`` does not return a module.
        ValueError: unknown name, or a kernel size or a factor for a gate that has none.

    Example:
        >>> build_gate("eca", 256).kernel_size
        5
    """
    factory = gate_factory(gate)
    if kernel_size == "adaptive":  # keep the gate's default; partial(ECA, kernel_size=3) keeps its 3
        module = factory(channels)
    elif takes_kernel_size(factory):
        module = factory(channels, kernel_size=kernel_size)
    else:
        raise ValueError(f"kernel_size={kernel_size!r} was given, but gate={gate!r} has no kernel size: leave it out")
    if not isinstance(module, nn.Module):
        raise TypeError(f"gate={gate!r} must return a torch.nn.Module, got {type(module).__name__}")
    if factor != 1:
        if not isinstance(module, Gate):
            raise ValueError(
                f"factor={factor!r} was given, but gate={gate!r} makes a {type(module).__name__}, which has no factor: "
                "subclass ecanet.nn.Gate, or leave it out"
            )
        module.factor = factor
    return module
