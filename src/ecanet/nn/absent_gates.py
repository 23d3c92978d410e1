"""State dicts from before gates came into a network load strictly, and bring the function they had.

A state dict may lack a gate where the rest of the gate's surroundings is there. Then a gate that starts as 1 becomes 1
again, and another one that is attached to a module stays as it is. Parts that a state dict does not reach, such as that
of a classifier alone, stay too.
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
    """Let a network, and each part of it, load state dicts without its gates; call it when gates came in or went."""
    surroundings = {model.get_submodule(name) for name in _surroundings(model)}
    for module in model.modules():
        if module in surroundings:
            fill_with_gates_(module)
        else:
            hooks = module._load_state_dict_pre_hooks
            for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _add_absent_gates]:
                del hooks[key]


def fill_with_gates_(module: nn.Module) -> None:
    """Let a module add what its gates need to state dicts without them."""
    hooks = module._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", hook) is _add_absent_gates for hook in hooks):
        module.register_load_state_dict_pre_hook(_add_absent_gates)


def _may_be_absent(module: nn.Module) -> bool:
    return bool(getattr(module, ATTACHED, False) or getattr(module, STARTS_AS_IDENTITY, False))


def _gates(model: nn.Module) -> dict[str, nn.Module]:
    """Gates that may be absent, under every name they have."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if name and _may_be_absent(module)}


def _keys_outside(model: nn.Module, gates: dict[str, nn.Module]) -> list[str]:
    """Keys that a state dict from before the gates has; the oldest do not count batches."""
    inside = tuple(f"{name}." for name in gates)
    return [key for key in model.state_dict() if not key.startswith(inside) and not key.endswith("num_batches_tracked")]


def _surroundings(model: nn.Module) -> Iterator[str]:
    """Name of the innermost module around each gate that has tensors besides gates."""
    gates = _gates(model)
    keys = _keys_outside(model, gates)
    for gate in gates:
        name = gate
        while name:
            name = name.rpartition(".")[0]
            if not name or any(key.startswith(f"{name}.") for key in keys):
                yield name
                break


def _add_absent_gates(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The hook, before a module loads its own tensors and those inside it."""
    gates = _gates(module)
    absent = [name for name in gates if not any(key.startswith(f"{prefix}{name}.") for key in state)]
    keys = _keys_outside(module, gates) if absent else []
    if not keys or not all(prefix + key in state for key in keys):
        return
    device = state[prefix + keys[0]].device
    for name in absent:
        path = name.split(".")
        inner = (".".join(path[:i]) for i in range(1, len(path)))
        if any(key.startswith(f"{part}.") for part in inner for key in keys):
            continue  # a part of this module is the gate's surroundings
        gate: Any = gates[name]
        if getattr(gate, STARTS_AS_IDENTITY, False):
            gate = _as_identity(gate, device)
        state.update({f"{prefix}{name}.{key}": value for key, value in gate.state_dict().items()})


def _as_identity(gate: Any, device: torch.device) -> Any:
    """The gate, made 1; where it has no values yet, a copy that has, on the device."""
    if isinstance(gate, Gate):
        if gate.has_no_values():
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
