"""State dicts from before a network got gates load strictly, and the network then computes what it did before.

A state dict may lack a gate if it has the rest of the gate's surroundings. A gate that starts as 1 then becomes 1
again; any other attached gate keeps its weights. Parts of the network that a state dict does not contain keep theirs
too, for example if it holds only a classifier.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ecanet.nn.gate import Gate

#: Set on a gate that is attached to a module (:mod:`ecanet.nn.attached`).
ATTACHED = "is_attached"
#: Set on a gate that is 1 for every input until it is trained (:meth:`ecanet.nn.Gate.make_identity_`).
STARTS_AS_IDENTITY = "starts_as_identity"


def keep_loading_(model: nn.Module) -> None:
    """Let a network, and each part of it, load state dicts that lack its gates; call it when the gates change."""
    surroundings = {model.get_submodule(name) for name in _names_of_surroundings(model)}
    for module in model.modules():
        if module in surroundings:
            fill_with_gates_(module)
        else:
            hooks = module._load_state_dict_pre_hooks
            for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _add_absent_gates]:
                del hooks[key]


def fill_with_gates_(module: nn.Module) -> None:
    """Let a module complete state dicts that lack its gates."""
    hooks = module._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", hook) is _add_absent_gates for hook in hooks):
        module.register_load_state_dict_pre_hook(_add_absent_gates)


def _may_be_absent(module: nn.Module) -> bool:
    return bool(getattr(module, ATTACHED, False) or getattr(module, STARTS_AS_IDENTITY, False))


def _gates_that_may_be_absent(model: nn.Module) -> dict[str, nn.Module]:
    """The gates that a state dict may lack, under each of their names."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if name and _may_be_absent(module)}


def _keys_outside(model: nn.Module, gates: dict[str, nn.Module]) -> list[str]:
    """Keys that a state dict from before the gates has; not ``num_batches_tracked``, which the oldest ones lack."""
    inside = tuple(f"{name}." for name in gates)
    return [key for key in model.state_dict() if not key.startswith(inside) and not key.endswith("num_batches_tracked")]


def _names_of_surroundings(model: nn.Module) -> Iterator[str]:
    """For each gate, the name of the innermost module around it that has tensors outside gates."""
    gates = _gates_that_may_be_absent(model)
    keys = _keys_outside(model, gates)
    for gate in gates:
        name = gate
        while name:
            name = name.rpartition(".")[0]
            if not name or any(key.startswith(f"{name}.") for key in keys):
                yield name
                break


def _add_absent_gates(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The pre-hook: runs before a module loads its own tensors and those of its children."""
    gates = _gates_that_may_be_absent(module)
    absent = [name for name in gates if not any(key.startswith(f"{prefix}{name}.") for key in state)]
    keys = _keys_outside(module, gates) if absent else []
    if not keys or not all(prefix + key in state for key in keys):
        return
    device = state[prefix + keys[0]].device
    for name in absent:
        path = name.split(".")
        inner = (".".join(path[:i]) for i in range(1, len(path)))
        if any(key.startswith(f"{part}.") for part in inner for key in keys):
            continue  # the gate's surroundings are a part of this module, which has its own hook
        gate: Any = gates[name]
        if getattr(gate, STARTS_AS_IDENTITY, False):
            gate = _as_identity(gate, device)
        state.update({f"{prefix}{name}.{key}": value for key, value in gate.state_dict().items()})


def _as_identity(gate: Any, device: torch.device) -> Any:
    """The gate, made 1; if it is on the meta device, a copy with values on ``device`` instead."""
    if isinstance(gate, Gate):
        if gate.has_no_values() or gate.scale is None:  # only the factor's buffer tells whether there are values
            gate.reset_parameters()
        gate.make_identity_()
    else:
        gate.make_neutral_()
    if not any(t.is_meta for t in (*gate.parameters(), *gate.buffers())):
        return gate
    twin = copy.deepcopy(gate).to_empty(device=device)
    for module in twin.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return twin
