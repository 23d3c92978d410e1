"""State dicts from before gates came in load into the network with gates, strictly, and keep their function."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ecanet.models.neutral import Neutralisable
from ecanet.nn.hung import GATE, hung_gate
from ecanet.surgery.layers import affine

#: Set on a gate that took another module's place: the keys that module had.
STANDS_FOR = "stands_for"
#: Set on a gate that a state dict without gates is to make neutral, so that the network computes what it did without.
PRESERVES = "preserves"


def hung_gates(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Name and module of every host of a gate, and the gate."""
    for name, host in model.named_modules():
        gate = hung_gate(host)
        if gate is not None:
            yield name, host, gate


def keep_loading_(model: nn.Module) -> None:
    """Let the network load state dicts of its original keys from now on."""
    stop_loading_(model)
    model.register_load_state_dict_pre_hook(_fill)


def stop_loading_(model: nn.Module) -> None:
    """Undo :func:`keep_loading_`."""
    hooks = model._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _fill]:
        del hooks[key]


@torch.no_grad()
def _fill(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The hook: adds to a state dict of the original keys what the gates need."""
    _fill_replaced(model, state, prefix)
    hung = list(hung_gates(model))
    gates = {f"{prefix}{name}.{GATE}.": gate for name, _, gate in hung}
    if not gates or any(key.startswith(gate_prefix) for gate_prefix in gates for key in state):
        return  # a state dict with gates
    for name, host, gate in hung:
        own = f"{prefix}{name}."
        is_there = all(f"{own}{key}" in state for key, _ in _own_tensors(host))
        if not is_there or not any(key.startswith(prefix) for key in state):
            continue  # a part of the network is loaded, and not this one
        source = gate
        if getattr(gate, PRESERVES, False):
            source = copy.deepcopy(gate)
            assert isinstance(source, Neutralisable)
            constant = source.make_neutral_()
            scale, tensors = getattr(source, "scale", None), affine(host)
            if isinstance(scale, Tensor):
                scale.fill_(1 / constant)
            elif tensors is not None:
                for key in ("weight", "bias"):
                    state[own + key] = state[own + key] / constant
        state.update({f"{own}{GATE}.{key}": value for key, value in source.state_dict().items()})


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    persistent = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
    for key, value in {**module._parameters, **persistent}.items():
        if value is not None and key != "num_batches_tracked":
            yield key, value


def _fill_replaced(model: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Drop the keys of modules whose place a gate took, and keep that gate."""
    for name, gate in model.named_modules():
        keys = getattr(gate, STANDS_FOR, None)
        if keys is None:
            continue
        own, start = gate.state_dict(), f"{prefix}{name}."
        found = {key for key in keys if start + key in state}
        is_own = all(start + key in state and state[start + key].shape == value.shape for key, value in own.items())
        if is_own or not found:
            continue
        for key in found:
            del state[start + key]
        state.update({start + key: value for key, value in own.items()})
