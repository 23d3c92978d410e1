"""A gate hung on a module: it scales what the module returns, and the module stays what and where it was.

The gate is the module's child ``gate``, and a forward hook calls it, so every key of the network stays and the gate's
are ``NAME.gate.*``. The hook is a function of this file and finds the gate through its module: copies and pickles of
the network work. Where somebody builds a BatchNorm anew and hands its children on, as
:meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm` does, the gate hangs itself on the new one.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_module_registration_hook

from ecanet.nn.loading import HANGS, fill_with_gates_

#: Name of the gate in the module it hangs on.
GATE = "gate"

#: These call their children, or let others: one more would run, too.
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def run_gate(host: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook: what the module returns, scaled."""
    return host._modules[GATE](output)  # type: ignore[misc]


def hang_(host: nn.Module, gate: nn.Module) -> None:
    """Hang a gate on a module that has none.

    Raises:
        ValueError: the module has something called ``gate`` already, or calls all of its children.
    """
    if isinstance(host, CONTAINERS):
        raise ValueError(f"a gate cannot hang on a {type(host).__name__}, which runs its children: name its last one")
    if hasattr(host, GATE):
        raise ValueError(f"a {type(host).__name__} with an attribute {GATE!r} of its own cannot take one: wrap it")
    host.register_module(GATE, gate)
    host.register_forward_hook(run_gate)
    setattr(gate, HANGS, True)


def _hang_on_the_new_host(host: nn.Module, name: str, gate: nn.Module | None) -> None:
    hangs = name == GATE and getattr(gate, HANGS, False) and isinstance(host, _NormBase)
    if hangs and run_gate not in host._forward_hooks.values():
        host.register_forward_hook(run_gate)
        fill_with_gates_(host)


register_module_module_registration_hook(_hang_on_the_new_host)


def hung_gate(host: nn.Module) -> nn.Module | None:
    """The gate that hangs on a module, or None."""
    gate = host._modules.get(GATE)
    return gate if gate is not None and run_gate in host._forward_hooks.values() else None


def hung_gates(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Name and module of every host of a gate, and the gate."""
    for name, host in model.named_modules():
        gate = hung_gate(host)
        if gate is not None:
            yield name, host, gate


def take_down_(host: nn.Module) -> None:
    """Remove the gate that hangs on a module, and its hook."""
    for key in [key for key, hook in host._forward_hooks.items() if hook is run_gate]:
        del host._forward_hooks[key]
    vars(host._modules.pop(GATE)).pop(HANGS, None)
